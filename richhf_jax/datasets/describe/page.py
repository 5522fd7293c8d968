"""Makes a self-contained HTML page of a summary, from `page.html`; it loads nothing."""

import base64
import io
import pathlib
from collections.abc import Mapping

import jinja2
import numpy as np
from PIL import Image

from richhf_jax.datasets.describe import figure, text
from richhf_jax.datasets.describe.statistics import SCORE_STEPS
from richhf_jax.datasets.rater_agreement import LIKERT_STEPS

# A histogram of prompt lengths has at most this many bars; a bar may stand for several lengths.
MAX_BARS = 40


def make_page(title: str, summary: Mapping) -> str:
    """Makes the page; parts that the summary lacks are left out."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"percent": text.percent, "number": text.number}
    return environment.get_template("page.html").render(
        title=title,
        summary=summary,
        scores=_scores(summary.get("scores", {})),
        most=_most(summary.get("scores", {})),
        score_ticks=["0", "0.25", "0.5", "0.75", "1"],
        agreement=_agreement(summary.get("agreement", {})),
        steps=[f"{step / LIKERT_STEPS:.2f}" for step in range(LIKERT_STEPS + 1)],
        colours=figure.AGREEMENT_COLOURS,
        heatmaps=_heatmaps(summary.get("heatmaps", {})),
        lengths=[_lengths(unit, part) for unit, part in summary.get("prompt_lengths", {}).items()],
        problems=text.problems(summary),
        shown=text.SHOWN,
        shown_raters=text.SHOWN_RATERS,
    )


def _bars(histogram: Mapping[str, int], largest: int) -> list[dict]:
    """Makes bars of label -> count; their heights are in percent of `largest`."""
    return [
        {"label": label, "count": count, "height": round(100 * count / max(largest, 1), 2)}
        for label, count in histogram.items()
    ]


def _most(parts: Mapping) -> int:
    """Returns the records of the tallest bar of all scores: they share a scale, to be compared."""
    return max((max(part["histogram"]) for part in parts.values()), default=0)


def _scores(parts: Mapping) -> list[dict]:
    largest = _most(parts)
    labels = [f"{step / SCORE_STEPS:.2f}" for step in range(SCORE_STEPS + 1)]
    return [
        {"kind": kind, **part, "bars": _bars(dict(zip(labels, part["histogram"], strict=True)), largest)}
        for kind, part in parts.items()
    ]


def _agreement(parts: Mapping) -> list[dict]:
    return [
        {"kind": kind, **part, "shares": [round(100 * n / part["count"], 2) for n in part["histogram"]]}
        for kind, part in parts.items()
    ]


def _heatmaps(parts: Mapping) -> dict:
    largest = max((np.max(part["mean"]) for part in parts.values()), default=0) or 1
    maps = [
        {"kind": kind, **part, "picture": _data_uri(figure.heatmap_colours(np.array(part["mean"]) / largest))}
        for kind, part in parts.items()
    ]
    scale = _data_uri(figure.heatmap_colours(np.linspace(0, 1, 256)[None]))
    return {"maps": maps, "largest": largest, "scale": scale}


def _lengths(unit: str, part: Mapping) -> dict:
    width = -(-(part["max"] + 1) // MAX_BARS)
    counts = np.zeros(part["max"] // width + 1, int)
    for length, count in part["histogram"]:
        counts[length // width] += count
    ends = [
        f"{i * width}" if width == 1 else f"{i * width} to {i * width + width - 1}"
        for i in range(len(counts))
    ]
    bars = _bars(dict(zip(ends, counts.tolist(), strict=True)), int(counts.max()))
    return {"unit": unit, **part, "bars": bars, "ticks": ["0", str(part["max"])]}


def _data_uri(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
