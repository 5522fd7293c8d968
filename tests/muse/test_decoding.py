"""Parallel decoding against diffusers' `AmusedScheduler` with the same noise, and its other promises."""

import functools
import itertools

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_amused

from richhf_jax.muse import decoding

BATCH, GRID, CODES, MASK = 3, (4, 5), 12, 15


@pytest.fixture
def noise(rng):
    """The draws' and the confidences' Gumbel noise, of each step."""
    return (
        rng.gumbel(size=(16, BATCH, *GRID, CODES)).astype(np.float32),
        rng.gumbel(size=(16, BATCH, *GRID)).astype(np.float32),
    )


@pytest.fixture
def logits(rng):
    """Numbers for each place, and for each pair of a token and a code."""
    return (
        3 * rng.normal(size=(*GRID, CODES)).astype(np.float32),
        rng.normal(size=(16, CODES)).astype(np.float32),
    )


def logits_of(tokens, numbers, module):
    places, pairs = numbers
    return places[None] + pairs[tokens] + pairs[module.roll(tokens, 1, 2)]


def theirs(tokens, numbers, noise, config, monkeypatch):
    """Decodes by diffusers' scheduler."""
    draws, confidences = (iter(torch.tensor(one)) for one in noise)

    def multinomial(probs, count, generator=None):
        assert count == 1
        chosen = torch.argmax(torch.log(probs) + next(draws).reshape(probs.shape), dim=-1)
        return chosen[:, None]

    def gumbel_noise(probs, generator=None):
        return next(confidences).reshape(probs.shape)

    monkeypatch.setattr(torch, "multinomial", multinomial)
    monkeypatch.setattr(scheduling_amused, "gumbel_noise", gumbel_noise)
    scheduler = diffusers.AmusedScheduler(MASK, config.schedule)
    scheduler.set_timesteps(config.num_steps, config.temperature)
    numbers, sample = tuple(map(torch.tensor, numbers)), torch.tensor(tokens)
    ratio = (sample == MASK).float().mean()
    for timestep in scheduler.timesteps:
        output = logits_of(sample, numbers, torch).permute(0, 3, 1, 2)
        sample = scheduler.step(output, timestep, sample, starting_mask_ratio=ratio).prev_sample
    return sample


def ours(tokens, numbers, noise, config):
    numbers, noise = jax.tree.map(jnp.asarray, (numbers, noise))

    def decode(tokens):
        return decoding.decode(
            lambda tokens: logits_of(tokens, numbers, jnp),
            tokens,
            MASK,
            lambda step: (noise[0][step], noise[1][step]),
            config,
        )

    return jax.jit(decode)(tokens)


UNGUIDED = decoding.DecodingConfig(guidance_scale=(1.0, 1.0))


@pytest.mark.parametrize(
    ("steps", "schedule", "temperature", "given"),
    [
        (12, "cosine", (2.0, 0.0), 0),
        (1, "cosine", (2.0, 0.0), 0),
        (5, "linear", (1.0, 0.01), 0),
        (6, "linear", (2.0, 0.0), 7),
        (16, "cosine", (4.0, 4.0), 17),
    ],
)
def test_tokens_are_those_of_diffusers(steps, schedule, temperature, given, logits, noise, rng, monkeypatch):
    tokens = np.full((BATCH, 20), MASK)
    for row in tokens:  # As many of each image, at other places.
        row[rng.permutation(20)[:given]] = rng.integers(0, CODES, given)
    tokens = tokens.reshape(BATCH, *GRID)
    config = UNGUIDED.replace(num_steps=steps, schedule=schedule, temperature=temperature)
    found = ours(tokens, logits, noise, config)
    np.testing.assert_array_equal(found, theirs(tokens, logits, noise, config, monkeypatch))
    assert found.max() < CODES
    assert len(np.unique(found)) > 4
    np.testing.assert_array_equal(found[tokens != MASK], tokens[tokens != MASK])
    if steps > 1:  # The noise of the first step alone would give others.
        assert (found != ours(tokens, logits, noise, config.replace(num_steps=1))).any()


def test_the_share_of_masked_tokens_is_that_of_diffusers_to_the_last_bit():
    for count, schedule in itertools.product(range(1, 65), decoding.SCHEDULES):
        ratios = decoding.plan(UNGUIDED.replace(num_steps=count, schedule=schedule)).mask_ratio
        # As in its step, whose results are floored.
        progress = (torch.arange(count) + 1) / count
        expected = 1 - progress if schedule == "linear" else torch.cos(progress * torch.pi / 2)
        for length in (64, 256, 1024):
            np.testing.assert_array_equal(np.floor(length * ratios), torch.floor(length * expected))


