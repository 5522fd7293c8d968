"""Surveys of small images, each generator in a colour of its own."""

import contextlib
import pathlib

import pytest
from PIL import Image

from richhf_jax.survey import config
from richhf_jax.survey.store import Prompt, Store

# The red of a generator's images tells the generator, and their green the prompt.
REDS = {"tuned_7": 200, "plain_1": 100, "third_3": 20}
PROMPTS = tuple(f'a "cat" <b>{i}</b> & more' for i in range(8))


def paint(path: pathlib.Path, generator: str, prompt: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (48, 32), (REDS[generator], 10 * prompt, 0)).save(path)


class Clock:
    def __init__(self):
        self.now = 1e9

    def __call__(self) -> float:
        self.now += 1e-3
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def make(tmp_path, clock):
    """Makes a survey with named raters; returns the store and the persons."""
    with contextlib.ExitStack() as stack:

        def make(prompts=8, names="a", generators=2, **settings):
            folder = tmp_path / "survey"
            found = []
            for i in range(prompts):
                files = {name: f"{i}{name[:1]}.png" for name in list(REDS)[:generators]}
                for name, file in files.items():
                    paint(folder / config.IMAGES / file, name, i % len(PROMPTS))
                text = PROMPTS[i] if i < len(PROMPTS) else f"prompt {i}"
                found.append(Prompt(f"{i:04}", text, files))
            store = Store.create(folder, config.Config(**settings), found, clock)
            stack.callback(store.close)
            return store, *(store.person(store.add_rater(name)) for name in names)

        yield make


@pytest.fixture
def sides():
    """Tells the generators of a pair in a rater's hands: left, right."""

    def look(store, person, work) -> tuple[str, str]:
        found = []
        for side in ("left", "right"):
            with Image.open(store.image_path(person, work.token, side)) as image:
                red = image.getpixel((0, 0))[0]
            found.append(next(name for name, value in REDS.items() if value == red))
        return found[0], found[1]

    return look


@pytest.fixture
def reds() -> dict[int, str]:
    """Gives the generator of each red."""
    return {red: name for name, red in REDS.items()}
