"""The heads: from the encoded image to a heatmap or a score. Their layers are data, given in gin.

Feature maps are [batch, height, width, channels]. In the logical axes of the kernels,
[height, width, embed, mlp], `embed` is the channels that come in and `mlp` those that go out, so the
partitioning rules of the transformers apply to the heads as well.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.partitioning import param_with_axes

from richhf_jax.network import layers

Array = jax.Array

_LAYOUT = ("NHWC", "HWIO", "NHWC")


def _convolve(x: Array, kernel: Array, padding: str | tuple) -> Array:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=_LAYOUT)


def subpixel_deconv(x: Array, kernel: Array) -> Array:
    """A stride-2 transposed convolution with a 3x3 kernel, without its zeros.

    Equal to `jax.lax.conv_transpose(x, kernel, (2, 2), 'SAME')`. In one dimension, with taps k0 k1 k2:

        out[2i]     = x[i - 1] k0 + x[i] k2
        out[2i + 1] = x[i] k1

    (x[-1] is 0), and rows and columns alike in two. PyTorch's ConvTranspose2d with padding 1 and output
    padding 1 is aligned otherwise: there out[2i] = x[i] k1 and out[2i + 1] = x[i] k2 + x[i + 1] k0.

    Done with zeros between the inputs, 3/4 of the products are with zeros. Here each of the four parities
    of output rows and columns is a convolution of the input with its own 4, 2, 2 or 1 taps, and the four
    are interleaved: 4 to 6 times faster on 2 CPU cores, forward and backward together.

    Args:
      x: [batch, height, width, channels].
      kernel: [3, 3, channels, filters].

    Returns:
      [batch, 2 height, 2 width, filters].
    """
    batch, height, width, _ = x.shape
    # The taps of an output parity, and how much zero padding the input needs before it.
    even, odd = (slice(0, None, 2), 1), (slice(1, 2), 0)

    def parity(rows, columns):
        return _convolve(x, kernel[rows[0], columns[0]], ((rows[1], 0), (columns[1], 0)))

    # [batch, height, width, 2, filters]: the last-but-one axis is the output column's parity
    upper = jnp.stack([parity(even, even), parity(even, odd)], axis=3)
    lower = jnp.stack([parity(odd, even), parity(odd, odd)], axis=3)
    # [batch, height, 2, width, 2, filters] -> [batch, 2 height, 2 width, filters]
    return jnp.stack([upper, lower], axis=2).reshape(batch, 2 * height, 2 * width, -1)


class Conv(nn.Module):
    """A convolution with bias: stride 1 and zero padding to the same size, or transposed with stride 2.

    'SAME' padding of an even kernel puts the extra row and column after the image.

    Attributes:
      filters: channels that go out.
      kernel_size: side of the kernel; 3 where transposed.
      transposed: doubles height and width, see `subpixel_deconv`.
      dtype: of the computation.
      bias_init: initialiser of the bias.
      kernel_axes: the kernel's logical axes; the bias takes the last.
    """

    filters: int
    kernel_size: int
    transposed: bool = False
    dtype: Any = jnp.float32
    bias_init: Any = nn.initializers.zeros
    kernel_axes: tuple[str | None, ...] = ("height", "width", "embed", "mlp")

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[batch, height, width, channels] -> [batch, height, width, filters], or twice the height and width.

        Raises:
          ValueError: a transposed kernel that is not 3x3.
        """
        k = self.kernel_size
        if self.transposed and k != 3:
            raise ValueError(f"a 'deconv' layer has a 3x3 kernel, got {k}x{k}")
        shape = (k, k, x.shape[-1], self.filters)
        init = nn.initializers.lecun_normal()
        kernel = param_with_axes("kernel", init, shape, jnp.float32, axes=self.kernel_axes)
        bias = param_with_axes("bias", self.bias_init, shape[-1:], jnp.float32, axes=self.kernel_axes[-1:])
        x, kernel, bias = (jnp.asarray(array, self.dtype) for array in (x, kernel, bias))
        x = subpixel_deconv(x, kernel) if self.transposed else _convolve(x, kernel, "SAME")
        return x + bias[None, None, None]


