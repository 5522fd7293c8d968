"""Computes a survey's result: the paper's Table 5, win rates, sign tests, ratings, 95 % intervals, checks.

The intervals speak of other prompts and other raters, because both are samples. The variance of a mean is

    prompts * sum(n_p**2) / n**2 + raters * sum(n_r**2) / n**2 + rest / n

with the variances of `agreement.variance_components`, n answers, n_p of them on a prompt and n_r of a rater;
the sum is at least rest / n. This is what resampling prompts and raters, crossed, estimates (Owen, "The
Pigeonhole Bootstrap", 2007), but that bootstrap counts the rest thrice, so its intervals are too wide: see
docs/survey.md. Student's t replaces the normal quantile, because raters are few; its degrees of freedom are
Satterthwaite's ("An Approximate Distribution of Estimates of Variance Components", 1946).

An interval of a share is Wilson's, with the number of independent answers that has the same variance
("effective sample size"). So it stays within 0 and 1, and isn't empty where nobody gave an answer.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np
from scipy import optimize, sparse, special, stats

from richhf_jax import agreement
from richhf_jax.survey.answers import ANSWERS, IDENTICAL, MUCH_BETTER, SAME, SWAPPED, Answer

LEVEL = 0.95
# A rating of 400 more points means odds of 10 to 1.
ELO = 400 / math.log(10)


def variance_of_mean(
    prompts: np.ndarray, raters: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Estimates the variance of the means of answers over other prompts and raters; see the module.

    Args:
      prompts: int [answers], numbers from 0.
      raters: int [answers], numbers from 0; a rater has at most one row a prompt.
      values: [answers, columns].

    Returns:
      Variances [columns] and their degrees of freedom [columns]; NaN if raters or prompts aren't told apart.
    """
    n = len(values)
    by_prompt, by_rater = (counts[counts > 0] for counts in (np.bincount(prompts), np.bincount(raters)))
    weights = [np.sum(by_prompt**2) / n**2, np.sum(by_rater**2) / n**2, 1 / n]
    parts = agreement.variance_components(prompts, raters, values) * np.array(weights)[:, None]
    prompt, rater, rest = parts[0], parts[1], np.maximum(parts[2], 0)
    variance = np.maximum(prompt + rater + rest, rest)
    # The analysis of variance's mean squares, divided by n.
    squares = np.stack([np.maximum(prompt + rest, 0), np.maximum(rater + rest, 0), rest]) ** 2
    degrees = np.array([len(by_prompt), len(by_rater), max(n - len(by_prompt) - len(by_rater) + 2, 2)]) - 1
    with np.errstate(invalid="ignore", divide="ignore"):
        found = variance**2 / np.sum(squares / degrees[:, None], axis=0)
    return variance, np.where(variance == 0, degrees.min(), found)


