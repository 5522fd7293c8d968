import jax
import jax.numpy as jnp
import numpy as np

from richhf_jax import decoding

EOS = 1


def follow(table):
    """A decoder whose next token depends on the current one: token t is followed by table[t]."""
    calls = []

    def tokens_to_logits(state):
        jax.debug.callback(lambda: calls.append(1))
        logits = 5.0 * jax.nn.one_hot(jnp.asarray(table)[state.cur_token[:, 0]], 6)
        return logits, {"steps": state.cache["steps"] + 1}

    return tokens_to_logits, calls


def decode(table, batch=1, length=8):
    step, calls = follow(table)
    cache = {"steps": jnp.zeros((), jnp.int32)}
    tokens, log_probs = jax.jit(
        lambda: decoding.greedy_decode(jnp.zeros((batch, length), jnp.int32), cache, step)
    )()
    jax.effects_barrier()
    return np.asarray(tokens), np.asarray(log_probs), len(calls)


def test_follows_the_most_probable_tokens_until_the_end():
    tokens, log_probs, _ = decode([2, 0, 3, 4, EOS, 0])
    np.testing.assert_array_equal(tokens, [[2, 3, 4, EOS, 0, 0, 0, 0]])
    # Four steps, each with probability e^5 / (e^5 + 5); nothing is counted after the end.
    np.testing.assert_allclose(log_probs, 4 * (5 - np.log(np.exp(5) + 5)), rtol=1e-5)


def test_stops_as_soon_as_every_sequence_has_ended():
    _, _, calls = decode([2, 0, EOS, 0, 0, 0], batch=3)
    assert calls == 2


def test_a_sequence_that_never_ends_is_cut():
    tokens, _, calls = decode([2, 0, 2, 0, 0, 0])
    np.testing.assert_array_equal(tokens, [[2] * 8])
    assert calls == 8
