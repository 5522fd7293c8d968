"""Reads Hugging Face's T5 (1.0 and 1.1) and ViT: directories of `config.json` and weights, and their names.

In torch, a linear layer's kernel is [out, in] and a convolution's [out, in, height, width]; here they are
[in, out] and [height, width, in, out]. There, ViT's class token and its position are two parameters. Here
they are one, their sum, because only the sum has an effect.
"""

import dataclasses
import functools
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from richhf_jax.convert import safetensors_files, torch_files
from richhf_jax.convert.source import MAX_LAYERS, ConvertError, Source, State, Tensor, read_json

# `hidden_act` -> ViTConfig.approximate_gelu.
APPROXIMATE_GELU = {"gelu": False, "gelu_pytorch_tanh": True, "gelu_new": True}
# `feed_forward_proj` -> T5Config.mlp_activations. The gated "gelu" is the tanh approximation, as is flax's.
ACTIVATIONS = {"relu": ("relu",), "gated-gelu": ("gelu", "linear"), "gated-silu": ("silu", "linear")}
# Fixed settings of our T5. They are also Hugging Face's defaults.
T5_FIXED = {
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
}
# The files of weights, in either format.
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
T5_TYPES = ("t5", "mt5")
POSITIONS, CLASS_TOKEN = "embeddings.position_embeddings", "embeddings.cls_token"
# Names of the token table. Where a file has several of them, they are one table.
_SHARED = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# Our names -> theirs: first as all releases of transformers save them, then as version 5 has them in memory.
_VIT_LAYERS = ("encoder.layer", "layers")
_VIT_LAYER = {
    "pre_attention_layer_norm": ("layernorm_before", "layernorm_before"),
    "attention/query": ("attention.attention.query", "attention.q_proj"),
    "attention/key": ("attention.attention.key", "attention.k_proj"),
    "attention/value": ("attention.attention.value", "attention.v_proj"),
    "attention/out": ("attention.output.dense", "attention.o_proj"),
    "pre_mlp_layer_norm": ("layernorm_after", "layernorm_after"),
    "mlp/wi": ("intermediate.dense", "mlp.fc1"),
    "mlp/wo": ("output.dense", "mlp.fc2"),
}


def is_huggingface(path: str) -> bool:
    """Tells whether a directory was written by transformers: it holds a config.json."""
    return (pathlib.Path(path) / "config.json").is_file()


def open_huggingface(path: str) -> Source:
    """Opens a directory that transformers' `save_pretrained` wrote, or that was downloaded from its hub.

    Raises:
      ConvertError: the model is neither T5 nor ViT; or its weights are missing, damaged, or don't fit its
        configuration.
    """
    directory = pathlib.Path(path)
    config = read_json(directory / "config.json")
    kind = config.get("model_type")
    if kind not in (*T5_TYPES, "vit"):
        raise ConvertError(
            f"{directory / 'config.json'}: the model is {kind!r}, none of {', '.join(T5_TYPES)}, vit, clip"
        )
    state = read_weights(directory)
    try:
        source = (_open_vit if kind == "vit" else _open_t5)(path, config, state.tensors)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise senseless(directory, error) from error
    notes = [state.note, _pixel_note(directory) if kind == "vit" else ""]
    return dataclasses.replace(source, note="; ".join(filter(None, notes)))


def senseless(directory: pathlib.Path, error: Exception) -> ConvertError:
    """Explains an error that the values of a config.json led to."""
    if isinstance(error, KeyError):
        return ConvertError(f"{directory / 'config.json'} has no value for {error}")
    return ConvertError(f"{directory / 'config.json'} makes no sense: {error}")


def _open_t5(path: str, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Source:
    for name, value in T5_FIXED.items():
        if config.get(name, value) != value:
            raise ConvertError(f"{path}/config.json: {name} is {config[name]}; our T5 has {value} only")
    feed_forward = config.get("feed_forward_proj", "relu")
    if feed_forward not in ACTIVATIONS:
        raise ConvertError(
            f"{path}/config.json: feed_forward_proj {feed_forward!r} is none of {', '.join(ACTIVATIONS)}"
        )
    # Transformers 5 always writes tie_word_embeddings = true; its former meaning has another name.
    scaled = config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True)) is not False
    tied = scaled and config["model_type"] == "t5"
    depths = depth_in(config, "num_layers"), depth_in(config, "num_decoder_layers", config["num_layers"])
    if not any(name.startswith("decoder.block.") for name in state):
        depths = depths[0], 0
    tensors = t5_tensors(state, tied=tied)
    check_complete(path, t5_names(*depths, ACTIVATIONS[feed_forward], tied), tensors)
    settings = {
        "t5_config.num_heads": config["num_heads"],
        "t5_config.head_dim": config["d_kv"],
        "t5_config.mlp_activations": ACTIVATIONS[feed_forward],
    }
    if depths[1]:
        settings["t5_config.logits_via_embedding"] = tied
    copies = table_copies(state, tied=tied and depths[1] > 0)
    return Source(
        path=path,
        description=f"Hugging Face T5, {feed_forward}, {depths[0]} + {depths[1]} layers",
        tensors=tensors,
        unused=unused(state, tensors, copies),
        copies=copies,
        settings=settings,
    )


