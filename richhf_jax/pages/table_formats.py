"""Tables of systems side by side, for the terminal and as Markdown, LaTeX, CSV and HTML.

`TABLES` are those of an evaluation's report. `PAPER_TABLES` are the paper's Tables 1 to 4.
"""

import csv
import dataclasses
import io
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from richhf_jax import feedback, foreign_text
from richhf_jax.pages.gallery import render


@dataclasses.dataclass(frozen=True)
class Row:
    """One system in the tables.

    Attributes:
      name: as shown.
      metrics: the flat metrics of `metrics.rich_feedback_metrics`.
      source: who published the figures; "" where they were measured here.
      intervals: metric -> lowest and highest value of its interval.
      differs: metric -> whether its difference to the first row is beyond its interval; absent: not known.
    """

    name: str
    metrics: Mapping[str, float]
    source: str = ""
    intervals: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    differs: Mapping[str, bool] = dataclasses.field(default_factory=dict)


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
    """One table."""

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


def _paper_tables() -> tuple[Table, ...]:
    scores, _, *heatmaps, words, _ = TABLES
    columns = [column for column in scores.columns if not column.key.startswith("score/mse/")]
    tables = (dataclasses.replace(scores, columns=columns), *heatmaps, words)
    return tuple(
        dataclasses.replace(table, title=f"Table {i}. {table.title}") for i, table in enumerate(tables, 1)
    )


PAPER_TABLES = _paper_tables()
ABSENT = "–"
# Marks of `Row.differs`, and what they say.
DIFFERS, ALIKE = "*", "≈"
_MARKS = {True: DIFFERS, False: ALIKE, None: ""}
MARKS_NOTE = (
    f"{DIFFERS} differs from the first row: the interval of the difference, over the same images, excludes"
    f" 0. {ALIKE} the interval includes 0: these images don't tell the two apart."
)


@dataclasses.dataclass(frozen=True)
class Cell:
    """A row's figure in a column.

    Attributes:
      value: the figure as text, or `ABSENT`.
      interval: "[low, high]", or "".
      mark: `DIFFERS`, `ALIKE` or "".
      is_best: whether no measured row has a better one.
    """

    value: str
    interval: str
    mark: str
    is_best: bool

    @property
    def text(self) -> str:
        """All of it as plain text."""
        return " ".join(filter(None, (self.value + self.mark, self.interval)))


def rows_of(table: Table, rows: Sequence[Row]) -> list[Row]:
    """Returns the rows that have a figure in the table."""
    return [row for row in rows if any(column.key in row.metrics for column in table.columns)]


def cell(column: Column, row: Row, rows: Sequence[Row]) -> Cell:
    """Returns a row's cell; `rows` are all of the table."""
    key = column.key
    if key not in row.metrics:
        return Cell(ABSENT, "", "", False)
    interval = ", ".join(format(value, column.format) for value in row.intervals.get(key, ()))
    return Cell(
        format(row.metrics[key], column.format),
        interval and f"[{interval}]",
        _MARKS[row.differs.get(key)],
        _is_best(column, row, rows),
    )


def _is_best(column: Column, row: Row, rows: Sequence[Row]) -> bool:
    # Published figures may be of other images.
    values = [r.metrics[column.key] for r in rows if column.key in r.metrics and not r.source]
    if column.higher_is_better is None or len(values) < 2 or row.source:
        return False
    return row.metrics[column.key] == (max(values) if column.higher_is_better else min(values))


def groups(table: Table) -> list[tuple[str, int]]:
    """Returns (heading of a group, number of its columns) from left to right; [] without groups."""
    names = [column.group for column in table.columns]
    return [(name, names.count(name)) for name in dict.fromkeys(names)] if any(names) else []


def sources(rows: Sequence[Row]) -> dict[str, int]:
    """Numbers the sources of published rows from 1."""
    return {source: i for i, source in enumerate(dict.fromkeys(r.source for r in rows if r.source), 1)}


