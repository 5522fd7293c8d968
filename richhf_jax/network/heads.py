"""The heads: from the encoded image to a heatmap or a score. Their layers are data, given in gin.

Feature maps are [batch, height, width, channels]. The kernels' logical axes are [height, width, embed, mlp]:
`embed` stands for the input channels and `mlp` for the output channels, so that the partitioning rules of the
transformers apply to the heads as well.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from flax.linen.partitioning import param_with_axes, with_sharding_constraint
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Float32

from richhf_jax.network import convolutions, layers
from richhf_jax.shapes import Array

# ('conv' | 'deconv', filters, kernel side[, steps after it]) or ('residual', layers[, steps after it]).
Layer = tuple

# The fewest rows of a strip. Below, recomputing the border rows costs more than the strips save.
_MIN_ROWS = 16
_SAVED = "head_convolution"
_KEEP_CONVOLUTIONS = jax.checkpoint_policies.save_only_these_names(_SAVED)

# Least and greatest standard deviation of a score, and that of a new head, near the spread of raters' scores.
_LEAST_DEVIATION, _GREATEST_DEVIATION, _FIRST_DEVIATION = 0.01, 1.0, 0.2


@struct.dataclass
class Style:
    """Settings that all layers of a head share.

    Attributes:
      norm: 'layer': zero mean and unit variance, then scale and bias. 'rms': division by the root mean
        square, then scale. Both are taken over the channels.
      norm_epsilon: epsilon of the norms.
      deconv_padding: 'SAME' or 'torch', see `convolutions.deconv`.
      dtype: type of the computation, except for a head's output.
      scan_layers: runs equal layers in a row in one loop, so that XLA compiles one. Their parameters are
        named and shaped as without.
      row_strips: number of strips that a map is cut into where each gets at least 16 rows, see
        `convolutions`; 1 cuts nothing.
    """

    norm: str = "layer"
    norm_epsilon: float = 1e-6
    deconv_padding: str = "SAME"
    dtype: Any = jnp.float32
    scan_layers: bool = False
    row_strips: int = 1

    def strips(self, height: int) -> int:
        """Number of strips that a map of this height is cut into."""
        enough = height % self.row_strips == 0 and height >= _MIN_ROWS * self.row_strips
        return self.row_strips if enough else 1


class Conv(nn.Module):
    """A convolution with bias: stride 1 and zero padding to the same size, or transposed with stride 2.

    'SAME' padding of an even kernel puts the extra row and column after the image.

    Attributes:
      filters: output channels.
      kernel_size: side of the kernel; 3 where transposed.
      transposed: None, or the padding of `convolutions.deconv`, which doubles height and width.
      dtype: type of the computation.
      strips: number of strips that its map is cut into.
      bias_init: initialiser of the bias.
      kernel_axes: the kernel's logical axes; the bias has the last.
    """

    filters: int
    kernel_size: int
    transposed: str | None = None
    dtype: Any = jnp.float32
    strips: int = 1
    bias_init: Any = nn.initializers.zeros
    kernel_axes: layers.Axes = ("height", "width", "embed", "mlp")

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch _ _ {self.filters}"]:
        """Convolves maps, or their strips.

        Raises:
          ValueError: a transposed kernel is not 3x3.
        """
        k = self.kernel_size
        if self.transposed and k != 3:
            raise ValueError(f"a 'deconv' layer has a 3x3 kernel, got {k}x{k}")
        shape = (k, k, x.shape[-1], self.filters)
        init = nn.initializers.lecun_normal()
        kernel = param_with_axes("kernel", init, shape, jnp.float32, axes=self.kernel_axes)
        bias = param_with_axes("bias", self.bias_init, shape[-1:], jnp.float32, axes=self.kernel_axes[-1:])
        x, kernel, bias = (jnp.asarray(array, self.dtype) for array in (x, kernel, bias))
        kernel = layers.gathered(kernel, self.kernel_axes)
        if self.transposed:
            x = convolutions.deconv(x, kernel, self.transposed, self.strips)
        else:
            x = convolutions.conv(x, kernel, self.strips)
        return _finished(checkpoint_name(x, _SAVED)) + bias[None, None, None]


def _norm(style: Style, name: str) -> nn.Module:
    norms = {"layer": layers.CenteredLayerNorm, "rms": layers.LayerNorm}
    if style.norm not in norms:
        raise ValueError(f"a head's norm must be one of {list(norms)}, got {style.norm!r}")
    return norms[style.norm](epsilon=style.norm_epsilon, dtype=style.dtype, name=name)


def _apply_layers(
    module: nn.Module, head_layers: Sequence[Layer], style: Style, x: Array, strips: int = 1
) -> tuple[Array, int]:
    """Runs layers on a feature map, within the module's compact method; i is part of the name of layer i.

    Args:
      module: the module that owns the layers.
      head_layers: the layers.
      style: their common settings.
      x: [batch * strips, height / strips, width, channels].
      strips: number of strips that a map of `x` is cut into.

    Returns:
      The last layer's output, and the number of strips that each of its maps is cut into.
    """
    i = 0
    for layer, equal in itertools.groupby(head_layers):
        if strips == 1 and style.strips(x.shape[1]) > 1:
            strips = style.strips(x.shape[1])
            x = convolutions.cut(x, strips)
        count = len(list(equal))
        # The first of several equal layers may have another number of input channels than the rest.
        first = 0 if layer[0] == "conv" and x.shape[-1] == layer[1] else 1
        scan = style.scan_layers and count - first > 1 and not module.is_initializing()
        for j in range(i, i + (first if scan else count)):
            x = _apply_layer(j, layer, style, x, strips)
        if scan:
            x = _scan_equal(module, range(i + first, i + count), layer, style, x, strips)
        i += count
    return x, strips


def _scan_equal(
    module: nn.Module, indices: Sequence[int], layer: Layer, style: Style, x: Array, strips: int
) -> Array:
    """Runs the module's layers with these indices, all equal to `layer`, in one loop."""
    params = module.variables["params"]
    names = [name for name in (layer[0], "norm") if f"{name}_{indices[0]}" in params]
    one, its_index = Layers([layer], style, strips, parent=None), 0
    stacked = stack_trees([{f"{name}_{its_index}": params[f"{name}_{i}"] for name in names} for i in indices])

    @functools.partial(jax.checkpoint, policy=_KEEP_CONVOLUTIONS, prevent_cse=False)
    def apply(x, of_layer):
        return one.apply({"params": of_layer}, x), None

    return jax.lax.scan(apply, x, stacked)[0]


