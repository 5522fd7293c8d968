"""Decoding with a key-value cache: one compiled loop that stops when every sequence has ended."""

from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp

PAD_ID = 0


@flax.struct.dataclass
class DecodingState:
    """What the step function sees, as in T5X.

    Attributes:
      cur_token: int32 [batch, 1], the token decoded last (0 at the beginning).
      cache: the decoder's key-value cache.
    """

    cur_token: jax.Array
    cache: Any


TokensToLogits = Callable[[DecodingState], tuple[jax.Array, Any]]


def greedy_decode(
    inputs: jax.Array, cache: Any, tokens_to_logits: TokensToLogits, eos_id: int = 1
) -> tuple[jax.Array, jax.Array]:
    """Takes the most probable token at each step.

    Args:
      inputs: int32 [batch, length]; only the shape matters: how much to decode.
      cache: the decoder's cache at its beginning.
      tokens_to_logits: state -> (float [batch, vocab] logits, new cache).
      eos_id: the token that ends a sequence.

    Returns:
      int32 [batch, length] tokens, ended by `eos_id` and then padded with 0, and their summed
      log-probabilities, float32 [batch].
    """
    batch, length = inputs.shape

    def unfinished(carry):
        step, _, _, _, ended = carry
        return (step < length) & ~jnp.all(ended)

    def advance(carry):
        step, state, tokens, log_probs, ended = carry
        logits, cache = tokens_to_logits(state)
        chosen = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        log_prob = jnp.max(jax.nn.log_softmax(logits.astype(jnp.float32)), axis=-1)
        token = jnp.where(ended, PAD_ID, chosen)
        tokens = tokens.at[:, step].set(token)
        log_probs += jnp.where(ended, 0.0, log_prob)
        state = DecodingState(cur_token=token[:, None], cache=cache)
        return step + 1, state, tokens, log_probs, ended | (token == eos_id)

    state = DecodingState(cur_token=jnp.zeros((batch, 1), jnp.int32), cache=cache)
    carry = (0, state, jnp.zeros((batch, length), jnp.int32), jnp.zeros(batch), jnp.zeros(batch, bool))
    _, _, tokens, log_probs, _ = jax.lax.while_loop(unfinished, advance, carry)
    return tokens, log_probs
