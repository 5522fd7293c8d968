"""Muse as a whole: text encoder, transformer and tokenizer, and the program that makes images of prompts."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Float, Float32, Int, Int32, Key, Real, UInt8

from richhf_jax.muse import decoding, transformer, vqgan
from richhf_jax.network import clip, description, layers
from richhf_jax.shapes import Array


class Muse(nn.Module):
    """A generator of images from text.

    Attributes:
      text_config: the text encoder, CLIP's tower.
      transformer_config: the transformer.
      vqgan_config: the tokenizer.
      projection_dim: width of the vector of a whole text.
    """

    text_config: clip.TextConfig
    transformer_config: transformer.TransformerConfig
    vqgan_config: vqgan.VQGANConfig
    projection_dim: int = 768

    def setup(self):
        codes, tokens = self.vqgan_config.num_codes, self.transformer_config
        if codes != tokens.codebook_size or codes >= tokens.vocab_size:
            raise ValueError(
                f"the tokenizer has {codes} codes: the transformer's codebook_size must be the same, got"
                f" {tokens.codebook_size}, and its vocab_size more, for the mask, got {tokens.vocab_size}"
            )
        self.text = clip.TextTower(self.text_config)
        self.text_projection = layers.DenseGeneral(self.projection_dim, kernel_axes=("embed", None))
        self.transformer = transformer.Transformer(self.transformer_config)
        self.vqgan = vqgan.VQGAN(self.vqgan_config)

    def with_attention_kernel(self, kernel: str) -> "Muse":
        """Returns the same network with another `attention_kernel`."""
        configs = {"text_config": self.text_config, "transformer_config": self.transformer_config}
        return self.clone(**{name: one.replace(attention_kernel=kernel) for name, one in configs.items()})

    def describe(self) -> dict[str, Any]:
        """Names every setting of the network; JSON-able. `model_description` reads it."""
        configs = ("text_config", "transformer_config", "vqgan_config")
        return {
            "projection_dim": self.projection_dim,
            **{name: description.settings(getattr(self, name)) for name in configs},
        }

    def encode_text(
        self, text_tokens: Int[Array, "batch length"]
    ) -> tuple[Float[Array, "batch length embed"], Float32[Array, "batch projection"]]:
        """Encodes texts to what the transformer reads: a vector a token, and one for the whole."""
        pooled, states = self.text(text_tokens)
        return states, self.text_projection(pooled)

    def tokenize(self, image: Real[Array, "batch height width 3"]) -> Int32[Array, "batch rows columns"]:
        """Computes the tokens of pixels from 0 to 255."""
        return self.vqgan.tokenize(image)

    def decode_tokens(
        self, tokens: Int[Array, "batch rows columns"]
    ) -> Float32[Array, "batch height width 3"]:
        """Computes pixels from about 0 to about 255, of tokens none of which is masked."""
        return self.vqgan.decode_tokens(tokens)

    def logits(
        self,
        tokens: Int[Array, "batch rows columns"],
        text_states: Float[Array, "batch length embed"],
        pooled_text: Float[Array, "batch projection"],
        micro_conditions: Float[Array, "batch conditions"],
        enable_dropout: bool = False,
    ) -> Float32[Array, "batch rows columns codes"]:
        """Predicts every token, see `transformer.Transformer`."""
        return self.transformer(
            tokens, text_states, pooled_text, micro_conditions, deterministic=not enable_dropout
        )

    def __call__(
        self,
        image: Real[Array, "batch height width 3"],
        text_tokens: Int[Array, "batch length"],
        micro_conditions: Float[Array, "batch conditions"],
    ) -> dict[str, Array]:
        """Runs every part once, for `init`; the parts have methods of their own.

        Returns:
          The tokenizer's outputs, see `vqgan.VQGAN`, and "logits" of its tokens, none of which is masked.
        """
        outputs = self.vqgan(image)
        text = self.encode_text(text_tokens)
        return outputs | {"logits": self.logits(outputs["tokens"], *text, micro_conditions)}


def micro_conditions(
    batch: int,
    height: int,
    width: int,
    aesthetic_score: float = 6.0,
    crop: tuple[int, int] = (0, 0),
) -> Float32[Array, "{batch} 5"]:
    """Makes aMUSEd's micro-conditions, the same for all images.

    Args:
      batch: number of images.
      height, width: of the picture, in pixels.
      aesthetic_score: as wanted, from 0 to 10.
      crop: row and column of the corner from which the picture is cut out.
    """
    return jnp.tile(jnp.array([[width, height, *crop, aesthetic_score]], jnp.float32), (batch, 1))


def generate(
    network: Muse,
    params: Any,
    text_tokens: Int[Array, "batch length"],
    negative_tokens: Int[Array, "batch length"],
    micro_conditions: Float[Array, "batch conditions"],
    rngs: Key[Array, " batch"],
    config: decoding.DecodingConfig,
    tokens: Int[Array, "batch rows columns"] | None = None,
) -> Int32[Array, "batch rows columns"]:
    """Generates the tokens of images; `decode_tokens` makes pixels of them.

    Args:
      network: the generator.
      params: its parameters.
      text_tokens: prompts.
      negative_tokens: prompts of what the images are to be moved away from: the empty text, or a negative
        prompt. Without guidance they are not read.
      micro_conditions: see `transformer.Transformer`.
      rngs: a key for each image. The same key and prompt make the same image in any batch.
      config: the settings of decoding.
      tokens: inpainting: a picture's tokens, with `transformer_config.mask_id` where they are to be
        generated; None: all are.
    """

    def apply(*args, method) -> Any:
        return network.apply({"params": params}, *args, method=method)

    mask_id, grid = network.transformer_config.mask_id, tuple(network.transformer_config.grid)
    if tokens is None:
        tokens = jnp.full((text_tokens.shape[0], *grid), mask_id, jnp.int32)
    texts = text_tokens
    if config.guided:
        # An image's two copies follow each other, so that they lie on one device.
        texts = jnp.stack([negative_tokens, text_tokens], axis=1).reshape(-1, text_tokens.shape[1])
        micro_conditions = jnp.repeat(micro_conditions, 2, axis=0)
    text = apply(texts, method="encode_text")

    def logits_fn(tokens):
        return apply(tokens, *text, micro_conditions, method="logits")

    rows, columns = tokens.shape[1:]
    noise_fn = decoding.gumbel_noise(rngs, (rows, columns, network.transformer_config.codebook_size))
    return decoding.decode(logits_fn, tokens, mask_id, noise_fn, config)


def to_uint8(pixels: Float[Array, "batch height width 3"]) -> UInt8[Array, "batch height width 3"]:
    """Rounds pixels to bytes, and cuts off what is beyond black and white."""
    return jnp.round(jnp.clip(pixels, 0, 255)).astype(jnp.uint8)
