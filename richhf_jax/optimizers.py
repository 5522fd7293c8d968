"""Learning-rate schedules from T5X's factor strings; AdamW and Muon."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from richhf_jax import errors

# Coefficients, by Muon's authors, of the Newton-Schulz iteration towards the nearest orthogonal matrix.
# Given for each of the 5 steps: optax then compiles one loop for a matrix and not 5 copies of its body.
_NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5


def create_learning_rate_scheduler(
    factors: str = "constant * linear_warmup * rsqrt_decay",
    base_learning_rate: float = 0.5,
    warmup_steps: int = 1000,
    decay_factor: float = 0.5,
    steps_per_decay: int = 20_000,
    steps_per_cycle: int = 100_000,
    step_offset: int = 0,
    min_learning_rate: float = 1e-8,
) -> optax.Schedule:
    """Makes a schedule, the product of the named factors, as T5X's function of this name does.

    Factors:
      constant: base_learning_rate.
      linear_warmup: min(1, step / warmup_steps).
      linear_decay: base_learning_rate * min(step / warmup_steps, 1 + decay_factor * (warmup_steps - step)).
      rsqrt_decay: 1 / sqrt(max(step, warmup_steps)).
      rsqrt_normalized_decay: rsqrt_decay scaled to 1 at the end of the warm-up.
      decay_every: decay_factor ** (step // steps_per_decay).
      cosine_decay: half a cosine from 1 to 0 over steps_per_cycle after the warm-up, then again.

    Args:
      factors: names from above joined by "*".
      step_offset: number subtracted from the step, e.g. the steps of a pretrained checkpoint.
      min_learning_rate: lower bound of the result.

    Returns:
      step (int scalar) -> learning rate (float32 scalar).

    Raises:
      errors.UserError: a factor is unknown.
    """
    terms = {
        "constant": lambda step: base_learning_rate,
        "linear_warmup": lambda step: jnp.minimum(1.0, step / warmup_steps),
        "linear_decay": lambda step: (
            base_learning_rate * jnp.minimum(step / warmup_steps, 1.0 + decay_factor * (warmup_steps - step))
        ),
        "rsqrt_decay": lambda step: jax.lax.rsqrt(jnp.maximum(step, warmup_steps).astype(jnp.float32)),
        "rsqrt_normalized_decay": lambda step: jnp.sqrt(warmup_steps / jnp.maximum(step, warmup_steps)),
        "decay_every": lambda step: decay_factor ** (step // steps_per_decay),
        "cosine_decay": lambda step: (
            0.5 * (1 + jnp.cos(jnp.pi * (jnp.maximum(0.0, (step - warmup_steps) / steps_per_cycle) % 1.0)))
        ),
    }
    names = [name.strip() for name in factors.split("*")]
    if unknown := [name for name in names if name not in terms]:
        raise errors.UserError(
            f"create_learning_rate_scheduler.factors: unknown factor {unknown[0]!r} in {factors!r}; known:"
            f" {', '.join(terms)}"
        )

    def learning_rate(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.maximum(0, step - step_offset)
        rate = jnp.ones((), jnp.float32)
        for name in names:
            rate *= terms[name](step)
        return jnp.maximum(rate, min_learning_rate)

    return learning_rate


def adamw(
    learning_rate_fn: optax.Schedule,
    beta1: float = 0.9,
    beta2: float = 0.999,
    weight_decay: float = 0.0,
    max_grad_norm: float | None = None,
    learning_rate_multipliers: Mapping[str, float] | None = None,
) -> optax.GradientTransformation:
    """Makes AdamW in float32. Weight decay acts on matrices and kernels only, not on biases or norm scales.

    Args:
      learning_rate_fn: step -> learning rate.
      weight_decay: each step subtracts this x learning rate x weight.
      max_grad_norm: upper bound of the gradient's global norm; None sets no bound.
      learning_rate_multipliers: part of a parameter's name ("relpos_bias") -> factor of its learning rate.
        Adam moves every weight by about the learning rate a step, whatever the weight's scale.
    """
    optimizer = optax.adamw(
        learning_rate_fn,
        b1=beta1,
        b2=beta2,
        weight_decay=weight_decay,
        mask=functools.partial(_named, ending=("kernel", "embedding")),
    )
    return _clipped_and_multiplied(optimizer, max_grad_norm, learning_rate_multipliers)


def muon(
    learning_rate_fn: optax.Schedule,
    beta: float = 0.95,
    adam_beta2: float = 0.999,
    weight_decay: float = 0.0,
    max_grad_norm: float | None = None,
    learning_rate_multipliers: Mapping[str, float] | None = None,
    adam_parameters: Sequence[str] = ("logits_dense", "output"),
) -> optax.GradientTransformation:
    """Makes an optimizer: Muon for the kernels inside the network, AdamW with Nesterov momentum for the rest.

    Muon (https://kellerjordan.github.io/posts/muon) takes a step along the nearest orthogonal matrix of a
    kernel's momentum. The step is scaled to the size of AdamW's (https://arxiv.org/abs/2502.16982), so that
    both share one learning rate.

    Args:
      learning_rate_fn: step -> learning rate.
      beta: decay of Muon's momentum.
      adam_beta2: AdamW's beta2.
      weight_decay: as in `adamw`, on Muon's kernels only.
      max_grad_norm: as in `adamw`.
      learning_rate_multipliers: as in `adamw`.
      adam_parameters: kernels with one of these in their names are AdamW's, too: those of the last layers.
    """

    def dimension_numbers(params: Any) -> Any:
        def of_one(path, param):
            name = _name(path)
            if not name.endswith("kernel") or any(part in name for part in adam_parameters):
                return None  # AdamW's
            # A convolution's kernel [height, width, in, out] counts as a matrix [height * width * in, out];
            # scanned layers [layers, in, out] as a matrix each.
            first = 1 if "layers" in name.split("/") else 0
            return optax.contrib.MuonDimensionNumbers(tuple(range(first, param.ndim - 1)), param.ndim - 1)

        return jax.tree_util.tree_map_with_path(of_one, params)

    optimizer = optax.contrib.muon(
        learning_rate_fn,
        ns_coeffs=_NEWTON_SCHULZ,
        beta=beta,
        weight_decay=weight_decay,
        adam_b2=adam_beta2,
        muon_weight_dimension_numbers=dimension_numbers,
        consistent_rms=0.2,
    )
    return _clipped_and_multiplied(optimizer, max_grad_norm, learning_rate_multipliers)


def _clipped_and_multiplied(
    optimizer: optax.GradientTransformation,
    max_grad_norm: float | None,
    learning_rate_multipliers: Mapping[str, float] | None,
) -> optax.GradientTransformation:
    clip = [] if max_grad_norm is None else [optax.clip_by_global_norm(max_grad_norm)]
    scales = [
        optax.masked(optax.scale(factor), functools.partial(_named, part=part))
        for part, factor in (learning_rate_multipliers or {}).items()
    ]
    return optax.chain(*clip, optimizer, *scales)


def _name(path: tuple[Any, ...]) -> str:
    """Returns a parameter's name, e.g. "decoder/relpos_bias/rel_embedding"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _named(params: Any, part: str = "", ending: str | tuple[str, ...] = "") -> Any:
    """Returns a tree of bools: True where a name contains `part` and ends with `ending` (or one of these)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: part in _name(path) and _name(path).endswith(ending), params
    )
