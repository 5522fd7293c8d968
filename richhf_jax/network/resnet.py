"""ResNet-50 v1.5 with heads for scores or heatmaps: the paper's two image-only baselines (section 4.2.1).

    image ── stem ── stages of bottleneck blocks ── feature map ┬ mean ── dense layers ──── scores
                                                                └ deconvolutions ────────── heatmaps

The paper says no more than "two ResNet-50 models, with multiple fully connected layers and deconvolution
heads to predict the scores and heatmaps". The rest is chosen here: version 1.5, the one of the published
weights (its stride is in the 3x3 convolution; https://arxiv.org/abs/1512.03385 has it in the first 1x1);
dense layers as wide as those of RAHF's score heads; deconvolutions of 256 filters as in Xiao et al., "Simple
Baselines for Human Pose Estimation" (https://arxiv.org/abs/1804.06208), and further ones, with fewer filters,
up to the image's size.

The network sees no prompt. Padding, initialisation and batch statistics are torch's, so that weights from
there give the same features, gradients and statistics.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from flax.linen.partitioning import param_with_axes, variable_with_axes, with_sharding_constraint
from jaxtyping import Float, Float32, Real

from richhf_jax import feedback
from richhf_jax.network import description, heads, layers
from richhf_jax.shapes import Array

# ImageNet's, of pixels in [0, 1]: https://pytorch.org/vision/stable/models.html
PIXEL_MEAN, PIXEL_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Torch's defaults: the epsilon of a norm, and the share of a new batch in the running statistics.
_EPSILON, _NEW_SHARE = 1e-5, 0.1
# The inner convolutions of a block have a fourth of its width.
REDUCTION = 4
_conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


@struct.dataclass
class ResNetConfig:
    """Sizes of the network up to its last feature map. The defaults are ResNet-50's.

    Attributes:
      depths: number of blocks in each stage. Every stage but the first halves the map.
      widths: channels of each stage's output.
      stem_width: channels of the first convolution.
      dtype: type of activations; parameters and statistics are float32.
    """

    depths: tuple[int, ...] = (3, 4, 6, 3)
    widths: tuple[int, ...] = (256, 512, 1024, 2048)
    stem_width: int = 64
    dtype: Any = jnp.float32

    @property
    def stride(self) -> int:
        """Side of a feature map's cell, in pixels."""
        return 4 * 2 ** (len(self.depths) - 1)


@struct.dataclass
class ResNetHeadsConfig:
    """The heads' outputs and layers. A kind that is not named is not predicted.

    Attributes:
      score_kinds: the kinds of score, in the order of `feedback.SCORES`.
      heatmap_kinds: the kinds of heatmap, in the order of `feedback.HEATMAPS`. Each has its own head.
      score_dense_layers: widths of the hidden dense layers; a ReLU follows each.
      heatmap_layers, heatmap_output_layer: `layers` and `output_layer` of `heads.HeatmapHead`.
      heatmap_output_bias: initial bias before the sigmoid; below 0, because most pixels are cold.
    """

    score_kinds: tuple[str, ...] = ()
    heatmap_kinds: tuple[str, ...] = ()
    score_dense_layers: tuple[int, ...] = ()
    heatmap_layers: tuple[heads.Layer, ...] = ()
    heatmap_output_layer: tuple[str, int] = ("conv", 3)
    heatmap_output_bias: float = 0.0


class BatchNorm(nn.Module):
    """Torch's batch norm over the channels: zero mean and unit variance, then scale and bias.

    In training these are the mean and the variance of the whole batch, wherever its examples lie; otherwise
    the running ones of the collection "batch_stats". As in torch, a batch is divided by its biased standard
    deviation, but the unbiased variance goes into the running one. (Flax's own norm takes the biased one.)

    Attributes:
      dtype: type of the result; statistics are computed in float32.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], *, train: bool
    ) -> Float[Array, "batch height width channels"]:
        """Normalises, and with `train` moves the running statistics by a tenth towards the batch's."""
        # As the convolution's filters before it.
        axes, shape = ("mlp",), x.shape[-1:]
        scale = param_with_axes("scale", nn.initializers.ones, shape, jnp.float32, axes=axes)
        bias = param_with_axes("bias", nn.initializers.zeros, shape, jnp.float32, axes=axes)
        running_mean, running_var = (
            variable_with_axes("batch_stats", name, start, shape, jnp.float32, axes=axes)
            for name, start in (("mean", jnp.zeros), ("var", jnp.ones))
        )
        x = jnp.asarray(x, jnp.float32)
        mean, var = running_mean.value, running_var.value
        if train:
            # In two passes: the mean of squares less the squared mean cancels digits.
            mean = jnp.mean(x, axis=(0, 1, 2))
            var = jnp.mean(jnp.square(x - _per_channel(mean)), axis=(0, 1, 2))
            count = x.shape[0] * x.shape[1] * x.shape[2]
            unbiased = var * (count / max(count - 1, 1))
            for running, new in ((running_mean, mean), (running_var, unbiased)):
                running.value = (1 - _NEW_SHARE) * running.value + _NEW_SHARE * new
        factor = scale * jax.lax.rsqrt(var + _EPSILON)
        x = (x - _per_channel(mean)) * _per_channel(factor) + _per_channel(bias)
        return jnp.asarray(x, self.dtype)


