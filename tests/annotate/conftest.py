"""A project of three images on a store, its server, clients, and the rater's page in a browser."""

import contextlib
import functools
import threading
import time

import numpy as np
import pytest
import uvicorn
from PIL import Image
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.actions.action_builder import ActionBuilder
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from starlette.testclient import TestClient

from richhf_jax import feedback
from richhf_jax.annotate import answers, project, records, server
from richhf_jax.annotate.store import Store

WIDTH, HEIGHT = 640, 480
PROMPTS = ('A red cat, "happy" as ever!', "two dogs <script>alert(1)</script>", "a boat")


@pytest.fixture
def make_store(tmp_path):
    """Makes a project's store; with `gold`, its first image is for practice."""

    def make(gold: bool = False, **settings) -> Store:
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
            items.append(records.Item(f"train/{i}.png", prompt, f"{i}.png", WIDTH, HEIGHT, right, -i))
        config = project.Config(**settings)
        return Store.create(folder, config, items)

    return make


class Site:
    """A project on a server in this process, which may stop and start again at the same address."""

    def __init__(self, store):
        self.store = store
        self.secret = store.add_rater("Ada")
        self.port = 0
        self.start()

    def start(self) -> None:
        config = uvicorn.Config(
            server.make_app(self.store), port=self.port, log_level="error", lifespan="off"
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]

    def stop(self) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@pytest.fixture
def make_site(make_store):
    """Serves a project in this process, with one rater."""
    sites = []

    def make(**settings) -> Site:
        sites.append(Site(make_store(**settings)))
        return sites[-1]

    yield make
    for site in sites:
        site.stop()
        site.store.close()


@pytest.fixture
def site(make_site):
    return make_site()


@pytest.fixture
def store(make_store):
    with contextlib.closing(make_store()) as store:
        yield store


@pytest.fixture
def secret(store):
    return store.add_rater("Ada")


@pytest.fixture
def client(store):
    with TestClient(server.make_app(store)) as client:
        yield client


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


class Page:
    """The rater's page in Chromium, with the actions that the tests need."""

    def __init__(self, driver, site):
        self.driver, self.site, self.run = driver, site, driver.execute_script

    def find(self, selector: str):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def open(self, width: int = 1280, theme: str = "light") -> None:
        self.driver.set_screen(width, theme)
        self.driver.get(f"{self.site.address}/r/{self.site.secret}")
        self.wait(lambda: self.run("return document.getElementById('guidelines')?.open"))
        self.find("#guidelines button").click()
        self.wait_for_image()

    def work(self, item: str):
        """Returns what the store has of the rater's work on an item."""
        return self.site.store.work(self.site.store.person(self.site.secret), item)

    def reload(self) -> None:
        self.driver.refresh()
        self.wait_for_image()

    def wait(self, condition) -> None:
        WebDriverWait(self.driver, 10, 0.02).until(lambda _: condition())

    def wait_for_image(self) -> None:
        self.wait(lambda: self.run("return document.getElementById('task')?.hidden === false"))

    def wait_until_saved(self) -> None:
        self.wait(lambda: self.find("#saved").text == "Saved")

    def type(self, *keys: str) -> None:
        """Presses keys without moving the focus."""
        ActionChains(self.driver).send_keys(*keys).perform()

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
def make_page(driver, make_site):
    """Makes the page of a site; the test also fails if the page writes anything to the console.

    It asks for `make_site` so that servers stop after the page is left.
    """
    driver.get("about:blank")
    driver.get_log("browser")
    yield functools.partial(Page, driver)
    assert driver.get_log("browser") == []
    driver.get("about:blank")


@pytest.fixture
def page(make_page, site):
    return make_page(site)
