"""Agreement against the packages krippendorff and pingouin, and examples of the literature."""

import itertools

import krippendorff
import numpy as np
import pandas as pd
import pingouin
import pytest

from richhf_jax import agreement

N = np.nan
# Krippendorff, "Computing Krippendorff's Alpha-Reliability", 2011, part C: four observers, twelve units.
KRIPPENDORFF = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, N, N, N],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, N, 3],
        [N, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, N],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, N],
    ]
).T
# Shrout and Fleiss, "Intraclass Correlations: Uses in Assessing Rater Reliability", 1979, table 2.
SHROUT_FLEISS = np.array(
    [[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]], float
)
# 25 subjects of Fleiss, Levin and Paik, "Statistical Methods for Rates and Proportions", 2003; Stata's manual
# ([R] kappa) has them as rvary2.
RATERS = np.array([2, 2, 3, 4, 3, 4, 3, 5, 2, 4, 5, 3, 4, 4, 2, 2, 3, 2, 4, 5, 3, 4, 3, 3, 2])
POSITIVE = np.array([2, 0, 2, 3, 3, 1, 0, 0, 0, 4, 5, 3, 4, 3, 0, 2, 1, 1, 1, 4, 2, 0, 0, 3, 2])


def long(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns items, raters and values of a matrix [items, raters]; NaN = missing."""
    items, raters = np.nonzero(~np.isnan(matrix))
    return items, raters, matrix[items, raters]


def answers(seed: int, items: int = 40, raters: int = 5, missing: float = 0.0) -> np.ndarray:
    """Simulates answers 1 to 5 of raters with leanings [items, raters]."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(3, 1, (items, 1)) + rng.normal(0, 0.4, raters) + rng.normal(0, 0.7, (items, raters))
    matrix = np.clip(np.round(truth), 1, 5)
    matrix[rng.random(matrix.shape) < missing] = np.nan
    return matrix


def test_spread_histogram_by_hand():
    matrix = np.array([[1, 1, 1], [2, 3, N], [1, 5, 3], [4, N, N], [5, 4, 5], [3, 3, N]])
    items, _, values = long(matrix)
    assert agreement.spread_histogram(items, values.astype(int), 4).tolist() == [2, 2, 0, 0, 1]
    assert agreement.spread_histogram(items[:0], values[:0].astype(int), 4).tolist() == [0] * 5


def test_alpha_of_krippendorffs_example():
    items, _, values = long(KRIPPENDORFF)
    # 0.815 for ordinal data, by the article.
    assert agreement.krippendorff_alpha(items, values) == pytest.approx(0.815, abs=5e-4)


@pytest.mark.parametrize("missing", [0.0, 0.3, 0.7])
def test_alpha_is_that_of_the_package(missing):
    for seed in range(5):
        matrix = answers(seed, missing=missing)
        expected = krippendorff.alpha(matrix.T, level_of_measurement="ordinal")
        items, _, values = long(matrix)
        assert agreement.krippendorff_alpha(items, values) == pytest.approx(expected, abs=1e-12)
        # The order alone matters.
        assert agreement.krippendorff_alpha(items, values**3) == pytest.approx(expected, abs=1e-12)


def test_what_is_not_defined_is_nan():
    one_item = long(np.array([[1.0, 2, 3]]))
    one_rater = long(np.array([[1.0], [2], [3]]))
    equal = long(np.full((4, 3), 2.0))
    nothing = long(np.full((2, 2), N))
    for items, raters, values in (one_rater, nothing):
        assert np.isnan(agreement.krippendorff_alpha(items, values))
        assert np.isnan(agreement.icc2k(items, raters, values)[0])
        assert agreement.rater_scores(items, raters, values) == {}
    assert np.isnan(agreement.krippendorff_alpha(equal[0], equal[2]))
    for items, raters, values in (one_item, equal):
        assert np.isnan(agreement.icc2k(items, raters, values)[0])
    for positive, raters in (([], []), ([0, 0], [3, 3]), ([1, 0], [1, 1])):
        assert np.isnan(agreement.fleiss_kappa(np.array(positive, int), np.array(raters, int)))


def test_icc_of_shrout_and_fleiss():
    icc, k = agreement.icc2k(*long(SHROUT_FLEISS))
    assert k == 4
    assert icc == pytest.approx(0.62, abs=5e-3)


@pytest.mark.filterwarnings("ignore:The inplace keyword")  # pingouin 0.7 with pandas 3.1
def test_icc_is_that_of_pingouin():
    for seed in range(5):
        matrix = answers(seed, items=12)
        items, raters, values = long(matrix)
        table = pd.DataFrame({"item": items, "rater": raters, "value": values})
        rows = pingouin.intraclass_corr(table, "item", "rater", "value").set_index("Type")
        name = next(name for name in rows.index if name in ("ICC2k", "ICC(A,k)"))
        assert agreement.icc2k(items, raters, values)[0] == pytest.approx(rows.loc[name, "ICC"], abs=1e-10)


def test_variance_components_are_unbiased_with_missing_answers():
    """Each item has three of nine raters; means over simulations are within 4 standard errors."""
    truth, found = np.array([1.0, 0.3, 0.5]), []
    rng = np.random.default_rng(0)
    for _ in range(400):
        raters = np.argsort(rng.random((30, 9)), axis=1)[:, :3]
        raters[:5] = [0, 1, 2]
        items = np.repeat(np.arange(30), 3)
        parts = [rng.normal(0, np.sqrt(v), size) for v, size in zip(truth, (30, 9, 90), strict=True)]
        values = 5 + parts[0][items] + parts[1][raters.ravel()] + parts[2]
        found.append(agreement.variance_components(items, raters.ravel(), values))
    error = np.std(found, axis=0) / np.sqrt(len(found))
    assert np.all(np.abs(np.mean(found, axis=0) - truth) < 4 * error)


def test_components_of_columns_are_those_of_each_and_numbers_of_raters_may_have_gaps():
    items, raters, values = long(answers(1, missing=0.4))
    both = agreement.variance_components(items, raters, np.stack([values, values**2], 1))
    np.testing.assert_allclose(both[:, 0], agreement.variance_components(items, raters, values))
    np.testing.assert_allclose(both[:, 1], agreement.variance_components(7 * items + 2, raters, values**2))


def test_kappa_with_unequal_raters_by_fleiss_levin_and_paik():
    assert (RATERS.sum(), POSITIVE.sum()) == (81, 46)
    # Stata's manual gives 0.5415 for the same table ([R] kappa).
    assert agreement.fleiss_kappa(POSITIVE, RATERS) == pytest.approx(0.5415, abs=5e-5)


def test_kappa_of_equal_raters_is_fleiss():
    """Fleiss' own formula of 1971: mean agreement of an item's pairs, corrected by the classes' shares."""
    positive = np.random.default_rng(0).integers(0, 5, 60)
    counts = np.stack([positive, 4 - positive], 1)
    observed = np.mean(np.sum(counts * (counts - 1), axis=1) / (4 * 3))
    chance = np.sum((counts.sum(0) / counts.sum()) ** 2)
    expected = (observed - chance) / (1 - chance)
    found = agreement.fleiss_kappa(np.append(positive, 1), np.append(np.full(60, 4), 1))
    assert found == pytest.approx(expected, abs=1e-12)


def test_rater_scores_by_hand():
    # The second rater is one point above both others; the last item has no second answer.
    matrix = np.array([[1, 2, 1], [3, 4, 3], [2, 4, N], [5, N, N]])
    found = agreement.rater_scores(*long(matrix))
    assert found[0] == {
        "count": 3,
        "bias": pytest.approx((-0.5 - 0.5 - 2) / 3),
        "spread": pytest.approx(0.5**0.5),
    }
    assert found[1] == {"count": 3, "bias": pytest.approx(4 / 3), "spread": pytest.approx(np.std([1, 1, 2]))}
    assert found[2] == {"count": 2, "bias": -0.5, "spread": 0}


def test_map_distances_are_those_of_all_pairs():
    rng = np.random.default_rng(0)
    items = [rng.random((raters, 4, 6)) < 0.3 for raters in (3, 2, 1, 4)]
    distances = agreement.MapDistances()
    for maps in items:
        distances.add(maps)
    labelled = [(i, one) for i, maps in enumerate(items) if len(maps) > 1 for one in maps]
    within, between = [], []
    for (i, a), (j, b) in itertools.combinations(labelled, 2):
        (within if i == j else between).append(np.mean(a != b))
    assert distances.summary() == {
        "items": 3,
        "within": pytest.approx(np.mean(within)),
        "between": pytest.approx(np.mean(between)),
        "sigma": pytest.approx(1 - np.mean(within) / np.mean(between)),
    }


def test_sigma_of_equal_and_of_unrelated_maps():
    rng = np.random.default_rng(0)
    same, unrelated, empty = (agreement.MapDistances() for _ in range(3))
    for _ in range(200):
        same.add(np.repeat(rng.random((1, 8, 8)), 3, axis=0))
        unrelated.add(rng.random((3, 8, 8)))
        empty.add(np.zeros((3, 8, 8)))
    assert same.summary()["sigma"] == pytest.approx(1)
    assert abs(unrelated.summary()["sigma"]) < 0.01
    assert np.isnan(empty.summary()["sigma"])
