"""The vision transformer (pre-norm, learned 2-D positions), from an image to one vector for each patch.

Its architecture is that of ViT-B/16 and ViT-L/16 as published (https://arxiv.org/abs/2010.11929); its parts
have the names of the T5 stacks. The patch kernel is [height, width, image_channels, embed], the layout of a
convolution's kernel, so that public weights drop in; the position table is [height, width, embed].
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from flax.linen.partitioning import param_with_axes, with_sharding_constraint
from jaxtyping import Bool, Float, Shaped

from richhf_jax.network import attention_kernel, layers, stack
from richhf_jax.shapes import Array


@struct.dataclass
class ViTConfig:
    """Sizes of the vision transformer. The defaults are ViT-B/16's at 512 pixels.

    Attributes:
      patch_size: side of a patch, in pixels.
      grid: rows and columns of the position table, in patches: the size of the images in training.
      emb_dim: width of the model.
      num_layers: depth.
      num_heads: heads of every attention; each is emb_dim / num_heads wide.
      mlp_dim: width of the feed-forward block's hidden layer.
      dropout_rate: dropout rate of embeddings, attention weights, the feed-forward block's hidden layer, and
        the outputs of both blocks.
      stochastic_depth_rate: rate at which the last layer's blocks are dropped in training, see
        `stack.apply_layers`.
      dtype: type of activations; parameters are float32.
      float32_attention_logits: computes attention's softmax in float32 whatever `dtype`.
      class_token: puts a learned token before the patches, as published weights have it. The token includes
        its position, so the position table is for patches only.
      layer_norm_epsilon: epsilon of every norm: 1e-6 in the authors' code, 1e-12 in Hugging Face's
        configurations.
      approximate_gelu: True: the tanh approximation, as in the authors' code. False: the exact function, as
        in Hugging Face's and timm's copies of the weights. Outputs differ by about a thousandth.
      scan_layers: runs the layers in one loop, which compiles several times faster, see `stack`.
      remat_policy: what the backward pass recomputes: 'none', 'minimal' or 'full', see `stack`.
      stem_filters: filters of 3x3 convolutions with stride 2 before the patches are cut, each with a norm and
        a GELU (Xiao et al., "Early Convolutions Help Transformers See Better",
        https://arxiv.org/abs/2106.14881). The published ViT has none; with two, a small ViT learns texture
        several times faster.
      attention_kernel: what computes the attention: 'auto', 'xla' or 'cudnn', see the module of this name.
    """

    patch_size: int = 16
    grid: tuple[int, int] = (32, 32)
    emb_dim: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    dropout_rate: float = 0.0
    stochastic_depth_rate: float = 0.0
    dtype: Any = jnp.float32
    float32_attention_logits: bool = False
    class_token: bool = False
    layer_norm_epsilon: float = 1e-6
    approximate_gelu: bool = False
    scan_layers: bool = False
    remat_policy: str = "none"
    stem_filters: tuple[int, ...] = ()
    attention_kernel: str = "auto"

    @property
    def activation(self) -> layers.Activation:
        """The function between a feed-forward block's two layers."""
        return functools.partial(nn.gelu, approximate=self.approximate_gelu)


class StemLayer(nn.Module):
    """A 3x3 convolution with stride 2, a layer norm over the channels, a GELU."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch -(-height//2) -(-width//2) {self.features}"]:
        """Halves height and width, rounding up."""
        kernel = param_with_axes(
            "kernel",
            nn.initializers.lecun_normal(),
            (3, 3, x.shape[-1], self.features),
            jnp.float32,
            axes=("height", "width", "image_channels", "mlp"),
        )
        x, kernel = jnp.asarray(x, self.dtype), jnp.asarray(kernel, self.dtype)
        x = jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return nn.gelu(layers.CenteredLayerNorm(dtype=self.dtype, name="norm")(x))


class PatchEmbedding(nn.Module):
    """Cuts an image into patches and projects each.

    This equals a convolution whose stride is its kernel's size. It is computed as one matrix product, whose
    gradient is fast on every backend.
    """

    patch_size: int
    features: int
    dtype: Any = jnp.float32
    use_bias: bool = True

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch height//{self.patch_size} width//{self.patch_size} {self.features}"]:
        """Returns the patches' vectors.

        Raises:
          ValueError: the image does not divide into patches.
        """
        batch, height, width, channels = images.shape
        p = self.patch_size
        if height % p or width % p:
            raise ValueError(f"an image of {height}x{width} pixels does not divide into {p}x{p} patches")
        kernel = param_with_axes(
            "kernel",
            nn.initializers.lecun_normal(),
            (p, p, channels, self.features),
            jnp.float32,
            axes=("height", "width", "image_channels", "embed"),
        )
        kernel = jnp.asarray(kernel, self.dtype)
        kernel = layers.gathered(kernel, ("height", "width", "image_channels", "embed"))

        patches = jnp.asarray(images, self.dtype).reshape(batch, height // p, p, width // p, p, channels)
        patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // p, width // p, -1)
        x = jnp.dot(patches, kernel.reshape(-1, self.features))
        if self.use_bias:
            zeros = nn.initializers.zeros
            bias = param_with_axes("bias", zeros, (self.features,), jnp.float32, axes=("embed",))
            x = x + jnp.asarray(bias, self.dtype)[None, None, None]
        return x


class PositionEmbedding(nn.Module):
    """Adds a learned vector to each patch; an image with another grid than the table's gets it resampled."""

    grid: tuple[int, int]

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width embed"]
    ) -> Float[Array, "batch height width embed"]:
        """Adds the vectors, resampled bilinearly if need be; height and width are in patches."""
        height, width, features = x.shape[1:]
        init = nn.initializers.normal(1 / math.sqrt(features))
        shape = (*self.grid, features)
        table = param_with_axes("embedding", init, shape, jnp.float32, axes=("height", "width", "embed"))
        if (height, width) != tuple(self.grid):
            table = jax.image.resize(table, (height, width, features), "bilinear")
        return x + table.astype(x.dtype)[None]


