"""Takes the network apart, so that what its parts cost can be measured one by one."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp

from richhf_jax import feedback


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the network as a function that can be compiled alone.

    Attributes:
      name: what is computed.
      fn: (parameters, *inputs) -> outputs.
      params: the parameters that it uses, in the network's tree.
      inputs: its other arguments. The first axis of each array is the batch, or batch * texts.
    """

    name: str
    fn: Callable[..., Any]
    params: Mapping[str, Any]
    inputs: tuple[Any, ...]

    def gradients(self, params: Any, *inputs: Any) -> Any:
        """Computes the gradients of the sum of all outputs: those of the parameters and of float inputs."""

        def total(params, inputs):
            return sum(jnp.sum(leaf, dtype=jnp.float32) for leaf in jax.tree.leaves(self.fn(params, *inputs)))

        grads = jax.grad(total, argnums=(0, 1), allow_int=True)(params, inputs)
        return [grad for grad in jax.tree.leaves(grads) if grad.dtype != jax.dtypes.float0]


def of_network(module: Any, params: Mapping[str, Any], batch: Mapping[str, Any]) -> list[Part]:
    """Takes `network.rahf.Rahf` apart into ViT, encoder, decoder and heads, all without dropout.

    Args:
      module: the network.
      params: its parameters, as arrays or `ShapeDtypeStruct`s.
      batch: a batch of the model's features, likewise.
    """

    def part(name, prefixes, method, *inputs):
        def fn(params, *inputs):
            return module.apply({"params": params}, *inputs, method=method)

        used = {key: tree for key, tree in params.items() if key.startswith(prefixes)}
        return Part(name, fn, used, inputs)

    def vision(network, image):
        pixels = image.astype(network.vit_config.dtype) / 127.5 - 1.0
        return network.vit(pixels, deterministic=True)

    def heads(kind, count):
        slots = feedback.Slots(**{"heatmaps": 0, "scores": 0, "texts": 0, kind: count})
        name, used = f"{count} {kind[:-1]} heads", f"{kind[:-1]}_head"
        if count == 1:
            name = f"{kind[:-1]} head"
            if module.variant == feedback.MULTI_HEAD:
                used += f"_{getattr(feedback, kind.upper())[0]}"
        return part(name, used, functools.partial(getattr(type(module), kind), slots=slots), encoded)

    image, prompts, targets = (
        batch[name] for name in ("image", "encoder_input_tokens", "decoder_target_tokens")
    )
    of_encoder = ("vit", "image_projection", "token_embedder", "encoder")
    encoder = part("ViT and encoder", of_encoder, type(module).encode, image, prompts)
    encoded = jax.eval_shape(encoder.fn, encoder.params, image, prompts)
    parts = [part("ViT", "vit", vision, image), encoder]
    if texts := targets.shape[1]:
        of_texts = jax.eval_shape(lambda encoded: encoded.last(texts), encoded)
        tokens = jax.ShapeDtypeStruct((targets.shape[0] * texts, targets.shape[2]), targets.dtype)
        of_decoder = ("decoder", "token_embedder")
        parts.append(part("decoder", of_decoder, type(module).decode, of_texts, tokens, tokens))
    for kind, weights in (("heatmaps", "heatmap_weights"), ("scores", "score_weights")):
        parts += [
            heads(kind, count) for count in sorted({1, batch[weights].shape[1]}) if batch[weights].shape[1]
        ]
    return parts


@dataclasses.dataclass
class Convolution:
    """A convolution of a part or of its gradients.

    Attributes:
      fn: (left, right) -> output.
      operands: shapes and types of left and right.
      count: number of places in the program that compute it; a loop's body is one place.
    """

    fn: Callable[..., Any]
    operands: tuple[jax.ShapeDtypeStruct, ...]
    count: int = 0


def convolutions(part: Part, platform: str) -> dict[str, Convolution]:
    """Finds the different convolutions of a part and of its gradients.

    Args:
      part: a part of the network.
      platform: jax's name of the platform, because some layers are computed otherwise on a CPU.

    Returns:
      Description -> convolution. A description tells the purpose and the shapes, for instance
      "input's gradient, bf16[1,64,64,768] * bf16[3,3,768,768] -> bf16[1,64,64,768]".
    """
    jaxpr = jax.make_jaxpr(part.gradients)(part.params, *part.inputs).jaxpr
    found: dict[str, Convolution] = {}
    for eqn in _convolutions(jaxpr, platform, {}):
        left, right, out = (var.aval for var in (*eqn.invars, *eqn.outvars))
        shapes = f"{left.str_short(True)} * {right.str_short(True)} -> {out.str_short(True)}"
        name = f"{_purpose(eqn.params['dimension_numbers'])}, {shapes}"
        operands = tuple(jax.ShapeDtypeStruct(one.shape, one.dtype) for one in (left, right))
        fn = functools.partial(eqn.primitive.bind, **eqn.params)
        found.setdefault(name, Convolution(fn, operands)).count += 1
    return found


def _purpose(numbers: jax.lax.ConvDimensionNumbers) -> str:
    """Tells forward and backward apart by the order of the axes, which are [batch, ..., channels] forward."""
    batch, channels = numbers.lhs_spec[:2]
    filters_out, filters_in = numbers.rhs_spec[:2]
    if batch > channels:
        return "kernel's gradient"
    return "output" if filters_out > filters_in else "input's gradient"


def _convolutions(jaxpr: Any, platform: str, branches: dict[Any, int]) -> Iterator[Any]:
    """Yields the convolutions in a jaxpr and in those that it calls.

    Args:
      branches: variable that chooses by platform -> number of this platform's branch.
    """
    for eqn in jaxpr.eqns:
        operands = eqn.invars
        inner = list(jax.extend.core.jaxprs_in_params(eqn.params))
        if eqn.primitive.name == "conv_general_dilated":
            yield eqn
        elif eqn.primitive.name == "platform_index":
            platforms = enumerate(eqn.params["platforms"])
            branches[eqn.outvars[0]] = next(i for i, names in platforms if names is None or platform in names)
        elif eqn.primitive.name == "cond":
            index, *operands = operands
            if (branch := _chosen(index, branches)) is not None:
                inner = [inner[branch]]
        for one in inner:
            known = {}
            if len(one.invars) == len(operands):
                chosen = (
                    (var, _chosen(given, branches)) for var, given in zip(one.invars, operands, strict=True)
                )
                known = {var: branch for var, branch in chosen if branch is not None}
            yield from _convolutions(one, platform, known)


def _chosen(var: Any, branches: Mapping[Any, int]) -> int | None:
    return None if isinstance(var, jax.extend.core.Literal) else branches.get(var)
