r"""Puts evaluations side by side in the paper's four tables.

    python -m richhf_jax.tables runs/rahf runs/resnet --names RAHF ResNet-50 --bootstrap=1000
    python -m richhf_jax.tables runs/rahf --published --format=latex --out=tables.tex

DIR is a result of `python -m richhf_jax.eval`, or a MODEL_DIR, whose newest result is taken. All evaluations
must be of the same images with the same targets, in whatever order. Neither TensorFlow nor JAX is loaded.

--bootstrap adds 95 % percentile intervals over images: what other images of this kind would change. Systems
share the resampled images, so the difference of two has an interval, too, and that decides the marks:
* its difference to the first row is beyond chance (the interval excludes 0), ≈ it isn't.
"""

import argparse
import dataclasses
import math
import pathlib
from collections.abc import Sequence

import numpy as np
from etils import epath

from richhf_jax import bootstrap, errors, foreign_text, image_values, metrics, reading, writing
from richhf_jax.image_values import ImageValues
from richhf_jax.pages import published
from richhf_jax.pages.table_formats import FORMATS, PAPER_TABLES, Row, formatted, rows_of

# The fewest that have percentiles of 2.5 %, and the most that take minutes.
_RESAMPLES = 40, 100_000
# Files of an evaluation.
_RESULTS = ("metrics.json", "baselines.json", image_values.FILE, "predictions.jsonl", "report.html")


def find(directory: str) -> epath.Path:
    """Returns the folder of an evaluation: the given one, or the newest of a MODEL_DIR.

    Raises:
      errors.UserError: there is none.
    """
    path = epath.Path(directory)
    if (path / "metrics.json").exists():
        return path
    found = list((path / "inference_eval").glob("*/*/*/metrics.json"))
    if not found:
        raise errors.UserError(
            f"{directory} has neither metrics.json nor inference_eval/<task>/<split>/<step>/metrics.json:"
            " name a folder of results, or a MODEL_DIR that python -m richhf_jax.eval has evaluated"
        )
    return max(found, key=lambda file: (file.stat().mtime, str(file))).parent


def read(directory: epath.Path) -> ImageValues:
    """Reads the images' values of an evaluation, and checks that its metrics.json is made of them.

    Raises:
      errors.UserError: a file is missing or damaged, or they are of different evaluations.
    """
    values = image_values.read(directory)
    written = reading.read_json(directory / "metrics.json")
    try:
        found, *_ = [metrics.aggregate(values.targets, columns) for columns in values.systems.values()]
    except KeyError as error:
        raise errors.UserError(
            f"{directory / image_values.FILE} is damaged: it lacks {error}. Evaluate again"
        ) from error
    found |= {"num_examples": len(values.ids)}
    for name, value in found.items():
        other = written.get(name)
        if not isinstance(other, float | int) or not math.isclose(value, other, rel_tol=1e-6, abs_tol=1e-9):
            raise errors.UserError(
                f"{directory}: {name} is {other} in metrics.json but {value} by {image_values.FILE}: the"
                " files are of different evaluations. Evaluate again"
            )
    return values


def aligned(first: ImageValues, other: ImageValues, names: tuple[str, str]) -> ImageValues:
    """Returns the other evaluation with its images in the first one's order.

    Args:
      first, other: two evaluations.
      names: their names, for the message.

    Raises:
      errors.UserError: they are of different images, or have different targets.
    """
    where = " and ".join(
        foreign_text.for_terminal(f"{name} ({one.task}, {one.split})")
        for name, one in zip(names, (first, other), strict=True)
    )
    for name, lacking in zip(names, (set(first.ids), set(other.ids)), strict=True):
        if missing := [image for image in (*first.ids, *other.ids) if image not in lacking]:
            raise errors.UserError(
                f"{where} are of different images: {name} lacks {len(missing)}, such as {missing[0]!r}."
                " Evaluate both on the same split"
            )
    if list(other.ids) != list(first.ids):
        other = _in_order(other, first.ids, where)
    for key in _compared(first, other):
        wanted, given = first.targets[key], other.targets[key]
        differs = ~((wanted == given) | (np.isnan(wanted) & np.isnan(given)))
        if differs.any():
            i = int(np.argmax(differs))
            raise errors.UserError(
                f"{where} have different targets: {key} of {first.ids[i]!r} is {wanted[i]:g} and"
                f" {given[i]:g}. Evaluate both on the same data, at the same image size"
            )
    return other


def _compared(first: ImageValues, other: ImageValues) -> list[str]:
    """Returns the names of the targets' values that both models are measured on.

    Targets of an evaluation may lack what its model doesn't predict, or have it in another size.
    """
    one, two = _measured_targets(first), _measured_targets(other)
    return [key for key in one if key in two]


def _measured_targets(values: ImageValues) -> metrics.Columns:
    """Returns the targets that the evaluation's model is measured on."""
    outputs = {_output(name) for name in next(iter(values.systems.values()))}
    return {name: column for name, column in values.targets.items() if _output(name) in outputs}


def _output(name: str) -> tuple[str, str]:
    """Returns what a value is of: "heatmap/mse/<kind>" -> ("heatmap", <kind>); words are ("keywords", "")."""
    group, *_, kind = name.split("/")
    return group, "" if group == "keywords" else kind


