r"""Computes the result of a blind survey: which generator's images do raters prefer?

python -m richhf_jax.survey result ANSWERS.jsonl --order finetuned original
python -m richhf_jax.survey result ANSWERS.jsonl --format=html --out=survey.html
"""

import argparse
import json
import pathlib
from collections.abc import Sequence

from richhf_jax import errors, reading, writing
from richhf_jax.inputs.record import bounded_lines, reason
from richhf_jax.pages.table_formats import FORMATS, formatted
from richhf_jax.survey import answers, statistics, tables

# These show the figures of each prompt, too.
_WITH_PROMPTS = ("csv", "html")


def read(path: pathlib.Path, left_out: Sequence[str]) -> list[answers.Answer]:
    """Reads the answers of all raters but those `left_out`.

    Raises:
      errors.UserError: the file can't be read, a line is bad, no answer remains, or a rater isn't in it.
    """
    found = []
    try:
        with open(path, "rb", opener=reading.regular) as file:
            for number, answer in answers.read_answers(bounded_lines(file)):
                if isinstance(answer, answers.AnswerError):
                    raise errors.UserError(f"{path}:{number}: {answer}")
                found.append(answer)
    except OSError as error:
        raise errors.UserError(f"{path}: {reason(error)}") from None
    if unknown := set(left_out) - {answer.rater_id for answer in found}:
        raise errors.UserError(f"--leave-out: {path} has no answer of rater {sorted(unknown)[0]!r}")
    found = [answer for answer in found if answer.rater_id not in left_out]
    if not any(not answer.check for answer in found):
        raise errors.UserError(f"{path}: no answer to count; checks alone give no result")
    return found


def _check_order(order: Sequence[str], found: Sequence[answers.Answer]) -> None:
    names = {name for answer in found if not answer.check for name in (answer.left, answer.right)}
    if order and sorted(order) != sorted(names):
        raise errors.UserError(f"--order must name each generator once: {', '.join(sorted(names))}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m richhf_jax.survey",
        description=__doc__,
        epilog=f"Schema of ANSWERS.jsonl\n\n{answers.__doc__}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    result = commands.add_parser("result", help="the paper's Table 5, with intervals, tests and checks")
    result.add_argument("answers", type=pathlib.Path, metavar="ANSWERS.jsonl", help="one answer a line")
    result.add_argument(
        "--order",
        nargs="+",
        default=(),
        metavar="GENERATOR",
        help="the generators; figures are about a pair's first one; default: by name",
    )
    result.add_argument(
        "--leave-out", nargs="+", default=(), metavar="RATER", help="raters whose answers don't count"
    )
    formats = [*FORMATS, "json"]
    result.add_argument("--format", choices=formats, default="terminal", help="default: terminal")
    result.add_argument("--out", metavar="FILE", help="write to a file; default: print")
    return parser


@errors.command("survey")
def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    options = _parser().parse_args(arguments)
    if options.out:
        writing.check_file(options.out)
    found = read(options.answers, options.leave_out)
    _check_order(options.order, found)
    result = statistics.result(found, options.order)
    if options.format == "json":
        text = json.dumps(result, ensure_ascii=False, indent=1, allow_nan=False)
    else:
        rows = tables.rows(result, options.format in _WITH_PROMPTS)
        notes = tables.notes(result)
        if options.leave_out:
            notes.append(f"Left out: {', '.join(options.leave_out)}.")
        text = formatted(options.format, tables.TABLES, rows, notes)
    writing.write_or_print(text, options.out)


if __name__ == "__main__":
    main()
