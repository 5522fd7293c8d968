"""The evaluation as tables in the paper's layout and as an HTML page, and predictions alone as a gallery.

A page holds its style and script itself and forbids the browser every network request; its images it holds
too, or they lie in its folder. The layouts are `templates/report.html` and `templates/predictions.html`,
which share frame, cards, style and script; this module computes what stands in them.
"""

import base64
import dataclasses
import io
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
from etils import epath
from PIL import Image

from richhf_jax import feedback, overlay
from richhf_jax.feedback import RichFeedback

# Larger pictures are shrunk: no screen shows them larger in the gallery, and a page should open at once.
# Heatmaps are smooth, and their noise makes large files.
MAX_IMAGE_SIDE = 256
MAX_HEATMAP_SIDE = 128

# Up to so many images, whoever writes a gallery should give `data_uri`s: the page is then one file to send
# around, of some tens of megabytes at most. For more, files beside the page: a browser then reads only those
# in sight. The page takes either.
MAX_EMBEDDED = 300


@dataclasses.dataclass(frozen=True)
class Row:
    """One system in the tables: its name and the flat metrics of `metrics.rich_feedback_metrics`."""

    name: str
    metrics: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class GalleryItem:
    """One image, uint8 [height, width, 3], with what was wanted, if that is known, and what was predicted."""

    image: np.ndarray
    target: RichFeedback | None
    prediction: RichFeedback


# kind of heatmap -> its peak in [0, 1], and the URI of its transparent picture, None where it is empty.
Heatmaps = Mapping[str, tuple[float, str | None]]


@dataclasses.dataclass(frozen=True)
class Card:
    """One image of a gallery with its prediction, all pictures as URIs.

    Attributes:
      record: a line of predictions.jsonl (`RichFeedback.to_dict`): "id", "prompt", "scores", "tokens".
      size: the image's width and height in pixels, which may be more than the shown picture's.
      image: a `data_uri`, or a path relative to the page's folder, percent-encoded.
      heatmaps: what lies over the image, with URIs of the same two forms.
    """

    record: Mapping[str, Any]
    size: tuple[int, int]
    image: str
    heatmaps: Heatmaps


