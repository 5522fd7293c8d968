"""Flash attention by cuDNN on NVIDIA GPUs, and the choice between it and plain matrix products.

    xla     products of matrices: there is an array of a logit for each pair of query and key
    cudnn   cuDNN's flash attention: no such array, neither forward nor backward
    auto    cudnn where device, shape and mask have it, xla elsewhere

Both compute the same function, up to rounding.
"""

import re
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax.linen.partitioning import with_sharding_constraint
from jaxtyping import Bool, Float

from richhf_jax.shapes import Array

KERNELS = ("auto", "xla", "cudnn")

# cuDNN's own limits (its documentation, "Attention", support matrix).
_LEAST_CAPABILITY = (8, 0)
_DTYPES = ("bfloat16", "float16")
_HEAD_DIM_STEP, _LARGEST_HEAD_DIM = 8, 128


class Device(NamedTuple):
    """The kind of device that a program is traced for.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      capability: compute capability of an NVIDIA GPU of this machine; None for any other device.
    """

    platform: str
    capability: tuple[int, int] | None = None


class Attention(NamedTuple):
    """What the choice of a kernel depends on, besides the device.

    Attributes:
      dtype: type of queries, keys and values, such as "bfloat16".
      head_dim: width of a head.
      q_length, kv_length: number of queries and of keys.
      has_bias: whether numbers are added to the logits.
      sees_prefix: whether the keys that an example sees are its first ones, or all.
    """

    dtype: str
    head_dim: int
    q_length: int
    kv_length: int
    has_bias: bool
    sees_prefix: bool


def current_device() -> Device:
    """Returns the device that the program is traced for: that of the mesh in context, or this machine's.

    A program for other hardware, such as a topology of chips that aren't there, has no known capability.
    """
    config: Any = jax.config
    default = config.jax_default_device  # a device, a platform's name, or None
    here = default if isinstance(default, jax.Device) else jax.local_devices(backend=default)[0]
    target = jax.sharding.get_abstract_mesh().abstract_device or here
    # AMD's GPUs have a name such as "gfx942" instead.
    number = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(here, "compute_capability", "")))
    if target.device_kind != here.device_kind or number is None:
        return Device(target.platform)
    return Device(target.platform, (int(number[1]), int(number[2])))


def obstacle(device: Device, attention: Attention) -> str | None:
    """Returns why cuDNN's flash attention can't compute an attention on a device; None: it can."""
    if device.capability is None:
        other = "another GPU" if device.platform == "gpu" else f"a {device.platform.upper()}"
        return f"it takes an NVIDIA GPU of this machine, and the program is for {other}"
    if device.capability < _LEAST_CAPABILITY:
        return "the GPU's compute capability is {}.{}; {}.{} is the least".format(
            *device.capability, *_LEAST_CAPABILITY
        )
    if attention.dtype not in _DTYPES:
        return f"activations are {attention.dtype}; it takes {' and '.join(_DTYPES)}"
    if attention.head_dim % _HEAD_DIM_STEP or attention.head_dim > _LARGEST_HEAD_DIM:
        return (
            f"heads are {attention.head_dim} wide; it takes multiples of {_HEAD_DIM_STEP} up to"
            f" {_LARGEST_HEAD_DIM}"
        )
    if attention.has_bias and (attention.q_length % 2 or attention.kv_length % 2):
        return (
            f"there are {attention.q_length} queries and {attention.kv_length} keys; with relative positions"
            " it takes even numbers"
        )
    if not attention.sees_prefix:
        return "the mask hides tokens before others that it shows, as that of letterboxed pictures does"
    return None


def choose(
    kernel: str,
    query: Float[Array, "batch q_length heads kv"],
    key: Float[Array, "batch kv_length heads kv"],
    bias: Float[Array, "..."] | None,
    sees_prefix: bool,
) -> Literal["xla", "cudnn"]:
    """Chooses the kernel for the device that the program is traced for.

    Args:
      kernel: one of `KERNELS`.
      query, key, bias: as for `flash`.
      sees_prefix: whether the keys that an example sees are its first ones, or all.

    Raises:
      ValueError: 'cudnn' was asked for and can't compute it, or there is no such kernel.
    """
    if kernel not in KERNELS:
        raise ValueError(f"attention_kernel must be one of {KERNELS}, got {kernel!r}")
    if kernel == "xla":
        return "xla"
    attention = Attention(
        query.dtype.name, query.shape[-1], query.shape[1], key.shape[1], bias is not None, sees_prefix
    )
    reason = obstacle(current_device(), attention)
    if kernel == "cudnn" and reason:
        raise ValueError(
            f"attention_kernel = 'cudnn' isn't possible here: {reason}; 'auto' takes it where it is possible"
            " (gin's ATTENTION_KERNEL)"
        )
    return "xla" if reason else "cudnn"


def flash(
    query: Float[Array, "batch q_length heads kv"],
    key: Float[Array, "batch kv_length heads kv"],
    value: Float[Array, "batch kv_length heads kv"],
    bias: Float[Array, "1 heads q_length kv_length"] | None = None,
    visible: Bool[Array, "batch kv_length"] | None = None,
    kept: Float[Array, "batch heads 1 kv_length"] | None = None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "batch q_length heads kv"]:
    """Computes softmax(query . key + bias) . value over the visible keys, without the array of logits.

    Args:
      query, key, value: of as many heads each. The logits aren't scaled.
      bias: number added to each logit, the same for all examples.
      visible: the keys that all queries of an example see. They must be its first ones; None: all keys.
      kept: factor of each attention weight, the same for all queries: dropout.
      implementation: that of `jax.nn.dot_product_attention`. 'xla' is for tests on machines without a GPU.
    """
    batch, q_length = query.shape[:2]
    if kept is not None:
        # A key's weights have one factor for all queries, so it may as well multiply the key's value.
        # [batch, heads, 1, kv_length] -> [batch, kv_length, heads, 1]
        value = value * kept.transpose(0, 3, 1, 2)
    # On several devices, JAX splits the kernel's work as these arrays are split.
    query, key, value = (
        with_sharding_constraint(array, ("batch", "length", "heads", "kv")) for array in (query, key, value)
    )
    # Lengths are given even where all keys are visible: without them, cuDNN's backward pass may return NaN
    # where all logits of a query are far below zero (https://github.com/NVIDIA/cudnn-frontend/issues/1072).
    # All queries count, those at padding too: they see the same keys as others, so their outputs are finite.
    kv_lengths = jnp.full(batch, key.shape[1]) if visible is None else jnp.sum(visible, axis=-1)
    q_lengths, kv_lengths = (
        with_sharding_constraint(lengths.astype(jnp.int32), ("batch",))
        for lengths in (jnp.full(batch, q_length), kv_lengths)
    )
    if bias is not None:
        # cuDNN may return NaN for a float32 bias with bfloat16 queries (https://github.com/jax-ml/jax/issues/32242).
        bias = with_sharding_constraint(bias.astype(query.dtype), (None, "heads", None, None))
    attended = jax.nn.dot_product_attention(
        query,
        key,
        value,
        bias,
        scale=1.0,
        query_seq_lengths=q_lengths,
        key_value_seq_lengths=kv_lengths,
        implementation=implementation,
    )
    return with_sharding_constraint(attended, ("batch", "length", "heads", "kv"))