def _names(rows: Sequence[Row], every: Sequence[Row]) -> list[str]:
    numbers = sources(every)
    return [f"{row.name} [{numbers[row.source]}]" if row.source else row.name for row in rows]


def _footnotes(rows: Sequence[Row], notes: Sequence[str]) -> list[str]:
    """Returns the lines below all tables: the caller's notes, the marks', and the sources."""
    marks = [MARKS_NOTE] if any(row.differs for row in rows) else []
    return [*notes, *marks, *(f"[{i}] published, not measured here: {s}" for s, i in sources(rows).items())]


# Formats. Each takes the tables, the rows and notes of ours for below; rows without a figure are left out.


def format_terminal(tables: Sequence[Table], rows: Sequence[Row], notes: Sequence[str] = ()) -> str:
    """Formats the tables as plain text. A missing figure is a dash; an empty table is left out."""
    texts = [_terminal_table(table, rows) for table in tables if rows_of(table, rows)]
    if footnotes := _footnotes(rows, notes):
        texts.append("\n".join(map(foreign_text.for_terminal, footnotes)))
    return "\n\n".join(texts)


def _terminal_table(table: Table, every: Sequence[Row]) -> str:
    rows = rows_of(table, every)
    columns = [[c.heading, *(cell(c, row, rows).text for row in rows)] for c in table.columns]
    widths = [max(map(len, cells)) for cells in columns]
    names = ["", *map(foreign_text.for_terminal, _names(rows, every))]
    name_width = max(map(len, names))
    lines = [table.title]
    spans, start = [], 0
    for name, count in groups(table):
        # A group's heading is centred over its columns and the two spaces between them.
        spans.append(name.center(sum(widths[start : start + count]) + 2 * (count - 1)))
        start += count
    if spans:
        lines.append("  ".join([" " * name_width, *spans]).rstrip())
    for i, name in enumerate(names):
        cells = (cells[i].rjust(width) for cells, width in zip(columns, widths, strict=True))
        lines.append("  ".join([name.ljust(name_width), *cells]))
    return "\n".join(lines)


def format_markdown(tables: Sequence[Table], rows: Sequence[Row], notes: Sequence[str] = ()) -> str:
    """Formats the tables as GitHub's Markdown; the best figure of a column is bold."""
    texts = []
    for table in tables:
        if not (shown := rows_of(table, rows)):
            continue
        headings = [f"{c.group} {c.heading}".strip() for c in table.columns]
        lines = [["", *headings], ["---", *["---:"] * len(headings)]]
        for name, row in zip(_names(shown, rows), shown, strict=True):
            cells = [cell(column, row, shown) for column in table.columns]
            lines.append([foreign_text.for_markdown(name), *map(_markdown_cell, cells)])
        texts += [f"### {table.title}", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    texts += [foreign_text.for_markdown(note) for note in _footnotes(rows, notes)]
    return "\n\n".join(texts)


def _markdown_cell(cell: Cell) -> str:
    value = f"**{cell.value}**" if cell.is_best else cell.value
    return " ".join(filter(None, (value + cell.mark.replace("*", "\\*"), cell.interval)))


_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    # A bracket after a line's end would be taken for its argument.
    "[": "{[}",
    "]": "{]}",
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "≫": r"$\gg$",
    "≪": r"$\ll$",
    ABSENT: "--",
    ALIKE: r"$\approx$",
}


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in foreign_text.for_terminal(text))


