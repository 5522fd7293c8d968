"""Tests scenes: the truth is true, and only picture and prompt together give an answer away."""

import collections
import dataclasses

import numpy as np
import pytest

from richhf_jax import feedback
from richhf_jax.datasets import artifacts, consolidate, prompts, scenes

CONFIG = scenes.CONFIGS["default"]
CLEAN = scenes.CAPTIONS_CONFIGS["default"]


@pytest.fixture(scope="module")
def many() -> list[scenes.Scene]:
    return [scenes.sample_scene(CONFIG, scenes.filename("train", i)) for i in range(4000)]


def test_a_picture_follows_from_configuration_and_name():
    name = scenes.filename("train", 5)
    image, truth = scenes.render(CONFIG, name)
    again, _ = scenes.render(scenes.SceneConfig(), name)
    np.testing.assert_array_equal(image, again)
    assert truth.scene == scenes.truth(name, CONFIG).scene
    others = [
        scenes.render(CONFIG, scenes.filename("train", 6))[0],
        scenes.render(dataclasses.replace(CONFIG, seed=1), name)[0],
        scenes.render(CLEAN, name)[0],
    ]
    assert all((other != image).any() for other in others)


def test_the_same_scene_at_every_resolution():
    name = scenes.filename("test", 3)
    small, small_truth = scenes.render(CONFIG, name)
    large, large_truth = scenes.render(scenes.CONFIGS["default_256"], name)
    assert large.shape == (256, 256, 3)
    assert small_truth.scene == large_truth.scene
    reduced = large.reshape(64, 4, 64, 4, 3).mean((1, 3))
    assert np.abs(reduced - small).mean() < 6


@pytest.mark.parametrize("size", [63, 513])
def test_resolutions_out_of_bounds_are_refused(size):
    with pytest.raises(ValueError, match=f"64 to 512, got {size}"):
        scenes.SceneConfig(image_size=size)


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="no split 'dev': known are train, validation, test"):
        scenes.sample_scene(CONFIG, "dev/00000000.png")


def test_file_names_are_unique_and_tell_no_order():
    names = [scenes.filename("train", index) for index in range(8000)]
    assert len(set(names)) == 8000
    uids = [int(name[len("train/") : -len(".png")], 16) for name in names]
    assert abs(np.corrcoef(uids, np.arange(8000))[0, 1]) < 0.05


def test_clean_scenes_show_what_their_prompts_say():
    for index in range(300):
        scene = scenes.sample_scene(CLEAN, scenes.filename("train", index))
        assert not scene.misalignments
        assert not scene.artifacts
        shown = collections.Counter((t.phrase_index, t.shape, t.colour) for t in scene.things)
        described = {(i, p.shape, p.colour): p.count for i, p in enumerate(scene.description.phrases)}
        assert shown == described


def test_misaligned_phrases_are_wrong_in_their_way_and_the_others_right(many):
    for scene in many[:1000]:
        kinds = {m.phrase_index: m.kind for m in scene.misalignments}
        for index, phrase in enumerate(scene.description.phrases):
            group = [t for t in scene.things if t.phrase_index == index]
            wrong = [
                attribute
                for attribute, is_wrong in {
                    "missing": not group,
                    "count": len(group) not in (0, phrase.count),
                    "colour": any(t.colour != phrase.colour for t in group),
                    "shape": any(t.shape != phrase.shape for t in group),
                    "size": bool(group and phrase.size)
                    and not scenes.RADII[phrase.size][0] <= group[0].radius <= scenes.RADII[phrase.size][1],
                }.items()
                if is_wrong
            ]
            assert wrong == ([kinds[index]] if index in kinds else [])
            assert all(t.misaligned == (index in kinds) for t in group)


@pytest.mark.parametrize(
    ("kind", "misaligned_words"),
    [
        ("colour", ["red"]),
        ("shape", ["circles"]),
        ("size", ["large"]),
        ("count", ["two"]),
        ("missing", ["two", "large", "red", "circles"]),
    ],
)
def test_labels_mark_the_words_that_are_wrong(kind, misaligned_words):
    description = prompts.Description(
        opening="a drawing of ",
        phrases=(
            prompts.Phrase("a", None, "orange", "star"),
            prompts.Phrase("two", "large", "red", "circle"),
        ),
        last_joint=" and ",
    )
    assert description.prompt == "a drawing of an orange star and two large red circles"
    labels = description.labels((prompts.Misalignment(1, kind),))
    tokens = feedback.tokenize_prompt(description.prompt)
    marked = [token for token, label in zip(tokens, labels, strict=True) if label == feedback.MISALIGNED]
    assert marked == misaligned_words


def test_an_article_is_never_misaligned():
    description = prompts.Description("", (prompts.Phrase("a", None, "red", "star"),), " and ")
    assert description.labels((prompts.Misalignment(0, "missing"),)) == [1, 0, 0]


