"""The transformer that predicts masked image tokens from the others and a text: aMUSEd's U-ViT.

    tokens ── embedding ── [halving] ── convolutions, attention to the text ┐
                                                                            layers: attention to all tokens,
    logits ─────────────── [doubling] ─ convolutions, attention to the text ┘  to the text, feed-forward

The text comes twice: a vector for each of its tokens, which attention reads, and one vector for the whole,
which scales and shifts activations together with the micro-conditions (sizes of the picture, wanted
aesthetics). The architecture is that of the published weights (Patil et al., https://arxiv.org/abs/2401.01808),
diffusers' `UVit2DModel`. It has no table of positions: the zeros around the convolutions tell them.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from flax.linen.partitioning import param_with_axes, with_sharding_constraint
from jaxtyping import Float, Float32, Int

from richhf_jax.network import attention_kernel, layers, stack, vit
from richhf_jax.shapes import Array

# Width of a convolutional block's hidden layer, as a multiple of its own (ConvNeXt's).
_CONV_MLP_FACTOR = 4
# The longest wavelength of the micro-conditions' sines, divided by 2 pi.
_MAX_PERIOD = 10000.0
_GRID_AXES = ("batch", "height", "width", "embed")


@struct.dataclass
class TransformerConfig:
    """Sizes of the transformer. The defaults are those of aMUSEd's 256 pixels.

    Attributes:
      vocab_size: rows of the token table: the codes, the mask's token (the last row), and rows without use.
      codebook_size: number of codes that are predicted.
      grid: rows and columns of tokens of a generated image. No parameter depends on it.
      emb_dim: width of the layers.
      num_layers: number of layers.
      num_heads: heads of a layer's attentions; each is emb_dim / num_heads wide.
      mlp_dim: width of a layer's gated feed-forward block.
      token_dim: width of the token table, and of the last hidden vector before the logits.
      conv_dim: width of the convolutional blocks.
      conv_num_heads: heads of their attentions.
      num_conv_blocks: number of convolutional blocks before the layers, and as many after them.
      downsample: whether the layers see a grid of half the rows and columns (aMUSEd's 512 pixels).
      micro_condition_dim: numbers that encode one micro-condition; even.
      layer_norm_epsilon: epsilon of every norm.
      dropout_rate: dropout rate of the outputs of attentions and convolutional blocks, and of the
        feed-forward blocks' hidden layers; the published models have none.
      dtype: type of activations; parameters and logits are float32.
      float32_attention_logits, scan_layers, remat_policy, attention_kernel: as in `vit.ViTConfig`.
    """

    vocab_size: int = 8256
    codebook_size: int = 8192
    grid: tuple[int, int] = (16, 16)
    emb_dim: int = 1024
    num_layers: int = 22
    num_heads: int = 16
    mlp_dim: int = 2816
    token_dim: int = 768
    conv_dim: int = 768
    conv_num_heads: int = 12
    num_conv_blocks: int = 3
    downsample: bool = False
    micro_condition_dim: int = 256
    layer_norm_epsilon: float = 1e-6
    dropout_rate: float = 0.0
    dtype: Any = jnp.float32
    float32_attention_logits: bool = False
    scan_layers: bool = False
    remat_policy: str = "none"
    attention_kernel: str = "auto"

    @property
    def mask_id(self) -> int:
        """The token that stands for a masked one."""
        return self.vocab_size - 1


def _norm(cfg: TransformerConfig, name: str) -> layers.LayerNorm:
    return layers.LayerNorm(epsilon=cfg.layer_norm_epsilon, dtype=cfg.dtype, name=name)


def _modulation(
    cfg: TransformerConfig, features: int, condition: Array, ndim: int, name: str
) -> tuple[Array, Array]:
    """Returns the factor and the summand, [batch, 1, ..., features] of `ndim` axes, that a condition makes.

    They are 1 and 0 at the start of training.
    """
    dense = layers.DenseGeneral(
        (2, features),
        dtype=cfg.dtype,
        kernel_init=nn.initializers.zeros,
        kernel_axes=("embed", "mlp"),
        name=name,
    )
    changes = jnp.expand_dims(dense(nn.silu(condition)), tuple(range(2, ndim)))
    return 1 + changes[:, 0], changes[:, 1]


class AdaptiveNorm(nn.Module):
    """A norm whose scale and shift depend on a condition.

    Attributes:
      config: see `TransformerConfig`.
      centred: whether the mean is subtracted.
    """

    config: TransformerConfig
    centred: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length embed"], condition: Float[Array, "batch condition"]
    ) -> Float[Array, "batch length embed"]:
        """Normalises each position."""
        cfg = self.config
        kind = layers.LayerNorm
        if self.centred:
            kind = functools.partial(layers.CenteredLayerNorm, use_bias=False)
        norm = kind(epsilon=cfg.layer_norm_epsilon, dtype=cfg.dtype, name="norm")
        scale, shift = _modulation(cfg, x.shape[-1], condition, x.ndim, "modulation")
        return norm(x) * scale + shift


class Attention(nn.Module):
    """Attention without biases; divides the logits by sqrt(head width).

    Attributes:
      config: see `TransformerConfig`.
      num_heads: number of heads; each has its share of the queries' width.
    """

    config: TransformerConfig
    num_heads: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch q_length embed"],
        states: Float[Array, "batch kv_length kv_embed"],
        *,
        deterministic: bool,
    ) -> Float[Array, "batch q_length embed"]:
        """Lets each position of `x` attend to all of `states`.

        Raises:
          ValueError: the heads do not divide the width.
        """
        cfg, width = self.config, x.shape[-1]
        if width % self.num_heads:
            raise ValueError(f"{self.num_heads} heads do not divide the width {width}")
        head_dim = width // self.num_heads
        dense = functools.partial(layers.DenseGeneral, dtype=cfg.dtype)

        # [batch, length, embed] -> [batch, length, heads, kv]
        def project(name, inputs):
            features = (self.num_heads, head_dim)
            projected = dense(features, kernel_axes=("embed", "joined_kv"), name=name)(inputs)
            return with_sharding_constraint(projected, ("batch", "length", "heads", "kv"))

        query, key, value = project("query", x), project("key", states), project("value", states)
        query = query / math.sqrt(head_dim)
        attended = layers.dot_product_attention(
            query,
            key,
            value,
            dtype=cfg.dtype,
            float32_logits=cfg.float32_attention_logits,
            kernel=attention_kernel.choose(cfg.attention_kernel, query, key, None, sees_prefix=True),
        )
        out = dense(width, axis=(-2, -1), kernel_axes=("joined_kv", "embed"), name="out")(attended)
        return nn.Dropout(cfg.dropout_rate)(out, deterministic=deterministic)


class TransformerLayer(nn.Module):
    """Attention to all image tokens, to the text, and a feed-forward block; each after an adaptive norm."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        text: Float[Array, "batch text_length embed"],
        condition: Float[Array, "batch embed"],
        *,
        deterministic: bool,
    ) -> Float[Array, "batch length embed"]:
        """Applies the layer."""
        cfg = self.config
        attention = functools.partial(Attention, cfg, cfg.num_heads)
        y = AdaptiveNorm(cfg, name="pre_attention_norm")(x, condition)
        x = x + attention(name="attention")(y, y, deterministic=deterministic)
        y = AdaptiveNorm(cfg, name="pre_text_attention_norm")(x, condition)
        x = x + attention(name="text_attention")(y, text, deterministic=deterministic)
        y = AdaptiveNorm(cfg, centred=True, name="pre_mlp_norm")(x, condition)
        mlp = layers.MlpBlock(
            intermediate_dim=cfg.mlp_dim,
            activations=(functools.partial(nn.gelu, approximate=False), "linear"),
            intermediate_dropout_rate=cfg.dropout_rate,
            dtype=cfg.dtype,
            name="mlp",
        )
        return x + mlp(y, deterministic=deterministic)


