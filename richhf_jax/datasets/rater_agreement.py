"""Collects how the raters of raw ratings agree, image by image; the statistics are those of `agreement`."""

import collections
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from richhf_jax import agreement, feedback
from richhf_jax.datasets import consolidate, ratings

LIKERT_STEPS = feedback.LIKERT_MAX - feedback.LIKERT_MIN
# Raters' maps are compared as squares of this side, whatever the images' shape.
MAP_SIDE = 64


class RaterAgreement:
    """Agreement on scores, words and points over all images; maps are dropped once they are counted."""

    def __init__(self):
        self._raters: dict[str, int] = {}
        self._images: collections.Counter[int] = collections.Counter()
        # Of each answer: the image's number, the rater's, and the four ratings.
        self._answers: list[tuple[int, int, tuple[int, ...]]] = []
        # Of each word: the raters who find it misaligned, and all raters.
        self._words: list[tuple[int, int]] = []
        self._maps = {kind: agreement.MapDistances() for kind in feedback.HEATMAPS}

    def add(self, image_ratings: Sequence[ratings.Rating]) -> None:
        """Adds all ratings of one image, of at most one per rater; does nothing without a rating."""
        if not image_ratings:
            return
        number = self._images.total()
        self._images[len(image_ratings)] += 1
        for rating in image_ratings:
            rater = self._raters.setdefault(rating.rater_id, len(self._raters))
            self._answers.append((number, rater, tuple(rating.ratings[kind] for kind in feedback.SCORES)))
        for votes in zip(*(rating.token_labels for rating in image_ratings), strict=True):
            self._words.append((votes.count(feedback.MISALIGNED), len(votes)))
        if len(image_ratings) > 1:
            for kind, distances in self._maps.items():
                distances.add([_small_map(rating, kind) for rating in image_ratings])

    def summary(self) -> dict:
        """Returns JSON values; a statistic that isn't defined is None, parts without images are left out.

        raters: number of raters, as a string -> number of images;
        agreement: kind of score -> `count`: images of two raters or more; `histogram[i]`: images whose
          extreme standardised ratings are i / 4 apart; `perfect_share` and `good_share`: shares of 0 and at
          most 1 / 4 (the paper's Fig. 4); `krippendorff_alpha` (ordinal); `icc2k` and its number of raters
          `k`;
        word_agreement: `words` of two raters or more, `fleiss_kappa`;
        point_agreement: kind of heatmap -> `agreement.MapDistances.summary` of the raters' disks;
        rater_scores: rater -> kind of score -> `agreement.rater_scores`, in points of the scale 1 to 5.
        """
        if not self._images:
            return {}
        found: dict = {"raters": {str(n): images for n, images in sorted(self._images.items())}}
        if max(self._images) < 2:
            return found
        items, raters = np.array([answer[:2] for answer in self._answers]).T
        values = np.array([answer[2] for answer in self._answers])
        columns: dict[str, np.ndarray] = dict(zip(feedback.SCORES, values.T, strict=True))
        positive, voters = np.array(self._words, int).reshape(-1, 2).T
        return found | {
            "agreement": {kind: _scores(items, raters, column) for kind, column in columns.items()},
            "word_agreement": {
                "words": int(np.sum(voters > 1)),
                "fleiss_kappa": agreement.defined(agreement.fleiss_kappa(positive, voters)),
            },
            "point_agreement": {
                kind: {name: agreement.defined(value) for name, value in distances.summary().items()}
                for kind, distances in self._maps.items()
            },
            "rater_scores": self._rater_scores(items, raters, columns),
        }

    def _rater_scores(self, items: np.ndarray, raters: np.ndarray, columns: Mapping[str, np.ndarray]) -> dict:
        names = list(self._raters)
        found: dict[str, dict] = {}
        for kind, column in columns.items():
            for rater, scores in agreement.rater_scores(items, raters, column).items():
                found.setdefault(names[rater], {})[kind] = scores
        return dict(sorted(found.items()))


def _scores(items: np.ndarray, raters: np.ndarray, values: np.ndarray) -> dict:
    histogram = agreement.spread_histogram(items, values, LIKERT_STEPS)
    count = int(histogram.sum())
    icc, k = agreement.icc2k(items, raters, values)
    return {
        "count": count,
        "histogram": histogram.tolist(),
        "perfect_share": int(histogram[0]) / count,
        "good_share": int(histogram[: agreement.GOOD_AGREEMENT_STEPS + 1].sum()) / count,
        "krippendorff_alpha": agreement.defined(agreement.krippendorff_alpha(items, values)),
        "icc2k": agreement.defined(icc),
        "k": k,
    }


def _small_map(rating: ratings.Rating, kind: str) -> np.ndarray:
    """Draws the disks as `consolidate` does, and stretches them to [MAP_SIDE, MAP_SIDE] in [0, 1]."""
    if not rating.points[kind]:
        return np.zeros((MAP_SIDE, MAP_SIDE))
    radius = rating.point_radius * rating.height
    disks = consolidate.point_heatmap(rating.points[kind], rating.height, rating.width, radius)
    picture = Image.fromarray(disks.astype(np.uint8) * 255)
    return np.asarray(picture.resize((MAP_SIDE, MAP_SIDE), Image.Resampling.BOX)) / 255
