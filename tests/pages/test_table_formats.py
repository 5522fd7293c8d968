"""The tables' formats: golden outputs, hostile names, and the same cells in each."""

import csv
import io
import re

import pytest

from richhf_jax import feedback
from richhf_jax.pages import published, table_formats
from richhf_jax.pages.table_formats import Column, Row, Table
from tests.pages.test_gallery import Page

TABLES = (
    Table("Table 1. Scores", "A note.", [
        Column("a/plcc", "PLCC", group="Overall"), Column("a/mse", "MSE", ".4f", False, "Overall"),
    ]),
    Table("Table 2. Words", "", [Column("w/f1", "F1", ".1%")]),
    Table("Table 3. Nothing", "", [Column("no", "No")]),
)  # fmt: skip
ROWS = [
    Row("first", {"a/plcc": 0.5, "a/mse": 0.125, "w/f1": 0.25}, intervals={"a/plcc": (0.4, 0.6)}),
    Row("a_b|c", {"a/plcc": 0.75}, intervals={"a/plcc": (0.7, 0.8)}, differs={"a/plcc": True}),
    Row("near", {"a/plcc": 0.5001, "a/mse": 0.25}, differs={"a/plcc": False}),
    Row("theirs", {"a/plcc": 0.9, "w/f1": 0.5}, "A & B, 2024"),
]
NOTES = ["3 images of my_task, test."]
MARKS = table_formats.MARKS_NOTE

TERMINAL = f"""\
Table 1. Scores
                       Overall
                           PLCC ↑   MSE ↓
first        0.500 [0.400, 0.600]  0.1250
a_b|c       0.750* [0.700, 0.800]       –
near                       0.500≈  0.2500
theirs [1]                  0.900       –

Table 2. Words
             F1 ↑
first       25.0%
theirs [1]  50.0%

3 images of my_task, test.
{MARKS}
[1] published, not measured here: A & B, 2024"""

MARKDOWN = r"""### Table 1. Scores

|  | Overall PLCC ↑ | Overall MSE ↓ |
| --- | ---: | ---: |
| first | 0.500 [0.400, 0.600] | **0.1250** |
| a\_b\|c | **0.750**\* [0.700, 0.800] | – |
| near | 0.500≈ | 0.2500 |
| theirs \[1\] | 0.900 | – |

### Table 2. Words

|  | F1 ↑ |
| --- | ---: |
| first | 25.0% |
| theirs \[1\] | 50.0% |

3 images of my\_task, test\."""

LATEX = r"""% Needs \usepackage{booktabs} and \usepackage[T1]{fontenc}.

\begin{table*}
\centering
\caption{Scores}
\begin{tabular}{lrr}
\toprule
 & \multicolumn{2}{c}{Overall} \\
 & PLCC $\uparrow$ & MSE $\downarrow$ \\
\midrule
first & 0.500 {[}0.400, 0.600{]} & \textbf{0.1250} \\
a\_b\textbar{}c & \textbf{0.750}* {[}0.700, 0.800{]} & -- \\
near & 0.500$\approx$ & 0.2500 \\
theirs {[}1{]} & 0.900 & -- \\
\bottomrule
\end{tabular}
\end{table*}

\begin{table*}
\centering
\caption{Words}
\begin{tabular}{lr}
\toprule
 & F1 $\uparrow$ \\
\midrule
first & 25.0\% \\
theirs {[}1{]} & 50.0\% \\
\bottomrule
\end{tabular}
\end{table*}

3 images of my\_task, test."""

CSV = """\
system,source,a/plcc,a/plcc/low,a/plcc/high,a/plcc/differs,a/mse,a/mse/low,a/mse/high,a/mse/differs,\
w/f1,w/f1/low,w/f1/high,w/f1/differs
first,,0.5,0.4,0.6,,0.125,,,,0.25,,,
a_b|c,,0.75,0.7,0.8,True,,,,,,,,
near,,0.5001,,,False,0.25,,,,,,,
theirs,"A & B, 2024",0.9,,,,,,,,0.5,,,"""

HOSTILE = """_a & b|c, "d" 'e' <script>alert(1)</script> {x}\\y $z$ 50% #1 ~ ^ [q]"""


def test_terminal():
    assert table_formats.format_terminal(TABLES, ROWS, NOTES) == TERMINAL


def test_markdown():
    text = table_formats.format_markdown(TABLES, ROWS, NOTES)
    assert text.startswith(MARKDOWN)
    assert text.endswith(r"\[1\] published, not measured here\: A &amp; B, 2024")


def test_latex():
    text = table_formats.format_latex(TABLES, ROWS, NOTES)
    assert text.startswith(LATEX)
    assert text.endswith(r"{[}1{]} published, not measured here: A \& B, 2024")