def share_intervals(prompts: np.ndarray, raters: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Computes 95 % intervals of the means of values in [0, 1].

    Args:
      prompts, raters, values: as `variance_of_mean`.

    Returns:
      [columns, 2], lowest and highest value; NaN as `variance_of_mean`.
    """
    share = np.mean(values, axis=0)
    variance, degrees = variance_of_mean(prompts, raters, values)
    t = stats.t.ppf((1 + LEVEL) / 2, degrees)
    # If all answers are alike, they count as independent ones.
    varies = (variance > 0) | np.isnan(variance)
    effective = np.where(varies, share * (1 - share) / np.where(varies, variance, 1), len(values))
    middle = share + t**2 / (2 * effective)
    half = t * np.sqrt(share * (1 - share) / effective + (t / (2 * effective)) ** 2)
    ends = np.stack([middle - half, middle + half], axis=1) / (1 + t**2 / effective)[:, None]
    return np.clip(ends, 0, 1)


def wins(generators: int, first: np.ndarray, second: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Counts wins [generators, generators] of the row over the column; arguments as `influences`."""
    found = np.zeros((generators, generators))
    np.add.at(found, (first, second), score)
    np.add.at(found, (second, first), 1 - score)
    return found


def bradley_terry(won: np.ndarray) -> np.ndarray | None:
    """Fits strengths s by maximum likelihood: generator i beats j with odds exp(s_i - s_j).

    A tie is half a win for each, which makes it a quasi-likelihood. Sources: Bradley and Terry, "Rank
    Analysis of Incomplete Block Designs", 1952; Ford, "Solution of a Ranking Problem from Binary
    Comparisons", 1957.

    Args:
      won: see `wins`.

    Returns:
      Strengths [generators] of mean 0; None if none are the most likely, because some generators lost no
      comparison with the others.
    """
    if sparse.csgraph.connected_components(won > 0, connection="strong")[0] > 1:
        return None

    def loss(strengths: np.ndarray) -> tuple[float, np.ndarray]:
        odds = np.subtract.outer(strengths, strengths)
        lost = won * special.expit(-odds)
        return -np.sum(won * special.log_expit(odds)), lost.sum(0) - lost.sum(1)

    def curvature(strengths: np.ndarray) -> np.ndarray:
        chance = special.expit(np.subtract.outer(strengths, strengths))
        information = (won + won.T) * chance * (1 - chance)
        return np.diag(information.sum(1)) - information

    start, options = np.zeros(len(won)), {"gtol": 1e-6}
    found = optimize.minimize(loss, start, jac=True, hess=curvature, method="trust-ncg", options=options).x
    return found - found.mean()


def influences(strengths: np.ndarray, first: np.ndarray, second: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Returns what each answer adds to the strengths that `bradley_terry` finds, to first order.

    Args:
      strengths: [generators].
      first, second: int [answers], the two generators.
      score: [answers], 1 = the first one is better, 0.5 = the same, 0 = the second one.

    Returns:
      [answers, generators]; they sum to 0.
    """
    pairs = np.zeros((len(first), len(strengths)))
    pairs[np.arange(len(first)), first] = 1
    pairs[np.arange(len(first)), second] = -1
    chance = special.expit(pairs @ strengths)
    information = (pairs.T * (chance * (1 - chance))) @ pairs
    return ((score - chance)[:, None] * pairs) @ np.linalg.pinv(information)


def rating_intervals(
    prompts: np.ndarray, raters: np.ndarray, strengths: np.ndarray, added: np.ndarray
) -> np.ndarray:
    """Computes 95 % intervals of strengths [generators, 2] by the delta method.

    Args:
      prompts, raters: int [answers].
      strengths: [generators].
      added: [answers, generators], see `influences`.
    """
    # A rater may have seen several pairs of a prompt: their sum is one answer.
    cells, cell = np.unique(np.stack([prompts, raters]), axis=1, return_inverse=True)
    sums = np.zeros((cells.shape[1], len(strengths)))
    np.add.at(sums, cell, added)
    variance, degrees = variance_of_mean(cells[0], cells[1], len(sums) * sums)
    half = stats.t.ppf((1 + LEVEL) / 2, degrees) * np.sqrt(variance)
    return np.stack([strengths - half, strengths + half], axis=1)


def result(answers: Sequence[Answer], generators: Sequence[str] = ()) -> dict:
    """Computes everything as JSON values; a figure that isn't defined is None.

    Args:
      answers: of any number of generators; checks are in `checks` alone.
      generators: their order; a pair's figures are about its first generator. Default: by name.

    Returns:
      `answers`, `prompts`, `raters`: numbers. `generators`: names.
      `pairs`: for each two generators `first`, `second`, `answers`, `counts` and `shares` of the five answers
        from "much better" on, `win_rate` (a tie is half a win), `intervals` of the five shares and
        `win_rate_interval`, `sign_test` over prompts: `better`, `worse`, `tied` and two-sided `p`, and
        `krippendorff_alpha` (ordinal).
      `bradley_terry`: generator -> `rating` (Elo points, mean 0) and `interval`; None for two generators, or
        if the answers have no such ratings.
      `by_prompt`: `prompt_id`, `prompt`, `first`, `second`, `counts` and `win_rate` of each pair.
      `checks`: rater -> `answers`, `left_share` (preferred the left image, a tie is half), `identical` and
        `swapped`: checks `passed` and `asked`.
    """
    real = [answer for answer in answers if not answer.check]
    generators = list(generators) or sorted({name for answer in real for name in (answer.left, answer.right)})
    order = {name: i for i, name in enumerate(generators)}
    _, prompts = np.unique([answer.prompt_id for answer in real], return_inverse=True)
    _, raters = np.unique([answer.rater_id for answer in real], return_inverse=True)
    ends = np.array([sorted((order[answer.left], order[answer.right])) for answer in real])
    values = np.array([a.of(generators[i]) for a, i in zip(real, ends[:, 0], strict=True)])
    texts = {answer.prompt_id: answer.prompt for answer in real}
    ids = sorted(texts)
    pairs, by_prompt = [], []
    for first, second in itertools.combinations(range(len(generators)), 2):
        own = (ends == (first, second)).all(1)
        if own.any():
            names = {"first": generators[first], "second": generators[second]}
            pairs.append(names | _pair(prompts[own], raters[own], values[own]))
            for number, counts in zip(*_counts_by_prompt(prompts[own], values[own]), strict=True):
                row = {"prompt_id": ids[number], "prompt": texts[ids[number]]} | names
                by_prompt.append(row | {"counts": counts.tolist(), "win_rate": _win_rate(counts)})
    return {
        "answers": len(real),
        "prompts": len(texts),
        "raters": int(raters.max()) + 1,
        "generators": generators,
        "pairs": pairs,
        "bradley_terry": _ratings(generators, prompts, raters, ends, values) if len(pairs) > 1 else None,
        "by_prompt": by_prompt,
        "checks": checks(answers),
    }


def indicators(values: np.ndarray) -> np.ndarray:
    """Returns float [answers, 6]: whether each of the five answers was given, and the score."""
    given = (values[:, None] == ANSWERS).astype(float)
    return np.concatenate([given, _scores(values)[:, None]], axis=1)


def _scores(values: np.ndarray) -> np.ndarray:
    """Returns 1 for a win of the first generator, 0.5 for a tie, 0 for a loss."""
    return (np.sign(SAME - values) + 1) / 2


def _pair(prompts: np.ndarray, raters: np.ndarray, values: np.ndarray) -> dict:
    columns = indicators(values)
    *shares, win_rate = columns.mean(0).tolist()
    *intervals, of_win_rate = [_interval(row) for row in share_intervals(prompts, raters, columns)]
    _, preferences = np.unique(prompts, return_inverse=True)
    signs = np.sign(np.bincount(preferences, np.sign(SAME - values)))
    better, worse, tied = (int(np.sum(signs == sign)) for sign in (1, -1, 0))
    p = float(stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0
    return {
        "answers": len(values),
        "counts": columns[:, :-1].sum(0).astype(int).tolist(),
        "shares": shares,
        "intervals": intervals,
        "win_rate": win_rate,
        "win_rate_interval": of_win_rate,
        "sign_test": {"better": better, "worse": worse, "tied": tied, "p": p},
        "krippendorff_alpha": agreement.defined(agreement.krippendorff_alpha(prompts, values)),
    }


def _counts_by_prompt(prompts: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the prompts' numbers, and how often each of the five answers was given on them."""
    numbers, row = np.unique(prompts, return_inverse=True)
    counts = np.zeros((len(numbers), len(ANSWERS)), int)
    np.add.at(counts, (row, values - MUCH_BETTER), 1)
    return numbers, counts


def _win_rate(counts: np.ndarray) -> float:
    return float(counts @ _scores(np.array(ANSWERS)) / counts.sum())


def _ratings(
    generators: Sequence[str], prompts: np.ndarray, raters: np.ndarray, ends: np.ndarray, values: np.ndarray
) -> dict | None:
    first, second, score = ends[:, 0], ends[:, 1], _scores(values)
    strengths = bradley_terry(wins(len(generators), first, second, score))
    if strengths is None:
        return None
    intervals = rating_intervals(prompts, raters, strengths, influences(strengths, first, second, score))
    return {
        name: {"rating": ELO * float(strength), "interval": _interval(ELO * row)}
        for name, strength, row in zip(generators, strengths, intervals, strict=True)
    }


def checks(answers: Sequence[Answer]) -> dict:
    """Counts each rater's checks; see `result`.

    An identical pair is passed by "about the same", a swapped one by an answer at most one step from the
    first; a swapped one without a first answer doesn't count.
    """
    first = {answer.key(): answer for answer in answers if not answer.check}
    found: dict[str, dict] = {}
    for answer in answers:
        empty = {name: {"passed": 0, "asked": 0} for name in (IDENTICAL, SWAPPED)}
        rater = found.setdefault(answer.rater_id, {"answers": 0, "left_share": 0.0} | empty)
        if not answer.check:
            rater["answers"] += 1
            rater["left_share"] += float(_scores(np.array(answer.answer)))
            continue
        if answer.check == IDENTICAL:
            passed = answer.answer == SAME
        elif original := first.get(answer.key()):
            passed = abs(original.of(answer.left) - answer.answer) <= 1
        else:
            continue
        rater[answer.check]["asked"] += 1
        rater[answer.check]["passed"] += passed
    for rater in found.values():
        rater["left_share"] = rater["left_share"] / rater["answers"] if rater["answers"] else None
    return dict(sorted(found.items()))


def _interval(row: np.ndarray) -> list[float] | None:
    return None if np.isnan(row).any() else row.tolist()
