"""The schema of raw ratings, and the check of each line.

A file of raw ratings is JSON Lines: one line is one rater's answer on one image. Lines of the same
image need not be neighbours.

    image_id               str    becomes RichHF-18K's `filename`, e.g. "train/<uid>.png"
    prompt                 str    with at least one token
    rater_id               str    at most one line for each image and rater
    image_size             {"width": int, "height": int}, pixels, each 1 to 8192
    implausibility_points  [[x, y], ...]   pixels; x to the right, y down; 0 <= x < width, 0 <= y < height;
                                           at most 1,000 points
    misalignment_points    [[x, y], ...]   likewise
    token_labels           [int, ...]      one per prompt token: 0 = misaligned, 1 = aligned
    ratings                {"plausibility": int, "alignment": int, "aesthetics": int, "overall": int}, 1 to 5
    tool_version           str    the annotation tool's version
    point_radius           str    "height/20": the radius of a point's disk as a share of the image's height
    suggested              bool   whether the rater saw a model's answer before they gave this one; false if
                                  it is missing

Tokens are those of `feedback.tokenize_prompt`. All lines of an image have the same prompt, size and point
radius. Every other field is required. Further fields and blank lines are ignored.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

from richhf_jax import feedback, foreign_text
from richhf_jax.inputs import images
from richhf_jax.inputs.record import InputError, parsed_json, whole

# Points of a kind in one answer; each costs the drawing of a disk.
_MAX_POINTS = 1000
_POINT_RADIUS = re.compile(r"height/(\d+(?:\.\d+)?)")

Point = tuple[float, float]


class RatingError(ValueError):
    """A line breaks the schema; the message says where and how."""


@dataclasses.dataclass(frozen=True)
class Rating:
    """One rater's answer on one image. `points`: kind of heatmap -> (x, y) in pixels.

    `point_radius` is a share of the image's height. `suggested`: whether the rater saw a model's answer.
    """

    image_id: str
    prompt: str
    rater_id: str
    width: int
    height: int
    points: dict[str, tuple[Point, ...]]
    token_labels: tuple[int, ...]
    ratings: dict[str, int]
    tool_version: str
    point_radius: float
    suggested: bool = False

    def to_json(self) -> str:
        """Returns the answer as a line of a file of raw ratings."""
        return json.dumps(
            {
                "image_id": self.image_id,
                "prompt": self.prompt,
                "rater_id": self.rater_id,
                "image_size": {"width": self.width, "height": self.height},
                **{f"{kind}_points": self.points[kind] for kind in feedback.HEATMAPS},
                "token_labels": self.token_labels,
                "ratings": self.ratings,
                "tool_version": self.tool_version,
                "point_radius": radius_rule(self.point_radius),
                **({"suggested": True} if self.suggested else {}),
            },
            ensure_ascii=False,
        )


def parse_rating(line: str | bytes) -> Rating:
    """Reads and checks one line.

    Raises:
      RatingError: the line breaks the schema; the message says where and how.
    """
    try:
        fields = parsed_json(line)
    except InputError as error:
        raise RatingError(str(error)) from None
    if not isinstance(fields, dict):
        raise RatingError(f"a line must be a JSON object, got {_show(fields)}")
    size = _get(fields, "image_size", dict, "an object")
    width, height = (_integer(size, side, 1, images.MAX_SIDE, "image_size.") for side in ("width", "height"))
    prompt = _text(fields, "prompt")
    scores = _get(fields, "ratings", dict, "an object")
    return Rating(
        image_id=_text(fields, "image_id"),
        prompt=prompt,
        rater_id=_text(fields, "rater_id"),
        width=width,
        height=height,
        points={kind: _points(fields, f"{kind}_points", width, height) for kind in feedback.HEATMAPS},
        token_labels=_labels(fields, prompt),
        ratings={
            kind: _integer(scores, kind, feedback.LIKERT_MIN, feedback.LIKERT_MAX, "ratings.")
            for kind in feedback.SCORES
        },
        tool_version=_text(fields, "tool_version"),
        point_radius=parse_radius(_text(fields, "point_radius")),
        suggested=_flag(fields, "suggested"),
    )


def read_ratings(lines: Iterable[str | bytes]) -> Iterator[tuple[int, Rating | RatingError]]:
    """Checks the lines of a file, each by itself and against the earlier lines of its image.

    Yields:
      The line's number, from 1, and its rating or what is wrong with the line.
    """
    first_line: dict[str, tuple[int, Rating]] = {}
    raters: dict[tuple[str, str], int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rating = parse_rating(line)
            known, first = first_line.setdefault(rating.image_id, (number, rating))
            for field in ("prompt", "width", "height", "point_radius"):
                if getattr(rating, field) != getattr(first, field):
                    raise RatingError(f"{field} of image {rating.image_id!r} differs from line {known}")
            known = raters.setdefault((rating.image_id, rating.rater_id), number)
            if known != number:
                raise RatingError(
                    f"rater {rating.rater_id!r} has already rated image {rating.image_id!r} in line {known}"
                )
            yield number, rating
        except RatingError as error:
            yield number, error


def _show(value) -> str:
    return foreign_text.excerpt(json.dumps(value, ensure_ascii=False))


def _get(fields: dict, name: str, kind: type, wanted: str, where: str = ""):
    if name not in fields:
        raise RatingError(f"{where}{name} is missing")
    value = whole(fields[name])
    if not isinstance(value, kind) or isinstance(value, bool):
        raise RatingError(f"{where}{name} must be {wanted}, got {_show(fields[name])}")
    return value


def _text(fields: dict, name: str) -> str:
    text = _get(fields, name, str, "a string")
    if foreign_text.is_blank(text):
        raise RatingError(f"{name} is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RatingError(f"{name} can't be written as UTF-8: {error.reason}") from None
    return text


def _flag(fields: dict, name: str) -> bool:
    if type(value := fields.get(name, False)) is not bool:
        raise RatingError(f"{name} must be true or false, got {_show(value)}")
    return value


def _integer(fields: dict, name: str, low: int, high: int, where: str) -> int:
    value = _get(fields, name, int, "an integer", where)
    if not low <= value <= high:
        raise RatingError(f"{where}{name} must be {low} to {high}, got {value}")
    return value


def _points(fields: dict, name: str, width: int, height: int) -> tuple[Point, ...]:
    points = _get(fields, name, list, "a list of [x, y]")
    if len(points) > _MAX_POINTS:
        raise RatingError(f"{name} has {len(points)} points; at most {_MAX_POINTS} are taken")
    for point in points:
        numbers = isinstance(point, list) and [type(v) in (int, float) for v in point]
        if numbers != [True, True]:
            raise RatingError(f"{name} must be a list of [x, y], got {_show(point)} in it")
        x, y = point
        if not (0 <= x < width and 0 <= y < height):
            raise RatingError(
                f"{name}: point {_show(point)} is outside the image of {width} x {height} pixels"
            )
    return tuple((x, y) for x, y in points)


def _labels(fields: dict, prompt: str) -> tuple[int, ...]:
    labels = [whole(label) for label in _get(fields, "token_labels", list, "a list of 0 and 1")]
    known = (feedback.MISALIGNED, feedback.ALIGNED)
    if bad := [label for label in labels if type(label) is not int or label not in known]:
        raise RatingError(f"token_labels must be 0 (misaligned) or 1 (aligned), got {_show(bad[0])}")
    tokens = feedback.tokenize_prompt(prompt)
    if not tokens:
        raise RatingError(f"prompt {_show(prompt)} has no tokens")
    if len(labels) != len(tokens):
        raise RatingError(f"{len(labels)} token_labels but {len(tokens)} prompt tokens")
    return tuple(labels)


def radius_rule(radius: float) -> str:
    """Writes the radius of a point's disk as raw ratings do: 0.05 -> "height/20"."""
    return f"height/{1 / radius:g}"


def parse_radius(rule: Any) -> float:
    """Returns the radius of a point's disk as a share of the image's height: "height/20" -> 0.05.

    Raises:
      RatingError: the rule is anything else.
    """
    match = _POINT_RADIUS.fullmatch(rule) if isinstance(rule, str) else None
    if not match or not math.isfinite(divisor := float(match[1])) or divisor < 1:
        raise RatingError(f'point_radius must be "height/N" with a number N of at least 1, got {_show(rule)}')
    return 1 / divisor
