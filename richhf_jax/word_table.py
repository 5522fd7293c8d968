"""The table of words with which captions are made wrong: classes whose words exclude each other.

    Words({"colour": {"words": {"red": 2, "blue": 1}, "role": "modifier"},
           "animal": {"words": ["dog/dogs", "cat/cats"], "role": "noun", "once": True}})

`Words` is what a user writes, in `datasets.caption_words` or in gin; `Words.entries` are its arrays.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from richhf_jax import errors, feedback

ROLES = NOUN, MODIFIER, NUMBER, OTHER = ("noun", "modifier", "number", "other")


def _check_texts(where: str, texts: Any) -> None:
    """Checks that these are texts in lower case, without empty ones."""
    if not isinstance(texts, list | tuple) or any(
        not isinstance(text, str) or not text or text != text.lower() for text in texts
    ):
        raise errors.UserError(f"{where} must be a list of texts in lower case, got {texts!r}")


def _check_number(where: str, number: Any) -> None:
    if type(number) not in (int, float) or not 0 <= number < np.inf:
        raise errors.UserError(f"{where} must be a number, 0 or more, got {number!r}")


@dataclasses.dataclass(frozen=True)
class WordClass:
    """Words of which at most one is true of the same thing, so that any other is wrong.

    Attributes:
      words: the words in lower case, or word -> frequency; nouns as 'star/stars', singular and plural.
      role: 'noun'; 'number' or 'modifier' (they stand before nouns); 'other'.
      weight: how often a word of this class is exchanged, in proportion to the other classes.
      once: whether a caption names each word of the class at most once. Words that it names twice then stay,
        and no exchange makes a second one.
      values: of a number class, how many things each word means.
      unless: words beside which the class stays as it is: 'his' agrees with 'man'.

    Raises:
      errors.UserError: the class makes no sense; the message doesn't name it.
    """

    words: Sequence[str] | Mapping[str, float]
    role: str
    weight: float = 1.0
    once: bool = False
    values: Sequence[int] = ()
    unless: Sequence[str] = ()

    def __post_init__(self):
        """Checks the fields' types, and that they fit together."""
        if self.role not in ROLES:
            raise errors.UserError(f"role must be {', '.join(ROLES)}, got {self.role!r}")
        if not isinstance(self.words, Mapping | list | tuple):
            raise errors.UserError(f"words must be a list or a dictionary, got {self.words!r}")
        _check_texts("words", list(self.words))
        _check_texts("unless", self.unless)
        frequencies = self.frequencies()
        if len(frequencies) < len(self.words):
            raise errors.UserError(f"it has a word twice: {list(self.words)}")
        for name, number in {"weight": self.weight, **frequencies}.items():
            _check_number(name, number)
        if len(frequencies) < 2 or min(frequencies.values()) <= 0:
            raise errors.UserError("it needs two words or more, with frequencies above 0")
        if not isinstance(self.once, bool):
            raise errors.UserError(f"once must be True or False, got {self.once!r}")
        if not isinstance(self.values, list | tuple) or any(
            type(value) is not int or value < 1 for value in self.values
        ):
            raise errors.UserError(f"values must be numbers of 1 or more, got {self.values!r}")
        if len(self.values) != (len(frequencies) if self.role == NUMBER else 0):
            raise errors.UserError("a class of numbers needs a value for each word, others none")
        for word in frequencies:
            self._check_form(word)

    def _check_form(self, word: str) -> None:
        parts = word.split("/")
        is_noun = self.role == NOUN
        if len(parts) != 1 + is_noun or any(feedback.tokenize_prompt(part) != [part] for part in parts):
            form = "'star/stars'" if is_noun else "'red'"
            raise errors.UserError(f"{word!r} must have the form {form}, in lower case")

    def frequencies(self) -> dict[str, float]:
        """Returns word -> frequency, 1 each if the table has none."""
        return dict(self.words) if isinstance(self.words, Mapping) else dict.fromkeys(self.words, 1.0)


