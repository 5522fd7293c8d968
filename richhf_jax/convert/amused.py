"""Reads aMUSEd as diffusers' pipeline: a folder of folders.

    model_index.json   text_encoder/   tokenizer/   transformer/   vqvae/   scheduler/

The layouts of arrays are torch's, see `huggingface`. Besides, the transformer's gated feed-forward block has
one matrix there and two here, and some 1x1 convolutions there are matrices here.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from richhf_jax import clip_tokens
from richhf_jax.convert import clip, huggingface
from richhf_jax.convert.source import ConvertError, Source, Tensor, read_json

INDEX = "model_index.json"
_PIPELINES = ("AmusedPipeline", "AmusedImg2ImgPipeline", "AmusedInpaintPipeline")
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
# Settings that our networks have with one value only: that value, and the one of a file that doesn't say it.
FIXED = {
    "transformer": {"use_bias": (False, False), "ln_elementwise_affine": (True, True)},
    "vqvae": {
        "in_channels": (3, 3),
        "out_channels": (3, 3),
        "act_fn": ("silu", "silu"),
        "norm_type": ("group", "group"),
        "mid_block_add_attention": (False, True),
    },
}
BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "out": "to_out.0"}
# Modules outside the layers: our names -> diffusers'.
_TRANSFORMER = {
    "text_projection": "encoder_proj",
    "text_norm": "encoder_proj_layer_norm",
    "condition_wi": "cond_embed.linear_1",
    "condition_wo": "cond_embed.linear_2",
    "token_norm": "embed.layer_norm",
    "token_projection": "embed.conv",
    "layers_in_norm": "project_to_hidden_norm",
    "layers_in": "project_to_hidden",
    "layers_out_norm": "project_from_hidden_norm",
    "layers_out": "project_from_hidden",
    "logits_in": "mlm_layer.conv1",
    "logits_norm": "mlm_layer.layer_norm",
    "logits_dense": "mlm_layer.conv2",
}
# 1x1 convolutions there, matrices here.
MATRICES = ("token_projection", "logits_in", "logits_dense")
# One matrix there, two here: first the linear one, then the one before the activation.
HALVES = ("wi_1", "wi_0")
_LAYER = {
    "pre_attention_norm": "norm1",
    "attention": "attn1",
    "pre_text_attention_norm": "norm2",
    "text_attention": "attn2",
    "pre_mlp_norm": "norm3",
}
_RESIDUAL = {
    "norm_0": "norm1",
    "conv_0": "conv1",
    "norm_1": "norm2",
    "conv_1": "conv2",
    "shortcut": "conv_shortcut",
}
_CONV_LAYER = {
    "conv": "depthwise",
    "conv_norm": "norm",
    "wi": "channelwise_linear_1",
    "wo": "channelwise_linear_2",
    "modulation": "cond_embeds_mapper",
}


def transformer_names(
    num_layers: int, num_conv_blocks: int, downsample: bool, projected: bool
) -> dict[str, str]:
    """Returns our names of the transformer's parameters -> diffusers'; `wi_0` and `wi_1` share one of theirs.

    Args:
      num_layers, num_conv_blocks, downsample: as in `transformer.TransformerConfig`.
      projected: whether the convolutional blocks have another width than the layers, and so project the text.
    """
    modules = dict(_TRANSFORMER)
    names = {"token_embedder/embedding": "embed.embeddings.weight"}
    for i in range(num_layers):
        ours, theirs = f"layers_{i}", f"transformer_layers.{i}"
        for name, other in _LAYER.items():
            if name.endswith("_norm"):
                modules[f"{ours}/{name}/norm"] = f"{theirs}.{other}.norm"
                modules[f"{ours}/{name}/modulation"] = f"{theirs}.{other}.linear"
            else:
                modules |= _attention(f"{ours}/{name}", f"{theirs}.{other}")
        modules[f"{ours}/mlp/wi_0"] = modules[f"{ours}/mlp/wi_1"] = f"{theirs}.ff.net.0.proj"
        modules[f"{ours}/mlp/wo"] = f"{theirs}.ff.net.2"
    for block in ("down_block", "up_block"):
        for i in range(num_conv_blocks):
            ours, theirs = f"{block}/layers_{i}", f"{block}.res_blocks.{i}"
            modules |= {f"{ours}/{name}": f"{theirs}.{other}" for name, other in _CONV_LAYER.items()}
            for parameter, other in (("scale", "gamma"), ("bias", "beta")):
                names[f"{ours}/response_norm/{parameter}"] = f"{theirs}.channelwise_norm.{other}"
            theirs = f"{block}.attention_blocks.{i}"
            if projected:
                modules[f"{ours}/text_projection"] = f"{theirs}.kv_mapper"
            for number in range(2):
                modules[f"{ours}/text_norm_{number}"] = f"{theirs}.norm{number + 1}"
                modules |= _attention(f"{ours}/text_attention_{number}", f"{theirs}.attn{number + 1}")
    if downsample:
        for block, name in (("down_block", "downsample"), ("up_block", "upsample")):
            modules[f"{block}/{name}_norm"] = f"{block}.{name}.norm"
            modules[f"{block}/{name}"] = f"{block}.{name}.conv"
    return names | {_weight(ours): f"{theirs}.weight" for ours, theirs in modules.items()}


def vqgan_names(widths: Sequence[int], layers_per_block: int) -> dict[str, str]:
    """Returns our names of the tokenizer's parameters -> diffusers'.

    Args:
      widths, layers_per_block: as in `vqgan.VQGANConfig`.
    """
    modules = {"to_code": "quant_conv", "from_code": "post_quant_conv"}
    coders = {
        "encoder": ("down_blocks", "downsample", layers_per_block, widths),
        "decoder": ("up_blocks", "upsample", layers_per_block + 1, tuple(reversed(widths))),
    }
    for coder, (blocks, resize, count, outputs) in coders.items():
        for ours, theirs in {
            "conv_in": "conv_in",
            "norm_out": "conv_norm_out",
            "conv_out": "conv_out",
        }.items():
            modules[f"{coder}/{ours}"] = f"{coder}.{theirs}"
        for i in range(2):
            modules |= _residual(f"{coder}/middle_{i}", f"{coder}.mid_block.resnets.{i}", projected=False)
        width = outputs[0]
        for i, output in enumerate(outputs):
            ours, theirs = f"{coder}/block_{i}", f"{coder}.{blocks}.{i}"
            for j in range(count):
                modules |= _residual(f"{ours}_layer_{j}", f"{theirs}.resnets.{j}", projected=width != output)
                width = output
            if i + 1 < len(outputs):
                modules[f"{ours}_{resize}"] = f"{theirs}.{resize}rs.0.conv"
    names = {"quantizer/embedding": "quantize.embedding.weight"}
    for ours, theirs in modules.items():
        names[_weight(ours)] = f"{theirs}.weight"
        names[f"{ours}/bias"] = f"{theirs}.bias"
    return names


def _residual(ours: str, theirs: str, projected: bool) -> dict[str, str]:
    names = {f"{ours}/{name}": f"{theirs}.{other}" for name, other in _RESIDUAL.items()}
    if not projected:
        del names[f"{ours}/shortcut"]
    return names


def _weight(module: str) -> str:
    """Returns our name of the parameter that torch calls weight."""
    return f"{module}/{'scale' if 'norm' in module.rpartition('/')[2] else 'kernel'}"


def _attention(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}/{name}": f"{theirs}.{other}" for name, other in _ATTENTION.items()}


def _from_torch(name: str, tensor: Tensor) -> Tensor:
    """Converts the parameter with our name `name` from diffusers' layout to ours."""
    module = name.split("/")[-2]
    if module in HALVES and len(tensor.shape) == 2:
        rows = tensor.shape[0] // 2
        half = slice(0, rows) if module == HALVES[0] else slice(rows, 2 * rows)
        tensor = tensor.mapped((rows, tensor.shape[1]), lambda array: array[half])
    elif module == "upsample" and len(tensor.shape) == 4:
        # [in, out, 2, 2] -> [in, 2 * 2 * out]
        shape = tensor.shape[0], 4 * tensor.shape[1]
        return tensor.mapped(shape, lambda array: array.transpose(0, 2, 3, 1).reshape(shape))
    elif module == "response_norm":
        return tensor.reshaped(tensor.shape[-1])
    elif module in MATRICES and tensor.shape[2:] == (1, 1):
        tensor = tensor.reshaped(*tensor.shape[:2])
    return huggingface.from_torch(name, tensor)


