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
      method: a function of the network and the inputs.
      inputs: shapes of the inputs in a training step.
    """

    title: str
    roots: tuple[str, ...]
    method: Callable[..., Any]
    inputs: Sequence[jax.ShapeDtypeStruct]


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
        arrays = jax.device_put(_split([_random_values(leaf) for leaf in inputs]), check.device)
        with check.turn.quiet():
            return seconds_of(lambda: run(params, *arrays), check.size.timed)


def _find(module: rahf.Rahf, params: Any, batch: steps.Batch, name: str) -> Part:
    """Finds a part, and the shapes of its inputs in a training step."""
    image, prompts, targets = (
        jax.ShapeDtypeStruct(batch[key].shape, batch[key].dtype)
        for key in ("image", "encoder_input_tokens", "decoder_target_tokens")
    )

    def vit(network: rahf.Rahf, image: jax.Array) -> Any:
        return network.vit(image.astype(network.vit_config.dtype), None, deterministic=True)

    def encode(network: rahf.Rahf, image: jax.Array, prompts: jax.Array) -> Any:
        encoded = network.encode(image, prompts)
        return encoded.tokens, encoded.valid

    if name == "vit":
        return Part("ViT", ("vit",), vit, (image,))
    if name == "encoder":
        roots = ("vit", "image_projection", "token_embedder", "encoder")
        return Part("ViT and T5's encoder", roots, encode, (image, prompts))
    apply = functools.partial(module.apply, method=encode)
    encoded: Any = jax.eval_shape(apply, {"params": params}, image, prompts)

    def again(tokens: jax.Array, valid: jax.Array) -> rahf.Encoded:
        image_tokens = tokens.shape[2] - prompts.shape[-1]
        rows, columns = module.vit_config.grid
        return rahf.Encoded(tokens, valid, (rows, columns), image_tokens - rows * columns)

    def decode(network: rahf.Rahf, texts: jax.Array, *encoded: jax.Array) -> Any:
        return network.decode(again(*encoded).last(1), texts, texts)

    def heatmap(network: rahf.Rahf, *encoded: jax.Array) -> Any:
        return network.heatmaps(again(*encoded), feedback.Slots(1, 0, 0))

    def score(network: rahf.Rahf, *encoded: jax.Array) -> Any:
        return network.scores(again(*encoded), feedback.Slots(0, 1, 0))

    if name == "decoder":
        texts = jax.ShapeDtypeStruct((targets.shape[0], targets.shape[-1]), targets.dtype)
        roots = ("decoder", "token_embedder")
        return Part("T5's decoder, teacher-forced", roots, decode, (texts, *encoded))
    if name == "heatmap":
        return Part("a heatmap head (of 2)", (f"heatmap_head_{feedback.HEATMAPS[0]}",), heatmap, encoded)
    return Part("a score head (of 4)", (f"score_head_{feedback.SCORES[0]}",), score, encoded)


def _split(inputs: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Splits inputs into those with gradients and the others; `_mean` joins them."""
    return [x for x in inputs if _is_float(x)], [x for x in inputs if not _is_float(x)]


def _is_float(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def _mean(
    module: rahf.Rahf, one: Part, params: Any, floats: Sequence[jax.Array], others: Sequence[jax.Array]
) -> jax.Array:
    """Computes the part, and the mean of its outputs, whose gradient reaches all of them."""
    sources = {True: iter(floats), False: iter(others)}
    inputs = [next(sources[_is_float(leaf)]) for leaf in one.inputs]
    outputs = module.apply({"params": params}, *inputs, method=one.method)
    means = [jnp.mean(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(outputs)]
    return jnp.stack(means).sum()


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
