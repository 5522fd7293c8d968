"""A stack of equal layers, one after the other or in one scanned loop.

Optional are recomputation in the backward pass, and stochastic depth.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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


class StochasticDepth(nn.Module):
    """Drops a residual branch for some examples, as a whole (Huang et al., https://arxiv.org/abs/1603.09382).

    What stays is divided by its share, so that the expectation is the branch. The rng "dropout" draws.
    """

    @nn.compact
    def __call__(
        self, branch: Float[Array, "batch length embed"], drop_rate: Float[Array, ""] | float | None
    ) -> Float[Array, "batch length embed"]:
        """Drops the branch of an example with the probability `drop_rate`, which is below 1; None: never."""
        if drop_rate is None:
            return branch
        keep = 1 - drop_rate
        kept = jax.random.bernoulli(self.make_rng("dropout"), keep, (branch.shape[0], 1, 1))
        return jnp.where(kept, (branch / keep).astype(branch.dtype), 0)


def apply_layers(
    layer_cls: type[nn.Module],
    config,
    num_layers: int,
    call: Callable[[nn.Module, Any, Any], Any],
    x: Any,
    drop_rate: float = 0.0,
) -> Any:
    """Runs `num_layers` of `layer_cls(config)` one after the other, within the caller's compact method.

    Unscanned, their parameters stand under layers_0, layers_1, ...; scanned, under `layers`, each array with
    a new leading axis of the logical name "layers". So has a decoder's cache. XLA then compiles one layer.

    Args:
      layer_cls: a module that takes `config`.
      config: has `scan_layers` (bool) and `remat_policy`, a name of `REMAT_POLICIES`.
      num_layers: number of layers.
      call: (layer, x, drop rate for `StochasticDepth`) -> x; its closure holds the layer's other arguments.
      x: the first layer's input: an array, or a tree of arrays.
      drop_rate: the last layer's drop rate. It grows in equal steps from 0 at the stack's input; at 0, every
        layer's is None.

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
    # The paper's linear rule.
    drop_rates = [drop_rate * i / num_layers if drop_rate else None for i in range(1, num_layers + 1)]
    if not config.scan_layers:
        for i, rate in enumerate(drop_rates):
            x = call(layer_cls(config=config, name=f"layers_{i}"), x, rate)
        return x
    scanned = partitioning.scan_with_axes(
        lambda layer, x, drop_rate: (call(layer, x, drop_rate), None),
        variable_axes={"params": 0, "cache": 0, "fixed_kv": 0},
        split_rngs={"params": True, "dropout": True},
        length=num_layers,
        axis_name="layers",
    )
    rates = np.array(drop_rates, np.float32) if drop_rate else None
    return scanned(layer_cls(config=config, name="layers"), x, rates)[0]