def _norm_relu(x: Array, dtype: Any, name: str) -> Array:
    return nn.relu(layers.CenteredLayerNorm(dtype=dtype, name=name)(x))


class HeatmapHead(nn.Module):
    """Convolutions and stride-2 deconvolutions up to a heatmap.

    The paper's head, on 32x32 tokens of a 512-pixel image, is `layers` =

        ('conv', 768, 3), ('conv', 384, 3),
        ('deconv', 768, 3), ('conv', 768, 3), ('conv', 768, 3), ... 384, 384, 192
        ('conv', 192, 3)

    and the output convolution, which the head adds itself.

    Attributes:
      layers: (kind, filters, kernel size) each; kind 'conv' keeps the size, 'deconv' doubles it. A layer
        norm over the channels and a ReLU follow each.
      dtype: of the computation but for the output.
      output_layer: (kind, kernel size) of the last layer, which has one filter and the sigmoid.
      output_bias_init: the output's bias at the start. Heat is rare: with -3 a new head says 0.05
        everywhere and not 0.5, which spares it the first steps.
    """

    layers: Sequence[tuple[str, int, int]]
    dtype: Any = jnp.float32
    output_layer: tuple[str, int] = ("conv", 3)
    output_bias_init: float = 0.0

    @nn.compact
    def __call__(self, features: Array) -> Array:
        """Feature map [batch, height, width, embed] -> heatmap [batch, H, W], float32 in [0, 1].

        H and W are height and width times 2 for each 'deconv', the output layer included.

        Raises:
          ValueError: a layer that is neither 'conv' nor 'deconv', or a deconv whose kernel is not 3x3.
        """
        kinds = [kind for kind, *_ in (*self.layers, self.output_layer)]
        if unknown := [i for i, kind in enumerate(kinds) if kind not in ("conv", "deconv")]:
            layer = unknown[0]
            raise ValueError(
                f"heatmap head, layer {layer}: expected 'conv' or 'deconv', got {kinds[layer]!r}"
            )
        x = features
        for i, (kind, filters, kernel_size) in enumerate(self.layers):
            x = Conv(filters, kernel_size, kind == "deconv", self.dtype, name=f"{kind}_{i}")(x)
            x = _norm_relu(x, self.dtype, f"norm_{i}")
        kind, kernel_size = self.output_layer
        logits = Conv(
            1,
            kernel_size,
            kind == "deconv",
            jnp.float32,  # bfloat16 would give a low heat only two or three digits
            bias_init=nn.initializers.constant(self.output_bias_init),
            kernel_axes=("height", "width", "embed", None),
            name="output",
        )(x)
        return nn.sigmoid(logits[..., 0])


class ScoreHead(nn.Module):
    """Convolutions, then dense layers down to one number.

    The paper's kernels are 2x2 with stride 1. It does not name the padding: here 'SAME', so the map keeps
    its size, and the first dense layer sees height x width x channels values: the head is bound to one
    image size.

    Attributes:
      conv_layers: (filters, kernel size) each; a layer norm over the channels and a ReLU follow.
      dense_layers: widths of the hidden dense layers; a ReLU follows each.
      dtype: of the computation but for the output.
    """

    conv_layers: Sequence[tuple[int, int]] = ((768, 2), (384, 2), (128, 2), (64, 2))
    dense_layers: Sequence[int] = (2048, 1024)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: Array) -> Array:
        """Feature map [batch, height, width, embed] -> score [batch], float32 in [0, 1]."""
        x = features
        for i, (filters, kernel_size) in enumerate(self.conv_layers):
            x = Conv(filters, kernel_size, dtype=self.dtype, name=f"conv_{i}")(x)
            x = _norm_relu(x, self.dtype, f"norm_{i}")
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.dense_layers):
            dense = layers.DenseGeneral(
                width, dtype=self.dtype, kernel_axes=("embed", "mlp"), use_bias=True, name=f"dense_{i}"
            )
            x = nn.relu(dense(x))
        logits = layers.DenseGeneral(
            1, dtype=jnp.float32, kernel_axes=("embed", None), use_bias=True, name="output"
        )(x)
        return nn.sigmoid(logits[..., 0])
