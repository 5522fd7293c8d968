"""CLIP: an image tower and a text tower whose embeddings agree where the text describes the image.

    image ── ViT with a class token ── last norm of that token ── projection ┐
                                                                             ├─ cosine, or a head
    text ─── causal transformer ────── last norm at the end token ─ projection ┘

The architecture is that of the published models (Radford et al., https://arxiv.org/abs/2103.00020; OpenAI's,
laion's and PickScore's weights); the towers' layers are those of `vit`. OpenAI's class token and its position
are one parameter here, their sum.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from flax.linen.partitioning import param_with_axes, with_sharding_constraint
from jaxtyping import Float, Float32, Int, Real

from richhf_jax import feedback
from richhf_jax.network import description, layers, stack, vit
from richhf_jax.shapes import Array

# Means and deviations of red, green and blue, in units of 1: those of all published weights.
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)

COSINE, PREFERENCE, DENSE, GRADIENT = HEADS = ("cosine", "preference", "dense", "gradient")
# The scale of a new model's logits: a temperature of 0.07.
_FIRST_LOGIT_SCALE = 2.6592


@struct.dataclass
class TowerConfig:
    """Sizes of one tower; `vit.ViTLayer` reads them.

    Attributes:
      emb_dim: width of the tower.
      num_layers: depth.
      num_heads: heads of every attention; each is emb_dim / num_heads wide.
      mlp_dim: width of the feed-forward block's hidden layer.
      quick_gelu: x * sigmoid(1.702 x) for a GELU, as in OpenAI's weights; else the exact function, as in
        laion's and PickScore's.
      layer_norm_epsilon: epsilon of every norm.
      dropout_rate: as `vit.ViTConfig.dropout_rate`; the published models have none.
      dtype: type of activations; parameters and embeddings are float32.
      float32_attention_logits, scan_layers, remat_policy, attention_kernel: as in `vit.ViTConfig`.
    """

    emb_dim: int = 512
    num_layers: int = 12
    num_heads: int = 8
    mlp_dim: int = 2048
    quick_gelu: bool = False
    layer_norm_epsilon: float = 1e-5
    dropout_rate: float = 0.0
    dtype: Any = jnp.float32
    float32_attention_logits: bool = False
    scan_layers: bool = False
    remat_policy: str = "none"
    attention_kernel: str = "auto"

    @property
    def activation(self) -> layers.Activation:
        """The function between a feed-forward block's two layers."""
        return quick_gelu if self.quick_gelu else _exact_gelu


@struct.dataclass
class VisionConfig(TowerConfig):
    """Sizes of the image tower. The defaults of a tower are the text's: give this one its own.

    Attributes:
      patch_size: side of a patch, in pixels.
      grid: rows and columns of the position table, in patches.
    """

    patch_size: int = 32
    grid: tuple[int, int] = (7, 7)


@struct.dataclass
class TextConfig(TowerConfig):
    """Sizes of the text tower.

    Attributes:
      vocab_size: number of token ids.
      max_length: rows of the position table: the most tokens of a text, its start and end included.
      end_id: the text's vector is that of the first token with this id. None: of the first token with the
        text's highest id, which is the end's in the published vocabularies. Transformers chooses by
        `eos_token_id` (2 stands for None), open_clip always takes the highest.
      pad_id: what follows a text's end becomes this token, because generators of images read its vectors,
        too. None: it stays, because the end's vector doesn't depend on it.
    """

    vocab_size: int = 49408
    max_length: int = 77
    end_id: int | None = None
    pad_id: int | None = None


@struct.dataclass
class HeadConfig:
    """What is made of both embeddings.

    Attributes:
      head: "cosine": their cosine, for the alignment alone; "preference": their cosine, for each kind of
        score (PickScore); "dense": four scores in [0, 1], by trained layers; "gradient": the heatmap of what
        doesn't agree with the text, see `grad_cam`.
      score_dense_layers: widths of the hidden layers of the head "dense"; a ReLU follows each.
      dtype: type of these layers' activations.
    """

    head: str = COSINE
    score_dense_layers: tuple[int, ...] = (512, 256)
    dtype: Any = jnp.float32


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Computes OpenAI's approximation of the GELU."""
    return x * jax.nn.sigmoid(1.702 * x)


def _exact_gelu(x: Array) -> Array:
    return nn.gelu(x, approximate=False)