def test_guidance_moves_away_from_the_negative_prompt_by_its_own_schedule():
    config = decoding.DecodingConfig(num_steps=3, guidance_scale=(0.0, 4.0))
    assert config.guided
    assert not UNGUIDED.guided
    np.testing.assert_array_equal(decoding.plan(config).guidance_scale, [0, 2, 4])
    calls = []

    def logits_fn(tokens):
        calls.append(tokens.shape)
        return jnp.zeros((*tokens.shape, CODES))

    noise_fn = decoding.gumbel_noise(jax.random.split(jax.random.key(0), BATCH), (*GRID, CODES))
    for one in (config, UNGUIDED):
        decode = functools.partial(decoding.decode, logits_fn, mask_id=MASK, noise_fn=noise_fn, config=one)
        jax.eval_shape(decode, jnp.zeros((BATCH, *GRID), jnp.int32))
    assert calls == [(2 * BATCH, *GRID), (BATCH, *GRID)]
    pairs = jnp.array([1.0, 2.0, 10.0, 5.0]).reshape(4, 1, 1, 1)
    np.testing.assert_array_equal(decoding.guide(pairs, 3.0).ravel(), [1 + 3 * 1, 10 - 3 * 5])


def test_part_of_the_steps_are_the_last_ones():
    config = UNGUIDED.replace(num_steps=12, strength=0.3)
    whole, part = decoding.plan(config.replace(strength=1.0)), decoding.plan(config)
    np.testing.assert_array_equal(part.index, [9, 10, 11])
    for one, other in zip(part, whole, strict=True):
        np.testing.assert_array_equal(one, other[9:])


def test_an_image_does_not_depend_on_its_batch(logits):
    rngs = jax.random.split(jax.random.key(0), BATCH)
    numbers = jax.tree.map(jnp.asarray, logits)

    @jax.jit
    def decode(rngs):
        noise_fn = decoding.gumbel_noise(rngs, (*GRID, CODES))
        tokens = jnp.full((len(rngs), *GRID), MASK)
        return decoding.decode(lambda t: logits_of(t, numbers, jnp), tokens, MASK, noise_fn, UNGUIDED)

    together = decode(rngs)
    np.testing.assert_array_equal(decode(rngs[1:2])[0], together[1])
    np.testing.assert_array_equal(decode(rngs[::-1]), together[::-1])
    assert (together[0] != together[1]).any()


def test_each_step_and_each_image_has_its_own_noise():
    noise_fn = jax.jit(decoding.gumbel_noise(jax.random.split(jax.random.key(0), BATCH), (*GRID, CODES)))
    draws, confidences = map(np.stack, zip(noise_fn(0), noise_fn(1), strict=True))
    assert draws.shape == (2, BATCH, *GRID, CODES)
    assert confidences.shape == (2, BATCH, *GRID)
    for noise in (draws, confidences):
        assert len(np.unique(noise)) > 0.99 * noise.size
    assert not np.isin(confidences, draws).all()


def test_draws_have_the_distribution_of_the_logits():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.2]))
    rngs = jax.random.split(jax.random.key(0), 1000)
    noise_fn = decoding.gumbel_noise(rngs, (2, 2, 3))
    tokens = decoding.decode(
        lambda tokens: jnp.broadcast_to(logits, (*tokens.shape, 3)),
        jnp.full((1000, 2, 2), 3),
        3,
        noise_fn,
        # No confidence is chosen: else the probable ones would be kept first, and drawn more often.
        UNGUIDED.replace(num_steps=1),
    )
    shares = np.bincount(np.ravel(tokens), minlength=3) / tokens.size
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.2], atol=0.03)


def test_images_without_masked_tokens_stay(logits, noise, rng):
    tokens = rng.integers(0, CODES, (BATCH, *GRID))
    tokens[0, 1, 2] = MASK
    found = ours(tokens, logits, noise, UNGUIDED)
    assert found[0, 1, 2] < CODES
    tokens[0, 1, 2] = found[0, 1, 2]
    np.testing.assert_array_equal(found, tokens)


@pytest.mark.parametrize(
    "changes", [{"num_steps": 0}, {"strength": 0.0}, {"strength": 1.5}, {"temperature": (1.0, -1.0)}]
)
def test_settings_out_of_range_are_named(changes):
    with pytest.raises(ValueError, match=f"out of range: .*{next(iter(changes))}"):
        decoding.plan(UNGUIDED.replace(**changes))


def test_unknown_schedules_are_named():
    with pytest.raises(ValueError, match="the schedule must be one of"):
        decoding.plan(UNGUIDED.replace(schedule="square"))
