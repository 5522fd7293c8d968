"""The prompt as `decoding.constrained_decode` copies it, and what the decoder decided -> labelled tokens.

Runs on the host, without TensorFlow or jax: evaluation and prediction use the same.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int32

from richhf_jax import errors, feedback

Encode = Callable[[str], Sequence[int]]

# Any word: what a marked one has more is the suffix in the vocabulary's pieces.
_A_WORD = "a"


class KeywordPieces(NamedTuple):
    """A prompt's words in the vocabulary's pieces.

    Attributes:
      pieces: int32 [length], 0 = padding.
      words: int32 [length], the number (from 1) of the word that a piece is of; 0 = padding.
      numbers: int32 [tokens], for each token of the prompt the number of its word; 0 where the vocabulary
        writes it as nothing, or there is no room for it.
    """

    pieces: Int32[np.ndarray, " length"]
    words: Int32[np.ndarray, " length"]
    numbers: Int32[np.ndarray, " tokens"]


def keyword_pieces(prompt: str, encode: Encode, length: int) -> KeywordPieces:
    """Prepares a prompt for the decoder.

    Of 'a yellow, cat', where the vocabulary has two pieces for "yellow", and a length of 6
        pieces   a  yel  low  cat  0  0
        words    1    2    2    3  0  0
        numbers  1    2         3

    A word is written in the same pieces as in any text, since SentencePiece splits at spaces first; its
    suffix in those that it has behind the word "a". Few vocabularies join a suffix to some words' last
    piece (or unknown characters to one piece): in these a marked word is spelt as no training text has it.
    A token that the vocabulary writes as nothing (a zero-width space, where it drops these) isn't decided.

    Args:
      prompt: as people see it.
      encode: the vocabulary's: text -> ids, without EOS.
      length: what the decoder writes at most, EOS included. Pieces beyond are left out.
    """
    pieces, words, numbers = [], [], []
    for token in feedback.tokenize_prompt(prompt):
        # A long prompt's last words needn't be encoded: there is no room for them.
        plain = list(encode(token)) if len(pieces) < length else []
        number = words[-1] + 1 if words else 1
        pieces += plain
        words += [number] * len(plain)
        numbers.append(number if plain else 0)
    result = np.zeros((2, length), np.int32)
    count = min(len(pieces), length)
    result[:, :count] = pieces[:count], words[:count]
    return KeywordPieces(*result, np.array(numbers, np.int32))


def features(
    prompts: Sequence[KeywordPieces], rows: int, length: int, suffix: Sequence[int]
) -> dict[str, Int32[np.ndarray, "{rows} ..."]]:
    """Prompts -> the features of a batch that make `models.RahfModel` decode by constraint.

    Args:
      prompts: prepared for this length.
      rows: of the batch; those without a prompt are padding, and end at once.
      length: what the decoder writes at most.
      suffix: see `suffix_pieces`.

    Returns:
      {"keyword_pieces", "keyword_words": int32 [rows, 1, length], "keyword_suffix": int32 [rows, pieces]}
    """
    stacked = np.zeros((2, rows, 1, length), np.int32)
    for row, prompt in enumerate(prompts):
        stacked[:, row, 0] = prompt.pieces, prompt.words
    return {
        "keyword_pieces": stacked[0],
        "keyword_words": stacked[1],
        "keyword_suffix": np.tile(np.array(suffix, np.int32), (rows, 1)),
    }


def tokens(
    prompt: str,
    numbers: Int32[np.ndarray, " tokens"],
    probability: Float[np.ndarray, " length"],
    misaligned: Bool[np.ndarray, " length"],
) -> tuple[feedback.Token, ...]:
    """What the decoder decided -> the prompt's tokens, each with its label.

    A token's `probability` is the model's that the suffix follows, given that either the suffix follows or
    the text goes on without it, and given what it decided for the words before. A token that wasn't decided,
    because the decoder's length ended before, is aligned and has no probability.

    Args:
      prompt, numbers: as given to `keyword_pieces`, and what it made.
      probability, misaligned: float32 and bool [length], by number of the word; NaN where it wasn't decided.
    """
    found = []
    for token, number in zip(feedback.tokenize_prompt(prompt), numbers, strict=True):
        if number == 0 or np.isnan(probability[number - 1]):
            found.append(feedback.Token(token, False))
        else:
            share = float(probability[number - 1])
            found.append(feedback.Token(token, bool(misaligned[number - 1]), share))
    return tuple(found)


def suffix_pieces(encode: Encode) -> list[int]:
    """The suffix of a misaligned word in the vocabulary's pieces.

    Raises:
      errors.UserError: the vocabulary has no way to write it.
    """
    plain, marked = list(encode(_A_WORD)), list(encode(_A_WORD + feedback.MISALIGNED_SUFFIX))
    suffix = marked[len(plain) :]
    if marked[: len(plain)] != plain or not suffix:
        raise errors.UserError(
            f"the vocabulary writes {_A_WORD!r} as {plain}, but {_A_WORD + feedback.MISALIGNED_SUFFIX!r} as"
            f" {marked}: keywords can't be marked with it; use another vocabulary, or free decoding"
        )
    return suffix
