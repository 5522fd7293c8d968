"""Decoding with a key-value cache: one compiled loop that stops when every sequence has ended.

Names, arguments and the order of the results are those of T5X's `decoding.py`, without the parts that RAHF
doesn't use (forced prefixes, filled caches, callbacks). Greedy decoding and beam search return the same as
`generate` of Hugging Face's transformers; `constrained_decode` is our own.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Bool, Float32, Int, Int32, PRNGKeyArray, Real, ScalarLike

from richhf_jax.shapes import Array

PAD_ID = 0
# Below every score, yet finite, so that its sums and ratios are not NaN.
NEG_INF = -1.0e7


@struct.dataclass
class DecodingState:
    """The input of the step function, as in T5X.

    Attributes:
      cur_token: the token decoded last (0 at the beginning); `sequences` is batch * num_decodes.
      cache: the decoder's key-value cache.
    """

    cur_token: Int32[Array, "sequences 1"]
    cache: Any


TokensToLogits = Callable[[DecodingState], tuple[Array, Any]]


def temperature_sample(
    inputs: Int[Array, "batch length"],
    cache: Any,
    tokens_to_logits: TokensToLogits,
    eos_id: int = 1,
    decode_rng: PRNGKeyArray | None = None,
    num_decodes: int = 1,
    temperature: float = 1.0,
    topk: int = 1,
    topp: float = 0.0,
    cache_offset: int = 0,
) -> tuple[Int32[Array, "batch {num_decodes} length"], Float32[Array, "batch {num_decodes}"]]:
    """Draws each token from the model's distribution; the default `topk` takes the most probable one.

    Args:
      inputs: any tokens; only the shape counts: how much to decode.
      cache: the decoder's empty cache, for `batch` examples.
      tokens_to_logits: state -> (float [batch * num_decodes, vocab] logits, new cache).
      eos_id: the token that ends a sequence.
      decode_rng: key of the draws; None: the key of seed 0.
      num_decodes: sequences drawn for each input.
      temperature: divides the logits. 0 takes the most probable token.
      topk: draws only from this many of the most probable tokens; 0: from all.
      topp: draws only from the fewest most probable tokens that together have this probability; 0: from all.
      cache_offset: number of axes before the cache's batch axis (1 where layers are scanned).

    Returns:
      The tokens of each sequence, ended by `eos_id` and padded with 0, and the sequences' log-probabilities
      by the model itself, before `temperature`, `topk` and `topp`. The most probable sequence is the last.

    Raises:
      ValueError: both `topk` and `topp` are given, or an argument is out of its range.
    """
    if topk and topp:
        raise ValueError(f"give topk or topp, not both: topk={topk}, topp={topp}")
    if topk < 0 or not 0 <= topp <= 1 or temperature < 0:
        raise ValueError(f"out of range: topk={topk}, topp={topp}, temperature={temperature}")
    batch, length = inputs.shape
    rows = batch * num_decodes
    rng = jax.random.PRNGKey(0) if decode_rng is None else decode_rng

    def choose(logits, step):
        if topk == 1 or temperature == 0:
            return jnp.argmax(logits, axis=-1)
        logits = _nucleus(_most_probable(logits / temperature, topk), topp)
        return jax.random.categorical(jax.random.fold_in(rng, step), logits)

    def unfinished(carry):
        step, _, _, _, ended = carry
        return (step < length) & ~jnp.all(ended)

    def advance(carry):
        step, state, tokens, log_probs, ended = carry
        logits, cache = tokens_to_logits(state)
        logits = logits.astype(jnp.float32)
        token = jnp.where(ended, PAD_ID, choose(logits, step).astype(jnp.int32))
        all_log_probs = jax.nn.log_softmax(logits)
        log_prob = jnp.take_along_axis(all_log_probs, token[:, None], axis=-1)[:, 0]
        log_probs += jnp.where(ended, 0.0, log_prob)
        tokens = tokens.at[:, step].set(token)
        state = DecodingState(cur_token=token[:, None], cache=cache)
        return step + 1, state, tokens, log_probs, ended | (token == eos_id)

    state = DecodingState(
        cur_token=jnp.zeros((rows, 1), jnp.int32), cache=cache_expand(cache, num_decodes, cache_offset)
    )
    carry = (0, state, jnp.zeros((rows, length), jnp.int32), jnp.zeros(rows), jnp.zeros(rows, bool))
    _, _, tokens, log_probs, _ = jax.lax.while_loop(unfinished, advance, carry)
    log_probs = log_probs.reshape(batch, num_decodes)
    order = jnp.argsort(log_probs, axis=-1)
    tokens = jnp.take_along_axis(tokens.reshape(batch, num_decodes, length), order[..., None], axis=1)
    return tokens, jnp.take_along_axis(log_probs, order, axis=-1)


def _most_probable(logits: Array, topk: int) -> Array:
    """Keeps the `topk` highest logits of each row and sets the others to `NEG_INF`; 0 keeps all."""
    if not topk:
        return logits
    lowest = jax.lax.top_k(logits, topk)[0][:, -1:]
    return jnp.where(logits < lowest, NEG_INF, logits)


def _nucleus(logits: Array, topp: float) -> Array:
    """Keeps the fewest highest logits of probability `topp` and sets the others to `NEG_INF`; 0 keeps all."""
    if not topp:
        return logits
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(ordered)
    # A token stays if those before it have less than `topp`. So the first always stays.
    stays = jnp.cumsum(probabilities, axis=-1) - probabilities < topp
    lowest = jnp.min(jnp.where(stays, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < lowest, NEG_INF, logits)


def brevity_penalty(alpha: ScalarLike, length: Real[Array, "*shape"] | int) -> Float32[Array, "*shape"]:
    """Divisor of a sequence's log-probability: ((5 + length) / 6) ** alpha, as in T5X.

    Wu et al., "Google's Neural Machine Translation System", https://arxiv.org/abs/1609.08144, equation 14.
    """
    return jnp.power((5.0 + length) / 6.0, alpha)


def length_penalty(alpha: ScalarLike, length: Real[Array, "*shape"] | int) -> Float32[Array, "*shape"]:
    """Divisor of a sequence's log-probability in transformers: length ** alpha (its `length_penalty`)."""
    return jnp.power(1.0 * length, alpha)


