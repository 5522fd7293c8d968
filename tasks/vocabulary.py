"""The vocabulary of every task: the small model shipped here, or any SentencePiece model that gin names.

    VOCABULARY = 'gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model'

Tasks are registered on import, before gin files are parsed. So tasks hold a `ConfiguredVocabulary`, which
asks gin for the file when it is first needed.
"""

import functools
import pathlib
from typing import cast

import gin
import seqio
import tensorflow as tf
from google.protobuf import message

from richhf_jax import errors

SMALL_MODEL = str(pathlib.Path(__file__).parent / "sentencepiece_small.model")


@gin.configurable
def get_vocabulary(path: str | None = None) -> seqio.SentencePieceVocabulary:
    """Loads a SentencePiece model, once per file.

    Args:
      path: local or gs://; None: the small model shipped here.

    Raises:
      errors.UserError: the file can't be read, or is no SentencePiece model.
    """
    return _load(path or SMALL_MODEL)


@functools.lru_cache
def _load(path: str) -> seqio.SentencePieceVocabulary:
    vocabulary = seqio.SentencePieceVocabulary(path, extra_ids=0)
    try:
        vocabulary.vocab_size  # noqa: B018 (loads it)
    except (OSError, RuntimeError, message.DecodeError, tf.errors.OpError) as error:
        raise errors.UserError(
            f"{path}: no SentencePiece model can be read there ({error}); set the macro VOCABULARY to one, "
            "e.g. to the `spiece.model` of a T5 on Hugging Face"
        ) from error
    return vocabulary


class ConfiguredVocabulary(seqio.Vocabulary):
    """The vocabulary that `get_vocabulary` names at the time of use."""

    @property
    def eos_id(self) -> int:
        return cast(int, get_vocabulary().eos_id)

    @property
    def unk_id(self) -> int:
        return cast(int, get_vocabulary().unk_id)

    @property
    def _base_vocab_size(self) -> int:
        return get_vocabulary().vocab_size

    @property
    def sp_model(self) -> bytes:
        """The SentencePiece model, serialised."""
        return cast(bytes, get_vocabulary().sp_model)

    def _encode(self, s):
        return get_vocabulary().encode(s)

    def _decode(self, ids):
        return get_vocabulary().decode(ids)

    def _encode_tf(self, s):
        return get_vocabulary().encode_tf(s)

    def _decode_tf(self, ids):
        return get_vocabulary().decode_tf(ids)

    def __eq__(self, other):
        return isinstance(other, ConfiguredVocabulary)

    def __hash__(self):
        return hash(ConfiguredVocabulary)
