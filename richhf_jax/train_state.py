"""The training state: step, parameters, optimizer state and more. Donated to every step."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import PartitionSpec

# The mutable collections of a state: a model's keyword argument, and the beginning of their arrays' names in
# files.
MUTABLES = "flax_mutables"


@struct.dataclass
class InferenceState:
    """The parts of a training state that evaluation and prediction use (T5X's name).

    Attributes:
      params: float32 parameters; their average where training keeps one.
      flax_mutables: collections that training changes without gradients, such as batch statistics; {} for
        most models.
    """

    params: Any
    flax_mutables: Any = struct.field(default_factory=dict)

    @classmethod
    def of(cls, state: "TrainState | InferenceState") -> "InferenceState":
        """Selects the parts from a state of arrays, shapes or shardings."""
        average = state.ema_params if isinstance(state, TrainState) else None
        return cls(average or state.params, state.flax_mutables)

    def mutables(self) -> dict[str, Any]:
        """Returns the mutable collections as a model's keyword argument; none if there are no collections."""
        return {MUTABLES: self.flax_mutables} if self.flax_mutables else {}


@struct.dataclass
class TrainState:
    """Everything that a training step changes.

    Attributes:
      step: int32 scalar, steps taken.
      params: float32 parameters.
      opt_state: the optimizer's state.
      flax_mutables: as in `InferenceState`.
      ema_params: an exponential moving average of the parameters, a float32 tree like them; {}: none is kept.
    """

    step: Any
    params: Any
    opt_state: Any
    flax_mutables: Any = struct.field(default_factory=dict)
    ema_params: Any = struct.field(default_factory=dict)

    @classmethod
    def create(
        cls,
        optimizer_def: optax.GradientTransformation,
        params: Any,
        flax_mutables: Any = None,
        *,
        average: bool = False,
    ) -> "TrainState":
        """Makes the state at step 0; with `average`, one that keeps an average of the parameters."""
        state = cls(jnp.zeros((), jnp.int32), params, optimizer_def.init(params), flax_mutables or {})
        return state.with_average() if average else state

    def with_average(self) -> "TrainState":
        """Returns the state with an average that begins at its parameters."""
        # Copies, because a step gives away both.
        return dataclasses.replace(self, ema_params=jax.tree.map(jnp.copy, self.params))

    def apply_gradient(
        self,
        optimizer_def: optax.GradientTransformation,
        grads: Any,
        flax_mutables: Any = None,
        ema_decay: float | None = None,
    ) -> "TrainState":
        """Returns the next step's state.

        Args:
          optimizer_def: the optimizer that made `opt_state`.
          grads: the gradients, a tree like `params`.
          flax_mutables: the next mutable collections.
          ema_decay: the average's decay after its warm-up, from 0 to below 1; None: no average is kept.
        """
        updates, opt_state = optimizer_def.update(grads, self.opt_state, self.params)
        params = optax.apply_updates(self.params, updates)
        average = {}
        if ema_decay is not None:
            # The decay is min(ema_decay, (1 + step) / (10 + step)), the warm-up of TensorFlow's
            # ExponentialMovingAverage. This is 1 - decay, without the rounding of that difference.
            share = jnp.maximum(1 - ema_decay, 9 / (10 + self.step))
            average = optax.incremental_update(params, self.ema_params, share)
        return TrainState(self.step + 1, params, opt_state, flax_mutables or {}, average)

    def state_dict(self) -> dict[str, Any]:
        """Returns the parts by the names they have in a checkpoint, without those that are empty."""
        parts = {"step": self.step, "params": self.params, "opt_state": self.opt_state}
        rest = {"flax_mutables": self.flax_mutables, "ema_params": self.ema_params}
        return parts | {name: tree for name, tree in rest.items() if tree}


def inference_part(parts: Collection[str]) -> str:
    """Returns which part of a checkpoint, of those it has, holds the `InferenceState.params`."""
    return "ema_params" if "ema_params" in parts else "params"


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

    The optimizer's moments and the average have the axes of their parameters; arrays without axes are
    replicated.

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
    average_axes = params_axes if state.ema_params else {}
    mutables_axes = replicated | dict(mutables_axes or {})
    return TrainState(PartitionSpec(), params_axes, opt_axes, mutables_axes, average_axes)
