"""Answers as the page sends them and the database keeps them: form, missing parts, score on gold items.

    {"implausibility_points": [[x, y], ...], "misalignment_points": [[x, y], ...],   pixels
     "token_labels": [0 or 1, ...],                  of the tokens of `feedback.tokenize_prompt`
     "nothing": {"implausibility": bool, "misalignment": bool, "words": bool},
     "ratings": {"plausibility": 1 to 5 or null, ...},
     "comment": str}

`nothing` says that a part was looked at and there is nothing to mark: an empty answer must be meant.
"""

import json
from typing import Any

import richhf_jax
from richhf_jax import feedback
from richhf_jax.annotate.project import Config
from richhf_jax.datasets import ratings
from richhf_jax.inputs.record import printable

# The name of the misaligned words as a part of an answer.
WORDS = "words"
_PARTS = (*feedback.HEATMAPS, WORDS)
_FIELDS = {*(f"{kind}_points" for kind in feedback.HEATMAPS), "token_labels", "nothing", "ratings", "comment"}
# Characters of a comment, and of a reason.
MAX_COMMENT = 10_000
_TOOL_VERSION = f"richhf_jax {richhf_jax.__version__}"

Answer = dict[str, Any]
# Those fields of an answer that a model gave, without `nothing` and `comment`; of `ratings` those it gave.
Suggestion = dict[str, Any]


class InvalidAnswer(ValueError):
    """An answer breaks the form, which the page never does; the message says how."""


def empty(prompt: str) -> Answer:
    """Returns the answer that a rater begins with."""
    return {
        **{f"{kind}_points": [] for kind in feedback.HEATMAPS},
        "token_labels": [feedback.ALIGNED] * len(feedback.tokenize_prompt(prompt)),
        "nothing": dict.fromkeys(_PARTS, False),
        "ratings": dict.fromkeys(feedback.SCORES),
        "comment": "",
    }


def of_rating(rating: ratings.Rating) -> Answer:
    """Returns the answer of a line of raw ratings; what is empty was meant."""
    answer = {
        **{f"{kind}_points": [list(p) for p in rating.points[kind]] for kind in feedback.HEATMAPS},
        "token_labels": list(rating.token_labels),
        "ratings": dict(rating.ratings),
        "comment": "",
    }
    return answer | {"nothing": {part: is_empty(answer, part) for part in _PARTS}}


def to_rating(
    answer: Answer, image_id: str, prompt: str, size: tuple[int, int], rater_id: str, radius: float
) -> ratings.Rating:
    """Returns an answer as a checked line of raw ratings.

    Args:
      answer: the answer, with all ratings.
      image_id, prompt: the image's name and prompt.
      size: the image's width and height, in pixels.
      rater_id: who gave it.
      radius: radius of a point's disk, as a share of the image's height.

    Raises:
      ratings.RatingError: the answer breaks the schema of raw ratings.
    """
    fields = {name: answer[name] for name in _FIELDS - {"nothing", "comment"}}
    fields |= {
        "image_id": image_id,
        "prompt": prompt,
        "rater_id": rater_id,
        "image_size": {"width": size[0], "height": size[1]},
        "tool_version": _TOOL_VERSION,
        "point_radius": ratings.radius_rule(radius),
    }
    try:
        return ratings.parse_rating(json.dumps(fields, allow_nan=False))
    except ValueError as error:
        raise ratings.RatingError(str(error)) from None


