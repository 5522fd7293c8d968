"""T5's encoder and decoder stacks: interface and parameter tree of T5X's `examples/t5/network.py`.

One thing differs: our encoder takes embeddings, not tokens, because what it reads is an image followed by
a text. The token table (`token_embedder`) belongs to the module that owns both stacks and is handed to
the decoder.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from richhf_jax.network import layers

Array = jax.Array


@struct.dataclass
class T5Config:
    """Sizes of the encoder and the decoder. The defaults are T5X's; the names too.

    Attributes:
      vocab_size: rows of the token table.
      dtype: of activations; parameters are float32.
      emb_dim: width of the model.
      num_heads: of every attention.
      num_encoder_layers, num_decoder_layers: depth of the stacks.
      head_dim: width of a head.
      mlp_dim: width of the feed-forward block's hidden layer.
      mlp_activations: ('gelu', 'linear') for T5 1.1, ('relu',) for T5 1.0.
      dropout_rate: everywhere; one draw for all positions, as in T5.
      logits_via_embedding: the decoder's logits reuse the token table (T5 1.0).
      float32_attention_logits: attention's softmax in float32 whatever `dtype`.
    """

    vocab_size: int
    dtype: Any = jnp.float32
    emb_dim: int = 512
    num_heads: int = 8
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    head_dim: int = 64
    mlp_dim: int = 2048
    mlp_activations: Sequence[str] = ("relu",)
    dropout_rate: float = 0.1
    logits_via_embedding: bool = False
    float32_attention_logits: bool = False


def _norm(cfg: T5Config, name: str) -> layers.LayerNorm:
    return layers.LayerNorm(dtype=cfg.dtype, name=name)


def _attention(cfg: T5Config, name: str) -> layers.MultiHeadDotProductAttention:
    return layers.MultiHeadDotProductAttention(
        num_heads=cfg.num_heads,
        head_dim=cfg.head_dim,
        dtype=cfg.dtype,
        dropout_rate=cfg.dropout_rate,
        float32_logits=cfg.float32_attention_logits,
        name=name,
    )


def _mlp(cfg: T5Config) -> layers.MlpBlock:
    return layers.MlpBlock(
        intermediate_dim=cfg.mlp_dim,
        activations=cfg.mlp_activations,
        intermediate_dropout_rate=cfg.dropout_rate,
        dtype=cfg.dtype,
        name="mlp",
    )


def _dropout(cfg: T5Config) -> nn.Dropout:
    # Axis -2 is length: the same features are dropped at every position.
    return nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))


def _relative_position_biases(cfg: T5Config) -> layers.RelativePositionBiases:
    return layers.RelativePositionBiases(
        num_buckets=32,
        max_distance=128,
        num_heads=cfg.num_heads,
        dtype=cfg.dtype,
        embedding_init=nn.initializers.variance_scaling(1.0, "fan_avg", "uniform"),
        name="relpos_bias",
    )


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward block, each normalised before and added to its input after.

    Attributes:
      config: sizes.
      relative_embedding: the `RelativePositionBiases` that all layers of the stack share.
    """

    config: T5Config
    relative_embedding: nn.Module

    @nn.compact
    def __call__(
        self, inputs: Array, encoder_mask: Array | None = None, deterministic: bool = False
    ) -> Array:
        """inputs [batch, length, embed], mask [batch, 1, length, length] -> [batch, length, embed]."""
        cfg = self.config
        length = inputs.shape[-2]
        bias = self.relative_embedding(length, length, True)

        x = _norm(cfg, "pre_attention_layer_norm")(inputs)
        x = _attention(cfg, "attention")(x, x, encoder_mask, bias, deterministic=deterministic)
        x = inputs + _dropout(cfg)(x, deterministic=deterministic)

        y = _norm(cfg, "pre_mlp_layer_norm")(x)
        y = _mlp(cfg)(y, deterministic=deterministic)
        return x + _dropout(cfg)(y, deterministic=deterministic)


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to what was encoded, and feed-forward block.

    Attributes:
      config: sizes.
      relative_embedding: the `RelativePositionBiases` that all layers of the stack share.
    """

    config: T5Config
    relative_embedding: nn.Module

    @nn.compact
    def __call__(
        self,
        inputs: Array,
        encoded: Array,
        decoder_mask: Array | None = None,
        encoder_decoder_mask: Array | None = None,
        deterministic: bool = False,
        decode: bool = False,
        max_decode_length: int | None = None,
    ) -> Array:
        """inputs [batch, length, embed], encoded [batch, encoded_length, embed] -> [batch, length, embed]."""
        cfg = self.config
        # While decoding the input is one position, but its biases are a row of the whole matrix.
        length = max_decode_length if decode and max_decode_length else inputs.shape[-2]
        bias = self.relative_embedding(length, length, False)

        x = _norm(cfg, "pre_self_attention_layer_norm")(inputs)
        x = _attention(cfg, "self_attention")(
            x, x, decoder_mask, bias, deterministic=deterministic, decode=decode
        )
        x = inputs + _dropout(cfg)(x, deterministic=deterministic)

        y = _norm(cfg, "pre_cross_attention_layer_norm")(x)
        y = _attention(cfg, "encoder_decoder_attention")(
            y, encoded, encoder_decoder_mask, deterministic=deterministic
        )
        y = x + _dropout(cfg)(y, deterministic=deterministic)

        z = _norm(cfg, "pre_mlp_layer_norm")(y)
        z = _mlp(cfg)(z, deterministic=deterministic)
        return y + _dropout(cfg)(z, deterministic=deterministic)


class Encoder(nn.Module):
    """The encoder over image tokens followed by text tokens, every position seeing every unmasked other.

    Relative positions count along the one sequence that comes in: the image's patches row by row, then the
    text. So a patch and the patch below it are as far apart as a row is long, and beyond 128 positions all
    distances share a bucket; where a patch lies is also in its vector, from the ViT.
    """

    config: T5Config

    @nn.compact
    def __call__(
        self, inputs_embeddings: Array, encoder_mask: Array | None = None, *, deterministic: bool = False
    ) -> Array:
        """Embeddings -> their encodings.

        Args:
          inputs_embeddings: [batch, length, embed], image tokens first.
          encoder_mask: > 0 where a position may see another, [batch, 1, length, length]; None for all.
          deterministic: no dropout.

        Returns:
          [batch, length, embed] of `config.dtype`.

        Raises:
          ValueError: the embeddings do not have the model's width.
        """
        cfg = self.config
        if inputs_embeddings.ndim != 3 or inputs_embeddings.shape[-1] != cfg.emb_dim:
            raise ValueError(f"expected [batch, length, {cfg.emb_dim}], got {inputs_embeddings.shape}")
        biases = _relative_position_biases(cfg)
        x = _dropout(cfg)(inputs_embeddings, deterministic=deterministic).astype(cfg.dtype)
        for i in range(cfg.num_encoder_layers):
            x = EncoderLayer(config=cfg, relative_embedding=biases, name=f"layers_{i}")(
                x, encoder_mask, deterministic
            )
        x = _norm(cfg, "encoder_norm")(x)
        # Not shared by the positions: so it is in T5X.
        return nn.Dropout(cfg.dropout_rate)(x, deterministic=deterministic)


class Decoder(nn.Module):
    """The decoder, from tokens to logits.

    Attributes:
      config: sizes.
      shared_embedding: the `layers.Embed` that tokens are looked up in.
    """

    config: T5Config
    shared_embedding: nn.Module

    @nn.compact
    def __call__(
        self,
        encoded: Array,
        decoder_input_tokens: Array,
        decoder_positions: Array | None = None,
        decoder_mask: Array | None = None,
        encoder_decoder_mask: Array | None = None,
        deterministic: bool = False,
        decode: bool = False,
        max_decode_length: int | None = None,
    ) -> Array:
        """Tokens -> logits of the next token at each position.

        Args:
          encoded: [batch, encoded_length, embed].
          decoder_input_tokens: int [batch, length]; while decoding step by step, [batch, 1].
          decoder_positions: taken for T5X's sake; T5 knows no absolute positions.
          decoder_mask: > 0 where a position may see another, [batch, 1, length, length].
          encoder_decoder_mask: the same towards `encoded`, [batch, 1, length, encoded_length].
          deterministic: no dropout.
          decode: keep and use the cache, see `MultiHeadDotProductAttention`.
          max_decode_length: the cache's length, needed with `decode`.

        Returns:
          [batch, length, vocab] float32.
        """
        del decoder_positions
        cfg = self.config
        biases = _relative_position_biases(cfg)
        y = self.shared_embedding(decoder_input_tokens.astype("int32"))
        y = _dropout(cfg)(y, deterministic=deterministic).astype(cfg.dtype)
        for i in range(cfg.num_decoder_layers):
            y = DecoderLayer(config=cfg, relative_embedding=biases, name=f"layers_{i}")(
                y,
                encoded,
                decoder_mask=decoder_mask,
                encoder_decoder_mask=encoder_decoder_mask,
                deterministic=deterministic,
                decode=decode,
                max_decode_length=max_decode_length,
            )
        y = _norm(cfg, "decoder_norm")(y)
        y = _dropout(cfg)(y, deterministic=deterministic)

        # [batch, length, embed] -> [batch, length, vocab], in float32 for a stable softmax.
        if cfg.logits_via_embedding:
            # The table has unit variance, a dense kernel 1/embed: bring the logits to the same scale.
            return self.shared_embedding.attend(y) / jnp.sqrt(y.shape[-1])
        return layers.DenseGeneral(
            cfg.vocab_size, dtype=jnp.float32, kernel_axes=("embed", "vocab"), name="logits_dense"
        )(y)
