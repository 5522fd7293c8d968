"""Computes statistics of records with rich feedback, one by one.

Memory doesn't grow with their number, but for raters' answers.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from PIL import Image

from richhf_jax import agreement, feedback
from richhf_jax.datasets import rater_agreement, ratings
from richhf_jax.inputs import containers, images

# The mean of three raters' answers on a 5-point scale is a multiple of 1/12.
SCORE_STEPS = 12
# Mean heatmaps are squares of this side, whatever the images' shape.
HEATMAP_SIDE = 64
# Each list of records with a problem names at most this many; all are counted.
MAX_LISTED = 100
# At most this many different image sizes are counted one by one.
MAX_SIZES = 10_000


@dataclasses.dataclass(frozen=True)
class Record:
    """A source's data on one image; what the source lacks is None or empty.

    Attributes:
      name: the image's name, for lists of problems.
      prompt: the text.
      scores: kind -> [0, 1]; NaN if this record lacks it.
      heatmaps: kind -> encoded greyscale image, 255 = marked by all raters.
      labels: keyword labels as text, e.g. '1 0 1'.
      image: the encoded image.
      raters: each rater's answers.
    """

    name: str
    prompt: str | None = None
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
    heatmaps: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    labels: str | None = None
    image: bytes | None = None
    raters: Sequence[ratings.Rating] = ()


class Listed:
    """A count with the first few names."""

    def __init__(self):
        self.count, self._names = 0, []

    def add(self, name: str) -> None:
        """Counts one."""
        self.count += 1
        if len(self._names) < MAX_LISTED:
            self._names.append(name)

    def summary(self) -> dict:
        """Returns {'count': int, 'first': [name, ...]}."""
        return {"count": self.count, "first": list(self._names)}


class Scores:
    """Histogram of one score (the paper's Fig. 2)."""

    def __init__(self, kind: str):
        self._kind = kind
        self._histogram = np.zeros(SCORE_STEPS + 1, np.int64)
        self._sum = self._sum_of_squares = 0.0
        self._missing, self._out_of_range = Listed(), Listed()

    def add(self, record: Record) -> None:
        """Counts the record's score of this kind, if it has one."""
        score = record.scores.get(self._kind)
        if score is None:
            return
        if math.isnan(score):
            self._missing.add(record.name)
        elif not 0 <= score <= 1:
            self._out_of_range.add(record.name)
        else:
            self._histogram[round(score * SCORE_STEPS)] += 1
            self._sum += score
            self._sum_of_squares += score**2

    def summary(self) -> dict | None:
        """Returns counts. `histogram[i]`: records of a score nearest to i / 12. `sd` divides by `count`."""
        count = int(self._histogram.sum())
        if not count + self._missing.count + self._out_of_range.count:
            return None
        mean = self._sum / count if count else math.nan
        variance = self._sum_of_squares / count - mean**2 if count else math.nan
        return {
            "count": count,
            "mean": agreement.defined(mean),
            "sd": agreement.defined(math.sqrt(max(variance, 0)) if count else math.nan),
            "histogram": self._histogram.tolist(),
            "missing": self._missing.summary(),
            "out_of_range": self._out_of_range.summary(),
        }


class Heatmaps:
    """The mean heatmap of one kind, and the number of empty ones."""

    def __init__(self, kind: str):
        self._kind = kind
        self._count = self._empty = 0
        self._marked = 0.0
        self._sum = np.zeros((HEATMAP_SIDE, HEATMAP_SIDE))
        self._unreadable = Listed()

    def add(self, record: Record) -> None:
        """Adds the record's heatmap of this kind, if it has one; it is stretched to the square."""
        data = record.heatmaps.get(self._kind)
        if data is None:
            return
        try:
            heatmap = Image.fromarray(images.decode(data)).convert("L")
        except images.ImageError as error:
            self._unreadable.add(f"{record.name}: {error}")
            return
        self._count += 1
        histogram = heatmap.histogram()
        marked = 1 - histogram[0] / sum(histogram)
        if not marked:
            self._empty += 1
            return
        self._marked += marked
        small = heatmap.resize((HEATMAP_SIDE, HEATMAP_SIDE), Image.Resampling.BOX)
        self._sum += np.asarray(small) / 255

    def summary(self) -> dict | None:
        """Returns counts, shares and the mean heatmap.

        `mean`: [side][side] over all records, empty ones included; 1 = marked by all raters of all images.
        `marked_share`: share of pixels above 0, mean over the records that aren't empty.
        """
        if not self._count + self._unreadable.count:
            return None
        count, marked = self._count, self._count - self._empty
        return {
            "count": count,
            "empty": self._empty,
            "empty_share": _share(self._empty, count),
            "marked_share": _share(self._marked, marked),
            "mean": (self._sum / max(count, 1)).round(5).tolist(),
            "unreadable": self._unreadable.summary(),
        }


class Lengths:
    """Lengths of the prompts, in some unit."""

    def __init__(self, measure: Callable[[str], int], limit: int | None = None):
        self._measure, self._limit = measure, limit
        self._lengths: collections.Counter[int] = collections.Counter()

    def add(self, record: Record) -> None:
        """Measures the record's prompt, if there is one."""
        if record.prompt is not None:
            self._lengths[self._measure(record.prompt)] += 1

    def summary(self) -> dict | None:
        """Returns counts. `histogram`: [length, prompts], each length. `over_limit`: longer than `limit`."""
        count = self._lengths.total()
        if not count:
            return None
        lengths = sorted(self._lengths.items())
        result = {
            "count": count,
            "mean": sum(length * n for length, n in lengths) / count,
            "median": _quantile(lengths, 0.5),
            "p95": _quantile(lengths, 0.95),
            "max": lengths[-1][0],
            "histogram": [list(pair) for pair in lengths],
        }
        if self._limit is not None:
            over = sum(n for length, n in lengths if length > self._limit)
            result |= {"limit": self._limit, "over_limit": over}
        return result


class Labels:
    """Number of misaligned tokens, and records whose labels don't fit the prompt."""

    def __init__(self):
        self._records = self._any = self._tokens = self._misaligned = 0
        self._mismatches = Listed()

    def add(self, record: Record) -> None:
        """Counts the record's labels; labels that don't fit the prompt only count as a mismatch."""
        if record.labels is None:
            return
        try:
            labels = feedback.parse_labels(record.labels)
        except ValueError as error:
            self._mismatches.add(f"{record.name}: {error}")
            return
        tokens = len(labels) if record.prompt is None else len(feedback.tokenize_prompt(record.prompt))
        if len(labels) != tokens:
            self._mismatches.add(f"{record.name}: {tokens} tokens but {len(labels)} labels")
            return
        misaligned = labels.count(feedback.MISALIGNED)
        self._records += 1
        self._any += misaligned > 0
        self._tokens += tokens
        self._misaligned += misaligned

    def summary(self) -> dict | None:
        """Returns counts and shares; mismatches are left out of all but their own count."""
        if not self._records + self._mismatches.count:
            return None
        return {
            "records": self._records,
            "tokens": self._tokens,
            "misaligned_tokens": self._misaligned,
            "misaligned_token_share": _share(self._misaligned, self._tokens),
            "records_with_misaligned": self._any,
            "records_with_misaligned_share": _share(self._any, self._records),
            "mismatches": self._mismatches.summary(),
        }


class Images:
    """Sizes and formats of images, from their headers."""

    def __init__(self):
        self._sizes, self._formats = collections.Counter(), collections.Counter()
        self._unreadable = Listed()

    def add(self, record: Record) -> None:
        """Reads the header of the record's image, if there is one."""
        if record.image is None:
            return
        try:
            container = containers.read(record.image)
        except images.ImageError as error:
            self._unreadable.add(f"{record.name}: {error}")
            return
        size = container.width, container.height
        self._formats[container.format] += 1
        known = size in self._sizes or len(self._sizes) < MAX_SIZES
        self._sizes[size if known else None] += 1

    def summary(self) -> dict | None:
        """Returns counts. `sizes`: [width, height, images], commonest first; null: all beyond MAX_SIZES."""
        if not self._formats and not self._unreadable.count:
            return None
        return {
            "count": self._formats.total(),
            "formats": dict(self._formats.most_common()),
            "sizes": [[*(size or (None, None)), n] for size, n in self._sizes.most_common()],
            "unreadable": self._unreadable.summary(),
        }


class Statistics:
    """All statistics of this module.

    Args:
      count_tokens: prompt -> its length for the model, in tokens.
      limit: prompts with more tokens than this are counted.
    """

    def __init__(self, count_tokens: Callable[[str], int] | None = None, limit: int | None = None):
        self._records = 0
        lengths = {"words": Lengths(lambda prompt: len(feedback.tokenize_prompt(prompt)))}
        if count_tokens:
            lengths["tokens"] = Lengths(count_tokens, limit)
        self._groups = {
            "scores": {kind: Scores(kind) for kind in feedback.SCORES},
            "heatmaps": {kind: Heatmaps(kind) for kind in feedback.HEATMAPS},
            "prompt_lengths": lengths,
        }
        self._single = {"labels": Labels(), "images": Images()}
        self._raters = rater_agreement.RaterAgreement()

    def add(self, record: Record) -> None:
        """Adds one record to all statistics."""
        self._records += 1
        for group in (*self._groups.values(), self._single):
            for part in group.values():
                part.add(record)
        self._raters.add(record.raters)

    def summary(self) -> dict:
        """Returns everything as JSON values; parts on which the records have nothing are left out."""
        groups = {
            name: {key: part for key, member in group.items() if (part := member.summary())}
            for name, group in self._groups.items()
        }
        single = {name: part.summary() for name, part in self._single.items()}
        parts = {name: part for name, part in (groups | single).items() if part}
        return {"records": self._records} | parts | self._raters.summary()


def _share(part: float, whole: int) -> float | None:
    return part / whole if whole else None


def _quantile(lengths: Sequence[tuple[int, int]], share: float) -> int:
    """Returns the smallest length that at least this share of the prompts doesn't exceed."""
    total = sum(n for _, n in lengths)
    seen = 0
    for length, n in lengths:
        seen += n
        if seen >= share * total:
            return length
    return lengths[-1][0]
