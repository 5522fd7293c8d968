"""Three raters annotate five images by real clicks and keys; their answers become the paper's records."""

import json
import math
import types

import numpy as np
import pytest
from PIL import Image
from selenium.webdriver.common.keys import Keys

from richhf_jax import feedback
from richhf_jax.annotate import __main__ as annotate
from richhf_jax.datasets import consolidate, ratings

PROMPTS = ("a red cat", "two dogs in a boat", 'a "blue" bird, flying', "a bowl of fruit", "an old man")
RATERS = ("Ada", "Bo", "Cy")


def size_of(number: int) -> tuple[int, int]:
    return 320 + 64 * number, 384 - 32 * number


@pytest.fixture
def served(tmp_path, capsys, start_server):
    """Makes a project by the commands. Returns its folder, its server and the raters' secrets."""
    images, folder = tmp_path / "images", tmp_path / "project"
    images.mkdir()
    for number, prompt in enumerate(PROMPTS):
        width, height = size_of(number)
        Image.fromarray(np.full((height, width, 3), 40 * number, np.uint8)).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text(prompt)

    def run(*arguments) -> str:
        with pytest.raises(SystemExit) as end:
            annotate.main([str(argument) for argument in arguments])
        assert not end.value.code
        return capsys.readouterr().out

    run("init", folder, "--images", images)
    links = run("raters", "add", folder, *RATERS)
    server = start_server("annotate", folder)
    secrets = [line.rpartition("/")[2] for line in links.splitlines()]
    return types.SimpleNamespace(run=run, folder=folder, server=server, secrets=secrets)


def rounded(value: float) -> float:
    """Rounds as JavaScript does."""
    return math.floor(100 * value + 0.5) / 100


def annotate_image(page, rater: int, crash) -> ratings.Rating:
    """Marks the image that is shown, by clicks that differ for each rater and image. Returns the answer."""
    prompt = page.find("#words").text
    number = PROMPTS.index(prompt)
    width, height = size_of(number)
    rng = np.random.default_rng(10 * rater + number)
    points = {kind: [] for kind in feedback.HEATMAPS}
    for kind in feedback.HEATMAPS:
        page.type(kind[0])
        for _ in range(rng.integers(3)):
            x, y = page.click(*(rng.uniform(0.1, 0.9, 2) * (width, height)))
            points[kind].append((rounded(x), rounded(y)))
    tokens = feedback.tokenize_prompt(prompt)
    labels = [1] * len(tokens)
    if rater:
        page.word(tokens[-1]).click()
        labels[-1] = 0
    crash()
    scores = [int(value) for value in rng.integers(1, 6, 4)]
    page.type(Keys.ESCAPE, "n", *map(str, scores), Keys.ENTER)
    # The manager is the first person.
    return ratings.Rating(
        f"{number}.png", prompt, f"rater-{rater + 2}", width, height,
        {kind: tuple(found) for kind, found in points.items()}, tuple(labels),
        dict(zip(feedback.SCORES, scores, strict=True)), "", feedback.POINT_RADIUS,
    )  # fmt: skip


def test_clicks_become_records(served, make_page, tmp_path):
    expected = {}
    for rater, secret in enumerate(served.secrets):
        page = make_page(types.SimpleNamespace(address=served.server.address, secret=secret))
        page.open()

        def crash(page=page, rater=rater):
            if rater == 1 and len(expected) == len(PROMPTS) + 2:
                page.wait_until_saved()
                served.server.kill()
                served.server.start()
                page.reload()

        for done in range(1, len(PROMPTS) + 1):
            rating = annotate_image(page, rater, crash)
            expected[rating.image_id, rating.rater_id] = rating
            page.wait(lambda page=page, done=done: page.find("#count").text.startswith(f"{done} done"))
    raw, own = tmp_path / "raw.jsonl", tmp_path / "own.jsonl"
    served.run("export", served.folder, raw)
    lines = [json.loads(line) for line in raw.read_text().splitlines()]
    assert len(lines) == len(expected) == len(PROMPTS) * len(RATERS)
    own.write_text("".join(expected[line["image_id"], line["rater_id"]].to_json() + "\n" for line in lines))
    assert [line | {"tool_version": ""} for line in lines] == [
        json.loads(line) for line in own.read_text().splitlines()
    ]
    own.write_text(own.read_text().replace('"tool_version": ""', '"tool_version": "x"'))
    for path in (raw, own):
        consolidate.main([str(path), str(path.with_suffix(".tfrecord"))])
    assert raw.with_suffix(".tfrecord").read_bytes() == own.with_suffix(".tfrecord").read_bytes()
