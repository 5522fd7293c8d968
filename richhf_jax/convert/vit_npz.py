"""Reads ViT weights (.npz) of the vision_transformer and big_vision line (augreg, SigLIP's image side, ...).

https://github.com/google-research/vision_transformer and https://github.com/google-research/big_vision. A
dense layer's kernel is [in, out] as here, but attention kernels have separate axes for the heads and their
width. The position table may be in three places, a layer's parts may be numbered in two ways, and a whole
stack of layers may be one array.
"""

import io
import math
import pathlib
import re
import zipfile
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from richhf_jax.convert import huggingface
from richhf_jax.convert.source import ConvertError, Source, Tensor

# Possible beginnings of all names of a ViT: "target" comes from flax's old optimizers, "img" from two-tower
# models.
_PREFIXES = ("", "params/", "opt/target/", "img/", "params/img/", "opt/target/img/")
_POSITIONS = ("pos_embedding", "Transformer/pos_embedding", "Transformer/posembed_input/pos_embedding")
_LAYER = "Transformer/encoderblock"
# The most bytes of an array's header, and what deflate can make of one byte.
_MAX_HEADER, _MAX_RATIO = 2**16, 1032
# Our names -> theirs: first with each kind of part numbered by itself, then (before flax's linen) with all
# parts numbered in one row.
_PARTS = {
    "pre_attention_layer_norm": ("LayerNorm_0", "LayerNorm_0"),
    "attention": ("MultiHeadDotProductAttention_0", "MultiHeadDotProductAttention_1"),
    "pre_mlp_layer_norm": ("LayerNorm_1", "LayerNorm_2"),
    "mlp": ("MlpBlock_0", "MlpBlock_3"),
}


def is_vit_npz(path: str) -> bool:
    """Tells whether a path is a file named .npz."""
    return path.endswith(".npz") and pathlib.Path(path).is_file()


def open_vit_npz(path: str) -> Source:
    """Opens a .npz; only the arrays' headers are read.

    Raises:
      ConvertError: the file is truncated, or holds no ViT.
    """
    state = read_npz(path)
    prefixes = [
        p for p in _PREFIXES if {f"{p}embedding/kernel", f"{p}Transformer/encoder_norm/scale"} <= state.keys()
    ]
    if not prefixes:
        raise ConvertError(
            f"{path} holds no ViT of the vision_transformer and big_vision line: no embedding/kernel and "
            f"Transformer/encoder_norm/scale among its {len(state)} arrays ({', '.join([*state][:3])} ...)"
        )
    vit = {name.removeprefix(prefixes[0]): t for name, t in state.items() if name.startswith(prefixes[0])}
    try:
        layers = [_layer(layer) for layer in _layers(vit)]
        tensors = {f"vit/layers_{i}/{name}": t for i, layer in enumerate(layers) for name, t in layer.items()}
        tensors |= _embeddings(vit)
        for name in ("scale", "bias"):
            tensors[f"vit/encoder_norm/{name}"] = vit[f"Transformer/encoder_norm/{name}"]
        # A bias is [heads, kv], or [layers, heads, kv].
        heads = next(t.shape[-2] for name, t in vit.items() if re.fullmatch(rf"{_LAYER}.*/query/bias", name))
    except KeyError as error:
        raise ConvertError(f"{path} is no whole ViT: it lacks {error}") from error
    except (IndexError, TypeError, ValueError, ArithmeticError) as error:
        raise ConvertError(f"{path} has arrays of other shapes than a ViT's: {error}") from error
    used = {origin.split("[")[0] for tensor in tensors.values() for origin in tensor.origin.split(" + ")}
    num_slots = sum(name.startswith("opt/state/") for name in state)
    left_out = f", without {num_slots} arrays of the optimizer" if num_slots else ""
    return Source(
        path=path,
        description=f"ViT of the vision_transformer and big_vision line, {len(layers)} layers{left_out}",
        tensors=tensors,
        unused={
            name: tensor.shape
            for name, tensor in state.items()
            if name not in used and not name.startswith("opt/state/")
        },
        settings={
            "vit_config.num_heads": heads,
            # All ViTs of this line have flax's defaults.
            "vit_config.layer_norm_epsilon": 1e-6,
            "vit_config.approximate_gelu": True,
        },
    )