def _per_channel(vector: Array) -> Array:
    return vector[None, None, None]


class ConvNorm(nn.Module):
    """A convolution without bias, and a batch norm.

    Attributes:
      filters: output channels.
      kernel_size: side of the kernel, odd.
      stride: its stride. Whatever it is, `kernel_size` // 2 zeros lie before the map, and as many after it.
      dtype: type of the computation.
      input_axis: logical axis of the input channels.
    """

    filters: int
    kernel_size: int
    stride: int = 1
    dtype: Any = jnp.float32
    input_axis: str = "embed"

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], *, train: bool
    ) -> Float[Array, "batch -(-height//{self.stride}) -(-width//{self.stride}) {self.filters}"]:
        """Convolves and normalises."""
        side, axes = self.kernel_size, ("height", "width", self.input_axis, "mlp")
        shape = (side, side, x.shape[-1], self.filters)
        kernel = param_with_axes("kernel", _conv_init, shape, jnp.float32, axes=axes)
        x = jax.lax.conv_general_dilated(
            jnp.asarray(x, self.dtype),
            jnp.asarray(layers.gathered(jnp.asarray(kernel, self.dtype), axes)),
            (self.stride, self.stride),
            [(side // 2, side // 2)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return BatchNorm(self.dtype, name="norm")(x, train=train)


class Bottleneck(nn.Module):
    """Three convolutions (1x1 to a fourth of the width, 3x3, 1x1) around which the input is added.

    Attributes:
      width: output channels.
      stride: stride of the 3x3 convolution (version 1.5).
      dtype: type of the computation.
    """

    width: int
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], *, train: bool
    ) -> Float[Array, "batch -(-height//{self.stride}) -(-width//{self.stride}) {self.width}"]:
        """Runs the block. An input of another shape than the output is first projected to it."""
        shortcut = x
        if self.stride > 1 or x.shape[-1] != self.width:
            shortcut = ConvNorm(self.width, 1, self.stride, self.dtype, name="shortcut")(x, train=train)
        inner = self.width // REDUCTION
        x = nn.relu(ConvNorm(inner, 1, 1, self.dtype, name="conv_0")(x, train=train))
        x = nn.relu(ConvNorm(inner, 3, self.stride, self.dtype, name="conv_1")(x, train=train))
        x = ConvNorm(self.width, 1, 1, self.dtype, name="conv_2")(x, train=train)
        return with_sharding_constraint(nn.relu(x + shortcut), ("batch", "height", "width", "mlp"))


class ResNet(nn.Module):
    """ResNet v1.5 up to its last feature map, without a classifier."""

    config: ResNetConfig

    @nn.compact
    def __call__(
        self, pixels: Float[Array, "batch height width 3"], *, train: bool = False
    ) -> Float[Array, "batch rows columns embed"]:
        """Encodes images.

        Args:
          pixels: normalised, of any size.
          train: whether to normalise by the batch's statistics, and to update the running ones, which must
            then be mutable.

        Raises:
          ValueError: there are not as many widths as depths, or one is no multiple of 4.
        """
        cfg = self.config
        if len(cfg.depths) != len(cfg.widths) or any(width % REDUCTION for width in cfg.widths):
            raise ValueError(
                f"each of the stages {cfg.depths} takes a width that {REDUCTION} divides, got {cfg.widths}"
            )
        stem = ConvNorm(cfg.stem_width, 7, 2, cfg.dtype, input_axis="image_channels", name="stem")
        x = nn.relu(stem(pixels, train=train))
        x = nn.pool(x, -jnp.inf, jax.lax.max, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage, (depth, width) in enumerate(zip(cfg.depths, cfg.widths, strict=True)):
            for i in range(depth):
                stride = 2 if stage and not i else 1
                x = Bottleneck(width, stride, cfg.dtype, name=f"stage_{stage}_block_{i}")(x, train=train)
        return x


class ScoresHead(nn.Module):
    """Dense layers from the mean of a feature map to scores.

    Attributes:
      scores: number of scores.
      dense_layers: widths of the hidden layers; a ReLU follows each.
      dtype: type of the computation, except for the scores.
    """

    scores: int
    dense_layers: tuple[int, ...]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, features: Float[Array, "batch rows columns embed"]
    ) -> Float32[Array, "batch {self.scores}"]:
        """Predicts scores in [0, 1]."""
        x = jnp.mean(features.astype(jnp.float32), axis=(1, 2))
        for i, width in enumerate(self.dense_layers):
            dense = layers.DenseGeneral(
                width, dtype=self.dtype, kernel_axes=("embed", "mlp"), use_bias=True, name=f"dense_{i}"
            )
            x = with_sharding_constraint(nn.relu(dense(x)), ("batch", "mlp"))
        output = layers.DenseGeneral(self.scores, kernel_axes=("embed", None), use_bias=True, name="output")
        return nn.sigmoid(output(x))


class ResNetFeedback(nn.Module):
    """The whole network: ResNet with a head for all scores, or one for each heatmap, or both."""

    resnet_config: ResNetConfig
    heads_config: ResNetHeadsConfig

    def setup(self):
        config, head = self.resnet_config, self.heads_config
        for kinds, known in ((head.score_kinds, feedback.SCORES), (head.heatmap_kinds, feedback.HEATMAPS)):
            if tuple(kinds) != tuple(kind for kind in known if kind in kinds):
                raise ValueError(f"the kinds {tuple(kinds)} must be some of {known}, in this order")
        self.resnet = ResNet(config)
        if head.score_kinds:
            self.scores_head = ScoresHead(len(head.score_kinds), head.score_dense_layers, config.dtype)
        # RAHF's own heads, on another feature map.
        self.heatmap_head: Any = {
            kind: heads.HeatmapHead(
                layers=head.heatmap_layers,
                style=heads.Style(dtype=config.dtype),
                output_layer=head.heatmap_output_layer,
                output_bias_init=head.heatmap_output_bias,
            )
            for kind in head.heatmap_kinds
        }

    def describe(self) -> dict[str, Any]:
        """Names every setting of the network; JSON-able. `model_description` reads it."""
        configs = ("resnet_config", "heads_config")
        return {name: description.settings(getattr(self, name)) for name in configs}

    def with_attention_kernel(self, kernel: str) -> "ResNetFeedback":
        """Returns the same network, which has no attention."""
        del kernel
        return self

    def __call__(
        self, image: Real[Array, "batch height width 3"], *, train: bool = False
    ) -> dict[str, Float32[Array, "batch ..."]]:
        """Predicts what the heads are for.

        Args:
          image: pixels from 0 to 255: uint8, or float where a gradient is wanted.
          train: see `ResNet`.

        Returns:
          "scores" [batch, scores] and "heatmaps" [batch, heatmaps, height, width], all in [0, 1] and in the
          order of the configured kinds; without a kind, there is no entry.

        Raises:
          ValueError: the deconvolutions don't lead back to the image's size.
        """
        mean, deviation = (
            _per_channel(255 * jnp.asarray(values, jnp.float32)) for values in (PIXEL_MEAN, PIXEL_DEVIATION)
        )
        features = self.resnet((image.astype(jnp.float32) - mean) / deviation, train=train)
        outputs = {}
        if self.heads_config.score_kinds:
            outputs["scores"] = self.scores_head(features)
        if self.heads_config.heatmap_kinds:
            maps = [self.heatmap_head[kind](features) for kind in self.heads_config.heatmap_kinds]
            outputs["heatmaps"] = jnp.stack(maps, axis=1)
            if (size := outputs["heatmaps"].shape[2:]) != image.shape[1:3]:
                raise ValueError(
                    f"images have {image.shape[1]}x{image.shape[2]} pixels, heatmaps {size[0]}x{size[1]}: the"
                    f" side must be a multiple of {self.resnet_config.stride}, and heatmap_layers and"
                    " heatmap_output_layer must have as many 'deconv' as it takes to come back"
                )
        return outputs
