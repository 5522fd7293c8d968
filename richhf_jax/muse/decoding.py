"""Parallel decoding: from masked tokens to an image's tokens in a few steps (https://arxiv.org/abs/2202.04200).

Each step draws every masked token from the transformer's distribution, keeps the most confident draws, and
masks the others again. The mask ratio, the share of tokens that stay masked, falls from 1 to 0 over the
steps. So few tokens are decided at first, when little is known.

The rules and the order of operations are those of diffusers' `AmusedScheduler`; with the same noise, the
tokens are the same. Two things differ: the ratio of an inpainted image counts its own masked tokens, not
those of the batch, and a token that was given is never masked.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Bool, Float32, Int, Int32, Key, Real, ScalarLike

from richhf_jax.shapes import Array

COSINE, LINEAR = SCHEDULES = ("cosine", "linear")
# The least probability that confidence distinguishes.
_LEAST = 1e-20

# (step) -> noise, see `gumbel_noise`.
NoiseFn = Callable[[Int32[Array, ""]], tuple[Array, Array]]


@struct.dataclass
class DecodingConfig:
    """The settings of decoding. The defaults are those of aMUSEd's pipeline.

    Attributes:
      num_steps: number of steps, and so of the transformer's calls.
      schedule: of the mask ratio: "cosine", or "linear" as aMUSEd inpaints.
      temperature: factor of the noise that is added to confidences, at the first step and at the last;
        linear between. 0 keeps the most probable draws; more makes images more varied.
      guidance_scale: strength of classifier-free guidance at the first step and at the last; linear between,
        as in Muse. 1 is none, and costs half.
      strength: share of the steps that are made, when a picture's tokens are inpainted.
    """

    num_steps: int = 12
    schedule: str = COSINE
    temperature: tuple[float, float] = (2.0, 0.0)
    guidance_scale: tuple[float, float] = (10.0, 10.0)
    strength: float = 1.0

    @property
    def guided(self) -> bool:
        """Whether a step needs the logits of the negative prompt, too."""
        return tuple(self.guidance_scale) != (1.0, 1.0)


class Step(NamedTuple):
    """The settings of one step, or of all in turn.

    Attributes:
      index: number of the step.
      mask_ratio: share of the tokens masked at the start that stay masked after it.
      temperature, guidance_scale: as in `DecodingConfig`.
    """

    index: Array
    mask_ratio: Array
    temperature: Array
    guidance_scale: Array


def mask_ratio(progress: Real[Array, "*shape"], schedule: str = COSINE) -> Real[Array, "*shape"]:
    """Computes the share of tokens that are masked; training draws `progress` uniformly from 0 to 1.

    Args:
      progress: share of the decoding that is done.
      schedule: one of `SCHEDULES`.

    Raises:
      ValueError: there is no such schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"the schedule must be one of {SCHEDULES}, got {schedule!r}")
    if schedule == LINEAR:
        return 1 - progress
    # NumPy's numbers stay NumPy's: the same on every device, and, where floored, the same as torch's.
    cos = np.cos if isinstance(progress, np.ndarray) else jnp.cos
    return cos(progress * progress.dtype.type(np.pi) / 2)


def plan(config: DecodingConfig) -> Step:
    """Returns the settings of all steps: float32 [steps].

    Raises:
      ValueError: a setting is out of its range.
    """
    count = config.num_steps
    if count < 1 or not 0 < config.strength <= 1 or min(config.temperature) < 0:
        raise ValueError(
            "out of range: decoding takes at least 1 step, a strength above 0 and up to 1, and a temperature"
            f" of at least 0; got {config}"
        )
    progress = np.arange(1, count + 1, dtype=np.float32) / np.float32(count)
    settings = Step(
        np.arange(count),
        mask_ratio(progress, config.schedule),
        *(
            np.linspace(*ends, count, dtype=np.float32)
            for ends in (config.temperature, config.guidance_scale)
        ),
    )
    first = count - max(int(count * config.strength), 1)
    return Step(*(values[first:] for values in settings))


def gumbel_noise(rngs: Key[Array, " batch"], shape: tuple[int, int, int]) -> NoiseFn:
    """Makes the noise of decoding, an image's from its key alone: in another batch it is the same.

    Args:
      rngs: a key for each image.
      shape: rows, columns and codes.

    Returns:
      A function: step -> Gumbel noise of the draws [batch, rows, columns, codes] and of the confidences
      [batch, rows, columns].
    """

    def noise(step):
        def of_image(rng):
            draws, confidences = jax.random.split(jax.random.fold_in(rng, step))
            return jax.random.gumbel(draws, shape), jax.random.gumbel(confidences, shape[:2])

        return jax.vmap(of_image)(rngs)

    return noise


