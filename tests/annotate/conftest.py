"""A project of three images and one of practice, on a store."""

import numpy as np
import pytest
from PIL import Image

from richhf_jax import feedback
from richhf_jax.annotate import answers, project, store

WIDTH, HEIGHT = 640, 480
PROMPTS = ('A red cat, "happy" as ever!', "two dogs <script>alert(1)</script>", "a boat")


@pytest.fixture
def make_store(tmp_path):
    """Makes a project's store; with `gold`, its first image is for practice."""

    def make(gold: bool = False, **settings) -> store.Store:
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
            items.append(store.Item(f"train/{i}.png", prompt, f"{i}.png", WIDTH, HEIGHT, right, -i))
        config = project.Config(**settings)
        return store.Store.create(folder, config, items)

    return make
