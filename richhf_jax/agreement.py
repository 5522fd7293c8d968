"""Agreement of raters: the paper's Fig. 4, Krippendorff's alpha, ICC(2,k), Fleiss' kappa, distances of maps.

Answers are in long form: a row of `items`, `raters` and `values` is one answer, and an absent row is a
missing one. Items and raters are numbers from 0; a rater has at most one answer on an item, unless a function
says otherwise. A statistic that the answers don't define, such as the agreement on a single item, is NaN.
"""

import math
from collections.abc import Sequence

import numpy as np

# Section 3.4 of the paper: raters agree well on a score if their answers are at most one step apart.
GOOD_AGREEMENT_STEPS = 1


def defined(value: float) -> float | None:
    """Returns a statistic as a JSON value: None if it isn't defined."""
    return None if math.isnan(value) else value


def spread_histogram(items: np.ndarray, values: np.ndarray, steps: int) -> np.ndarray:
    """Counts items by the largest minus the smallest answer (the paper's Fig. 4).

    Args:
      items: int [answers].
      values: int [answers], from any lowest value to at most `steps` above it.
      steps: steps of the scale; 4 for five answers.

    Returns:
      int64 [steps + 1]; items with one answer are left out.
    """
    if not len(items):
        return np.zeros(steps + 1, np.int64)
    counts = np.bincount(items)
    lowest, highest = np.full(len(counts), values.max()), np.full(len(counts), values.min())
    np.minimum.at(lowest, items, values)
    np.maximum.at(highest, items, values)
    return np.bincount((highest - lowest)[counts > 1], minlength=steps + 1)


def krippendorff_alpha(items: np.ndarray, values: np.ndarray) -> float:
    """Computes Krippendorff's alpha of ordered answers: 1 = all agree, 0 = as by chance.

    alpha = 1 - observed / expected disagreement, with the ordinal distance: the squared number of answers
    that lie between two values, each end counted half. An item with one answer has no pair and is left out.
    Source: Krippendorff, "Computing Krippendorff's Alpha-Reliability", 2011.

    Args:
      items: int [answers].
      values: [answers]; their order alone matters.
    """
    if not len(items):
        return np.nan
    kept = np.bincount(items)[items] > 1
    values, value = np.unique(values[kept], return_inverse=True)
    _, item = np.unique(items[kept], return_inverse=True)
    if len(values) < 2:
        return np.nan
    counts = np.zeros((item.max() + 1, len(values)))
    np.add.at(counts, (item, value), 1)
    # Pairs of answers on the same item [values, values]. Each item weighs as many as its answers.
    scaled = counts / (counts.sum(1, keepdims=True) - 1)
    observed = scaled.T @ counts - np.diag(scaled.sum(0))
    totals = counts.sum(0)
    middles = np.cumsum(totals) - totals / 2
    distance = np.subtract.outer(middles, middles) ** 2
    expected = np.outer(totals, totals) / (totals.sum() - 1)
    return float(1 - np.sum(observed * distance) / np.sum(expected * distance))


