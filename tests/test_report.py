"""The report: its figures are the metrics, its page needs no network and shows each record as it is."""

import base64
import dataclasses
import doctest
import html.parser
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from richhf_jax import feedback, overlay, report
from richhf_jax.feedback import RichFeedback

VOID = {"meta", "link", "img", "input", "br"}


class Page(html.parser.HTMLParser):
    """A page as a list of (tag, attributes, text inside); fails on tags that don't close."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.elements, self._open = [], []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.elements.append([tag, dict(attrs), ""])
        if tag not in VOID:
            self._open.append(self.elements[-1])

    def handle_startendtag(self, tag, attrs):
        self.elements.append([tag, dict(attrs), ""])

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        for element in self._open:
            element[2] += data

    def all(self, tag: str, cls: str | None = None) -> list[tuple[dict, str]]:
        found = [(attrs, " ".join(text.split())) for name, attrs, text in self.elements if name == tag]
        return [f for f in found if cls is None or cls in f[0].get("class", "").split()]


def record(id="test/1.png", prompt="a red cat", labels=(1, 0, 1), heat=0.5, score=0.25) -> RichFeedback:
    heatmap = np.zeros((8, 12), np.float32)
    heatmap[:4] = heat
    return RichFeedback(
        id,
        prompt,
        dict.fromkeys(feedback.SCORES, score),
        dict.fromkeys(feedback.HEATMAPS, heatmap),
        feedback.label_tokens(prompt, labels),
    )


def item(target=None, prediction=None, size=(8, 12)) -> report.GalleryItem:
    image = np.full((*size, 3), (200, 10, 90), np.uint8)
    target = target or record()
    prediction = prediction or record(heat=0.75, score=0.5, labels=(1, 0, 0))
    return report.GalleryItem(image, target, prediction)


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
        *(f"score/{m}/{k}" for m in ("plcc", "srcc", "mse") for k in feedback.SCORES),
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
    # What the terminal shows is the same.
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


def urls(page: Page) -> list[str]:
    """What the styles of the page's elements point at."""
    return [
        u for _, attrs, _ in page.elements for u in re.findall(r'url\("([^"]*)"\)', attrs.get("style", ""))
    ]


