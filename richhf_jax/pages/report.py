"""Reports an evaluation as tables in the paper's layout, and as an HTML page with curves and a gallery.

The page's layout is `templates/report.html`. This module computes its figures and training curves, and
`gallery` its cards.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from richhf_jax import feedback, writing
from richhf_jax.pages.gallery import GalleryItem, item_view, render


@dataclasses.dataclass(frozen=True)
class Row:
    """One system in the tables: its name and the flat metrics of `metrics.rich_feedback_metrics`."""

    name: str
    metrics: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Column:
    """One metric of a table.

    Attributes:
      key: the metric's name in `Row.metrics`.
      label: the heading.
      format: the format specification of its values.
      higher_is_better: whether high values are good; None: neither high nor low ones are.
      group: heading over this and neighbouring columns; '' = none.
    """

    key: str
    label: str
    format: str = "z.3f"
    higher_is_better: bool | None = True
    group: str = ""

    @property
    def heading(self) -> str:
        """The label with an arrow towards the better values."""
        return self.label + {True: " ↑", False: " ↓", None: ""}[self.higher_is_better]


@dataclasses.dataclass(frozen=True)
class Table:
    """One table of the report."""

    title: str
    note: str
    columns: Sequence[Column]


def _heatmap_columns(kind: str) -> list[Column]:
    return [
        Column(f"heatmap/mse/{kind}", "MSE, all", ".5f", False),
        Column(f"heatmap/mse_empty/{kind}", "MSE, GT=0", ".5f", False),
        Column(f"heatmap/cc/{kind}", "CC"),
        Column(f"heatmap/kld/{kind}", "KLD", higher_is_better=False),
        Column(f"heatmap/sim/{kind}", "SIM"),
        Column(f"heatmap/nss/{kind}", "NSS"),
        Column(f"heatmap/auc_judd/{kind}", "AUC-Judd"),
    ]


_HEATMAP_NOTE = (
    "GT=0: samples whose ground truth is empty. The metrics from CC on are means over the other samples; "
    "every pixel above 0 is a fixation."
)

TABLES = (
    Table(
        "Scores",
        "Correlation with the ground-truth scores over the split: PLCC is Pearson's, SRCC Spearman's.",
        [
            Column(f"score/{metric}/{kind}", metric.upper(), form, higher, kind.capitalize())
            for kind in feedback.SCORES
            for metric, form, higher in (
                ("plcc", "z.3f", True),
                ("srcc", "z.3f", True),
                ("mse", ".4f", False),
            )
        ],
    ),
    Table(
        "Uncertainty of the scores",
        "Share of ground-truth scores inside the predicted central intervals of 68 % and 95 %: less is "
        "overconfident, more is too careful. NLL: mean negative log-likelihood, in nats.",
        [
            Column(f"score/{metric}/{kind}", label, form, higher, kind.capitalize())
            for kind in feedback.SCORES
            for metric, label, form, higher in (
                ("coverage68", "in 68 %", ".1%", None),
                ("coverage95", "in 95 %", ".1%", None),
                ("nll", "NLL", "z.3f", False),
            )
        ],
    ),
    *(
        Table(f"{kind.capitalize()} heatmap", _HEATMAP_NOTE, _heatmap_columns(kind))
        for kind in feedback.HEATMAPS
    ),
    Table(
        "Misaligned keywords",
        "Precision, recall and F1 of the misaligned words, pooled over the tokens of all samples.",
        [Column(f"keywords/{name}", name.capitalize(), ".1%") for name in ("precision", "recall", "f1")],
    ),
    Table(
        "Checks against the synthetic truth",
        "Detection: does a heatmap's maximum tell flawed images from clean ones? Wrong-object test: in "
        "images with several objects, one of them misaligned, how often does that object get more "
        "predicted misalignment than every other?",
        [
            *(
                Column(f"synthetic/detection_auc/{kind}", kind.capitalize(), group="Detection, ROC AUC")
                for kind in feedback.HEATMAPS
            ),
            Column("synthetic/wrong_object/accuracy", "Passed", ".1%", group="Wrong-object test"),
            Column("synthetic/wrong_object/chance", "By chance", ".1%", None, "Wrong-object test"),
            Column("synthetic/wrong_object/num_images", "Images", "d", None, "Wrong-object test"),
        ],
    ),
)

# The figures at the top of the page: title, name of the metric, its key, key of its reference in the same row
# (None: the first other system's value is the reference).
_HEADLINES = (
    *((kind, "PLCC", f"score/plcc/{kind}", None) for kind in feedback.SCORES),
    *((f"{kind} heatmap", "CC", f"heatmap/cc/{kind}", None) for kind in feedback.HEATMAPS),
    ("misaligned words", "F1", "keywords/f1", None),
    ("wrong-object test", "passed", "synthetic/wrong_object/accuracy", "synthetic/wrong_object/chance"),
)


def format_tables(rows: Sequence[Row]) -> str:
    """Formats the tables as plain text. A missing figure is a dash; an empty table is left out."""
    return "\n\n".join(_format_table(table, rows) for table in TABLES if _rows_of(table, rows))


def write_report(
    path: epath.PathLike,
    title: str,
    rows: Sequence[Row],
    curves: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    gallery: Sequence[GalleryItem],
    details: Mapping[str, Any],
) -> None:
    """Writes the page.

    Args:
      path: the HTML file to write.
      title: the page's headline.
      rows: the systems in the tables' order; the figures at the top and the gallery show the first one.
      curves: stage of the training -> "<line> <loss>" -> (step, value) pairs. "train loss/heatmap" and
        "validation loss/heatmap" are two lines of one chart. Values that are not finite are left out.
      gallery: the images to show.
      details: facts about the run, in a line below the title.

    Raises:
      ValueError: a gallery item's target and prediction are not of the same image.
    """
    page = render(
        "report.html",
        [item_view(item) for item in gallery],
        title=title,
        headlines=_headlines(rows),
        tables=[_table_cells(table, rows) for table in TABLES if _rows_of(table, rows)],
        stages={stage: charts for stage, lines in curves.items() if (charts := _charts(lines))},
        details=details,
    )
    writing.write(path, page)


# Tables.


def _rows_of(table: Table, rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if any(column.key in row.metrics for column in table.columns)]


def _cell(column: Column, row: Row) -> str:
    return format(row.metrics[column.key], column.format) if column.key in row.metrics else "–"


def _groups(table: Table) -> list[tuple[str, int]]:
    """Returns (heading of a group, number of its columns) from left to right; [] without groups."""
    names = [column.group for column in table.columns]
    return [(name, names.count(name)) for name in dict.fromkeys(names)] if any(names) else []


def _format_table(table: Table, rows: Sequence[Row]) -> str:
    rows = _rows_of(table, rows)
    columns = [[c.heading, *(_cell(c, row) for row in rows)] for c in table.columns]
    widths = [max(map(len, cells)) for cells in columns]
    names = ["", *(row.name for row in rows)]
    name_width = max(map(len, names))
    lines = [table.title]
    spans, start = [], 0
    for name, count in _groups(table):
        # A group's heading is centred over its columns and the two spaces between them.
        spans.append(name.center(sum(widths[start : start + count]) + 2 * (count - 1)))
        start += count
    if spans:
        lines.append("  ".join([" " * name_width, *spans]).rstrip())
    for i, name in enumerate(names):
        cells = (cells[i].rjust(width) for cells, width in zip(columns, widths, strict=True))
        lines.append("  ".join([name.ljust(name_width), *cells]))
    return "\n".join(lines)


def _table_cells(table: Table, rows: Sequence[Row]) -> dict[str, Any]:
    rows = _rows_of(table, rows)
    lines = []
    for row in rows:
        cells = [(_cell(column, row), _is_best(column, row, rows)) for column in table.columns]
        lines.append({"name": row.name, "cells": cells})
    groups = [column.group for column in table.columns]
    starts = [i for i, group in enumerate(groups) if i and group != groups[i - 1]]
    return {"table": table, "groups": _groups(table), "group_starts": starts, "rows": lines}


def _is_best(column: Column, row: Row, rows: Sequence[Row]) -> bool:
    values = [r.metrics[column.key] for r in rows if column.key in r.metrics]
    if column.higher_is_better is None or len(values) < 2 or column.key not in row.metrics:
        return False
    return row.metrics[column.key] == (max(values) if column.higher_is_better else min(values))


def _headlines(rows: Sequence[Row]) -> list[dict[str, Any]]:
    shown, *others = rows
    headlines = []
    for title, label, key, reference_key in _HEADLINES:
        if key not in shown.metrics:
            continue
        if reference_key:
            reference = (shown.metrics[reference_key], "chance")
        else:
            reference = next(((row.metrics[key], row.name) for row in others if key in row.metrics), None)
        headlines.append(
            {"title": title, "label": label, "value": shown.metrics[key], "reference": reference}
        )
    return headlines


# Curves.

# Sizes of a chart in the SVG's own units; the page scales the drawing.
_CHART = {"width": 260, "height": 165, "left": 34, "right": 8, "top": 6, "bottom": 22}


def _charts(curves: Mapping[str, Sequence[tuple[float, float]]]) -> list[dict[str, Any]]:
    by_loss: dict[str, dict[str, np.ndarray]] = {}
    for name, points in curves.items():
        line, _, loss = name.partition(" ")
        points = np.array([p for p in points if math.isfinite(p[1])], np.float64)
        if len(points):
            by_loss.setdefault(loss, {})[line] = points
    # "loss/heatmap" reads better as "heatmap loss".
    return [_chart(" ".join(reversed(loss.split("/"))), lines) for loss, lines in by_loss.items()]


def _chart(title: str, lines: Mapping[str, np.ndarray]) -> dict[str, Any]:
    steps, values = np.concatenate(list(lines.values())).T
    # Where losses fall by orders of magnitude, only a logarithmic axis shows the later part.
    logarithmic = values.min() > 0 and values.max() > 10 * values.min()
    y_scale = np.log10 if logarithmic else np.asarray
    low, high = y_scale(values.min()), y_scale(values.max())
    margin = 0.05 * (high - low) or 0.5
    width = _CHART["width"] - _CHART["left"] - _CHART["right"]
    height = _CHART["height"] - _CHART["top"] - _CHART["bottom"]

    def x(step):
        return _CHART["left"] + width * (step - steps.min()) / max(np.ptp(steps), 1)

    def y(value):
        return _CHART["top"] + height * (high + margin - y_scale(value)) / (high - low + 2 * margin)

    y_ticks = _log_ticks(values.min(), values.max()) if logarithmic else _ticks(values.min(), values.max())
    return {
        "title": title,
        "logarithmic": bool(logarithmic),
        "lines": [
            {
                "name": name,
                "last": points[-1, 1],
                "path": "M" + "L".join(f"{x(s):.1f} {y(v):.1f}" for s, v in points),
                "end": (x(points[-1, 0]), y(points[-1, 1])),
            }
            for name, points in lines.items()
        ],
        "x_ticks": [(x(tick), f"{tick:g}") for tick in _ticks(steps.min(), steps.max())],
        "y_ticks": [(y(tick), f"{tick:g}") for tick in y_ticks],
        **_CHART,
    }


def _ticks(low: float, high: float) -> list[float]:
    """Returns about four round numbers from low to high.

    >>> _ticks(0, 900)
    [0.0, 200.0, 400.0, 600.0, 800.0]
    """
    if high <= low:
        return [float(low)]
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.8 * rough)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Returns powers of ten from low to high and, where these are few, 2 and 5 times them.

    >>> _log_ticks(0.03, 2)
    [0.05, 0.1, 0.2, 0.5, 1.0, 2.0]
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) < 5 else (1,)
    ticks = [round(factor * 10.0**power, 12) for power in powers for factor in factors]
    return [tick for tick in ticks if low <= tick <= high]