def test_no_prompt_is_in_two_splits_in_any_wording():
    contents = {
        split: {
            frozenset(map(str, scenes.sample_scene(c, scenes.filename(split, i)).description.phrases))
            for c in (CONFIG, CLEAN)
            for i in range(400)
        }
        for split in prompts.SPLIT_BUCKETS
    }
    assert not contents["train"] & contents["test"]
    assert not contents["train"] & contents["validation"]
    assert not contents["validation"] & contents["test"]


def test_truth_of_pictures():
    missing = 0
    for index in range(150):
        name = scenes.filename("validation", index)
        image, truth = scenes.render(CONFIG, name)
        assert image.shape == (64, 64, 3)
        assert image.dtype == np.uint8
        assert len(truth.objects) == len(truth.scene.things)
        assert len(truth.artifact_regions) == len(truth.scene.artifacts)
        assert all(region.sum() >= 20 for region in truth.artifact_regions)
        for thing in truth.objects:
            assert thing.mask.sum() >= 20
            assert not thing.misaligned or (truth.misaligned_region & thing.mask).sum() == thing.mask.sum()
        assert np.sum([thing.mask for thing in truth.objects], axis=0).max() == 1  # visible pixels only
        kinds = {m.kind for m in truth.scene.misalignments}
        assert truth.missing_object == ("missing" in kinds)
        assert truth.misaligned_region.any() == bool(kinds - {"missing"})
        assert not (truth.misaligned_region & ~truth.object_mask).any()
        missing += truth.missing_object
    assert missing


@pytest.mark.parametrize("kind", artifacts.KINDS)
def test_artifacts_show_in_their_region_and_hardly_elsewhere(kind, monkeypatch):
    """Asserts that scenes differ in the artifacts' regions from the same scenes without artifacts."""
    for index in range(2000):
        name = scenes.filename("train", index)
        scene = scenes.sample_scene(CONFIG, name)
        if [a.kind for a in scene.artifacts] == [kind]:
            break
    flawed, truth = scenes.render(CONFIG, name)
    monkeypatch.setattr(scenes, "sample_scene", lambda *_: dataclasses.replace(scene, artifacts=()))
    perfect, _ = scenes.render(CONFIG, name)
    changed = np.abs(flawed.astype(int) - perfect).max(-1) > 40
    region = truth.artifact_region
    assert changed.sum() >= 15
    assert (changed & region).sum() >= 0.8 * changed.sum()


def correlation(xs, ys) -> float:
    return np.corrcoef(np.array(xs, float), np.array(ys, float))[0, 1]


def test_neither_prompt_nor_picture_alone_tells_whether_they_agree(many):
    misaligned = [bool(scene.misalignments) for scene in many]
    assert 0.4 < np.mean(misaligned) < 0.5
    of_prompt = {
        "tokens": [len(feedback.tokenize_prompt(s.description.prompt)) for s in many],
        "phrases": [len(s.description.phrases) for s in many],
        "described objects": [sum(p.count for p in s.description.phrases) for s in many],
        "sizes said": [sum(p.size is not None for p in s.description.phrases) for s in many],
        "red": ["red" in s.description.prompt for s in many],
        "star": ["star" in s.description.prompt for s in many],
    }
    of_picture = {
        "objects": [len(s.things) for s in many],
        "area": [sum(t.radius**2 for t in s.things) for s in many],
        "first x": [s.things[0].x for s in many],
        "red": [any(t.colour == "red" for t in s.things) for s in many],
        "star": [any(t.shape == "star" for t in s.things) for s in many],
        "largest": [max(t.radius for t in s.things) for s in many],
        "background": [s.background.kind == "plain" for s in many],
        "artifacts": [len(s.artifacts) for s in many],
        "order": range(len(many)),
    }
    for name, values in of_prompt.items():
        assert abs(correlation(values, misaligned)) < 0.05, name
    for name, values in of_picture.items():
        assert abs(correlation(values, misaligned)) < 0.1, name


def test_artifacts_are_as_likely_on_any_object_of_any_picture(many):
    flawed = [bool(scene.artifacts) for scene in many]
    assert 0.5 < np.mean(flawed) < 0.6
    assert abs(correlation([len(s.things) for s in many], flawed)) < 0.05
    assert abs(correlation(range(len(many)), flawed)) < 0.05
    on_misaligned, pairs = [], []
    for scene in many:
        targets = {a.thing_index for a in scene.artifacts}
        for index, thing in enumerate(scene.things):
            on_misaligned.append(index in targets)
            pairs.append(thing.misaligned)
    assert abs(correlation(on_misaligned, pairs)) < 0.05


def test_draw_order_does_not_follow_the_prompt(many):
    first = [s.things[0].phrase_index for s in many if len(s.description.phrases) == 2 and len(s.things) == 2]
    assert 0.45 < np.mean(first) < 0.55


def test_file_size_tells_nothing_of_alignment():
    pictures = [scenes.render(CONFIG, scenes.filename("train", i)) for i in range(600)]
    sizes = [len(consolidate.encode_png(image)) for image, _ in pictures]
    assert abs(correlation(sizes, [bool(truth.scene.misalignments) for _, truth in pictures])) < 0.1
