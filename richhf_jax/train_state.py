"""The training state: step, parameters, optimizer state, mutable collections. Donated to every step."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import PartitionSpec


@struct.dataclass
class InferenceState:
    """The parts of a training state that evaluation and prediction use (T5X's name).

    Attributes:
      params: float32 parameters.
      flax_mutables: collections that training changes without gradients, such as batch statistics; {} for
        most models.
    """

    params: Any
    flax_mutables: Any = struct.field(default_factory=dict)

    @classmethod
    def of(cls, state: "TrainState | InferenceState") -> "InferenceState":
        """Selects the parts from a state of arrays, shapes or shardings."""
        return cls(state.params, state.flax_mutables)


@struct.dataclass
class TrainState:
    """Everything that a training step changes.

    Attributes:
      step: int32 scalar, steps taken.
      params: float32 parameters.
      opt_state: the optimizer's state.
      flax_mutables: as in `InferenceState`.
    """

    step: Any
    params: Any
    opt_state: Any
    flax_mutables: Any = struct.field(default_factory=dict)

    @classmethod
    def create(
        cls, optimizer_def: optax.GradientTransformation, params: Any, flax_mutables: Any = None
    ) -> "TrainState":
        """Makes the state at step 0."""
        return cls(jnp.zeros((), jnp.int32), params, optimizer_def.init(params), flax_mutables or {})

    def apply_gradient(
        self, optimizer_def: optax.GradientTransformation, grads: Any, flax_mutables: Any = None
    ) -> "TrainState":
        """Returns the next step's state."""
        updates, opt_state = optimizer_def.update(grads, self.opt_state, self.params)
        params = optax.apply_updates(self.params, updates)
        return TrainState(self.step + 1, params, opt_state, flax_mutables or {})

    def state_dict(self) -> dict[str, Any]:
        """Returns the parts by the names they have in a checkpoint; no `flax_mutables` if there are none."""
        parts = {"step": self.step, "params": self.params, "opt_state": self.opt_state}
        return parts | ({"flax_mutables": self.flax_mutables} if self.flax_mutables else {})


def mutable_collections(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Selects the collections of a model's variables that are neither parameters nor logical axes."""
    return {name: tree for name, tree in variables.items() if name != "params" and not name.endswith("_axes")}


def logical_axes(
    optimizer_def: optax.GradientTransformation,
    params_axes: Any,
    state: TrainState,
    mutables_axes: Mapping[str, Any] | None = None,
) -> TrainState:
    """Finds the logical axes of the whole state.

    The optimizer's moments have the axes of their parameters; arrays without axes are replicated.

    Args:
      optimizer_def: the optimizer that made `state.opt_state`.
      params_axes: a tree like `state.params`, of `PartitionSpec`s of logical axis names.
      state: the state, of arrays or `ShapeDtypeStruct`s.
      mutables_axes: collection -> a tree like it, of `PartitionSpec`s. Collections that are absent are
        replicated; None: all are.

    Returns:
      A TrainState of `PartitionSpec`s of logical axis names; an empty one means replicated.
    """
    opt_axes = optax.tree_map_params(
        optimizer_def,
        # An optimizer of only some parameters has a `MaskedNode` in the place of each other one.
        lambda leaf, axes: leaf if isinstance(leaf, optax.MaskedNode) else axes,
        state.opt_state,
        params_axes,
        transform_non_params=lambda _: PartitionSpec(),
        is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
    )
    replicated = jax.tree.map(lambda _: PartitionSpec(), state.flax_mutables)
    return TrainState(PartitionSpec(), params_axes, opt_axes, replicated | dict(mutables_axes or {}))
