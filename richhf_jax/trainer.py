"""The compiled steps: gradients, microbatches, metrics. Nothing in here waits for the device."""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import PartitionSpec

from richhf_jax import losses, models, partitioning
from richhf_jax import train_state as train_state_lib

TrainState = train_state_lib.TrainState
Metrics = models.Metrics


class Trainer:
    """Runs a model's train, eval and predict steps on a partitioner's mesh.

    Attributes:
      abstract_state: the training state as `ShapeDtypeStruct`s with shardings.
    """

    def __init__(
        self,
        model: models.BaseModel,
        partitioner: partitioning.PjitPartitioner,
        batch_shapes: Mapping[str, jax.ShapeDtypeStruct],
        random_seed: int = 0,
        use_hardware_rng: bool = False,
        num_microbatches: int | None = None,
    ):
        """Args:
          batch_shapes: of a whole batch.
          random_seed: of initial parameters and dropout.
          use_hardware_rng: draw random numbers with XLA's RngBitGenerator ("unsafe_rbg"). Dropout is faster
            on TPU and programs compile faster; but the numbers depend on the mesh and the platform.
          num_microbatches: split each batch into so many parts, one after the other, and add up the
            gradients: the same step with less memory.

        Raises:
          ValueError: the batch doesn't split so.
        """
        batch_size = batch_shapes["image"].shape[0]
        if num_microbatches and batch_size % num_microbatches:
            raise ValueError(f"batch size {batch_size} doesn't split into {num_microbatches} microbatches")
        self._model = model
        self._partitioner = partitioner
        self._num_microbatches = num_microbatches or 1
        root_rng = jax.random.key(random_seed, impl="unsafe_rbg" if use_hardware_rng else "threefry2x32")
        init_rng, self._dropout_rng = jax.random.split(root_rng)
        self._batch_shapes = batch_shapes
        shapes = {name: array.shape for name, array in batch_shapes.items()}
        self._init = functools.partial(model.get_initial_variables, init_rng, shapes)
        variables = jax.eval_shape(self._init)
        create = functools.partial(TrainState.create, model.optimizer_def)
        abstract_state = jax.eval_shape(create, variables["params"])
        params_axes = axes_by_param(variables["params_axes"])
        axes = train_state_lib.logical_axes(model.optimizer_def, params_axes, abstract_state)
        self._state_sharding = partitioner.state_sharding(axes, abstract_state)
        self.abstract_state = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            abstract_state,
            self._state_sharding,
        )
        state, batch, everywhere = self._state_sharding, partitioner.batch_sharding, partitioner.replicated
        self._steps = {
            "train": partitioner.partition(
                self._train, (state, batch), (state, everywhere), donate_argnums=(0,)
            ),
            "eval": partitioner.partition(
                lambda params, batch: model.eval_fn(params, batch)[1], (state.params, batch), everywhere
            ),
            "predict": partitioner.partition(model.predict_batch, (state.params, batch), everywhere),
        }

    def init_state(self, given: Mapping[tuple[str, ...], jax.Array] | None = None) -> TrainState:
        """A state at step 0, made where it lives.

        Args:
          given: parameters by name, in place of fresh ones (which then cost nothing).
        """
        given = given or {}
        shardings = traverse_util.flatten_dict(self._state_sharding.params)
        wanted = {name: sharding for name, sharding in shardings.items() if name not in given}

        def fresh():
            params = traverse_util.flatten_dict(self._init()["params"])
            return {name: params[name] for name in wanted}

        made = jax.jit(fresh, out_shardings=wanted)() if wanted else {}
        create = functools.partial(TrainState.create, self._model.optimizer_def)
        params = traverse_util.unflatten_dict({**given, **made})
        return jax.jit(create, out_shardings=self._state_sharding)(params)

    def train_step(self, state: TrainState, batch: Mapping[str, np.ndarray]) -> tuple[TrainState, Metrics]:
        """One step. `state` is donated: don't use it again."""
        return self._steps["train"](state, self._partitioner.shard_batch(batch))

    def evaluate(self, params: Any, batches: Iterable[Mapping[str, np.ndarray]]) -> dict[str, float]:
        """Metrics over all batches."""
        return summarize(
            [self._steps["eval"](params, self._partitioner.shard_batch(batch)) for batch in batches]
        )

    def predict(self, params: Any, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Predictions for a batch; see the model's `predict_batch`."""
        return self._steps["predict"](params, self._partitioner.shard_batch(batch))

    def lower(self, step: str) -> jax.stages.Lowered:
        """A step, "train", "eval" or "predict", for ahead-of-time compilation: nothing is computed."""
        sharding = self._partitioner.batch_sharding
        batch = {
            name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
            for name, array in self._batch_shapes.items()
        }
        state = self.abstract_state if step == "train" else self.abstract_state.params
        return self._steps[step].lower(state, batch)

    def _train(self, state: TrainState, batch: models.Batch) -> tuple[TrainState, Metrics]:
        grads, metrics = self._gradients(state.params, batch, state.step)
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(grad)) for grad in jax.tree.leaves(grads)))
        metrics["gradient_norm"] = losses.WeightedMean(norm, jnp.ones(()))
        return state.apply_gradient(self._model.optimizer_def, grads), metrics

    def _gradients(self, params: Any, batch: models.Batch, step: jax.Array) -> tuple[Any, Metrics]:
        """Gradients of the whole batch's loss, and its metrics."""
        count = self._num_microbatches
        normalizers = self._model.loss_weights(batch)
        differentiate = jax.value_and_grad(self._model.loss_fn, has_aux=True)

        def of(part: models.Batch, index: int | jax.Array):
            # One number for both: folding twice in "unsafe_rbg" mixes up steps and parts.
            rng = jax.random.fold_in(self._dropout_rng, step * count + index)
            (loss, metrics), grads = differentiate(params, part, rng, normalizers)
            # Each part's loss is its share of the whole, so shares add up, and weigh 1 together.
            metrics["loss"] = losses.WeightedMean(loss, jnp.full((), 1.0 / count))
            return grads, metrics

        if count == 1:
            return of(batch, 0)
        # [batch, ...] -> [microbatches, batch / microbatches, ...]; every device keeps its own examples.
        parts = jax.tree.map(
            lambda x: jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1), batch
        )

        def accumulate(carry, part_and_index):
            return jax.tree.map(jnp.add, carry, of(*part_and_index)), None

        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(of, jax.tree.map(lambda x: x[0], parts), 0),
        )
        total, _ = jax.lax.scan(accumulate, zeros, (parts, jnp.arange(count)))
        return total


def axes_by_param(params_axes: Mapping[str, Any]) -> dict[str, Any]:
    """Flax's `params_axes` (`kernel_axes: AxisMetadata`) -> a tree like `params`, of `PartitionSpec`s."""
    tree: dict[str, Any] = {}
    for name, value in params_axes.items():
        if isinstance(value, Mapping):
            tree[name] = axes_by_param(value)
        else:
            tree[name.removesuffix("_axes")] = PartitionSpec(*value.names)
    return tree


def summarize(metrics: list[Metrics]) -> dict[str, float]:
    """Merges the metrics of several steps, and fetches them: the one place that waits for the device."""
    fetched = jax.device_get(metrics)
    totals = fetched[0]
    for step in fetched[1:]:
        totals = {name: total.merge(step[name]) for name, total in totals.items()}
    return {name: float(total.compute()) for name, total in totals.items() if total.weight > 0}