def _layers(vit: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Returns the parameters of each layer, by their names within it."""
    stacked = {
        name.removeprefix(f"{_LAYER}/"): t.unstacked()
        for name, t in vit.items()
        if name.startswith(f"{_LAYER}/")
    }
    if stacked:
        depth = len(next(iter(stacked.values())))
        return [{name: slices[i] for name, slices in stacked.items()} for i in range(depth)]
    layers: dict[int, dict[str, Tensor]] = {}
    for name, tensor in vit.items():
        if match := re.fullmatch(rf"{_LAYER}_(\d+)/(.*)", name):
            layers.setdefault(int(match[1]), {})[match[2]] = tensor
    # A name may say any number of a layer.
    depth = max(len(layers), 1)
    if absent := [i for i in range(depth) if i not in layers]:
        raise KeyError(f"encoderblock_{absent[0]}")
    return [layers[i] for i in range(depth)]


def _layer(layer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converts one layer to our names and shapes."""
    numbering = int("MlpBlock_3/Dense_0/kernel" in layer)
    theirs = {ours: names[numbering] for ours, names in _PARTS.items()}
    tensors = {}
    for part in ("pre_attention_layer_norm", "pre_mlp_layer_norm"):
        for name in ("scale", "bias"):
            tensors[f"{part}/{name}"] = layer[f"{theirs[part]}/{name}"]
    for name in ("query", "key", "value", "out"):
        kernel = layer[f"{theirs['attention']}/{name}/kernel"]
        # The kernel is [embed, heads, kv], and [heads, kv, embed] for the output.
        width = kernel.shape[-1 if name == "out" else 0]
        joined = math.prod(kernel.shape) // width
        tensors[f"attention/{name}/kernel"] = kernel.reshaped(
            *((joined, width) if name == "out" else (width, joined))
        )
        bias = layer[f"{theirs['attention']}/{name}/bias"]
        tensors[f"attention/{name}/bias"] = bias.reshaped(math.prod(bias.shape))
    for ours, dense in (("wi", "Dense_0"), ("wo", "Dense_1")):
        for name in ("kernel", "bias"):
            tensors[f"mlp/{ours}/{name}"] = layer[f"{theirs['mlp']}/{dense}/{name}"]
    return tensors


def _embeddings(vit: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converts patch embedding, positions and class token. The first position may be the token's."""
    positions = next((vit[name] for name in _POSITIONS if name in vit), None)
    if positions is None:
        raise KeyError(_POSITIONS[0])
    _, rows, width = positions.shape
    side = math.isqrt(rows)
    extra = rows - side**2
    if extra > 1:
        raise ConvertError(
            f"{positions.origin} has {rows} rows: neither a square of patches, nor one and a class token"
        )
    tensors = {f"vit/patch_embedding/{name}": vit[f"embedding/{name}"] for name in ("kernel", "bias")}
    tensors["vit/position_embedding/embedding"] = positions.mapped(
        (side, side, width), lambda array: array[0, extra:].reshape(side, side, width)
    )
    if token := vit.get("cls"):
        tensors["vit/class_token"] = token.reshaped(width)
    if token and extra:
        tensors |= huggingface.split_positions(positions, token)
    return tensors


def read_npz(path: str) -> dict[str, Tensor]:
    """Returns the arrays of a .npz by name; only their headers are read.

    Raises:
      ConvertError: the file or one of its arrays is truncated, or it is no .npz.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(".npy")]
            return {name.removesuffix(".npy"): _tensor(path, archive, name) for name in names}
    except Exception as error:  # A broken zip or header may raise anything.
        raise ConvertError(f"{path} is truncated, or no .npz: {error}") from error


def _tensor(path: str, archive: zipfile.ZipFile, member: str) -> Tensor:
    info = archive.getinfo(member)
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{member} is compressed in a way that numpy doesn't write")
    with archive.open(member) as file:
        start = io.BytesIO(file.read(_MAX_HEADER))
    version = np.lib.format.read_magic(start)
    read_header = (
        np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    )
    shape, _, dtype = read_header(start)
    size = start.tell() + math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or size != info.file_size or size > info.compress_size * _MAX_RATIO:
        raise ValueError(f"{member} says that it has shape {shape}, for which the file is too short or long")
    # numpy writes bfloat16 as two bytes without a type.
    dtype = np.dtype(ml_dtypes.bfloat16) if dtype == np.dtype("V2") else dtype

    def read() -> np.ndarray:
        try:
            with zipfile.ZipFile(path) as archive, archive.open(member) as file:
                return np.lib.format.read_array(file).view(dtype)
        except Exception as error:
            raise ConvertError(f"{path} is damaged at {member}: {error}") from error

    return Tensor(member.removesuffix(".npy"), shape, dtype, read)
