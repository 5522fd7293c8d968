"""The domain's vocabulary: kinds of score and heatmap, task strings, the `_0` suffix, the record.

All other modules take these names from here. RichHF-18K's own field names (`artifact_score`, ...) appear
nowhere else. This module needs only numpy.
"""

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from richhf_jax import errors

SCORES = PLAUSIBILITY, ALIGNMENT, AESTHETICS, OVERALL = ("plausibility", "alignment", "aesthetics", "overall")
HEATMAPS = IMPLAUSIBILITY, MISALIGNMENT = ("implausibility", "misalignment")
KEYWORDS = "keywords"

# RichHF-18K's fields. https://github.com/google-research/google-research/tree/master/richhf_18k
FILENAME_FIELD = "filename"
SCORE_FIELDS = {
    PLAUSIBILITY: "artifact_score",
    ALIGNMENT: "misalignment_score",
    AESTHETICS: "aesthetics_score",
    OVERALL: "overall_score",
}
HEATMAP_FIELDS = {IMPLAUSIBILITY: "artifact_map", MISALIGNMENT: "misalignment_map"}
KEYWORDS_FIELD = "prompt_misalignment_label"

# Fields that are joined to a record from Pick-a-Pic, because the TFRecords lack them.
IMAGE_FIELD = "image"
PROMPT_FIELD = "prompt"

MISALIGNED, ALIGNED = 0, 1
MISALIGNED_SUFFIX = "_0"

# The augmented-prompt variant puts one of these before the prompt ("implausibility heatmap" is the
# paper's own example, section 4.1.2).
HEATMAP_TASK_STRINGS = {kind: f"{kind} heatmap" for kind in HEATMAPS}
SCORE_TASK_STRINGS = {kind: f"{kind} score" for kind in SCORES}
KEYWORDS_TASK_STRING = "misaligned keywords"
CAPTION_TASK_STRING = "caption"

# RAHF's two variants (section 4.1.2). Multi-head: a head for each kind, all on the plain prompt. Augmented
# prompt: one head for all scores and one for all heatmaps; a task string before the prompt names the kind.
VARIANTS = MULTI_HEAD, AUGMENTED_PROMPT = ("multi_head", "augmented_prompt")

LIKERT_MIN, LIKERT_MAX = 1, 5
# A marked point covers a disk of this radius, as a share of the image's height (section 3.1).
POINT_RADIUS = 1 / 20

SEPARATORS = re.compile(r'[,.?!":; ]+')


class Slots(NamedTuple):
    """Number of outputs of each kind that an example has. A kind with count 0 costs nothing."""

    heatmaps: int
    scores: int
    texts: int

    def prompts(self, variant: str) -> int:
        """Returns the number of prompts of an image: one for all slots (multi-head), or one a slot.

        The prompts of the augmented-prompt variant have the order of the fields.
        """
        return 1 if variant == MULTI_HEAD else sum(self)


ALL_SLOTS = Slots(len(HEATMAPS), len(SCORES), 1)


@dataclasses.dataclass(frozen=True)
class Outputs:
    """The kinds that a system predicts.

    Attributes:
      scores: kinds of `SCORES`, in the order of its array of scores.
      heatmaps: kinds of `HEATMAPS`, in the order of its array of heatmaps.
      keywords: whether it says which words of the prompt are misaligned.
      score_range: the least and the greatest value that a score can have.
    """

    scores: tuple[str, ...]
    heatmaps: tuple[str, ...]
    keywords: bool
    score_range: tuple[float, float] = (0.0, 1.0)


ALL_OUTPUTS = Outputs(SCORES, HEATMAPS, True)


def task_prompts(variant: str, prompt: str) -> list[str]:
    """Returns the prompts of an example that has `ALL_SLOTS`, in the order of its slots.

    >>> task_prompts('multi_head', 'a cat')
    ['a cat']
    >>> task_prompts('augmented_prompt', 'a cat')[::3]
    ['implausibility heatmap a cat', 'alignment score a cat', 'misaligned keywords a cat']
    """
    if variant == MULTI_HEAD:
        return [prompt]
    tasks = (*HEATMAP_TASK_STRINGS.values(), *SCORE_TASK_STRINGS.values(), KEYWORDS_TASK_STRING)
    return [f"{task} {prompt}" for task in tasks]


def standardise_rating(rating: float) -> float:
    """Turns a 5-point Likert rating s into a score in [0, 1]: (s - 1) / 4 (section 3.4)."""
    return (rating - LIKERT_MIN) / (LIKERT_MAX - LIKERT_MIN)


