"""A project of three images on a store, its server, clients, and the rater's page in a browser."""

import contextlib
import functools

import numpy as np
import pytest
from PIL import Image
from selenium.webdriver.common.actions.action_builder import ActionBuilder
from selenium.webdriver.common.by import By
from starlette.testclient import TestClient

from richhf_jax import feedback
from richhf_jax.annotate import answers, project, records, server
from richhf_jax.annotate.store import Store

WIDTH, HEIGHT = 640, 480
PROMPTS = ('A red cat, "happy" as ever!', "two dogs <script>alert(1)</script>", "a boat")


@pytest.fixture
def make_store(tmp_path):
    """Makes a project's store; with `gold`, its first image is gold. All images get the suggestion."""

    def make(gold: bool = False, suggestion: dict | None = None, **settings) -> Store:
        folder = tmp_path / "project"
        (folder / project.IMAGES).mkdir(parents=True)
        pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3)).astype(np.uint8)
        items = []
        for i, prompt in enumerate(PROMPTS):
            Image.fromarray(pixels).resize((WIDTH, HEIGHT)).save(folder / project.IMAGES / f"{i}.png")
            right = None
            if gold and i == 0:
                right = answers.empty(prompt) | {
                    "implausibility_points": [[100.0, 100.0]],
                    "ratings": dict.fromkeys(feedback.SCORES, 4),
                }
            # Images come in the order of the prompts.
            items.append(
                records.Item(f"train/{i}.png", prompt, f"{i}.png", WIDTH, HEIGHT, right, -i, suggestion)
            )
        config = project.Config(**settings)
        return Store.create(folder, config, items)

    return make


@pytest.fixture
def store(make_store):
    with contextlib.closing(make_store()) as store:
        yield store


@pytest.fixture
def client(store):
    with TestClient(server.make_app(store)) as client:
        yield client


@pytest.fixture
def make_site(make_store, local_server):
    """Serves a project in this process, with one rater."""
    sites = []

    def make(**settings):
        store = make_store(**settings)
        site = local_server(server.make_app(store))
        site.store, site.secret = store, store.add_rater("Ada")
        sites.append(site)
        return site

    yield make
    for site in sites:
        site.stop()
        site.store.close()


@pytest.fixture
def site(make_site):
    return make_site()


@pytest.fixture
def secret(store):
    return store.add_rater("Ada")


@pytest.fixture
def rater(client, secret):
    """Opens a link, as a rater does, and gets the first image."""
    assert client.get(f"/r/{secret}").status_code == 200
    assert client.get("/api/next").json()["work"]["id"] == "train/0.png"
    return client


@pytest.fixture
def manager(client, store):
    assert client.get(f"/m/{store.make_manager()}").status_code == 200
    return client


class Marks:
    """What the tests do on the rater's page besides what they do on all such pages."""

    def work(self, item: str):
        """Returns what the store has of the rater's work on an item."""
        return self.site.store.work(self.site.store.person(self.site.secret), item)

    def place(self, x: float, y: float) -> tuple[tuple[int, int], tuple[float, float]]:
        """Returns the whole CSS pixel nearest to a point of the unzoomed image, and its exact point."""
        left, top, width, height, *size = self.run(
            "const svg = document.getElementById('image'), box = svg.getBoundingClientRect();"
            "const image = svg.querySelector('image');"
            "return [box.left, box.top, box.width, box.height, Number(image.getAttribute('width')),"
            "        Number(image.getAttribute('height'))]"
        )
        # The image is as large as its box allows, in the box's middle.
        scale = min(width / size[0], height / size[1])
        left, top = left + (width - scale * size[0]) / 2, top + (height - scale * size[1]) / 2
        pixel = round(left + (x + 0.5) * scale), round(top + (y + 0.5) * scale)
        return pixel, ((pixel[0] - left) / scale - 0.5, (pixel[1] - top) / scale - 0.5)

    def click(self, x: float, y: float) -> tuple[float, float]:
        """Clicks on the image and returns the exact point."""
        pixel, point = self.place(x, y)
        chain = ActionBuilder(self.driver, duration=0)
        chain.pointer_action.move_to_location(*pixel).click()
        chain.perform()
        return point

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> tuple[float, float]:
        """Drags on the image and returns the exact point of the end."""
        pixel, point = self.place(*end)
        chain = ActionBuilder(self.driver, duration=0)
        chain.pointer_action.move_to_location(*self.place(*start)[0]).pointer_down()
        chain.pointer_action.move_to_location(*pixel).pointer_up()
        chain.perform()
        return point

    def word(self, text: str):
        return next(e for e in self.driver.find_elements(By.CSS_SELECTOR, "#words button") if e.text == text)

    @property
    def points(self) -> dict:
        """Returns the points that are drawn, by kind, in pixels."""
        found = {"implausibility": [], "misalignment": []}
        for mark in self.driver.find_elements(By.CSS_SELECTOR, ".mark"):
            found[mark.get_attribute("data-kind")].append(
                (float(mark.get_attribute("data-x")), float(mark.get_attribute("data-y")))
            )
        return found


@pytest.fixture
def make_page(driver, make_site, rater_page):
    """Makes the page of a site. It asks for `make_site` so that servers stop after the page is left."""
    return functools.partial(type("Page", (Marks, rater_page), {}), driver)


@pytest.fixture
def page(make_page, site):
    return make_page(site)
