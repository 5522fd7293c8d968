"""T5's encoder and decoder stacks: interface and parameter tree of T5X's `examples/t5/network.py`.

Two things differ. First, our encoder takes embeddings and not tokens, because it reads an image followed by
a text. The module that owns both stacks also owns the token table (`token_embedder`) and gives it to the
decoder. Second, a stack computes its relative position biases once and passes the array to its layers; T5X
passes the module, and each layer calls it.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jaxtyping import Bool, Float, Int, Shaped

from richhf_jax.network import layers, stack
from richhf_jax.shapes import Array


@struct.dataclass
class T5Config:
    """Sizes of the encoder and the decoder, with T5X's names and defaults.

    Attributes:
      vocab_size: rows of the token table.
      dtype: type of activations; parameters are float32.
      emb_dim: width of the model.
      num_heads: heads of every attention.
      num_encoder_layers, num_decoder_layers: depth of the stacks.
      head_dim: width of a head.
      mlp_dim: width of the feed-forward block's hidden layer.
      mlp_activations: ('gelu', 'linear') for T5 1.1, ('relu',) for T5 1.0.
      dropout_rate: dropout rate everywhere; one draw serves all positions, as in T5.
      stochastic_depth_rate: rate at which the last encoder layer's blocks are dropped in training, see
        `stack.apply_layers`. The decoder drops none.
      logits_via_embedding: the decoder's logits reuse the token table (T5 1.0).
      float32_attention_logits: computes attention's softmax in float32 whatever `dtype`.
      image_positions: place of the image tokens in the encoder's relative positions, see `encoder_positions`.
      scan_layers: runs the layers in one loop, which compiles several times faster, see `stack`.
      remat_policy: what the backward pass recomputes: 'none', 'minimal' or 'full', see `stack`.
      attention_kernel: what computes the encoder's attention: 'auto', 'xla' or 'cudnn', see the module
        `attention_kernel`. The decoder's is always 'xla': it has few queries, so its logits are few.
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
    stochastic_depth_rate: float = 0.0
    logits_via_embedding: bool = False
    float32_attention_logits: bool = False
    image_positions: str = "running"
    scan_layers: bool = False
    remat_policy: str = "none"
    attention_kernel: str = "auto"


IMAGE_POSITIONS = ("running", "after_text", "one_point")


def encoder_positions(
    image_tokens: int, text_tokens: int, image_positions: str = "running"
) -> Int[np.ndarray, " {image_tokens}+{text_tokens}"]:
    """Returns the place of every encoder token in T5's relative positions; text always counts 0, 1, 2, ...

    - "running": the image comes before the text, in one sequence. A patch and the one below it are as far
      apart as a row is long; beyond 128 positions all distances share a bucket. The ViT has also written a
      patch's place into its vector.
    - "after_text": the image comes after the text's last position (padding included), in one sequence.
    - "one_point": all image tokens stand at the one place before the text, so that T5 sees no order in them.

    >>> encoder_positions(3, 2, "running")
    array([-3, -2, -1,  0,  1])
    >>> encoder_positions(3, 2, "after_text")
    array([2, 3, 4, 0, 1])
    >>> encoder_positions(3, 2, "one_point")
    array([-1, -1, -1,  0,  1])

    Raises:
      ValueError: `image_positions` is none of these.
    """
    if image_positions not in IMAGE_POSITIONS:
        raise ValueError(f"image_positions must be one of {IMAGE_POSITIONS}, got {image_positions!r}")
    image = {
        "running": np.arange(-image_tokens, 0),
        "after_text": np.arange(text_tokens, text_tokens + image_tokens),
        "one_point": np.full(image_tokens, -1),
    }[image_positions]
    return np.concatenate([image, np.arange(text_tokens)])


def _norm(cfg: T5Config, name: str) -> layers.LayerNorm:
    return layers.LayerNorm(dtype=cfg.dtype, name=name)