def variance_components(items: np.ndarray, raters: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Splits the variance of answers into that of items, of raters and of the rest.

    The model is value = mean + item + rater + rest, all random. The estimates are Henderson's method 1: sums
    of squares equal their expectations. They are unbiased for any pattern of missing answers, equal those of
    the analysis of variance if none is missing, and may be negative. Source: Searle, Casella and McCulloch,
    "Variance Components", 1992, section 5.3.

    Args:
      items: int [answers].
      raters: int [answers].
      values: [answers], or [answers, columns] for several kinds of answer at once.

    Returns:
      [3] or [3, columns]: the variances of items, raters and the rest; NaN if the pattern of answers doesn't
      tell them apart, e.g. because there is one rater.
    """
    n = len(values)
    centred = values - np.mean(values, axis=0)
    # Sums of squares: in all, between items, between raters. The constants in their expectations.
    squares, groups, repeats = [np.sum(centred**2, axis=0)], [], []
    for group in (items, raters):
        _, group, counts = np.unique(group, return_inverse=True, return_counts=True)
        sums = np.zeros((len(counts), *centred.shape[1:]))
        np.add.at(sums, group, centred)
        squares.append(np.sum((sums.T**2 / counts).T, axis=0))
        groups.append(len(counts))
        repeats.append(np.sum(counts**2) / n)
    expectations = np.array(
        [
            [n - repeats[0], n - repeats[1], n - 1],
            [n - repeats[0], groups[0] - repeats[1], groups[0] - 1],
            [groups[1] - repeats[0], n - repeats[1], groups[1] - 1],
        ]
    )
    if np.linalg.matrix_rank(expectations / n) < 3:
        return np.full_like(squares, np.nan)
    return np.linalg.solve(expectations, np.array(squares).reshape(3, -1)).reshape(np.shape(squares))


def icc2k(items: np.ndarray, raters: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """Computes ICC(2,k): how well the mean of an item's raters tells items apart.

    ICC(2,k) = item / (item + (rater + rest) / k), with the variances of `variance_components`. If each rater
    answered on each item, this is Shrout and Fleiss' ICC(2,k), "Intraclass Correlations", 1979 (McGraw and
    Wong's ICC(A,k)): absolute agreement of raters who are a sample. With missing answers, nothing is left
    out or filled in: the variances are of all answers, and k is the harmonic mean of the items' numbers of
    raters.

    Args:
      items: int [answers].
      raters: int [answers].
      values: [answers].

    Returns:
      The correlation, at most 1, negative if items differ less than by chance; and k.
    """
    if not len(items):
        return np.nan, np.nan
    counts = np.bincount(items)
    k = 1 / np.mean(1 / counts[counts > 0])
    item, rater, rest = variance_components(items, raters, values)
    whole = item + (rater + rest) / k
    return (float(item / whole) if whole > 0 else np.nan), float(k)


def fleiss_kappa(positive: np.ndarray, raters: np.ndarray) -> float:
    """Computes Fleiss' kappa of answers yes or no: 1 = all agree, 0 = as by chance.

    Items may have different numbers of raters; with equal ones this is Fleiss' kappa of 1971. Source: Fleiss
    and Cuzick, "The Reliability of Dichotomous Judgments: Unequal Numbers of Judges per Subject", 1979.

    Args:
      positive: int [items], the number of raters who say yes.
      raters: int [items], the number of raters. An item with one rater is left out.
    """
    kept = raters > 1
    positive, raters = positive[kept], raters[kept]
    share = positive.sum() / raters.sum() if len(raters) else 0.0
    chance = share * (1 - share) * np.sum(raters - 1)
    return float(1 - np.sum(positive * (1 - positive / raters)) / chance) if chance else np.nan


def rater_scores(items: np.ndarray, raters: np.ndarray, values: np.ndarray) -> dict[int, dict[str, float]]:
    """Compares each rater with the mean of the other raters of the same items.

    Args:
      items: int [answers].
      raters: int [answers].
      values: [answers].

    Returns:
      Rater -> "count": items that others rated, too; "bias": mean of the rater's answer minus the others'
      mean, in the values' unit; "spread": standard deviation of this difference. Raters without such an item
      are absent.
    """
    if not len(items):
        return {}
    counts, sums = np.bincount(items)[items], np.bincount(items, values)[items]
    shared = counts > 1
    difference = values[shared] - (sums[shared] - values[shared]) / (counts[shared] - 1)
    raters = raters[shared]
    return {
        int(rater): {
            "count": int(np.sum(own := raters == rater)),
            "bias": float(np.mean(difference[own])),
            "spread": float(np.std(difference[own])),
        }
        for rater in np.unique(raters)
    }


class MapDistances:
    """Distances of raters' maps within items and between items, one item at a time; no map is kept.

    The distance of two maps is the mean of their pixels' squared difference. For maps of 0 and 1 it is the
    share of pixels that one rater marked and the other didn't. sigma = 1 - within / between is Krippendorff's
    alpha in its form for any distance: 1 = all raters marked the same, 0 = an item's raters are as far apart
    as raters of different items. Source of alpha for maps: Braylan, Alonso and Lease, "Measuring Annotator
    Agreement Generally across Complex Structured, Multi-object, and Free-text Annotation Tasks", 2022.
    """

    def __init__(self):
        self._items = self._maps = self._pairs = 0
        self._within = self._squares = 0.0
        self._sum: np.ndarray | float = 0.0

    def add(self, maps: Sequence[np.ndarray] | np.ndarray) -> None:
        """Adds an item's maps, all of one shape; an item with one map is left out."""
        if len(maps) < 2:
            return
        maps = np.asarray(maps, float)
        self._items += 1
        self._maps += len(maps)
        self._pairs += len(maps) * (len(maps) - 1)
        total, squares = maps.sum(0), np.sum(np.mean(maps**2, axis=(1, 2)))
        self._within += _distances(len(maps), total, squares)
        self._sum = self._sum + total
        self._squares += squares

    def summary(self) -> dict[str, float]:
        """Returns "items", "within" and "between" (mean distances of pairs of maps), and "sigma"."""
        pairs = self._maps * (self._maps - 1) - self._pairs
        within = self._within / self._pairs if self._pairs else np.nan
        every = _distances(self._maps, self._sum, self._squares)
        between = (every - self._within) / pairs if pairs else np.nan
        sigma = 1 - within / between if between > 0 else np.nan
        return {"items": self._items, "within": within, "between": between, "sigma": sigma}


def _distances(count: int, total: np.ndarray | float, squares: float) -> float:
    """Returns the sum over all ordered pairs of the distances of maps.

    Args:
      count: number of maps.
      total: sum of the maps [height, width].
      squares: sum over the maps of their mean squared pixel.
    """
    return float(2 * (count * squares - np.mean(np.square(total))))
