r"""Grad-CAM of CLIP: the places of an image that make it agree with a text, and, inverted, those that don't.

The recipe is that of Selvaraju et al. (https://arxiv.org/abs/1610.02391), for vision transformers as in
pytorch-grad-cam (https://github.com/jacobgil/pytorch-grad-cam, its example for CLIP). Let A_pk be number k of
patch p after the first norm of the image tower's last layer ("pre_attention_layer_norm"; the class token is
left out), and s the cosine of the image's and the text's embeddings. Then

    w_k = mean over p of ds / dA_pk
    M_p = max(0, sum over k of w_k A_pk)
    map = (M - min M) / (max (M - min M) + 1e-7)

so each image's map has values from 0 to 1. Later the class token alone is read, so a later layer would have
no gradient at the patches.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Float32, Int, Real

from richhf_jax.network import clip
from richhf_jax.shapes import Array

_EPSILON = 1e-7


def grad_cam(
    network: clip.Clip,
    params: Any,
    image: Real[Array, "batch height width 3"],
    tokens: Int[Array, "batch length"],
) -> Float32[Array, "batch rows columns"]:
    """Computes the map of each image's agreement with its text, one number for each patch; see the module.

    Args:
      network: without `scan_layers` in the image tower.
      params: its parameters.
      image, tokens: as for `Clip.encode_image` and `Clip.encode_text`.

    Raises:
      ValueError: the layers are scanned: the last one isn't there by name.
    """
    config = network.vision_config
    if config.scan_layers:
        raise ValueError("Grad-CAM reads the last layer by its name: give scan_layers=False")
    place = ("vision", f"layers_{config.num_layers - 1}", "pre_attention_layer_norm")
    grid = (image.shape[1] // config.patch_size, image.shape[2] // config.patch_size)
    text: Any = network.apply({"params": params}, tokens, method="encode_text")

    def agreement(offset):
        activations = []

        def add_offset(call, args, kwargs, context):
            output = call(*args, **kwargs)
            if context.module.path != place:
                return output
            activations.append(output)
            return output + offset.astype(output.dtype)

        with nn.intercept_methods(add_offset):
            embeddings: Any = network.apply({"params": params}, image, method="encode_image")
        return jnp.sum(network.similarity(embeddings, text)), activations[0]

    shape = (image.shape[0], 1 + grid[0] * grid[1], config.emb_dim)
    gradient, activations = jax.grad(agreement, has_aux=True)(jnp.zeros(shape))
    weights = jnp.mean(gradient[:, 1:], axis=1)
    maps = jnp.einsum("bpk,bk->bp", activations[:, 1:].astype(jnp.float32), weights)
    return _scaled(jnp.maximum(maps, 0)).reshape(-1, *grid)


def disagreement(
    maps: Float32[Array, "batch rows columns"], side: int
) -> Float32[Array, "batch {side} {side}"]:
    """Makes heatmaps of `grad_cam`'s maps: hot (1) where nothing agrees with the text, 0 where the most does.

    They are resized bilinearly, so their values stay in [0, 1].
    """
    return jax.image.resize(1 - maps, (maps.shape[0], side, side), "bilinear")


def _scaled(maps: Float32[Array, "batch patches"]) -> Float32[Array, "batch patches"]:
    maps = maps - jnp.min(maps, axis=1, keepdims=True)
    return maps / (jnp.max(maps, axis=1, keepdims=True) + _EPSILON)
