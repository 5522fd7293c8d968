"""The bootstrap: its metrics are those of `metrics.aggregate`; its intervals hold the truth."""

import numpy as np
import pytest

from richhf_jax import bootstrap, feedback, metrics

KINDS = feedback.PLAUSIBILITY, feedback.OVERALL


def values(images: int = 12, seed: int = 0) -> tuple[dict, dict]:
    """Makes the values of few images, so that resamples have ties, absent values and constant lists."""
    rng = np.random.default_rng(seed)
    columns = {f"score/{kind}": np.round(rng.uniform(size=images), 1) for kind in KINDS}
    answers = {name: np.round(column + rng.normal(0, 0.2, images), 1) for name, column in columns.items()}
    absent = rng.uniform(size=images) < 0.3
    for one in (columns, answers):
        one[f"score/{KINDS[0]}"][absent] = np.nan
    answers["heatmap/cc/x"] = np.where(absent, np.nan, rng.uniform(size=images))
    answers["heatmap/mse_empty/x"] = np.where(absent, rng.uniform(size=images), np.nan)
    answers |= {
        f"keywords/{name}": np.where(absent, np.nan, rng.integers(0, 4, images))
        for name in ("tp", "fp", "fn")
    }
    return columns, answers


def taken(columns: dict, indices: np.ndarray) -> dict:
    """Returns the images of a resample; without the names that have no value there, as in a split."""
    found = {name: column[indices] for name, column in columns.items()}
    return {name: column for name, column in found.items() if not np.isnan(column).all()}


def test_a_resample_has_the_metrics_of_its_images():
    targets, answers = values()
    # Some hold so few different images that lists are constant, or that a kind has no value.
    rng = np.random.default_rng(1)
    few = rng.integers(0, 3, (20, 12))
    one = np.repeat(np.arange(12)[:, None], 12, axis=1)
    indices = np.concatenate([rng.integers(0, 12, (40, 12)), few, one])
    weights = np.stack([np.bincount(row, minlength=12) for row in indices]).astype(float)
    found = bootstrap.resampled(targets, answers, weights)
    constant = missing = 0
    for i, row in enumerate(indices):
        expected = metrics.aggregate(taken(targets, row), taken(answers, row))
        for name, column in found.items():
            if name in expected:
                assert column[i] == pytest.approx(expected[name], abs=1e-12), name
                constant += name.startswith("score/plcc") and expected[name] == 0
            else:
                missing += 1
                assert np.isnan(column[i]) or (name.startswith("keywords/") and column[i] == 0)
    assert found.keys() >= {f"score/srcc/{KINDS[0]}", "heatmap/mse_empty/x", "keywords/f1"}
    assert constant
    assert missing


def test_systems_share_the_resamples_whatever_their_number_and_the_memory(monkeypatch):
    targets, answers = values()
    one, same = bootstrap.samples(targets, [answers, answers], 12, 50, seed=3)
    for name in one:
        np.testing.assert_array_equal(one[name], same[name])
    monkeypatch.setattr(bootstrap, "_BLOCK", 100)
    [in_blocks] = bootstrap.samples(targets, [answers], 12, 50, seed=3)
    [other] = bootstrap.samples(targets, [answers], 12, 50, seed=4)
    name = f"score/plcc/{KINDS[1]}"
    assert len(in_blocks[name]) == 50
    np.testing.assert_array_equal(in_blocks[name], one[name])
    assert not np.array_equal(other[name], one[name])


def test_interval_is_of_the_resamples_that_have_a_value():
    numbers = np.concatenate([np.arange(101), [np.nan] * 50])
    assert bootstrap.interval(numbers) == (2.5, 97.5)
    assert np.isnan(bootstrap.interval(np.full(3, np.nan))).all()


def test_intervals_hold_the_truth_in_95_of_100_samples():
    """Two systems of correlation 0.6 with the target: the truth and the difference 0 are in the intervals."""
    samples, images, correlation, name = 300, 100, 0.6, f"score/plcc/{KINDS[0]}"
    rng = np.random.default_rng(0)
    holds = np.zeros(2)
    for seed in range(samples):
        target, *noise = rng.standard_normal((3, images))
        answers = [correlation * target + np.sqrt(1 - correlation**2) * one for one in noise]
        key = f"score/{KINDS[0]}"
        first, second = bootstrap.samples({key: target}, [{key: one} for one in answers], images, 200, seed)
        for i, (low, high, truth) in enumerate(
            [
                (*bootstrap.interval(first[name]), correlation),
                (*bootstrap.interval(second[name] - first[name]), 0),
            ]
        ):
            holds[i] += low <= truth <= high
    # Four standard deviations of a binomial share. With 100 images and 200 resamples, percentile intervals
    # are a little short: about 0.94.
    deviation = np.sqrt(0.95 * 0.05 / samples)
    assert np.all(np.abs(holds / samples - 0.95) < 4 * deviation), holds / samples
