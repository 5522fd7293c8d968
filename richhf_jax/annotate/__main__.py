"""Collects feedback from raters on a web page.

    python -m richhf_jax.annotate init PROJECT --images FOLDER         # what predict takes
    python -m richhf_jax.annotate raters add PROJECT ann bob           # prints their links
    python -m richhf_jax.annotate serve PROJECT
    python -m richhf_jax.annotate export PROJECT RAW.jsonl             # for datasets.consolidate

A link is a secret and shown once. An image that can't be taken is listed with the reason; the others are
taken, and the exit code is 3.
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from richhf_jax import errors, inputs, reading, writing
from richhf_jax.annotate import commands, dataset, intake, manage, project, suggestions, transfer
from richhf_jax.annotate.database import explained_errors
from richhf_jax.annotate.settings import MOST_RATERS
from richhf_jax.annotate.store import Store
from richhf_jax.foreign_text import for_terminal
from richhf_jax.inputs.record import bounded_lines

_FORMATS = ("raw", "scores", "label-studio", "dataset")


def init(options: argparse.Namespace) -> int:
    """Makes a project. Returns the exit code."""
    gold = intake.read_gold(options.gold) if options.gold else {}
    order = intake.read_order(options.order) if options.order else []
    predictions = suggestions.read(options.suggest) if options.suggest else {}
    given = inputs.Inputs(options.images, options.prompt)
    config = dataclasses.replace(project.Config(), raters=options.raters)
    failures: list[str] = []
    with writing.new_directory(options.project, "PROJECT") as folder:
        items = list(intake.items(folder, given, gold, failures, options.link))
        if not items:
            raise errors.UserError("\n".join([*failures[: commands.SHOWN_FAILURES], "no image can be taken"]))
        store = Store.create(folder, config, items)
        _set_order(store, options.order, order)
        _suggest(store, options.suggest, predictions, failures)
        secret = store.make_manager()
        store.close()
        links = _links(folder)
    golds = sum(item.gold is not None for item in items)
    print(
        f"{options.project}: {len(items):,} images, {golds:,} of them gold; {config.raters} raters an image"
    )
    print(links)
    print(f"the manager's link, shown once: {options.url}/m/{secret}")
    return _told_failures(failures, gold.keys() - {item.id for item in items})


def add(store: Store, options: argparse.Namespace) -> int:
    """Adds images or suggestions to a project, or changes the order. Returns the exit code."""
    if options.gold and not options.images:
        raise errors.UserError("--gold is for images that are added: give --images, too")
    if not (options.images or options.order or options.suggest):
        raise errors.UserError("nothing to add: give --images, --order or --suggest")
    gold = intake.read_gold(options.gold) if options.gold else {}
    predictions = suggestions.read(options.suggest) if options.suggest else {}
    failures: list[str] = []
    taken: set[str] = set()
    if options.images:
        given = inputs.Inputs(options.images, options.prompt)
        # All images are decoded before the transaction, for which raters would wait.
        items = list(intake.items(store.folder, given, gold, failures, options.link))
        taken = {item.id for item in items}
        print(f"{store.add_items(items):,} new images")
        print(_links(store.folder))
    if options.order:
        _set_order(store, options.order, intake.read_order(options.order))
    _suggest(store, options.suggest, predictions, failures)
    return _told_failures(failures, gold.keys() - taken)


def _links(folder: pathlib.Path) -> str:
    files = list((folder / project.IMAGES).iterdir())
    return (
        f"{project.IMAGES}/: {len(files):,} files, {sum(file.is_symlink() for file in files):,} of them links"
    )


def _set_order(store: Store, path: str | None, order: Sequence[str]) -> None:
    if not path:
        return
    if not store.prioritise(order):
        raise errors.UserError(f"{path}: it names no image of the project; it must have their ids")
    if unknown := set(order) - {item.id for item in store.items()}:
        print(f"{path}: {len(unknown):,} of its {len(order):,} images aren't in the project")


def _suggest(
    store: Store, path: str | None, predictions: Mapping[str, Mapping[str, Any]], failures: list[str]
) -> None:
    """Gives images their suggestions, and warns where a lack of one tells a gold image from the others."""
    if not path:
        return
    radius = store.config.point_radius
    given = suggestions.added(store.items(), path, predictions, radius, failures)
    items = [dataclasses.replace(item, suggestion=suggestion) for item, suggestion in given]
    store.add_items(items)
    print(f"{len(items):,} images have a suggestion")
    golds = [item for item in store.items() if item.gold is not None][store.config.calibration_items :]
    lacking = sum(item.suggestion is None for item in golds)
    if items and lacking:
        print(
            f"warning: {lacking:,} gold images behind the first round have no suggestion, by which raters may"
            " tell them from the others: predict them, too",
            file=sys.stderr,
        )


def _told_failures(failures: Sequence[str], lost_gold: set[str]) -> int:
    """Prints what was left out. Returns the exit code."""
    failures = [
        *failures,
        *(f"{for_terminal(name)}: a gold answer, but no image" for name in sorted(lost_gold)),
    ]
    return commands.told_failures(failures)


def manager(store: Store, options: argparse.Namespace) -> int:
    """Prints a new link for the manager; the earlier one is void."""
    print(f"{options.url}/m/{store.make_manager()}")
    return 0


def serve(store: Store, options: argparse.Namespace) -> int:
    """Serves the page until it is interrupted."""
    from richhf_jax.annotate import server

    return commands.serve(server.make_app(store), options, options.project)


def status(store: Store, options: argparse.Namespace) -> int:
    """Prints how far the project and each rater are."""
    found = manage.overview(store)
    counts, waiting = found["counts"], found["waiting"]
    print(f"{counts['finished']:,} of {counts['images']:,} images have {store.config.raters} answers")
    if waiting:
        names = ", ".join(map(for_terminal, waiting[:5]))
        print(f"{len(waiting):,} were skipped or called broken by two raters: {names}")
    print(f"{'rater':20} {'done':>6} {'open':>6} {'skipped':>8} {'median s':>9} {'gold':>6}")
    for rater in found["raters"]:
        seconds, gold = rater["seconds"], rater["gold"]
        print(
            f"{for_terminal(rater['name']):20} {rater['done']:6} {rater['open']:6} {rater['skipped']:8}"
            f" {'–' if seconds is None else f'{seconds:.0f}':>9} {'–' if gold is None else f'{gold:.2f}':>6}"
            f"{'' if rater['active'] else ' (deactivated)'}"
        )
    return 0


def export(store: Store, options: argparse.Namespace) -> int:
    """Writes the answers that count."""
    if options.first_answers and (unknown := transfer.without_first(store)):
        print(
            f"left out: {unknown:,} imported answers that followed a suggestion; the first ones aren't known",
            file=sys.stderr,
        )
    if options.format == "dataset":
        return _export_dataset(store, options)
    commands.check_out(options.out, store.folder)
    with writing.explained_disk_errors(options.out):
        if options.format == "label-studio":
            tasks = transfer.label_studio_tasks(store, options.names, options.first_answers)
            text = json.dumps(tasks, ensure_ascii=False, allow_nan=False, indent=1)
            config = pathlib.Path(options.out).with_suffix(".xml")
            writing.write(config, transfer.label_studio_config(store))
            writing.write(options.out, text + "\n")
            print(f"{options.out}: {len(tasks):,} tasks; their labelling configuration: {config}")
        else:
            lines = (transfer.raw_lines if options.format == "raw" else transfer.scores_csv)(
                store, options.names, options.first_answers
            )
            with writing.atomic(options.out) as new, new.open("w", encoding="utf-8") as file:
                count = sum(bool(file.write(line)) for line in lines)
            print(f"{options.out}: {count - (options.format == 'scores'):,} answers")
    return 0


def _export_dataset(store: Store, options: argparse.Namespace) -> int:
    if options.names:
        raise errors.UserError("a data set doesn't say who rated: leave out --names")
    with writing.explained_disk_errors(options.out), writing.new_directory(options.out, "OUT") as folder:
        sizes = dataset.write(store, folder, options.first_answers)
    print(f"{options.out}: {', '.join(f'{size:,} {split}' for split, size in sizes.items())}")
    return 0


def import_(store: Store, options: argparse.Namespace) -> int:
    """Takes answers from a file, all or none."""
    with (
        writing.explained_disk_errors(options.file, "Name a file that can be read"),
        open(options.file, "rb", opener=reading.regular) as file,
    ):
        if options.file.lower().endswith(".json"):
            given = transfer.read_label_studio(options.file, file.read(), store)
        else:
            given = transfer.read_raw(options.file, bounded_lines(file))
        print(f"{store.add_answers(given):,} answers taken")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line; None: that of the process."""
    parser = argparse.ArgumentParser(
        prog="python -m richhf_jax.annotate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parsers = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run, text: str) -> argparse.ArgumentParser:
        one = parsers.add_parser(name, help=text, description=text)
        one.set_defaults(run=run)
        return one

    one = command("init", init, "make a project from images and prompts")
    _add_inputs(one, required=True)
    one.add_argument(
        "--raters", type=commands.number(MOST_RATERS), default=3, help="answers an image; default %(default)s"
    )
    commands.add_url(one)
    one = command("add", add, "add images or suggestions to a project, or change the order")
    _add_inputs(one, required=False)
    commands.add_raters(command, "PROJECT")
    one = command("manager", manager, "print a new link to the manager's page")
    one.add_argument("project", metavar="PROJECT")
    commands.add_url(one)
    commands.add_serve(command, "PROJECT", serve)
    command("status", status, "print how far raters are").add_argument("project", metavar="PROJECT")
    one = command("export", export, "write the answers")
    one.add_argument("project", metavar="PROJECT")
    one.add_argument(
        "out", metavar="OUT", help="a file, overwritten if it exists; of a data set, a new folder"
    )
    one.add_argument(
        "--format",
        choices=_FORMATS,
        default="raw",
        help="raw ratings for datasets.consolidate (default), a CSV of scores, Label Studio's JSON, or a"
        " folder of records and images for datasets.rich_hf_18k",
    )
    one.add_argument("--names", action="store_true", help="write raters' names instead of pseudonyms")
    one.add_argument(
        "--first-answers",
        action="store_true",
        help="write what raters answered before they saw a suggestion",
    )
    one = command("import", import_, "take answers: raw ratings, or Label Studio's JSON (.json)")
    one.add_argument("project", metavar="PROJECT")
    one.add_argument("file", metavar="FILE")
    commands.add_backup(command, "PROJECT")
    return parser.parse_args(arguments)


def _add_inputs(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument("project", metavar="PROJECT")
    parser.add_argument(
        "--images",
        nargs="+",
        required=required,
        metavar="INPUT",
        help="images, folders, .csv, .jsonl, .parquet or .tar, as for predict",
    )
    parser.add_argument("--prompt", help="the prompt of images that have no .txt")
    parser.add_argument(
        "--link", action="store_true", help="link the images that need no change, instead of copying them"
    )
    parser.add_argument("--gold", metavar="FILE", help="right answers of some of the images, as raw ratings")
    parser.add_argument("--order", metavar="FILE", help="predict's order.csv: the images that come first")
    parser.add_argument(
        "--suggest",
        metavar="FILE",
        help="predict's predictions.jsonl: a rater sees the model's answer after their own first one",
    )


@errors.command("annotate")
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and exits the process."""
    options = parse(arguments)
    database = pathlib.Path(options.project) / project.DATABASE
    with writing.explained_disk_errors(options.project), explained_errors(database):
        if options.run is init:
            sys.exit(init(options))
        with contextlib.closing(Store(options.project)) as store:
            sys.exit(options.run(store, options))


if __name__ == "__main__":
    main()