def test_csv():
    assert table_formats.format_csv(TABLES, ROWS, NOTES) == CSV
    measured = table_formats.format_csv(TABLES, [Row("a", {"w/f1": 1 / 3})])
    assert measured == "system,source,w/f1\na,,0.3333333333333333"


def test_html_is_a_page_with_the_same_cells():
    text = table_formats.format_html(TABLES, ROWS, NOTES)
    page = Page(text)
    assert not re.search(r"(?i)https?:|//[a-z]|@import", text)
    names = [name for attrs, name in page.all("th") if attrs.get("scope") == "row"]
    assert names == ["first", "a_b|c", "near", "theirs [1]", "first", "theirs [1]"]
    cells = [text.replace(" ", "") for attrs, text in page.all("td") if "class" in attrs]
    lines = [line for line in TERMINAL.splitlines() if line.startswith(("first", "a_b", "near", "theirs"))]
    assert "".join(cells) == "".join(re.sub(r"theirs \[1\]|first|a_b\|c|near| ", "", line) for line in lines)
    assert [text for _, text in page.all("td", "best")] == ["0.1250", "0.750*[0.700, 0.800]"]
    notes = [text for _, text in page.all("p", "note")]
    assert notes[-3:] == [NOTES[0], MARKS, "[1] published, not measured here: A & B, 2024"]


@pytest.mark.parametrize(
    ("form", "written"),
    [
        ("terminal", HOSTILE),
        (
            "markdown",
            r"""\_a &amp; b\|c, "d" 'e' &lt;script&gt;alert\(1\)&lt;/script&gt; """
            r"""\{x\}\\y $z$ 50% \#1 \~ ^ \[q\]""",
        ),
        (
            "latex",
            r"""\_a \& b\textbar{}c, \textquotedbl{}d\textquotedbl{} 'e' """
            r"""\textless{}script\textgreater{}alert(1)\textless{}/script\textgreater{} """
            r"""\{x\}\textbackslash{}y \$z\$ 50\% \#1 \textasciitilde{} \textasciicircum{} {[}q{]}""",
        ),
        ("csv", '"' + HOSTILE.replace('"', '""') + '"'),
        (
            "html",
            "_a &amp; b|c, &#34;d&#34; &#39;e&#39; &lt;script&gt;alert(1)&lt;/script&gt; "
            "{x}\\y $z$ 50% #1 ~ ^ [q]",
        ),
    ],
)
def test_hostile_names_are_shown_not_run(form, written):
    rows = [Row(HOSTILE, {"w/f1": 0.5}), Row("source", {"w/f1": 0.5}, HOSTILE)]
    text = table_formats.FORMATS[form](TABLES, rows, [HOSTILE])
    # The row, the note and the source; CSV has no note.
    assert text.count(written) == (2 if form == "csv" else 3)
    assert (HOSTILE in text) == (form == "terminal")


def test_control_characters_stay_out():
    rows = [Row("a\x1b[31m\nb", {"w/f1": 0.5})]
    for form in ("terminal", "markdown", "latex"):
        text = table_formats.FORMATS[form](TABLES, rows)
        assert "\x1b" not in text
        assert "x1b" in text
    [_, row] = csv.reader(io.StringIO(table_formats.format_csv(TABLES, rows)))
    assert row[0] == rows[0].name


def test_the_papers_tables_and_the_published_rows():
    titles = [table.title for table in table_formats.PAPER_TABLES]
    assert titles == [
        *("Table 1. Scores", "Table 2. Implausibility heatmap", "Table 3. Misalignment heatmap"),
        "Table 4. Misaligned keywords",
    ]
    columns = [column for table in table_formats.PAPER_TABLES for column in table.columns]
    assert [column.label for column in columns] == [
        *(4 * ["PLCC", "SRCC"]),
        *(2 * ["MSE, all", "MSE, GT=0", "CC", "KLD", "SIM", "NSS", "AUC-Judd"]),
        *("Precision", "Recall", "F1"),
    ]
    keys = {column.key for column in columns}
    assert all(row.metrics.keys() <= keys and row.source for row in published.ROWS)
    rows = {row.name: row.metrics for row in published.ROWS}
    assert rows["RAHF augmented prompt"][f"score/srcc/{feedback.ALIGNMENT}"] == 0.496
    assert rows["RAHF multi-head"]["keywords/f1"] == pytest.approx(0.433)
    assert rows["CLIP gradient"].keys() == {column.key for column in table_formats.PAPER_TABLES[2].columns}
    assert len(table_formats.sources(published.ROWS)) == 4
    # They are never the best of those measured here.
    assert "**" not in table_formats.format_markdown(table_formats.PAPER_TABLES, published.ROWS)
