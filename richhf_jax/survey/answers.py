"""The schema of a survey's answers, and the check of each line.

A file of answers is JSON Lines: one line is one rater's answer on two images of the same prompt.

    prompt_id  str    the same for all pairs of images of this prompt
    prompt     str    its text
    rater_id   str
    left       str    generator of the left image, as the rater saw the pair
    right      str    generator of the right image
    answer     int    the left image is: 1 = much better, 2 = better, 3 = about the same, 4 = worse,
                      5 = much worse
    check      str    optional, for attention checks: "identical" (both images are the same, and so are left
                      and right), or "swapped" (a pair again, with its sides exchanged)

A rater answers on a pair of generators once a prompt, besides checks. Further fields and blank lines are
ignored.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from richhf_jax import foreign_text
from richhf_jax.inputs.record import InputError, parsed_json, whole

# Answers from the first one, about the left image. Their middle one is a tie.
ANSWERS = MUCH_BETTER, BETTER, SAME, WORSE, MUCH_WORSE = (1, 2, 3, 4, 5)
CHECKS = IDENTICAL, SWAPPED = ("identical", "swapped")
_TEXTS = ("prompt_id", "prompt", "rater_id", "left", "right")


class AnswerError(ValueError):
    """A line breaks the schema; the message says where and how."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """One rater's answer; see the module. `check` is "" for an answer that counts."""

    prompt_id: str
    prompt: str
    rater_id: str
    left: str
    right: str
    answer: int
    check: str = ""

    def of(self, generator: str) -> int:
        """Returns the answer as if this generator's image, one of the two, had been the left one."""
        return self.answer if generator == self.left else MUCH_BETTER + MUCH_WORSE - self.answer

    def key(self) -> tuple[str, str, frozenset[str]]:
        """Returns the prompt's id, the rater and the two generators."""
        return self.prompt_id, self.rater_id, frozenset((self.left, self.right))


def parse_answer(line: str | bytes) -> Answer:
    """Reads and checks one line.

    Raises:
      AnswerError: the line breaks the schema.
    """
    try:
        fields = parsed_json(line)
    except InputError as error:
        raise AnswerError(str(error)) from None
    if not isinstance(fields, dict):
        raise AnswerError(f"a line must be a JSON object, got {_show(fields)}")
    texts = {name: _text(fields, name) for name in _TEXTS}
    answer = whole(fields.get("answer"))
    if type(answer) is not int or answer not in ANSWERS:
        raise AnswerError(f"answer must be 1 to 5, got {_show(fields.get('answer'))}")
    check = fields.get("check") or ""
    if check and check not in CHECKS:
        raise AnswerError(f"check must be {' or '.join(CHECKS)}, or absent, got {_show(check)}")
    if (check == IDENTICAL) != (texts["left"] == texts["right"]):
        raise AnswerError(
            f"left and right are {_show(texts['left'])} and {_show(texts['right'])}: they are the same in a"
            f" check {IDENTICAL!r}, and differ otherwise"
        )
    return Answer(**texts, answer=answer, check=check)


def read_answers(lines: Iterable[str | bytes]) -> Iterator[tuple[int, Answer | AnswerError]]:
    """Checks the lines of a file, each by itself and against the earlier lines.

    Yields:
      The line's number, from 1, and its answer or what is wrong with the line.
    """
    prompts: dict[str, tuple[int, str]] = {}
    seen: dict[Any, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            answer = parse_answer(line)
            known, prompt = prompts.setdefault(answer.prompt_id, (number, answer.prompt))
            if prompt != answer.prompt:
                raise AnswerError(f"prompt of {answer.prompt_id!r} differs from line {known}")
            known = seen.setdefault((*answer.key(), answer.check), number)
            if known != number:
                raise AnswerError(
                    f"rater {answer.rater_id!r} has already answered on this pair of {answer.prompt_id!r} in"
                    f" line {known}"
                )
            yield number, answer
        except AnswerError as error:
            yield number, error


def _show(value: Any) -> str:
    return foreign_text.excerpt(repr(value))


def _text(fields: dict, name: str) -> str:
    text = fields.get(name)
    if not isinstance(text, str) or foreign_text.is_blank(text):
        raise AnswerError(f"{name} must be a text that isn't empty, got {_show(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise AnswerError(f"{name} can't be written as UTF-8: {error.reason}") from None
    return text