def decode(
    logits_fn: Callable[[Int32[Array, "rows_of_batch rows columns"]], Array],
    tokens: Int[Array, "batch rows columns"],
    mask_id: int,
    noise_fn: NoiseFn,
    config: DecodingConfig,
) -> Int32[Array, "batch rows columns"]:
    """Decodes all masked tokens, in one loop on the device.

    Args:
      logits_fn: the transformer, called once a step: tokens -> float32 logits of the codes. With guidance,
        each image comes twice, one copy after the other, as [2 * batch, rows, columns]; the first copy's
        logits are to be those of the negative prompt, the second's of the prompt.
      tokens: `mask_id` where a token is to be generated; others are kept.
      mask_id: the token that stands for a masked one.
      noise_fn: see `gumbel_noise`.
      config: the settings.

    Returns:
      Tokens, none of them masked.

    Raises:
      ValueError: a setting is out of its range.
    """
    tokens = tokens.astype(jnp.int32)
    masked = tokens == mask_id
    # Of the image's own tokens; 1 where all are generated.
    starting_ratio = jnp.mean(masked.astype(jnp.float32), axis=(1, 2))

    def body(tokens, step):
        logits = logits_fn(jnp.repeat(tokens, 2, axis=0) if config.guided else tokens)
        if config.guided:
            logits = guide(logits, step.guidance_scale)
        draw, masked = refine(logits, tokens, mask_id, noise_fn(step.index), step, starting_ratio)
        masked &= step.index < config.num_steps - 1
        return jnp.where(masked, mask_id, draw), None

    steps = jax.tree.map(jnp.asarray, plan(config))
    return jax.lax.scan(body, tokens, steps)[0]


def guide(
    logits: Float32[Array, "rows_of_batch rows columns codes"], scale: ScalarLike
) -> Float32[Array, "batch rows columns codes"]:
    """Moves logits away from the negative prompt's, which come before each image's own."""
    pairs = logits.reshape(-1, 2, *logits.shape[1:])
    return pairs[:, 0] + scale * (pairs[:, 1] - pairs[:, 0])


def refine(
    logits: Float32[Array, "batch rows columns codes"],
    tokens: Int32[Array, "batch rows columns"],
    mask_id: int,
    noise: tuple[Float32[Array, "batch rows columns codes"], Float32[Array, "batch rows columns"]],
    step: Any,
    starting_ratio: Float32[Array, " batch"],
) -> tuple[Int32[Array, "batch rows columns"], Bool[Array, "batch rows columns"]]:
    """Draws the masked tokens, and says which of them are the least confident.

    Args:
      logits: of the codes.
      tokens: `mask_id` where a token is masked.
      mask_id: the token that stands for a masked one.
      noise: Gumbel noise of the draws and of the confidences.
      step: a `Step`, of which `mask_ratio` and `temperature` count.
      starting_ratio: the share of an image's tokens that were masked before the first step.

    Returns:
      All tokens, drawn where they were masked; and True for those that are to be masked again: at least one
      if any was, and fewer than before if more than one was.
    """
    masked = tokens == mask_id
    draw = jnp.where(masked, jnp.argmax(logits + noise[0], axis=-1).astype(jnp.int32), tokens)
    log_probs = jax.nn.log_softmax(logits)
    # A token that was given has no probability: any code does.
    chosen = jnp.take_along_axis(log_probs, jnp.where(masked, draw, 0)[..., None], axis=-1)[..., 0]
    confidence = jnp.maximum(chosen, jnp.log(_LEAST)) + step.temperature * noise[1]
    confidence = jnp.where(masked, confidence, jnp.inf).reshape(tokens.shape[0], -1)

    length = confidence.shape[1]
    still = jnp.floor(length * (starting_ratio * step.mask_ratio)).astype(jnp.int32)
    still = jnp.maximum(jnp.minimum(still, jnp.sum(masked, axis=(1, 2)) - 1), 1)
    least = jnp.take_along_axis(jnp.sort(confidence, axis=-1), still[:, None], axis=-1)
    return draw, (confidence < least).reshape(tokens.shape) & masked
