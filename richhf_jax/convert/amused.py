"""Reads aMUSEd, a folder of diffusers' pipeline: `transformer/` and `vqvae/`."""

from collections.abc import Mapping, Sequence

import numpy as np

from richhf_jax.convert import huggingface
from richhf_jax.convert.source import Tensor

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
_MATRICES = ("token_projection", "logits_in", "logits_dense")
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
    if module in ("wi_0", "wi_1"):
        # Theirs are one matrix: the linear half, then the half with the activation.
        half = slice(None, tensor.shape[0] // 2) if module == "wi_1" else slice(tensor.shape[0] // 2, None)
        shape = tensor.shape[0] // 2, tensor.shape[1]
        return huggingface.from_torch(name, tensor.mapped(shape, lambda array: array[half]))
    if module == "upsample":
        # [in, out, 2, 2] -> [in, 2 * 2 * out]
        width, out = tensor.shape[:2]
        return tensor.mapped((width, 4 * out), lambda array: array.transpose(0, 2, 3, 1).reshape(width, -1))
    if module == "response_norm":
        return tensor.mapped(tensor.shape[-1:], np.ravel)
    if module in _MATRICES:
        tensor = tensor.mapped(tensor.shape[:2], lambda array: array[:, :, 0, 0])
    return huggingface.from_torch(name, tensor)


def tensors(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Returns the parameters of a state dict by our names."""
    return {ours: _from_torch(ours, state[theirs]) for ours, theirs in names.items() if theirs in state}
