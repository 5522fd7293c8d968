"""A project's folder and its settings.

    PROJECT/project.db      people, items and answers; see `store`
    PROJECT/config.json     the settings: see `Config`
    PROJECT/guidelines.md   what raters read first, in Markdown
    PROJECT/images/         the images, named by their content; or links to them

Both text files may be edited; a server reads them when it starts.
"""

import dataclasses
import hashlib
import pathlib
from typing import Any

from richhf_jax import errors, feedback, writing
from richhf_jax.annotate import settings
from richhf_jax.annotate.settings import SettingError
from richhf_jax.datasets import ratings

DATABASE, IMAGES = "project.db", "images"
_IMAGE_FIX = "Put the image back; or where it is elsewhere now, name it to `add --images` by the same id"
_DEFAULT_GUIDELINES = """\
Look at the image first, then read the prompt.

- **Implausible**: click on each place that looks wrong by itself, such as a hand of six fingers, a blurred
  face or a shadow that falls the wrong way.
- **Misaligned**: click on each place that doesn't match the prompt, and choose the words that the image gets
  wrong or leaves out.
- If there is nothing to mark, say so: an empty answer must be meant.
- Then answer the questions. Your marks come first, so that your answers follow from them.
"""


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of point. `name` is one of `feedback.HEATMAPS`; `question` says what to mark."""

    name: str
    question: str


@dataclasses.dataclass(frozen=True)
class Scale:
    """A scale of five answers.

    `name` is one of `feedback.SCORES`; `anchors` are the answers in words, the worst first.
    """

    name: str
    question: str
    anchors: tuple[str, ...]


_KINDS = (
    Kind(feedback.IMPLAUSIBILITY, "what looks implausible: artifacts, distortions, impossible things"),
    Kind(feedback.MISALIGNMENT, "what doesn't match the prompt"),
)
_SCALES = (
    Scale(
        feedback.PLAUSIBILITY,
        "How plausible is the image, without artifacts?",
        ("not at all", "little", "partly", "mostly", "fully"),
    ),
    Scale(
        feedback.ALIGNMENT,
        "How well does the image match the prompt?",
        ("not at all", "little", "partly", "mostly", "fully"),
    ),
    Scale(
        feedback.AESTHETICS,
        "How beautiful is the image?",
        ("ugly", "rather ugly", "neither", "rather beautiful", "beautiful"),
    ),
    Scale(feedback.OVERALL, "How good is the image overall?", ("bad", "poor", "fair", "good", "excellent")),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """A project's settings.

    Attributes:
      title: the page's heading.
      raters: answers that each image gets, from as many raters.
      point_radius: radius of a point's disk, as a share of the image's height; in the file "height/20".
      kinds: the kinds of points that are asked, none if empty.
      words: the question for misaligned words; "" if they aren't asked.
      scales: the scales that are asked.
      calibration_items: gold items of the first round, after each of which a rater sees the right answers.
      calibration_threshold: mean score that passes the round, 0 to 1; see `answers.gold_score`.
      gold_rate: share of a rater's later items that are gold, 0 to below 1.
      lease_minutes: time from the last change for which an image is kept for its rater.
      seed: seed of the raters' orders.
      guidelines: the text of guidelines.md.
    """

    title: str = "Rich feedback"
    raters: int = 3
    point_radius: float = feedback.POINT_RADIUS
    kinds: tuple[Kind, ...] = _KINDS
    words: str = "Which words does the image get wrong or leave out?"
    scales: tuple[Scale, ...] = _SCALES
    calibration_items: int = 5
    calibration_threshold: float = 0.7
    gold_rate: float = 0.05
    lease_minutes: float = 60
    seed: int = 0
    guidelines: str = _DEFAULT_GUIDELINES

    @property
    def is_complete(self) -> bool:
        """Tells whether all parts are asked that RichHF-18K's records have."""
        asked = {part.name for part in (*self.kinds, *self.scales)}
        return asked == {*feedback.HEATMAPS, *feedback.SCORES} and bool(self.words)


