"""Describes synthetic scenes in words: phrases, prompts, and how a picture can disagree with them.

A prompt is an opening and one to three phrases: "a drawing of one large red circle, a star and two
blue rings". Shapes and colours are all different within a prompt.
"""

import bisect
import dataclasses
import hashlib
import itertools

import numpy as np

from richhf_jax import feedback

SHAPES = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "star": "stars",
    "cross": "crosses",
    "ring": "rings",
}
COLOURS = ("red", "orange", "green", "blue", "white", "black")
SIZES = ("small", "large")
COUNT_WORDS = {1: "one", 2: "two", 3: "three"}
ARTICLE = "a"
OPENINGS = ("", "", "", "a picture of ", "a drawing of ", "an image of ")
LAST_JOINTS = (" and ", " with ")
MAX_DESCRIBED_OBJECTS = 4
PHRASE_COUNT_WEIGHTS = (0.45, 0.37, 0.18)  # of one, two and three phrases

# Relative frequency of each kind of misalignment, among the kinds that are possible for the phrase.
MISALIGNMENT_WEIGHTS = {"colour": 0.55, "shape": 0.17, "size": 0.08, "count": 0.08, "missing": 0.12}
P_MISALIGNED_PROMPT = 0.45
P_SECOND_MISALIGNMENT = 0.15
SPLIT_BUCKETS = {"train": range(2, 10), "validation": range(1, 2), "test": range(1)}


@dataclasses.dataclass(frozen=True)
class Phrase:
    """A group of equal objects. `size` is None where the phrase says none."""

    count_word: str
    size: str | None
    colour: str
    shape: str

    @property
    def count(self) -> int:
        """Number of objects in the group."""
        return next((n for n, word in COUNT_WORDS.items() if word == self.count_word), 1)

    def tokens(self) -> list[tuple[str, str]]:
        """Returns (word, what it says: count, size, colour or shape), in the prompt's order."""
        noun = self.shape if self.count == 1 else SHAPES[self.shape]
        size = [(self.size, "size")] if self.size else []
        rest = [*size, (self.colour, "colour"), (noun, "shape")]
        vowel = self.count_word == ARTICLE and rest[0][0][0] in "aeiou"
        return [("an" if vowel else self.count_word, "count"), *rest]

    def __str__(self) -> str:
        return " ".join(word for word, _ in self.tokens())


@dataclasses.dataclass(frozen=True)
class Misalignment:
    """A phrase that the picture contradicts; `kind` is a key of MISALIGNMENT_WEIGHTS."""

    phrase_index: int
    kind: str

    def concerns(self, phrase: Phrase, attribute: str) -> bool:
        """Tells whether the phrase's word for `attribute` is misaligned (an article never is)."""
        if attribute == "count" and phrase.count_word == ARTICLE:
            return False
        return self.kind in ("missing", attribute)


@dataclasses.dataclass(frozen=True)
class Description:
    """A prompt in parts."""

    opening: str
    phrases: tuple[Phrase, ...]
    last_joint: str

    @property
    def prompt(self) -> str:
        """The prompt's text."""
        *first, last = map(str, self.phrases)
        return self.opening + (", ".join(first) + self.last_joint + last if first else last)

    def labels(self, misalignments: tuple[Misalignment, ...]) -> list[int]:
        """Returns the true label of each token into which `feedback.tokenize_prompt` splits the prompt."""
        labels = [feedback.ALIGNED] * len(self.opening.split())
        for index, phrase in enumerate(self.phrases):
            if index and index == len(self.phrases) - 1:
                labels.append(feedback.ALIGNED)  # "and", "with"
            wrong = [m for m in misalignments if m.phrase_index == index]
            for _, attribute in phrase.tokens():
                misaligned = any(m.concerns(phrase, attribute) for m in wrong)
                labels.append(feedback.MISALIGNED if misaligned else feedback.ALIGNED)
        return labels

    @property
    def split(self) -> str:
        """Split of this content, whatever the order of the phrases, the opening and the joints."""
        content = "|".join(sorted(map(str, self.phrases)))
        bucket = hashlib.sha256(content.encode()).digest()[0] % 10
        return next(split for split, buckets in SPLIT_BUCKETS.items() if bucket in buckets)


def parse(prompt: str) -> Description:
    """Parses a prompt of this module's, whatever its opening and joint; the inverse of `Description.prompt`.

    Raises:
      ValueError: it isn't such a prompt.
    """
    opening = max((o for o in OPENINGS if prompt.startswith(o)), key=len)
    rest = prompt[len(opening) :]
    joint = next((j for j in LAST_JOINTS if j in rest), "")
    parts = rest.replace(joint, ", ").split(", ") if joint else [rest]
    description = Description(
        opening, tuple(_parse_phrase(part, prompt) for part in parts), joint or LAST_JOINTS[0]
    )
    if description.prompt != prompt:
        raise ValueError(f"{prompt!r} is no prompt of the synthetic world")
    return description


