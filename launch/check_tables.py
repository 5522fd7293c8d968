"""Says which of the things that the synthetic tables should show hold.

    python -m launch.check_tables DIR... --names NAME...

The directories and names are those given to `richhf_jax.tables`. A thing that doesn't hold is a finding, not
an error: the exit code is 0.
"""

import argparse
from collections.abc import Iterator, Sequence

from richhf_jax import errors, feedback, tables
from richhf_jax.pages.table_formats import PAPER_TABLES, Row

_ALIGNMENT = f"score/plcc/{feedback.ALIGNMENT}"
_ORACLE = "training-free"  # It is told the true masks of all objects, so RAHF needn't beat it.


def findings(rows: Sequence[Row]) -> Iterator[tuple[bool, str]]:
    """Yields whether a thing holds, and the thing with its figures.

    Args:
      rows: named "RAHF…", "ResNet", "CLIP", and "trivial…".
    """
    resnet, clip, trivial = (_alignment(rows, name) for name in ("ResNet", "CLIP", "trivial"))
    yield (
        abs(resnet) < 0.1,
        f"ResNet, which sees no prompt, fails at alignment: |PLCC| {abs(resnet):.3f} < 0.1",
    )
    yield (
        clip > trivial,
        f"CLIP off the shelf beats the trivial baseline there: PLCC {clip:.3f} > {trivial:.3f}",
    )
    others = [row for row in rows if not row.name.startswith(("RAHF", _ORACLE))]
    for row in rows:
        if row.name.startswith("RAHF"):
            worse = list(_columns_lost(row, others))
            text = f"{row.name} beats every baseline in every column"
            yield not worse, "\n    ".join([f"{text}, except:" if worse else text, *worse])


def _alignment(rows: Sequence[Row], name: str) -> float:
    """Returns the alignment's PLCC of the first row of this name that has it."""
    found = (row.metrics for row in rows if row.name.partition(" ")[0] == name and _ALIGNMENT in row.metrics)
    return next(found)[_ALIGNMENT]


def _columns_lost(row: Row, others: Sequence[Row]) -> Iterator[str]:
    """Yields the columns in which another row is as good as this one, or better."""
    for table in PAPER_TABLES:
        for column in table.columns:
            sign = 1 if column.higher_is_better else -1
            rivals = [other for other in others if column.key in other.metrics]
            best = max(rivals, key=lambda other: sign * other.metrics[column.key])
            value, rival = row.metrics[column.key], best.metrics[column.key]
            if sign * rival >= sign * value:
                name = f"{column.group} {column.label}".strip()
                figures = (format(figure, column.format) for figure in (value, rival))
                yield "{}, {}: {}, but {} has {}".format(
                    table.title, name, next(figures), best.name, *figures
                )


@errors.command("check_tables")
def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m launch.check_tables")
    parser.add_argument("directories", nargs="+")
    parser.add_argument("--names", nargs="+", required=True)
    options = parser.parse_args(arguments)
    rows, _ = tables.make(options.directories, options.names, baselines=True)
    for holds, text in findings(rows):
        print("yes" if holds else "NO ", text)
    print("The training-free baseline isn't counted: it is told the true masks of all objects.")


if __name__ == "__main__":
    main()