def stack_trees(trees: Sequence[Any]) -> Any:
    """Stacks trees of equally shaped arrays along a new first axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _apply_layer(i: int, layer: Layer, style: Style, x: Array, strips: int) -> Array:
    kind, *arguments = layer
    if kind == "residual":
        nested, *after = arguments
        x = x + Layers(nested, style, strips, name=f"residual_{i}")(x)
    elif kind in ("conv", "deconv"):
        filters, kernel_size, *after = arguments
        transposed = style.deconv_padding if kind == "deconv" else None
        x = Conv(filters, kernel_size, transposed, style.dtype, strips, name=f"{kind}_{i}")(x)
        after = after or [("norm", "relu")]
    else:
        raise ValueError(f"a head's layer {i}: expected 'conv', 'deconv' or 'residual', got {kind!r}")
    for step in after[0] if after else ():
        if step not in ("norm", "relu"):
            raise ValueError(f"a head's layer {i} is followed by 'norm' or 'relu', not by {step!r}")
        x = nn.relu(x) if step == "relu" else _norm(style, f"norm_{i}")(x)
    return x


def _finished(x: Array) -> Array:
    """Keeps XLA from fusing the operations after `x` into the one that computes `x`.

    A norm fused into a convolution compiles two to three times slower for a TPU (v5e, ahead of time), needs
    more memory, and moves a tenth more bytes. A fused bias compiles a tenth slower.
    """
    return jax.lax.optimization_barrier(x)


class Layers(nn.Module):
    """The layers inside a 'residual' layer, or the one layer that a loop runs.

    Attributes:
      layers, style: as for `HeatmapHead`.
      strips: number of strips that the map is cut into.
    """

    layers: Sequence[Layer]
    style: Style
    strips: int = 1

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch height width channels"]:
        """Runs the layers, which keep the map's shape."""
        return _apply_layers(self, self.layers, self.style, x, self.strips)[0]


def recomputing_norms(head_cls: type[nn.Module]) -> type[nn.Module]:
    """Wraps a head so that only the convolutions' outputs are saved for the backward pass.

    A loop saves all activations that it does not recompute, and the norms' float32 values take several times
    the memory of the convolutions' outputs.
    """
    return nn.remat(head_cls, policy=_KEEP_CONVOLUTIONS, prevent_cse=False)


