"""Where arrays live: logical axis names -> mesh axes, by rules (T5X's `PjitPartitioner`)."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec

LogicalAxisRules = Sequence[tuple[str, str | None]]

DATA_AXIS, MODEL_AXIS = "data", "model"


def standard_logical_axis_rules(additional_rules: LogicalAxisRules = ()) -> LogicalAxisRules:
    """T5X's rules for data and tensor parallelism; axes of the ViT and the heads are added.

    Args:
      additional_rules: (logical axis, mesh axis or None) put before the standard ones, so they win.
    """
    return (
        *additional_rules,
        ("batch", DATA_AXIS),
        ("vocab", MODEL_AXIS),
        ("mlp", MODEL_AXIS),
        ("heads", MODEL_AXIS),
        ("joined_kv", MODEL_AXIS),
    )


@dataclasses.dataclass(frozen=True)
class DataLayout:
    """Which part of a batch this process reads (T5X's name).

    Attributes:
      batch_size: of all processes together.
      shard_id, num_shards: this process's part.
    """

    batch_size: int
    shard_id: int
    num_shards: int


def _simulate_cpu_devices(count: int) -> None:
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        logging.info("jax runs already, with %d devices; %d were asked for", jax.device_count(), count)


class PjitPartitioner:
    """Lays a program out over a mesh of data x model devices.

    Attributes:
      mesh: all devices, axes "data" and "model".
    """

    def __init__(
        self,
        num_partitions: int = 1,
        logical_axis_rules: LogicalAxisRules | None = None,
        num_cpu_devices: int | None = None,
    ):
        """Args:
          num_partitions: devices on the model axis; the rest are data-parallel.
          logical_axis_rules: default `standard_logical_axis_rules()`.
          num_cpu_devices: where there is no accelerator, simulate this many devices. Works before
            the first jax computation only.

        Raises:
          ValueError: the devices can't be split so.
        """
        if num_cpu_devices:
            _simulate_cpu_devices(num_cpu_devices)
        devices = np.asarray(jax.devices())
        if devices.size % num_partitions:
            raise ValueError(f"{devices.size} devices can't be split into model groups of {num_partitions}")
        self.mesh = Mesh(devices.reshape(-1, num_partitions), (DATA_AXIS, MODEL_AXIS))
        self.rules = standard_logical_axis_rules() if logical_axis_rules is None else logical_axis_rules
        logging.info("mesh: %s of %s", dict(self.mesh.shape), devices.flat[0].device_kind)

    def get_data_layout(self, batch_size: int) -> DataLayout:
        """How a batch is split over processes.

        Raises:
          ValueError: the batch doesn't split evenly over the data axis.
        """
        shards = self.mesh.shape[DATA_AXIS]
        if batch_size % shards:
            raise ValueError(f"batch size {batch_size} doesn't split over {shards} data-parallel devices")
        return DataLayout(batch_size, jax.process_index(), jax.process_count())

    def sharding(self, logical_axes: Sequence[str | None]) -> NamedSharding:
        """Logical axes of one array -> its sharding. A mesh axis is used once: the first axis wins."""
        rules: dict[str, str | None] = {}
        for name, mesh_axis in self.rules:
            rules.setdefault(name, mesh_axis)
        spec: list[str | None] = []
        for name in logical_axes:
            mesh_axis = rules.get(name)
            spec.append(None if mesh_axis in spec else mesh_axis)
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    def state_sharding(self, axes_tree: Any) -> Any:
        """A tree of `PartitionSpec`s of logical axis names -> a tree of shardings."""
        return jax.tree.map(self.sharding, axes_tree, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))

    @property
    def batch_sharding(self) -> NamedSharding:
        """Every array of a batch is split along its first axis."""
        return self.sharding(("batch",))

    @property
    def replicated(self) -> NamedSharding:
        return self.sharding(())

    def shard_batch(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """This process's part of a batch, as numpy -> global arrays on the devices."""
        return {
            name: jax.make_array_from_process_local_data(self.batch_sharding, np.asarray(value))
            for name, value in batch.items()
        }

    def partition(
        self, fn: Callable, in_shardings: Any, out_shardings: Any, donate_argnums: tuple[int, ...] = ()
    ) -> Callable:
        """Compiles `fn` for the mesh."""
        return jax.jit(
            fn, in_shardings=in_shardings, out_shardings=out_shardings, donate_argnums=donate_argnums
        )
