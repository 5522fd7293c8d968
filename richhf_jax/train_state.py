"""The training state: step, parameters, optimizer state. Donated to every step."""

from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec


@flax.struct.dataclass
class TrainState:
    """Attributes:
    step: int32 scalar, steps taken.
    params: float32 parameters.
    opt_state: the optimizer's state.
    """

    step: jax.Array
    params: Any
    opt_state: Any

    @classmethod
    def create(cls, optimizer_def: optax.GradientTransformation, params: Any) -> "TrainState":
        return cls(jnp.zeros((), jnp.int32), params, optimizer_def.init(params))

    def apply_gradient(self, optimizer_def: optax.GradientTransformation, grads: Any) -> "TrainState":
        updates, opt_state = optimizer_def.update(grads, self.opt_state, self.params)
        return TrainState(self.step + 1, optax.apply_updates(self.params, updates), opt_state)


def logical_axes(
    optimizer_def: optax.GradientTransformation, params_axes: Any, state: TrainState
) -> TrainState:
    """Logical axes of the whole state: moments are laid out as their parameters, the rest replicated.

    Args:
      params_axes: a tree like `state.params`, of `PartitionSpec`s of axis names.
      state: arrays or `ShapeDtypeStruct`s.

    Returns:
      A TrainState of `PartitionSpec`s of logical axis names; empty = replicated.
    """
    opt_axes = optax.tree_map_params(
        optimizer_def,
        # Where an optimizer acts on some parameters only, the others' places are masked.
        lambda leaf, axes: leaf if isinstance(leaf, optax.MaskedNode) else axes,
        state.opt_state,
        params_axes,
        transform_non_params=lambda _: PartitionSpec(),
        is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
    )
    return TrainState(step=PartitionSpec(), params=params_axes, opt_state=opt_axes)
