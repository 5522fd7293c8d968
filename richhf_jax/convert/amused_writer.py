"""Writes aMUSEd as diffusers' pipeline, which `amused` reads."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from richhf_jax import clip_tokens, weights_file, writing
from richhf_jax.convert import amused, clip, huggingface, writers
from richhf_jax.convert.source import ConvertError, Tensor


def write(
    directory: pathlib.Path,
    params: Mapping[str, Tensor],
    configs: Mapping[str, Any],
    vocabulary: bytes | None,
) -> None:
    """Writes a pipeline that diffusers' `from_pretrained` opens.

    Args:
      directory: the folder for it.
      params: our names -> the parameters, with layers not scanned.
      configs: the generator's: "text_config", "transformer_config" and "vqgan_config".
      vocabulary: content of CLIP's tokenizer.json; None: tokenizer/ is left out.

    Raises:
      ConvertError: a parameter is missing, or diffusers has no such network.
      errors.UserError: a parameter holds NaN or infinity.
    """
    text, transformer, vqgan = (configs[f"{name}_config"] for name in ("text", "transformer", "vqgan"))
    if vqgan.levels:
        raise ConvertError("diffusers' tokenizer has a codebook, ours finite scalar quantisation (levels)")
    shapes = {name: tensor.shape for name, tensor in params.items()}
    parts = {
        "text_encoder": ("", clip.text_names(text.num_layers), _text_config(text, shapes)),
        "transformer": (
            "transformer/",
            amused.transformer_names(
                transformer.num_layers,
                transformer.num_conv_blocks,
                transformer.downsample,
                transformer.conv_dim != transformer.emb_dim,
            ),
            _transformer_config(transformer, shapes),
        ),
        "vqvae": ("vqgan/", amused.vqgan_names(vqgan.widths, vqgan.layers_per_block), _vqgan_config(vqgan)),
    }
    for folder, (prefix, names, config) in parts.items():
        place = directory / folder
        place.mkdir()
        if absent := [name for name in names if prefix + name not in params]:
            raise ConvertError(f"{folder} lacks {len(absent)} parameters: {', '.join(absent[:3])}")
        arrays = _merged({name: params[prefix + name] for name in names}, names)
        file = huggingface.WEIGHTS[0] if folder == "text_encoder" else amused.WEIGHTS[0]
        weights_file.write(place / file, arrays, {"format": "pt"})
        _write_json(place / "config.json", config)
    (directory / "scheduler").mkdir()
    scheduler = {"_class_name": "AmusedScheduler", "mask_token_id": transformer.mask_id}
    _write_json(directory / "scheduler/scheduler_config.json", scheduler | {"masking_schedule": "cosine"})
    if vocabulary is not None:
        _write_tokenizer(directory / "tokenizer", text, vocabulary)
    _write_json(
        directory / amused.INDEX,
        {
            "_class_name": "AmusedPipeline",
            "scheduler": ["diffusers", "AmusedScheduler"],
            "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "transformer": ["diffusers", "UVit2DModel"],
            "vqvae": ["diffusers", "VQModel"],
        },
    )


def _to_torch(name: str, array: np.ndarray) -> np.ndarray:
    """Converts a parameter's values to diffusers' layout, the inverse of its reader."""
    module = name.split("/")[-2]
    if module == "upsample":
        return array.reshape(array.shape[0], 2, 2, -1).transpose(0, 3, 1, 2)
    if module == "response_norm":
        return array[None, None, None]
    array = huggingface.to_torch(name, array)
    return array[:, :, None, None] if module in amused.MATRICES else array


def _merged(params: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Reads parameters and joins the halves of feed-forward blocks. Returns diffusers' names -> arrays."""
    parts: dict[str, dict[str, np.ndarray]] = {}
    for ours, array in writers.read_in_order(params):
        parts.setdefault(names[ours], {})[ours] = _to_torch(ours, array)
    # The half `wi_1` comes first there.
    return {
        theirs: np.ascontiguousarray(np.concatenate([halves[name] for name in sorted(halves, reverse=True)]))
        for theirs, halves in parts.items()
    }


def _write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    writing.write(path, json.dumps(content, indent=2) + "\n")


def _write_tokenizer(directory: pathlib.Path, config: Any, vocabulary: bytes) -> None:
    """Writes the vocabulary in the form that all releases of transformers read."""
    model = json.loads(vocabulary)["model"]
    pieces = {number: piece for piece, number in model["vocab"].items()}
    merges = (rule if isinstance(rule, str) else " ".join(rule) for rule in model["merges"])
    directory.mkdir()
    writing.write(directory / "vocab.json", json.dumps(model["vocab"], ensure_ascii=False))
    writing.write(directory / "merges.txt", "\n".join(["#version: 0.2", *merges, ""]))
    pad = clip_tokens.END if config.pad_id is None else pieces[config.pad_id]
    tokens = {"bos_token": clip_tokens.START, "eos_token": clip_tokens.END, "unk_token": clip_tokens.END}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": config.max_length, "pad_token": pad}
    _write_json(directory / "tokenizer_config.json", tokens | settings)


def _text_config(config: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    activations = {quick: name for name, quick in clip.QUICK_GELU.items()}
    return {
        "model_type": "clip_text_model",
        "architectures": ["CLIPTextModelWithProjection"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.emb_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.max_length,
        "projection_dim": shapes["text_projection/kernel"][1],
        "hidden_act": activations[config.quick_gelu],
        "layer_norm_eps": config.layer_norm_epsilon,
        "bos_token_id": config.vocab_size - 2,
        "eos_token_id": config.vocab_size - 1 if config.end_id is None else config.end_id,
        "pad_token_id": config.pad_id,
    }


def _transformer_config(config: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    rows, columns = config.grid
    if rows != columns:
        raise ConvertError(f"diffusers' images are squares, but grid is {config.grid}")
    pooled = shapes["text_projection/kernel"][1]
    return {
        "_class_name": "UVit2DModel",
        "hidden_size": config.emb_dim,
        "hidden_dropout": config.dropout_rate,
        "attention_dropout": config.dropout_rate,
        "cond_embed_dim": pooled,
        "micro_cond_encode_dim": config.micro_condition_dim,
        "micro_cond_embed_dim": shapes["transformer/condition_wi/kernel"][0] - pooled,
        "encoder_hidden_size": shapes["transformer/text_projection/kernel"][0],
        "vocab_size": config.vocab_size,
        "codebook_size": config.codebook_size,
        "in_channels": config.token_dim,
        "block_out_channels": config.conv_dim,
        "num_res_blocks": config.num_conv_blocks,
        "downsample": config.downsample,
        "upsample": config.downsample,
        "block_num_heads": config.conv_num_heads,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_dim,
        "layer_norm_eps": config.layer_norm_epsilon,
        "sample_size": rows,
        **_fixed("transformer"),
    }


def _vqgan_config(config: Any) -> dict[str, Any]:
    return {
        "_class_name": "VQModel",
        **{name: [kind] * len(config.widths) for name, kind in amused.BLOCKS.items()},
        "block_out_channels": config.widths,
        "layers_per_block": config.layers_per_block,
        "latent_channels": config.latent_dim,
        "num_vq_embeddings": config.codebook_size,
        "norm_num_groups": config.norm_groups,
        "vq_embed_dim": config.code_dim,
        "lookup_from_codebook": True,
        # The published model's float16 overflows.
        "force_upcast": True,
        **_fixed("vqvae"),
    }


def _fixed(folder: str) -> dict[str, Any]:
    return {name: ours for name, (ours, _) in amused.FIXED[folder].items()}
