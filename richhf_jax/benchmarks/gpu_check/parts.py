"""Jobs that measure parts of the model alone, forward, and forward with the gradients."""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from richhf_jax import feedback
from richhf_jax.benchmarks import steps
from richhf_jax.benchmarks.gpu_check.context import Context, seconds_of
from richhf_jax.network import rahf


class Part(NamedTuple):
    """A part of the network.

    Attributes:
      title: its name for people.
      roots: beginnings of its parameters' names.
      method: the network's method that computes it, or a function of the network.
      inputs: the method's first arguments, as shapes.
      constants: the method's last arguments.
    """

    title: str
    roots: tuple[str, ...]
    method: Callable | str
    inputs: Sequence[Any]
    constants: Sequence[Any] = ()


def part(check: Context, name: str) -> None:
    """Measures a part: one of `plan.PARTS`."""
    if name == "optimizer":
        _optimizer(check)
        return
    model = check.model()
    module, batch_size = cast(rahf.Rahf, model.module), check.size.batches[0]
    batch = steps.random_batch(module, feedback.ALL_SLOTS, batch_size)
    params = check.trainer(model, batch).abstract_state.params
    one = _find(module, params, batch, name)
    shapes = {key: tree for key, tree in params.items() if key.startswith(one.roots)}
    mean = functools.partial(_mean, module, one)
    for title, function in (("forward", mean), ("forward and backward", jax.value_and_grad(mean, (0, 1)))):
        with check.compilation(f"compile {title}"):
            run = jax.jit(function).lower(shapes, *_split(one.inputs)).compile()
        seconds = _measure(check, run, shapes, one.inputs)
        check.turn.figure(f"{one.title}, {batch_size} images, {title}", 1000 * seconds, "ms")


def _measure(check: Context, run: Callable, shapes: Any, inputs: Sequence[Any]) -> float:
    """Measures the seconds of a compiled part with random parameters and inputs."""
    with check.turn.device():
        params = steps.random_params(shapes)
        arrays = jax.device_put(_split(jax.tree.map(_random_values, inputs)), check.device)
        with check.turn.quiet():
            return seconds_of(lambda: run(params, *arrays), check.size.timed)


def _find(module: rahf.Rahf, params: Any, batch: steps.Batch, name: str) -> Part:
    """Finds a part, and the shapes of its inputs in a training step."""
    image, prompts, targets = (
        jax.ShapeDtypeStruct(batch[key].shape, batch[key].dtype)
        for key in ("image", "encoder_input_tokens", "decoder_target_tokens")
    )
    if name == "vit":

        def vit(network: rahf.Rahf, image: jax.Array) -> jax.Array:
            return network.vit(image.astype(network.vit_config.dtype), None, deterministic=True)

        return Part("ViT", ("vit",), vit, (image,))
    if name == "encoder":
        roots = ("vit", "image_projection", "token_embedder", "encoder")
        return Part("ViT and T5's encoder", roots, "encode", (image, prompts))
    encoded = jax.eval_shape(
        lambda params: module.apply({"params": params}, image, prompts, method="encode"), params
    )
    if name == "decoder":
        texts = jax.ShapeDtypeStruct((targets.shape[0], targets.shape[-1]), targets.dtype)
        last = jax.eval_shape(lambda encoded: encoded.last(1), encoded)
        roots = ("decoder", "token_embedder")
        return Part("T5's decoder, teacher-forced", roots, "decode", (last, texts, texts))
    if name == "heatmap":
        root, slots = f"heatmap_head_{feedback.HEATMAPS[0]}", feedback.Slots(1, 0, 0)
        return Part("a heatmap head (of 2)", (root,), "heatmaps", (encoded,), (slots,))
    root, slots = f"score_head_{feedback.SCORES[0]}", feedback.Slots(0, 1, 0)
    return Part("a score head (of 4)", (root,), "scores", (encoded,), (slots,))


def _split(inputs: Any) -> tuple[list[Any], list[Any]]:
    """Splits inputs into those with gradients and the others; `_mean` joins them."""
    leaves = jax.tree.leaves(inputs)
    return [x for x in leaves if _is_float(x)], [x for x in leaves if not _is_float(x)]


def _is_float(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def _mean(module: rahf.Rahf, one: Part, params: Any, floats: list[Any], others: list[Any]) -> jax.Array:
    """Computes the part, and the mean of its outputs, whose gradient reaches all of them."""
    leaves, structure = jax.tree.flatten(tuple(one.inputs))
    sources = {True: iter(floats), False: iter(others)}
    joined = [next(sources[_is_float(leaf)]) for leaf in leaves]
    inputs = jax.tree.unflatten(structure, joined)
    outputs = module.apply({"params": params}, *inputs, *one.constants, method=one.method)
    return sum((jnp.mean(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(outputs)), start=jnp.zeros(()))


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
