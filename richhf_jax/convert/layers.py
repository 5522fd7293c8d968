"""Converts between single layers, layers_0, layers_1, ..., and layers stacked for `nn.scan`."""

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import traverse_util

from richhf_jax.convert.source import Tensor

_LAYER = re.compile(r"(^|.*/)layers_(\d+)/(.*)")
_STACKED = re.compile(r"(^|.*/)layers/(.*)")


def stack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """Makes the tree of a model with `scan_layers` from the tree of a model without.

    {"encoder": {"layers_0": {"w": [3]}, "layers_1": {"w": [3]}}} -> {"encoder": {"layers": {"w": [2, 3]}}}

    Args:
      params: a nested tree; every layers_0, layers_1, ... in it is stacked, all else stays as it is.

    Raises:
      ValueError: a stack lacks a layer, or its layers are not alike.
    """
    flat = traverse_util.flatten_dict(dict(params), sep="/")
    stacks: dict[tuple[str, str], dict[int, Any]] = {}
    result = {}
    for name, value in flat.items():
        if match := _LAYER.fullmatch(name):
            stacks.setdefault((f"{match[1]}layers", match[3]), {})[int(match[2])] = value
        else:
            result[name] = value
    depths: dict[str, int] = {}
    for (stack, parameter), layers in stacks.items():
        name = f"{stack}/{parameter}"
        depth = depths.setdefault(stack, len(layers))
        if sorted(layers) != list(range(depth)):
            raise ValueError(f"{name} is in the layers {sorted(layers)} of {depth}: all must have it")
        result[name] = jnp.stack([layers[i] for i in range(depth)])
    return traverse_util.unflatten_dict(result, sep="/")


def unstack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """Makes the tree of a model without `scan_layers`, the inverse of `stack_layers`."""
    flat: dict[str, Any] = traverse_util.flatten_dict(dict(params), sep="/")
    result = {}
    for name, value in flat.items():
        if layers := layer_names(name, value.shape[0] if value.ndim else 0):
            result |= {layer: value[i] for i, layer in enumerate(layers)}
        else:
            result[name] = value
    return traverse_util.unflatten_dict(result, sep="/")


def layer_names(name: str, depth: int) -> list[str]:
    """Returns the names of a stacked parameter's layers; [] for a parameter that is not stacked.

    >>> layer_names("encoder/layers/mlp/wo/kernel", 2)
    ['encoder/layers_0/mlp/wo/kernel', 'encoder/layers_1/mlp/wo/kernel']
    """
    match = _STACKED.fullmatch(name)
    return [f"{match[1]}layers_{i}/{match[2]}" for i in range(depth)] if match else []


def unstack_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Unstacks a reader's tensors as `unstack_layers` does arrays; no values are read."""
    result = {}
    for name, tensor in tensors.items():
        if tensor.shape and tensor.shape[0] and _STACKED.fullmatch(name):
            slices = tensor.unstacked()
            result |= dict(zip(layer_names(name, len(slices)), slices, strict=True))
        else:
            result[name] = tensor
    return result


def natural_order(name: str) -> list[tuple[int, str]]:
    """Returns a key for sorting names that puts layers_2 before layers_10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
