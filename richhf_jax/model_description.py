"""The description of a model in its checkpoint directory: model.json and vocabulary.model.

Training and conversion write both. Prediction needs nothing else beside the checkpoints, neither gin nor
TensorFlow. The entries of model.json:

    variant, decoder_sees_image          attributes of `network.rahf.Rahf`
    t5_config, vit_config, heads_config  the fields of its configurations
    feature_lengths                      {"image": side in pixels, "inputs": tokens, "targets": tokens}
    fit                                  how pictures become square, see `pixels.square`
    misalignment_threshold               words with a higher probability of being misaligned are marked
    calibration                          of the uncertainties, if there is one: see `Calibration`
    training                             facts about the training, for people: {"task", ...}
    checksums                            {"vocabulary.model": its checksum, "model.json": that of all
                                         other entries, see `checksums.of_json`}

Another vocabulary, or another entry, changes every score without a word. So files that differ from their
checksums are refused. Files without the entry `checksums` are taken: older versions wrote none, and whoever
changes a file on purpose removes it.
"""

import contextlib
import dataclasses
import json
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from richhf_jax import allowed_values, checksums, errors, feedback, models, reading, writing
from richhf_jax.network import rahf, t5, vit

FILE = "model.json"
VOCABULARY_FILE = "vocabulary.model"

_CHECKSUMS = "checksums"
_LARGEST = 2**20  # bytes of model.json
_MOST_TOKENS = 2**14  # in the encoder: there are arrays of this size squared
_FIX = (
    "Bring it back from a copy; or give the training's command again, which writes it anew (a finished one"
    " ends at once)"
)
NOT_CALIBRATED = (
    "the uncertainties aren't calibrated for this checkpoint, so they may be too large or too small as a"
    " whole: calibrate them with `python -m richhf_jax.calibrate`"
)
_MEANT = f'if the change is meant, remove the entry "{_CHECKSUMS}" from {FILE}'

# Entry -> its type.
_ENTRIES = {
    "variant": str,
    "decoder_sees_image": bool,
    "fit": str,
    "misalignment_threshold": float,
    "training": Mapping[str, Any],
}
_CONFIGS = {"t5_config": t5.T5Config, "vit_config": vit.ViTConfig, "heads_config": rahf.HeadsConfig}


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Factors that make the uncertainties of one checkpoint as large as its errors are.

    Attributes:
      step: the checkpoint's step; other checkpoints are not calibrated.
      deviation_factors: kind of score -> factor of its standard deviations.
      task, split, examples: the data that they were found on.
    """

    step: int
    deviation_factors: Mapping[str, float]
    task: str
    split: str
    examples: int

    @classmethod
    def parse(cls, content: Any) -> "Calibration":
        """Checks the entry of model.json.

        Raises:
          TypeError, ValueError: a value is missing or wrong.
        """
        calibration = cls(**content)
        for name, hint in typing.get_type_hints(cls).items():
            _check_value(name, getattr(calibration, name), hint, f"calibration.{name}")
        if set(calibration.deviation_factors) != set(feedback.SCORES):
            raise ValueError(f"calibration.deviation_factors must have {', '.join(feedback.SCORES)}")
        return calibration


@dataclasses.dataclass(frozen=True)
class ModelDescription:
    """The entries of model.json, see the module; `vocabulary` is a SentencePiece model, None if unknown."""

    network: rahf.Rahf
    feature_lengths: Mapping[str, int]
    fit: str
    misalignment_threshold: float
    training: Mapping[str, Any]
    vocabulary: bytes | None
    calibration: Calibration | None = None

    def of_step(self, step: int) -> "ModelDescription":
        """Returns the description of the checkpoint of this step: no other one's calibration is its own."""
        if self.calibration is None or self.calibration.step == step:
            return self
        return dataclasses.replace(self, calibration=None)

    @property
    def deviation_factors(self) -> Mapping[str, float]:
        """Kind of score -> factor of its standard deviations; all 1 without a calibration."""
        return self.calibration.deviation_factors if self.calibration else dict.fromkeys(feedback.SCORES, 1.0)

    @property
    def not_calibrated(self) -> str:
        """A warning, if the model has uncertainties that aren't calibrated; else ""."""
        has_any = self.network.heads_config.score_variance
        return NOT_CALIBRATED if has_any and self.calibration is None else ""

    def write(self, directory: epath.PathLike) -> None:
        """Writes the files into an existing directory."""
        write(directory, self._content() | {"training": dict(self.training)}, self.vocabulary)

    def checksum(self) -> str:
        """Returns a checksum of what predictions depend on: the entries but `training`, the vocabulary."""
        vocabulary = checksums.of_bytes(self.vocabulary or b"")
        return checksums.of_json(self._content() | {VOCABULARY_FILE: vocabulary})

    def _content(self) -> dict[str, Any]:
        content = models.describe_rahf(
            self.network, self.feature_lengths, self.fit, self.misalignment_threshold
        )
        if self.calibration:
            content["calibration"] = dataclasses.asdict(self.calibration)
        return content


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
    entries = dict(content) | {_CHECKSUMS: {}}
    if vocabulary is not None:
        entries[_CHECKSUMS][VOCABULARY_FILE] = checksums.of_bytes(vocabulary)
    entries[_CHECKSUMS][FILE] = checksums.of_json(entries)
    writing.write(directory / FILE, json.dumps(entries, indent=2) + "\n")