def _in_order(values: ImageValues, ids: Sequence[str], where: str) -> ImageValues:
    """Returns the values in the order of `ids`, which are the same images."""
    places = {image: i for i, image in enumerate(values.ids)}
    if not len(places) == len(values.ids) == len(ids):
        raise errors.UserError(f"{where}: two images have one name, so they can't be matched by name")
    order = np.array([places[image] for image in ids])

    def taken(columns: metrics.Columns) -> metrics.Columns:
        return {name: column[order] for name, column in columns.items()}

    systems = {name: taken(columns) for name, columns in values.systems.items()}
    return dataclasses.replace(values, ids=ids, targets=taken(values.targets), systems=systems)


def with_intervals(rows: Sequence[Row], samples: Sequence[bootstrap.Samples]) -> list[Row]:
    """Returns the rows with 95 % intervals, and with what differs from the first row.

    Args:
      rows: one for each system.
      samples: `bootstrap.samples` of the systems.
    """
    first = samples[0]
    results = []
    for row, own in zip(rows, samples, strict=True):
        shared = first.keys() & own.keys() if own is not first else ()
        intervals = {key: bootstrap.interval(values) for key, values in own.items()}
        differences = {key: bootstrap.interval(own[key] - first[key]) for key in shared}
        results.append(
            dataclasses.replace(
                row,
                intervals={key: ends for key, ends in intervals.items() if not math.isnan(ends[0])},
                differs={
                    key: not low <= 0 <= high
                    for key, (low, high) in differences.items()
                    if not math.isnan(low)
                },
            )
        )
    return results


def make(
    directories: Sequence[str],
    names: Sequence[str] = (),
    baselines: bool = False,
    with_published: bool = False,
    resamples: int = 0,
    seed: int = 0,
) -> tuple[list[Row], list[str]]:
    """Reads evaluations and returns the tables' rows, and notes for below the tables.

    Args:
      directories: folders of results, or MODEL_DIRs.
      names: the rows' names; () for the systems' own.
      baselines: whether the baselines of the first evaluation get rows, too.
      with_published: whether published figures get rows, too.
      resamples: number of bootstrap resamples; 0 for no intervals.
      seed: of the resamples.

    Raises:
      errors.UserError: as `find`, `read` and `aligned`.
    """
    evaluations: list[ImageValues] = []
    for directory in directories:
        evaluation = read(find(directory))
        for earlier, name in zip(evaluations, directories, strict=False):
            evaluation = aligned(earlier, evaluation, (name, directory))
        evaluations.append(evaluation)
    first, *_ = evaluations
    systems = [next(iter(evaluation.systems.items())) for evaluation in evaluations]
    systems = [(name, values) for name, (_, values) in zip(names, systems, strict=True)] if names else systems
    if baselines:
        systems += list(first.systems.items())[1:]
    # Those that models are measured on are the same in all evaluations; others may differ, or lack.
    targets = dict(first.targets)
    for evaluation in evaluations:
        targets |= _measured_targets(evaluation)
    rows = [Row(name, metrics.aggregate(targets, values)) for name, values in systems]
    notes = [f"{len(first.ids):,} images of {first.task}, {first.split}."]
    if resamples:
        samples = bootstrap.samples(targets, [v for _, v in systems], len(first.ids), resamples, seed)
        rows = with_intervals(rows, samples)
        notes.append(f"Brackets: 95 % intervals over the images, {resamples:,} resamples.")
    if with_published:
        rows += published.ROWS
        notes.append("Published figures are of RichHF-18K's test split.")
    return rows, notes


def _check_out(out: pathlib.Path, directories: Sequence[str]) -> None:
    """Checks that the tables can be written, and over no file of an evaluation.

    Raises:
      errors.UserError: they can't.
    """
    writing.check_file(str(out))
    folder = out.resolve().parent
    if out.name in _RESULTS and any(folder == pathlib.Path(find(one)).resolve() for one in directories):
        raise errors.UserError(f"--out={out} is a file of an evaluation: name another file")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m richhf_jax.tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("directories", nargs="+", metavar="DIR", help="results of an evaluation, or a MODEL_DIR")
    add("--names", nargs="+", metavar="NAME", help="the rows' names, one for each DIR; after the DIRs")
    add("--format", choices=list(FORMATS), default="terminal", help="default: terminal")
    add("--out", metavar="FILE", help="write to a file; default: print")
    add("--baselines", action="store_true", help="also the baselines of the first DIR's evaluation")
    add("--published", action="store_true", help="also the paper's and later figures, marked as published")
    add("--bootstrap", type=int, default=0, metavar="N", help="95 %% intervals by N resamples, e.g. 1000")
    add("--seed", type=int, default=0, help="of the resamples; default: 0")
    return parser


@errors.command("tables")
def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.names and len(options.names) != len(options.directories):
        parser.error(f"--names: {len(options.names)} names for {len(options.directories)} DIRs")
    if options.names and not all(name.strip() for name in options.names):
        parser.error("--names: a name is empty")
    if options.seed < 0:
        parser.error("--seed can't be below 0")
    if options.bootstrap and not _RESAMPLES[0] <= options.bootstrap <= _RESAMPLES[1]:
        parser.error("--bootstrap takes {:,} to {:,} resamples, or 0 for none".format(*_RESAMPLES))
    if options.out:
        _check_out(pathlib.Path(options.out), options.directories)
    with writing.explained_disk_errors(options.directories[0], "Name a folder that can be read"):
        rows, notes = make(
            *(options.directories, options.names or (), options.baselines),
            *(options.published, options.bootstrap, options.seed),
        )
    if not any(rows_of(table, rows) for table in PAPER_TABLES):
        raise errors.UserError("the evaluations have no figure of the paper's tables")
    writing.write_or_print(formatted(options.format, PAPER_TABLES, rows, notes), options.out)


if __name__ == "__main__":
    main()