def rating_of_score(score: float) -> float:
    """Turns a score in [0, 1] into a 5-point Likert rating; the inverse of `standardise_rating`."""
    return LIKERT_MIN + (LIKERT_MAX - LIKERT_MIN) * score


def tokenize_prompt(prompt: str) -> list[str]:
    """Splits a prompt into the tokens that RichHF-18K labels, one label a token.

    >>> tokenize_prompt('A red cat, "happy" as ever!')
    ['A', 'red', 'cat', 'happy', 'as', 'ever']
    """
    return [token for token in SEPARATORS.split(prompt) if token]


def parse_labels(text: str) -> list[int]:
    """Parses RichHF-18K's labels: '1 1 0 1' -> [1, 1, 0, 1].

    Raises:
      ValueError: a label is neither 0 nor 1.
    """
    labels = text.split()
    if bad := [label for label in labels if label not in ("0", "1")]:
        raise ValueError(f"labels must be 0 (misaligned) or 1 (aligned), got {bad[0]!r} in {text!r}")
    return [int(label) for label in labels]


def format_labels(labels: Sequence[int]) -> str:
    """Formats labels as RichHF-18K does: [1, 1, 0, 1] -> '1 1 0 1'."""
    return " ".join(str(int(label)) for label in labels)


def mark_misaligned(tokens: Sequence[str], labels: Sequence[int]) -> str:
    """Makes the decoder's target string from tokens and labels.

    >>> mark_misaligned(['a', 'yellow', 'cat'], [1, 0, 1])
    'a yellow_0 cat'

    Raises:
      ValueError: the counts differ.
    """
    if len(tokens) != len(labels):
        raise ValueError(f"{len(tokens)} tokens but {len(labels)} labels")
    pairs = zip(tokens, labels, strict=True)
    return " ".join(t + MISALIGNED_SUFFIX if label == MISALIGNED else t for t, label in pairs)


def labels_from_text(tokens: Sequence[str], text: str) -> list[int]:
    """Reads one label for each prompt token from the decoder's text, and tolerates mistakes of the model.

    If `mark_misaligned` could have made the text, its labels are returned, whatever the tokens are. In any
    other text, the words (without suffix) are matched with the prompt's tokens, ignoring case. A token takes
    the label of its word. Words in place of as many other tokens are matched in order. Tokens without a word
    are aligned (label 1), and words without a token are ignored.

    >>> labels_from_text(['a', 'yellow', 'cat'], 'a yellow_0 cat')
    [1, 0, 1]
    >>> labels_from_text(['a', 'yellow', 'cat'], 'yelow_0 cat')   # a misspelt word, and a missing one
    [1, 1, 1]
    >>> labels_from_text(['a', 'yellow', 'cat'], 'a yelow_0 cat')
    [1, 0, 1]
    """
    exact = _exact_labels(tokens, text)
    if exact is not None:
        return exact
    tokens = [token.lower() for token in tokens]
    known = set(tokens)
    words, labels = [], []
    for word in text.lower().split():
        # A prompt may contain a word that ends in "_0"; the same word in the text is aligned.
        marked = word.endswith(MISALIGNED_SUFFIX) and word not in known
        words.append(word.removesuffix(MISALIGNED_SUFFIX) if marked else word)
        labels.append(MISALIGNED if marked else ALIGNED)
    result = [ALIGNED] * len(tokens)
    matcher = difflib.SequenceMatcher(None, tokens, words, autojunk=False)
    for tag, token_start, token_end, word_start, word_end in matcher.get_opcodes():
        if tag == "equal" or (tag == "replace" and token_end - token_start == word_end - word_start):
            result[token_start:token_end] = labels[word_start:word_end]
    return result


def _exact_labels(tokens: Sequence[str], text: str) -> list[int] | None:
    """Returns the labels from which `mark_misaligned` makes `text`; None if there are none."""
    words = text.split(" ") if text else []
    if len(words) != len(tokens):
        return None
    labels = []
    for token, word in zip(tokens, words, strict=True):
        if word not in (token, token + MISALIGNED_SUFFIX):
            return None
        labels.append(ALIGNED if word == token else MISALIGNED)
    return labels


@dataclasses.dataclass(frozen=True)
class Token:
    """One prompt token; `probability` is that of being misaligned, None if the decoder gives none."""

    text: str
    misaligned: bool
    probability: float | None = None