@dataclasses.dataclass(frozen=True)
class Column:
    """One metric of a table: its key, heading, format, and which end is the good one (None: neither)."""

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
    "GT=0 are the samples whose ground truth is empty. The metrics from CC on are means over the others, "
    "with every pixel above 0 as a fixation."
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
    *(
        Table(f"{kind.capitalize()} heatmap", _HEATMAP_NOTE, _heatmap_columns(kind))
        for kind in feedback.HEATMAPS
    ),
    Table(
        "Misaligned keywords",
        "Of the misaligned words, pooled over the tokens of all samples.",
        [Column(f"keywords/{name}", name.capitalize(), ".1%") for name in ("precision", "recall", "f1")],
    ),
    Table(
        "Checks against the synthetic truth",
        "Detection: does a heatmap's maximum tell flawed images from clean ones? Wrong-object test: on "
        "images with several objects of which one is misaligned, how often does that one get more "
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

# The figures at the top of the page: title, what is measured, key, key of its reference in the same row
# (without one, the first other system's value is the reference).
_HEADLINES = (
    *((kind, "PLCC", f"score/plcc/{kind}", None) for kind in feedback.SCORES),
    *((f"{kind} heatmap", "CC", f"heatmap/cc/{kind}", None) for kind in feedback.HEATMAPS),
    ("misaligned words", "F1", "keywords/f1", None),
    ("wrong-object test", "passed", "synthetic/wrong_object/accuracy", "synthetic/wrong_object/chance"),
)


def format_tables(rows: Sequence[Row]) -> str:
    """The tables as plain text for a terminal; a missing figure is a dash, an empty table is left out."""
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
      rows: the systems in the tables' order; the first is what the headline and the gallery show.
      curves: stage of the training -> "<line> <loss>" -> (step, value) pairs. "train loss/heatmap" and
        "validation loss/heatmap" are two lines of one chart. Values that are not finite are left out.
      gallery: the images to show.
      details: facts about the run, in a line below the title.

    Raises:
      ValueError: a gallery item's target and prediction are not of the same image.
    """
    page = _render(
        "report.html",
        [_item_view(item) for item in gallery],
        title=title,
        headlines=_headlines(rows),
        tables=[_table_cells(table, rows) for table in TABLES if _rows_of(table, rows)],
        stages={stage: charts for stage, lines in curves.items() if (charts := _charts(lines))},
        details=details,
    )
    epath.Path(path).write_text(page)


def write_gallery(
    path: epath.PathLike, title: str, cards: Iterable[Card], details: Mapping[str, Any]
) -> None:
    """Writes a page of predictions alone: the report's gallery, without ground truth.

    Args:
      path: the HTML file to write; relative URIs of the cards are relative to its folder.
      title: the page's headline.
      cards: the images to show, in input order.
      details: facts about the predictions, in a line below the title.
    """
    page = _render("predictions.html", [_view(card) for card in cards], title=title, details=details)
    epath.Path(path).write_text(page)


def _render(template: str, views: Sequence[Mapping[str, Any]], **values: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("richhf_jax", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "css_url": _css_url}
    known = {name for view in views for name in view["values"]}
    return environment.get_template(template).render(
        **values,
        cards=views,
        has_files=any(not uri.startswith("data:") for view in views for uri in view["uris"]),
        # What cards are sorted and filtered by.
        quantities=[name for name in (*feedback.SCORES, *map(_peak, feedback.HEATMAPS)) if name in known],
        colours=[f"rgb({r} {g} {b})" for r, g, b in overlay.COLOURS],
        opacity=round(100 * overlay.OPACITY),
    )


def _percent(share: float) -> str:
    """A CSS length: 0.25 -> '25.0%', kept on the track between 0 and 1."""
    return f"{min(max(share, 0), 1):.1%}"


def _peak(kind: str) -> str:
    """What a heatmap's peak is called in the controls."""
    return f"{kind} peak"


def _css_url(uri: str) -> str:
    """What stands between the quotes of CSS's url("…"): a URI may hold neither quote nor backslash."""
    return uri.replace("\\", "%5C").replace('"', "%22").replace("\n", "%0A")


# Tables.


def _rows_of(table: Table, rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if any(column.key in row.metrics for column in table.columns)]


def _cell(column: Column, row: Row) -> str:
    return format(row.metrics[column.key], column.format) if column.key in row.metrics else "–"


def _groups(table: Table) -> list[tuple[str, int]]:
    """(group's heading, how many columns it spans) from left to right; none in a table without groups."""
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
        # A group's heading stands over its columns and the two spaces between each.
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

# An SVG's own units; the page scales the drawing.
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
    # Losses fall by orders of magnitude: then only a logarithmic axis shows the later part.
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
    """Round numbers from low to high, about four of them.

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
    """Powers of ten times 1 and, where these are few, 2 and 5, from low to high.

    >>> _log_ticks(0.03, 2)
    [0.05, 0.1, 0.2, 0.5, 1.0, 2.0]
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) < 5 else (1,)
    ticks = [round(factor * 10.0**power, 12) for power in powers for factor in factors]
    return [tick for tick in ticks if low <= tick <= high]


# Gallery.


def card_pictures(image: np.ndarray, heatmaps: Mapping[str, np.ndarray]) -> tuple[bytes, dict[str, bytes]]:
    """The pictures of a card, of at most `MAX_IMAGE_SIDE` and `MAX_HEATMAP_SIDE`, for files or `data_uri`.

    Args:
      image: uint8 [height, width, 3].
      heatmaps: kind -> [height, width] in [0, 1].

    Returns:
      The image as PNG or JPEG, whichever is smaller: drawings stay as they are. Kind -> PNG to lay over it,
      transparent where there is no heat; an empty heatmap has none.
    """
    thumbnail = Image.fromarray(image)
    thumbnail.thumbnail((MAX_IMAGE_SIDE, MAX_IMAGE_SIDE))
    files = _encoded(thumbnail, "PNG"), _encoded(thumbnail, "JPEG", quality=85)
    return min(files, key=len), _heatmap_pictures(heatmaps)


def _heatmap_pictures(heatmaps: Mapping[str, np.ndarray]) -> dict[str, bytes]:
    pictures = {}
    for kind, heatmap in heatmaps.items():
        if heatmap.max() > 0:
            scale = min(1, MAX_HEATMAP_SIDE / max(heatmap.shape))
            height, width = (max(1, round(length * scale)) for length in heatmap.shape)
            # Shrunk before it is coloured: fewer pixels to colour.
            pictures[kind] = _encoded(overlay.picture(overlay.resize(heatmap, (width, height))), "PNG")
    return pictures


