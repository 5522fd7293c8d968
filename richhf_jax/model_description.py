"""The description of a model in its checkpoint directory: model.json and vocabulary.model.

Training and conversion write both. Prediction needs nothing else beside the checkpoints, neither gin nor
TensorFlow. The entries of model.json:

    variant, decoder_sees_image          attributes of `network.rahf.Rahf`
    t5_config, vit_config, heads_config  the fields of its configurations
    feature_lengths                      {"image": side in pixels, "inputs": tokens, "targets": tokens}
    fit                                  how pictures become square, see `pixels.square`
    misalignment_threshold               words with a higher probability of being misaligned are marked
    training                             facts about the training, for people: {"task", ...}
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from richhf_jax import errors, feedback, models, pixels, writing
from richhf_jax.network import rahf, t5, vit

FILE = "model.json"
VOCABULARY_FILE = "vocabulary.model"

_CONFIGS = {"t5_config": t5.T5Config, "vit_config": vit.ViTConfig, "heads_config": rahf.HeadsConfig}


@dataclasses.dataclass(frozen=True)
class ModelDescription:
    """The entries of model.json, see the module; `vocabulary` is a SentencePiece model, None if unknown."""

    network: rahf.Rahf
    feature_lengths: Mapping[str, int]
    fit: str
    misalignment_threshold: float
    training: Mapping[str, Any]
    vocabulary: bytes | None

    def write(self, directory: epath.PathLike) -> None:
        """Writes the files into an existing directory."""
        content = models.describe_rahf(
            self.network, self.feature_lengths, self.fit, self.misalignment_threshold
        )
        write(directory, content | {"training": dict(self.training)}, self.vocabulary)


def write(directory: epath.PathLike, content: Mapping[str, Any], vocabulary: bytes | None) -> None:
    """Writes a model's description and its vocabulary into an existing directory.

    Args:
      directory: a MODEL_DIR, or an export.
      content: the result of `models.BaseModel.describe`, and "training".
      vocabulary: a SentencePiece model; None writes no vocabulary.
    """
    directory = epath.Path(directory)
    if vocabulary is not None:
        writing.write(directory / VOCABULARY_FILE, vocabulary)
    writing.write(directory / FILE, json.dumps(content, indent=2) + "\n")


def read(directory: epath.PathLike, dtype: str | None = None) -> ModelDescription:
    """Reads the files of `ModelDescription.write`.

    Args:
      directory: a MODEL_DIR, or an export.
      dtype: type of activations, 'float32' or 'bfloat16'; None: that of the training.

    Raises:
      errors.UserError: a file or an entry is missing or has a wrong value; the message says which.
    """
    directory = epath.Path(directory)
    path, vocabulary = directory / FILE, directory / VOCABULARY_FILE
    if not path.exists():
        raise errors.UserError(
            f"{directory} has no {FILE}, which says what its model is. Training writes it at its start: give"
            " the training's command again (a finished one ends at once), or name another directory"
        )
    if not vocabulary.exists():
        raise errors.UserError(
            f"{directory} has no {VOCABULARY_FILE}: copy the SentencePiece model that the training used to it"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return _parse(content, vocabulary.read_bytes(), {"dtype": dtype} if dtype else {})
    except KeyError as error:
        raise errors.UserError(f"{path} lacks {error}") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise errors.UserError(f"{path} makes no sense: {error}") from error


def _parse(content: Mapping[str, Any], vocabulary: bytes, overrides: Mapping[str, Any]) -> ModelDescription:
    configs = {}
    for name, config in _CONFIGS.items():
        given = _tuples(content[name])
        known = {field.name for field in dataclasses.fields(config)}
        if unknown := given.keys() - known:
            raise ValueError(f"{name} has an unknown {min(unknown)!r}; it is of another version")
        configs[name] = config(**given | {key: value for key, value in overrides.items() if key in known})
    if content["variant"] not in feedback.VARIANTS:
        raise ValueError(f"variant must be one of {feedback.VARIANTS}, got {content['variant']!r}")
    if content["fit"] not in pixels.FITS:
        raise ValueError(f"fit must be one of {pixels.FITS}, got {content['fit']!r}")
    return ModelDescription(
        rahf.Rahf(
            variant=content["variant"], decoder_sees_image=bool(content["decoder_sees_image"]), **configs
        ),
        {name: int(content["feature_lengths"][name]) for name in models.DESCRIBED_LENGTHS},
        content["fit"],
        float(content["misalignment_threshold"]),
        content["training"],
        vocabulary,
    )


def _tuples(value: Any) -> Any:
    """Turns JSON's lists into tuples, because a configuration must be hashable."""
    if isinstance(value, list):
        return tuple(map(_tuples, value))
    if isinstance(value, dict):
        return {name: _tuples(part) for name, part in value.items()}
    return value
