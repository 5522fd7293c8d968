"""The report: its figures are the metrics; its page needs no network and has the gallery's cards."""

import doctest
import re

import numpy as np
import pytest

from richhf_jax import feedback
from richhf_jax.pages import gallery, report
from tests.pages.test_gallery import Page, item, page_of_items, policy, record, urls

ROWS = [
    report.Row("model", {"score/plcc/overall": 0.91234, "keywords/precision": 0.5, "keywords/f1": 0.25}),
    report.Row("trivial", {"score/plcc/overall": -0.0001, "score/mse/overall": 0.125}),
]
CURVES = {
    "feedback": {
        "train loss/heatmap": [(0, 1.0), (100, 0.1), (200, 0.01), (300, float("nan"))],
        "validation loss/heatmap": [(100, 0.2), (200, 0.02)],
        "train loss": [(0, 2.0), (200, 1.0)],
    }
}


def write(tmp_path, title="A model", rows=ROWS, curves=None, gallery=(), details=None) -> str:
    path = tmp_path / "report.html"
    report.write_report(path, title, rows, curves or {}, gallery, details or {})
    return path.read_text(encoding="utf-8")


def test_tables_for_the_terminal():
    rows = [
        report.Row("model", {"synthetic/detection_auc/misalignment": 0.91234, "keywords/precision": 0.5}),
        report.Row("trivial", {"synthetic/wrong_object/num_images": 12}),
    ]
    assert report.format_tables(rows).splitlines() == [
        "Misaligned keywords",
        "       Precision ↑  Recall ↑  F1 ↑",
        "model        50.0%         –     –",
        "",
        "Checks against the synthetic truth",
        "                Detection, ROC AUC              Wrong-object test",
        "         Implausibility ↑  Misalignment ↑  Passed ↑  By chance  Images",
        "model                   –           0.912         –          –       –",
        "trivial                 –               –         –          –      12",
    ]
    # A value that rounds to zero has no sign.
    assert "-0.000" not in report.format_tables(ROWS)


def test_every_metric_of_the_protocol_has_a_column_and_stands_in_the_page(tmp_path):
    keys = [column.key for table in report.TABLES for column in table.columns]
    names = {
        *(
            f"score/{m}/{k}"
            for m in ("plcc", "srcc", "mse", "coverage68", "coverage95", "nll")
            for k in feedback.SCORES
        ),
        *(
            f"heatmap/{m}/{k}"
            for m in ("mse", "mse_empty", "cc", "kld", "sim", "nss", "auc_judd")
            for k in feedback.HEATMAPS
        ),
        *(f"keywords/{m}" for m in ("precision", "recall", "f1")),
        *(f"synthetic/detection_auc/{k}" for k in feedback.HEATMAPS),
        *(f"synthetic/wrong_object/{m}" for m in ("accuracy", "chance", "num_images")),
    }
    assert sorted(keys) == sorted(names)
    values = dict(zip(keys, np.random.default_rng(0).uniform(0, 1, len(keys)).tolist(), strict=True))
    values["synthetic/wrong_object/num_images"] = 123
    page = Page(write(tmp_path, rows=[report.Row("model", values)]))
    cells = [text for attrs, text in page.all("td") if "class" in attrs]
    columns = [column for table in report.TABLES for column in table.columns]
    assert cells == [format(values[column.key], column.format) for column in columns]
    # The terminal shows the same.
    lines = report.format_tables([report.Row("model", values)]).splitlines()
    assert [cell for line in lines if line.startswith("model") for cell in line.split()[1:]] == cells


def test_best_figure_of_a_column_is_marked_by_the_direction_of_the_metric(tmp_path):
    rows = [
        report.Row(name, {"score/plcc/overall": 0.5 + i, "score/mse/overall": 0.1 + i})
        for i, name in enumerate("ab")
    ]
    page = Page(write(tmp_path, rows=rows))
    assert [text for _, text in page.all("td", "best")] == ["0.1000", "1.500"]


def test_headline_compares_the_first_system_with_the_first_other_that_has_the_figure(tmp_path):
    rows = [
        report.Row("model", {"keywords/f1": 0.5, "synthetic/wrong_object/accuracy": 0.75,
                             "synthetic/wrong_object/chance": 0.4}),
        report.Row("blind", {}),
        report.Row("trivial", {"keywords/f1": 0.125}),
    ]  # fmt: skip
    page = Page(write(tmp_path, rows=rows))
    assert [text for attrs, text in page.all("li") if not attrs] == [
        "Misaligned words F1 0.50 0.12 trivial",
        "Wrong-object test passed 0.75 0.40 chance",
    ]


