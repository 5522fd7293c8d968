"""What the store gives and takes: items, people, work, answers, and why it refuses."""

import dataclasses
import json
import sqlite3
from typing import Any

from richhf_jax.annotate import answers as forms

# Answers' columns come first: of two with the same name, a row gives the first.
ANSWERS_BESIDE_ITEMS = (
    "SELECT answers.*, items.id AS item_id, items.* FROM answers JOIN items ON items.number = answers.item"
)

# Seconds of work on one image that a rater can have had, idle time left out.
MAX_SECONDS = 1_000_000


class NotYours(Exception):
    """The item was never given to this rater, or is no longer open for them."""


class Closed(NotYours):
    """The rater's answer is finished or skipped, or its lease expired and others took all places."""


class Conflict(Exception):
    """The answer has another revision than the caller knows: another tab has changed it."""

    def __init__(self, revision: int, answer: Any, suggestion: forms.Suggestion | None = None):
        super().__init__(f"the answer has revision {revision}")
        self.revision, self.answer, self.suggestion = revision, answer, suggestion


class Incomplete(Exception):
    """Parts of the answer are missing; `missing` names them."""

    def __init__(self, missing: list[str]):
        super().__init__(f"missing: {', '.join(missing)}")
        self.missing = missing


@dataclasses.dataclass(frozen=True)
class Item:
    """An image to rate.

    Attributes:
      id: the image's name for the user, as in raw ratings.
      prompt: the text that it was made from.
      file: the name of its file in the project's folder of images.
      width, height: pixels.
      gold: the right answer, see `answers`; None where none is known.
      priority: items of a higher one come first.
      suggestion: a model's answer, see `suggestions`; None where there is none.
    """

    id: str
    prompt: str
    file: str
    width: int
    height: int
    gold: forms.Answer | None = None
    priority: int = 0
    suggestion: forms.Suggestion | None = None


@dataclasses.dataclass(frozen=True)
class Person:
    """A rater or a manager. `passed`: whether a rater has passed the first round."""

    id: int
    name: str
    is_manager: bool
    active: bool
    passed: bool

    def known_as(self, names: bool) -> str:
        """Returns the name for an export: the true one, or the pseudonym."""
        return self.name if names else f"rater-{self.id}"


@dataclasses.dataclass(frozen=True)
class Work:
    """An item in a rater's hands.

    `state` is "draft", "done", "skipped" or "broken"; `seconds` is the time spent. `suggestion` is what the
    rater may see: None before their own first answer.
    """

    item: Item
    answer: forms.Answer
    revision: int
    state: str
    is_calibration: bool
    seconds: float
    suggestion: forms.Suggestion | None = None


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a rater is.

    Attributes:
      done: items done, without those of the first round.
      total_open: items that are still open for this rater.
      seconds: time spent.
      calibration_left: items left in the first round.
    """

    done: int
    total_open: int
    seconds: float
    calibration_left: int


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer as the manager sees it.

    Attributes:
      id: its number.
      item: the image.
      person: who gave it.
      answer: see `answers`.
      state: "draft", "done", "skipped" or "broken".
      revision: number of changes.
      seconds: time spent.
      started, changed: seconds since 1970.
      is_calibration: whether it belongs to the first round.
      score: `answers.gold_score`, or 0 for a skip in the first round; else None.
      reason: why the item was skipped.
      excluded: why the answer doesn't count; None where it counts.
      first: the rater's answer before they saw a suggestion; None where they saw none, or it isn't known.
      shown: the suggestion that they saw, {} if it isn't known; None where they saw none.
    """

    id: int
    item: Item
    person: Person
    answer: forms.Answer
    state: str
    revision: int
    seconds: float
    started: float
    changed: float
    is_calibration: bool
    score: float | None
    reason: str
    excluded: str | None
    first: forms.Answer | None
    shown: forms.Suggestion | None

    @property
    def has_time(self) -> bool:
        """Whether the time spent is known; raw ratings that were imported have none."""
        return self.seconds > 0

    @property
    def is_changed(self) -> bool:
        """Whether the rater changed their answer after they saw a suggestion; comments don't count."""
        return self.first is not None and self.first | {"comment": ""} != self.answer | {"comment": ""}


def size(row: sqlite3.Row) -> tuple[int, int]:
    """Returns the width and height of a row of `items`."""
    return row["width"], row["height"]


def parsed(text: str | None) -> Any:
    """Parses a column of JSON that may be empty."""
    return None if text is None else json.loads(text)


def person(row: sqlite3.Row) -> Person:
    """Makes a person of a row of `people`."""
    return Person(row["id"], row["name"], *(bool(row[name]) for name in ("is_manager", "active", "passed")))


def item(row: sqlite3.Row, name: str = "id") -> Item:
    """Makes an item of a row of `items`; `name` is the column of its id."""
    return Item(
        row[name],
        row["prompt"],
        row["file"],
        *size(row),
        parsed(row["gold"]),
        row["priority"],
        parsed(row["suggestion"]),
    )


def work(row: sqlite3.Row) -> Work:
    """Makes a rater's work of a row of ANSWERS_BESIDE_ITEMS."""
    return Work(
        item(row, "item_id"),
        json.loads(row["answer"]),
        row["revision"],
        row["state"],
        bool(row["is_calibration"]),
        row["seconds"],
        parsed(row["shown"]),
    )


def answer(row: sqlite3.Row, giver: Person) -> Answer:
    """Makes an answer of a row of ANSWERS_BESIDE_ITEMS."""
    same = ("state", "revision", "seconds", "started", "changed", "score", "reason", "excluded")
    return Answer(
        id=row["id"],
        item=item(row, "item_id"),
        person=giver,
        answer=json.loads(row["answer"]),
        is_calibration=bool(row["is_calibration"]),
        first=parsed(row["first"]),
        shown=parsed(row["shown"]),
        **{name: row[name] for name in same},
    )