def checked(answer: Any, prompt: str, size: tuple[int, int]) -> Answer:
    """Checks an answer's form, and returns it. Parts may be missing; see `missing`.

    Args:
      answer: what the page sent, parsed from JSON.
      prompt: the image's prompt.
      size: the image's width and height, in pixels.

    Raises:
      InvalidAnswer: it has another form, a point outside the image or a wrong number of labels.
    """
    if not isinstance(answer, dict) or set(answer) != _FIELDS:
        raise InvalidAnswer(f"an answer must be an object with {', '.join(sorted(_FIELDS))}")
    nothing, scores, comment = answer["nothing"], answer["ratings"], answer["comment"]
    if not isinstance(nothing, dict) or set(nothing) != set(_PARTS):
        raise InvalidAnswer(f"`nothing` must be an object with {', '.join(_PARTS)}")
    if any(type(value) is not bool for value in nothing.values()):
        raise InvalidAnswer("values of `nothing` must be true or false")
    if not isinstance(scores, dict) or set(scores) != set(feedback.SCORES):
        raise InvalidAnswer(f"`ratings` must be an object with {', '.join(feedback.SCORES)}")
    if not isinstance(comment, str) or len(comment) > MAX_COMMENT:
        raise InvalidAnswer(f"`comment` must be text of at most {MAX_COMMENT} characters")
    given = {kind: feedback.LIKERT_MIN if value is None else value for kind, value in scores.items()}
    try:
        rating = to_rating({**answer, "ratings": given}, "an image", prompt, size, "a rater", 1)
    except ratings.RatingError as error:
        raise InvalidAnswer(str(error)) from None
    return {
        **{f"{kind}_points": [list(p) for p in rating.points[kind]] for kind in feedback.HEATMAPS},
        "token_labels": list(rating.token_labels),
        "nothing": nothing,
        "ratings": {k: None if scores[k] is None else rating.ratings[k] for k in feedback.SCORES},
        "comment": printable(comment),
    }


def is_empty(answer: Answer, part: str) -> bool:
    """Tells whether nothing is marked in a part: a kind of points, or the words."""
    if part == WORDS:
        return feedback.MISALIGNED not in answer["token_labels"]
    return not answer[f"{part}_points"]


def missing(answer: Answer, config: Config) -> list[str]:
    """Returns the names of the parts that a rater still has to answer."""
    parts = [kind.name for kind in config.kinds] + [WORDS] * bool(config.words)
    return [part for part in parts if is_empty(answer, part) and not answer["nothing"][part]] + [
        scale.name for scale in config.scales if answer["ratings"][scale.name] is None
    ]


def gold_score(answer: Answer, gold: Answer, config: Config, height: int) -> float:
    """Compares an answer with the right one: the mean over all parts that are asked, 0 to 1.

    A scale counts 1 if it is at most one step off, else 0 (the paper's good agreement, section 3.4). Words
    and points count F1: twice the hits by the sum of both numbers, or 1 if both are empty. A point is a hit
    if its disk overlaps the disk of a right point that no other point has hit.
    """
    scores = [
        float(abs(answer["ratings"][scale.name] - gold["ratings"][scale.name]) <= 1)
        for scale in config.scales
    ]
    if config.words:
        ours, right = (
            {i for i, label in enumerate(one["token_labels"]) if label == feedback.MISALIGNED}
            for one in (answer, gold)
        )
        scores.append(_f1(len(ours & right), len(ours) + len(right)))
    for kind in config.kinds:
        ours, right = answer[f"{kind.name}_points"], gold[f"{kind.name}_points"]
        scores.append(_f1(_hits(ours, right, 2 * config.point_radius * height), len(ours) + len(right)))
    return sum(scores) / len(scores)


def _f1(hits: int, total: int) -> float:
    return 2 * hits / total if total else 1.0


def _hits(ours: list[list[float]], right: list[list[float]], distance: float) -> int:
    """Counts pairs of points within a distance, the closest first; each point is in one pair at most."""
    pairs = sorted(
        ((x - u) ** 2 + (y - v) ** 2, i, j) for i, (x, y) in enumerate(ours) for j, (u, v) in enumerate(right)
    )
    used_ours, used_right = set(), set()
    for squared, i, j in pairs:
        if squared <= distance**2 and i not in used_ours and j not in used_right:
            used_ours.add(i)
            used_right.add(j)
    return len(used_ours)
