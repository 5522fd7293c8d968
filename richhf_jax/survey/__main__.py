r"""Asks raters which generator's images they prefer, on a web page, and computes the result.

    python -m richhf_jax.survey init SURVEY --a=tuned/ --b=plain/       # folders of images with prompts
    python -m richhf_jax.survey raters add SURVEY ann bob cid           # prints their links
    python -m richhf_jax.survey serve SURVEY
    python -m richhf_jax.survey result SURVEY --order tuned plain

A link is a secret and shown once. A prompt or an image that can't be taken is listed with the reason; the
others are taken, and the exit code is 3. `result` also takes a file of answers.
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import statistics as averages
import sys
from collections.abc import Iterable, Iterator, Sequence

from richhf_jax import errors, feedback, reading, writing
from richhf_jax.annotate import commands
from richhf_jax.annotate.database import explained_errors
from richhf_jax.annotate.settings import MOST_RATERS
from richhf_jax.foreign_text import for_terminal
from richhf_jax.inputs.record import bounded_lines, reason
from richhf_jax.pages.table_formats import FORMATS, formatted
from richhf_jax.survey import answers, config, pairing, statistics, tables
from richhf_jax.survey.store import Store

# These show the figures of each prompt, too.
_WITH_PROMPTS = ("csv", "html")


def init(options: argparse.Namespace) -> int:
    """Makes a survey. Returns the exit code."""
    generators = pairing.named([options.a, options.b, *options.others])
    found = pairing.find(generators)
    settings = dataclasses.replace(
        config.Config(), raters=options.raters, question=config.QUESTIONS[options.question], seed=options.seed
    )
    with writing.new_directory(options.survey, "SURVEY") as folder:
        prompts = list(pairing.prompts(folder, found, options.prompts, options.seed))
        if not prompts:
            failures = found.failures[: commands.SHOWN_FAILURES]
            raise errors.UserError("\n".join([*failures, "no prompt is left"]))
        pairing.check_differ(prompts)
        store = Store.create(folder, settings, prompts)
        _, pairs = store.counts()
        store.close()
    print(
        f"{options.survey}: {len(prompts):,} prompts, {len(generators)} generators, {pairs:,} pairs;"
        f" {settings.raters} raters a pair"
    )
    if found.drawn:
        print(f"{found.drawn:,} prompts have several images of a generator: --seed draws one of them")
    if options.prompts and len(prompts) < options.prompts:
        print(f"--prompts={options.prompts}, but only {len(prompts):,} can be taken", file=sys.stderr)
    return commands.told_failures(found.failures)


def serve(store: Store, options: argparse.Namespace) -> int:
    """Serves the page until it is interrupted."""
    from richhf_jax.survey import server

    return commands.serve(server.make_app(store), options, options.survey)


def status(store: Store, options: argparse.Namespace) -> int:
    """Prints how far the survey and each rater are."""
    full, pairs = store.counts()
    print(f"{full:,} of {pairs:,} pairs have {store.config.raters} answers")
    given, skips = list(store.given()), store.skips()
    checks = statistics.checks([one.answer for one in given])
    print(f"{'rater':20} {'answers':>8} {'skipped':>8} {'median s':>9}  checks passed")
    for person in store.people():
        seconds = [one.seconds for one in given if one.person.id == person.id]
        mine = checks.get(person.known_as(names=False), {"answers": 0})
        made = [mine[name] for name in answers.CHECKS if name in mine]
        passed, asked = (sum(one[count] for one in made) for count in ("passed", "asked"))
        print(
            f"{for_terminal(person.name):20} {mine['answers']:8} {skips.get(person.id, 0):8}"
            f" {averages.median(seconds) if seconds else 0:9.1f}  {passed} of {asked}"
            f"{'' if person.active else ' (deactivated)'}"
        )
    return 0


def export(store: Store, options: argparse.Namespace) -> int:
    """Writes the answers."""
    commands.check_out(options.out, store.folder)
    with (
        writing.explained_disk_errors(options.out),
        writing.atomic(options.out) as new,
        new.open("w", encoding="utf-8") as file,
    ):
        count = sum(bool(file.write(line)) for line in _lines(store, options.names))
    print(f"{options.out}: {count:,} answers, with checks")
    return 0


def _lines(store: Store, names: bool) -> Iterator[str]:
    """Yields the lines of an export; see `answers`."""
    for one in store.given(names):
        fields = dataclasses.asdict(one.answer)
        if not fields["check"]:
            del fields["check"]
        yield json.dumps(fields | {"seconds": round(one.seconds, 1)}, ensure_ascii=False) + "\n"


def read(path: pathlib.Path, left_out: Sequence[str]) -> list[answers.Answer]:
    """Reads the answers of all raters but those `left_out`, from a file or a survey's folder.

    Raises:
      errors.UserError: the file can't be read, a line is bad, no answer remains, or a rater isn't in it.
    """
    try:
        if path.is_dir():
            with contextlib.closing(Store(path)) as store:
                found = _parsed(path, _lines(store, names=False))
        else:
            with open(path, "rb", opener=reading.regular) as file:
                found = _parsed(path, bounded_lines(file))
    except OSError as error:
        raise errors.UserError(f"{path}: {reason(error)}") from None
    if unknown := set(left_out) - {answer.rater_id for answer in found}:
        raise errors.UserError(f"--leave-out: {path} has no answer of rater {sorted(unknown)[0]!r}")
    found = [answer for answer in found if answer.rater_id not in left_out]
    if not any(not answer.check for answer in found):
        raise errors.UserError(f"{path}: no answer to count; checks alone give no result")
    return found


def _parsed(path: pathlib.Path, lines: Iterable[str | bytes]) -> list[answers.Answer]:
    found = []
    for number, answer in answers.read_answers(lines):
        if isinstance(answer, answers.AnswerError):
            raise errors.UserError(f"{path}:{number}: {answer}")
        found.append(answer)
    return found


def _check_order(order: Sequence[str], found: Sequence[answers.Answer]) -> None:
    names = {name for answer in found if not answer.check for name in (answer.left, answer.right)}
    if order and sorted(order) != sorted(names):
        raise errors.UserError(f"--order must name each generator once: {', '.join(sorted(names))}")


def result(options: argparse.Namespace) -> int:
    """Prints or writes the result."""
    if options.out:
        writing.check_file(options.out)
    found = read(options.answers, options.leave_out)
    _check_order(options.order, found)
    figures = statistics.result(found, options.order)
    if options.format == "json":
        text = json.dumps(figures, ensure_ascii=False, indent=1, allow_nan=False)
    else:
        rows = tables.rows(figures, options.format in _WITH_PROMPTS)
        notes = tables.notes(figures)
        if options.leave_out:
            notes.append(f"Left out: {', '.join(options.leave_out)}.")
        text = formatted(options.format, tables.TABLES, rows, notes)
    writing.write_or_print(text, options.out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m richhf_jax.survey",
        description=__doc__,
        epilog=f"Schema of ANSWERS.jsonl\n\n{answers.__doc__}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parsers = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run, text: str) -> argparse.ArgumentParser:
        one = parsers.add_parser(name, help=text, description=text)
        one.set_defaults(run=run)
        return one

    _add_init(command("init", init, "make a survey from two generators' images, or more"))
    commands.add_raters(command, "SURVEY")
    commands.add_serve(command, "SURVEY", serve)
    command("status", status, "print how far raters are").add_argument("survey", metavar="SURVEY")
    one = command("export", export, "write the answers")
    one.add_argument("survey", metavar="SURVEY")
    one.add_argument("out", metavar="ANSWERS.jsonl", help="overwritten if it exists")
    one.add_argument("--names", action="store_true", help="write raters' names instead of pseudonyms")
    commands.add_backup(command, "SURVEY")
    _add_result(command("result", result, "the paper's Table 5, with intervals, tests and checks"))
    return parser


def _add_init(one: argparse.ArgumentParser) -> None:
    one.add_argument("survey", metavar="SURVEY")
    text = "images with prompts as predict takes them: a folder, .csv, .jsonl, .parquet or .tar"
    one.add_argument("--a", required=True, metavar="[NAME=]DIR", help=f"{text}; default name: DIR's")
    one.add_argument("--b", required=True, metavar="[NAME=]DIR", help="the other generator's")
    one.add_argument(
        "--others",
        nargs="+",
        default=(),
        metavar="[NAME=]DIR",
        help="further generators: all pairs are asked",
    )
    one.add_argument(
        "--question",
        choices=list(config.QUESTIONS),
        default=feedback.PLAUSIBILITY,
        help="default %(default)s; config.json has the wording",
    )
    one.add_argument(
        "--raters", type=commands.number(MOST_RATERS), default=3, help="answers a pair; default %(default)s"
    )
    one.add_argument("--prompts", type=commands.number(10**6), help="number of prompts, drawn; default: all")
    one.add_argument(
        "--seed", type=int, default=0, help="draws prompts, images, orders and sides; default %(default)s"
    )


def _add_result(one: argparse.ArgumentParser) -> None:
    one.add_argument(
        "answers",
        type=pathlib.Path,
        metavar="ANSWERS",
        help="a survey's folder, or a file with an answer a line",
    )
    one.add_argument(
        "--order",
        nargs="+",
        default=(),
        metavar="GENERATOR",
        help="the generators; figures are about a pair's first one; default: by name",
    )
    one.add_argument(
        "--leave-out", nargs="+", default=(), metavar="RATER", help="raters whose answers don't count"
    )
    formats = [*FORMATS, "json"]
    one.add_argument("--format", choices=formats, default="terminal", help="default: terminal")
    one.add_argument("--out", metavar="FILE", help="write to a file; default: print")


@errors.command("survey")
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and exits the process."""
    options = _parser().parse_args(arguments)
    if options.run is result:
        result(options)
        return
    database = pathlib.Path(options.survey) / config.DATABASE
    with writing.explained_disk_errors(options.survey), explained_errors(database):
        if options.run is init:
            sys.exit(init(options))
        with contextlib.closing(Store(options.survey)) as store:
            sys.exit(options.run(store, options))


if __name__ == "__main__":
    main()
