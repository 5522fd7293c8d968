"""The oracle of the synthetic world against the truth that `scenes` knows."""

import numpy as np
import pytest

from richhf_jax import feedback
from richhf_jax.datasets import oracle, prompts, raters, scenes

CLEAN, FLAWED = scenes.CAPTIONS_CONFIGS["default"], scenes.CONFIGS["default"]


def judged(config: scenes.SceneConfig, count: int):
    """Returns the truth and the judgement of pictures of the test split."""
    found = []
    for index in range(count):
        image, truth = scenes.render(config, scenes.filename("test", index))
        found.append((truth, oracle.judge(image, truth.scene.description.prompt)))
    return found


@pytest.fixture(scope="module")
def flawed():
    return judged(FLAWED, 50)


@pytest.mark.parametrize("split", ["train", "test"])
def test_prompts_are_parsed(split):
    rng = np.random.default_rng(0)
    for _ in range(500):
        description = prompts.sample_description(rng, split)
        parsed = prompts.parse(description.prompt)
        assert parsed.phrases == description.phrases
        assert parsed.prompt == description.prompt
        assert parsed.labels(()) == description.labels(())


@pytest.mark.parametrize(
    "prompt", ["", "a cat", "a red", "a red circle and", "red circle", "a huge red circle", "two red circle"]
)
def test_other_prompts_are_refused(prompt):
    with pytest.raises(ValueError, match="no prompt of the synthetic world"):
        prompts.parse(prompt)


def test_clean_pictures_show_what_is_said():
    for truth, found in judged(CLEAN, 25):
        assert found.strict
        assert found.soft == 1
        assert not found.reading.regions
        assert found.reading.background.kind == truth.scene.background.kind
        # Of eight bits a colour, the saturation of a dark grey is known to a hundredth.
        saturation = truth.scene.background.saturation
        assert found.reading.background.saturation == pytest.approx(saturation, abs=0.01)
        assert len(found.reading.things) == len(truth.scene.things)
        for thing in truth.scene.things:
            near = min(found.reading.things, key=lambda t: np.hypot(t.x - thing.x, t.y - thing.y))
            assert (near.colour, near.shape) == (thing.colour, thing.shape)
            # Within half a pixel of 64.
            assert np.hypot(near.x - thing.x, near.y - thing.y) < 0.5 / 64
            assert abs(near.radius - thing.radius) < 0.5 / 64


def test_whole_pictures_are_labelled_as_they_are(flawed):
    whole = [(truth, found) for truth, found in flawed if not truth.scene.artifacts]
    assert len(whole) > 15
    for truth, found in whole:
        assert set(found.misalignments) == set(truth.scene.misalignments)
        assert list(found.labels) == truth.scene.description.labels(truth.scene.misalignments)
        assert not found.reading.regions


def test_damage_is_found_where_it_is(flawed):
    damaged = [(truth, found) for truth, found in flawed if truth.scene.artifacts]
    assert len(damaged) > 15
    assert all(found.reading.regions for _, found in damaged)
    inside = [found.reading.damage[truth.artifact_region].mean() for truth, found in damaged]
    outside = [found.reading.damage[~truth.artifact_region].mean() for truth, found in damaged]
    # Torn objects' halves are partly as they should be, so not all of a region is seen as damage.
    assert np.mean(inside) > 0.6
    assert np.mean(outside) < 0.05


def test_scores_follow_the_noise_free_ones(flawed):
    for kind in feedback.SCORES:
        pairs = [(opinion(truth)[kind], found.scores[kind]) for truth, found in flawed]
        assert np.corrcoef(np.transpose(pairs))[0, 1] > (0.8 if kind == feedback.ALIGNMENT else 0.9)
    # A damaged object may have been meant to be another one; where nothing is damaged there is no doubt.
    for truth, found in flawed:
        if not truth.scene.artifacts:
            wanted = opinion(truth)
            assert found.scores[feedback.ALIGNMENT] == pytest.approx(wanted[feedback.ALIGNMENT])
            assert found.scores[feedback.AESTHETICS] == pytest.approx(wanted[feedback.AESTHETICS], abs=0.1)


def opinion(truth: scenes.SceneTruth) -> dict[str, float]:
    areas = [float(region.mean()) for region in truth.artifact_regions]
    return raters.opinions(truth, areas, list(truth.scene.misalignments))


def test_an_empty_picture_and_finer_ones():
    grey = np.full((64, 64, 3), (150, 140, 160), np.uint8)
    found = oracle.judge(grey, "a red circle and two small blue stars")
    assert [m.kind for m in found.misalignments] == ["missing", "missing"]
    assert (found.strict, found.soft, found.reading.things) == (False, 0, ())
    config = scenes.CAPTIONS_CONFIGS["default_128"]
    image, truth = scenes.render(config, scenes.filename("test", 1))
    assert oracle.judge(image, truth.scene.description.prompt).strict
    with pytest.raises(ValueError, match=r"an image must be \[side, side, 3\]"):
        oracle.judge(grey[:32], "a red circle")


def test_noise_is_damage():
    rng = np.random.default_rng(0)
    found = oracle.judge(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8), "a red circle")
    assert not found.strict
    assert found.reading.damage.mean() > 0.5
