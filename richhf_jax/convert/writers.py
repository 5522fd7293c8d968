"""Writes parameters as our checkpoint, as one .safetensors file, or as Hugging Face directories."""

import errno
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from richhf_jax import checkpoints, weights_file, writing
from richhf_jax.convert import huggingface, layers, own
from richhf_jax.convert.source import ConvertError, Tensor
from richhf_jax.train_state import MUTABLES

_POSITIONS = "vit/position_embedding/embedding"


def write_checkpoint(directory: pathlib.Path, tensors: Mapping[str, Tensor], configs: Any) -> list[str]:
    """Writes checkpoint_0 in `directory`, for INITIAL_CHECKPOINT_PATH. Returns no lines for the user."""
    del configs
    device = jax.local_devices(backend="cpu")[0]
    save_checkpoint(
        directory, {name: jax.device_put(array, device) for name, array in read_in_order(tensors)}, 0
    )
    return []


def save_checkpoint(directory: pathlib.Path, params: Mapping[str, jax.Array], step: int) -> None:
    """Writes checkpoint_<step> without optimizer state, with the mutable collections among `params`.

    Raises:
      errors.UserError: it can't be written.
    """
    # Orbax raises ValueError or RuntimeError where it can't write an array.
    with writing.explained_disk_errors(directory, also=(ValueError, RuntimeError)):
        # Looking first leaves out the messages of Orbax's threads, which nobody catches.
        if sum(array.nbytes for array in params.values()) > shutil.disk_usage(directory).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(directory))
        tree = traverse_util.unflatten_dict(dict(params), sep="/")
        mutables = tree.pop(MUTABLES, None)
        checkpoints.save_params(str(directory), tree, step, mutables)


def write_safetensors(directory: pathlib.Path, tensors: Mapping[str, Tensor], configs: Any) -> list[str]:
    """Writes model.safetensors, with our names joined by "/". Returns no lines for the user."""
    del configs
    _save(directory, dict(read_in_order(tensors)), own.SAFETENSORS_METADATA)
    return []


def write_huggingface(
    directory: pathlib.Path, tensors: Mapping[str, Tensor], configs: Mapping[str, Any]
) -> list[str]:
    """Writes t5/ and vit/, which transformers' `from_pretrained` opens. A missing part is left out.

    Args:
      directory: the folder for t5/ and vit/.
      tensors: our names -> the parameters, with layers not scanned.
      configs: the model's configurations, {"t5_config": T5Config, "vit_config": ViTConfig} and others.

    Returns:
      Lines for the user, which say what is left out, and why.

    Raises:
      ConvertError: the model isn't RAHF, a part is not whole, or Hugging Face's T5 doesn't know the
        activations.
    """
    if not {"t5_config", "vit_config"} <= configs.keys():
        raise ConvertError("--format=huggingface writes RAHF's T5 and ViT: choose another format")
    t5_config, vit_config = configs["t5_config"], configs["vit_config"]
    lines = []
    depths = t5_config.num_encoder_layers, t5_config.num_decoder_layers
    names = huggingface.t5_names(*depths, t5_config.mlp_activations, t5_config.logits_via_embedding)
    if _is_there(names, tensors, lines, "T5"):
        (directory / "t5").mkdir()
        _write_json(directory / "t5/config.json", _t5_config(t5_config))
        _save(directory / "t5", _to_torch(names, tensors), {"format": "pt"})
    names = huggingface.vit_names(vit_config.num_layers)
    if not vit_config.class_token or vit_config.stem_filters:
        lines.append("vit/ is left out: Hugging Face's ViT has a class token and no stem")
    elif _is_there([*names, "vit/class_token", _POSITIONS], tensors, lines, "ViT"):
        (directory / "vit").mkdir()
        _write_json(directory / "vit/config.json", _vit_config(vit_config))
        _save(directory / "vit", _to_torch(names, tensors) | _embeddings(tensors), {"format": "pt"})
    modules = sorted(
        {name.split("/")[0] for name in tensors} - {"token_embedder", "encoder", "decoder", "vit"}
    )
    if modules:
        lines.append(f"left out, as they are parts of neither T5 nor ViT: {', '.join(modules)}")
    return lines


def _is_there(names: Any, tensors: Mapping[str, Tensor], lines: list[str], part: str) -> bool:
    """Tells whether the tensors have all the names; if they have none, adds a line to `lines`.

    Raises:
      ConvertError: the tensors have only some of the names.
    """
    absent = [name for name in names if name not in tensors]
    if len(absent) == len(names):
        lines.append(f"{part} is left out: no source has it")
    elif absent:
        raise ConvertError(
            f"{part} is not whole, {len(absent)} of its {len(names)} parameters are in no source: "
            f"{', '.join(absent[:3])}{' ...' if len(absent) > 3 else ''}"
        )
    return not absent


def read_in_order(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields names and values in the order of the source, so that layers stacked there are read once."""
    for name in sorted(tensors, key=lambda name: layers.natural_order(tensors[name].origin)):
        # A view would keep the whole array in memory, and safetensors writes memory without its strides.
        # (`ascontiguousarray` would give a single number an axis.)
        yield name, np.asarray(tensors[name].read(), order="C")


def _to_torch(names: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    wanted = {name: tensors[name] for name in names}
    return {
        names[name]: np.ascontiguousarray(huggingface.to_torch(name, array))
        for name, array in read_in_order(wanted)
    }


def _embeddings(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Converts class token and positions. Our token includes its position, so that position becomes zeros."""
    table = tensors[_POSITIONS].read()
    rows = table.reshape(1, -1, table.shape[-1])
    return {
        huggingface.CLASS_TOKEN: tensors["vit/class_token"].read()[None, None],
        huggingface.POSITIONS: np.concatenate([np.zeros_like(rows[:, :1]), rows], axis=1),
    }


def _save(directory: pathlib.Path, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    weights_file.write(directory / weights_file.FILE, arrays, metadata)


def _write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    writing.write(path, json.dumps(content, indent=2) + "\n")


def _t5_config(config: Any) -> dict[str, Any]:
    kinds = {activations: kind for kind, activations in huggingface.ACTIVATIONS.items()}
    if tuple(config.mlp_activations) not in kinds:
        raise ConvertError(f"Hugging Face's T5 knows no mlp_activations {tuple(config.mlp_activations)}")
    return {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "vocab_size": config.vocab_size,
        "d_model": config.emb_dim,
        "d_kv": config.head_dim,
        "d_ff": config.mlp_dim,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "num_heads": config.num_heads,
        "feed_forward_proj": kinds[tuple(config.mlp_activations)],
        "tie_word_embeddings": config.logits_via_embedding,
        "dropout_rate": config.dropout_rate,
        "is_encoder_decoder": True,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        **huggingface.T5_FIXED,
    }


def _vit_config(config: Any) -> dict[str, Any]:
    height, width = (side * config.patch_size for side in config.grid)
    return {
        "model_type": "vit",
        "architectures": ["ViTModel"],
        "image_size": height if height == width else [height, width],
        "patch_size": config.patch_size,
        "num_channels": 3,
        "hidden_size": config.emb_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_dim,
        "hidden_act": "gelu_pytorch_tanh" if config.approximate_gelu else "gelu",
        "qkv_bias": True,
        "layer_norm_eps": config.layer_norm_epsilon,
        "hidden_dropout_prob": config.dropout_rate,
        "attention_probs_dropout_prob": config.dropout_rate,
    }
