"""Prompts for `decoding.constrained_decode`, and labelled tokens from its decisions.

This code runs on the host, without TensorFlow or jax, in evaluation and prediction alike.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int32

from richhf_jax import errors, feedback

Encode = Callable[[str], Sequence[int]]

# Any word. The pieces that a marked word has in addition are the suffix.
_A_WORD = "a"


class KeywordPieces(NamedTuple):
    """A prompt's words in the vocabulary's pieces.

    Attributes:
      pieces: the pieces; 0 = padding.
      words: for each piece the number (from 1) of its word; 0 = padding.
      numbers: for each token of the prompt the number of its word; 0 where the vocabulary writes the token as
        nothing, or where there is no room for it.
    """

    pieces: Int32[np.ndarray, " length"]
    words: Int32[np.ndarray, " length"]
    numbers: Int32[np.ndarray, " tokens"]


def keyword_pieces(prompt: str, encode: Encode, length: int) -> KeywordPieces:
    """Prepares a prompt for the decoder.

    Example: 'a yellow, cat' with two pieces for "yellow", and a length of 6:

        pieces   a  yel  low  cat  0  0
        words    1    2    2    3  0  0
        numbers  1    2         3

    A word has the same pieces as in any text, because SentencePiece splits at spaces first. Its suffix has
    the pieces that it has after the word "a". A few vocabularies join a suffix to some words' last piece (or
    unknown characters to one piece); with these, a marked word is spelt unlike in training. A token that the
    vocabulary writes as nothing (a zero-width space, if the vocabulary drops it) isn't decided.

    Args:
      prompt: the prompt as people see it.
      encode: the vocabulary's function from text to ids, without EOS.
      length: most pieces that the decoder writes, EOS included. Pieces beyond are left out.
    """
    pieces, words, numbers = [], [], []
    for token in feedback.tokenize_prompt(prompt):
        # Words that there is no room for needn't be encoded.
        plain = list(encode(token)) if len(pieces) < length else []
        number = words[-1] + 1 if words else 1
        pieces += plain
        words += [number] * len(plain)
        numbers.append(number if plain else 0)
    result = np.zeros((2, length), np.int32)
    count = min(len(pieces), length)
    result[:, :count] = pieces[:count], words[:count]
    return KeywordPieces(result[0], result[1], np.array(numbers, np.int32))


def features(
    prompts: Sequence[KeywordPieces], rows: int, length: int, suffix: Sequence[int]
) -> dict[str, Int32[np.ndarray, "{rows} ..."]]:
    """Makes the features of a batch that let `models.RahfModel` decode by constraint.

    Args:
      prompts: the prompts, prepared for this length.
      rows: rows of the batch; those without a prompt are padding, and end at once.
      length: most pieces that the decoder writes.
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
    words: KeywordPieces,
    probability: Float[np.ndarray, " length"],
    misaligned: Bool[np.ndarray, " length"],
) -> tuple[feedback.Token, ...]:
    """Labels the prompt's tokens by the decoder's decisions.

    A token's `probability` is the model's probability that the suffix follows. It is conditional: either the
    suffix follows or the text goes on without it, and the words before are written as decided. A token that
    the decoder's length didn't reach is aligned and has no probability.

    Args:
      prompt: the prompt given to `keyword_pieces`.
      words: what that made of it.
      probability, misaligned: the decisions, by number of the word; NaN where there was none.

    Raises:
      errors.NotFiniteError: there is no decision on the first word, though the decoder has room for it.
    """
    # The first word is decided after its pieces. Without that decision, NaN isn't a lack of room.
    if 0 < np.sum(words.words == 1) < len(words.words) and np.isnan(probability[0]):
        raise errors.NotFiniteError("keyword probabilities")
    found = []
    for token, number in zip(feedback.tokenize_prompt(prompt), words.numbers, strict=True):
        if number == 0 or np.isnan(probability[number - 1]):
            found.append(feedback.Token(token, False))
        else:
            share = float(probability[number - 1])
            found.append(feedback.Token(token, bool(misaligned[number - 1]), share))
    return tuple(found)


def suffix_pieces(encode: Encode) -> list[int]:
    """Returns the suffix of a misaligned word in the vocabulary's pieces.

    Raises:
      errors.UserError: the vocabulary can't write it.
    """
    plain, marked = list(encode(_A_WORD)), list(encode(_A_WORD + feedback.MISALIGNED_SUFFIX))
    suffix = marked[len(plain) :]
    if marked[: len(plain)] != plain or not suffix:
        raise errors.UserError(
            f"the vocabulary writes {_A_WORD!r} as {plain}, but {_A_WORD + feedback.MISALIGNED_SUFFIX!r} as"
            f" {marked}: keywords can't be marked with it; use another vocabulary, or free decoding"
        )
    return suffix
