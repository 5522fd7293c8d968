"""The training state: step, parameters, optimizer state, mutable collections. Donated to every step."""

from collections.abc import Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec


@flax.struct.dataclass
class InferenceState:
    """What evaluation and prediction take of a training state (T5X's name).

    Attributes:
      params: float32 parameters.
      flax_mutables: collections that training changes without gradients, such as batch statistics; {} for
        most models.
    """

    params: Any
    flax_mutables: Any = flax.struct.field(default_factory=dict)

    @classmethod
    def of(cls, state: "TrainState | InferenceState") -> "InferenceState":
        """Takes the parts of a state, of arrays, shapes or shardings."""
        return cls(state.params, state.flax_mutables)


@flax.struct.dataclass
class TrainState:
    """Everything that a training step changes.

    Attributes:
      step: int32 scalar, steps taken.
      params: float32 parameters.
      opt_state: the optimizer's state.
      flax_mutables: as of `InferenceState`.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    flax_mutables: Any = flax.struct.field(default_factory=dict)

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
        """Names the parts for a checkpoint. A model without mutable collections saves none."""
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

    Moments are laid out as their parameters; what has no axes is replicated.

    Args:
      optimizer_def: the optimizer that made `state.opt_state`.
      params_axes: a tree like `state.params`, of `PartitionSpec`s of axis names.
      state: arrays or `ShapeDtypeStruct`s.
      mutables_axes: collection -> a tree like it; None, or a collection that is absent: replicated.

    Returns:
      A TrainState of `PartitionSpec`s of logical axis names; empty = replicated.
    """
    opt_axes = optax.tree_map_params(
        optimizer_def,
        # An optimizer that acts on some parameters only masks the places of the others.
        lambda leaf, axes: leaf if isinstance(leaf, optax.MaskedNode) else axes,
        state.opt_state,
        params_axes,
        transform_non_params=lambda _: PartitionSpec(),
        is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
    )
    replicated = jax.tree.map(lambda _: PartitionSpec(), state.flax_mutables)
    return TrainState(PartitionSpec(), params_axes, opt_axes, replicated | dict(mutables_axes or {}))
