"""RAHF: a ViT's image tokens and the prompt's tokens, fused by a T5 encoder, read by three kinds of head.

    image ── ViT ── image tokens ┐                    ┌ image tokens as a map ── heatmap and score heads
                                 ├─ T5 encoder ───────┤
    prompt ── token embedding ───┘                    └ all tokens ── T5 decoder ── "a yellow_0 cat"

One example is one image with several prompts: the ViT runs once an image, the encoder once a prompt.
"""

from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn

from richhf_jax import feedback
from richhf_jax.network import heads, layers, t5, vit

VARIANTS = ("multi_head", "augmented_prompt")


class Slots(NamedTuple):
    """How many outputs of each kind an example has. A kind with count 0 costs nothing."""

    heatmaps: int
    scores: int
    texts: int


@flax.struct.dataclass
class HeadsConfig:
    """The heads' layers, as data.

    Attributes:
      heatmap_layers: ('conv' | 'deconv', filters, kernel side), in order; deconvs double the side.
      heatmap_output_layer: (kind, kernel side) of the layer after those, with one filter.
      heatmap_output_bias: initial bias before the sigmoid; below 0 because most pixels are cold.
      score_conv_layers: (filters, kernel side), in order.
      score_dense_layers: widths.
    """

    heatmap_layers: tuple[tuple[str, int, int], ...]
    score_conv_layers: tuple[tuple[int, int], ...]
    score_dense_layers: tuple[int, ...]
    heatmap_output_layer: tuple[str, int] = ("conv", 3)
    heatmap_output_bias: float = 0.0


