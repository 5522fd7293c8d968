"""RAHF: a T5 encoder fuses a ViT's image tokens with the prompt's tokens; three kinds of head read them.

    image ── ViT ── image tokens ┐                    ┌ image tokens as a map ── heatmap and score heads
                                 ├─ T5 encoder ───────┤
    prompt ── token embedding ───┘                    └ all tokens ── T5 decoder ── "a yellow_0 cat"

One example is one image with several prompts. The ViT runs once for an image, the encoder once for a prompt.
"""

from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Bool, Float, Float32, Int, Real

from richhf_jax import feedback
from richhf_jax.network import description, heads, layers, t5, vit
from richhf_jax.shapes import Array


@struct.dataclass
class HeadsConfig:
    """The heads' layers, as data.

    Attributes:
      heatmap_layers, heatmap_output_layer: `layers` and `output_layer` of `heads.HeatmapHead`.
      heatmap_output_bias: initial bias before the sigmoid; below 0, because most pixels are cold.
      score_conv_layers, score_dense_layers: `conv_layers` and `dense_layers` of `heads.ScoreHead`.
      norm, norm_epsilon, deconv_padding, row_strips: as in `heads.Style`.
      scan_layers: runs equal heads, and equal layers in a row, in one loop, which compiles several times
        faster. Their parameters are named and shaped as without.
      score_variance: `variance` of `heads.ScoreHead`.
    """

    heatmap_layers: tuple[heads.Layer, ...]
    score_conv_layers: tuple[tuple[int, int], ...]
    score_dense_layers: tuple[int, ...]
    heatmap_output_layer: tuple[str, int] = ("conv", 3)
    heatmap_output_bias: float = 0.0
    norm: str = "layer"
    norm_epsilon: float = 1e-6
    deconv_padding: str = "SAME"
    scan_layers: bool = False
    row_strips: int = 1
    score_variance: bool = False


# Unchecked, because jax also makes it of shapes.
@no_type_check
@struct.dataclass
class Encoded:
    """Prompts fused with their image.

    Attributes:
      tokens: image tokens followed by text tokens.
      valid: False for padding of the image or the text.
      grid: rows and columns of patches.
      class_tokens: 1 where a class token stands before the patches, else 0.
    """

    tokens: Float[Array, "batch prompts length embed"]
    valid: Bool[Array, "batch prompts length"]
    grid: tuple[int, int] = struct.field(pytree_node=False)
    class_tokens: int = struct.field(pytree_node=False)

    @property
    def image_tokens(self) -> int:
        """Number of image tokens."""
        return self.class_tokens + self.grid[0] * self.grid[1]

    def feature_maps(self, first: int, count: int) -> Float[Array, "maps rows columns embed"]:
        """Returns the patches of `count` prompts from `first` on as maps; `maps` is batch * count."""
        patches = self.tokens[:, first : first + count, self.class_tokens : self.image_tokens]
        return patches.reshape(-1, *self.grid, patches.shape[-1])

    def last(self, count: int) -> "Encoded":
        """Returns the last `count` prompts, each as an example of its own with one prompt."""
        return jax.tree.map(lambda x: x[:, -count:].reshape(-1, 1, *x.shape[2:]), self)


