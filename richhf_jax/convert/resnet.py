"""Reads ResNet v1.5 with bottleneck blocks: Hugging Face's `ResNetModel`, torchvision's and timm's.

A source has the parameters and batch statistics of the network up to its last feature map. Classifiers are
left unused.

    Hugging Face          a directory with config.json and weights
    torchvision, timm     a state dict, .pth or .safetensors; of timm also a directory with config.json
"""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from richhf_jax.convert import huggingface, own, safetensors_files, torch_files
from richhf_jax.convert.source import (
    MAX_LAYERS,
    ConvertError,
    Source,
    State,
    Tensor,
    read_json,
)
from richhf_jax.train_state import MUTABLES

# A name that state dicts of torchvision and timm have, and no other model that we read.
_MARK = "layer1.0.conv1.weight"
_KIND = "resnet"
# timm's names of the architecture. Variants of it may have the same arrays, and compute something else.
_TIMM = re.compile(r"(tv_|gluon_|wide_)?resnet\d+(_v1b|_2)?(\..+)?")
# Hugging Face's settings that our network has with these values only; they are the defaults there, too.
_FIXED = {
    "layer_type": "bottleneck",
    "hidden_act": "relu",
    "downsample_in_bottleneck": False,
    "downsample_in_first_stage": False,
    "num_channels": 3,
}
# Our names of a norm's arrays -> torch's.
_NORM = {"scale": "weight", "bias": "bias"}
_STATISTICS = {"mean": "running_mean", "var": "running_var"}
# Arrays with no part in the features: classifiers, and torch's counts of batches.
_CLASSIFIER = re.compile(r"(fc|classifier\.1)\.(weight|bias)")
_COUNT = "num_batches_tracked"


def is_resnet(path: str) -> bool:
    """Tells whether a path holds a ResNet, also one that ours can't be.

    Raises:
      ConvertError: a file begins like weights, but is broken.
    """
    config = pathlib.Path(path) / "config.json"
    if config.is_file():
        content = read_json(config)
        return content.get("model_type") == _KIND or _KIND in str(content.get("architecture"))
    place = pathlib.Path(path)
    # A CLIP may have a ResNet, too.
    return place.is_file() and any(
        name.endswith(_MARK) and "visual." not in name for name in _read(place).tensors
    )


def open_resnet(path: str) -> Source:
    """Opens a ResNet; only names and shapes are read.

    Raises:
      ConvertError: the network isn't v1.5 with bottleneck blocks; or its weights are missing, damaged, not
        whole, or have parts that this network hasn't.
    """
    place = pathlib.Path(path)
    directory = place.is_dir()
    state = (huggingface.read_weights(place) if directory else _read(place)).unwrapped()
    config = read_json(place / "config.json") if directory else {}
    if config.get("model_type") != _KIND:
        if config and not _TIMM.fullmatch(kind := str(config.get("architecture"))):
            raise ConvertError(
                f"{place / 'config.json'}: architecture is {kind!r}; our ResNet is timm's 'resnet50' only:"
                " variants of it compute something else"
            )
        depths = _depths(path, [rf"layer{stage}\.(\d+)\." for stage in range(1, 5)], state.tensors)
        names = _names(depths, _torchvision_modules)
        return _source(path, "ResNet of torchvision or timm", depths, names, state)
    for name, value in _FIXED.items():
        if config.get(name, value) != value:
            raise ConvertError(
                f"{place / 'config.json'}: {name} is {config[name]!r}; our ResNet has {value!r} only"
            )
    prefix = "resnet." if any(name.startswith("resnet.") for name in state.tensors) else ""
    tensors = {name.removeprefix(prefix): tensor for name, tensor in state.tensors.items()}
    depths = _depths(path, _stages(config.get("depths", [3, 4, 6, 3]), place), tensors)
    if list(depths) != config.get("depths", [3, 4, 6, 3]):
        raise ConvertError(
            f"{path}: the weights have stages of {depths} blocks, its config.json says {config['depths']}"
        )
    names = _names(depths, _huggingface_modules)
    return _source(path, "Hugging Face ResNet", depths, names, State(tensors, state.note))


def _stages(depths: Any, place: pathlib.Path) -> list[str]:
    """Returns a pattern of each stage's names, with a group for the block's number."""
    if not isinstance(depths, list) or not 0 < len(depths) <= MAX_LAYERS:
        raise ConvertError(f"{place / 'config.json'} makes no sense: depths is {depths!r}")
    return [rf"encoder\.stages\.{stage}\.layers\.(\d+)\." for stage in range(len(depths))]