class ImageTower(nn.Module):
    """The vision transformer, up to the norm of its class token."""

    config: VisionConfig

    @nn.compact
    def __call__(
        self, image: Real[Array, "batch height width 3"], *, deterministic: bool = True
    ) -> Float[Array, "batch embed"]:
        """Encodes pixels from 0 to 255: uint8, or float where a gradient is wanted.

        Raises:
          ValueError: the image does not divide into patches, or the heads do not divide the width.
        """
        cfg = self.config
        _check_heads(cfg)
        mean, deviation = (255 * jnp.array(values)[None, None, None] for values in (MEAN, DEVIATION))
        pixels = (image.astype(jnp.float32) - mean) / deviation
        embed = vit.PatchEmbedding(cfg.patch_size, cfg.emb_dim, cfg.dtype, False, name="patch_embedding")
        x = vit.PositionEmbedding(cfg.grid, name="position_embedding")(embed(pixels))
        # [batch, height, width, embed] -> [batch, 1 + patches, embed]
        x = vit.with_class_token(x.reshape(x.shape[0], -1, cfg.emb_dim))
        x = vit.norm(cfg, "pre_encoder_norm")(x)

        def call(layer, x, drop_rate):
            return layer(x, None, drop_rate, deterministic=deterministic)

        x = stack.apply_layers(vit.ViTLayer, cfg, cfg.num_layers, call, x)
        return vit.norm(cfg, "encoder_norm")(x[:, 0])


class TextTower(nn.Module):
    """A transformer in which each token sees those before it, up to the norm of the end token."""

    config: TextConfig

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "batch length"], *, deterministic: bool = True
    ) -> tuple[Float[Array, "batch embed"], Float[Array, "batch length embed"]]:
        """Encodes texts; what follows a text's end changes nothing.

        Returns:
          The end token's vector; and all tokens' vectors before the last layer, which generators of images
          read.

        Raises:
          ValueError: the texts are longer than the position table, or the heads do not divide the width.
        """
        cfg = self.config
        _check_heads(cfg)
        length = tokens.shape[1]
        if length > cfg.max_length:
            raise ValueError(f"texts of {length} tokens; the position table has {cfg.max_length}")
        # The first of several: argmax takes it.
        end = jnp.argmax(tokens if cfg.end_id is None else tokens == cfg.end_id, axis=1)
        if cfg.pad_id is not None:
            tokens = jnp.where(jnp.arange(length)[None] > end[:, None], cfg.pad_id, tokens)
        embed = layers.Embed(
            cfg.vocab_size,
            cfg.emb_dim,
            dtype=cfg.dtype,
            embedding_init=nn.initializers.normal(0.02),
            name="token_embedder",
        )
        positions = _TextPositions(cfg.max_length, cfg.emb_dim, name="position_embedding")(length)
        x = embed(tokens) + positions.astype(cfg.dtype)[None]
        mask = layers.make_causal_mask(tokens[:1], dtype=cfg.dtype)

        def call(layer, x_and_its_input, drop_rate):
            x, _ = x_and_its_input
            return layer(x, mask, drop_rate, deterministic=deterministic), x

        x, before_last = stack.apply_layers(vit.ViTLayer, cfg, cfg.num_layers, call, (x, x))
        x = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
        return vit.norm(cfg, "encoder_norm")(x), before_last


class _TextPositions(nn.Module):
    """The learned vectors of a text's positions."""

    max_length: int
    features: int

    @nn.compact
    def __call__(self, length: int) -> Float32[Array, "{length} embed"]:
        init, shape = nn.initializers.normal(0.01), (self.max_length, self.features)
        return param_with_axes("embedding", init, shape, jnp.float32, axes=("length", "embed"))[:length]