def norm(cfg: Any, name: str) -> layers.CenteredLayerNorm:
    """Makes a layer norm of a configuration's type and epsilon."""
    return layers.CenteredLayerNorm(epsilon=cfg.layer_norm_epsilon, dtype=cfg.dtype, name=name)


def with_class_token(x: Float[Array, "batch patches embed"]) -> Float[Array, "batch tokens embed"]:
    """Puts a learned token before the patches, as the parameter "class_token" of the calling module."""
    init = nn.initializers.normal(1 / math.sqrt(x.shape[-1]))
    token = param_with_axes("class_token", init, x.shape[-1:], jnp.float32, axes=("embed",))
    token = jnp.broadcast_to(token.astype(x.dtype)[None, None], (x.shape[0], 1, x.shape[-1]))
    return jnp.concatenate([token, x], axis=1)


class Attention(nn.Module):
    """Self-attention with biases; divides the logits by sqrt(head width).

    Attributes:
      config: a `ViTConfig`, or a `clip.TowerConfig`.
    """

    config: Any

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        mask: Shaped[Array, "#batch 1 #length length"] | None = None,
        *,
        deterministic: bool,
    ) -> Float[Array, "batch length embed"]:
        """Lets each position attend to those where `mask` is > 0; None: to all."""
        cfg = self.config
        head_dim = cfg.emb_dim // cfg.num_heads
        dense = functools.partial(layers.DenseGeneral, dtype=cfg.dtype, use_bias=True)

        # [batch, patches, embed] -> [batch, patches, heads, kv]
        def project(name):
            projected = dense((cfg.num_heads, head_dim), kernel_axes=("embed", "joined_kv"), name=name)(x)
            return with_sharding_constraint(projected, ("batch", "length", "heads", "kv"))

        query, key, value = project("query"), project("key"), project("value")
        query = query / math.sqrt(head_dim)
        drop = cfg.dropout_rate > 0.0 and not deterministic
        attended = layers.dot_product_attention(
            query,
            key,
            value,
            bias=None if mask is None else layers.mask_to_bias(mask, cfg.dtype),
            dropout_rng=self.make_rng("dropout") if drop else None,
            dropout_rate=cfg.dropout_rate,
            deterministic=deterministic,
            dtype=cfg.dtype,
            float32_logits=cfg.float32_attention_logits,
            kernel=attention_kernel.choose(cfg.attention_kernel, query, key, None, sees_prefix=mask is None),
        )
        return dense(cfg.emb_dim, axis=(-2, -1), kernel_axes=("joined_kv", "embed"), name="out")(attended)