def format_latex(tables: Sequence[Table], rows: Sequence[Row], notes: Sequence[str] = ()) -> str:
    r"""Formats the tables as LaTeX's `table*`, which need the packages booktabs and fontenc (T1)."""
    texts = [r"% Needs \usepackage{booktabs} and \usepackage[T1]{fontenc}."]
    for table in tables:
        if not (shown := rows_of(table, rows)):
            continue
        lines = [
            r"\begin{table*}",
            r"\centering",
            rf"\caption{{{_latex(re.sub('^Table .[.] ', '', table.title))}}}",
        ]
        lines += [rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}", r"\toprule"]
        if spans := groups(table):
            heads = [rf"\multicolumn{{{count}}}{{c}}{{{_latex(name)}}}" for name, count in spans]
            lines.append(" & ".join(["", *heads]) + r" \\")
        lines.append(" & ".join(["", *(_latex(column.heading) for column in table.columns)]) + r" \\")
        lines.append(r"\midrule")
        for name, row in zip(_names(shown, rows), shown, strict=True):
            cells = [cell(column, row, shown) for column in table.columns]
            lines.append(" & ".join([_latex(name), *map(_latex_cell, cells)]) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}", r"\end{table*}"]
        texts.append("\n".join(lines))
    texts += [_latex(note) for note in _footnotes(rows, notes)]
    return "\n\n".join(texts)


def _latex_cell(cell: Cell) -> str:
    value = _latex(cell.value)
    value = rf"\textbf{{{value}}}" if cell.is_best else value
    return " ".join(filter(None, (value + _latex(cell.mark), _latex(cell.interval))))


def format_csv(tables: Sequence[Table], rows: Sequence[Row], notes: Sequence[str] = ()) -> str:
    """Formats the rows as one CSV table for programs: full precision, named as in metrics.json.

    With intervals a metric has three more columns: low, high and whether it differs from the first row's. A
    missing figure is an empty cell. `notes` are left out, because they are no row.
    """
    del notes
    keys = [column.key for table in tables for column in table.columns]
    keys = [key for key in keys if any(key in row.metrics for row in rows)]
    with_intervals = any(row.intervals for row in rows)
    more = ("low", "high", "differs") if with_intervals else ()
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        ["system", "source", *(name for key in keys for name in (key, *(f"{key}/{m}" for m in more)))]
    )
    for row in rows:
        cells = []
        for key in keys:
            figures = [row.metrics.get(key, "")]
            if with_intervals:
                figures += [*row.intervals.get(key, ("", "")), row.differs.get(key, "")]
            cells += figures
        writer.writerow([row.name, row.source, *cells])
    return buffer.getvalue().removesuffix("\n")


def format_html(tables: Sequence[Table], rows: Sequence[Row], notes: Sequence[str] = ()) -> str:
    """Formats the tables as a page that needs no network."""
    return render(
        "tables.html",
        [],
        title="Results",
        details={},
        tables=table_views(tables, rows),
        notes=_footnotes(rows, notes),
    )


def table_views(tables: Sequence[Table], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Returns the values of `templates/tables_block.html` for each table that isn't empty."""
    return [_view(table, rows_of(table, rows), rows) for table in tables if rows_of(table, rows)]


def _view(table: Table, rows: Sequence[Row], every: Sequence[Row]) -> dict[str, Any]:
    names = [column.group for column in table.columns]
    return {
        "table": table,
        "groups": groups(table),
        "group_starts": [i for i, name in enumerate(names) if i and name != names[i - 1]],
        "rows": [
            {"name": name, "cells": [cell(column, row, rows) for column in table.columns]}
            for name, row in zip(_names(rows, every), rows, strict=True)
        ],
    }


FORMATS = {
    "terminal": format_terminal,
    "markdown": format_markdown,
    "latex": format_latex,
    "csv": format_csv,
    "html": format_html,
}


def formatted(form: str, tables: Sequence[Table], rows: Sequence[Row], notes: Sequence[str] = ()) -> str:
    """Formats the tables in one of FORMATS. Warns of names in a CSV that a spreadsheet may run."""
    if form == "csv" and any(foreign_text.is_formula(row.name) for row in rows):
        print("a name looks like a formula: import it as text into a spreadsheet", file=sys.stderr)
    return FORMATS[form](tables, rows, notes)