def _attention(cfg: T5Config, name: str, kernel: str = "xla") -> layers.MultiHeadDotProductAttention:
    return layers.MultiHeadDotProductAttention(
        num_heads=cfg.num_heads,
        head_dim=cfg.head_dim,
        dtype=cfg.dtype,
        dropout_rate=cfg.dropout_rate,
        float32_logits=cfg.float32_attention_logits,
        kernel=kernel,
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
    # Axis -2 is length, so the same features are dropped at every position.
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
    """Self-attention and feed-forward block, each with a norm before and a residual connection around it."""

    config: T5Config

    @nn.compact
    def __call__(
        self,
        inputs: Float[Array, "batch length embed"],
        encoder_bias: Float[Array, "1 heads length length"],
        encoder_mask: Shaped[Array, "batch 1 length length"] | None = None,
        encoder_visible: Bool[Array, "batch length"] | None = None,
        drop_rate: Float[Array, ""] | float | None = None,
        deterministic: bool = False,
    ) -> Float[Array, "batch length embed"]:
        """Applies the layer.

        Args:
          inputs: output of the layer before.
          encoder_bias: relative position biases.
          encoder_mask, encoder_visible: as for `Encoder`.
          drop_rate: as for `stack.StochasticDepth`.
          deterministic: turns dropout off.
        """
        cfg = self.config
        x = _norm(cfg, "pre_attention_layer_norm")(inputs)
        x = _attention(cfg, "attention", cfg.attention_kernel)(
            x, x, encoder_mask, encoder_bias, encoder_visible, deterministic=deterministic
        )
        x = _dropout(cfg)(x, deterministic=deterministic)
        x = inputs + stack.StochasticDepth()(x, drop_rate)

        y = _norm(cfg, "pre_mlp_layer_norm")(x)
        y = _mlp(cfg)(y, deterministic=deterministic)
        y = _dropout(cfg)(y, deterministic=deterministic)
        return x + stack.StochasticDepth()(y, drop_rate)


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the encoder's output, and feed-forward block."""

    config: T5Config

    @nn.compact
    def __call__(
        self,
        inputs: Float[Array, "sequences length embed"],
        encoded: Float[Array, "batch encoded_length embed"],
        decoder_bias: Float[Array, "1 heads longest longest"],
        decoder_mask: Shaped[Array, "sequences 1 length length"] | None = None,
        encoder_decoder_mask: Shaped[Array, "batch 1 _ encoded_length"] | None = None,
        deterministic: bool = False,
        decode: bool = False,
    ) -> Float[Array, "sequences length embed"]:
        """Applies the layer.

        Args:
          inputs: output of the layer before.
          encoded: the encoder's output.
          decoder_bias: relative position biases; with `decode`, those of the longest length.
          decoder_mask, encoder_decoder_mask, deterministic, decode: as for `Decoder`.
        """
        cfg = self.config
        x = _norm(cfg, "pre_self_attention_layer_norm")(inputs)
        x = _attention(cfg, "self_attention")(
            x, x, decoder_mask, decoder_bias, deterministic=deterministic, decode=decode
        )
        x = inputs + _dropout(cfg)(x, deterministic=deterministic)

        y = _norm(cfg, "pre_cross_attention_layer_norm")(x)
        y = _attention(cfg, "encoder_decoder_attention")(
            y, encoded, encoder_decoder_mask, keep_kv=decode, deterministic=deterministic
        )
        y = x + _dropout(cfg)(y, deterministic=deterministic)

        z = _norm(cfg, "pre_mlp_layer_norm")(y)
        z = _mlp(cfg)(z, deterministic=deterministic)
        return y + _dropout(cfg)(z, deterministic=deterministic)


class Encoder(nn.Module):
    """The encoder of image tokens followed by text tokens; every position sees every unmasked one."""

    config: T5Config

    @nn.compact
    def __call__(
        self,
        inputs_embeddings: Float[Array, "batch length embed"],
        encoder_mask: Shaped[Array, "batch 1 length length"] | None = None,
        encoder_visible: Bool[Array, "batch length"] | None = None,
        *,
        image_tokens: int = 0,
        deterministic: bool = False,
    ) -> Float[Array, "batch length embed"]:
        """Encodes embeddings.

        Args:
          inputs_embeddings: image tokens first.
          image_tokens: number of image tokens.
          encoder_mask: > 0 where a position may see another; None: all see all.
          encoder_visible: the positions that `encoder_mask` shows to all positions that aren't padding, where
            they come first and padding follows; None: they don't.
          deterministic: turns dropout and stochastic depth off.

        Returns:
          The encodings, of type `config.dtype`.

        Raises:
          ValueError: the embeddings do not have the model's width.
        """
        cfg = self.config
        if inputs_embeddings.ndim != 3 or inputs_embeddings.shape[-1] != cfg.emb_dim:
            raise ValueError(f"expected [batch, length, {cfg.emb_dim}], got {inputs_embeddings.shape}")
        length = inputs_embeddings.shape[1]
        positions = encoder_positions(image_tokens, length - image_tokens, cfg.image_positions)
        bias = _relative_position_biases(cfg)(length, length, True, positions=positions)
        x = _dropout(cfg)(inputs_embeddings, deterministic=deterministic).astype(cfg.dtype)

        def call(layer, x, drop_rate):
            return layer(x, bias, encoder_mask, encoder_visible, drop_rate, deterministic)

        drop_rate = 0.0 if deterministic else cfg.stochastic_depth_rate
        x = stack.apply_layers(EncoderLayer, cfg, cfg.num_encoder_layers, call, x, drop_rate)
        x = _norm(cfg, "encoder_norm")(x)
        # As in T5X, each position has a draw of its own here.
        return nn.Dropout(cfg.dropout_rate)(x, deterministic=deterministic)


class Decoder(nn.Module):
    """The decoder, from tokens to logits.

    Attributes:
      config: sizes.
      shared_embedding: the `layers.Embed` with the tokens' vectors.
    """

    config: T5Config
    shared_embedding: nn.Module

    @nn.compact
    def __call__(
        self,
        encoded: Float[Array, "batch encoded_length embed"],
        decoder_input_tokens: Int[Array, "sequences length"],
        decoder_positions: Int[Array, "sequences length"] | None = None,
        decoder_mask: Shaped[Array, "sequences 1 length length"] | None = None,
        encoder_decoder_mask: Shaped[Array, "batch 1 _ encoded_length"] | None = None,
        deterministic: bool = False,
        decode: bool = False,
        max_decode_length: int | None = None,
    ) -> Float[Array, "sequences length vocab"]:
        """Computes the logits of the next token at each position.

        Args:
          encoded: the encoder's output.
          decoder_input_tokens: the text, one position late; in a step of decoding, the token before.
          decoder_positions: ignored, as in T5X: T5 has no absolute positions.
          decoder_mask: > 0 where a position may see another.
          encoder_decoder_mask: > 0 where a position may see one of `encoded`.
          deterministic: turns dropout off.
          decode: keeps and uses the cache and the keys and values of `encoded`, see
            `MultiHeadDotProductAttention`. `sequences` may then be a multiple of `batch`.
          max_decode_length: the cache's length, needed with `decode`.

        Returns:
          The logits in float32.
        """
        del decoder_positions
        cfg = self.config
        # In a step of decoding the input is one position, but its biases are a row of the whole matrix.
        length = max_decode_length if decode and max_decode_length else decoder_input_tokens.shape[-1]
        bias = _relative_position_biases(cfg)(length, length, False)
        y = self.shared_embedding(decoder_input_tokens.astype("int32"))
        y = _dropout(cfg)(y, deterministic=deterministic).astype(cfg.dtype)

        def call(layer, y, _):
            return layer(y, encoded, bias, decoder_mask, encoder_decoder_mask, deterministic, decode)

        y = stack.apply_layers(DecoderLayer, cfg, cfg.num_decoder_layers, call, y)
        y = _norm(cfg, "decoder_norm")(y)
        y = _dropout(cfg)(y, deterministic=deterministic)

        # [batch, length, embed] -> [batch, length, vocab], in float32 for a stable softmax.
        if cfg.logits_via_embedding:
            # The table has unit variance, a dense kernel 1/embed: bring the logits to the same scale.
            return self.shared_embedding.attend(y) / jnp.sqrt(y.shape[-1])
        return layers.DenseGeneral(
            cfg.vocab_size, dtype=jnp.float32, kernel_axes=("embed", "vocab"), name="logits_dense"
        )(y)