# Settings of numbers -> type, lowest, highest.
_NUMBERS: settings.Limits = {
    "raters": (int, 1, settings.MOST_RATERS),
    "calibration_items": (int, 0, 1000),
    "calibration_threshold": (float, 0, 1),
    "gold_rate": (float, 0, 0.99),
    "lease_minutes": (float, 1, 1e6),
    "seed": (int, 0, 2**63),
}


def content_name(data: bytes) -> str:
    """Returns the name of an image's file, without its extension, by the image's bytes."""
    return hashlib.sha256(data).hexdigest()[:32]


def read_image(path: pathlib.Path) -> bytes:
    """Reads an image of a project. Where the file is a link, others may have changed the image.

    Raises:
      errors.UserError: it can't be read, or a link leads to another image than the one that was taken.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        place = f"{path}, a link to {path.readlink()}" if path.is_symlink() else path
        raise errors.UserError(f"{place}: {writing.reason(error)}. {_IMAGE_FIX}") from error
    if path.is_symlink() and content_name(data) != path.stem:
        raise errors.UserError(
            f"{path.readlink()} isn't the image any more that the project took. {_IMAGE_FIX}"
        )
    return data


def write_config(folder: pathlib.Path, config: Config) -> None:
    """Writes config.json and guidelines.md.

    Raises:
      OSError: they can't be written.
    """
    fields = dataclasses.asdict(config)
    fields["point_radius"] = ratings.radius_rule(config.point_radius)
    settings.write(folder, fields)


def read_config(folder: pathlib.Path) -> Config:
    """Reads config.json and guidelines.md. A setting that isn't there has its default.

    Raises:
      errors.UserError: the folder is no project, or a setting is wrong; the message names it.
    """
    what = "no project: it lacks {}; make one with `python -m richhf_jax.annotate init`"
    return settings.read(folder, DATABASE, what, _parsed)


def _parsed(values: dict[str, Any]) -> Config:
    settings.check(values, Config, ("title", "words"), _NUMBERS)
    if "point_radius" in values:
        try:
            values["point_radius"] = ratings.parse_radius(values["point_radius"])
        except ratings.RatingError as error:
            raise SettingError(str(error)) from None
    if "kinds" in values:
        values["kinds"] = tuple(Kind(**part) for part in _parts(values["kinds"], "kinds", feedback.HEATMAPS))
    if "scales" in values:
        parts = _parts(values["scales"], "scales", feedback.SCORES)
        values["scales"] = tuple(_scale(part) for part in parts)
    config = Config(**values)
    if not (config.kinds or config.words or config.scales):
        raise SettingError("nothing is asked: `kinds`, `words` and `scales` are all empty")
    return config


def _parts(parts: Any, name: str, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Checks a list of objects with distinct names and a question."""
    fields = {"name", "question"} | ({"anchors"} if name == "scales" else set())
    if not isinstance(parts, list) or not all(isinstance(p, dict) and set(p) == fields for p in parts):
        raise SettingError(f"`{name}` must be a list of objects with {', '.join(sorted(fields))}")
    found = [part["name"] for part in parts]
    if any(part not in names for part in found) or len(set(found)) < len(found):
        raise SettingError(f"names in `{name}` must be different ones of {', '.join(names)}; got {found}")
    if not all(isinstance(part["question"], str) and part["question"].strip() for part in parts):
        raise SettingError(f"each `question` in `{name}` must be text")
    return parts


def _scale(part: dict[str, Any]) -> Scale:
    anchors, steps = part["anchors"], feedback.LIKERT_MAX - feedback.LIKERT_MIN + 1
    if not (isinstance(anchors, list) and len(anchors) == steps and all(isinstance(a, str) for a in anchors)):
        raise SettingError(f"`anchors` of {part['name']} must be {steps} texts, the worst answer first")
    return Scale(part["name"], part["question"], tuple(anchors))