def _read(file: pathlib.Path) -> State:
    """Reads a state dict; one of no array, if the file doesn't begin like any, or is ours."""
    if file.suffix == ".safetensors":
        ours = own.SAFETENSORS_METADATA.items() <= safetensors_files.read_metadata(file).items()
        return State({} if ours else safetensors_files.read_safetensors(file))
    with file.open("rb") as opened:
        if not torch_files.is_torch_start(opened.read(64)):
            return State({})
    return torch_files.read_torch_file(file)


def _depths(path: str, stages: Sequence[str], state: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Counts the blocks of each stage."""
    depths = []
    for pattern in stages:
        blocks = {int(match[1]) for name in state if (match := re.match(pattern, name, re.ASCII))}
        depths.append(len(blocks))
        if blocks != set(range(len(blocks))):
            raise ConvertError(f"{path}: a stage has the blocks {sorted(blocks)}, not all from 0 on")
    if 0 in depths:
        raise ConvertError(f"{path}: no whole ResNet: the numbers of blocks of its stages are {depths}")
    return tuple(depths)


def _names(depths: Sequence[int], modules: Any) -> dict[str, str]:
    """Returns our names -> theirs.

    Args:
      depths: number of blocks in each stage.
      modules: maps stage, block and name of one of our convolutions (the stem has neither stage nor block) to
        their names of it and of its norm.
    """
    places = [("resnet/stem", modules(None, None, "stem"))]
    for stage, depth in enumerate(depths):
        for block in range(depth):
            for name in ("conv_0", "conv_1", "conv_2", *(() if block else ("shortcut",))):
                ours = f"resnet/stage_{stage}_block_{block}/{name}"
                places.append((ours, modules(stage, block, name)))
    names = {}
    for ours, (conv, norm) in places:
        names[f"{ours}/kernel"] = f"{conv}.weight"
        names |= {f"{ours}/norm/{part}": f"{norm}.{theirs}" for part, theirs in _NORM.items()}
        names |= {
            f"{MUTABLES}/batch_stats/{ours}/norm/{part}": f"{norm}.{theirs}"
            for part, theirs in _STATISTICS.items()
        }
    return names


def _torchvision_modules(stage: int | None, block: int | None, name: str) -> tuple[str, str]:
    if stage is None:
        return "conv1", "bn1"
    place = f"layer{stage + 1}.{block}"
    if name == "shortcut":
        return f"{place}.downsample.0", f"{place}.downsample.1"
    number = int(name.removeprefix("conv_")) + 1
    return f"{place}.conv{number}", f"{place}.bn{number}"


def _huggingface_modules(stage: int | None, block: int | None, name: str) -> tuple[str, str]:
    place = "embedder.embedder"
    if stage is not None:
        part = "shortcut" if name == "shortcut" else f"layer.{name.removeprefix('conv_')}"
        place = f"encoder.stages.{stage}.layers.{block}.{part}"
    return f"{place}.convolution", f"{place}.normalization"


def _source(path: str, kind: str, depths: tuple[int, ...], names: Mapping[str, str], state: State) -> Source:
    """Makes the source of a state dict by their names.

    Raises:
      ConvertError: an array is missing, or there is one that the network hasn't.
    """
    counted = {name: tensor for name, tensor in state.tensors.items() if not name.endswith(_COUNT)}
    tensors = {
        ours: huggingface.from_torch(ours, counted[theirs])
        for ours, theirs in names.items()
        if theirs in counted
    }
    if absent := [theirs for ours, theirs in names.items() if ours not in tensors]:
        raise ConvertError(
            f"{path}: the weights lack {len(absent)} of the {len(names)} arrays of a ResNet v1.5 with"
            f" bottleneck blocks, {depths} in its stages: {', '.join(absent[:3])}"
            f"{' ...' if len(absent) > 3 else ''}"
        )
    unused = huggingface.unused(counted, tensors)
    if foreign := [name for name in counted.keys() - names.values() if not _CLASSIFIER.fullmatch(name)]:
        raise ConvertError(
            f"{path}: the weights have {len(foreign)} arrays that a ResNet v1.5 hasn't, so they are another"
            f" network's: {', '.join(sorted(foreign)[:3])}{' ...' if len(foreign) > 3 else ''}"
        )
    return Source(
        path=path,
        description=f"{kind}, {'+'.join(map(str, depths))} blocks",
        tensors=tensors,
        unused=unused,
        # Blocks more or fewer would change no shape.
        settings={"resnet_config.depths": depths},
        note=state.note,
    )