@struct.dataclass
class _Beams:
    """Sequences of one kind, live or finished.

    Attributes:
      tokens: tokens of each sequence.
      scores: log-probabilities (live), or these divided by the brevity penalty (finished), in descending
        order; `NEG_INF` where there is no sequence yet.
    """

    tokens: Int32[Array, "batch beams length"]
    scores: Float32[Array, "batch beams"]

    def best(self, count: int) -> tuple["_Beams", Array]:
        """Returns the `count` beams with the highest scores, and their indices [batch, count]."""
        scores, beams = jax.lax.top_k(self.scores, count)
        return _Beams(jnp.take_along_axis(self.tokens, beams[..., None], axis=1), scores), beams


def beam_search(
    inputs: Int[Array, "batch length"],
    cache: Any,
    tokens_to_logits: TokensToLogits,
    eos_id: int = 1,
    decode_rng: PRNGKeyArray | None = None,
    num_decodes: int = 4,
    alpha: ScalarLike = 0.6,
    penalty_fn: Callable[[ScalarLike, Array | int], Array] = brevity_penalty,
    cache_offset: int = 0,
) -> tuple[Int32[Array, "batch {num_decodes} length"], Float32[Array, "batch {num_decodes}"]]:
    """Keeps the `num_decodes` most probable beginnings of a sequence at every step.

    A sequence that ends, or is cut, competes with the finished ones. Its score is its log-probability divided
    by the penalty for its length (EOS counts). The search stops when no live sequence can beat the worst
    finished one. This equals transformers' search with `early_stopping="never"`. T5X's differs in two points:
    it also lets sequences end that are not among the `num_decodes` best, and it returns sequences that were
    cut only where none ended.

    Args:
      inputs, cache, tokens_to_logits, eos_id, cache_offset: as for `temperature_sample`.
      decode_rng: ignored, since a beam search draws nothing.
      num_decodes: number of beams.
      alpha: exponent of the penalty, at least 0; 0 ranks by log-probability alone, which favours short
        sequences.
      penalty_fn: (alpha, length) -> divisor of a log-probability: `brevity_penalty` or `length_penalty`. It
        must not fall with the length.

    Returns:
      Tokens and scores of the sequences, the best last.
    """
    del decode_rng
    batch, length = inputs.shape
    beams = num_decodes

    def unfinished(carry):
        step, live, finished, _ = carry
        reachable = live.scores[:, 0] / penalty_fn(alpha, length)
        return (step < length) & ~jnp.all(finished.scores[:, -1] > reachable)

    def advance(carry):
        step, live, finished, state = carry
        logits, cache = tokens_to_logits(state)
        vocab = logits.shape[-1]
        log_probs = jax.nn.log_softmax(logits.astype(jnp.float32)).reshape(batch, beams, vocab)
        sums = (live.scores[..., None] + log_probs).reshape(batch, beams * vocab)
        # At most half of these candidates have ended, so enough live ones remain.
        scores, indices = jax.lax.top_k(sums, 2 * beams)
        parents, token = indices // vocab, (indices % vocab).astype(jnp.int32)
        tokens = jnp.take_along_axis(live.tokens, parents[..., None], axis=1).at[..., step].set(token)
        ended = token == eos_id

        live, chosen = _Beams(tokens, jnp.where(ended, NEG_INF, scores)).best(beams)
        over = ended | (step + 1 == length)
        final_scores = jnp.where(over, scores / penalty_fn(alpha, step + 1), NEG_INF)
        finished, _ = _Beams(
            jnp.concatenate([finished.tokens, tokens[:, :beams]], axis=1),
            jnp.concatenate([finished.scores, final_scores[:, :beams]], axis=1),
        ).best(beams)
        cache = _gather_beams(cache, jnp.take_along_axis(parents, chosen, axis=1), cache_offset)
        cur_token = jnp.take_along_axis(token, chosen, axis=1).reshape(batch * beams, 1)
        return step + 1, live, finished, DecodingState(cur_token=cur_token, cache=cache)

    no_tokens = jnp.zeros((batch, beams, length), jnp.int32)
    # Each search starts from one empty sequence; the other beams fill up with its continuations.
    live = _Beams(no_tokens, jnp.full((batch, beams), NEG_INF).at[:, 0].set(0.0))
    finished = _Beams(no_tokens, jnp.full((batch, beams), NEG_INF))
    state = DecodingState(
        cur_token=jnp.zeros((batch * beams, 1), jnp.int32), cache=cache_expand(cache, beams, cache_offset)
    )
    _, _, finished, _ = jax.lax.while_loop(unfinished, advance, (0, live, finished, state))
    return finished.tokens[:, ::-1], finished.scores[:, ::-1]