class Rahf(nn.Module):
    """The whole network.

    Attributes:
      variant: "multi_head": a head for each kind, all on the one plain prompt. "augmented_prompt":
        one heatmap and one score head; prompts carry a task string, and stand in the order heatmap
        prompts, score prompts, text prompts.
    """

    t5_config: t5.T5Config
    vit_config: vit.ViTConfig
    heads_config: HeadsConfig
    variant: str = "multi_head"

    def setup(self):
        if self.variant not in VARIANTS:
            raise ValueError(f"variant must be one of {VARIANTS}, got {self.variant!r}")
        config, head = self.t5_config, self.heads_config
        self.vit = vit.ViT(config=self.vit_config)
        if self.vit_config.emb_dim != config.emb_dim:
            self.image_projection = layers.DenseGeneral(
                config.emb_dim, dtype=config.dtype, kernel_axes=("embed", "embed")
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

        def heatmap_head():
            return heads.HeatmapHead(
                layers=head.heatmap_layers,
                output_layer=head.heatmap_output_layer,
                output_bias_init=head.heatmap_output_bias,
                dtype=config.dtype,
            )

        def score_head():
            return heads.ScoreHead(
                conv_layers=head.score_conv_layers, dense_layers=head.score_dense_layers, dtype=config.dtype
            )

        if self.variant == "multi_head":
            self.heatmap_head = {kind: heatmap_head() for kind in feedback.HEATMAPS}
            self.score_head = {kind: score_head() for kind in feedback.SCORES}
        else:
            self.heatmap_head = heatmap_head()
            self.score_head = score_head()

    @property
    def smallest_slots(self) -> Slots:
        """The fewest outputs that touch every parameter: what initialisation needs."""
        if self.variant == "multi_head":
            return Slots(len(feedback.HEATMAPS), len(feedback.SCORES), 1)
        return Slots(1, 1, 1)

    def num_prompts(self, slots: Slots) -> int:
        """Prompts of an example with these outputs."""
        return 1 if self.variant == "multi_head" else sum(slots)

    def encode(
        self, image: jax.Array, encoder_input_tokens: jax.Array, enable_dropout: bool = False
    ) -> jax.Array:
        """Fuses each prompt with the image.

        Args:
          image: uint8 [batch, height, width, 3].
          encoder_input_tokens: int32 [batch, prompts, length], 0 = padding.

        Returns:
          [batch, prompts, patches + length, embed]: image tokens first, then the prompt's.
        """
        batch, prompts, length = encoder_input_tokens.shape
        # uint8 -> [-1, 1]
        pixels = image.astype(self.vit_config.dtype) / 127.5 - 1.0
        vision = self.vit(pixels, deterministic=not enable_dropout)
        if self.vit_config.emb_dim != self.t5_config.emb_dim:
            vision = self.image_projection(vision)
        patches, embed = vision.shape[-2:]
        text = self.token_embedder(encoder_input_tokens.astype(jnp.int32))
        # [batch, patches, embed] -> [batch, prompts, patches, embed]
        vision = jnp.broadcast_to(vision[:, None], (batch, prompts, patches, embed))
        fused = jnp.concatenate([vision.astype(text.dtype), text], axis=2)
        # [batch, prompts, ...] -> [batch * prompts, ...]
        fused = fused.reshape(batch * prompts, patches + length, embed)
        valid = self._valid(patches, encoder_input_tokens.reshape(batch * prompts, length))
        mask = layers.make_attention_mask(valid, valid, dtype=self.t5_config.dtype)
        encoded = self.encoder(fused, mask, deterministic=not enable_dropout)
        return encoded.reshape(batch, prompts, patches + length, embed)

    def decode(
        self,
        encoded: jax.Array,
        encoder_input_tokens: jax.Array,
        decoder_input_tokens: jax.Array,
        decoder_target_tokens: jax.Array,
        *,
        enable_dropout: bool = False,
        decode: bool = False,
        max_decode_length: int | None = None,
    ) -> jax.Array:
        """Teacher-forced logits, or one cached step with `decode=True`. Slots are flattened into batch.

        Args:
          encoded: [batch, patches + length, embed], as `encode` makes it for one prompt.
          encoder_input_tokens: int32 [batch, length]: which of the prompt's positions are padding.
          decoder_input_tokens, decoder_target_tokens: int32 [batch, target_length].

        Returns:
          float32 [batch, target_length, vocab].
        """
        dtype = self.t5_config.dtype
        patches = encoded.shape[1] - encoder_input_tokens.shape[1]
        valid = self._valid(patches, encoder_input_tokens)
        if decode:
            decoder_mask = None
            queries = jnp.ones_like(decoder_target_tokens)
        else:
            decoder_mask = layers.make_decoder_mask(decoder_target_tokens, dtype=dtype)
            queries = decoder_target_tokens > 0
        cross_mask = layers.make_attention_mask(queries, valid, dtype=dtype)
        logits = self.decoder(
            encoded,
            decoder_input_tokens=decoder_input_tokens,
            decoder_mask=decoder_mask,
            encoder_decoder_mask=cross_mask,
            deterministic=not enable_dropout,
            decode=decode,
            max_decode_length=max_decode_length,
        )
        return logits.astype(jnp.float32)

    def heatmaps(self, encoded: jax.Array, num_patches: int, slots: Slots) -> jax.Array:
        """Encoded prompts -> float32 [batch, heatmaps, height, width] in [0, 1]."""
        if self.variant == "multi_head":
            features = _feature_map(encoded[:, 0, :num_patches])
            kinds = feedback.HEATMAPS[: slots.heatmaps]
            return jnp.stack([self.heatmap_head[kind](features) for kind in kinds], axis=1)
        return _over_slots(self.heatmap_head, encoded[:, : slots.heatmaps, :num_patches])

    def scores(self, encoded: jax.Array, num_patches: int, slots: Slots) -> jax.Array:
        """Encoded prompts -> float32 [batch, scores] in [0, 1]."""
        if self.variant == "multi_head":
            features = _feature_map(encoded[:, 0, :num_patches])
            kinds = feedback.SCORES[: slots.scores]
            return jnp.stack([self.score_head[kind](features) for kind in kinds], axis=1)
        start = slots.heatmaps
        return _over_slots(self.score_head, encoded[:, start : start + slots.scores, :num_patches])

    def __call__(
        self,
        image: jax.Array,
        encoder_input_tokens: jax.Array,
        decoder_input_tokens: jax.Array,
        decoder_target_tokens: jax.Array,
        *,
        num_heatmaps: int,
        num_scores: int,
        enable_dropout: bool = True,
    ) -> dict[str, jax.Array]:
        """All outputs of a training batch (shapes as in the README); kinds with count 0 are absent.

        Raises:
          ValueError: the number of prompts doesn't fit the variant and the slots.
        """
        batch, texts, target_length = decoder_input_tokens.shape
        prompts, length = encoder_input_tokens.shape[1:]
        slots = Slots(num_heatmaps, num_scores, texts)
        if prompts != self.num_prompts(slots):
            raise ValueError(
                f"variant {self.variant} with {slots} takes {self.num_prompts(slots)} prompts an image, "
                f"got {prompts}"
            )
        encoded = self.encode(image, encoder_input_tokens, enable_dropout)
        num_patches = encoded.shape[2] - length
        outputs = {}
        if slots.heatmaps:
            outputs["heatmaps"] = self.heatmaps(encoded, num_patches, slots)
        if slots.scores:
            outputs["scores"] = self.scores(encoded, num_patches, slots)
        if slots.texts:
            # Text prompts are the last ones; [batch, texts, ...] -> [batch * texts, ...]
            logits = self.decode(
                encoded[:, -texts:].reshape(batch * texts, *encoded.shape[2:]),
                encoder_input_tokens[:, -texts:].reshape(batch * texts, length),
                decoder_input_tokens.reshape(batch * texts, target_length),
                decoder_target_tokens.reshape(batch * texts, target_length),
                enable_dropout=enable_dropout,
            )
            outputs["logits"] = logits.reshape(batch, texts, target_length, -1)
        return outputs

    def _valid(self, patches: int, tokens: jax.Array) -> jax.Array:
        """bool [batch, patches + length]: every patch, and the tokens that are not padding."""
        image_valid = jnp.ones((tokens.shape[0], patches), bool)
        return jnp.concatenate([image_valid, tokens > 0], axis=1)


def _feature_map(image_tokens: jax.Array) -> jax.Array:
    """[batch, height * width, embed] -> [batch, height, width, embed], for a square image."""
    batch, patches, embed = image_tokens.shape
    side = round(patches**0.5)
    return image_tokens.reshape(batch, side, side, embed)


def _over_slots(head: nn.Module, image_tokens: jax.Array) -> jax.Array:
    """Runs one head on [batch, slots, patches, embed]; gives [batch, slots, ...]."""
    batch, slots = image_tokens.shape[:2]
    flat = image_tokens.reshape(batch * slots, *image_tokens.shape[2:])
    outputs = head(_feature_map(flat))
    return outputs.reshape(batch, slots, *outputs.shape[1:])
