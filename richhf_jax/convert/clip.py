"""Reads CLIP: Hugging Face's `CLIPModel`, and open_clip's state dicts.

OpenAI's, laion's and PickScore's weights have these layouts. In both, the class token and its position are
two parameters of the image tower; here they are one, their sum. In open_clip's, query, key and value are one
array.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from richhf_jax.convert import huggingface, safetensors_files, torch_files
from richhf_jax.convert.source import ConvertError, Source, State, Tensor, read_json
from richhf_jax.network import clip

# Our table of tokens.
TABLE = "text/token_embedder/embedding"
# `hidden_act` -> TowerConfig.quick_gelu.
QUICK_GELU = {"quick_gelu": True, "gelu": False}
# A configuration holds only what differs from these, transformers' defaults.
_TEXT = {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "vocab_size": 49408}
_VISION = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224}
_VISION |= {"patch_size": 32}
_BOTH = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "eos_token_id": 49407}
_FIT = "centre_crop"
_PREPROCESSOR = "preprocessor_config.json"
# Models that are no CLIP, though they hold one of its towers or look like it.
_NO_CLIP = {
    "clip_text_model": "CLIP's text tower alone: the similarity needs both towers",
    "clip_vision_model": "CLIP's image tower alone: the similarity needs both towers",
    "siglip": "SigLIP, which isn't CLIP: it has other tokens, pooling and loss",
    "siglip2": "SigLIP 2, which isn't CLIP: it has other tokens, pooling and loss",
}
_LAYER = {
    "pre_attention_layer_norm": ("layer_norm1", "ln_1"),
    "attention/out": ("self_attn.out_proj", "attn.out_proj"),
    "pre_mlp_layer_norm": ("layer_norm2", "ln_2"),
    "mlp/wi": ("mlp.fc1", "mlp.c_fc"),
    "mlp/wo": ("mlp.fc2", "mlp.c_proj"),
}
_QKV = ("query", "key", "value")
_PATCHES = "visual.conv1.weight"
# What a state dict of open_clip is known by, also one tower, or one whose text tower is an object of its own.
_OPEN_CLIP = (_PATCHES, "transformer.resblocks.0.attn.in_proj_weight")
_OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_OPEN_CLIP_CONFIG = "open_clip_config.json"


def is_huggingface(path: str) -> bool:
    """Tells whether a directory is Hugging Face's of CLIP, or of one of the models that are taken for it."""
    file = pathlib.Path(path) / "config.json"
    return file.is_file() and read_json(file).get("model_type") in ("clip", *_NO_CLIP)


def open_huggingface(path: str) -> Source:
    """Opens a `CLIPModel` that transformers' `save_pretrained` wrote, or that was downloaded from its hub.

    Raises:
      ConvertError: the model is SigLIP or one tower alone; an activation is unknown; or the weights are
        missing, damaged, or don't fit its configuration.
    """
    directory = pathlib.Path(path)
    config = read_json(directory / "config.json")
    if (kind := config["model_type"]) in _NO_CLIP:
        raise ConvertError(f"{directory / 'config.json'}: the model is {_NO_CLIP[kind]}")
    state = huggingface.read_weights(directory)
    try:
        if (file := directory / _PREPROCESSOR).is_file():
            pixels = read_json(file)
            _check_pixels(file, pixels.get("image_mean"), pixels.get("image_std"))
        source = _open_huggingface(path, config, state.tensors)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise huggingface.senseless(directory, error) from error
    return dataclasses.replace(source, note=state.note)