class Clip(nn.Module):
    """Both towers with their projections, and a head.

    Attributes:
      text_config, vision_config: the towers.
      head_config: what is made of both embeddings.
      projection_dim: width of the embeddings.
    """

    text_config: TextConfig
    vision_config: VisionConfig
    head_config: HeadConfig = HeadConfig()
    projection_dim: int = 512

    def setup(self):
        if self.head not in HEADS:
            raise ValueError(f"head must be one of {HEADS}, got {self.head!r}")
        self.vision = ImageTower(self.vision_config)
        self.text = TextTower(self.text_config)

        def projection():
            # float32, because a cosine in bfloat16 has two or three digits.
            return layers.DenseGeneral(self.projection_dim, kernel_axes=("embed", None))

        self.image_projection, self.text_projection = projection(), projection()
        init = nn.initializers.constant(_FIRST_LOGIT_SCALE)
        self.logit_scale = param_with_axes("logit_scale", init, (), jnp.float32, axes=())
        if self.head == DENSE:
            self.score_head = ScoreHead(self.head_config.score_dense_layers, self.head_config.dtype)

    @property
    def head(self) -> str:
        """One of `HEADS`."""
        return self.head_config.head

    @property
    def outputs(self) -> feedback.Outputs:
        """The kinds that the head predicts."""
        scores = {COSINE: (feedback.ALIGNMENT,), GRADIENT: ()}.get(self.head, feedback.SCORES)
        heatmaps = (feedback.MISALIGNMENT,) if self.head == GRADIENT else ()
        # A cosine; the dense layers' scores are in [0, 1].
        score_range = (-1.0, 1.0) if self.head in (COSINE, PREFERENCE) else (0.0, 1.0)
        return feedback.Outputs(scores, heatmaps, keywords=False, score_range=score_range)

    def with_attention_kernel(self, kernel: str) -> "Clip":
        """Returns the same network with another `attention_kernel`."""
        configs = {"text_config": self.text_config, "vision_config": self.vision_config}
        return self.clone(**{name: one.replace(attention_kernel=kernel) for name, one in configs.items()})

    def describe(self) -> dict[str, Any]:
        """Names every setting of the network; JSON-able. `model_description` reads it."""
        configs = ("text_config", "vision_config", "head_config")
        return {
            "projection_dim": self.projection_dim,
            **{name: description.settings(getattr(self, name)) for name in configs},
        }

    def encode_image(
        self, image: Real[Array, "batch height width 3"], enable_dropout: bool = False
    ) -> Float32[Array, "batch projection"]:
        """Embeds pixels from 0 to 255, see `ImageTower`; the embeddings are of any length."""
        return self.image_projection(self.vision(image, deterministic=not enable_dropout))

    def encode_text(
        self, tokens: Int[Array, "batch length"], enable_dropout: bool = False
    ) -> Float32[Array, "batch projection"]:
        """Embeds texts, see `TextTower`; the embeddings are of any length."""
        return self.text_projection(self.text(tokens, deterministic=not enable_dropout)[0])

    @nn.nowrap
    def similarity(
        self, image: Float32[Array, "batch projection"], text: Float32[Array, "batch projection"]
    ) -> Float32[Array, " batch"]:
        """Computes the cosine of each image's embedding and its text's, in [-1, 1]."""
        return jnp.sum(unit(image) * unit(text), axis=-1)

    def scores(
        self, image: Float32[Array, "batch projection"], text: Float32[Array, "batch projection"]
    ) -> Float32[Array, "batch scores"]:
        """Predicts what the head says, of embeddings; "gradient" has no scores."""
        if self.head == DENSE:
            return self.score_head(unit(image), unit(text))
        return jnp.repeat(self.similarity(image, text)[:, None], len(self.outputs.scores), axis=1)

    def __call__(
        self,
        image: Real[Array, "batch height width 3"],
        tokens: Int[Array, "batch length"],
        *,
        enable_dropout: bool = False,
    ) -> dict[str, Float32[Array, "..."]]:
        """Computes both embeddings as "image" and "text", the logits' factor "logit_scale", and "scores"."""
        image, text = self.encode_image(image, enable_dropout), self.encode_text(tokens, enable_dropout)
        outputs = {"image": image, "text": text, "logit_scale": self.logit_scale}
        return outputs if self.head == GRADIENT else outputs | {"scores": self.scores(image, text)}


class ScoreHead(nn.Module):
    """Dense layers from both embeddings to the scores.

    The embeddings have length 1. Their product stands beside them: its sum is the cosine, which layers with
    ReLUs would have to learn.
    """

    hidden_layers: tuple[int, ...]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, image: Float[Array, "batch projection"], text: Float[Array, "batch projection"]
    ) -> Float32[Array, "batch scores"]:
        """Predicts the scores, in [0, 1] and in the order of `feedback.SCORES`."""
        # Numbers of length-1 vectors are around 1 / sqrt(width): brought to 1.
        width = image.shape[-1]
        x = jnp.concatenate([image * width**0.5, text * width**0.5, image * text * width], axis=-1)
        for i, features in enumerate(self.hidden_layers):
            axes = ("embed" if i else "dense_features", "mlp")
            dense = layers.DenseGeneral(
                features, dtype=self.dtype, kernel_axes=axes, use_bias=True, name=f"dense_{i}"
            )
            x = with_sharding_constraint(nn.relu(dense(x)), ("batch", "mlp"))
        output = layers.DenseGeneral(
            len(feedback.SCORES), kernel_axes=("embed", None), use_bias=True, name="output"
        )
        return nn.sigmoid(output(x))


def unit(embeddings: Float32[Array, "batch projection"]) -> Float32[Array, "batch projection"]:
    """Brings each embedding to length 1."""
    return embeddings / jnp.linalg.norm(embeddings, axis=-1, keepdims=True)


def _check_heads(config: TowerConfig) -> None:
    if config.emb_dim % config.num_heads:
        raise ValueError(f"{config.num_heads} heads do not divide the width {config.emb_dim}")