def _parse_phrase(text: str, prompt: str) -> Phrase:
    count_word, *rest = text.split(" ")
    size = rest.pop(0) if rest and rest[0] in SIZES else None
    singular = {plural: shape for shape, plural in SHAPES.items()} | {shape: shape for shape in SHAPES}
    if len(rest) != 2 or rest[0] not in COLOURS or rest[1] not in singular:
        raise ValueError(f"{prompt!r} is no prompt of the synthetic world: see {text!r}")
    return Phrase(ARTICLE if count_word == "an" else count_word, size, rest[0], singular[rest[1]])


def choice(rng: np.random.Generator, items, weights=None):
    """Draws one of `items` and returns it unchanged (numpy's choice turns strings into numpy strings)."""
    if weights is None:
        return items[rng.integers(len(items))]
    ends = list(itertools.accumulate(weights))
    return items[bisect.bisect(ends, rng.random() * ends[-1], hi=len(items) - 1)]


def sample_description(rng: np.random.Generator, split: str) -> Description:
    """Draws a description that belongs to `split`.

    Raises:
      ValueError: there is no such split.
    """
    if split not in SPLIT_BUCKETS:
        raise ValueError(f"no split {split!r}: known are {', '.join(SPLIT_BUCKETS)}")
    while True:
        count = choice(rng, (1, 2, 3), PHRASE_COUNT_WEIGHTS)
        shapes = rng.permutation(len(SHAPES))[:count]
        colours = rng.permutation(len(COLOURS))[:count]
        phrases = tuple(
            Phrase(
                count_word=choice(rng, (ARTICLE, *COUNT_WORDS.values()), (0.6, 0.17, 0.15, 0.08)),
                size=choice(rng, (None, *SIZES), (0.5, 0.25, 0.25)),
                colour=COLOURS[colour],
                shape=list(SHAPES)[shape],
            )
            for shape, colour in zip(shapes, colours, strict=True)
        )
        description = Description(choice(rng, OPENINGS), phrases, choice(rng, LAST_JOINTS, (0.8, 0.2)))
        if sum(p.count for p in phrases) <= MAX_DESCRIBED_OBJECTS and description.split == split:
            return description


def sample_misalignments(
    rng: np.random.Generator, description: Description
) -> tuple[tuple[Misalignment, ...], list[Phrase | None]]:
    """Draws what the picture gets wrong.

    The probability doesn't depend on the prompt, and a wrong attribute is as likely as the named one. So
    neither the prompt nor the picture alone tells whether they agree.

    Returns:
      The misalignments, and what is drawn for each phrase (None = nothing). Drawn colours and shapes are all
      different too, and the prompt names no wrong one.
    """
    drawn: list[Phrase | None] = list(description.phrases)
    if rng.random() >= P_MISALIGNED_PROMPT:
        return (), drawn
    wrong = 1 if len(drawn) == 1 or rng.random() >= P_SECOND_MISALIGNMENT else 2
    misalignments = []
    for index in rng.permutation(len(drawn))[:wrong]:
        phrase = description.phrases[index]
        kinds = [kind for kind in MISALIGNMENT_WEIGHTS if _possible(kind, phrase, drawn)]
        kind = choice(rng, kinds, [MISALIGNMENT_WEIGHTS[kind] for kind in kinds])
        named = [*description.phrases, *filter(None, drawn)]
        drawn[index] = _contradict(rng, kind, phrase, named)
        misalignments.append(Misalignment(int(index), kind))
    return tuple(misalignments), drawn


def _possible(kind: str, phrase: Phrase, drawn: list[Phrase | None]) -> bool:
    if kind == "missing":
        return len(drawn) > 1 and None not in drawn
    if kind == "size":
        return phrase.size is not None
    return kind != "count" or phrase.count_word != ARTICLE


def _contradict(rng: np.random.Generator, kind: str, phrase: Phrase, named: list[Phrase]) -> Phrase | None:
    match kind:
        case "missing":
            return None
        case "colour":
            unused = [c for c in COLOURS if c not in {p.colour for p in named}]
            return dataclasses.replace(phrase, colour=choice(rng, unused))
        case "shape":
            unused = [s for s in SHAPES if s not in {p.shape for p in named}]
            return dataclasses.replace(phrase, shape=choice(rng, unused))
        case "size":
            return dataclasses.replace(phrase, size=SIZES[1 - SIZES.index(phrase.size)])
        case "count":
            count = choice(rng, (1, 3)) if phrase.count == 2 else 2
            return dataclasses.replace(phrase, count_word=COUNT_WORDS[count])
    raise ValueError(kind)
