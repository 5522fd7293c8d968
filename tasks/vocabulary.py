"""The vocabulary of every task: the small model shipped here, or one that gin names.

    VOCABULARY = 'gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model'
    VOCABULARY = 'clip-vit-base-patch32/tokenizer.json'

A file that ends in .json is CLIP's, any other a SentencePiece model.

Tasks are registered on import, before gin files are parsed. So tasks hold a `ConfiguredVocabulary`, which
asks gin for the file when it is first needed.
"""

import functools
import pathlib
from collections.abc import Callable
from typing import cast

import gin
import numpy as np
import seqio
import tensorflow as tf
from google.protobuf import message

from richhf_jax import clip_tokens, errors

# CLIP's kind, for VOCABULARY.
SMALL_CLIP = str(pathlib.Path(__file__).parent / "clip_small.json")
SMALL_MODEL = str(pathlib.Path(__file__).parent / "sentencepiece_small.model")
# Names of shipped vocabularies, in place of a path.
_NAMES = {"clip_small": SMALL_CLIP}


@gin.configurable
def get_vocabulary(path: str | None = None) -> "seqio.SentencePieceVocabulary | ClipVocabulary":
    """Loads a vocabulary, once per file.

    Args:
      path: local or gs://; None: the small SentencePiece model shipped here; "clip_small": CLIP's kind, also
        shipped here.

    Raises:
      errors.UserError: the file can't be read, or is no SentencePiece model; or if it ends in .json, is no
        vocabulary of CLIP's.
    """
    return _load(_NAMES.get(path or "", path or SMALL_MODEL))


@functools.lru_cache
def _load(path: str) -> "seqio.SentencePieceVocabulary | ClipVocabulary":
    if path.endswith(".json"):
        return ClipVocabulary(clip_tokens.read(path))
    vocabulary = seqio.SentencePieceVocabulary(path, extra_ids=0)
    try:
        vocabulary.vocab_size  # noqa: B018 (loads it)
    except (OSError, RuntimeError, message.DecodeError, tf.errors.OpError) as error:
        raise errors.UserError(
            f"{path}: no SentencePiece model can be read there ({error}); set the macro VOCABULARY to one, "
            "e.g. to the `spiece.model` of a T5 on Hugging Face"
        ) from error
    return vocabulary


class ClipVocabulary(seqio.Vocabulary):
    """CLIP's vocabulary. It has no id for padding: 0 is the id of a piece, but follows a text's end only."""

    def __init__(self, tokens: clip_tokens.ClipTokens):
        super().__init__()
        self._tokens = tokens

    @property
    def bos_id(self) -> int:
        return self._tokens.start_id

    @property
    def eos_id(self) -> int:
        return self._tokens.end_id

    @property
    def unk_id(self) -> None:
        return None

    @property
    def _base_vocab_size(self) -> int:
        return self._tokens.size

    @property
    def sp_model(self) -> bytes:
        """The tokenizer.json."""
        return self._tokens.content

    def encode_rows(self, texts: tf.Tensor, length: int) -> tuple[tf.Tensor, tf.Tensor]:
        """Encodes texts as CLIP cuts and ends them, see `ClipTokens.encode`; as `preprocessors.encode`."""

        def encode(texts):
            ids, words_cut = self._tokens.encode([text.decode() for text in texts], length)
            return ids, words_cut.max(initial=0)

        ids, words_cut = tf.numpy_function(encode, [texts], (tf.int32, tf.int32), stateful=False)
        return tf.ensure_shape(ids, [texts.shape[0], length]), tf.ensure_shape(words_cut, [])

    def _encode(self, s):
        return [self.bos_id, *self._tokens.pieces(s)]

    def _decode(self, ids):
        return self._tokens.decode(ids)

    def _encode_tf(self, s):
        def encode(text):
            return np.array(self._encode(np.asarray(text).item().decode()), np.int32)

        return tf.ensure_shape(tf.numpy_function(encode, [s], tf.int32, stateful=False), [None])

    def _decode_tf(self, ids):
        def decode(ids):
            return self._decode(ids.tolist()).encode()

        return tf.ensure_shape(tf.numpy_function(decode, [ids], tf.string, stateful=False), [])

    def __eq__(self, other):
        return isinstance(other, ClipVocabulary) and other.sp_model == self.sp_model

    def __hash__(self):
        return hash(self.sp_model)


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
    def encode_rows(self) -> Callable[[tf.Tensor, int], tuple[tf.Tensor, tf.Tensor]] | None:
        """`ClipVocabulary.encode_rows`; None: SentencePiece's texts are cut by `preprocessors`."""
        return getattr(get_vocabulary(), "encode_rows", None)

    @property
    def sp_model(self) -> bytes:
        """The SentencePiece model, serialised; or a tokenizer.json."""
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
