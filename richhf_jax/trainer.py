"""The compiled steps: gradients, microbatches, metrics. Nothing in here waits for the device."""

import contextlib
import functools
import pathlib
import traceback
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from jax.sharding import PartitionSpec

from richhf_jax import errors, losses, models, partitioning
from richhf_jax import train_state as train_state_lib

TrainState = train_state_lib.TrainState
InferenceState = train_state_lib.InferenceState
# Input of evaluation and prediction, which use the parameters and the mutable collections alone.
AnyState = TrainState | InferenceState
Metrics = models.Metrics
_NETWORK = pathlib.Path(__file__).parent / "network"


class Trainer:
    """Runs a model's train, eval and predict steps on a partitioner's mesh.

    Attributes:
      model: the model to train.
      abstract_state: the training state as `ShapeDtypeStruct`s with shardings.
      num_microbatches: number of parts that a training batch is split into.
      ema_decay: decay of the average of the parameters; None: none is kept.
    """

    def __init__(
        self,
        model: models.BaseModel,
        partitioner: partitioning.PjitPartitioner,
        batch_shapes: Mapping[str, jax.ShapeDtypeStruct | np.ndarray],
        random_seed: int = 0,
        use_hardware_rng: bool = False,
        num_microbatches: int | None = None,
        ema_decay: float | None = None,
    ):
        """Traces the model's initialisation; compiles nothing yet.

        Args:
          model: the model to train.
          partitioner: splits states and batches over the mesh.
          batch_shapes: feature -> shape and type in a whole batch; the first axis of each is the batch.
          random_seed: seed of initial parameters and dropout.
          use_hardware_rng: draws random numbers with XLA's RngBitGenerator ("unsafe_rbg"). Dropout is faster
            on TPU and programs compile faster; but the numbers depend on the mesh and the platform.
          num_microbatches: splits each batch into this many parts, computes one after the other, and adds up
            the gradients: the same step with less memory.
          ema_decay: decay of an exponential moving average of the parameters, which evaluation and prediction
            use, after a warm-up, see `TrainState.apply_gradient`; None: none is kept.

        Raises:
          errors.UserError: the network refuses its settings, or the batches' shapes.
          ValueError: the batch size is no multiple of `num_microbatches`.
        """
        batch_size = next(iter(batch_shapes.values())).shape[0]
        if num_microbatches and batch_size % num_microbatches:
            raise ValueError(f"batch size {batch_size} doesn't split into {num_microbatches} microbatches")
        self.model = model
        self._partitioner = partitioner
        self.num_microbatches = num_microbatches or 1
        self.ema_decay = ema_decay
        # A model that only predicts has no optimizer.
        self._optimizer_def = model.optimizer_def or optax.identity()
        self._create = functools.partial(
            TrainState.create, self._optimizer_def, average=ema_decay is not None
        )
        self._rng_impl = "unsafe_rbg" if use_hardware_rng else "threefry2x32"
        init_rng, dropout_rng = jax.random.split(jax.random.key(random_seed, impl=self._rng_impl))
        # On the host, because compiling a step must not fetch a constant from the device.
        self._dropout_key: Any = np.asarray(jax.random.key_data(dropout_rng))
        self._batch_shapes = batch_shapes
        shapes = {name: array.shape for name, array in batch_shapes.items()}
        self._init = functools.partial(model.get_initial_variables, init_rng, shapes)
        self.abstract_state, self._state_sharding = self._lay_out()
        state, batch, everywhere = self._state_sharding, partitioner.batch_sharding, partitioner.replicated
        inference = InferenceState.of(state)
        self._steps = {
            "train": partitioner.partition(
                self._train, (state, batch), (state, everywhere), donate_argnums=(0,)
            ),
            "eval": partitioner.partition(
                lambda state, batch: model.eval_fn(state.params, batch, **state.mutables())[1],
                (inference, batch),
                everywhere,
            ),
            "predict": partitioner.partition(
                lambda state, batch: model.predict_batch(state.params, batch, **state.mutables()),
                (inference, batch),
                everywhere,
            ),
        }

    def _lay_out(self) -> tuple[TrainState, TrainState]:
        """Traces the initial state, and finds where each of its arrays lives.

        Returns:
          The state as `ShapeDtypeStruct`s with shardings, and the shardings alone.
        """
        with _explained_refusal():
            variables = jax.eval_shape(self._init)
        mutables = train_state_lib.mutable_collections(variables)
        state = jax.eval_shape(self._create, variables["params"], mutables)
        params_axes = axes_by_param(variables["params_axes"])
        mutables_axes = {
            name: axes_by_param(variables[f"{name}_axes"]) for name in mutables if f"{name}_axes" in variables
        }
        axes = train_state_lib.logical_axes(self._optimizer_def, params_axes, state, mutables_axes)
        shardings = self._partitioner.state_sharding(axes, state)
        abstract_state = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            state,
            shardings,
        )
        return abstract_state, shardings

    def init_state(
        self,
        given: Mapping[tuple[str, ...], jax.Array] | None = None,
        given_mutables: Mapping[tuple[str, ...], jax.Array] | None = None,
    ) -> TrainState:
        """Makes a state at step 0, each array on the devices that hold it.

        Args:
          given: path of names -> parameter, in place of fresh ones, which are then not computed.
          given_mutables: path of names -> array of the mutable collections, in place of fresh ones.
        """
        kept = {"params": dict(given or {}), "flax_mutables": dict(given_mutables or {})}
        missing = self._missing(kept)
        made = self._fresh(missing)() if any(missing.values()) else missing
        params, mutables = (traverse_util.unflatten_dict(kept[part] | made[part]) for part in kept)
        return jax.jit(self._create, out_shardings=self._state_sharding)(params, mutables)

    def _missing(self, given: Mapping[str, Mapping]) -> dict[str, dict[tuple[str, ...], Any]]:
        """Returns the shardings of the arrays of "params" and "flax_mutables" that aren't given, by names."""
        missing = {}
        for part, arrays in given.items():
            shardings = traverse_util.flatten_dict(getattr(self._state_sharding, part))
            missing[part] = {name: sharding for name, sharding in shardings.items() if name not in arrays}
        return missing

    def _fresh(self, wanted: Mapping[str, Mapping[tuple[str, ...], Any]]) -> jax.stages.Wrapped:
        """Returns a jitted function that makes the arrays whose shardings are given, and no others."""

        def fresh():
            variables = self._init()
            parts = {
                "params": variables["params"],
                "flax_mutables": train_state_lib.mutable_collections(variables),
            }
            flat = {part: traverse_util.flatten_dict(tree) for part, tree in parts.items()}
            return {part: {name: flat[part][name] for name in names} for part, names in wanted.items()}

        return jax.jit(fresh, out_shardings=wanted)

    def train_step(self, state: TrainState, batch: Mapping[str, np.ndarray]) -> tuple[TrainState, Metrics]:
        """Runs one step. `state` is donated: don't use it again."""
        return self._steps["train"](state, self._partitioner.shard_batch(batch))

    def evaluate(self, state: AnyState, batches: Iterable[Mapping[str, np.ndarray]]) -> dict[str, float]:
        """Returns the metrics over all batches."""
        state = InferenceState.of(state)
        return summarize(
            [self._steps["eval"](state, self._partitioner.shard_batch(batch)) for batch in batches]
        )

    def predict(self, state: AnyState, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Returns the predictions for a batch; see the model's `predict_batch`."""
        return self._steps["predict"](InferenceState.of(state), self._partitioner.shard_batch(batch))

    def lower(self, step: str) -> jax.stages.Lowered:
        """Lowers a step for ahead-of-time compilation, without running it.

        Args:
          step: "train", "eval" or "predict"; or "init", the fresh parameters.
        """
        if step == "init":
            return self._fresh(self._missing({"params": {}, "flax_mutables": {}})).lower()
        sharding = self._partitioner.batch_sharding
        batch = {
            name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
            for name, array in self._batch_shapes.items()
        }
        state = self.abstract_state if step == "train" else InferenceState.of(self.abstract_state)
        return self._steps[step].lower(state, batch)

    def _train(self, state: TrainState, batch: models.Batch) -> tuple[TrainState, Metrics]:
        grads, metrics, mutables = self._gradients(state, batch)
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(grad)) for grad in jax.tree.leaves(grads)))
        metrics["gradient_norm"] = losses.WeightedMean(norm, jnp.ones(()))
        return state.apply_gradient(self._optimizer_def, grads, mutables, self.ema_decay), metrics

    def _gradients(self, state: TrainState, batch: models.Batch) -> tuple[Any, Metrics, Any]:
        """Returns the gradients of the whole batch's loss, its metrics and the new mutable collections."""
        count = self.num_microbatches
        normalizers = self.model.loss_weights(batch)
        differentiate = jax.value_and_grad(self.model.loss_fn, has_aux=True)
        dropout_rng = jax.random.wrap_key_data(self._dropout_key, impl=self._rng_impl)

        def of(part: models.Batch, index: int | jax.Array, mutables: Any):
            # One number for step and part: folding in two numbers mixes up steps and parts in "unsafe_rbg".
            rng = jax.random.fold_in(dropout_rng, state.step * count + index)
            given = {"flax_mutables": mutables} if mutables else {}
            (loss, aux), grads = differentiate(state.params, part, rng, normalizers, **given)
            metrics, mutables = aux if mutables else (aux, mutables)
            # Each part's loss is its share of the whole loss: the shares add up, and their weights to 1.
            metrics["loss"] = losses.WeightedMean(loss, jnp.full((), 1.0 / count))
            return (grads, metrics), mutables

        if count == 1:
            (grads, metrics), mutables = of(batch, 0, state.flax_mutables)
            return grads, metrics, mutables
        # [batch, ...] -> [microbatches, batch / microbatches, ...]; every device keeps its own examples.
        parts = jax.tree.map(
            lambda x: jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1), batch
        )

        def accumulate(carry, part_and_index):
            total, mutables = carry
            part, index = part_and_index
            more, mutables = of(part, index, mutables)
            return (jax.tree.map(jnp.add, total, more), mutables), None

        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(of, jax.tree.map(lambda x: x[0], parts), 0, state.flax_mutables)[0],
        )
        (total, mutables), _ = jax.lax.scan(
            accumulate, (zeros, state.flax_mutables), (parts, jnp.arange(count))
        )
        return *total, mutables


@contextlib.contextmanager
def _explained_refusal() -> Iterator[None]:
    """Turns a ValueError that the network itself raises into a UserError. Any other is a bug, and stays."""
    try:
        yield
    except ValueError as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if pathlib.Path(frame.f_code.co_filename).parent != _NETWORK:
            raise
        raise errors.UserError(f"the model's settings don't fit each other or the data: {error}") from error


def axes_by_param(params_axes: Mapping[str, Any]) -> dict[str, Any]:
    """Turns Flax's axes (`kernel_axes: AxisMetadata`) into `PartitionSpec`s, in the parameters' tree."""
    tree: dict[str, Any] = {}
    for name, value in params_axes.items():
        if isinstance(value, Mapping):
            tree[name] = axes_by_param(value)
        else:
            tree[name.removesuffix("_axes")] = PartitionSpec(*value.names)
    return tree


def summarize(metrics: list[Metrics]) -> dict[str, float]:
    """Fetches the metrics of several steps, which waits for the device, and merges them."""
    fetched = jax.device_get(metrics)
    totals = fetched[0]
    for step in fetched[1:]:
        totals = {name: total.merge(step[name]) for name, total in totals.items()}
    return {name: float(total.compute()) for name, total in totals.items() if total.weight > 0}