def data_uri(picture: bytes) -> str:
    """The bytes of a PNG or JPEG file -> a URI that holds them."""
    kind = "png" if picture.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64," + base64.b64encode(picture).decode("ascii")


def _encoded(picture: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def _item_view(item: GalleryItem) -> dict[str, Any]:
    target, prediction = item.target, item.prediction
    if target and target.id != prediction.id:
        raise ValueError(f"gallery: the target is {target.id!r} but the prediction is {prediction.id!r}")
    height, width = item.image.shape[:2]
    image, _ = card_pictures(item.image, {})
    card = Card(prediction.to_dict(), (width, height), data_uri(image), _embedded(prediction.heatmaps))
    return _view(card, target)


def _embedded(heatmaps: Mapping[str, np.ndarray]) -> Heatmaps:
    uris = {kind: data_uri(picture) for kind, picture in _heatmap_pictures(heatmaps).items()}
    return {kind: (float(np.clip(heat.max(), 0, 1)), uris.get(kind)) for kind, heat in heatmaps.items()}


def _view(card: Card, target: RichFeedback | None = None) -> dict[str, Any]:
    """What stands in a card; without a target, the prediction alone."""
    record = card.record
    truth = target.to_dict() if target else {"scores": {}, "tokens": []}
    sides = [("ground truth", _embedded(target.heatmaps))] if target else []
    sides.append(("predicted", card.heatmaps))
    values = {**record["scores"], **{_peak(kind): peak for kind, (peak, _) in card.heatmaps.items()}}
    return {
        "id": record["id"],
        "prompt": record["prompt"],
        "pieces": _pieces(record["prompt"], truth["tokens"], record["tokens"]),
        "image": card.image,
        "uris": [card.image, *(uri for _, uri in card.heatmaps.values() if uri)],
        "size": card.size,
        "compared": target is not None,
        "heatmaps": [
            (kind, [(name, *heatmaps.get(kind, (None, None))) for name, heatmaps in sides])
            for kind in feedback.HEATMAPS
            if any(kind in heatmaps for _, heatmaps in sides)
        ],
        "scores": [
            (kind, truth["scores"].get(kind), record["scores"].get(kind))
            for kind in feedback.SCORES
            if kind in truth["scores"] or kind in record["scores"]
        ],
        # JSON has no NaN.
        "values": {name: round(value, 4) for name, value in values.items() if not math.isnan(value)},
    }


@dataclasses.dataclass(frozen=True)
class _Piece:
    """A word of the prompt, or what stands between two."""

    text: str
    truth: bool = False
    predicted: bool = False
    probability: float | None = None

    @property
    def marks(self) -> str:
        """'misaligned', 'predicted misaligned', both or nothing, in words."""
        marks = {"misaligned": self.truth, "predicted misaligned": self.predicted}
        return " and ".join(words for words, is_marked in marks.items() if is_marked)

    @property
    def title(self) -> str:
        """The marks, and the probability where there is one."""
        if self.probability is None:
            return self.marks
        probability = f"probability of being misaligned {self.probability:.0%}"
        return f"{self.marks}, {probability}" if self.marks else probability

    @property
    def heat(self) -> float:
        """How strongly the word is shaded, 0 to 1."""
        return float(self.predicted) if self.probability is None else self.probability


def _pieces(prompt: str, truth: Sequence[Mapping], predicted: Sequence[Mapping]) -> list[_Piece]:
    """The prompt cut into words and what stands between them, nothing left out.

    Args:
      prompt: the text.
      truth: "tokens" of the ground truth's record.
      predicted: "tokens" of the prediction's record.

    >>> tokens = [{'text': 'a', 'misaligned': False}, {'text': 'cat', 'misaligned': True, 'probability': 0.8}]
    >>> [piece.text for piece in _pieces('a cat!', tokens, [])]
    ['a', ' ', 'cat', '!']
    >>> _pieces('a cat!', [], tokens)[2]
    _Piece(text='cat', truth=False, predicted=True, probability=0.8)
    """
    pieces, position = [], 0
    words = feedback.tokenize_prompt(prompt)
    for word, true, guess in itertools.zip_longest(words, truth[: len(words)], predicted[: len(words)]):
        start = prompt.index(word, position)
        if start > position:
            pieces.append(_Piece(prompt[position:start]))
        marks = [bool(token and token["misaligned"]) for token in (true, guess)]
        pieces.append(_Piece(word, *marks, (guess or {}).get("probability")))
        position = start + len(word)
    return [*pieces, _Piece(prompt[position:])] if position < len(prompt) else pieces