def constrained_decode(
    inputs: Int[Array, "batch length"],
    cache: Any,
    tokens_to_logits: TokensToLogits,
    text: Int[Array, "batch 2 positions"],
    threshold: float = 0.5,
) -> tuple[
    Int32[Array, "batch length"],
    Float32[Array, " batch"],
    Float32[Array, "batch positions"],
    Bool[Array, "batch positions"],
]:
    """Copies a given text and decides only which of its optional stretches to write.

    Example: in the text "a_0 cat_0" each "_0" is optional, and it is decided to leave out the first:

        positions  0   1    2   3    4  5
        pieces     a  _0  cat  _0  EOS  0
        skip_to    0   2    0   4    0  0
        written    a      cat  _0  EOS

    Before an optional stretch, the model's logits of its first token and of the token after it are compared.
    Their difference is the log-odds of writing the stretch, given all that was written before, and given that
    one of the two tokens follows. No decision is taken back.

    Args:
      inputs, cache, tokens_to_logits: as for `temperature_sample`.
      text: [:, 0] holds the pieces: the text with all its optional stretches, EOS, and padding, which ends
        the text as well. [:, 1] is `skip_to`: at the first position of an optional stretch, the position
        after it; 0 elsewhere. No other stretch may begin at that position. Positions beyond `length` plus the
        optional ones are never reached.
      threshold: an optional stretch is written where its probability, the sigmoid of its log-odds, exceeds
        this.

    Returns:
      The tokens written, padded with 0; their log-probability by the model, as for `temperature_sample`; for
      each position of the text the log-odds; and whether its stretch is written. The last two are NaN and
      False where there was nothing to decide, or where `length` ended before.

    Raises:
      ValueError: `threshold` is not between 0 and 1.
    """
    if not 0 < threshold < 1:
        raise ValueError(f"out of range: threshold={threshold}")
    limit = math.log(threshold / (1 - threshold))
    batch, length = inputs.shape
    # One more position, so that every text ends in padding.
    pieces, skip_to = jnp.moveaxis(jnp.pad(text, ((0, 0), (0, 0), (0, 1))), 1, 0)
    positions = jnp.arange(text.shape[-1])[None]

    def unfinished(carry):
        step, _, position, _, _, _ = carry
        return (step < length) & jnp.any(_at(pieces, position) != PAD_ID)

    def advance(carry):
        step, state, position, tokens, log_probs, log_odds = carry
        logits, cache = tokens_to_logits(state)
        logits = logits.astype(jnp.float32)
        behind = _at(skip_to, position)
        odds = _at(logits, _at(pieces, position)) - _at(logits, _at(pieces, behind))
        here = (positions == position[:, None]) & (behind > 0)[:, None]
        log_odds = jnp.where(here, odds[:, None], log_odds)
        position = jnp.where((behind > 0) & ~(odds > limit), behind, position)
        token = _at(pieces, position)
        tokens = tokens.at[:, step].set(token)
        log_probs += jnp.where(token == PAD_ID, 0.0, _at(jax.nn.log_softmax(logits), token))
        state = DecodingState(cur_token=token[:, None], cache=cache)
        # Padding ends the text: a sequence that has reached it stays there.
        position += token != PAD_ID
        return step + 1, state, position, tokens, log_probs, log_odds

    state = DecodingState(cur_token=jnp.zeros((batch, 1), jnp.int32), cache=cache)
    tokens = jnp.zeros((batch, length), jnp.int32)
    log_odds = jnp.full((batch, text.shape[-1]), jnp.nan)
    carry = (0, state, jnp.zeros(batch, jnp.int32), tokens, jnp.zeros(batch), log_odds)
    _, _, _, tokens, log_probs, log_odds = jax.lax.while_loop(unfinished, advance, carry)
    return tokens, log_probs, log_odds, log_odds > limit