class Rahf(nn.Module):
    """The whole network.

    Attributes:
      variant: "multi_head": a head for each kind, all on the one plain prompt. "augmented_prompt": one
        heatmap and one score head; each prompt has a task string. Heatmap prompts come first, then score
        prompts, then text prompts.
      decoder_sees_image: False: the text decoder attends only to the encoded prompt.
    """

    t5_config: t5.T5Config
    vit_config: vit.ViTConfig
    heads_config: HeadsConfig
    variant: str = feedback.MULTI_HEAD
    decoder_sees_image: bool = True

    def setup(self):
        if self.variant not in feedback.VARIANTS:
            raise ValueError(f"variant must be one of {feedback.VARIANTS}, got {self.variant!r}")
        config, head = self.t5_config, self.heads_config
        self.vit = vit.ViT(config=self.vit_config)
        if self.vit_config.emb_dim != config.emb_dim:
            # Only one axis is named "embed": T5X's partitioner refuses a name twice in one array.
            self.image_projection = layers.DenseGeneral(
                config.emb_dim, dtype=config.dtype, kernel_axes=(None, "embed"), use_bias=True
            )
        self.token_embedder = layers.Embed(
            num_embeddings=config.vocab_size,
            features=config.emb_dim,
            dtype=config.dtype,
            attend_dtype=jnp.float32,
            embedding_init=nn.initializers.normal(stddev=1.0),
            one_hot=True,
        )
        self.encoder = t5.Encoder(config=config)
        self.decoder = t5.Decoder(config=config, shared_embedding=self.token_embedder)

        style = heads.Style(
            head.norm,
            head.norm_epsilon,
            head.deconv_padding,
            config.dtype,
            head.scan_layers,
            head.row_strips,
        )

        heatmap_cls, score_cls = heads.HeatmapHead, heads.ScoreHead
        if head.scan_layers:
            heatmap_cls, score_cls = map(heads.recomputing_norms, (heatmap_cls, score_cls))

        def heatmap_head():
            return heatmap_cls(
                layers=head.heatmap_layers,
                style=style,
                output_layer=head.heatmap_output_layer,
                output_bias_init=head.heatmap_output_bias,
            )

        def score_head():
            return score_cls(head.score_conv_layers, head.score_dense_layers, style, head.score_variance)

        if self.variant == feedback.MULTI_HEAD:
            self.heatmap_head: Any = {kind: heatmap_head() for kind in feedback.HEATMAPS}
            self.score_head: Any = {kind: score_head() for kind in feedback.SCORES}
        else:
            self.heatmap_head = heatmap_head()
            self.score_head = score_head()

    def describe(self) -> dict[str, Any]:
        """Names every setting of the network; JSON-able. `model_description` reads it."""
        configs = ("t5_config", "vit_config", "heads_config")
        return {
            "variant": self.variant,
            "decoder_sees_image": self.decoder_sees_image,
            **{name: description.settings(getattr(self, name)) for name in configs},
        }

    def with_attention_kernel(self, kernel: str) -> "Rahf":
        """Returns the same network with another `attention_kernel`."""
        configs = {"t5_config": self.t5_config, "vit_config": self.vit_config}
        return self.clone(**{name: one.replace(attention_kernel=kernel) for name, one in configs.items()})

    @property
    def smallest_slots(self) -> feedback.Slots:
        """The fewest outputs that use every parameter; initialisation needs them."""
        if self.variant == feedback.MULTI_HEAD:
            return feedback.ALL_SLOTS
        return feedback.Slots(1, 1, 1)

    @property
    def cache_offset(self) -> int:
        """Number of axes before the batch axis in the decoder's cache."""
        return 1 if self.t5_config.scan_layers else 0

    def encode(
        self,
        image: Real[Array, "batch height width 3"],
        encoder_input_tokens: Int[Array, "batch prompts length"],
        image_box: Int[Array, "batch 4"] | None = None,
        enable_dropout: bool = False,
    ) -> Encoded:
        """Fuses each prompt with the image.

        Args:
          image: pixels from 0 to 255: uint8, or float where a gradient is wanted.
          encoder_input_tokens: the prompts; 0 = padding, which follows the prompt.
          image_box: place of a letterboxed image: its first row and column, and those after its last. Pixels
            in patches wholly outside it change no output. None: the image fills its square.
          enable_dropout: turns dropout on, which needs the rng "dropout".
        """
        batch, prompts, length = encoder_input_tokens.shape
        patch_size = self.vit_config.patch_size
        grid = (image.shape[1] // patch_size, image.shape[2] // patch_size)
        patch_mask = None if image_box is None else _patches_in(image_box, grid, patch_size)
        # uint8 -> [-1, 1]
        pixels = image.astype(self.vit_config.dtype) / 127.5 - 1.0
        vision = self.vit(pixels, patch_mask, deterministic=not enable_dropout)
        if self.vit_config.emb_dim != self.t5_config.emb_dim:
            vision = self.image_projection(vision)
        image_tokens, embed = vision.shape[-2:]
        class_tokens = image_tokens - grid[0] * grid[1]
        text = self.token_embedder(encoder_input_tokens.astype(jnp.int32))
        # [batch, image tokens, embed] -> [batch, prompts, image tokens, embed]
        vision = jnp.broadcast_to(vision[:, None], (batch, prompts, image_tokens, embed))
        fused = jnp.concatenate([vision.astype(text.dtype), text], axis=2)

        image_valid = jnp.ones((batch, image_tokens), bool)
        if patch_mask is not None:
            image_valid = image_valid.at[:, class_tokens:].set(patch_mask)
        image_valid = jnp.broadcast_to(image_valid[:, None], (batch, prompts, image_tokens))
        valid = jnp.concatenate([image_valid, encoder_input_tokens > 0], axis=2)
        # [batch, prompts, ...] -> [batch * prompts, ...]
        fused = fused.reshape(batch * prompts, image_tokens + length, embed)
        flat_valid = valid.reshape(batch * prompts, image_tokens + length)
        mask = layers.make_attention_mask(flat_valid, flat_valid, dtype=self.t5_config.dtype)
        # Without a letterbox all padding stands at the end.
        visible = flat_valid if patch_mask is None else None
        encoded = self.encoder(
            fused, mask, visible, image_tokens=image_tokens, deterministic=not enable_dropout
        )
        encoded = encoded.reshape(batch, prompts, image_tokens + length, embed)
        if patch_mask is not None:  # The heads see zeros there, as beyond an image's border.
            encoded = jnp.where(valid[..., None], encoded, 0)
        return Encoded(encoded, valid, grid, class_tokens)

    def decode(
        self,
        encoded: Encoded,
        decoder_input_tokens: Int[Array, "sequences target_length"],
        decoder_target_tokens: Int[Array, "sequences target_length"],
        *,
        enable_dropout: bool = False,
        decode: bool = False,
        max_decode_length: int | None = None,
    ) -> Float32[Array, "sequences target_length vocab"]:
        """Computes teacher-forced logits, or with `decode=True` those of one cached step.

        Args:
          encoded: examples with one prompt each.
          decoder_input_tokens, decoder_target_tokens: a sequence for each example. In a step `target_length`
            is 1, and where the collection "fixed_kv" is given, each example may have several sequences.
          enable_dropout: turns dropout on, which needs the rng "dropout".
          decode: keeps and uses the cache.
          max_decode_length: the cache's length, needed with `decode`.
        """
        dtype = self.t5_config.dtype
        start = 0 if self.decoder_sees_image else encoded.image_tokens
        tokens, valid = encoded.tokens[:, 0, start:], encoded.valid[:, 0, start:]
        if decode:
            decoder_mask = None
            # One query for all: all sequences of an example see the same, see `layers`' attention.
            queries = jnp.ones((valid.shape[0], 1), jnp.int32)
        else:
            decoder_mask = layers.make_decoder_mask(decoder_target_tokens, dtype=dtype)
            queries = decoder_target_tokens > 0
        cross_mask = layers.make_attention_mask(queries, valid, dtype=dtype)
        logits = self.decoder(
            tokens,
            decoder_input_tokens=decoder_input_tokens,
            decoder_mask=decoder_mask,
            encoder_decoder_mask=cross_mask,
            deterministic=not enable_dropout,
            decode=decode,
            max_decode_length=max_decode_length,
        )
        return logits.astype(jnp.float32)

    def heatmaps(
        self, encoded: Encoded, slots: feedback.Slots
    ) -> Float32[Array, "batch heatmaps height width"]:
        """Predicts the heatmaps, in [0, 1]."""
        if self.variant == feedback.MULTI_HEAD:
            features = encoded.feature_maps(0, 1)
            kinds = feedback.HEATMAPS[: slots.heatmaps]
            return self._each([self.heatmap_head[kind] for kind in kinds], features)
        heatmaps = self.heatmap_head(encoded.feature_maps(0, slots.heatmaps))
        return heatmaps.reshape(-1, slots.heatmaps, *heatmaps.shape[1:])

    def scores(
        self, encoded: Encoded, slots: feedback.Slots
    ) -> Float32[Array, "batch scores"] | Float32[Array, "batch scores 2"]:
        """Predicts the scores, in [0, 1]; with `score_variance`, pairs, see `heads.ScoreHead`."""
        if self.variant == feedback.MULTI_HEAD:
            features = encoded.feature_maps(0, 1)
            kinds = feedback.SCORES[: slots.scores]
            return self._each([self.score_head[kind] for kind in kinds], features)
        scores = self.score_head(encoded.feature_maps(slots.heatmaps, slots.scores))
        return scores.reshape(-1, slots.scores, *scores.shape[1:])

    @nn.nowrap
    def named_scores(self, scores: Array) -> dict[str, Float32[Array, "batch scores"]]:
        """Names what `scores` returns: "scores", and with `score_variance` "score_log_variances"."""
        if not self.heads_config.score_variance:
            return {"scores": scores}
        return {"scores": scores[..., 0], "score_log_variances": scores[..., 1]}

    def score(self, encoded: Encoded, kind: str) -> Float32[Array, " batch"]:
        """Predicts one kind's score for prompts that ask for it, and computes no other head."""
        head = self.score_head[kind] if self.variant == feedback.MULTI_HEAD else self.score_head
        score = head(encoded.feature_maps(0, 1))
        return score[..., 0] if self.heads_config.score_variance else score

    def _each(self, equal_heads: list[nn.Module], features: Array) -> Array:
        """Applies each head to the features: [batch, heads, ...]."""
        if len(equal_heads) == 1 or self.is_initializing() or not self.heads_config.scan_layers:
            return jnp.stack([head(features) for head in equal_heads], axis=1)
        one = equal_heads[0].clone(parent=None, name=None)
        params = heads.stack_trees([head.variables["params"] for head in equal_heads])
        outputs = jax.lax.map(lambda of_head: one.apply({"params": of_head}, features), params)
        return jnp.moveaxis(outputs, 0, 1)

    def __call__(
        self,
        image: Real[Array, "batch height width 3"],
        encoder_input_tokens: Int[Array, "batch prompts length"],
        decoder_input_tokens: Int[Array, "batch texts target_length"],
        decoder_target_tokens: Int[Array, "batch texts target_length"],
        *,
        num_heatmaps: int,
        num_scores: int,
        image_box: Int[Array, "batch 4"] | None = None,
        enable_dropout: bool = True,
    ) -> dict[str, Float32[Array, "batch ..."]]:
        """Computes all outputs of a training batch.

        Args:
          image, encoder_input_tokens, image_box, enable_dropout: as for `encode`.
          decoder_input_tokens, decoder_target_tokens: as for `decode`.
          num_heatmaps, num_scores: number of outputs of each kind.

        Returns:
          "heatmaps" [batch, heatmaps, height, width], the arrays of `named_scores`, and "logits"
          [batch, texts, target_length, vocab]; kinds with count 0 are absent.

        Raises:
          ValueError: the number of prompts doesn't fit the variant and the slots.
        """
        batch, texts, target_length = decoder_input_tokens.shape
        prompts = encoder_input_tokens.shape[1]
        slots = feedback.Slots(num_heatmaps, num_scores, texts)
        if prompts != (wanted := slots.prompts(self.variant)):
            raise ValueError(
                f"variant {self.variant} with {slots} takes {wanted} prompts an image, got {prompts}"
            )
        encoded = self.encode(image, encoder_input_tokens, image_box, enable_dropout)
        outputs = {}
        if slots.heatmaps:
            outputs["heatmaps"] = self.heatmaps(encoded, slots)
        if slots.scores:
            outputs |= self.named_scores(self.scores(encoded, slots))
        if slots.texts:
            # [batch, texts, ...] -> [batch * texts, ...]
            logits = self.decode(
                encoded.last(texts),
                decoder_input_tokens.reshape(batch * texts, target_length),
                decoder_target_tokens.reshape(batch * texts, target_length),
                enable_dropout=enable_dropout,
            )
            outputs["logits"] = logits.reshape(batch, texts, target_length, -1)
        return outputs


def _patches_in(box: Array, grid: tuple[int, int], patch_size: int) -> Array:
    """Marks the patches with a pixel of the box: [batch, 4] -> bool [batch, rows * columns], row by row."""

    def overlap(count, first, end):  # [batch] each -> [batch, count]
        start = jnp.arange(count)[None] * patch_size
        return (start + patch_size > first[:, None]) & (start < end[:, None])

    rows, columns = (overlap(grid[axis], box[:, axis], box[:, axis + 2]) for axis in (0, 1))
    return (rows[:, :, None] & columns[:, None, :]).reshape(box.shape[0], -1)
