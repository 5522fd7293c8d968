"""The description of a model in its checkpoint directory: model.json, and its vocabulary if it reads text.

Training and conversion write both. Prediction needs nothing else beside the checkpoints, neither gin nor
TensorFlow. The entries of model.json:

    system                               a name in `SYSTEMS`; absent: RAHF
    <settings and configurations>        the network's: see the system's `System.settings` and `configs`;
                                         RAHF's are variant, decoder_sees_image, t5_config, vit_config,
                                         heads_config, see `network.rahf.Rahf`
    feature_lengths                      {"image": side in pixels, "inputs": tokens, "targets": tokens};
                                         "inputs" of a system that reads text, "targets" of one that marks
                                         words
    fit                                  how pictures become square, see `pixels.square`
    misalignment_threshold               words with a higher probability of being misaligned are marked; only
                                         of a system that marks words
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
import functools
import json
import shlex
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath

from richhf_jax import (
    allowed_values,
    baselines,
    checksums,
    clip_model,
    clip_tokens,
    errors,
    feedback,
    models,
    prompt_encoders,
    reading,
    writing,
)
from richhf_jax.network import clip, rahf, resnet, t5, vit

FILE = "model.json"
VOCABULARY_FILE = prompt_encoders.SENTENCEPIECE_FILE

_CHECKSUMS = "checksums"
_LARGEST = 2**20  # bytes of model.json
_MOST_TOKENS = 2**14  # in the encoder: there are arrays of this size squared
# Files by which the directories of conversions and exports are known.
CONVERSION_FILE, EXPORT_FILE = "conversion.txt", "SHA256SUMS"
NOT_CALIBRATED = (
    "the uncertainties aren't calibrated for this checkpoint, so they may be too large or too small as a"
    " whole: calibrate them with `python -m richhf_jax.calibrate`"
)
_MEANT = f'if the change is meant, remove the entry "{_CHECKSUMS}" from {FILE}'

# Entries of every system -> their types.
_ENTRIES = {"fit": str, "training": Mapping[str, Any]}


@dataclasses.dataclass(frozen=True)
class System:
    """A kind of model: how model.json describes it, and how it predicts.

    Attributes:
      network: makes the network of the settings and configurations, given by name. The network's `describe()`
        returns them; its `with_attention_kernel(kernel)` returns the same network with another kernel.
      configs: entry -> the dataclass of a configuration.
      model: makes the model that predicts; it needs no optimizer.
      settings: entry -> its type, of the network's other settings.
      vocabulary_file: name of the vocabulary's file beside model.json; None: the system reads no text.
      encoder: makes the encoder of prompts; None: the system reads no text.
      marks_words: whether it says which words are misaligned.
    """

    network: Callable[..., Any]
    configs: Mapping[str, type]
    model: Callable[["ModelDescription"], models.BaseModel]
    settings: Mapping[str, type] = dataclasses.field(default_factory=dict)
    vocabulary_file: str | None = None
    encoder: Callable[["ModelDescription"], prompt_encoders.PromptEncoder] | None = None
    marks_words: bool = False

    @property
    def reads_text(self) -> bool:
        """Whether it reads prompts; predictions of one that doesn't need none."""
        return self.vocabulary_file is not None

    @property
    def lengths(self) -> tuple[str, ...]:
        """The names of `ModelDescription.feature_lengths`."""
        return (
            "image",
            *(("inputs",) if self.reads_text else ()),
            *(("targets",) if self.marks_words else ()),
        )


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
    """The entries of model.json, see the module.

    Attributes:
      network, feature_lengths, fit, training, calibration, system: as there.
      misalignment_threshold: as there; None: the system marks no words.
      vocabulary: content of the vocabulary's file; None: unknown, or the system reads no text.
    """

    network: Any
    feature_lengths: Mapping[str, int]
    fit: str
    misalignment_threshold: float | None
    training: Mapping[str, Any]
    vocabulary: bytes | None
    calibration: Calibration | None = None
    system: str = models.RAHF

    @functools.cached_property
    def model(self) -> models.BaseModel:
        """The model for predictions.

        Raises:
          errors.UserError: as `encoder` and `check_fit`.
        """
        model = SYSTEMS[self.system].model(self)
        check_fit(model, self.fit)
        return model

    @functools.cached_property
    def encoder(self) -> Any:
        """The encoder of prompts, a `prompt_encoders.PromptEncoder`; None: the system reads no text.

        Raises:
          errors.UserError: the vocabulary is missing, damaged, or another model's.
        """
        make = SYSTEMS[self.system].encoder
        return make(self) if make else None

    @property
    def reads_text(self) -> bool:
        """Whether the system reads prompts, see `System.reads_text`."""
        return SYSTEMS[self.system].reads_text

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
        return NOT_CALIBRATED if self.calibration is None and self.model.has_uncertainty else ""

    def check(self, model: models.BaseModel) -> None:
        """Checks that predictions take the description, before it is written.

        Args:
          model: a model of this network.

        Raises:
          errors.UserError: they don't.
        """
        side = self.feature_lengths["image"]
        model.check_image_size(side, side)
        if "inputs" in self.feature_lengths:
            model.check_text_length(self.feature_lengths["inputs"])
        check_fit(model, self.fit)
        content = self._content() | {"training": dict(self.training)}
        try:
            _parse(json.loads(json.dumps(content)), self.vocabulary, {})
        except ValueError as error:
            raise errors.UserError(f"these settings make no model for predictions: {error}") from error

    def write(self, directory: epath.PathLike) -> None:
        """Writes the files into an existing directory."""
        write(directory, self._content() | {"training": dict(self.training)}, self.vocabulary)

    def checksum(self) -> str:
        """Returns a checksum of what predictions depend on: the entries but `training`, the vocabulary."""
        vocabulary = checksums.of_bytes(self.vocabulary or b"")
        return checksums.of_json(self._content() | {VOCABULARY_FILE: vocabulary})

    def _content(self) -> dict[str, Any]:
        content = models.describe_system(
            self.system, self.network, self.feature_lengths, self.fit, self.misalignment_threshold
        )
        if self.calibration:
            content["calibration"] = dataclasses.asdict(self.calibration)
        return content


