"""Draws a summary as one picture."""

import io
from collections.abc import Callable, Mapping

import matplotlib
import numpy as np
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from richhf_jax.datasets.describe import text
from richhf_jax.datasets.describe.statistics import SCORE_STEPS
from richhf_jax.datasets.rater_agreement import LIKERT_STEPS

BAR, LINE = "#2563c9", "#c2410c"
# From equal answers to opposite ones.
AGREEMENT_COLOURS = ("#1e4e9c", "#6f9fe0", "#d9d9d4", "#f0a26b", "#c2410c")
# In inches. The rows are below each other.
WIDTH, SCORES_HEIGHT, AGREEMENT_HEIGHT, HEATMAPS_HEIGHT, LENGTHS_HEIGHT = 11, 2.9, 2.6, 3.6, 2.7
TITLE_HEIGHT = 0.7
# A histogram of prompt lengths has at most this many bars; a bar may stand for several lengths.
MAX_BARS = 60


def make_png(title: str, summary: Mapping) -> bytes:
    """Draws a summary as PNG; parts that it lacks are left out."""
    rows: list[tuple[float, Callable, Mapping]] = [
        (height, draw, summary[name]) for name, (height, draw) in _ROWS.items() if name in summary
    ]
    heights = [TITLE_HEIGHT, *(height for height, _, _ in rows)]
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.06)
    figure = Figure(figsize=(WIDTH, sum(heights)), layout=layout)
    head, *subfigures = figure.subfigures(len(heights), squeeze=False, height_ratios=heights)[:, 0]
    headline = f"{title}: {summary['records']:,} records"  # A $ in it begins no formula.
    head.text(0.5, 0.65, headline, ha="center", va="center", fontsize=14, parse_math=False)
    head.text(0.5, 0.15, _labels(summary), ha="center", va="center", fontsize=10)
    for subfigure, (_, draw, part) in zip(subfigures, rows, strict=True):
        draw(subfigure, part)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _labels(summary: Mapping) -> str:
    if "labels" not in summary:
        return ""
    part = summary["labels"]
    words = text.percent(part["misaligned_token_share"])
    prompts = text.percent(part["records_with_misaligned_share"])
    return f"{words} of the words are misaligned; {prompts} of the prompts have any"


def _scores(figure: SubFigure, parts: Mapping) -> None:
    axes = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
    for axis, (kind, part) in zip(axes, parts.items(), strict=True):
        values = np.arange(SCORE_STEPS + 1) / SCORE_STEPS
        axis.bar(values, part["histogram"], width=0.8 / SCORE_STEPS, color=BAR)
        axis.set_title(f"{kind}: {text.number(part['mean'])} ± {text.number(part['sd'])}", fontsize=10)
        axis.set_xticks(np.linspace(0, 1, 5))
        axis.set_xlabel("score")
    axes[0].set_ylabel("records")
    figure.suptitle("Scores (mean ± standard deviation)", fontsize=11)


def _agreement(figure: SubFigure, parts: Mapping) -> None:
    axis = figure.subplots()
    left = np.zeros(len(parts))
    for step, colour in enumerate(AGREEMENT_COLOURS):
        counts = np.array([part["histogram"][step] for part in parts.values()])
        label = f"{step / LIKERT_STEPS:.2f}"
        axis.barh(list(parts), counts, left=left, color=colour, label=label, height=0.65)
        left += counts
    axis.invert_yaxis()
    axis.set_xlim(0, left.max())
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("images")
    axis.legend(
        title="largest minus\nsmallest score", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False
    )
    figure.suptitle("Agreement of an image's raters", fontsize=11)


def _heatmaps(figure: SubFigure, parts: Mapping) -> None:
    axes = figure.subplots(1, len(parts), squeeze=False)[0]
    largest = max(np.max(part["mean"]) for part in parts.values())
    for axis, (kind, part) in zip(axes, parts.items(), strict=True):
        # One scale for both, so that they can be compared.
        shown = axis.imshow(part["mean"], cmap="inferno", vmin=0, vmax=largest or 1)
        axis.set_title(f"{kind}: {text.percent(part['empty_share'])} empty", fontsize=10)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.colorbar(shown, ax=list(axes), label="mean of all maps\n(1 = marked by all raters)", shrink=0.9)
    figure.suptitle("Mean heatmaps", fontsize=11)


def _lengths(figure: SubFigure, parts: Mapping) -> None:
    axes = figure.subplots(1, len(parts), squeeze=False)[0]
    for axis, (unit, part) in zip(axes, parts.items(), strict=True):
        lengths, counts = np.array(part["histogram"]).T
        width = -(-part["max"] // MAX_BARS)
        edges = np.arange(0, part["max"] + width + 1, width) - 0.5
        axis.hist(lengths, edges, weights=counts, color=BAR, rwidth=0.85)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if "limit" in part:
            axis.axvline(part["limit"] + 0.5, color=LINE, linestyle="--")
            axis.set_title(f"{part['over_limit']:,} have more than {part['limit']}", fontsize=10, color=LINE)
        axis.set_xlabel(f"{unit} of a prompt")
        axis.set_ylabel("prompts")
    figure.suptitle("Prompt lengths", fontsize=11)


_ROWS = {
    "scores": (SCORES_HEIGHT, _scores),
    "agreement": (AGREEMENT_HEIGHT, _agreement),
    "heatmaps": (HEATMAPS_HEIGHT, _heatmaps),
    "prompt_lengths": (LENGTHS_HEIGHT, _lengths),
}


def heatmap_colours(values: np.ndarray) -> np.ndarray:
    """Colours heatmaps: [height, width] in [0, 1] -> uint8 [height, width, 3]."""
    return matplotlib.colormaps["inferno"](values, bytes=True)[..., :3]