def optional_suffixes(
    pieces: Int[Array, "batch length"],
    words: Int[Array, "batch length"],
    suffix: Int[Array, "batch suffix_pieces"],
    eos_id: int = 1,
) -> tuple[Int32[Array, "batch 2 length*(1+suffix_pieces)"], Int32[Array, "batch length"]]:
    """Makes the text for `constrained_decode` in which each word may have a suffix.

    Example: the words "a yellow" with two pieces for "yellow", and a suffix "_0" of one piece:

        pieces  a  yel  low  0       text        a  _0  yel  low  _0  EOS  0  0
        words   1    2    2  0                   0   2    0    0   5    0  0  0
                                     decided_at  1            4

    Args:
      pieces: the words' pieces; 0 = padding. If the last word is cut off, its suffix comes after `length`
        pieces, so that a decoder of this length doesn't reach it.
      words: for each piece the number (from 1) of its word; 0 = padding.
      suffix: the suffix's pieces, the same in every row.
      eos_id: token that ends the text.

    Returns:
      The text, see `constrained_decode`, and each word's position of the suffix, -1 after the last word.
    """
    batch, length = pieces.shape
    size = suffix.shape[1]
    positions = length * (1 + size)
    rows = jnp.arange(batch)[:, None]
    nowhere = positions  # Dropped by `put`.

    def put(array, where, values):
        return array.at[rows, where].set(values, mode="drop")

    before = jnp.arange(length)[None] + size * (words - 1)  # A piece's position, with the suffixes before it.
    is_last = (words > 0) & (words != jnp.pad(words[:, 1:], ((0, 0), (0, 1))))
    start = jnp.where(is_last, before + 1, nowhere)
    text = put(jnp.zeros((batch, positions), jnp.int32), jnp.where(words > 0, before, nowhere), pieces)
    for i in range(size):
        text = put(text, jnp.where(is_last, start + i, nowhere), suffix[:, i : i + 1])
    end = jnp.sum(words > 0, axis=1) + size * jnp.max(words, axis=1)
    text = put(text, end[:, None], eos_id)
    skip_to = put(jnp.zeros_like(text), start, start + size)
    no_word = jnp.full((batch, length), -1, jnp.int32)
    decided_at = put(no_word, jnp.where(is_last, words - 1, nowhere), start)
    return jnp.stack([text, skip_to], axis=1), decided_at


def _at(table: Array, columns: Array) -> Array:
    """Takes one element of each row: [batch, n], int [batch] -> [batch]."""
    return jnp.take_along_axis(table, columns[:, None], axis=-1)[:, 0]


def cache_expand(cache: Any, num_decodes: int, cache_offset: int = 0) -> Any:
    """Repeats each example `num_decodes` times: [batch, ...] -> [batch * num_decodes, ...]."""
    return _map_cache(lambda leaf: jnp.repeat(leaf, num_decodes, axis=cache_offset), cache, cache_offset)


def _gather_beams(cache: Any, parents: Array, cache_offset: int) -> Any:
    """Gives each new beam its parent's cache; `parents` is int32 [batch, beams]."""
    batch, beams = parents.shape
    rows = (jnp.arange(batch)[:, None] * beams + parents).reshape(-1)
    return _map_cache(lambda leaf: jnp.take(leaf, rows, axis=cache_offset), cache, cache_offset)


def _map_cache(fn: Callable[[Array], Array], cache: Any, cache_offset: int) -> Any:
    """Applies `fn` to every array that has a batch axis; a cache's index has none."""
    return jax.tree.map(lambda leaf: fn(leaf) if leaf.ndim > cache_offset else leaf, cache)