def _rahf(description: ModelDescription) -> models.RahfModel:
    return models.RahfModel(
        description.network,
        optimizer_def=None,
        misalignment_threshold=typing.cast(float, description.misalignment_threshold),
        resample_positions=True,  # Training checked the size.
        eos_id=description.encoder.eos_id,
    )


def _rahf_encoder(description: ModelDescription) -> prompt_encoders.SentencePieceEncoder:
    rows = description.network.t5_config.vocab_size
    return prompt_encoders.SentencePieceEncoder(description.vocabulary, rows)


def _resnet(description: ModelDescription) -> baselines.ResNetModel:
    return baselines.ResNetModel(description.network, optimizer_def=None)


_RESNET = System(
    network=resnet.ResNetFeedback,
    configs={"resnet_config": resnet.ResNetConfig, "heads_config": resnet.ResNetHeadsConfig},
    model=_resnet,
)


def check_fit(model: models.BaseModel, fit: str) -> None:
    """Checks that a model which predicts heatmaps sees all of each picture.

    Raises:
      errors.UserError: it doesn't.
    """
    if model.outputs.heatmaps and fit == "centre_crop":
        raise errors.UserError(
            "the model predicts heatmaps, but crops pictures (FIT = 'centre_crop'): it would know nothing of"
            " what is cropped off. Convert or train it with --gin.FIT=\"'resize'\""
        )


def _clip(description: ModelDescription) -> clip_model.ClipModel:
    return clip_model.ClipModel(description.network, None)


def _clip_encoder(description: ModelDescription) -> clip_tokens.ClipTokens:
    if description.vocabulary is None:
        raise errors.UserError(f"the model has no {clip_tokens.FILE}: prediction needs it")
    tokens = clip_tokens.ClipTokens(description.vocabulary, f"{clip_tokens.FILE} beside {FILE}")
    config = description.network.text_config
    tokens.check_fits(config.vocab_size, config.end_id)
    return tokens


_CLIP = System(
    network=clip.Clip,
    configs={
        "text_config": clip.TextConfig,
        "vision_config": clip.VisionConfig,
        "head_config": clip.HeadConfig,
    },
    model=_clip,
    settings={"projection_dim": int},
    vocabulary_file=clip_tokens.FILE,
    encoder=_clip_encoder,
)


SYSTEMS = {
    models.RAHF: System(
        network=rahf.Rahf,
        configs={"t5_config": t5.T5Config, "vit_config": vit.ViTConfig, "heads_config": rahf.HeadsConfig},
        model=_rahf,
        settings={"variant": str, "decoder_sees_image": bool},
        vocabulary_file=VOCABULARY_FILE,
        encoder=_rahf_encoder,
        marks_words=True,
    ),
    baselines.RESNET_SCORES: _RESNET,
    baselines.RESNET_HEATMAPS: _RESNET,
    **dict.fromkeys(clip_model.SYSTEMS.values(), _CLIP),
}


def system_of(content: Mapping[str, Any]) -> System:
    """Returns the system that the entries of a model.json are of.

    Raises:
      ValueError: there is none of its name.
    """
    name = content.get("system", models.RAHF)
    if name not in SYSTEMS:
        raise ValueError(f"there is no system {name!r}, only {', '.join(SYSTEMS)}; it is of another version")
    return SYSTEMS[name]


