"""The tokenizer of images: an encoder to a grid of vectors, a quantiser to tokens, a decoder back to pixels.

    image ── encoder ── a vector a cell ── quantiser ── a token a cell
    image ── decoder ── a vector a cell ── codebook ──────────┘

The architecture is that of the published weights (Esser et al., https://arxiv.org/abs/2012.09841, as in
https://arxiv.org/abs/2401.01808), diffusers' `VQModel` without attention. The quantiser takes the nearest
vector of a learned codebook, or rounds each number of the vector to one of a few levels (Mentzer et al.,
"Finite Scalar Quantization", https://arxiv.org/abs/2309.15505), which needs no codebook and no losses of its
own.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from flax.linen.partitioning import param_with_axes, with_sharding_constraint
from jaxtyping import Float, Float32, Int, Int32, Real

from richhf_jax.network import description, layers, stack
from richhf_jax.shapes import Array

_EPSILON = 1e-6
_MAX_PIXEL = 255.0
# Finite scalar quantisation: the share by which the outer levels are widened, so that they can be reached.
_WIDENING = 1e-3


@struct.dataclass
class VQGANConfig:
    """Sizes of the tokenizer. The defaults are aMUSEd's.

    Attributes:
      widths: channels at each resolution; from one to the next, rows and columns are halved.
      layers_per_block: residual blocks of the encoder at each resolution; the decoder has one more.
      latent_dim: channels between encoder and decoder.
      code_dim: numbers of a codebook's vector.
      codebook_size: number of its vectors.
      levels: finite scalar quantisation with so many levels for each number, instead of a codebook: its
        length is the dimension of a code and its product the number of codes. Empty: a codebook.
      norm_groups: groups of channels that are normalised together; divides all widths.
      dtype: type of activations; parameters, latents and pixels are float32.
      remat_policy: what the backward pass recomputes of a residual block: 'none', 'minimal' or 'full', see
        `stack`.
    """

    widths: tuple[int, ...] = (128, 256, 256, 512, 768)
    layers_per_block: int = 2
    latent_dim: int = 64
    code_dim: int = 64
    codebook_size: int = 8192
    levels: tuple[int, ...] = ()
    norm_groups: int = 32
    dtype: Any = jnp.float32
    remat_policy: str = "none"

    @property
    def stride(self) -> int:
        """Side of a token's cell, in pixels."""
        return 2 ** (len(self.widths) - 1)

    @property
    def num_codes(self) -> int:
        """Number of different tokens."""
        return math.prod(self.levels) if self.levels else self.codebook_size


