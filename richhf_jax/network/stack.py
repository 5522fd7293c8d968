"""A stack of equal layers, one after the other or in one scanned loop, with optional recomputation."""

from collections.abc import Callable

import jax
from flax import linen as nn
from flax.linen import partitioning
from jaxtyping import Float

from richhf_jax.shapes import Array

# Policies for the backward pass, by T5X's names (`t5x/examples/scalable_t5`). "none" keeps all activations,
# "minimal" only the products with weights, "full" only a layer's input; the rest is computed again.
REMAT_POLICIES: dict[str, Callable | None] = {
    "none": None,
    "minimal": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def apply_layers(
    layer_cls: type[nn.Module],
    config,
    num_layers: int,
    call: Callable[[nn.Module, Array], Array],
    x: Float[Array, "batch length embed"],
) -> Float[Array, "batch length embed"]:
    """Runs `num_layers` of `layer_cls(config)` one after the other, within the caller's compact method.

    Unscanned, their parameters stand under layers_0, layers_1, ...; scanned, under `layers`, each array with
    a new leading axis of the logical name "layers". So has a decoder's cache. XLA then compiles one layer.

    Args:
      layer_cls: a module that takes `config`.
      config: has `scan_layers` (bool) and `remat_policy`, a name of `REMAT_POLICIES`.
      num_layers: number of layers.
      call: (layer, x) -> x; its closure holds the layer's other arguments.
      x: the first layer's input.

    Returns:
      The last layer's output.

    Raises:
      ValueError: there is no such remat policy.
    """
    if config.remat_policy not in REMAT_POLICIES:
        raise ValueError(f"remat_policy must be one of {list(REMAT_POLICIES)}, got {config.remat_policy!r}")
    if config.remat_policy != "none":
        # `prevent_cse` keeps XLA from undoing the recomputation; in a loop XLA can't undo it.
        call = nn.remat(call, policy=REMAT_POLICIES[config.remat_policy], prevent_cse=not config.scan_layers)
    if not config.scan_layers:
        for i in range(num_layers):
            x = call(layer_cls(config=config, name=f"layers_{i}"), x)
        return x
    scanned = partitioning.scan_with_axes(
        lambda layer, x, _: (call(layer, x), None),
        variable_axes={"params": 0, "cache": 0, "fixed_kv": 0},
        split_rngs={"params": True, "dropout": True},
        length=num_layers,
        axis_name="layers",
    )
    return scanned(layer_cls(config=config, name="layers"), x, None)[0]