def _open_vit(path: str, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Source:
    activation = config.get("hidden_act", "gelu")
    if activation not in APPROXIMATE_GELU:
        known = ", ".join(map(repr, APPROXIMATE_GELU))
        raise ConvertError(f"{path}/config.json: hidden_act is {activation!r}; our ViT has {known}")
    prefix = "vit." if any(name.startswith("vit.") for name in state) else ""
    # The image size is a number, or (height, width).
    height, width = np.broadcast_to(config.get("image_size", 224), 2).tolist()
    patch_size = config.get("patch_size", 16)
    tensors = vit_tensors(state, prefix, (height // patch_size, width // patch_size))
    names = vit_names(depth_in(config, "num_hidden_layers"))
    if not config.get("qkv_bias", True):
        names = {
            ours: theirs for ours, theirs in names.items() if not re.search("(query|key|value)/bias", ours)
        }
    check_complete(path, names, tensors)
    return Source(
        path=path,
        description=f"Hugging Face ViT, {config['num_hidden_layers']} layers, {height}x{width} pixels",
        tensors=tensors,
        unused=unused(state, tensors),
        settings={
            "vit_config.num_heads": config["num_attention_heads"],
            "vit_config.layer_norm_epsilon": config.get("layer_norm_eps", 1e-12),
            "vit_config.approximate_gelu": APPROXIMATE_GELU[activation],
        },
    )


def depth_in(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """Returns a number of layers. Raises KeyError or ValueError where there is none, or one without sense."""
    depth = config[name] if default is None else config.get(name) or default
    if type(depth) is not int or not 0 < depth <= MAX_LAYERS:
        raise ValueError(f"{name} is {depth!r}, no number from 1 to {MAX_LAYERS}")
    return depth


def t5_names(
    num_encoder_layers: int, num_decoder_layers: int, activations: Iterable[str], tied: bool
) -> dict[str, str]:
    """Returns our names of T5's parameters -> Hugging Face's.

    Args:
      num_encoder_layers, num_decoder_layers: numbers of layers; 0: no encoder, no decoder.
      activations: activations of the feed-forward blocks, see `T5Config.mlp_activations`.
      tied: whether the logits reuse the token table (T5 1.0).
    """
    hidden = ["wi"] if len(tuple(activations)) == 1 else ["wi_0", "wi_1"]
    names = {"token_embedder/embedding": _SHARED[0]}
    if num_decoder_layers and not tied:
        names["decoder/logits_dense/kernel"] = "lm_head.weight"
    stacks = {
        "encoder": (num_encoder_layers, [("attention", "attention", "SelfAttention")]),
        "decoder": (
            num_decoder_layers,
            [
                ("self_attention", "self_attention", "SelfAttention"),
                ("cross_attention", "encoder_decoder_attention", "EncDecAttention"),
            ],
        ),
    }
    for stack, (depth, attentions) in stacks.items():
        if depth:
            bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
            names[f"{stack}/relpos_bias/rel_embedding"] = bias
            names[f"{stack}/{stack}_norm/scale"] = f"{stack}.final_layer_norm.weight"
        for i in range(depth):
            ours, theirs = f"{stack}/layers_{i}", f"{stack}.block.{i}.layer"
            for block, (norm, attention, their_attention) in enumerate(attentions):
                names[f"{ours}/pre_{norm}_layer_norm/scale"] = f"{theirs}.{block}.layer_norm.weight"
                for name in ("query", "key", "value", "out"):
                    their_name = f"{theirs}.{block}.{their_attention}.{name[0]}.weight"
                    names[f"{ours}/{attention}/{name}/kernel"] = their_name
            block = len(attentions)
            names[f"{ours}/pre_mlp_layer_norm/scale"] = f"{theirs}.{block}.layer_norm.weight"
            for name in (*hidden, "wo"):
                names[f"{ours}/mlp/{name}/kernel"] = f"{theirs}.{block}.DenseReluDense.{name}.weight"
    return names


def vit_names(num_layers: int, dialect: int = 0) -> dict[str, str]:
    """Returns our names of ViT's parameters -> Hugging Face's, without class token and positions.

    Args:
      num_layers: number of layers.
      dialect: 0 for the names in saved models, 1 for those in memory since transformers 5.
    """
    projection = "embeddings.patch_embeddings.projection"
    modules = {"vit/patch_embedding": projection, "vit/encoder_norm": "layernorm"}
    for i in range(num_layers):
        for ours, theirs in _VIT_LAYER.items():
            modules[f"vit/layers_{i}/{ours}"] = f"{_VIT_LAYERS[dialect]}.{i}.{theirs[dialect]}"
    names = {}
    for ours, theirs in modules.items():
        weight = "scale" if ours.endswith("norm") else "kernel"
        names |= {f"{ours}/{weight}": f"{theirs}.weight", f"{ours}/bias": f"{theirs}.bias"}
    return names


def t5_tensors(state: Mapping[str, Tensor], prefix: str = "", tied: bool = True) -> dict[str, Tensor]:
    """Returns the T5 of a state dict, by our names.

    Args:
      state: Hugging Face's state dict; each tensor's `origin` is its name there.
      prefix: beginning of all of T5's names.
      tied: see `t5_names`. If False and there is no `lm_head`, the logits' kernel is the token table.
    """
    table = next((prefix + name for name in _SHARED if prefix + name in state), prefix + _SHARED[0])
    head = f"{prefix}lm_head.weight"
    renamed = {prefix + _SHARED[0]: table, head: head if head in state else table}
    depths = depth(state, f"{prefix}encoder.block."), depth(state, f"{prefix}decoder.block.")
    tensors = {}
    # Each kind of feed-forward block has names of its own, so the names of all kinds can be tried.
    for activations in ACTIVATIONS.values():
        for ours, theirs in t5_names(*depths, activations, tied).items():
            theirs = renamed.get(prefix + theirs, prefix + theirs)
            if theirs in state:
                tensors[ours] = from_torch(ours, state[theirs])
    return tensors


def vit_tensors(
    state: Mapping[str, Tensor], prefix: str = "", grid: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """Returns the ViT of a state dict, by our names.

    Args:
      state: Hugging Face's state dict; each tensor's `origin` is its name there.
      prefix: beginning of all of ViT's names.
      grid: rows and columns of the position table, in patches; None: it is a square.

    Raises:
      ConvertError: the position table does not have a row for each patch and one for the class token.
    """
    tensors = {}
    for dialect, layers in enumerate(_VIT_LAYERS):
        names = vit_names(depth(state, f"{prefix}{layers}."), dialect)
        for ours, theirs in names.items():
            if prefix + theirs in state:
                tensors[ours] = from_torch(ours, state[prefix + theirs])
    if {prefix + POSITIONS, prefix + CLASS_TOKEN} <= state.keys():
        tensors |= split_positions(state[prefix + POSITIONS], state[prefix + CLASS_TOKEN], grid)
    return tensors


def split_positions(
    positions: Tensor, class_token: Tensor, grid: tuple[int, int] | None = None, stack: str = "vit"
) -> dict[str, Tensor]:
    """Converts positions and class token to our parameters.

    Args:
      positions: [1, 1 + patches, embed]; the class token's position comes first.
      class_token: [1, 1, embed].
      grid: see `vit_tensors`.
      stack: the beginning of our names.

    Raises:
      ConvertError: the number of rows doesn't fit the grid.
    """
    if len(positions.shape) != 3 or positions.shape[0] != 1 or not positions.shape[1]:
        raise ConvertError(f"{positions.origin} has shape {positions.shape}, expected (1, rows, width)")
    rows, width = positions.shape[1:]
    if class_token.shape != (1, 1, width):
        raise ConvertError(f"{class_token.origin} has shape {class_token.shape}, expected (1, 1, {width})")
    side = math.isqrt(rows - 1)
    grid = grid or (side, side)
    if 1 + grid[0] * grid[1] != rows:
        raise ConvertError(
            f"{positions.origin} has {rows} rows; a class token and {grid} patches take others"
        )
    table = positions.mapped((*grid, width), lambda array: array[0, 1:].reshape(*grid, width))
    token = Tensor(
        f"{class_token.origin} + {positions.origin}",
        (width,),
        class_token.dtype,
        lambda: class_token.read()[0, 0] + positions.read()[0, 0],
    )
    return {f"{stack}/position_embedding/embedding": table, f"{stack}/class_token": token}


def from_torch(name: str, tensor: Tensor) -> Tensor:
    """Converts the parameter with our name `name` from torch's layout to ours."""
    axes = _torch_axes(name, len(tensor.shape))
    return tensor.mapped(
        tuple(tensor.shape[a] for a in axes), functools.partial(np.transpose, axes=axes)
    )  # fmt: skip


def to_torch(name: str, array: np.ndarray) -> np.ndarray:
    """Converts a parameter's values from our layout to torch's, the inverse of `from_torch`."""
    return np.transpose(array, np.argsort(_torch_axes(name, array.ndim)))


def _torch_axes(name: str, ndim: int) -> tuple[int, ...]:
    """Returns the torch axis of each of our axes."""
    if name.endswith("/kernel") and ndim == 4:
        return (2, 3, 1, 0)
    # T5's position biases are [buckets, heads] in torch.
    return (1, 0) if ndim == 2 and name.endswith(("/kernel", "/rel_embedding")) else tuple(range(ndim))


def depth(state: Iterable[str], prefix: str) -> int:
    """Returns 1 + the highest N, below MAX_LAYERS, of the names "PREFIXN.…"; 0 without such names."""
    numbers = (name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix))
    depths = (int(number) + 1 for number in numbers if re.fullmatch(r"\d{1,4}", number, re.ASCII))
    return max((depth for depth in depths if depth <= MAX_LAYERS), default=0)


def table_copies(
    state: Mapping[str, Tensor], prefix: str = "", tied: bool = True
) -> dict[str, tuple[Tensor, Tensor]]:
    """Finds T5's token table under its further names; see `Source.copies`.

    Args:
      state: Hugging Face's state dict.
      prefix: beginning of all of T5's names.
      tied: see `t5_names`.
    """
    names = [prefix + name for name in (*_SHARED, *(["lm_head.weight"] if tied else []))]
    tables = [state[name] for name in names if name in state]
    return {table.origin: (table, tables[0]) for table in tables[1:]}


def unused(
    state: Mapping[str, Tensor], tensors: Mapping[str, Tensor], copies: Iterable[str] = ()
) -> dict[str, tuple[int, ...] | None]:
    """Returns `Source.unused` of a state dict, with the names that the file has."""
    used = {origin for tensor in tensors.values() for origin in tensor.origin.split(" + ")}
    return {t.origin: t.shape for t in state.values() if t.origin not in used and t.origin not in copies}


def check_complete(path: str, names: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Raises ConvertError where the weights lack a parameter of the configuration."""
    if absent := [theirs for ours, theirs in names.items() if ours not in tensors]:
        raise ConvertError(
            f"{path}: the weights lack {len(absent)} of the {len(names)} parameters of its config.json: "
            f"{', '.join(absent[:3])}{' ...' if len(absent) > 3 else ''}"
        )


def _pixel_note(directory: pathlib.Path) -> str:
    """Returns a note if the weights need other pixels than [-1, 1], which our network feeds its ViT."""
    file = directory / "preprocessor_config.json"
    if not file.is_file():
        return ""
    config = read_json(file)
    if all(set(config.get(key, [0.5])) == {0.5} for key in ("image_mean", "image_std")):
        return ""
    return (
        f"{file} normalises pixels by mean {config.get('image_mean')} and deviation "
        f"{config.get('image_std')}; our network brings them to [-1, 1]"
    )


def read_weights(directory: pathlib.Path, names: tuple[str, str] = WEIGHTS) -> State:
    """Reads the weights of a directory; safetensors go before torch's own files.

    Args:
      directory: where they are.
      names: the files' names, in either format.

    Raises:
      ConvertError: there are none, or they are damaged.
    """
    readers = (lambda path: State(safetensors_files.read_safetensors(path)), torch_files.read_torch_file)
    for name, read in zip(names, readers, strict=True):
        if (directory / name).is_file():
            return read(directory / name).unwrapped()
        if (directory / f"{name}.index.json").is_file():
            return _read_shards(directory / f"{name}.index.json", read).unwrapped()
    raise ConvertError(f"{directory} holds no weights: no {' and no '.join(names)}, whole or in shards")


def _read_shards(index: pathlib.Path, read: Callable[[pathlib.Path], State]) -> State:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict):
        raise ConvertError(f"{index} has no weight_map")
    state: dict[str, Tensor] = {}
    twice: set[str] = set()
    for shard in sorted(set(map(str, places.values()))):
        if shard != pathlib.PurePath(shard).name:
            raise ConvertError(f"{index} names {shard!r}: shards must lie beside it")
        if not (index.parent / shard).is_file():
            raise ConvertError(f"{index.parent / shard} is missing, which {index.name} names")
        found = read(index.parent / shard).tensors
        twice |= state.keys() & found.keys()
        state |= found
    if absent := sorted(places.keys() - state.keys()):
        raise ConvertError(
            f"{index.parent / str(places[absent[0]])} lacks {absent[0]}, which {index.name} says it has"
        )
    if twice:
        raise ConvertError(f"{index}: several shards hold {min(twice)}")
    return State(state)
