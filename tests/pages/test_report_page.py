"""The gallery in a real browser: its controls and keys work, and nothing is broken or cut off."""

import pathlib

import numpy as np
import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from richhf_jax import feedback
from richhf_jax.pages import gallery, report

COUNT = 40
SCORE = feedback.SCORES[-1]
PEAK = f"{feedback.HEATMAPS[0]} peak"
ANIMALS = ("cat", "dog", "Cow")
UNSCORED = 5
SCORED = [i for i in range(COUNT) if i != UNSCORED]


def score_of(i: int) -> float | None:
    """Returns a score that differs for each i and neither rises nor falls with it; one image has none."""
    return None if i == UNSCORED else round((7 * i % COUNT) / COUNT, 3)


def peak_of(i: int) -> float:
    return 0.0 if i % 5 == 0 else 0.3 + 0.01 * (11 * i % COUNT)


def prediction(i: int) -> feedback.RichFeedback:
    prompt = f"a {ANIMALS[i % 3]}, number {i}"
    heatmap = np.zeros((48, 64), np.float32)
    heatmap[10:30, 20:50] = peak_of(i)
    scores = dict.fromkeys(feedback.SCORES, 0.5) | {SCORE: score_of(i)}
    tokens = [
        feedback.Token(word, j == 1 and i % 2 == 0, (0.9 if i % 2 == 0 else 0.1) if j == 1 else 0.0)
        for j, word in enumerate(feedback.tokenize_prompt(prompt))
    ]
    return feedback.RichFeedback(
        f"{i}.png",
        prompt,
        {kind: score for kind, score in scores.items() if score is not None},
        dict.fromkeys(feedback.HEATMAPS, heatmap),
        tokens,
    )


def write_gallery(folder: pathlib.Path, embedded: bool) -> pathlib.Path:
    """Writes a page of COUNT predictions, with its pictures in it or in a folder beside it."""
    (folder / "images").mkdir(parents=True)

    def uri(name: str, data: bytes | None) -> str | None:
        if data is None or embedded:
            return data and gallery.data_uri(data)
        (folder / "images" / name).write_bytes(data)
        return f"images/{name.replace(' ', '%20')}"

    cards = []
    for i in range(COUNT):
        record = prediction(i)
        image, pictures = gallery.card_pictures(
            np.full((48, 64, 3), (6 * i, 90, 160), np.uint8), record.heatmaps
        )
        heatmaps = {
            kind: (float(heatmap.max()), uri(f"{i} {kind}.png", pictures.get(kind)))
            for kind, heatmap in record.heatmaps.items()
        }
        cards.append(gallery.Card(record.to_dict(), (64, 48), uri(f"{i} (a)'.png", image), heatmaps))
    gallery.write_gallery(folder / "gallery.html", "Predictions", cards, {"images": COUNT})
    return folder / "gallery.html"


