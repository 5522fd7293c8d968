"""A survey's statistics: by hand, by other means, and intervals that hold the truth of simulated raters."""

import itertools

import krippendorff
import numpy as np
import pytest
from scipy import special, stats

from richhf_jax.survey import statistics
from richhf_jax.survey.answers import Answer

SIMULATIONS = 2000
# Between the five answers, on the latent scale of a rater in the middle.
CUTS = np.array([-1.2, -0.3, 0.5, 1.4])
# Standard deviations: of prompts, raters' leanings, and the logarithm of how far apart a rater's cuts are.
BY_PROMPT, BY_RATER, BY_SCALE = 0.5, 0.3, 0.3
# Four generators' strengths, and the half-width of a tie.
STRENGTHS, TIE = np.array([0.6, 0.1, -0.2, -0.5]), 0.4


def design(
    rng: np.random.Generator, prompts: int, raters: int, per_prompt: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draws so many raters for each prompt; returns the prompt and the rater of each answer."""
    drawn = np.argsort(rng.random((prompts, raters)), axis=1)[:, :per_prompt]
    return np.repeat(np.arange(prompts), per_prompt), drawn.ravel()


def preferences(rng: np.random.Generator, prompts: np.ndarray, raters: np.ndarray) -> np.ndarray:
    """Simulates answers 1 to 5: prompts differ, raters lean and use the scale in their own way."""
    opinion = rng.normal(0, BY_PROMPT, prompts.max() + 1)[prompts] + rng.normal(0, 1, len(prompts))
    leaning, scale = rng.normal(0, [[BY_RATER], [BY_SCALE]], (2, raters.max() + 1))
    return np.searchsorted(CUTS, (opinion + leaning[raters]) * np.exp(scale[raters])) + 1


def true_shares() -> np.ndarray:
    """Returns the shares of the five answers and the win rate over all prompts and raters."""
    points, weights = np.polynomial.hermite_e.hermegauss(40)
    cuts = CUTS * np.exp(BY_SCALE * points)[:, None] / np.sqrt(BY_PROMPT**2 + BY_RATER**2 + 1)
    shares = np.diff(weights @ stats.norm.cdf(cuts) / weights.sum(), prepend=0, append=1)
    return np.append(shares, shares[:2].sum() + shares[2] / 2)


# 27 raters, three of them a pair, and the paper's six raters on all pairs.
@pytest.mark.parametrize(("prompts", "raters", "per_prompt"), [(100, 27, 3), (300, 27, 3), (100, 6, 6)])
def test_intervals_hold_the_truth_in_93_to_97_of_100_surveys(prompts, raters, per_prompt):
    rng, truth, held = np.random.default_rng(0), true_shares(), np.zeros(6)
    for _ in range(SIMULATIONS):
        which, who = design(rng, prompts, raters, per_prompt)
        values = statistics.indicators(preferences(rng, which, who))
        low, high = statistics.share_intervals(which, who, values).T
        held += (low <= truth) & (truth <= high)
    assert np.all(np.abs(held / SIMULATIONS - 0.95) <= 0.02), held


def tournament(rng: np.random.Generator, prompts: int, raters: int) -> tuple[np.ndarray, ...]:
    """Simulates all six pairs of four generators on each prompt, each judged by one rater.

    Prompts suit one generator more than another, and raters like one more than another.
    """
    pairs = np.array(list(itertools.combinations(range(4), 2)))
    which = np.repeat(np.arange(prompts), len(pairs))
    first, second = np.tile(pairs.T, prompts)
    who = rng.integers(0, raters, len(which))
    suits, likes = rng.normal(0, 0.5, (prompts, 4)), rng.normal(0, 0.3, (raters, 4))
    worth = [STRENGTHS[one] + suits[which, one] + likes[who, one] for one in (first, second)]
    difference = worth[0] - worth[1] + rng.logistic(0, 1, len(which))
    return which, who, first, second, (np.sign(np.trunc(difference / TIE)) + 1) / 2


def fitted(first: np.ndarray, second: np.ndarray, score: np.ndarray) -> np.ndarray:
    strengths = statistics.bradley_terry(statistics.wins(4, first, second, score))
    assert strengths is not None
    return strengths


def test_intervals_of_ratings_hold_the_truth_in_93_to_97_of_100_surveys():
    rng = np.random.default_rng(0)
    # What infinitely many prompts and raters would give. Its error is 1 % of an interval.
    truth = np.mean([fitted(*tournament(rng, 3000, 3000)[2:]) for _ in range(40)], axis=0)
    held = np.zeros(4)
    for _ in range(SIMULATIONS // 2):
        which, who, *comparisons = tournament(rng, 100, 27)
        strengths = fitted(*comparisons)
        added = statistics.influences(strengths, *comparisons)
        low, high = statistics.rating_intervals(which, who, strengths, added).T
        held += (low <= truth) & (truth <= high)
    assert np.all(np.abs(2 * held / SIMULATIONS - 0.95) <= 0.02), held


def test_the_variance_is_that_of_the_crossed_bootstrap_without_its_excess():
    """Resampling prompts alone, or raters alone, counts an answer's own noise once; both together, thrice.

    With prompts P, raters R and noise N, the variances are P + N, R + N and P + R + 3 N. So 2 (P + N + R + N)
    - (P + R + 3 N) = P + R + N, which is right. Exact for many prompts, raters and resamples.
    """
    rng = np.random.default_rng(0)
    prompts, raters, resamples = 200, 60, 8000
    which, who = design(rng, prompts, raters, raters)
    values = statistics.indicators(preferences(rng, which, who))
    table = np.zeros((prompts, raters, values.shape[1]))
    table[which, who] = values
    over_prompts, over_raters = (
        rng.multinomial(n, np.full(n, 1 / n), resamples) / n for n in (prompts, raters)
    )
    by_rater = np.tensordot(over_prompts, table, 1)
    both = np.einsum("sr,src->sc", over_raters, by_rater).var(0)
    alone = by_rater.mean(1).var(0) + np.tensordot(over_raters, table.mean(0), 1).var(0)
    found, _ = statistics.variance_of_mean(which, who, values)
    np.testing.assert_allclose(2 * alone - both, found, rtol=0.15)


def test_a_share_that_nobody_gave_has_an_interval():
    prompts, raters = np.repeat(np.arange(50), 6), np.tile(np.arange(6), 50)
    values = np.tile([[0.0, 1.0, 0.5]], (300, 1))
    (none, all_, ties) = statistics.share_intervals(prompts, raters, values)
    assert none[0] == pytest.approx(0, abs=1e-12)
    assert 0.01 < none[1] < 0.05
    assert all_.tolist() == pytest.approx([1 - none[1], 1])
    assert ties.mean() == pytest.approx(0.5)


@pytest.mark.parametrize(("prompts", "raters"), [([0, 1, 2, 3], [0, 0, 0, 0]), ([0, 1, 2, 3], [0, 1, 2, 3])])
def test_without_shared_prompts_there_is_no_interval(prompts, raters):
    values = np.array([[0.0], [1.0], [1.0], [0.0]])
    assert np.isnan(statistics.share_intervals(np.array(prompts), np.array(raters), values)).all()


def test_bradley_terry_of_two_and_of_a_known_tournament():
    strengths = statistics.bradley_terry(np.array([[0.0, 30], [10, 0]]))
    assert strengths == pytest.approx([np.log(3) / 2, -np.log(3) / 2], abs=1e-6)
    truth = np.array([0.7, 0.2, -0.9])
    expected = 50 * special.expit(np.subtract.outer(truth, truth)) * (1 - np.eye(3))
    assert statistics.bradley_terry(expected) == pytest.approx(truth, abs=1e-6)


def test_influences_are_the_effect_of_one_more_answer():
    rng = np.random.default_rng(0)
    _, _, first, second, score = tournament(rng, 2000, 50)
    strengths = fitted(first, second, score)
    added = statistics.influences(strengths, first, second, score)
    np.testing.assert_allclose(added.sum(0), 0, atol=1e-6)
    for i in range(3):
        twice = [np.append(column, column[i]) for column in (first, second, score)]
        np.testing.assert_allclose(fitted(*twice) - strengths, added[i], atol=2e-6)


@pytest.mark.parametrize(
    "wins", [[[0, 5, 5], [0, 0, 3], [0, 4, 0]], [[0, 5, 0], [5, 0, 0], [0, 0, 0]], [[0, 5], [0, 0]]]
)
def test_no_strengths_where_none_are_the_most_likely(wins):
    assert statistics.bradley_terry(np.array(wins, float)) is None


def answers(*rows: str) -> list[Answer]:
    """Makes answers of "prompt rater left right answer check"."""
    found = []
    for row in rows:
        prompt, rater, left, right, answer, *check = row.split()
        found.append(Answer(prompt, f"a {prompt}", rater, left, right, int(answer), *check))
    return found


BY_HAND = answers(
    *("cat anna B A 5", "cat bert A B 2", "cat cleo A B 3"),
    *("dog anna A B 1", "dog bert B A 3", "dog cleo B A 2"),
    *("fox anna A B 4", "fox bert A B 5", "fox cleo A B 2"),
    # Checks count for nothing else: two passed by anna, one of two by bert, none by cleo.
    *("cat anna A B 1 swapped", "dog anna A A 3 identical"),
    *("cat bert B A 2 swapped", "dog bert B B 3 identical", "owl bert A B 3 swapped"),
    "fox cleo A A 2 identical",
)


def test_a_result_by_hand():
    result = statistics.result(BY_HAND)
    [pair] = result["pairs"]
    assert (result["answers"], result["prompts"], result["raters"]) == (9, 3, 3)
    assert (pair["first"], pair["second"], pair["answers"]) == ("A", "B", 9)
    # About A: 1 2 3, 1 3 4, 4 5 2.
    assert pair["counts"] == [2, 2, 2, 2, 1]
    assert pair["shares"] == pytest.approx(np.array([2, 2, 2, 2, 1]) / 9)
    assert pair["win_rate"] == pytest.approx((4 + 2 / 2) / 9)
    low, high = pair["win_rate_interval"]
    assert 0 < low < pair["win_rate"] < high < 1
    # Cat: two for A, none for B. Dog: one each. Fox: one for A, two for B.
    assert pair["sign_test"] == {"better": 1, "worse": 1, "tied": 1, "p": 1.0}
    table = np.array([[1, 1, 4], [2, 3, 5], [3, 4, 2]])
    assert pair["krippendorff_alpha"] == pytest.approx(
        krippendorff.alpha(table, level_of_measurement="ordinal")
    )
    assert result["bradley_terry"] is None
    assert [(row["prompt"], row["counts"]) for row in result["by_prompt"]] == [
        ("a cat", [1, 1, 1, 0, 0]),
        ("a dog", [1, 0, 1, 1, 0]),
        ("a fox", [0, 1, 0, 1, 1]),
    ]
    assert [row["win_rate"] for row in result["by_prompt"]] == pytest.approx([2.5 / 3, 0.5, 1 / 3])


def test_checks_by_hand():
    checks = statistics.result(BY_HAND)["checks"]
    assert checks["anna"] == {
        "answers": 3,
        "left_share": pytest.approx(1 / 3),
        "identical": {"passed": 1, "asked": 1},
        "swapped": {"passed": 1, "asked": 1},
    }
    # Bert preferred A to B, then B to A. The check without a first answer isn't counted.
    assert checks["bert"]["swapped"] == {"passed": 0, "asked": 1}
    assert checks["bert"]["identical"] == {"passed": 1, "asked": 1}
    assert checks["cleo"]["left_share"] == pytest.approx(2.5 / 3)
    assert checks["cleo"]["identical"] == {"passed": 0, "asked": 1}


def test_the_order_of_generators_turns_the_figures_round():
    [pair] = statistics.result(BY_HAND)["pairs"]
    [turned] = statistics.result(BY_HAND, ["B", "A"])["pairs"]
    assert turned["first"] == "B"
    assert turned["counts"] == pair["counts"][::-1]
    assert turned["win_rate"] == pytest.approx(1 - pair["win_rate"])
    assert turned["win_rate_interval"] == pytest.approx([1 - end for end in pair["win_rate_interval"][::-1]])
    assert turned["krippendorff_alpha"] == pytest.approx(pair["krippendorff_alpha"])


def test_sign_test_of_a_clear_preference():
    rows = [f"p{i} {rater} A B {2 if i < 9 else 4}" for i in range(10) for rater in ("anna", "bert")]
    [pair] = statistics.result(answers(*rows))["pairs"]
    # Two-sided: 2 (1 + 10) / 2**10.
    assert pair["sign_test"] == {"better": 9, "worse": 1, "tied": 0, "p": pytest.approx(22 / 1024)}


def test_more_generators_have_ratings_about_their_pairs():
    rng = np.random.default_rng(0)
    which, who, first, second, score = tournament(rng, 60, 5)
    names = np.array(["D", "C", "B", "A"])
    rows = [
        f"p{p} r{r} {names[i]} {names[j]} {int(4 - 2 * s)}"
        for p, r, i, j, s in zip(which, who, first, second, score, strict=True)
    ]
    result = statistics.result(answers(*rows), list("DCBA"))
    pairs = [pair["first"] + pair["second"] for pair in result["pairs"]]
    assert pairs == ["DC", "DB", "DA", "CB", "CA", "BA"]
    ratings = result["bradley_terry"]
    expected = 400 / np.log(10) * fitted(first, second, score)
    assert [ratings[name]["rating"] for name in names] == pytest.approx(expected.tolist(), abs=1e-3)
    for rating in ratings.values():
        low, high = rating["interval"]
        assert low < rating["rating"] < high
