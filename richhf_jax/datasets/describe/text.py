"""Formats a summary as text for a terminal."""

from collections.abc import Mapping, Sequence

from richhf_jax import foreign_text
from richhf_jax.datasets.describe.statistics import SCORE_STEPS
from richhf_jax.datasets.rater_agreement import LIKERT_STEPS

# Problems and sizes that are printed; the JSON has more.
SHOWN = 5
# Raters that are printed and on the page; the JSON has more.
SHOWN_RATERS = 50


def format_summary(title: str, summary: Mapping) -> str:
    """Makes the text; parts that the summary lacks are left out."""
    parts = [f"{title}: {summary['records']:,} records"]
    for name, make in _PARTS.items():
        if name in summary:
            parts.append(make(summary[name]))
    return "\n\n".join([*parts, *_problems(summary)])


def percent(share: float | None) -> str:
    """Formats a share: 0.066 -> '6.6 %'; None -> '-'."""
    return "-" if share is None else f"{share:.1%}".replace("%", " %")


def number(value: float | None) -> str:
    """Formats a number: 0.5 -> '0.500'; None -> '-'."""
    return "-" if value is None else f"{value:.3f}"


def _table(title: str, rows: Sequence[Sequence[str]]) -> str:
    """Aligns rows of cells: the first column on the left, the others on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    ]
    return "\n".join([title, *(f"  {line}" for line in lines)])


def _columns(parts: Mapping, cells: Mapping[str, Sequence[str]], *heads: str) -> list[list[str]]:
    """Makes rows with one column per kind, under its name; `heads` name the rows."""
    return [["", *parts], *([head, *(cells[kind][i] for kind in parts)] for i, head in enumerate(heads))]


def _scores(parts: Mapping) -> str:
    cells = {
        kind: [
            number(part["mean"]),
            number(part["sd"]),
            *(f"{count:,}" for count in part["histogram"]),
            f"{part['missing']['count']:,}",
        ]
        for kind, part in parts.items()
    }
    steps = [f"{step / SCORE_STEPS:.2f}" for step in range(SCORE_STEPS + 1)]
    return _table(
        "Scores: records by score, to the nearest 1/12",
        _columns(parts, cells, "mean", "sd", *steps, "missing"),
    )


def _agreement(parts: Mapping) -> str:
    cells = {
        kind: [
            *(f"{count:,}" for count in part["histogram"]),
            percent(part["perfect_share"]),
            percent(part["good_share"]),
            number(part["krippendorff_alpha"]),
            number(part["icc2k"]),
            f"{part['k']:.1f}",
        ]
        for kind, part in parts.items()
    }
    steps = [f"{step / LIKERT_STEPS:.2f}" for step in range(LIKERT_STEPS + 1)]
    statistics = "Krippendorff's alpha", "ICC(2,k)", "k, raters an image"
    return _table(
        "Agreement: images by how far their raters are apart (largest minus smallest score)",
        _columns(parts, cells, *steps, "equal", "at most 0.25", *statistics),
    )


def _word_agreement(part: Mapping) -> str:
    rows = [["Fleiss' kappa", number(part["fleiss_kappa"]), "of", f"{part['words']:,} words"]]
    return _table("Agreement on misaligned words", rows)


def _point_agreement(parts: Mapping) -> str:
    cells = {
        kind: [f"{part['items']:,}", *(number(part[key]) for key in ("within", "between", "sigma"))]
        for kind, part in parts.items()
    }
    heads = "images", "mean distance of an image's raters", "of different images' raters", "sigma"
    return _table("Agreement on points (distance: share of the image)", _columns(parts, cells, *heads))


def _rater_scores(parts: Mapping) -> str:
    kinds = list(next(iter(parts.values())))
    rows = [["", "images", *kinds]]
    for rater, scores in list(parts.items())[:SHOWN_RATERS]:
        cells = (f"{scores[kind]['bias']:+.2f} ± {scores[kind]['spread']:.2f}" for kind in kinds)
        rows.append([foreign_text.for_terminal(rater), f"{scores[kinds[0]]['count']:,}", *cells])
    if len(parts) > SHOWN_RATERS:
        rows.append([f"{len(parts) - SHOWN_RATERS:,} more", *[""] * (len(kinds) + 1)])
    title = "Raters: mean difference to an image's other raters ± its standard deviation, in points of 1 to 5"
    return _table(title, rows)


def _heatmaps(parts: Mapping) -> str:
    cells = {
        kind: [f"{part['count']:,}", percent(part["empty_share"]), percent(part["marked_share"])]
        for kind, part in parts.items()
    }
    return _table("Heatmaps", _columns(parts, cells, "maps", "empty", "marked pixels of the others"))


def _prompt_lengths(parts: Mapping) -> str:
    rows = [["", "mean", "median", "95 %", "longest", "over the limit"]]
    for unit, part in parts.items():
        over = f"{part['over_limit']:,} over {part['limit']}" if "limit" in part else ""
        rows.append(
            [unit, f"{part['mean']:.1f}", *(f"{part[key]:,}" for key in ("median", "p95", "max")), over]
        )
    if not any(row[-1] for row in rows[1:]):
        rows = [row[:-1] for row in rows]
    return _table("Prompt lengths", rows)


def _labels(part: Mapping) -> str:
    rows = [
        ["misaligned words", percent(part["misaligned_token_share"]), "of", f"{part['tokens']:,}"],
        [
            "prompts with misaligned words",
            percent(part["records_with_misaligned_share"]),
            "of",
            f"{part['records']:,}",
        ],
    ]
    return _table("Labels", rows)


def _raters(part: Mapping) -> str:
    return _table("Raters per image", [[n, f"{images:,} images"] for n, images in part.items()])


def _images(part: Mapping) -> str:
    rows = [[name, f"{count:,}"] for name, count in part["formats"].items()]
    for width, height, count in part["sizes"][:SHOWN]:
        rows.append([f"{width} x {height} pixels" if width else "other sizes", f"{count:,}"])
    if rest := part["sizes"][SHOWN:]:
        rows.append([f"{len(rest):,} more sizes", f"{sum(count for *_, count in rest):,}"])
    return _table("Images", rows)


_PARTS = {
    "raters": _raters,
    "scores": _scores,
    "agreement": _agreement,
    "word_agreement": _word_agreement,
    "point_agreement": _point_agreement,
    "rater_scores": _rater_scores,
    "heatmaps": _heatmaps,
    "prompt_lengths": _prompt_lengths,
    "labels": _labels,
    "images": _images,
}


def problems(summary: Mapping) -> dict[str, Mapping]:
    """Returns the problems that occur: description -> {'count', 'first'}."""
    found = {}
    for kind, part in summary.get("scores", {}).items():
        found[f"missing {kind} scores"] = part["missing"]
        found[f"{kind} scores outside 0 to 1"] = part["out_of_range"]
    for kind, part in summary.get("heatmaps", {}).items():
        found[f"unreadable {kind} heatmaps"] = part["unreadable"]
    if "labels" in summary:
        found["labels that don't fit their prompt (in no figure above)"] = summary["labels"]["mismatches"]
    if "images" in summary:
        found["unreadable images"] = summary["images"]["unreadable"]
    return {name: listed for name, listed in found.items() if listed["count"]}


def _problems(summary: Mapping) -> list[str]:
    texts = []
    for name, listed in problems(summary).items():
        lines = [
            f"{listed['count']:,} {name}",
            *(f"  {foreign_text.for_terminal(record)}" for record in listed["first"][:SHOWN]),
        ]
        if listed["count"] > SHOWN:
            lines.append("  ...")
        texts.append("\n".join(lines))
    return texts