class ViTLayer(nn.Module):
    """Self-attention and feed-forward block, each with a norm before and a residual connection around it.

    Attributes:
      config: a `ViTConfig`, or a `clip.TowerConfig`.
    """

    config: Any

    @nn.compact
    def __call__(
        self,
        inputs: Float[Array, "batch length embed"],
        mask: Shaped[Array, "#batch 1 #length length"] | None = None,
        drop_rate: Float[Array, ""] | float | None = None,
        *,
        deterministic: bool,
    ) -> Float[Array, "batch length embed"]:
        """Applies the layer; `mask` as for `Attention`, `drop_rate` as for `stack.StochasticDepth`."""
        cfg = self.config
        x = norm(cfg, "pre_attention_layer_norm")(inputs)
        x = Attention(cfg, name="attention")(x, mask, deterministic=deterministic)
        x = nn.Dropout(cfg.dropout_rate)(x, deterministic=deterministic)
        x = inputs + stack.StochasticDepth()(x, drop_rate)

        y = norm(cfg, "pre_mlp_layer_norm")(x)
        y = layers.MlpBlock(
            intermediate_dim=cfg.mlp_dim,
            activations=(cfg.activation,),
            intermediate_dropout_rate=cfg.dropout_rate,
            dtype=cfg.dtype,
            use_bias=True,
            name="mlp",
        )(y, deterministic=deterministic)
        y = nn.Dropout(cfg.dropout_rate)(y, deterministic=deterministic)
        return x + stack.StochasticDepth()(y, drop_rate)


class ViT(nn.Module):
    """The vision transformer up to its last norm, without a classifier."""

    config: ViTConfig

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "batch height width 3"],
        patch_mask: Bool[Array, "batch patches"] | None = None,
        *,
        deterministic: bool = False,
    ) -> Float[Array, "batch image_tokens embed"]:
        """Encodes images.

        Args:
          images: normalised, of any size that patch_size divides.
          patch_mask: False for patches that are padding: no other token sees them. Their own outputs mean
            nothing.
          deterministic: turns dropout and stochastic depth off.

        Returns:
          One vector for each token, of type `config.dtype`: the class token, if there is one, then the
          patches row by row.

        Raises:
          ValueError: the image does not divide into patches, the heads do not divide the width, or the stem
            does not divide a patch.
        """
        cfg = self.config
        if cfg.emb_dim % cfg.num_heads:
            raise ValueError(f"{cfg.num_heads} heads do not divide the width {cfg.emb_dim}")
        if cfg.patch_size % 2 ** len(cfg.stem_filters):
            raise ValueError(f"{len(cfg.stem_filters)} stem layers do not divide a patch of {cfg.patch_size}")
        x = images
        for i, features in enumerate(cfg.stem_filters):
            x = StemLayer(features, cfg.dtype, name=f"stem_{i}")(x)
        patch_size = cfg.patch_size // 2 ** len(cfg.stem_filters)
        x = PatchEmbedding(patch_size, cfg.emb_dim, cfg.dtype, name="patch_embedding")(x)
        x = PositionEmbedding(cfg.grid, name="position_embedding")(x)
        # [batch, height, width, embed] -> [batch, patches, embed]
        x = x.reshape(x.shape[0], -1, cfg.emb_dim)
        if cfg.class_token:
            x = with_class_token(x)
            if patch_mask is not None:
                patch_mask = jnp.pad(patch_mask, ((0, 0), (1, 0)), constant_values=True)
        mask = None if patch_mask is None else patch_mask[:, None, None, :]
        x = nn.Dropout(cfg.dropout_rate)(x, deterministic=deterministic)

        def call(layer, x, drop_rate):
            return layer(x, mask, drop_rate, deterministic=deterministic)

        drop_rate = 0.0 if deterministic else cfg.stochastic_depth_rate
        x = stack.apply_layers(ViTLayer, cfg, cfg.num_layers, call, x, drop_rate)
        return norm(cfg, "encoder_norm")(x)
