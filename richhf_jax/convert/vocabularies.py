"""Finds the vocabulary of weights: the one that lies beside them, or one that the user names.

Another vocabulary of as many tokens would change every prediction without a word. So the weights' own is
taken wherever it is known, and a different one is refused.
"""

import importlib.util
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from richhf_jax import clip_tokens, model_description
from richhf_jax.convert import clip
from richhf_jax.convert.source import ConvertError, Source

# The name of CLIP's small vocabulary of `tasks/`, which the gin files of the synthetic data give. The weights
# that were trained with it have it beside them, so no other weights get it by this name.
_SMALL_CLIP = "clip_small"
_SMALL_SENTENCEPIECE = "sentencepiece_small.model"
_LEAVE_OUT = "Leave VOCABULARY out, or give --gin.VOCABULARY=None"


def find(model: Any, paths: Sequence[str], named: str | None) -> bytes | None:
    """Finds the vocabulary for predictions with converted weights.

    Args:
      model: the model for the weights, a `models.BaseModel` of a system.
      paths: where the weights are.
      named: for CLIP, path of a tokenizer.json or of a directory with a vocabulary. For RAHF, path of a
        SentencePiece model; only a local one is read. None: that of the weights, or for RAHF the small one of
        `tasks/`.

    Returns:
      Content of the vocabulary's file; None: the system reads no text, or the SentencePiece model isn't here.

    Raises:
      errors.UserError: a vocabulary is damaged, is another model's, or differs from that of the weights; or
        there is none for CLIP.
    """
    if not isinstance(named, str | None):
        raise ConvertError(f"VOCABULARY = {named!r} is no text, but the path of a vocabulary is needed")
    folders = list(dict.fromkeys(map(_folder, paths)))
    file = model_description.SYSTEMS[model.system].vocabulary_file
    if file == clip_tokens.FILE:
        return _clip(model, folders, named)
    return _sentencepiece(folders, named) if file else None


def check_table(model: Any, source: Source) -> None:
    """Checks that CLIP's weights have as many tokens as the model.

    Without it, the weights' own vocabulary would be called another model's.

    Args:
      model: the model for the weights, a `models.BaseModel` of a system.
      source: the opened weights.

    Raises:
      ConvertError: they have another number.
    """
    if model_description.SYSTEMS[model.system].vocabulary_file != clip_tokens.FILE:
        return
    table = source.tensors.get(clip.TABLE)
    if table is not None and table.shape[0] != model.vocab_size:
        raise ConvertError(
            f"{source.path} is of another size: it has {table.shape[0]} tokens, the model {model.vocab_size}."
            " Give the gin file of its size, e.g. --gin_file=sizes/clip_l14.gin; or of a size of your own,"
            f" --gin.clip.TextConfig.vocab_size={table.shape[0]}"
        )


def _folder(path: str) -> pathlib.Path:
    """Returns the directory with the files beside weights: of a checkpoint_<step>, that is its MODEL_DIR."""
    place = pathlib.Path(os.path.abspath(path))  # A hub's cache has links, which are not followed.
    is_inside = place.is_file() or re.fullmatch(r"checkpoint_\d+", place.name)
    return place.parent if is_inside else place


def _clip(model: Any, folders: Sequence[pathlib.Path], named: str | None) -> bytes:
    found = []
    for folder in folders:
        if content := model_description.read_vocabulary(folder, clip_tokens.FILE):
            found.append(clip_tokens.ClipTokens(content, str(folder / clip_tokens.FILE)))
        elif clip_tokens.is_in(folder):
            found.append(clip_tokens.read(folder))
    if named and named != _SMALL_CLIP:
        found.append(clip_tokens.read(named))
    if not found:
        raise ConvertError(
            f"{', '.join(map(str, folders))}: beside the weights is no {clip_tokens.FILE}, nor vocab.json and"
            " merges.txt, and any other vocabulary would make every prediction wrong. Copy the one that was"
            " published with the weights there, or name it: --gin.VOCABULARY=PATH"
        )
    tokens, *others = found
    for other in others:
        if not tokens.is_same(other):
            raise ConvertError(
                f"{other.name} isn't the vocabulary of the weights, {tokens.name}. {_LEAVE_OUT}"
            )
    tokens.check_fits(model.vocab_size, model.module.text_config.end_id)
    for folder in folders:
        if (start := clip.start_id(folder)) not in (None, tokens.start_id):
            raise ConvertError(
                f"{tokens.name} begins a text with the id {tokens.start_id}, but in {folder / 'config.json'}"
                f" bos_token_id is {start}: it is another model's vocabulary. {clip_tokens.FIX}"
            )
    return tokens.content


def _sentencepiece(folders: Sequence[pathlib.Path], named: str | None) -> bytes | None:
    place = _small_sentencepiece() if named is None else pathlib.Path(named)
    content = place.read_bytes() if place.is_file() else None
    for folder in folders:
        own = model_description.read_vocabulary(folder, model_description.VOCABULARY_FILE)
        if own is None:
            continue
        if named is not None and content not in (None, own):
            raise ConvertError(
                f"{named} isn't the vocabulary of the weights,"
                f" {folder / model_description.VOCABULARY_FILE}. {_LEAVE_OUT}"
            )
        return own
    return content


def _small_sentencepiece() -> pathlib.Path:
    """Finds the vocabulary beside `tasks`, without importing `tasks` and so TensorFlow."""
    tasks = importlib.util.find_spec("tasks")
    # `tasks` is installed with this package.
    assert tasks is not None
    assert tasks.origin is not None
    return pathlib.Path(tasks.origin).parent / _SMALL_SENTENCEPIECE