def read(directory: epath.PathLike, dtype: str | None = None) -> ModelDescription:
    """Reads the files of `ModelDescription.write`.

    Args:
      directory: a MODEL_DIR, or an export.
      dtype: type of activations, 'float32' or 'bfloat16'; None: that of the training.

    Raises:
      errors.UserError: a file or an entry is missing, wrong or changed; the message says which.
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
    with _explained(path):
        content = reading.parse_json(reading.read_bytes(path, _LARGEST))
        model = reading.read_bytes(vocabulary)
        _check(content, model, path, vocabulary)
        return _parse(content, model, {"dtype": dtype} if dtype else {})


def recorded_training(directory: epath.PathLike) -> dict[str, Any]:
    """Reads the entry "training" of a directory's model.json; {} if there is none that makes sense."""
    try:
        return dict(reading.read_json(epath.Path(directory) / FILE)["training"])
    except (OSError, KeyError, TypeError, ValueError, errors.UserError):
        return {}


@contextlib.contextmanager
def _explained(path: epath.Path) -> Iterator[None]:
    """Turns the errors of a file that makes no sense into a UserError that names it and the fix."""
    try:
        yield
    except OSError as error:
        raise errors.UserError(f"{writing.reason(error)}. {_FIX}") from error
    except KeyError as error:
        raise errors.UserError(f"{path} lacks {error}. {_FIX}") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise errors.UserError(f"{path} makes no sense: {error}. {_FIX}") from error


def _is_whole(content: dict[str, Any]) -> bool:
    """Returns whether the entries of model.json have the checksum that is among them."""
    own = dict(content[_CHECKSUMS])
    return own.pop(FILE, None) == checksums.of_json(content | {_CHECKSUMS: own})


def check_vocabulary(directory: epath.PathLike, vocabulary: bytes | None, fix: str) -> None:
    """Checks that data have the vocabulary with which a model was trained, if both are known.

    Args:
      directory: a MODEL_DIR.
      vocabulary: the data's SentencePiece model; None: it isn't known.
      fix: what to do; the end of the message.

    Raises:
      errors.UserError: they have another one.
    """
    if vocabulary is not None and _trained_with(directory) not in (None, checksums.of_bytes(vocabulary)):
        raise errors.UserError(
            f"VOCABULARY: the data's vocabulary isn't {epath.Path(directory) / VOCABULARY_FILE}, with which"
            f" the model was trained, so the model would read other words. {fix}"
        )


def _trained_with(directory: epath.PathLike) -> str | None:
    """Returns the checksum of a model's vocabulary; None: it isn't known."""
    path = epath.Path(directory) / VOCABULARY_FILE
    # First that in model.json, because vocabulary.model may be damaged.
    with contextlib.suppress(OSError, KeyError, TypeError, ValueError, errors.UserError):
        content = reading.read_json(epath.Path(directory) / FILE)
        if _is_whole(content):
            return content[_CHECKSUMS][path.name]
    return checksums.of_bytes(reading.read_bytes(path)) if path.exists() else None


def _check(content: dict[str, Any], model: bytes, path: epath.Path, vocabulary: epath.Path) -> None:
    """Checks the files' checksums, if there are any.

    Raises:
      errors.UserError: a file differs from its checksum.
    """
    if (expected := content.get(_CHECKSUMS)) is None:
        return
    own = {name: value for name, value in expected.items() if name != FILE}
    if not _is_whole(content):
        raise errors.UserError(f"{path} isn't as it was written: its checksum differs. {_FIX}; {_MEANT}")
    if own.get(VOCABULARY_FILE) != checksums.of_bytes(model):
        raise errors.UserError(
            f"{vocabulary} isn't the vocabulary that the model was trained with: its checksum is"
            f" {checksums.of_bytes(model)}, {FILE} has {own.get(VOCABULARY_FILE)}. {_FIX}; {_MEANT}"
        )


def _parse(content: Mapping[str, Any], vocabulary: bytes, overrides: Mapping[str, Any]) -> ModelDescription:
    configs = {}
    for name, config in _CONFIGS.items():
        given = _tuples(content[name])
        hints = typing.get_type_hints(config)
        if unknown := given.keys() - hints.keys():
            raise ValueError(f"{name} has an unknown {min(unknown)!r}; it is of another version")
        given |= {key: value for key, value in overrides.items() if key in hints}
        for key, value in given.items():
            _check_value(key, value, str if key == "dtype" else hints[key], f"{name}.{key}")
        configs[name] = config(**given)
    lengths = {name: content["feature_lengths"][name] for name in models.DESCRIBED_LENGTHS}
    _check_value("task_feature_lengths", lengths, Mapping[str, int], "feature_lengths")
    tokens = (lengths["image"] // configs["vit_config"].patch_size) ** 2 + lengths["inputs"]
    if tokens > _MOST_TOKENS:
        raise ValueError(f"an image and its text have {tokens:,} tokens; {_MOST_TOKENS:,} are the most")
    for name, hint in _ENTRIES.items():
        _check_value(name, content[name], hint)
    return ModelDescription(
        rahf.Rahf(variant=content["variant"], decoder_sees_image=content["decoder_sees_image"], **configs),
        lengths,
        content["fit"],
        float(content["misalignment_threshold"]),
        content["training"],
        vocabulary,
        Calibration.parse(content["calibration"]) if "calibration" in content else None,
    )


def _check_value(name: str, value: Any, hint: Any, where: str | None = None) -> None:
    """Checks an entry's type and range by those of the parameter of its name.

    Raises:
      ValueError: one of them is wrong.
    """
    for _, message in allowed_values.faults(allowed_values.Place(where or name, name), value, hint):
        raise ValueError(message)


def _tuples(value: Any) -> Any:
    """Turns JSON's lists into tuples, because a configuration must be hashable."""
    if isinstance(value, list):
        return tuple(map(_tuples, value))
    if isinstance(value, dict):
        return {name: _tuples(part) for name, part in value.items()}
    return value