class GlobalResponseNorm(nn.Module):
    """ConvNeXt V2's norm: scales a channel by its length over the image, relative to the other channels'."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch rows columns mlp"]) -> Float[Array, "batch rows columns mlp"]:
        """Normalises, and adds the input."""
        scale, bias = (
            param_with_axes(name, nn.initializers.zeros, x.shape[-1:], jnp.float32, axes=("mlp",))
            for name in ("scale", "bias")
        )
        x = x.astype(jnp.float32)
        lengths = jnp.sqrt(jnp.sum(jnp.square(x), axis=(1, 2), keepdims=True))
        relative = lengths / (jnp.mean(lengths, axis=-1, keepdims=True) + 1e-6)
        scaled = scale[None, None, None] * (x * relative) + bias[None, None, None] + x
        return scaled.astype(self.dtype)


class ConvLayer(nn.Module):
    """A ConvNeXt block that a condition scales and shifts; then two attentions to the text."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch rows columns embed"],
        text: Float[Array, "batch text_length text_embed"],
        condition: Float[Array, "batch condition"],
        *,
        deterministic: bool,
    ) -> Float[Array, "batch rows columns embed"]:
        """Applies the layer."""
        cfg, width = self.config, self.config.conv_dim
        dense = functools.partial(layers.DenseGeneral, dtype=cfg.dtype)
        y = _norm(cfg, "conv_norm")(DepthwiseConv(cfg.dtype, name="conv")(x))
        y = dense(_CONV_MLP_FACTOR * width, kernel_axes=("embed", "mlp"), name="wi")(y)
        y = GlobalResponseNorm(cfg.dtype, name="response_norm")(nn.gelu(y, approximate=False))
        y = dense(width, kernel_axes=("mlp", "embed"), name="wo")(y)
        x = x + nn.Dropout(cfg.dropout_rate)(y, deterministic=deterministic)
        scale, shift = _modulation(cfg, width, condition, x.ndim, "modulation")
        x = with_sharding_constraint(x * scale + shift, _GRID_AXES)

        if text.shape[-1] != width:
            # The published models have the function before the matrix.
            text = dense(width, kernel_axes=("embed", "mlp"), name="text_projection")(nn.silu(text))
        # [batch, rows, columns, embed] -> [batch, length, embed]
        y = x.reshape(x.shape[0], -1, width)
        for i in range(2):
            attention = Attention(cfg, cfg.conv_num_heads, name=f"text_attention_{i}")
            y = y + attention(_norm(cfg, f"text_norm_{i}")(y), text, deterministic=deterministic)
        return y.reshape(x.shape)