@dataclasses.dataclass(frozen=True)
class RichFeedback:
    """Rich feedback on one image and its prompt, from people or from a model.

    What is unknown is absent. So a kind that a model doesn't predict has no value at all.

    Attributes:
      id: the image's name (RichHF-18K's `filename`).
      prompt: the text the image was generated from; "" where a model that reads no text was given none.
      scores: kind -> [0, 1], higher is better. The kinds are those of `SCORES`. A model's may have another
        range, see `Outputs.score_range`.
      heatmaps: kind -> float32 [height, width] in [0, 1]. The kinds are those of `HEATMAPS`.
      tokens: the prompt's tokens, labelled; None: nothing says which of them are misaligned.
      uncertainty: kind of score -> standard deviation of the score, in its own unit; {} if nothing tells.
    """

    id: str
    prompt: str
    scores: Mapping[str, float]
    heatmaps: Mapping[str, np.ndarray]
    tokens: Sequence[Token] | None
    uncertainty: Mapping[str, float] = dataclasses.field(default_factory=dict, kw_only=True)

    @classmethod
    def from_outputs(
        cls,
        id: str,
        prompt: str,
        scores: np.ndarray | Sequence[float],
        heatmaps: Sequence[np.ndarray],
        tokens: Sequence[Token] | None,
        deviations: np.ndarray | None = None,
        outputs: Outputs = ALL_OUTPUTS,
        **more: Any,
    ) -> Self:
        """Makes feedback from a model's outputs, which have no names.

        Args:
          id, prompt, tokens: as the attributes.
          scores: float [scores], in the order of `outputs.scores`.
          heatmaps: one float32 [height, width] each, in the order of `outputs.heatmaps`.
          deviations: the scores' standard deviations, in the same order; None: the model gives none.
          outputs: the kinds that the model predicts.
          more: further attributes of a subclass.
        """
        kinds = outputs.scores
        return cls(
            id=id,
            prompt=prompt,
            scores=dict(zip(kinds, map(float, scores), strict=True)),
            heatmaps=dict(zip(outputs.heatmaps, heatmaps, strict=True)),
            tokens=tokens,
            uncertainty={} if deviations is None else dict(zip(kinds, map(float, deviations), strict=True)),
            **more,
        )

    def calibrated(self, factors: Mapping[str, float]) -> Self:
        """Returns the feedback with each kind's uncertainty multiplied by its factor; without one, by 1."""
        deviations = {kind: value * factors.get(kind, 1) for kind, value in self.uncertainty.items()}
        return dataclasses.replace(self, uncertainty=deviations)

    @property
    def labels(self) -> list[int]:
        """One label a token: 0 = misaligned, 1 = aligned; [] where there are no tokens."""
        return [MISALIGNED if token.misaligned else ALIGNED for token in self.tokens or ()]

    def to_dict(self) -> dict:
        """Returns the JSON form of `predictions.jsonl`, without the heatmaps' pixels and what is absent."""
        record: dict[str, Any] = {"id": self.id, "prompt": self.prompt}
        if self.scores:
            record["scores"] = {kind: float(value) for kind, value in self.scores.items()}
        if self.uncertainty:
            record["uncertainty"] = dict(self.uncertainty)
        if self.tokens is not None:
            record["tokens"] = [dataclasses.asdict(token) for token in self.tokens]
        return record


def check_finite(
    scores: np.ndarray | Sequence[float],
    heatmaps: np.ndarray | Sequence[np.ndarray],
    deviations: np.ndarray | None = None,
) -> None:
    """Checks a model's outputs, of any shape; () stands for those that it lacks.

    Raises:
      errors.NotFiniteError: one has a value that is NaN or infinite.
    """
    for name, values in {"scores": scores, "heatmaps": heatmaps, "uncertainties": deviations}.items():
        if values is not None and not np.isfinite(values).all():
            raise errors.NotFiniteError(name)


def label_tokens(prompt: str, labels: Sequence[int]) -> tuple[Token, ...]:
    """Splits a prompt into tokens and gives each its label.

    Raises:
      ValueError: the counts differ.
    """
    tokens = tokenize_prompt(prompt)
    if len(tokens) != len(labels):
        raise ValueError(f"the prompt has {len(tokens)} tokens but there are {len(labels)} labels")
    return tuple(Token(t, label == MISALIGNED) for t, label in zip(tokens, labels, strict=True))