def _open_huggingface(path: str, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Source:
    text, vision = _section(config, "text_config", _TEXT), _section(config, "vision_config", _VISION)
    for name, stack in {"text": "text_model.", "image": "vision_model."}.items():
        if not any(key.startswith(stack) for key in state):
            raise ConvertError(f"{path}: the weights hold no {name} tower: the similarity needs both towers")
    depths = text["num_hidden_layers"], vision["num_hidden_layers"]
    names = _huggingface_names(*depths)
    tensors = {ours: _from_torch(ours, state[theirs]) for ours, theirs in names.items() if theirs in state}
    embeddings = "vision_model.embeddings."
    # Rows and width of the table, with the axis of ViT's.
    for name in ("position_embedding.weight", "class_embedding"):
        if (key := embeddings + name) not in state:
            raise ConvertError(f"{path}: the weights lack {key}")
    side = vision["image_size"] // vision["patch_size"]
    tensors |= _vision_positions(
        state[f"{embeddings}position_embedding.weight"], state[f"{embeddings}class_embedding"], (side, side)
    )
    huggingface.check_complete(path, names, tensors)
    return Source(
        path=path,
        description=f"Hugging Face CLIP, {depths[0]} + {depths[1]} layers, {vision['image_size']} pixels",
        tensors=tensors,
        unused=huggingface.unused(state, tensors),
        settings={
            **text_settings(path, text),
            **_tower_settings(path, "vision_config", vision),
        },
        fit=_FIT,
    )


def _check_pixels(file: pathlib.Path, mean: Any, deviation: Any) -> None:
    """Checks that weights take pixels as our network makes them.

    Args:
      file: the configuration, for messages.
      mean, deviation: those that it gives for the three colours; None: it gives none.

    Raises:
      ConvertError: they are others, or none at all.
    """
    for name, theirs, ours in (("mean", mean, clip.MEAN), ("deviation", deviation, clip.DEVIATION)):
        if theirs is None:
            continue
        if not np.allclose(theirs, ours, atol=1e-3):
            raise ConvertError(
                f"{file}: the weights take pixels of the {name} {theirs}; our CLIP has OpenAI's only,"
                f" {[*ours]}, so every prediction would be wrong"
            )


def start_id(folder: pathlib.Path) -> int | None:
    """Returns the id before a text by a directory's config.json; None: it says none, or 0 as older ones do.

    The older ones say 0, 1 and 2 of start, padding and end, which are no special tokens of CLIP's vocabulary.
    """
    file = folder / "config.json"
    if not file.is_file() or not isinstance(config := read_json(file).get("text_config"), dict):
        return None
    return config.get("bos_token_id") or None


def with_text_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the configuration of a text tower alone, with what its file leaves out."""
    return _section({"text_config": config}, "text_config", _TEXT)


def text_settings(path: str, text: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `Source.settings` of a text tower's configuration."""
    # The highest id is the end's, too, where no `eos_token_id` says so.
    end_id = None if text["eos_token_id"] in (2, text["vocab_size"] - 1) else text["eos_token_id"]
    return _tower_settings(path, "text_config", text) | {"text_config.end_id": end_id}


def _section(config: Mapping[str, Any], name: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a tower's configuration as transformers does: an older duplicate wins, with its defaults."""
    older = config.get(f"{name}_dict")
    defaults = _BOTH | dict(defaults)
    given = dict(config.get(name) or {})
    return defaults | given | (defaults | dict(older) if older else {})


def _tower_settings(path: str, name: str, tower: Mapping[str, Any]) -> dict[str, Any]:
    if tower["hidden_act"] not in QUICK_GELU:
        known = ", ".join(map(repr, QUICK_GELU))
        raise ConvertError(f"{path}/config.json: hidden_act is {tower['hidden_act']!r}; our CLIP has {known}")
    return {
        f"{name}.num_heads": tower["num_attention_heads"],
        f"{name}.quick_gelu": QUICK_GELU[tower["hidden_act"]],
        f"{name}.layer_norm_epsilon": tower["layer_norm_eps"],
    }


def _huggingface_names(text_layers: int, vision_layers: int) -> dict[str, str]:
    """Returns our names -> Hugging Face's, without the image tower's class token and positions."""
    names = {
        "logit_scale": "logit_scale",
        "image_projection/kernel": "visual_projection.weight",
        "vision/patch_embedding/kernel": "vision_model.embeddings.patch_embedding.weight",
    }
    modules = {
        "vision/pre_encoder_norm": "vision_model.pre_layrnorm",
        "vision/encoder_norm": "vision_model.post_layernorm",
    }
    modules |= _layer_modules("vision", vision_layers)
    return names | _parameters(modules) | text_names(text_layers)


def text_names(num_layers: int) -> dict[str, str]:
    """Returns our names of the text tower's parameters, and its projection's -> Hugging Face's."""
    names = {
        "text_projection/kernel": "text_projection.weight",
        TABLE: "text_model.embeddings.token_embedding.weight",
        "text/position_embedding/embedding": "text_model.embeddings.position_embedding.weight",
    }
    modules = {"text/encoder_norm": "text_model.final_layer_norm"} | _layer_modules("text", num_layers)
    return names | _parameters(modules)


def _layer_modules(stack: str, depth: int) -> dict[str, str]:
    modules = {}
    for i in range(depth):
        ours, theirs = f"{stack}/layers_{i}", f"{stack}_model.encoder.layers.{i}"
        modules |= {f"{ours}/{name}": f"{theirs}.{other}" for name, (other, _) in _LAYER.items()}
        modules |= {f"{ours}/attention/{name}": f"{theirs}.self_attn.{name[0]}_proj" for name in _QKV}
    return modules


def _open_clip_names(text_layers: int, vision_layers: int) -> dict[str, str]:
    """As `_huggingface_names`, of open_clip's; query, key and value are no arrays of their own."""
    names = {
        "logit_scale": "logit_scale",
        "text_projection/kernel": "text_projection",
        "image_projection/kernel": "visual.proj",
        TABLE: "token_embedding.weight",
        "text/position_embedding/embedding": "positional_embedding",
        "vision/patch_embedding/kernel": _PATCHES,
    }
    modules = {
        "text/encoder_norm": "ln_final",
        "vision/pre_encoder_norm": "visual.ln_pre",
        "vision/encoder_norm": "visual.ln_post",
    }
    for stack, prefix, depth in (("text", "", text_layers), ("vision", "visual.", vision_layers)):
        for i in range(depth):
            theirs = f"{prefix}transformer.resblocks.{i}"
            modules |= {
                f"{stack}/layers_{i}/{name}": f"{theirs}.{other}" for name, (_, other) in _LAYER.items()
            }
    return names | _parameters(modules)


def _parameters(modules: Mapping[str, str]) -> dict[str, str]:
    """Returns the names of the modules' parameters."""
    names = {}
    for ours, theirs in modules.items():
        weight = "scale" if ours.endswith("norm") else "kernel"
        names |= {f"{ours}/{weight}": f"{theirs}.weight", f"{ours}/bias": f"{theirs}.bias"}
    return names


def _from_torch(name: str, tensor: Tensor) -> Tensor:
    return tensor.reshaped() if name == "logit_scale" else huggingface.from_torch(name, tensor)


def _vision_positions(
    positions: Tensor, class_token: Tensor, grid: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """Converts positions [1 + patches, embed] and class token [embed] to our parameters."""
    table, token = positions.reshaped(1, *positions.shape), class_token.reshaped(1, 1, *class_token.shape)
    return huggingface.split_positions(table, token, grid, "vision")


def is_open_clip(path: str) -> bool:
    """Tells whether a path is a state dict of open_clip, or a directory with one.

    Raises:
      ConvertError: a file begins like weights, but is broken.
    """
    file = _open_clip_file(path)
    return file is not None and any(name.endswith(_OPEN_CLIP) for name in _read(file).tensors)


def open_open_clip(path: str) -> Source:
    """Opens open_clip's weights; open_clip_config.json beside them says what shapes don't show.

    Raises:
      ConvertError: the weights are damaged, hold one tower alone, or are no CLIP with two plain towers.
    """
    file = _open_clip_file(path)
    assert file is not None, path
    read = _read(file).unwrapped()
    state = read.tensors
    if "logit_bias" in state:
        raise ConvertError(f"{file}: the model is {_NO_CLIP['siglip']}")
    if any(name.startswith("text.") for name in state):
        raise ConvertError(
            f"{file}: its text tower is that of a CustomTextCLIP (its names begin with 'text.')"
        )
    if "token_embedding.weight" not in state:
        raise ConvertError(f"{file}: the weights hold no text tower: the similarity needs both towers")
    if _PATCHES not in state:
        raise ConvertError(f"{file}: the weights hold no image tower: the similarity needs both towers")
    if any(name.startswith("visual.layer1.") for name in state):
        raise ConvertError(f"{file}: its image tower is a ResNet; our CLIP's is a ViT")
    stacks = {"text": "transformer.resblocks.", "vision": "visual.transformer.resblocks."}
    depths = [huggingface.depth(state, prefix) for prefix in stacks.values()]
    names = _open_clip_names(*depths)
    tensors = {
        # These two are no linear layers of torch, but matrices [in, out].
        ours: state[theirs] if ours.endswith("projection/kernel") else _from_torch(ours, state[theirs])
        for ours, theirs in names.items()
        if theirs in state
    }
    for (stack, prefix), count in zip(stacks.items(), depths, strict=True):
        for i in range(count):
            tensors |= _split_attention(
                file, state, f"{prefix}{i}.attn.in_proj_", f"{stack}/layers_{i}/attention"
            )
    for name in ("visual.positional_embedding", "visual.class_embedding"):
        if name not in state:
            raise ConvertError(f"{file}: the weights lack {name}")
    tensors |= _vision_positions(state["visual.positional_embedding"], state["visual.class_embedding"])
    huggingface.check_complete(str(file), names, tensors)
    settings, note = _open_clip_settings(file.parent / _OPEN_CLIP_CONFIG, tensors)
    return Source(
        path=path,
        description=f"open_clip, {depths[0]} + {depths[1]} layers",
        tensors=tensors,
        unused=huggingface.unused(state, tensors),
        settings=settings,
        fit=_FIT,
        note="; ".join(filter(None, (read.note, note))),
    )


def _split_attention(
    file: pathlib.Path, state: Mapping[str, Tensor], prefix: str, attention: str
) -> dict[str, Tensor]:
    """Splits query, key and value: [3 * embed, embed] -> three transposed [embed, embed]; and biases."""
    tensors = {}
    for parameter, name in (("kernel", f"{prefix}weight"), ("bias", f"{prefix}bias")):
        if name not in state:
            raise ConvertError(f"{file}: the weights lack {name}")
        whole = state[name]
        if not whole.shape or whole.shape[0] % 3:
            raise ConvertError(f"{file}: {name} has shape {whole.shape}, no query, key and value")
        parts = whole.reshaped(3, whole.shape[0] // 3, *whole.shape[1:])
        for i, part in enumerate(_QKV):
            ours = f"{attention}/{part}/{parameter}"
            split = parts.mapped(parts.shape[1:], lambda array, i=i: array[i])
            tensors[ours] = huggingface.from_torch(ours, split)
    return tensors


def _open_clip_settings(file: pathlib.Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], str]:
    """Reads what open_clip's configuration says; without one, the end's id alone is known. With a note."""
    # open_clip always takes the highest id.
    settings: dict[str, Any] = {"text_config.end_id": None}
    if not file.is_file():
        return settings, (
            f"there is no {file.name}, so heads, activation, and the pixels' mean and deviation aren't"
            " checked: make sure that the gin files are the model's, and that the pixels are OpenAI's"
        )
    config = read_json(file)
    try:
        pixels = config.get("preprocess_cfg", {})
        _check_pixels(file, pixels.get("mean"), pixels.get("std"))
        model = config.get("model_cfg", config)
        quick_gelu = bool(model.get("quick_gelu", False))
        for name in ("text", "vision"):
            settings[f"{name}_config.quick_gelu"] = quick_gelu
            norm = model[f"{name}_cfg"].get("norm_kwargs") or {}
            settings[f"{name}_config.layer_norm_epsilon"] = norm.get("eps", _BOTH["layer_norm_eps"])
        settings["text_config.num_heads"] = model["text_cfg"]["heads"]
        width = tensors["vision/class_token"].shape[0]
        settings["vision_config.num_heads"] = width // model["vision_cfg"].get("head_width", 64)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ConvertError(f"{file} makes no sense: {type(error).__name__}: {error}") from error
    return settings, ""


def _open_clip_file(path: str) -> pathlib.Path | None:
    """Finds the file of weights; None: there is none that may be open_clip's."""
    given = pathlib.Path(path)
    places = [given / name for name in _OPEN_CLIP_FILES] if given.is_dir() else [given]
    for place in places:
        if place.is_file():
            if place.suffix == ".safetensors":
                return place
            with place.open("rb") as file:
                if torch_files.is_torch_start(file.read(64)):
                    return place
    return None


def _read(file: pathlib.Path) -> State:
    if file.suffix == ".safetensors":
        return State(safetensors_files.read_safetensors(file))
    return torch_files.read_torch_file(file)