class Conv(nn.Module):
    """A convolution with a bias.

    Attributes:
      features: output channels.
      side: side of the kernel.
      stride: 1: the map keeps its size; 2: rows and columns are halved, with zeros after the last ones.
      dtype: type of the computation.
      input_axis: logical axis of the input channels.
    """

    features: int
    side: int = 3
    stride: int = 1
    dtype: Any = jnp.float32
    input_axis: str = "embed"

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch height//{self.stride} width//{self.stride} {self.features}"]:
        """Convolves."""
        axes = ("height", "width", self.input_axis, "mlp")
        init, shape = nn.initializers.lecun_normal(), (self.side, self.side, x.shape[-1], self.features)
        kernel = param_with_axes("kernel", init, shape, jnp.float32, axes=axes)
        zeros = nn.initializers.zeros
        bias = param_with_axes("bias", zeros, (self.features,), jnp.float32, axes=("mlp",))
        before = self.side // 2 if self.stride == 1 else 0
        y = jax.lax.conv_general_dilated(
            jnp.asarray(x, self.dtype),
            jnp.asarray(layers.gathered(jnp.asarray(kernel, self.dtype), axes)),
            (self.stride, self.stride),
            [(before, self.side // 2)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y + jnp.asarray(bias, self.dtype)[None, None, None]


class GroupNorm(nn.Module):
    """Zero mean and unit variance of each group of channels of an image, then scale and bias."""

    groups: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch height width channels"]:
        """Normalises.

        Raises:
          ValueError: the groups don't divide the channels.
        """
        channels = x.shape[-1]
        if channels % self.groups:
            raise ValueError(f"{self.groups} groups do not divide {channels} channels")
        inits = {"scale": nn.initializers.ones, "bias": nn.initializers.zeros}
        scale, bias = (
            param_with_axes(name, init, (channels,), jnp.float32, axes=("embed",))
            for name, init in inits.items()
        )
        # [batch, height, width, channels] -> [batch, pixels, groups, channels of a group]
        y = x.astype(jnp.float32).reshape(x.shape[0], -1, self.groups, channels // self.groups)
        y = y - jnp.mean(y, axis=(1, 3), keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=(1, 3), keepdims=True) + _EPSILON)
        y = y.reshape(x.shape) * scale[None, None, None] + bias[None, None, None]
        return y.astype(self.dtype)


class ResidualBlock(nn.Module):
    """Two convolutions, each after a norm and a SiLU, around which the input is added."""

    config: VQGANConfig
    features: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch height width {self.features}"]:
        """Runs the block. An input with another number of channels is first projected."""
        cfg, y = self.config, x
        for i in range(2):
            y = nn.silu(GroupNorm(cfg.norm_groups, cfg.dtype, name=f"norm_{i}")(y))
            y = Conv(self.features, dtype=cfg.dtype, name=f"conv_{i}")(y)
        if x.shape[-1] != self.features:
            x = Conv(self.features, 1, dtype=cfg.dtype, name="shortcut")(x)
        return with_sharding_constraint(x + y, ("batch", "height", "width", "mlp"))


def _residual(cfg: VQGANConfig, features: int, name: str) -> nn.Module:
    """Makes a residual block that recomputes what the configuration says."""
    block = ResidualBlock
    if cfg.remat_policy != "none":
        block = nn.remat(ResidualBlock, policy=stack.REMAT_POLICIES[cfg.remat_policy])
    return block(cfg, features, name=name)


def _output(cfg: VQGANConfig, x: Array, features: int) -> Array:
    """Adds the last norm and convolution to a compact method."""
    x = nn.silu(GroupNorm(cfg.norm_groups, cfg.dtype, name="norm_out")(x))
    return Conv(features, dtype=cfg.dtype, name="conv_out")(x)


class Encoder(nn.Module):
    """From pixels to a vector a cell."""

    config: VQGANConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width 3"]
    ) -> Float[Array, "batch rows columns {self.config.latent_dim}"]:
        """Encodes pixels from 0 to 1."""
        cfg = self.config
        x = Conv(cfg.widths[0], dtype=cfg.dtype, input_axis="image_channels", name="conv_in")(x)
        for i, width in enumerate(cfg.widths):
            for j in range(cfg.layers_per_block):
                x = _residual(cfg, width, f"block_{i}_layer_{j}")(x)
            if i + 1 < len(cfg.widths):
                x = Conv(width, stride=2, dtype=cfg.dtype, name=f"block_{i}_downsample")(x)
        for i in range(2):
            x = _residual(cfg, cfg.widths[-1], f"middle_{i}")(x)
        return _output(cfg, x, cfg.latent_dim)


class Decoder(nn.Module):
    """From a vector a cell to pixels."""

    config: VQGANConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch rows columns {self.config.latent_dim}"]
    ) -> Float[Array, "batch height width 3"]:
        """Decodes to pixels from about 0 to about 1."""
        cfg = self.config
        x = Conv(cfg.widths[-1], dtype=cfg.dtype, name="conv_in")(x)
        for i in range(2):
            x = _residual(cfg, cfg.widths[-1], f"middle_{i}")(x)
        for i, width in enumerate(reversed(cfg.widths)):
            for j in range(cfg.layers_per_block + 1):
                x = _residual(cfg, width, f"block_{i}_layer_{j}")(x)
            if i + 1 < len(cfg.widths):
                x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
                x = Conv(width, dtype=cfg.dtype, name=f"block_{i}_upsample")(x)
        return _output(cfg, x, 3)


class Quantized(NamedTuple):
    """A quantiser's output.

    Attributes:
      tokens: int32 [batch, rows, columns].
      vectors: float32 [batch, rows, columns, code]: the tokens' vectors. Their gradient goes to the codebook.
      passed: the same numbers; their gradient goes to the latents (straight-through).
    """

    tokens: Array
    vectors: Array
    passed: Array


class VectorQuantizer(nn.Module):
    """A codebook, of which each latent takes the nearest vector."""

    config: VQGANConfig

    def setup(self):
        cfg = self.config

        def init(rng, shape, dtype):
            return jax.random.uniform(rng, shape, dtype, -1 / cfg.codebook_size, 1 / cfg.codebook_size)

        shape = (cfg.codebook_size, cfg.code_dim)
        self.embedding = param_with_axes("embedding", init, shape, jnp.float32, axes=("vocab", "embed"))

    def __call__(self, latents: Float32[Array, "batch rows columns code"]) -> Quantized:
        """Quantises."""
        # |z - e|^2 less |z|^2. In full precision: on a TPU, tokens would be others by the default's.
        highest = jax.lax.Precision.HIGHEST
        products = jnp.einsum("brcd,vd->brcv", latents, self.embedding, precision=highest)
        lengths = jnp.sum(jnp.square(self.embedding), axis=-1)
        tokens = jnp.argmin(lengths[None, None, None] - 2 * products, axis=-1).astype(jnp.int32)
        vectors = self.embed(tokens)
        return Quantized(tokens, vectors, latents + jax.lax.stop_gradient(vectors - latents))

    def embed(self, tokens: Int[Array, "batch rows columns"]) -> Float32[Array, "batch rows columns code"]:
        """Looks up the tokens' vectors."""
        return jnp.asarray(self.embedding)[tokens]


class FiniteScalarQuantizer(nn.Module):
    """Rounds each number of a latent to one of a few levels from -1 to 1; a token counts the combinations.

    With the levels (3, 2), the vectors of the tokens 0 to 5 are (-1, -1), (0, -1), (1, -1), (-1, 0), (0, 0)
    and (1, 0): an even number of levels has one more below 0.
    """

    config: VQGANConfig

    def __call__(self, latents: Float32[Array, "batch rows columns code"]) -> Quantized:
        """Quantises latents, which may be any numbers."""
        levels = np.asarray(self.config.levels)
        half = (levels - 1) * (1 + _WIDENING) / 2
        offset = np.where(levels % 2 == 0, 0.5, 0.0)
        shift = np.arctanh(offset / half)
        half, offset, shift = (
            jnp.asarray(numbers, jnp.float32)[None, None, None] for numbers in (half, offset, shift)
        )
        bounded = jnp.tanh(latents + shift) * half - offset
        rounded = bounded + jax.lax.stop_gradient(jnp.round(bounded) - bounded)
        digits = jnp.round(bounded).astype(jnp.int32) + jnp.asarray(levels // 2, jnp.int32)[None, None, None]
        tokens = jnp.sum(digits * self._places(), axis=-1)
        vectors = rounded / jnp.asarray(levels // 2, jnp.float32)[None, None, None]
        return Quantized(tokens, vectors, vectors)

    def embed(self, tokens: Int[Array, "batch rows columns"]) -> Float32[Array, "batch rows columns code"]:
        """Computes the tokens' vectors."""
        levels = jnp.asarray(self.config.levels, jnp.int32)[None, None, None]
        digits = tokens[..., None].astype(jnp.int32) // self._places() % levels
        return ((digits - levels // 2) / (levels // 2)).astype(jnp.float32)

    def _places(self) -> Int32[Array, "1 1 1 code"]:
        """Returns the values of a token's digits."""
        return jnp.asarray(np.cumprod((1, *self.config.levels[:-1])), jnp.int32)[None, None, None]


class VQGAN(nn.Module):
    """The whole tokenizer."""

    config: VQGANConfig

    def setup(self):
        cfg = self.config
        if cfg.remat_policy not in stack.REMAT_POLICIES:
            known = list(stack.REMAT_POLICIES)
            raise ValueError(f"remat_policy must be one of {known}, got {cfg.remat_policy!r}")
        if min(cfg.levels, default=2) < 2:
            raise ValueError(f"each number takes at least 2 levels, got {cfg.levels}")
        self.encoder, self.decoder = Encoder(cfg), Decoder(cfg)
        code_dim = len(cfg.levels) or cfg.code_dim
        # float32: a latent's rounding error may change its token.
        self.to_code, self.from_code = Conv(code_dim, 1), Conv(cfg.latent_dim, 1)
        self.quantizer = FiniteScalarQuantizer(cfg) if cfg.levels else VectorQuantizer(cfg)

    def describe(self) -> dict[str, Any]:
        """Names every setting of the network; JSON-able. `model_description` reads it."""
        return {"config": description.settings(self.config)}

    def encode(self, image: Real[Array, "batch height width 3"]) -> Float32[Array, "batch rows columns code"]:
        """Computes the latents of pixels from 0 to 255: uint8, or float where a gradient is wanted.

        Raises:
          ValueError: the image does not divide into cells.
        """
        height, width = image.shape[1:3]
        if height % self.config.stride or width % self.config.stride:
            raise ValueError(
                f"images of {height}x{width} pixels don't divide into cells of {self.config.stride} pixels"
            )
        return self.to_code(self.encoder(image.astype(jnp.float32) / _MAX_PIXEL))

    def decode(
        self, vectors: Float32[Array, "batch rows columns code"]
    ) -> Float32[Array, "batch height width 3"]:
        """Computes pixels from about 0 to about 255, of the tokens' vectors."""
        return _MAX_PIXEL * self.decoder(self.from_code(vectors)).astype(jnp.float32)

    def tokenize(self, image: Real[Array, "batch height width 3"]) -> Int32[Array, "batch rows columns"]:
        """Computes the tokens of pixels from 0 to 255."""
        return self.quantizer(self.encode(image)).tokens

    def decode_tokens(
        self, tokens: Int[Array, "batch rows columns"]
    ) -> Float32[Array, "batch height width 3"]:
        """Computes pixels from about 0 to about 255, of tokens below `config.num_codes`."""
        return self.decode(self.quantizer.embed(tokens))

    def __call__(self, image: Real[Array, "batch height width 3"]) -> dict[str, Array]:
        """Tokenizes and decodes, for training.

        Args:
          image: pixels from 0 to 255.

        Returns:
          "image": the decoded pixels, whose gradient passes through the quantiser; "latents" and "vectors" of
          the quantiser's losses; "tokens".
        """
        latents = self.encode(image)
        quantized = self.quantizer(latents)
        return {
            "image": self.decode(quantized.passed),
            "latents": latents,
            "vectors": quantized.vectors,
            "tokens": quantized.tokens,
        }
