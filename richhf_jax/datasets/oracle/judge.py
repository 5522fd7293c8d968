"""Judges a picture of the synthetic world by what is in it and what the prompt says; free of noise.

The scores are those of the simulated raters' rules (`raters`), computed from what the oracle sees.
"""

import dataclasses
import itertools
import statistics

import numpy as np
from PIL import Image
from scipy import optimize

from richhf_jax.datasets import prompts, raters, scenes
from richhf_jax.datasets.oracle import objects
from richhf_jax.datasets.oracle.backgrounds import SIDE

_ATTRIBUTES = ("colour", "shape", "size", "count")
# Above the cost of leaving a phrase and a group without partners.
_FORBIDDEN = 100.0
_ALONE = 3.0


@dataclasses.dataclass(frozen=True)
class _Group:
    """Objects of one colour and shape."""

    colour: str
    shape: str
    things: tuple[objects.Thing, ...]

    @property
    def size(self) -> str:
        """The size of most of them, "small" or "large"."""
        return statistics.mode(thing.size for thing in self.things)


@dataclasses.dataclass(frozen=True)
class Judgement:
    """The truth about a picture, as the oracle sees it.

    Attributes:
      reading: what is in it.
      misalignments: what the picture gets wrong.
      labels: the label of each of the prompt's tokens; see `feedback`.
      strict: whether the picture shows what the prompt says, and nothing else.
      soft: share of what the phrases say that is right, 0 to 1.
      scores: kind of score -> points of the Likert scale; not rounded or limited.
    """

    reading: objects.Reading
    misalignments: tuple[prompts.Misalignment, ...]
    labels: tuple[int, ...]
    strict: bool
    soft: float
    scores: dict[str, float]


def judge(image: np.ndarray, prompt: str) -> Judgement:
    """Judges a picture.

    Args:
      image: uint8 [side, side, 3], with a side of SIDE pixels or more.
      prompt: a prompt of `prompts`.

    Raises:
      ValueError: the image or the prompt isn't of this world.
    """
    description = prompts.parse(prompt)
    if image.ndim != 3 or image.shape[0] != image.shape[1] or image.shape[0] < SIDE:
        raise ValueError(f"an image must be [side, side, 3] with a side of {SIDE} or more, got {image.shape}")
    small = Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BOX)
    expected = [(p.colour, (p.shape, p.count, p.size)) for p in description.phrases]
    reading = objects.read(np.asarray(small, np.float32), expected)
    groups = _groups(reading.things)
    pairs = _matched(description.phrases, groups)
    misalignments = tuple(
        prompts.Misalignment(index, kind)
        for index, phrase in enumerate(description.phrases)
        for kind in _wrong(phrase, pairs.get(index))
    )
    right = [1 - _share_wrong(p, pairs.get(i)) for i, p in enumerate(description.phrases)]
    return Judgement(
        reading,
        misalignments,
        tuple(description.labels(misalignments)),
        strict=not misalignments and len(pairs) == len(groups),
        soft=float(np.mean(right)),
        scores=_scores(reading, misalignments),
    )


def _groups(things: tuple[objects.Thing, ...]) -> list[_Group]:
    def key(thing: objects.Thing) -> tuple[str, str]:
        return thing.colour, thing.shape

    return [_Group(*name, tuple(some)) for name, some in itertools.groupby(sorted(things, key=key), key)]


def _wrong(phrase: prompts.Phrase, group: _Group | None) -> list[str]:
    """Returns the kinds of misalignment between a phrase and the objects that stand for it."""
    if group is None:
        return ["missing"]
    is_wrong = {
        "colour": group.colour != phrase.colour,
        "shape": group.shape != phrase.shape,
        "size": phrase.size is not None and group.size != phrase.size,
        "count": len(group.things) != phrase.count,
    }
    return [kind for kind in _ATTRIBUTES if is_wrong[kind]]


def _share_wrong(phrase: prompts.Phrase, group: _Group | None) -> float:
    if group is None:
        return 1.0
    return len(_wrong(phrase, group)) / (len(_ATTRIBUTES) - (phrase.size is None))


def _matched(phrases: tuple[prompts.Phrase, ...], groups: list[_Group]) -> dict[int, _Group]:
    """Finds the group that stands for each phrase: those that cost least, by `raters`' costs.

    Objects of another colour and another shape never stand for a phrase.
    """
    count = len(phrases) + len(groups)
    costs = np.full((count, count), _ALONE)
    for (i, phrase), (j, group) in itertools.product(enumerate(phrases), enumerate(groups)):
        wrong = _wrong(phrase, group)
        is_other = {"colour", "shape"} <= set(wrong)
        costs[i, j] = _FORBIDDEN if is_other else sum(raters.MISALIGNMENT_COSTS[kind] for kind in wrong)
    costs[len(phrases) :, len(groups) :] = 0
    rows, columns = optimize.linear_sum_assignment(costs)
    return {
        int(i): groups[j] for i, j in zip(rows, columns, strict=True) if i < len(phrases) and j < len(groups)
    }


def _scores(reading: objects.Reading, misalignments: tuple[prompts.Misalignment, ...]) -> dict[str, float]:
    """Computes the noise-free scores of what was seen; an empty picture isn't balanced."""
    weights = np.array([thing.radius**2 for thing in reading.things])
    middle = 0.0, 0.0
    if len(weights):
        x, y = weights @ [(thing.x, thing.y) for thing in reading.things] / weights.sum()
        middle = float(x), float(y)
    saturation = float(np.clip(reading.background.saturation, *scenes.SATURATIONS))
    beauty = raters.beauty_of(reading.background.kind, saturation, middle)
    return raters.points(beauty, [float(region.mean()) for region in reading.regions], misalignments)