def _again(directory: epath.Path) -> str:
    """Returns how a directory is made again: by a conversion, an export or a training."""
    if (directory / CONVERSION_FILE).exists():
        return "convert the weights again, to a new directory"
    if (directory / EXPORT_FILE).exists():
        return "export the checkpoint again, to a new directory"
    return "give the training's command again, which writes it anew (a finished one ends at once)"


def _fix(directory: epath.Path) -> str:
    return f"Bring it back from a copy; or {_again(directory)}"


def write(directory: epath.PathLike, content: Mapping[str, Any], vocabulary: bytes | None) -> None:
    """Writes a model's description and its vocabulary into an existing directory.

    Args:
      directory: a MODEL_DIR, or an export.
      content: the result of `models.BaseModel.describe`, and "training".
      vocabulary: content of the vocabulary's file; None writes none, nor does a system that reads no text.
    """
    directory = epath.Path(directory)
    entries = dict(content) | {_CHECKSUMS: {}}
    file = system_of(content).vocabulary_file
    if vocabulary is not None and file is not None:
        writing.write(directory / file, vocabulary)
        entries[_CHECKSUMS][file] = checksums.of_bytes(vocabulary)
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
    path = directory / FILE
    if not path.exists():
        raise errors.UserError(
            f"{directory} has no {FILE}, which says what its model is. {_fix(directory)}; or name another"
            " directory"
        )
    with _explained(path):
        content = _read(path)
        file = system_of(content).vocabulary_file
        vocabulary = None if file is None else _read_vocabulary(directory / file)
        _check(content, vocabulary, path)
        return _parse(content, vocabulary, {"dtype": dtype} if dtype else {})


def _read(path: epath.Path) -> dict[str, Any]:
    return reading.parse_json(reading.read_bytes(path, _LARGEST))


def _read_vocabulary(path: epath.Path) -> bytes:
    if not path.exists():
        raise errors.UserError(
            f"{path.parent} has no {path.name}: copy the model's vocabulary to it; or {_again(path.parent)}"
        )
    return reading.read_bytes(path)


def read_vocabulary(directory: epath.PathLike, file: str) -> bytes | None:
    """Reads the vocabulary that a directory's model.json speaks of, without the rest of the description.

    Args:
      directory: a MODEL_DIR, or an export.
      file: name of the vocabulary's file.

    Returns:
      What is in the file; None: there is no model.json, or it knows no such vocabulary.

    Raises:
      errors.UserError: model.json is damaged; or the vocabulary is missing, though model.json has its
        checksum, or changed.
    """
    path = epath.Path(directory) / FILE
    if not path.exists():
        return None
    with _explained(path):
        content = _read(path)
        if system_of(content).vocabulary_file != file:
            return None
        if file not in (content.get(_CHECKSUMS) or ()) and not (path.parent / file).exists():
            return None
        vocabulary = _read_vocabulary(path.parent / file)
        _check(content, vocabulary, path)
        return vocabulary


def recorded_training(directory: epath.PathLike) -> dict[str, Any]:
    """Reads the entry "training" of a directory's model.json; {} if there is none that makes sense."""
    try:
        return dict(reading.read_json(epath.Path(directory) / FILE)["training"])
    except (OSError, KeyError, TypeError, ValueError, errors.UserError):
        return {}


def training_flags(directory: epath.PathLike) -> str:
    """Returns the flags for a training from a conversion's weights, as far as its directory knows them."""
    directory = epath.Path(directory)
    given, words = recorded_training(directory).get("gin_flags"), []
    with contextlib.suppress(ValueError):
        words = shlex.split(given) if isinstance(given, str) else []
    known = [word for word in words if not word.startswith("--gin.VOCABULARY=")]
    files = {system.vocabulary_file for system in SYSTEMS.values() if system.vocabulary_file}
    known += [f"--gin.VOCABULARY={directory / file}" for file in sorted(files) if (directory / file).exists()]
    quoted = shlex.join(known)  # Whoever wrote the file, a shell sees no more than words.
    return quoted if words else f"--gin_file=... {quoted}".rstrip()


@contextlib.contextmanager
def _explained(path: epath.Path) -> Iterator[None]:
    """Turns the errors of a file that makes no sense into a UserError that names it and the fix."""
    try:
        yield
    except OSError as error:
        raise errors.UserError(f"{writing.reason(error)}. {_fix(path.parent)}") from error
    except KeyError as error:
        raise errors.UserError(f"{path} lacks {error}. {_fix(path.parent)}") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise errors.UserError(f"{path} makes no sense: {error}. {_fix(path.parent)}") from error


def _is_whole(content: dict[str, Any]) -> bool:
    """Returns whether the entries of model.json have the checksum that is among them."""
    own = dict(content[_CHECKSUMS])
    return own.pop(FILE, None) == checksums.of_json(content | {_CHECKSUMS: own})