def tensors(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Returns the parameters of a state dict by our names, of those that it has."""
    return {ours: _from_torch(ours, state[theirs]) for ours, theirs in names.items() if theirs in state}


class _Part(NamedTuple):
    """A folder with parameters.

    Attributes:
      prefix: the beginning of our names.
      names: the rest of our names -> names in the folder.
      settings: see `Source.settings`.
    """

    prefix: str
    names: Mapping[str, str]
    settings: Mapping[str, Any]


def is_amused(path: str) -> bool:
    """Tells whether a directory is diffusers' pipeline of aMUSEd."""
    file = pathlib.Path(path) / INDEX
    return file.is_file() and read_json(file).get("_class_name") in _PIPELINES


def open_amused(path: str) -> Source:
    """Opens a pipeline that diffusers' `save_pretrained` wrote, or that was downloaded from the hub.

    Raises:
      ConvertError: a part is missing or damaged, or has settings that our networks don't.
    """
    root = pathlib.Path(path)
    found: dict[str, Tensor] = {}
    unused: dict[str, tuple[int, ...] | None] = {}
    settings: dict[str, Any] = {}
    notes = []
    for folder, read in {"text_encoder": _text, "transformer": _transformer, "vqvae": _vqgan}.items():
        directory = root / folder
        config = _read_config(directory, "config.json")
        try:
            part = read(root, config)
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            raise huggingface.senseless(directory, error) from error
        state = huggingface.read_weights(
            directory, huggingface.WEIGHTS if folder == "text_encoder" else WEIGHTS
        )
        of_part = tensors(state.tensors, part.names)
        huggingface.check_complete(str(directory), part.names, of_part)
        left = huggingface.unused(state.tensors, of_part)
        unused |= {f"{folder}/{name}": shape for name, shape in left.items()}
        found |= {part.prefix + name: tensor for name, tensor in of_part.items()}
        settings |= part.settings
        notes += [f"{folder}/: {state.note}"] if state.note else []
    return Source(
        path=path,
        description="aMUSEd as diffusers' pipeline",
        tensors=found,
        unused=unused,
        settings=settings,
        note="; ".join(notes),
    )


def _read_config(directory: pathlib.Path, name: str) -> dict[str, Any]:
    """Reads a part's configuration, and checks the settings that our networks have with one value only."""
    if not (directory / name).is_file():
        raise ConvertError(f"{directory / name} is missing: it is part of aMUSEd's pipeline")
    config = read_json(directory / name)
    for setting, (ours, default) in FIXED.get(directory.name, {}).items():
        if (theirs := config.get(setting, default)) != ours:
            raise ConvertError(f"{directory / name}: {setting} is {theirs!r}; our network has {ours!r} only")
    return config


def _text(root: pathlib.Path, config: Mapping[str, Any]) -> _Part:
    config = clip.with_text_defaults(config)
    settings = clip.text_settings(str(root / "text_encoder"), config)
    settings["text_config.pad_id"] = _pad_id(root / "tokenizer")
    return _Part("", clip.text_names(huggingface.depth_in(config, "num_hidden_layers")), settings)


def _pad_id(directory: pathlib.Path) -> int:
    """Returns the token after a text's end. The transformer reads its vectors as it does the text's."""
    settings = _read_config(directory, "tokenizer_config.json")
    if "pad_token" not in settings and (directory / "special_tokens_map.json").is_file():
        settings = _read_config(directory, "special_tokens_map.json")
    token = settings.get("pad_token", clip_tokens.END)
    token = token["content"] if isinstance(token, dict) else token
    number = clip_tokens.read(directory).id_of(token)
    if number is None:
        raise ConvertError(f"{directory}: the vocabulary has no {token!r}, which is to fill texts up")
    return number


def _transformer(root: pathlib.Path, config: Mapping[str, Any]) -> _Part:
    downsample, upsample = (bool(config.get(name)) for name in ("downsample", "upsample"))
    if downsample != upsample:
        raise ValueError("one of downsample and upsample is true; our network has both or neither")
    mask_id = _read_config(root / "scheduler", "scheduler_config.json")["mask_token_id"]
    if mask_id != config["vocab_size"] - 1:
        raise ValueError(
            f"vocab_size is {config['vocab_size']}, and the scheduler's mask_token_id {mask_id}; our mask's"
            " token is the last one"
        )
    side = config["sample_size"]
    names = transformer_names(
        huggingface.depth_in(config, "num_hidden_layers"),
        huggingface.depth_in(config, "num_res_blocks"),
        downsample,
        config["block_out_channels"] != config["hidden_size"],
    )
    settings = {
        "grid": (side, side),
        "num_heads": config["num_attention_heads"],
        "conv_num_heads": config["block_num_heads"],
        "downsample": downsample,
        "micro_condition_dim": config["micro_cond_encode_dim"],
        "layer_norm_epsilon": config["layer_norm_eps"],
    }
    return _Part(
        "transformer/", names, {f"transformer_config.{name}": value for name, value in settings.items()}
    )


def _vqgan(root: pathlib.Path, config: Mapping[str, Any]) -> _Part:
    del root
    for name, kind in BLOCKS.items():
        if kinds := set(config[name]) - {kind}:
            raise ValueError(f"{name} has {min(kinds)!r}; our network has {kind!r} only")
    names = vqgan_names(config["block_out_channels"], huggingface.depth_in(config, "layers_per_block"))
    return _Part(
        "vqgan/", names, {"vqgan_config.norm_groups": config["norm_num_groups"], "vqgan_config.levels": ()}
    )
