"""Jobs that measure parts of the model alone, forward, and forward with the gradients."""

import statistics
import time
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from richhf_jax import feedback
from richhf_jax.benchmarks import steps
from richhf_jax.benchmarks.gpu_check import plan
from richhf_jax.benchmarks.gpu_check.context import Context, seconds_of
from richhf_jax.costs import parts
from richhf_jax.network import rahf


def part(check: Context, name: str) -> None:
    """Measures a part: one of `plan.PARTS`."""
    if name == "optimizer":
        _optimizer(check)
        return
    model = check.model()
    module, batch_size = cast(rahf.Rahf, model.module), check.size.batches[0]
    batch = steps.random_batch(module, feedback.ALL_SLOTS, batch_size)
    shapes = {key: jax.ShapeDtypeStruct(array.shape, array.dtype) for key, array in batch.items()}
    params = check.trainer(model, batch).abstract_state.params
    (one,) = (part for part in parts.of_network(module, params, shapes) if part.name == plan.PARTS[name])
    for title, function in (("forward", one.fn), ("forward and backward", one.gradients)):
        with check.compilation(f"compile {title}"):
            run = jax.jit(function).lower(one.params, *one.inputs).compile()
        seconds = _measure(check, run, one)
        check.turn.figure(f"{one.name}, {batch_size} images, {title}", 1000 * seconds, "ms")


def _measure(check: Context, run: Callable, one: parts.Part) -> float:
    """Measures the seconds of a compiled part with random parameters and inputs."""
    with check.turn.device():
        params = steps.random_params(one.params)
        inputs = jax.device_put(jax.tree.map(_random_values, one.inputs), check.device)
        with check.turn.quiet():
            return seconds_of(lambda: run(params, *inputs), check.size.timed)


def _random_values(leaf: Any) -> np.ndarray:
    rng = np.random.default_rng(0)
    if leaf.dtype == bool:
        return np.ones(leaf.shape, bool)
    if jnp.issubdtype(leaf.dtype, jnp.integer):
        return rng.integers(2, 200, leaf.shape).astype(leaf.dtype)
    return rng.standard_normal(leaf.shape, np.float32).astype(leaf.dtype)


def _optimizer(check: Context) -> None:
    """Measures the update of all parameters and moments."""
    model = check.model()
    batch = steps.random_batch(cast(rahf.Rahf, model.module), feedback.ALL_SLOTS, 1)
    shapes = check.trainer(model, batch).abstract_state

    def update(state: Any, grads: Any) -> Any:
        return state.apply_gradient(model.optimizer_def, grads, {})

    with check.compilation():
        run = jax.jit(update, donate_argnums=0).lower(shapes, shapes.params).compile()
    with check.turn.device():
        grads = steps.random_params(shapes.params)
        state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), shapes)
        seconds = []
        with check.turn.quiet():
            for _ in range(check.size.timed + 1):
                begin = time.perf_counter()
                state = jax.block_until_ready(run(state, grads))
                seconds.append(time.perf_counter() - begin)
    # The first one moves the program to the device.
    check.turn.figure("optimizer's update", 1000 * statistics.median(seconds[1:]), "ms")