class HeatmapHead(nn.Module):
    """Convolutions and stride-2 deconvolutions up to a heatmap.

    The paper's head, on 32x32 tokens of a 512-pixel image, is `layers` =

        ('conv', 768, 3), ('conv', 384, 3),
        ('deconv', 768, 3), ('conv', 768, 3), ('conv', 768, 3),
        ('deconv', 384, 3), ('conv', 384, 3), ('conv', 384, 3),
        ('deconv', 384, 3), ('conv', 384, 3), ('conv', 384, 3),
        ('deconv', 192, 3), ('conv', 192, 3), ('conv', 192, 3),
        ('conv', 192, 3)

    Attributes:
      layers: the layers in order. ('conv', filters, kernel side) keeps the map's size, ('deconv', filters, 3)
        doubles it; a norm over the channels and a ReLU follow each. A fourth element names other steps to
        follow, in order: ('conv', 768, 3, ('relu', 'norm')). ('residual', (layer, ...), ('relu',)) adds the
        output of its layers to the map; the named steps follow the sum.
      style: settings that the layers share.
      output_layer: (kind, kernel size) of the last layer, which has one filter and the sigmoid.
      output_bias_init: the output's bias at the start. Heat is rare: with -3 a new head predicts 0.05
        everywhere and not 0.5, which saves it the first steps of training.
    """

    layers: Sequence[Layer]
    style: Style = Style()
    output_layer: tuple[str, int] = ("conv", 3)
    output_bias_init: float = 0.0

    @nn.compact
    def __call__(
        self, features: Float[Array, "batch rows columns embed"]
    ) -> Float32[Array, "batch height width"]:
        """Predicts heatmaps in [0, 1]; each 'deconv', the output layer included, doubles rows and columns.

        Raises:
          ValueError: a layer is of another kind, or a deconv's kernel is not 3x3.
        """
        x, strips = _apply_layers(self, self.layers, self.style, features)
        kind, kernel_size = self.output_layer
        if kind not in ("conv", "deconv"):
            raise ValueError(f"a heatmap head's output layer: expected 'conv' or 'deconv', got {kind!r}")
        logits = Conv(
            1,
            kernel_size,
            self.style.deconv_padding if kind == "deconv" else None,
            jnp.float32,  # bfloat16 would give a low heat only two or three digits
            strips,
            bias_init=nn.initializers.constant(self.output_bias_init),
            kernel_axes=("height", "width", "embed", None),
            name="output",
        )(x)
        return nn.sigmoid(convolutions.join(logits, strips)[..., 0])


def _log_variance(x: Array) -> Array:
    """Maps any number to the log-variance of a score, within bounds; 0 becomes that of a new head."""
    low, high, first = (
        2 * math.log(deviation) for deviation in (_LEAST_DEVIATION, _GREATEST_DEVIATION, _FIRST_DEVIATION)
    )
    # The logit of the new head's place between the bounds.
    offset = math.log((first - low) / (high - first))
    return low + (high - low) * nn.sigmoid(x + offset)


class ScoreHead(nn.Module):
    """Convolutions, then dense layers down to one number, or two with a variance.

    The paper's kernels are 2x2 with stride 1. It does not name the padding. We take 'SAME', so the map keeps
    its size, and the first dense layer sees height x width x channels values: a head fits one image size.

    Attributes:
      conv_layers: (filters, kernel size) of each; a norm over the channels and a ReLU follow.
      dense_layers: widths of the hidden dense layers; a ReLU follows each.
      style: settings that the layers share.
      variance: whether to predict the log-variance of the score, too. It has a last layer of its own, so that
        a head without it has the same other parameters.
    """

    conv_layers: Sequence[tuple[int, int]] = ((768, 2), (384, 2), (128, 2), (64, 2))
    dense_layers: Sequence[int] = (2048, 1024)
    style: Style = Style()
    variance: bool = False

    @nn.compact
    def __call__(
        self, features: Float[Array, "batch rows columns embed"]
    ) -> Float32[Array, " batch"] | Float32[Array, "batch 2"]:
        """Predicts scores in [0, 1]; with `variance`, pairs of a score and the logarithm of its variance."""
        conv_layers = [("conv", *layer) for layer in self.conv_layers]
        x = convolutions.join(*_apply_layers(self, conv_layers, self.style, features))
        # Where the rules split the first dense kernel's rows over the data axis, the features travel to these
        # rows. The first constraint keeps XLA from splitting the convolutions over the image's rows, too.
        x = with_sharding_constraint(x, ("batch", "height", "width", "mlp"))
        x = with_sharding_constraint(x.reshape(x.shape[0], -1), ("dense_batch", "dense_features"))
        dtype = self.style.dtype
        for i, width in enumerate(self.dense_layers):
            axes = ("embed" if i else "dense_features", "mlp")
            dense = layers.DenseGeneral(
                width, dtype=dtype, kernel_axes=axes, use_bias=True, name=f"dense_{i}"
            )
            x = with_sharding_constraint(nn.relu(dense(x)), ("batch", "mlp"))
        last = functools.partial(
            layers.DenseGeneral, 1, dtype=jnp.float32, kernel_axes=("embed", None), use_bias=True
        )
        score = nn.sigmoid(last(name="output")(x)[..., 0])
        if not self.variance:
            return score
        # At the start all variances are equal, so that they move no other parameter of the network.
        log_variance = last(kernel_init=nn.initializers.zeros, name="output_log_variance")(x)[..., 0]
        return jnp.stack([score, _log_variance(log_variance)], axis=-1)
