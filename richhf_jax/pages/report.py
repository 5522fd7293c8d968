"""Reports an evaluation as tables in the paper's layout, and as an HTML page with curves and a gallery.

The page's layout is `templates/report.html`. This module computes its figures and training curves,
`table_formats` its tables, and `gallery` its cards.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from richhf_jax import feedback, writing
from richhf_jax.pages.gallery import GalleryItem, item_view, render
from richhf_jax.pages.table_formats import TABLES, Row, format_terminal, table_views

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
    return format_terminal(TABLES, rows)


def write_report(
    path: epath.PathLike,
    title: str,
    rows: Sequence[Row],
    curves: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    gallery: Sequence[GalleryItem],
    details: Mapping[str, Any],
    score_range: tuple[float, float] = (0, 1),
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
      score_range: the model's `feedback.Outputs.score_range`, of the gallery's scores.

    Raises:
      ValueError: a gallery item's target and prediction are not of the same image.
    """
    page = render(
        "report.html",
        [item_view(item) for item in gallery],
        score_range,
        title=title,
        headlines=_headlines(rows),
        tables=table_views(TABLES, rows),
        stages={stage: charts for stage, lines in curves.items() if (charts := _charts(lines))},
        details=details,
    )
    writing.write(path, page)


# Headlines.


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