@dataclasses.dataclass(frozen=True)
class Words:
    """The table of words.

    Attributes:
      classes: name -> fields of `WordClass`.
      swap_weight: how often two nouns of a class are swapped. Their phrases must differ in a word of the same
        class, else the caption might stay true: 'a dog and a cat'.
      phrase_weight: how often all words of a phrase are exchanged; the phrase has more than the noun.
      compounds: words that are exchanged nowhere in this company: 'hot dog'.
      most_objects: captions never name more things than this; None: any number.
      impossible: captions that never occur, tokens in lower case, joined by spaces.
      unless: words that make captions with them stay true: of 'no dogs', 'no cats' is as true.

    Raises:
      errors.UserError: the table makes no sense.
    """

    classes: Mapping[str, Mapping]
    swap_weight: float = 1.0
    phrase_weight: float = 1.0
    compounds: Sequence[str] = ()
    most_objects: int | None = None
    impossible: Sequence[str] = ()
    unless: Sequence[str] = ()

    def __post_init__(self):
        """Checks the fields' types."""
        if not isinstance(self.classes, Mapping) or not self.classes:
            raise errors.UserError("table of words: classes must be a dictionary with a class or more")
        for name in ("compounds", "impossible", "unless"):
            _check_texts(f"table of words: {name}", getattr(self, name))
        for name in ("swap_weight", "phrase_weight"):
            _check_number(f"table of words: {name}", getattr(self, name))
        if self.most_objects is not None and (type(self.most_objects) is not int or self.most_objects < 1):
            raise errors.UserError(
                f"table of words: most_objects must be 1 or more, or None, got {self.most_objects!r}"
            )

    @classmethod
    def changed(cls, fields: Mapping[str, Any], **changes) -> Self:
        """Makes a table of `fields`, some of them changed.

        Raises:
          errors.UserError: a change has the name of no field.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if unknown := set(changes) - set(names):
            raise errors.UserError(
                f"the table of words has no field {min(unknown)!r}, only {', '.join(names)}"
            )
        return cls(**{**fields, **changes})

    @functools.cached_property
    def word_classes(self) -> Sequence[WordClass]:
        """The classes, checked."""
        made = []
        for name, fields in self.classes.items():
            try:
                made.append(WordClass(**fields))
            except (TypeError, errors.UserError) as error:
                raise errors.UserError(f"class {name!r} of the table of words: {error}") from None
        return made

    @functools.cached_property
    def entries(self) -> "Entries":
        """The table as arrays."""
        return _make_entries(self)


class Entries(NamedTuple):
    """The words as arrays. Entry 0, "-", stands for all words that the table lacks.

    Attributes:
      singular, plural: string [entries], the word's forms; equal unless it is a noun.
      of_class: int32 [entries], number of its class from 1.
      role: string [entries].
      value: int32 [entries], how many things a number word means; 0 for other words.
      weight: float32 [entries]; an exchange draws by them among the other words of the class.
      accepted: float32 [entries], the share of exchanges of this word that take place.
      once: bool [entries].
      kinds: float32 [classes + 2], weights of an exchange in each class, a swap, a phrase.
    """

    singular: np.ndarray
    plural: np.ndarray
    of_class: np.ndarray
    role: np.ndarray
    value: np.ndarray
    weight: np.ndarray
    accepted: np.ndarray
    once: np.ndarray
    kinds: np.ndarray


def exchange_weights(frequencies: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the weights w by which an exchange draws among the other words, so that frequencies stay.

    [0.425, 0.375, 0.2] -> w such that w0 w1 = 0.3, w0 w2 = 0.125, w1 w2 = 0.075; all exchanges accepted

    Word i becomes j with probability w_j / (sum of w - w_i). Its frequency is w_i (sum of w - w_i), so i
    becomes j as often as j becomes i: w_i w_j. Otherwise rare words were a sign of a corrupted caption.

    Args:
      frequencies: of two words or more, above 0.

    Returns:
      The weights, and the share of each word's exchanges that take place: below 1 only for a word that is
      more frequent than (nearly) all others together.
    """
    shares = np.array(frequencies) / np.sum(frequencies)
    # At the limit itself, three words or more would need infinite weights.
    most = (1 - shares) * (1 if len(shares) == 2 else 0.9)
    flows = np.minimum(shares, most)
    weights, last = np.sqrt(flows), 0
    while np.abs(weights - last).max() > 1e-12:
        last, weights = weights, np.sqrt(weights * flows / (weights.sum() - weights))
    accepted = flows / shares
    return weights, accepted


def _make_entries(words: Words) -> Entries:
    rows: list[tuple] = [("-", "-", 0, "", 0, 0.0, 0.0, False)]
    for number, word_class in enumerate(words.word_classes, start=1):
        rows += _class_rows(number, word_class)
    forms = [form for singular, plural, *_ in rows[1:] for form in {singular, plural}]
    if double := {form for form in forms if forms.count(form) > 1}:
        raise errors.UserError(f"the table of words has {min(double)!r} twice; each word has one meaning")
    kinds = [word_class.weight for word_class in words.word_classes]
    kinds = np.array([*kinds, words.swap_weight, words.phrase_weight], np.float32)
    if not np.isfinite(kinds).all() or not kinds.any():
        raise errors.UserError(f"weights of the table of words must be finite, and one above 0: {kinds}")
    singular, plural, of_class, role, value, weight, accepted, once = map(np.array, zip(*rows, strict=True))
    return Entries(
        singular,
        plural,
        of_class.astype(np.int32),
        role,
        value.astype(np.int32),
        weight.astype(np.float32),
        accepted.astype(np.float32),
        once,
        kinds,
    )


def _class_rows(number: int, word_class: WordClass) -> list[tuple]:
    frequencies = word_class.frequencies()
    weights, accepted = exchange_weights(list(frequencies.values()))
    values = word_class.values or [0] * len(frequencies)
    rows = []
    for word, value, weight, share in zip(frequencies, values, weights, accepted, strict=True):
        singular, _, plural = word.partition("/")
        rows.append(
            (singular, plural or singular, number, word_class.role, value, weight, share, word_class.once)
        )
    return rows
