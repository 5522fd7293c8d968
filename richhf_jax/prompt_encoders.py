"""Turns prompts into a system's tokens, as its training does, but without TensorFlow."""

import re
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import sentencepiece
from jaxtyping import Int32

from richhf_jax import errors, keywords

SENTENCEPIECE_FILE = "vocabulary.model"
# The characters that TensorFlow's `tf.strings.split`, and so the training, splits at.
_SPACES = re.compile(r"[ \t\n\v\f\r]+")


class PromptEncoder(Protocol):
    """Turns prompts into tokens."""

    def encode(
        self, texts: Sequence[str], length: int
    ) -> tuple[Int32[np.ndarray, "texts length"], Int32[np.ndarray, " texts"]]:
        """Encodes prompts.

        Args:
          texts: the prompts, with a task string if the variant has any.
          length: number of tokens of each.

        Returns:
          The tokens, 0 behind a text's end; and of each text the number of words that are missing, wholly or
          partly.
        """
        ...


class SentencePieceEncoder:
    """RAHF's encoder of prompts, and of the words that its decoder marks.

    Attributes:
      eos_id: the token behind a text.
      suffix: the suffix of a misaligned word, in the vocabulary's pieces.
    """

    def __init__(self, vocabulary: bytes | None, rows: int):
        """Loads a vocabulary.

        Args:
          vocabulary: a SentencePiece model.
          rows: number of token ids in the network's table.

        Raises:
          errors.UserError: the vocabulary is missing or damaged, is another model's, or can't mark keywords.
        """
        self._vocabulary = load_sentencepiece(vocabulary)
        pieces = self._vocabulary.vocab_size()
        if pieces > rows:
            raise errors.UserError(
                f"{SENTENCEPIECE_FILE} has {pieces} pieces, the model {rows}: it is another model's"
            )
        self.eos_id: int = self._vocabulary.eos_id()
        self.suffix = keywords.suffix_pieces(self._vocabulary.encode)

    def encode(
        self, texts: Sequence[str], length: int
    ) -> tuple[Int32[np.ndarray, "texts length"], Int32[np.ndarray, " texts"]]:
        """Encodes prompts as `preprocessors.encode` does; see `PromptEncoder.encode`."""
        result = np.zeros((len(texts), length), np.int32)
        words_cut = np.zeros(len(texts), np.int32)
        for row, text in enumerate(texts):
            pieces = self._vocabulary.encode(text)
            if len(pieces) > length - 1:
                text, words_cut[row] = self._cut_at_word(text, length - 1)
                pieces = self._vocabulary.encode(text)[: length - 1]
            result[row, : len(pieces) + 1] = [*pieces, self.eos_id]
        return result, words_cut

    def _cut_at_word(self, text: str, room: int) -> tuple[str, int]:
        """Returns the words that fit into `room` pieces (at least one), and the number of words cut."""
        words = [word for word in _SPACES.split(text) if word]
        ends = np.cumsum([len(pieces) for pieces in self._vocabulary.encode(words)])
        fitting = int(np.sum(ends <= room))
        kept = max(fitting, 1)
        # A text that is too long loses something, whatever its words alone come to.
        return " ".join(words[:kept]) if kept < len(words) else text, max(len(words) - fitting, 1)

    def keyword_pieces(self, prompt: str, length: int) -> keywords.KeywordPieces:
        """Returns a prompt's words for the decoder, which writes at most so many pieces."""
        return keywords.keyword_pieces(prompt, self._vocabulary.encode, length)


def load_sentencepiece(model: bytes | None) -> sentencepiece.SentencePieceProcessor:
    """Loads a SentencePiece model from its bytes.

    Raises:
      errors.UserError: there are no bytes, or they are no SentencePiece model.
    """
    if model is None:
        raise errors.UserError(f"the model has no {SENTENCEPIECE_FILE}: prediction needs it")
    vocabulary = sentencepiece.SentencePieceProcessor()
    try:
        vocabulary.LoadFromSerializedProto(model)
    except RuntimeError as error:
        raise errors.UserError(
            f"{SENTENCEPIECE_FILE} beside model.json is damaged, or no SentencePiece model: copy the model's"
            " own vocabulary there"
        ) from error
    return vocabulary