def write_report(folder: pathlib.Path) -> pathlib.Path:
    """Writes an evaluation's page: tables, curves, and the same images with a ground truth."""
    image = np.full((48, 64, 3), (6, 90, 160), np.uint8)
    items = [gallery.GalleryItem(image, prediction(i), prediction(i)) for i in range(COUNT)]
    keys = [column.key for table in report.TABLES for column in table.columns]
    rows = [report.Row(name, dict.fromkeys(keys, 1)) for name in ("model", "trivial")]
    curves = {"feedback": {"train loss/heatmap": [(0, 1.0), (100, 0.1)]}}
    folder.mkdir()
    report.write_report(folder / "report.html", "RAHF", rows, curves, items, {"step": 100})
    return folder / "report.html"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Writes the three pages and returns their addresses."""
    folder = tmp_path_factory.mktemp("pages")
    paths = {
        "embedded": write_gallery(folder / "embedded", embedded=True),
        "linked": write_gallery(folder / "linked", embedded=False),
        "report": write_report(folder / "report"),
    }
    return {name: path.as_uri() for name, path in paths.items()}


class Browser:
    """A page in Chromium, with the actions that the tests need."""

    def __init__(self, driver):
        self.driver = driver
        self.run = driver.execute_script

    def open(self, address: str, width: int = 1280, theme: str = "light") -> None:
        self.driver.set_screen(width, theme)
        # Opens another page first, because a changed hash alone would not load the page again.
        self.driver.get("about:blank")
        self.driver.get_log("browser")
        self.driver.get(address)

    def control(self, name: str):
        return self.driver.find_element(By.NAME, name)

    def type(self, text: str) -> None:
        """Presses keys without moving the focus."""
        ActionChains(self.driver).send_keys(text).perform()

    def sort(self, value: str) -> None:
        Select(self.control("sort")).select_by_value(value)

    def limit(self, name: str, value: str) -> None:
        self.run("document.querySelector('details').open = true")
        self.control(name).send_keys(value)

    @property
    def shown(self) -> list[int]:
        """Returns the numbers of the images shown, from the top."""
        names = self.run(
            "return [...document.querySelectorAll('.card')].filter((card) => card.checkVisibility())"
            ".map((card) => card.getAttribute('aria-label'))"
        )
        return [int(name.removesuffix(".png")) for name in names]

    @property
    def count(self) -> str:
        return self.driver.find_element(By.TAG_NAME, "output").text

    @property
    def focused(self) -> str:
        return self.run("const e = document.activeElement; return e.getAttribute('aria-label') ?? e.name")

    @property
    def heat(self) -> float:
        """Returns the opacity that the heatmaps are drawn with."""
        return float(self.run("return getComputedStyle(document.querySelector('.heat')).opacity"))

    def wait(self, condition) -> None:
        WebDriverWait(self.driver, 10, 0.02).until(lambda _: condition())


@pytest.fixture
def browser(driver):
    """Opens the browser; the test also fails if the page writes anything to the console."""
    browser = Browser(driver)
    yield browser
    assert driver.get_log("browser") == []


@pytest.mark.parametrize("page", ["embedded", "linked", "report"])
def test_every_picture_is_seen(browser, pages, page):
    browser.open(pages[page])
    pictures = browser.driver.find_elements(By.CSS_SELECTOR, ".card img")
    heatmaps = sum(peak_of(i) > 0 for i in range(COUNT)) * len(feedback.HEATMAPS)
    assert len(pictures) == COUNT + heatmaps * (2 if page == "report" else 1)
    for card in browser.driver.find_elements(By.CLASS_NAME, "card"):
        # Pictures are read when they come into sight.
        browser.run("arguments[0].scrollIntoView()", card)
        loaded = (
            "return [...arguments[0].querySelectorAll('img')].every((image) => image.naturalWidth === 64)"
        )
        browser.wait(lambda card=card, loaded=loaded: browser.run(loaded, card))
    # The image beneath a heatmap is a background; it is read, too.
    beneath = browser.run(
        "return getComputedStyle(document.querySelector('.maps .stack'), '::before').backgroundImage"
    )
    size = browser.driver.execute_async_script(
        "const image = new Image(), done = arguments[1];"
        "image.onload = () => done(image.naturalWidth); image.onerror = () => done(0);"
        "image.src = arguments[0].slice(5, -2);",
        beneath,
    )
    assert size == 64


def test_pictures_out_of_sight_wait(browser, pages):
    browser.open(pages["linked"])
    # The page is complete when all pictures are read that don't wait to come into sight.
    browser.wait(lambda: browser.run("return document.readyState") == "complete")
    read = browser.run("return [...document.images].filter((image) => image.naturalWidth > 0).length")
    assert 3 <= read < 1.5 * COUNT


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("page", ["embedded", "report"])
@pytest.mark.parametrize("width", [390, 800, 1280])
def test_nothing_runs_out_of_the_page(browser, pages, page, width, theme):
    browser.open(pages[page], width, theme)
    browser.run("document.querySelector('details').open = true")
    # Lays out the cards out of sight, too.
    browser.run(
        "for (const card of document.querySelectorAll('.card')) card.style.contentVisibility = 'visible'"
    )
    inner, outer, window = browser.run(
        "const page = document.documentElement; return [page.scrollWidth, page.clientWidth, innerWidth]"
    )
    assert inner <= outer
    # A phone would zoom out if something were wider.
    assert window == width


@pytest.mark.parametrize("page", ["embedded", "report"])
def test_text_is_readable_in_light_and_dark(browser, driver, pages, page):
    backgrounds = {}
    for theme in ("light", "dark"):
        browser.open(pages[page], theme=theme)
        browser.run("document.querySelector('details').open = true")
        browser.run("document.getElementById('show-keys').click()")
        contrasts = driver.contrasts()
        assert len(contrasts) > 5 * COUNT
        assert contrasts[0][0] >= 4.5, contrasts[:3]
        backgrounds[theme] = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert backgrounds == {"light": "rgb(247, 247, 245)", "dark": "rgb(18, 20, 23)"}


@pytest.mark.parametrize("page", ["embedded", "report"])
def test_sort(browser, pages, page):
    browser.open(pages[page])
    with_score = sorted(SCORED, key=score_of)
    browser.sort(f"{SCORE}.up")
    assert browser.shown == [*with_score, UNSCORED]
    browser.sort(f"{SCORE}.down")
    assert browser.shown == [*with_score[::-1], UNSCORED]
    browser.sort(f"{PEAK}.down")
    # Equal values keep the input's order.
    assert browser.shown == sorted(range(COUNT), key=lambda i: -round(peak_of(i), 4))
    browser.sort("")
    assert browser.shown == list(range(COUNT))


def test_filter_by_a_range(browser, pages):
    browser.open(pages["embedded"])
    browser.limit(f"{SCORE}.min", "0.28")
    # Values are compared as shown: 0.275 is shown as 0.28. The image without a score is in no range.
    assert browser.shown == [i for i in SCORED if score_of(i) >= 0.275]
    browser.limit(f"{SCORE}.max", "0.6")
    shown = [i for i in SCORED if 0.275 <= score_of(i) <= 0.6]
    assert browser.shown == shown
    browser.limit(f"{PEAK}.max", "0")
    shown = [i for i in shown if peak_of(i) == 0]
    assert browser.shown == shown
    assert browser.count == f"{len(shown)} of {COUNT} images"
    assert len(shown) > 1
    browser.driver.find_element(By.CSS_SELECTOR, "[type=reset]").click()
    browser.wait(lambda: browser.shown == list(range(COUNT)))
    assert browser.count == f"{COUNT} of {COUNT} images"


def test_search_in_the_prompts(browser, pages):
    browser.open(pages["embedded"])
    browser.type("/")
    browser.type("A COW")
    cows = [i for i in range(COUNT) if i % 3 == 2]
    assert browser.shown == cows
    assert browser.count == f"{len(cows)} of {COUNT} images"
    # Sorting keeps the filter.
    browser.sort(f"{SCORE}.up")
    assert browser.shown == sorted(cows, key=lambda i: 2 if score_of(i) is None else score_of(i))
    browser.type(Keys.ESCAPE)
    assert len(browser.shown) == COUNT
    browser.type("/")
    # The marks' spoken words are no part of a prompt.
    browser.type("misaligned")
    assert browser.shown == []
    assert browser.count == f"0 of {COUNT} images"
    browser.type(Keys.ESCAPE)
    assert len(browser.shown) == COUNT
    # Escape leaves the field: a letter is a command again.
    browser.type("j")
    assert browser.control("search").get_attribute("value") == ""
    assert browser.focused.endswith(".png")


@pytest.mark.parametrize("page", ["embedded", "report"])
def test_heatmaps_and_their_opacity(browser, pages, page):
    browser.open(pages[page])
    browser.run("document.querySelector('.heat').scrollIntoView()")
    assert browser.heat == 0.85
    browser.type("[[")
    assert browser.heat == 0.75
    browser.type("]")
    assert browser.heat == 0.8
    browser.type("h")
    assert browser.heat == 0
    beneath = "return getComputedStyle(document.querySelector('.maps .stack'), '::before').filter"
    assert browser.run(beneath) == "none"
    browser.type("h")
    assert browser.heat == 0.8
    assert browser.run(beneath) != "none"
    browser.control("heat").click()
    assert browser.heat == 0
    browser.control("heat").click()
    # A slider keeps its own keys.
    browser.control("opacity").send_keys(Keys.END)
    assert browser.heat == 1
    browser.control("opacity").send_keys(Keys.ARROW_LEFT)
    assert browser.heat == 0.95


@pytest.mark.parametrize(("page", "width"), [("embedded", 1280), ("linked", 390), ("report", 1280)])
def test_keys_go_from_card_to_card(browser, pages, page, width):
    browser.open(pages[page], width)
    browser.control("search").send_keys("cow")
    browser.type(Keys.TAB)
    browser.run("document.activeElement.blur(); scrollTo(0, 0)")
    seen = []
    for key in ("j", "j", Keys.ARROW_RIGHT, "k", Keys.ARROW_LEFT, "k", "k"):
        browser.type(key)
        seen.append(browser.focused)
        # The card's top is in sight, below the controls where these stay in place.
        inside = browser.run(
            "const card = document.activeElement.getBoundingClientRect();"
            "const bar = document.getElementById('controls').getBoundingClientRect();"
            "return card.top >= Math.max(bar.bottom, 0) && card.top + 100 < innerHeight"
            " || getComputedStyle(document.getElementById('controls')).position === 'static' && card.top >= 0"
        )
        assert inside, key
    assert seen == ["2.png", "5.png", "8.png", "5.png", "2.png", "2.png", "2.png"]


def test_letters_typed_into_a_field_are_no_commands(browser, pages):
    browser.open(pages["embedded"])
    browser.control("search").send_keys("h[j/?")
    assert browser.control("search").get_attribute("value") == "h[j/?"
    assert browser.focused == "search"
    assert browser.control("heat").is_selected()
    browser.type(Keys.ESCAPE)
    # The browser's own commands don't act either.
    ActionChains(browser.driver).key_down(Keys.CONTROL).send_keys("h").key_up(Keys.CONTROL).perform()
    assert browser.control("heat").is_selected()


def test_arrows_scroll_a_wide_table(browser, pages):
    browser.open(pages["report"], 390)
    browser.run("document.querySelector('.scroll').focus()")
    browser.type(Keys.ARROW_RIGHT)
    assert browser.run("return document.activeElement.className") == "scroll"
    # In a checkbox, letters are commands as elsewhere.
    browser.type("j")
    assert browser.focused == "0.png"


def test_keys_are_told(browser, pages):
    browser.open(pages["embedded"])
    dialog = browser.driver.find_element(By.ID, "keys")
    assert not dialog.is_displayed()
    browser.type("?")
    assert dialog.is_displayed()
    keys = [e.text for e in dialog.find_elements(By.TAG_NAME, "kbd")]
    assert keys == ["/", "Esc", "j", "→", "k", "←", "h", "[", "]", "?"]
    # The dialog takes the keys while it is open.
    browser.type("h")
    assert browser.heat == 0.85
    browser.type(Keys.ESCAPE)
    assert not dialog.is_displayed()
    browser.driver.find_element(By.ID, "show-keys").click()
    assert dialog.is_displayed()


def test_a_view_has_an_address(browser, pages):
    browser.open(pages["linked"])
    browser.control("search").send_keys("cow")
    browser.sort(f"{SCORE}.down")
    browser.limit(f"{SCORE}.min", "0.3")
    browser.control("heat").click()
    browser.wait(lambda: "heat=" in browser.driver.current_url)
    address, shown = browser.driver.current_url, browser.shown
    assert 1 < len(shown) < COUNT / 3
    browser.open(address)
    assert browser.shown == shown
    assert browser.heat == 0
    # The filters are open, so none works unseen.
    assert browser.control(f"{SCORE}.min").is_displayed()
    browser.driver.find_element(By.CSS_SELECTOR, "[type=reset]").click()
    browser.wait(lambda: browser.driver.current_url == pages["linked"])
    # A link to a section sets no field.
    browser.open(pages["report"] + "#gallery")
    assert len(browser.shown) == COUNT


def test_fields_have_names_for_screen_readers(browser, pages):
    browser.open(pages["report"])
    browser.run("document.querySelector('details').open = true")
    fields = browser.driver.find_elements(By.CSS_SELECTOR, "#controls :is(input, select, button)")
    names = [field.accessible_name for field in fields]
    assert all(names)
    assert len(set(names)) == len(names)


def test_of_thousands_of_cards_those_in_sight_are_laid_out(browser, tmp_path):
    record = prediction(1).to_dict()
    cards = [
        gallery.Card(record | {"id": f"{i}.png", "prompt": f"a cat, number {i}"}, (64, 48), f"{i}.png", {})
        for i in range(3000)
    ]
    gallery.write_gallery(tmp_path / "gallery.html", "Many", cards, {})
    browser.open((tmp_path / "gallery.html").as_uri())
    prompts = "[...document.querySelectorAll('.prompt')]"
    laid_out = f"return {prompts}.filter((p) => p.checkVisibility({{ contentVisibilityAuto: true }})).length"
    browser.wait(lambda: 1 <= browser.run(laid_out) < 30)
    browser.type("/number 12")
    assert len(browser.shown) == 111
    browser.sort(f"{SCORE}.down")
    assert len(browser.shown) == 111
    assert browser.run(laid_out) < 30
    # There are no pictures, so the console names each that the page looked for.
    lines = browser.driver.get_log("browser")
    assert 1 <= len(lines) < 100
    assert all("ERR_FILE_NOT_FOUND" in line["message"] for line in lines)


@pytest.mark.parametrize("width", [390, 1280])
def test_a_page_of_cosines_alone(browser, tmp_path, width):
    """There are neither prompts nor heatmaps, and a score from -1 to 1."""
    image = gallery.data_uri(gallery.card_pictures(np.full((48, 64, 3), 90, np.uint8), {})[0])
    values = (0.25, -0.5, -0.1)
    cards = [
        gallery.Card(
            {"id": f"{i}.png", "prompt": "", "scores": {feedback.ALIGNMENT: value}}, (64, 48), image, {}
        )
        for i, value in enumerate(values)
    ]
    details = {"model": "/runs/" + "a_long_name_without_a_space" * 4}
    gallery.write_gallery(tmp_path / "gallery.html", "Cosines", cards, details, (-1, 1))
    browser.open((tmp_path / "gallery.html").as_uri(), width)
    assert browser.run("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert browser.run("return innerWidth") == width
    browser.type("h[]/")  # Keys of controls that aren't there do nothing.
    browser.sort(f"{feedback.ALIGNMENT}.up")
    assert browser.shown == [1, 2, 0]
    browser.limit(f"{feedback.ALIGNMENT}.max", "-0.05")
    assert browser.shown == [1, 2]
    browser.limit(f"{feedback.ALIGNMENT}.min", "-0.2")
    assert browser.shown == [2]
    assert browser.run(
        "return [...document.querySelectorAll('[type=number]')].every((e) => e.checkValidity())"
    )
    # The button is at the right end, as above.
    right = "return document.querySelector('{}').getBoundingClientRect().right"
    assert browser.run(right.format("#show-keys")) == browser.run(right.format("[type=reset]"))
    # A card of two parts isn't as wide as one of four.
    assert browser.run("return document.querySelector('.stack').offsetWidth") < 290
