"""A survey's folder and its settings.

    SURVEY/survey.db        people, pairs of images and answers; see `store`
    SURVEY/config.json      the settings: see `Config`
    SURVEY/guidelines.md    what raters read first, in Markdown
    SURVEY/images/          the images as PNG, named by their content

Both text files may be edited; a server reads them when it starts.
"""

import dataclasses
import pathlib
from typing import Any

from richhf_jax import feedback
from richhf_jax.annotate import settings
from richhf_jax.survey.answers import ANSWERS

DATABASE, IMAGES = "survey.db", "images"
# Question -> its wording. The paper's Table 5 asks for plausibility.
QUESTIONS = {
    feedback.PLAUSIBILITY: "Which image is more plausible? An image with fewer artifacts is more plausible.",
    feedback.ALIGNMENT: "Which image matches the prompt better?",
    feedback.AESTHETICS: "Which image is more beautiful?",
    feedback.OVERALL: "Which image is better overall?",
}
_GUIDELINES = """\
You see two images, A and B, that were made from the same prompt. Read the prompt, look at both images, then
answer the question above the five buttons.

- Which image is called A is decided by chance, each time anew.
- Judge only what the question asks.
- "About the same" is an answer, too: take it if you see no difference that matters.
- Press and hold an image to see both enlarged at the same place.
- Some pairs test attention: both images may be the same, or a pair may come again.
"""


@dataclasses.dataclass(frozen=True)
class Config:
    """A survey's settings.

    Attributes:
      title: the page's heading.
      question: what raters are asked.
      answers: the five answers in words, from "A is much better" to "B is much better".
      raters: answers that each pair gets, from as many raters.
      check_rate: share of a rater's pairs that check attention, 0 to below 1.
      lease_minutes: time from the last change for which a pair is kept for its rater.
      seed: seed of the raters' orders, the sides and the checks.
      guidelines: the text of guidelines.md.
    """

    title: str = "Which image is better?"
    question: str = QUESTIONS[feedback.PLAUSIBILITY]
    answers: tuple[str, ...] = (
        "A is much better",
        "A is better",
        "about the same",
        "B is better",
        "B is much better",
    )
    raters: int = 3
    check_rate: float = 0.1
    lease_minutes: float = 60
    seed: int = 0
    guidelines: str = _GUIDELINES


_NUMBERS: settings.Limits = {
    "raters": (int, 1, settings.MOST_RATERS),
    "check_rate": (float, 0, 0.5),
    "lease_minutes": (float, 1, 1e6),
    "seed": (int, 0, 2**63),
}


def write_config(folder: pathlib.Path, config: Config) -> None:
    """Writes config.json and guidelines.md.

    Raises:
      OSError: they can't be written.
    """
    settings.write(folder, dataclasses.asdict(config))


def read_config(folder: pathlib.Path) -> Config:
    """Reads config.json and guidelines.md. A setting that isn't there has its default.

    Raises:
      errors.UserError: the folder is no survey, or a setting is wrong; the message names it.
    """
    missing = "no survey: it lacks {}; make one with `python -m richhf_jax.survey init`"
    return settings.read(folder, DATABASE, missing, _parsed)


def _parsed(fields: dict[str, Any]) -> Config:
    settings.check(fields, Config, ("title", "question"), _NUMBERS)
    if not fields.get("question", " x").strip():
        raise settings.SettingError("`question` must not be empty")
    if "answers" in fields:
        answers = fields["answers"]
        is_right = isinstance(answers, list) and len(answers) == len(ANSWERS)
        if not is_right or not all(isinstance(text, str) and text.strip() for text in answers):
            raise settings.SettingError(f"`answers` must be {len(ANSWERS)} texts, the best for A first")
        fields = fields | {"answers": tuple(answers)}
    return Config(**fields)
