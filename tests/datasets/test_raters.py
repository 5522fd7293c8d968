"""Tests that the simulated raters do what their constants say."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from richhf_jax import feedback
from richhf_jax.datasets import consolidate, raters, ratings, rendering_pool, scenes

CONFIG = scenes.CONFIGS["default"]


@pytest.fixture(scope="module")
def rated() -> list[tuple[scenes.SceneTruth, list[dict], dict]]:
    """Makes truth, raw lines and record of each picture."""
    result = []
    for index in range(300):
        name = scenes.filename("train", index)
        truth = scenes.truth(name, CONFIG)
        lines = raters.raw_lines(CONFIG, name, truth)
        (record,) = consolidate.consolidate_lines(lines)
        result.append((truth, [json.loads(line) for line in lines], record))
    return result


def heatmap(record: dict, kind: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(record[feedback.HEATMAP_FIELDS[kind]])))


def test_clicks_cover_the_region_and_little_else(rng):
    region = np.zeros((64, 64), bool)
    region[20:44, 10:40] = True
    covered = consolidate.point_heatmap(raters.clicks(region, rng), 64, 64, radius=3.2)
    assert (covered & region).sum() > 0.8 * region.sum()
    assert (covered & ~region).sum() < 0.5 * region.sum()


def test_a_region_of_one_pixel_gets_a_click_and_an_empty_one_none(rng):
    region = np.zeros((64, 64), bool)
    assert raters.clicks(region, rng) == []
    region[0, 63] = True
    ((x, y),) = raters.clicks(region, rng)
    assert 60 < x <= 63
    assert 0 <= y < 3


def test_three_raters_answer_alike_whenever_asked(rated):
    truth, lines, _ = rated[7]
    name = lines[0]["image_id"]
    assert [line["rater_id"] for line in lines] == ["rater-0", "rater-1", "rater-2"]
    assert [json.loads(line) for line in raters.raw_lines(CONFIG, name, truth)] == lines


def test_raters_miss_a_tenth_of_the_flaws(rated):
    noticed = [
        bool(line["implausibility_points"])
        for truth, lines, _ in rated
        if len(truth.scene.artifacts) == 1
        for line in lines
    ]
    assert 0.86 < np.mean(noticed) < 0.95


def test_raters_click_where_there_is_nothing_in_a_hundredth_of_the_pictures(rated):
    clicked = [
        bool(line["misalignment_points"])
        for truth, lines, _ in rated
        if not truth.scene.misalignments
        for line in lines
    ]
    assert 0 < np.mean(clicked) < 0.03


def test_consolidated_maps_mark_the_flaws(rated):
    for kind, region_of in (
        ("implausibility", lambda truth: truth.artifact_region),
        ("misalignment", lambda truth: truth.misaligned_region),
    ):
        flawed = [(region_of(t), heatmap(r, kind)) for t, _, r in rated if region_of(t).any()]
        agreement = [np.corrcoef(region.ravel(), marked.ravel())[0, 1] for region, marked in flawed]
        assert np.nanmean(agreement) > 0.75
        assert np.mean([marked.any() for _, marked in flawed]) > 0.98
        clean = [heatmap(r, kind).any() for t, _, r in rated if not region_of(t).any()]
        assert np.mean(clean) < 0.1


def test_consolidated_labels_mark_the_wrong_words(rated):
    right = [
        label == found
        for truth, _, record in rated
        for label, found in zip(
            truth.scene.description.labels(truth.scene.misalignments),
            feedback.parse_labels(record[feedback.KEYWORDS_FIELD]),
            strict=True,
        )
    ]
    assert np.mean(right) > 0.98


def test_scores_fall_with_the_flaws_that_they_are_about(rated):
    def mean(kind, condition):
        return np.mean([r[feedback.SCORE_FIELDS[kind]] for t, _, r in rated if condition(t.scene)])

    assert mean("plausibility", lambda s: not s.artifacts) > 0.9
    assert mean("plausibility", lambda s: len(s.artifacts) == 1) < 0.65
    assert mean("plausibility", lambda s: len(s.artifacts) == 2) < 0.35
    assert mean("alignment", lambda s: not s.misalignments) > 0.9
    assert mean("alignment", lambda s: len(s.misalignments) == 1) < 0.55
    gradient = mean("aesthetics", lambda s: s.background.kind == "gradient")
    assert gradient > mean("aesthetics", lambda s: s.background.kind == "checks") + 0.2


def test_examples_join_picture_and_record(rated):
    truth, lines, record = rated[3]
    name = lines[0]["image_id"]
    example = rendering_pool.rated_example(CONFIG, name)
    image = np.asarray(Image.open(io.BytesIO(example.pop(feedback.IMAGE_FIELD))))
    np.testing.assert_array_equal(image, scenes.render(CONFIG, name)[0])
    assert example.pop(feedback.PROMPT_FIELD) == truth.scene.description.prompt
    assert example == record


def test_command_writes_ratings_that_pass_the_check(tmp_path, monkeypatch):
    out = tmp_path / "raw.jsonl"
    monkeypatch.setattr("sys.argv", ["raters", f"--out={out}", "--num=4", "--config=subtle"])
    raters.main()
    with out.open() as lines:
        read = [rating for _, rating in ratings.read_ratings(lines)]
    assert len(read) == 12
    assert all(isinstance(rating, ratings.Rating) for rating in read)
