"""Reads aMUSEd, a folder of diffusers' pipeline: `transformer/` and `vqvae/`."""

import functools
from collections.abc import Mapping

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
_LAYER = {
    "pre_attention_norm": "norm1",
    "attention": "attn1",
    "pre_text_attention_norm": "norm2",
    "text_attention": "attn2",
    "pre_mlp_norm": "norm3",
}
_CONV_LAYER = {
    "conv": "depthwise",
    "conv_norm": "norm",
    "wi": "channelwise_linear_1",
    "wo": "channelwise_linear_2",
    "modulation": "cond_embeds_mapper",
}


def transformer_names(num_layers: int, num_conv_blocks: int, downsample: bool, projected: bool) -> dict[str, str]:
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
    return names | {
        f"{ours}/{'scale' if 'norm' in ours.rpartition('/')[2] else 'kernel'}": f"{theirs}.weight"
        for ours, theirs in modules.items()
    }


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
    if len(tensor.shape) == 4 and tensor.shape[2:] == (1, 1):
        tensor = tensor.mapped(tensor.shape[:2], lambda array: array[:, :, 0, 0])
    return huggingface.from_torch(name, tensor)


def transformer_tensors(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Returns the parameters of a state dict by our names."""
    return {ours: _from_torch(ours, state[theirs]) for ours, theirs in names.items() if theirs in state}
