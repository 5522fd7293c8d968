"""The gallery: its cards show each record as it is; its pictures are in the page or beside it."""

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

from richhf_jax import feedback
from richhf_jax.feedback import RichFeedback
from richhf_jax.pages import gallery, overlay

VOID = {"meta", "link", "img", "input", "br"}


class Page(html.parser.HTMLParser):
    """Parses a page to a list of (tag, attributes, text inside); fails on tags that don't close."""

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


def item(target=None, prediction=None, size=(8, 12)) -> gallery.GalleryItem:
    image = np.full((*size, 3), (200, 10, 90), np.uint8)
    target = target or record()
    prediction = prediction or record(heat=0.75, score=0.5, labels=(1, 0, 0))
    return gallery.GalleryItem(image, target, prediction)


def urls(page: Page) -> list[str]:
    """Returns the URIs in the styles of the page's elements."""
    return [
        u for _, attrs, _ in page.elements for u in re.findall(r'url\("([^"]*)"\)', attrs.get("style", ""))
    ]


def policy(page: Page) -> dict[str, str]:
    """Returns the Content-Security-Policy: directive -> sources."""
    [text] = [a["content"] for a, _ in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    return dict(directive.strip().split(" ", 1) for directive in text.split(";"))


def page_of_items(*items) -> Page:
    """Renders a page of the items' cards. `test_report` tests a whole report."""
    views = [gallery.item_view(one) for one in items]
    return Page(gallery.render("predictions.html", views, title="Items", details={}))


def _picture(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,")))))


def card(id="1.png", image="data:,", heatmap="data:,", **changes) -> gallery.Card:
    line = record(id).to_dict() | changes
    return gallery.Card(line, (12, 8), image, dict.fromkeys(feedback.HEATMAPS, (0.125, heatmap)))


def page_of(tmp_path, cards, title="Predictions", details=None) -> Page:
    path = tmp_path / "gallery.html"
    gallery.write_gallery(path, title, cards, details or {})
    return Page(path.read_text(encoding="utf-8"))


def test_gallery_shows_words_scores_and_peaks_of_each_record(tmp_path):
    other = record("test/2.png", "one dog, two cats!", (1, 1, 0, 0), heat=0, score=1.0)
    items = [item(), item(other, record("test/2.png", "one dog, two cats!", (0, 1, 0, 1), heat=0.25))]
    page = page_of_items(*items)
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
    page = page_of_items(item(target, prediction))
    assert [text for _, text in page.all("figcaption")] == ["12 × 8", "ground truth –", "predicted empty"]
    assert "overall 0.50 –" in [text for _, text in page.all("tr")]


def test_gallery_refuses_a_prediction_of_another_image(tmp_path):
    with pytest.raises(ValueError, match=r"'test/1.png'.*'test/2.png'"):
        gallery.item_view(item(record("test/1.png"), record("test/2.png")))


def test_pictures_of_the_gallery(tmp_path):
    page = page_of_items(item(record(heat=1.0)))
    image, truth, predicted, *_ = [_picture(attrs["src"]) for attrs, _ in page.all("img")]
    np.testing.assert_array_equal(image, item().image)
    assert truth.shape == predicted.shape == (8, 12, 4)
    # No heat is transparent; heat 1 has the top colour of the map.
    assert not truth[4:, :, 3].any()
    assert (truth[:4] == (252, 255, 164, 255)).all()


def test_large_images_are_shrunk(tmp_path):
    page = page_of_items(item(size=(256, 512)))
    assert _picture(page.all("img")[0][0]["src"]).shape == (128, 256, 3)
    assert page.all("figcaption")[0][1] == "512 × 256"


def test_card_pictures_of_a_photograph_and_its_heatmaps(rng):
    photograph = rng.normal(128, 30, (300, 600, 3)).clip(0, 255).astype(np.uint8)
    heatmap = np.zeros((300, 600), np.float32)
    heatmap[:150] = 0.5
    image, pictures = gallery.card_pictures(photograph, {"a": heatmap, "b": np.zeros_like(heatmap)})
    assert Image.open(io.BytesIO(image)).format == "JPEG"
    assert Image.open(io.BytesIO(image)).size == (256, 128)
    assert gallery.data_uri(image).startswith("data:image/jpeg;base64,")
    # An empty heatmap needs no picture.
    assert list(pictures) == ["a"]
    heat = _picture(gallery.data_uri(pictures["a"]))
    assert heat.shape == (64, 128, 4)
    assert (heat[:31] == overlay.picture(np.float32([[0.5]])).getpixel((0, 0))).all()
    assert not heat[33:, :, 3].any()


def test_thin_heatmaps_keep_a_pixel():
    image = np.zeros((1, 1000, 3), np.uint8)
    _, pictures = gallery.card_pictures(image, {"a": np.ones((1, 1000), np.float32)})
    assert _picture(gallery.data_uri(pictures["a"])).shape == (1, 128, 4)


def tokens(*probabilities: float | None) -> list[feedback.Token]:
    words = ("a", "red", "cat")
    return [feedback.Token(w, (p or 0) > 0.5, p) for w, p in zip(words, probabilities, strict=True)]


def test_gallery_without_ground_truth_shows_the_prediction_alone(tmp_path):
    prediction = dataclasses.replace(record(heat=0.75, score=0.5), tokens=tokens(0.02, 0.97, None))
    alone = gallery.GalleryItem(item().image, None, prediction)
    page = page_of_items(alone)
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
    # The legend doesn't speak of a ground truth either.
    assert page.all("span", "key")[0][1] == "word predicted misaligned"
    assert not [attrs for _, attrs, _ in page.elements if "truth" in attrs.get("class", "").split()]
    # Beside an image that has a ground truth, the others stay as they are.
    page = page_of_items(alone, item())
    captions = ["12 × 8", *2 * ["peak 0.75"], "12 × 8", *2 * ["ground truth 0.50", "predicted 0.75"]]
    assert [text for _, text in page.all("figcaption")] == captions
    assert page.all("span", "key")[0][1] == "word misaligned word predicted so word both"


def test_gallery_of_predictions_alone(tmp_path):
    page = page_of(tmp_path, (card(id) for id in ("b.png", "a.png")), details={"checkpoint": 7})
    assert [text for _, text in page.all("h1")] == ["Predictions"]
    assert "checkpoint 7" in [text for _, text in page.all("li")]
    assert [attrs["aria-label"] for attrs, _ in page.all("article")] == ["b.png", "a.png"]
    assert page.all("output")[0][1] == "2 of 2 images"
    captions = [text for _, text in page.all("figcaption")]
    assert captions == 2 * ["12 × 8", "peak 0.12", "peak 0.12"]
    assert policy(page)["img-src"] == "data:"


def test_a_prediction_has_one_card_however_its_pictures_are_given(tmp_path):
    prediction = record()
    image, pictures = gallery.card_pictures(item().image, prediction.heatmaps)
    heatmaps = {kind: (0.5, gallery.data_uri(picture)) for kind, picture in pictures.items()}
    cards = [gallery.Card(prediction.to_dict(), (12, 8), gallery.data_uri(image), heatmaps)]
    page = page_of_items(gallery.GalleryItem(item().image, None, prediction))
    assert page_of(tmp_path, cards, title="Items").elements == page.elements


def test_linked_pictures_are_allowed_from_the_page_alone(tmp_path):
    page = page_of(tmp_path, [card(), card(image="images/a%20b(1).jpg", heatmap=None)])
    assert policy(page)["img-src"] == "data: 'self'"
    assert urls(page) == ["data:,", "images/a%20b(1).jpg"]
    assert [attrs["src"] for attrs, _ in page.all("img")] == [*3 * ["data:,"], "images/a%20b(1).jpg"]
    assert policy(page_of(tmp_path, [card(heatmap="heat.png")]))["img-src"] == "data: 'self'"


def test_a_hostile_address_stays_an_address(tmp_path):
    page = page_of(tmp_path, [card(image='x"); --image: url("http://evil/\\\r\f')])
    assert urls(page) == ["x%22); --image: url(%22http://evil/%5C%0D%0C"]


@pytest.mark.parametrize(
    "hostile",
    ["</code></article><script>1</script>", "\"' onfocus=x style=a", "</style><!-- {{ 7 * 7 }} &#34;"],
)
def test_hostile_text_is_text_everywhere(tmp_path, hostile):
    words = feedback.tokenize_prompt(hostile)
    tokens = [{"text": word, "misaligned": True, "probability": 0.5} for word in words]
    cards = [card(id=hostile, prompt=hostile, tokens=tokens)]
    page = page_of(tmp_path, cards, title=hostile, details={hostile: hostile})
    [(article, _)] = page.all("article")
    assert (article["aria-label"], article["data-prompt"]) == (hostile, hostile)
    assert page.all("code")[0][1] == page.all("title")[0][1] == page.all("h1")[0][1] == hostile
    marks = page.all("mark", "word")
    assert [text.removesuffix(" (predicted misaligned)") for _, text in marks] == words
    # All else is as on a page of harmless text.
    plain = page_of(
        tmp_path, [card(prompt="a", tokens=[{"text": "a", "misaligned": False}])], details={"a": "b"}
    )
    tags = [
        (tag, attrs.keys())
        for tag, attrs, _ in page.elements
        if attrs.get("class") not in ("spoken", "word predicted")
    ]
    assert tags == [(tag, attrs.keys()) for tag, attrs, _ in plain.elements]


def test_every_score_and_peak_can_be_sorted_and_filtered_by(tmp_path):
    scores = {feedback.OVERALL: 0.25, feedback.ALIGNMENT: float("nan")}
    page = page_of(tmp_path, [card(scores=scores), card(scores={feedback.PLAUSIBILITY: 1.0})])
    # The values have the vocabulary's order; a value that no image has is left out.
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


def test_filters_and_bars_have_the_range_of_the_score(tmp_path):
    cosines = [card(f"{i}", scores={feedback.ALIGNMENT: value}) for i, value in enumerate((-0.5, 0.25))]
    path = tmp_path / "gallery.html"
    gallery.write_gallery(path, "Cosines", cosines, {}, (-1.0, 1.0))
    page = Page(path.read_text(encoding="utf-8"))

    def ranges(page):
        bounds = [attrs for attrs, _ in page.all("input") if attrs["type"] == "number"]
        return {attrs["name"]: (attrs["min"], attrs["max"], attrs["placeholder"]) for attrs in bounds}

    found = ranges(page)
    assert found["alignment.min"] == ("-1", "1", "-1")
    assert found["alignment.max"] == ("-1", "1", "1")
    assert found["misalignment peak.min"] == ("0", "1", "0")
    # -0.5 is a quarter of the way from -1 to 1.
    bars = [attrs["style"] for attrs, _ in page.all("i") if "width" in attrs.get("style", "")]
    assert bars == ["width: 25.0%", "width: 62.5%"]
    assert ranges(page_of(tmp_path, cosines))["alignment.min"] == ("0", "1", "0")


def test_controls_are_there_for_what_is_there(tmp_path):
    bare = dataclasses.replace(card(prompt=""), heatmaps={})
    bare.record.pop("tokens")
    page, full = page_of(tmp_path, [bare]), page_of(tmp_path, [bare, card()])

    def names(page):
        return {attrs["name"] for attrs, _ in page.all("input")}

    assert {"search", "heat", "opacity"} <= names(full)
    assert not {"search", "heat", "opacity"} & names(page)
    assert (len(page.all("p", "note")), len(full.all("p", "note"))) == (0, 1)
    assert [text for _, text in page.all("kbd")] == ["Esc", "j", "→", "k", "←", "?"]
    assert not page.all("span", "scale")
    assert not page.all("span", "key")
    assert not page.all("p", "prompt")
    assert len(full.all("p", "prompt")) == 1
    assert [attrs["alt"] for attrs, _ in page.all("img")] == ["1.png"]


def test_an_uncertainty_stands_beside_its_score(tmp_path):
    uncertainty = dict(zip(feedback.SCORES, (0.1, 0.256, 1, 0.004), strict=True))
    pages = [
        page_of(tmp_path, [card(uncertainty=uncertainty)]),
        page_of_items(item(prediction=dataclasses.replace(record(), uncertainty=uncertainty))),
    ]
    for page, truth in zip(pages, ("", " 0.25"), strict=True):
        rows = [text for _, text in page.all("tr") if text.split()[0] in feedback.SCORES]
        assert rows == [
            f"{kind}{truth} 0.25 ± {shown}"
            for kind, shown in zip(feedback.SCORES, ("0.10", "0.26", "1.00", "0.00"), strict=True)
        ]


def test_gallery_of_no_images(tmp_path):
    page = page_of(tmp_path, [])
    assert page.all("output")[0][1] == "0 of 0 images"
    assert not page.all("article")


def test_docstring_examples():
    assert doctest.testmod(gallery) == (0, 3)