def test_page_needs_no_network(tmp_path):
    text = write(tmp_path, curves=CURVES, gallery=[item()], details={"step": 100})
    page = Page(text)
    assert not re.search(r"(?i)https?:|//[a-z]|@import", re.sub(r"base64,[A-Za-z0-9+/=]+", "", text))
    for _, attrs, _ in page.elements:
        for name in ("src", "href", "srcset", "action", "data"):
            assert attrs.get(name, "#").startswith(("data:", "#"))
    assert all(url.startswith("data:") for url in urls(page))
    assert policy(page) == {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": "'unsafe-inline'",
        "script-src": "'unsafe-inline'",
    }


def test_page_is_accessible(tmp_path):
    page = Page(write(tmp_path, curves=CURVES, gallery=[item()]))
    assert page.all("html")[0][0]["lang"] == "en"
    assert page.all("title")[0][1] == "A model"
    images = page.all("img")
    assert len(images) == 5
    assert all(attrs["alt"] for attrs, _ in images)
    assert all(attrs["aria-label"] for attrs, _ in page.all("svg"))
    ids = {attrs["id"] for _, attrs, _ in page.elements if "id" in attrs}
    for _, attrs, _ in page.elements:
        if attrs.get("href", "").startswith("#"):
            assert attrs["href"][1:] in ids
        assert attrs.get("aria-labelledby", next(iter(ids))) in ids


def test_hostile_text_is_shown_not_run(tmp_path):
    hostile = "<script>alert(1)</script> \"'><img src=x onerror=alert(2)>"
    labels = [1] * len(feedback.tokenize_prompt(hostile))
    labels[0] = 0
    target = record(hostile, hostile, labels)
    text = write(
        tmp_path, hostile, [report.Row(hostile, {"keywords/f1": 1.0})], {hostile: CURVES["feedback"]},
        [item(target, target)], {hostile: hostile},
    )  # fmt: skip
    page = Page(text)
    assert len(page.all("script")) == 1
    assert len(page.all("img")) == 5
    assert page.all("title")[0][1] == hostile
    assert page.all("code")[0][1] == hostile
    assert not [name for _, attrs, _ in page.elements for name in attrs if name.startswith("on")]
    shown = page.all("p", "prompt")[0][1]
    assert shown.replace(" (misaligned and predicted misaligned)", "") == hostile


def test_report_has_the_cards_and_controls_of_the_gallery(tmp_path):
    items = [item(), gallery.GalleryItem(item().image, None, record("test/2.png"))]
    page, alone = Page(write(tmp_path, gallery=items)), page_of_items(*items)
    start = [e[0] for e in page.elements].index("form")
    count = len(page.elements) - start
    assert count > 100
    assert page.elements[start:] == alone.elements[-count:]


def test_curves_stay_inside_their_charts_and_leave_out_what_is_not_finite(tmp_path):
    page = Page(write(tmp_path, curves=CURVES))
    titles = [text for attrs, text in page.all("h4")]
    assert titles == ["heatmap loss log scale", "loss"]
    paths = [attrs["d"] for attrs, _ in page.all("path", "line")]
    points = [np.array([p.split() for p in d[1:].split("L")], float) for d in paths]
    assert [len(p) for p in points] == [3, 2, 2]
    for p in points:
        assert (p >= 0).all()
        assert (p <= (260, 165)).all()
        assert (np.diff(p, axis=0) > 0).all()  # the losses fall; an SVG's y grows downwards
    assert np.diff(points[0][:, 1], 2) == pytest.approx(0, abs=0.2)  # straight on a logarithmic axis
    labels = [attrs["aria-label"] for attrs, _ in page.all("svg")]
    assert labels[0] == "heatmap loss by training step, train ends at 0.01, validation ends at 0.02"


@pytest.mark.parametrize("points", [[(0, 1.0)], [(0, 0.0), (10, 0.0)], [(5, float("inf"))]])
def test_curves_of_one_value_or_none(tmp_path, points):
    page = Page(write(tmp_path, curves={"": {"train loss": points}}))
    assert all("nan" not in attrs["d"] for attrs, _ in page.all("path"))


def test_page_without_curves_and_gallery_has_no_such_sections(tmp_path):
    page = Page(write(tmp_path))
    assert [attrs["href"] for attrs, _ in page.all("a")] == ["#results"]
    assert not page.all("script")


def test_docstring_examples():
    assert doctest.testmod(report) == (0, 2)