class DepthwiseConv(nn.Module):
    """A 3x3 convolution of each channel by itself, with zeros beyond the borders."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch rows columns embed"]
    ) -> Float[Array, "batch rows columns embed"]:
        """Convolves; the map keeps its size."""
        features = x.shape[-1]
        init, shape = nn.initializers.lecun_normal(), (3, 3, 1, features)
        axes: layers.Axes = ("height", "width", None, "embed")
        kernel = param_with_axes("kernel", init, shape, jnp.float32, axes=axes)
        return jax.lax.conv_general_dilated(
            jnp.asarray(x, self.dtype),
            jnp.asarray(layers.gathered(jnp.asarray(kernel, self.dtype), axes)),
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=features,
        )


class ConvStack(nn.Module):
    """The convolutional blocks before or after the layers.

    Attributes:
      config: see `TransformerConfig`.
      resize: "down": halves rows and columns first; "up": doubles them at the end; None: neither.
    """

    config: TransformerConfig
    resize: str | None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch rows columns embed"],
        text: Float[Array, "batch text_length text_embed"],
        condition: Float[Array, "batch condition"],
        *,
        deterministic: bool,
    ) -> Float[Array, "batch new_rows new_columns embed"]:
        """Applies the blocks.

        Raises:
          ValueError: rows or columns that are to be halved are odd.
        """
        cfg = self.config
        if self.resize == "down":
            halve = vit.PatchEmbedding(2, cfg.conv_dim, cfg.dtype, use_bias=False, name="downsample")
            x = halve(_norm(cfg, "downsample_norm")(x))

        def call(layer, x, drop_rate):
            del drop_rate
            return layer(x, text, condition, deterministic=deterministic)

        x = stack.apply_layers(ConvLayer, cfg, cfg.num_conv_blocks, call, x)
        if self.resize == "up":
            # Each cell makes four: a transposed convolution whose stride is its kernel's size.
            dense = layers.DenseGeneral(
                (2, 2, cfg.conv_dim), dtype=cfg.dtype, kernel_axes=("embed", "mlp"), name="upsample"
            )
            x = dense(_norm(cfg, "upsample_norm")(x))
            batch, rows, columns, *_ = x.shape
            x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, 2 * rows, 2 * columns, cfg.conv_dim)
        return with_sharding_constraint(x, _GRID_AXES)


class Transformer(nn.Module):
    """The whole network, from tokens and text to logits."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "batch rows columns"],
        text_states: Float[Array, "batch text_length text_embed"],
        pooled_text: Float[Array, "batch projection"],
        micro_conditions: Float[Array, "batch conditions"],
        *,
        deterministic: bool = True,
    ) -> Float32[Array, "batch rows columns codes"]:
        """Predicts every token.

        Args:
          tokens: codes, and `config.mask_id` where a token is masked.
          text_states: a vector for each of the text's tokens; all are attended to, padding, too.
          pooled_text: a vector for the whole text.
          micro_conditions: of aMUSEd the picture's width, its height, row and column of the crop's corner,
            all in pixels; and an aesthetic score from 0 to 10.
          deterministic: turns dropout off.

        Returns:
          The logits of the codes.
        """
        cfg = self.config
        dense = functools.partial(layers.DenseGeneral, dtype=cfg.dtype)
        text = dense(cfg.emb_dim, kernel_axes=("embed", "mlp"), name="text_projection")(text_states)
        text = _norm(cfg, "text_norm")(text)
        condition = self._condition(pooled_text, micro_conditions)

        embed = layers.Embed(cfg.vocab_size, cfg.token_dim, dtype=cfg.dtype, name="token_embedder")
        # [batch, rows, columns] -> [batch, length, embed] -> [batch, rows, columns, embed]
        x = _norm(cfg, "token_norm")(embed(tokens.reshape(tokens.shape[0], -1)))
        x = dense(cfg.conv_dim, kernel_axes=("embed", "mlp"), name="token_projection")(x)
        x = x.reshape(*tokens.shape, -1)
        down, up = ("down", "up") if cfg.downsample else (None, None)
        x = ConvStack(cfg, down, name="down_block")(x, text, condition, deterministic=deterministic)

        def call(layer, x, drop_rate):
            del drop_rate
            return layer(x, text, condition, deterministic=deterministic)

        grid = x.shape[:3]
        x = _norm(cfg, "layers_in_norm")(x.reshape(grid[0], -1, cfg.conv_dim))
        x = dense(cfg.emb_dim, kernel_axes=("embed", "mlp"), name="layers_in")(x)
        x = stack.apply_layers(TransformerLayer, cfg, cfg.num_layers, call, x)
        x = dense(cfg.conv_dim, kernel_axes=("embed", "mlp"), name="layers_out")(
            _norm(cfg, "layers_out_norm")(x)
        )
        up_block = ConvStack(cfg, up, name="up_block")
        x = up_block(x.reshape(*grid, cfg.conv_dim), text, condition, deterministic=deterministic)
        x = _norm(cfg, "logits_norm")(dense(cfg.token_dim, kernel_axes=("embed", "mlp"), name="logits_in")(x))
        logits = layers.DenseGeneral(cfg.codebook_size, kernel_axes=("embed", "vocab"), name="logits_dense")
        return with_sharding_constraint(logits(x), ("batch", "height", "width", "vocab"))

    def _condition(self, pooled_text: Array, micro_conditions: Array) -> Array:
        """Encodes the whole text and the micro-conditions: [batch, embed]."""
        cfg = self.config
        encoded = sines(micro_conditions, cfg.micro_condition_dim).reshape(pooled_text.shape[0], -1)
        condition = jnp.concatenate([pooled_text.astype(jnp.float32), encoded], axis=-1)
        dense = functools.partial(layers.DenseGeneral, cfg.emb_dim, dtype=cfg.dtype)
        hidden = dense(kernel_axes=("embed", "mlp"), name="condition_wi")(condition)
        return dense(kernel_axes=("mlp", "embed"), name="condition_wo")(nn.silu(hidden))


def sines(numbers: Float[Array, "*shape"], dim: int) -> Float32[Array, "*shape {dim}"]:
    """Encodes numbers by cosines, then sines, of `dim` / 2 frequencies from 1 down towards 1 / 10,000."""
    half = dim // 2
    frequencies = jnp.exp(-math.log(_MAX_PERIOD) / half * jnp.arange(half, dtype=jnp.float32))
    angles = numbers.astype(jnp.float32)[..., None] * frequencies.reshape((1,) * numbers.ndim + (half,))
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