def check_vocabulary(directory: epath.PathLike, vocabulary: bytes | None, fix: str) -> None:
    """Checks that data have the vocabulary with which a model was trained, if both are known.

    Args:
      directory: a MODEL_DIR.
      vocabulary: content of the data's vocabulary file; None: it isn't known.
      fix: what to do; the end of the message.

    Raises:
      errors.UserError: they have another one.
    """
    trained_with = _trained_with(directory)
    if vocabulary is None or trained_with is None:
        return
    file, checksum = trained_with
    path = epath.Path(directory) / file
    if checksum != checksums.of_bytes(vocabulary) and not _is_written_anew(vocabulary, path, checksum):
        raise errors.UserError(
            f"VOCABULARY: the data's vocabulary isn't {path}, with which"
            f" the model was trained, so the model would read other words. {fix}"
        )


def _is_written_anew(vocabulary: bytes, path: epath.Path, checksum: str) -> bool:
    """Returns whether a vocabulary of CLIP's says the same as a file that has this checksum."""
    if path.name != clip_tokens.FILE or not path.exists():
        return False
    own = reading.read_bytes(path)
    return (
        checksums.of_bytes(own) == checksum and clip_tokens.ClipTokens(own, str(path)).content == vocabulary
    )


def _trained_with(directory: epath.PathLike) -> tuple[str, str] | None:
    """Returns the file of a model's vocabulary and its checksum; None: there is none, or it isn't known."""
    # First that in model.json, because the vocabulary's file may be damaged.
    with contextlib.suppress(OSError, KeyError, TypeError, ValueError, errors.UserError):
        content = reading.read_json(epath.Path(directory) / FILE)
        if _is_whole(content):
            file = system_of(content).vocabulary_file
            return None if file is None else (file, content[_CHECKSUMS][file])
    files = (system.vocabulary_file for system in SYSTEMS.values())
    paths = [epath.Path(directory) / file for file in dict.fromkeys(files) if file]
    found = next((path for path in paths if path.exists()), None)
    return (found.name, checksums.of_bytes(reading.read_bytes(found))) if found else None


def _check(content: dict[str, Any], vocabulary: bytes | None, path: epath.Path) -> None:
    """Checks the files' checksums, if there are any.

    Raises:
      errors.UserError: a file differs from its checksum.
    """
    if (expected := content.get(_CHECKSUMS)) is None:
        return
    own = {name: value for name, value in expected.items() if name != FILE}
    if not _is_whole(content):
        raise errors.UserError(
            f"{path} isn't as it was written: its checksum differs. {_fix(path.parent)}; {_MEANT}"
        )
    file = system_of(content).vocabulary_file
    if vocabulary is not None and file and own.get(file) != checksums.of_bytes(vocabulary):
        raise errors.UserError(
            f"{path.parent / file} isn't the vocabulary that came with the model: its checksum is"
            f" {checksums.of_bytes(vocabulary)}, {FILE} has {own.get(file)}. {_fix(path.parent)}; {_MEANT}"
        )


def _parse(
    content: Mapping[str, Any], vocabulary: bytes | None, overrides: Mapping[str, Any]
) -> ModelDescription:
    system = system_of(content)
    configs = {}
    for name, config in system.configs.items():
        given = _tuples(content[name])
        hints = typing.get_type_hints(config)
        if unknown := given.keys() - hints.keys():
            raise ValueError(f"{name} has an unknown {min(unknown)!r}; it is of another version")
        given |= {key: value for key, value in overrides.items() if key in hints}
        for key, value in given.items():
            _check_value(key, value, str if key == "dtype" else hints[key], f"{name}.{key}")
        configs[name] = config(**given)
    lengths = {name: content["feature_lengths"][name] for name in system.lengths}
    _check_value("task_feature_lengths", lengths, Mapping[str, int], "feature_lengths")
    grids = [lengths["image"] // size for c in configs.values() if (size := getattr(c, "patch_size", None))]
    tokens = max(grids, default=0) ** 2 + lengths.get("inputs", 0)
    if tokens > _MOST_TOKENS:
        raise ValueError(f"an image and its text have {tokens:,} tokens; {_MOST_TOKENS:,} are the most")
    threshold = {"misalignment_threshold": float} if system.marks_words else {}
    for name, hint in {**system.settings, **_ENTRIES, **threshold}.items():
        _check_value(name, content[name], hint)
    return ModelDescription(
        system.network(**{name: content[name] for name in system.settings}, **configs),
        lengths,
        content["fit"],
        float(content["misalignment_threshold"]) if threshold else None,
        content["training"],
        vocabulary,
        Calibration.parse(content["calibration"]) if "calibration" in content else None,
        content.get("system", models.RAHF),
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