def policy(page: Page) -> dict[str, str]:
    """The Content-Security-Policy: directive -> sources."""
    [text] = [a["content"] for a, _ in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    return dict(directive.strip().split(" ", 1) for directive in text.split(";"))


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


def test_gallery_shows_words_scores_and_peaks_of_each_record(tmp_path):
    other = record("test/2.png", "one dog, two cats!", (1, 1, 0, 0), heat=0, score=1.0)
    gallery = [item(), item(other, record("test/2.png", "one dog, two cats!", (0, 1, 0, 1), heat=0.25))]
    page = Page(write(tmp_path, gallery=gallery))
    assert [attrs["aria-label"] for attrs, _ in page.all("article")] == ["test/1.png", "test/2.png"]
    marks = [(text.split()[0], attrs["class"].split()[1:]) for attrs, text in page.all("mark", "word")]
    assert marks == [
        ("red", ["truth", "predicted"]),
        ("cat", ["predicted"]),
        ("one", ["predicted"]),
        ("two", ["truth", "predicted"]),
        ("cats", ["truth"]),
    ]
    prompts = [re.sub(r" \((misaligned|predicted)[a-z ]*\)", "", text) for _, text in page.all("p", "prompt")]
    assert prompts == ["a red cat", "one dog, two cats!"]
    rows = [text for attrs, text in page.all("tr") if text.split()[:1] == ["overall"]]
    assert rows == ["overall 0.25 0.50", "overall 1.00 0.25"]
    captions = [text for _, text in page.all("figcaption")]
    assert captions == [
        "12 × 8", *2 * ["ground truth 0.50", "predicted 0.75"],
        "12 × 8", *2 * ["ground truth empty", "predicted 0.25"],
    ]  # fmt: skip


def test_gallery_shows_what_is_missing_as_a_dash(tmp_path):
    target = dataclasses.replace(record(), scores={"overall": 0.5}, heatmaps={}, tokens=())
    prediction = dataclasses.replace(record(), scores={}, heatmaps={"misalignment": np.zeros((8, 12))})
    page = Page(write(tmp_path, gallery=[item(target, prediction)]))
    assert [text for _, text in page.all("figcaption")] == ["12 × 8", "ground truth –", "predicted empty"]
    assert "overall 0.50 –" in [text for _, text in page.all("tr")]


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


def test_gallery_refuses_a_prediction_of_another_image(tmp_path):
    with pytest.raises(ValueError, match=r"'test/1.png'.*'test/2.png'"):
        write(tmp_path, gallery=[item(record("test/1.png"), record("test/2.png"))])


def _picture(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,")))))


def test_pictures_of_the_gallery(tmp_path):
    page = Page(write(tmp_path, gallery=[item(record(heat=1.0))]))
    image, truth, predicted, *_ = [_picture(attrs["src"]) for attrs, _ in page.all("img")]
    np.testing.assert_array_equal(image, item().image)
    assert truth.shape == predicted.shape == (8, 12, 4)
    # Transparent where there is no heat; the top of the colour map where it is 1.
    assert not truth[4:, :, 3].any()
    assert (truth[:4] == (252, 255, 164, 255)).all()


def test_large_images_are_shrunk(tmp_path):
    page = Page(write(tmp_path, gallery=[item(size=(256, 512))]))
    assert _picture(page.all("img")[0][0]["src"]).shape == (128, 256, 3)
    assert page.all("figcaption")[0][1] == "512 × 256"


def test_card_pictures_of_a_photograph_and_its_heatmaps(rng):
    photograph = rng.normal(128, 30, (300, 600, 3)).clip(0, 255).astype(np.uint8)
    heatmap = np.zeros((300, 600), np.float32)
    heatmap[:150] = 0.5
    image, pictures = report.card_pictures(photograph, {"a": heatmap, "b": np.zeros_like(heatmap)})
    assert Image.open(io.BytesIO(image)).format == "JPEG"
    assert Image.open(io.BytesIO(image)).size == (256, 128)
    assert report.data_uri(image).startswith("data:image/jpeg;base64,")
    # An empty heatmap needs no picture.
    assert list(pictures) == ["a"]
    heat = _picture(report.data_uri(pictures["a"]))
    assert heat.shape == (64, 128, 4)
    assert (heat[:31] == overlay.picture(np.float32([[0.5]])).getpixel((0, 0))).all()
    assert not heat[33:, :, 3].any()


def test_thin_heatmaps_keep_a_pixel():
    image = np.zeros((1, 1000, 3), np.uint8)
    _, pictures = report.card_pictures(image, {"a": np.ones((1, 1000), np.float32)})
    assert _picture(report.data_uri(pictures["a"])).shape == (1, 128, 4)


def tokens(*probabilities: float | None) -> list[feedback.Token]:
    words = ("a", "red", "cat")
    return [feedback.Token(w, (p or 0) > 0.5, p) for w, p in zip(words, probabilities, strict=True)]


def test_gallery_without_ground_truth_shows_the_prediction_alone(tmp_path):
    prediction = dataclasses.replace(record(heat=0.75, score=0.5), tokens=tokens(0.02, 0.97, None))
    alone = report.GalleryItem(item().image, None, prediction)
    page = Page(write(tmp_path, gallery=[alone]))
    assert [text for _, text in page.all("figcaption")] == ["12 × 8", "peak 0.75", "peak 0.75"]
    rows = [text for _, text in page.all("tr") if text.split()[0] in feedback.SCORES]
    assert rows == [f"{kind} 0.50" for kind in feedback.SCORES]
    [[attrs, text]] = page.all("mark", "word")
    assert text == "red (predicted misaligned)"
    assert attrs["title"] == "predicted misaligned, probability of being misaligned 97%"
    assert attrs["style"] == "--shade: 97.0%"
    assert [(a["title"], a["style"], text) for a, text in page.all("span", "word")] == [
        ("probability of being misaligned 2%", "--shade: 2.0%", "a")
    ]
    # The legend speaks of no ground truth either.
    assert page.all("span", "key")[0][1] == "word predicted misaligned"
    assert not [attrs for _, attrs, _ in page.elements if "truth" in attrs.get("class", "").split()]
    # Beside an image that has one, the others stay as they are.
    page = Page(write(tmp_path, gallery=[alone, item()]))
    captions = ["12 × 8", *2 * ["peak 0.75"], "12 × 8", *2 * ["ground truth 0.50", "predicted 0.75"]]
    assert [text for _, text in page.all("figcaption")] == captions
    assert page.all("span", "key")[0][1] == "word misaligned word predicted so word both"


def card(id="1.png", image="data:,", heatmap="data:,", **changes) -> report.Card:
    line = record(id).to_dict() | changes
    return report.Card(line, (12, 8), image, dict.fromkeys(feedback.HEATMAPS, (0.125, heatmap)))


def gallery(tmp_path, cards, title="Predictions", details=None) -> Page:
    path = tmp_path / "gallery.html"
    report.write_gallery(path, title, cards, details or {})
    return Page(path.read_text(encoding="utf-8"))


def test_gallery_of_predictions_alone(tmp_path):
    page = gallery(tmp_path, (card(id) for id in ("b.png", "a.png")), details={"checkpoint": 7})
    assert [text for _, text in page.all("h1")] == ["Predictions"]
    assert "checkpoint 7" in [text for _, text in page.all("li")]
    assert [attrs["aria-label"] for attrs, _ in page.all("article")] == ["b.png", "a.png"]
    assert page.all("output")[0][1] == "2 of 2 images"
    captions = [text for _, text in page.all("figcaption")]
    assert captions == 2 * ["12 × 8", "peak 0.12", "peak 0.12"]
    assert policy(page)["img-src"] == "data:"


def test_gallery_has_the_cards_and_controls_of_the_report(tmp_path):
    prediction = record()
    image, pictures = report.card_pictures(item().image, prediction.heatmaps)
    heatmaps = {kind: (0.5, report.data_uri(picture)) for kind, picture in pictures.items()}
    alone = gallery(tmp_path, [report.Card(prediction.to_dict(), (12, 8), report.data_uri(image), heatmaps)])
    page = Page(write(tmp_path, gallery=[report.GalleryItem(item().image, None, prediction)]))
    start = [e[0] for e in page.elements].index("form")
    count = len(page.elements) - start
    assert count > 100
    assert page.elements[start:] == alone.elements[-count:]


def test_linked_pictures_are_allowed_from_the_page_alone(tmp_path):
    page = gallery(tmp_path, [card(), card(image="images/a%20b(1).jpg", heatmap=None)])
    assert policy(page)["img-src"] == "data: 'self'"
    assert urls(page) == ["data:,", "images/a%20b(1).jpg"]
    assert [attrs["src"] for attrs, _ in page.all("img")] == [*3 * ["data:,"], "images/a%20b(1).jpg"]
    assert policy(gallery(tmp_path, [card(heatmap="heat.png")]))["img-src"] == "data: 'self'"


def test_a_hostile_address_stays_an_address(tmp_path):
    page = gallery(tmp_path, [card(image='x"); --image: url("http://evil/\\')])
    assert urls(page) == ["x%22); --image: url(%22http://evil/%5C"]


def test_every_score_and_peak_can_be_sorted_and_filtered_by(tmp_path):
    scores = {feedback.OVERALL: 0.25, feedback.ALIGNMENT: float("nan")}
    page = gallery(tmp_path, [card(scores=scores), card(scores={feedback.PLAUSIBILITY: 1.0})])
    # In the vocabulary's order; none that no image has.
    quantities = [feedback.PLAUSIBILITY, feedback.OVERALL, *(f"{kind} peak" for kind in feedback.HEATMAPS)]
    [form] = [attrs for attrs, _ in page.all("form") if attrs.get("id") == "controls"]
    assert json.loads(form["data-quantities"]) == quantities
    assert json.loads(page.all("article")[0][0]["data-values"]) == {
        feedback.OVERALL: 0.25,
        **{f"{kind} peak": 0.125 for kind in feedback.HEATMAPS},
    }
    assert [attrs["value"] for attrs, _ in page.all("option")] == [
        "", *(f"{name}.{way}" for name in quantities for way in ("up", "down")),
    ]  # fmt: skip
    bounds = [attrs for attrs, _ in page.all("input") if attrs["type"] == "number"]
    assert [attrs["name"] for attrs in bounds] == [f"{n}.{end}" for n in quantities for end in ("min", "max")]
    assert all(attrs["aria-label"] for attrs in bounds)


def test_gallery_of_no_images(tmp_path):
    page = gallery(tmp_path, [])
    assert page.all("output")[0][1] == "0 of 0 images"
    assert not page.all("article")


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
    assert doctest.testmod(report) == (0, 5)
