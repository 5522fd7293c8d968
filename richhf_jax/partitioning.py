"""Placement of arrays: rules map logical axis names to mesh axes (T5X's `PjitPartitioner`).

The mesh is replica x data x model, as T5X's is for several slices:

    replica   slices, joined only by a slow network (DCN), or groups of chips; each holds the whole state
    data      splits the batch, and with `parameter_partitioning_dims=2` also parameters and optimizer state
    model     splits each layer (tensor parallelism)

The batch is split over replica x data.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from flax.linen import partitioning as flax_partitioning
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from richhf_jax import device_memory, errors

# A jax.Device. jaxlib has no annotations, so type checkers don't know the class.
Device = Any
LogicalAxisRules = Sequence[tuple[str, str | tuple[str, ...] | None]]

MESH_AXES = REPLICA_AXIS, DATA_AXIS, MODEL_AXIS = ("replica", "data", "model")
_BATCH_AXES = (REPLICA_AXIS, DATA_AXIS)


class PartitioningError(errors.UserError):
    """A mesh or a batch that doesn't fit the devices."""


def standard_logical_axis_rules(
    parameter_partitioning_dims: int = 1, additional_rules: LogicalAxisRules = ()
) -> LogicalAxisRules:
    """Returns T5X's rules and those for the axes that the ViT and the heads add.

    Where two rules concern one logical axis, or one mesh axis, the first that can be applied wins.

    Args:
      parameter_partitioning_dims: 1: only tensor parallelism splits parameters and optimizer state. 2: the
        data axis splits them, too ("fully sharded").
      additional_rules: (logical axis, mesh axis or None) put before the standard ones, so they win.

    Raises:
      ValueError: `parameter_partitioning_dims` is neither 1 nor 2.
    """
    if parameter_partitioning_dims not in (1, 2):
        raise ValueError(f"parameter_partitioning_dims must be 1 or 2, got {parameter_partitioning_dims}")
    rules = [
        ("batch", _BATCH_AXES),
        ("vocab", MODEL_AXIS),
        ("mlp", MODEL_AXIS),
        ("heads", MODEL_AXIS),
        ("joined_kv", MODEL_AXIS),
    ]
    if parameter_partitioning_dims == 2:
        # A score head's first dense layer has 134 M parameters, but only 65,536 inputs an image. So where the
        # data axis splits the kernel, the inputs travel to its parts, and the kernel stays where it is.
        rules += [("embed", DATA_AXIS), ("dense_features", DATA_AXIS), ("dense_batch", REPLICA_AXIS)]
    rules += [("dense_batch", _BATCH_AXES)]
    replicated = (
        "embed", "kv", "length", "layers", "relpos_buckets", "dense_features", "height", "width",
        "image_channels",
    )  # fmt: skip
    return (*additional_rules, *rules, *((name, None) for name in replicated))


@dataclasses.dataclass(frozen=True)
class DataLayout:
    """The part of a batch that this process reads (T5X's name).

    Attributes:
      batch_size: examples of all processes together.
      shard_id, num_shards: this process reads part `shard_id` of `num_shards`.
    """

    batch_size: int
    shard_id: int
    num_shards: int


def _simulate_cpu_devices(count: int) -> None:
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        logging.info("jax runs already, with %d devices; %d were asked for", jax.device_count(), count)


def _num_slices(devices: Sequence[Device]) -> int:
    """Counts the TPU slices, or GPU machines, among the devices."""
    return len({getattr(device, "slice_index", 0) or 0 for device in devices})


def make_mesh(
    devices: Sequence[Device],
    num_partitions: int = 1,
    ici_mesh_shape: Sequence[int] | None = None,
    dcn_mesh_shape: Sequence[int] | None = None,
) -> Mesh:
    """Makes a mesh of replica x data x model in which neighbours are neighbours in the hardware, too.

    Args:
      devices: all devices of the mesh.
      num_partitions: devices on the model axis; each slice is a replica, and its other devices make the data
        axis. Ignored where `ici_mesh_shape` is given.
      ici_mesh_shape: (replica, data, model) within a slice.
      dcn_mesh_shape: (replica, data, model) over slices; default: each slice is a replica.

    Raises:
      PartitioningError: the devices don't fill a mesh of this shape.
    """
    slices = _num_slices(devices)
    if ici_mesh_shape is None:
        data, remainder = divmod(len(devices), slices * num_partitions)
        if remainder:
            raise PartitioningError(
                f"{len(devices)} devices in {slices} slice(s) can't be split into model groups of"
                f" {num_partitions}: num_partitions must divide the {len(devices) // slices} of a slice"
            )
        ici_mesh_shape = (1, data, num_partitions)
    dcn_mesh_shape = dcn_mesh_shape or (slices, 1, 1)
    for name, shape in (("ici_mesh_shape", ici_mesh_shape), ("dcn_mesh_shape", dcn_mesh_shape)):
        if len(shape) != len(MESH_AXES) or any(side < 1 for side in shape):
            raise PartitioningError(f"{name} must be three numbers {MESH_AXES} above 0, got {tuple(shape)}")
    if math.prod(ici_mesh_shape) * math.prod(dcn_mesh_shape) != len(devices):
        raise PartitioningError(
            f"ici_mesh_shape {tuple(ici_mesh_shape)} within a slice, times dcn_mesh_shape"
            f" {tuple(dcn_mesh_shape)} over slices, takes"
            f" {math.prod(ici_mesh_shape) * math.prod(dcn_mesh_shape)} devices; there are {len(devices)}"
        )
    if slices > 1:
        if math.prod(dcn_mesh_shape) != slices:
            raise PartitioningError(f"dcn_mesh_shape {tuple(dcn_mesh_shape)} doesn't fit {slices} slices")
        grid = mesh_utils.create_hybrid_device_mesh(
            ici_mesh_shape, dcn_mesh_shape, devices, allow_split_physical_axes=True
        )
    else:
        shape = [dcn * ici for dcn, ici in zip(dcn_mesh_shape, ici_mesh_shape, strict=True)]
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    # Auto: the compiler splits what lies between arrays of a given sharding.
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


class PjitPartitioner:
    """Distributes a program over a mesh.

    Attributes:
      mesh: all devices, axes "replica", "data" and "model".
    """

    def __init__(
        self,
        num_partitions: int = 1,
        logical_axis_rules: LogicalAxisRules | None = None,
        ici_mesh_shape: Sequence[int] | None = None,
        dcn_mesh_shape: Sequence[int] | None = None,
        num_cpu_devices: int | None = None,
        devices: Sequence[Device] | None = None,
        compiler_options: Mapping[str, str | bool] | None = None,
    ):
        """Makes the mesh.

        Args:
          num_partitions, ici_mesh_shape, dcn_mesh_shape: see `make_mesh`.
          logical_axis_rules: default `standard_logical_axis_rules()`.
          num_cpu_devices: simulates this many devices on a CPU. It must be set before the first computation.
          devices: default all of this job's. To compile for hardware that isn't here, those of its topology.
          compiler_options: XLA's flags for all steps; switches are True or False. Those called xla_tpu_...
            are used on TPUs alone, and those called xla_gpu_... on GPUs alone.

        Raises:
          PartitioningError: see `make_mesh`.
        """
        if num_cpu_devices and devices is None:
            _simulate_cpu_devices(num_cpu_devices)
        devices = jax.devices() if devices is None else list(devices)
        self.mesh = make_mesh(devices, num_partitions, ici_mesh_shape, dcn_mesh_shape)
        self.rules = standard_logical_axis_rules() if logical_axis_rules is None else logical_axis_rules
        others = tuple(f"xla_{platform}_" for platform in ("gpu", "tpu") if platform != devices[0].platform)
        self._compiler_options = {
            name: value for name, value in (compiler_options or {}).items() if not name.startswith(others)
        }
        logging.info("mesh: %s of %s", dict(self.mesh.shape), devices[0].device_kind)

    @property
    def num_data_shards(self) -> int:
        """Number of parts that a batch is split into: one for each group of `num_partitions` devices."""
        return self.mesh.shape[REPLICA_AXIS] * self.mesh.shape[DATA_AXIS]

    def get_data_layout(self, batch_size: int) -> DataLayout:
        """Splits a batch over processes. Processes that share a model group read the same part.

        Raises:
          PartitioningError: the batch doesn't split evenly over the data-parallel devices.
        """
        shards = self.num_data_shards
        if batch_size % shards:
            raise PartitioningError(
                f"batch size {batch_size} doesn't split over {shards} data-parallel devices"
                f" (mesh {dict(self.mesh.shape)}): take a multiple of {shards}"
            )
        rows: dict[int, set[int]] = {}  # process -> parts of the batch on its devices
        for device, index in self.batch_sharding.devices_indices_map((shards,)).items():
            rows.setdefault(device.process_index, set()).add(index[0].start or 0)
        parts = sorted({tuple(sorted(of_process)) for of_process in rows.values()})
        if sum(map(len, parts)) != shards or len(set(map(len, parts))) > 1:
            raise PartitioningError(
                f"mesh {dict(self.mesh.shape)}: the parts of a batch on {len(rows)} processes overlap without"
                " being equal; choose num_partitions to divide a process's devices, or be a multiple of them"
            )
        mine = tuple(sorted(rows[jax.process_index()]))
        return DataLayout(batch_size, parts.index(mine), len(parts))

    def own_rows(self, batch_size: int) -> np.ndarray:
        """Returns the rows of a whole batch that this process's devices take: int [rows], ascending.

        They have gaps where the process's devices lie apart in the mesh.
        """
        taken = self.batch_sharding.addressable_devices_indices_map((batch_size,)).values()
        return np.concatenate(
            [np.arange(*part) for part in sorted({i[0].indices(batch_size) for i in taken if i})]
        )

    def sharding(self, logical_axes: Sequence[str | None]) -> NamedSharding:
        """Returns the sharding of an array with these logical axes."""
        spec = flax_partitioning.logical_to_mesh_axes(tuple(logical_axes), self.rules)
        return NamedSharding(self.mesh, spec or PartitionSpec())

    def state_sharding(self, axes_tree: Any, abstract_state: Any) -> Any:
        """Returns the sharding of each array of a state.

        Args:
          axes_tree: a tree of `PartitionSpec`s of logical axis names.
          abstract_state: a tree like it, of arrays or `ShapeDtypeStruct`s.

        Returns:
          A tree of shardings like `axes_tree`.

        Raises:
          PartitioningError: an array doesn't split evenly.
        """

        def place(path, axes, leaf):
            sharding = self.sharding(axes)
            try:
                sharding.shard_shape(leaf.shape)
            except ValueError as error:
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                raise PartitioningError(
                    f"{name} of shape {leaf.shape} can't be split as {sharding.spec} over the mesh"
                    f" {dict(self.mesh.shape)}: make that mesh axis smaller (num_partitions, ici_mesh_shape)"
                ) from error
            return sharding

        return jax.tree_util.tree_map_with_path(
            place, axes_tree, abstract_state, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)
        )

    @property
    def batch_sharding(self) -> NamedSharding:
        """Sharding of every array of a batch: split along its first axis."""
        return self.sharding(("batch",))

    @property
    def replicated(self) -> NamedSharding:
        return self.sharding(())

    def shard_batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Moves this process's part of a batch (numpy) to its devices and returns the global arrays."""
        # With several processes, JAX counts this move among those that nobody asked for.
        with jax.transfer_guard_host_to_device("allow"):
            return {
                name: jax.make_array_from_process_local_data(self.batch_sharding, np.asarray(value))
                for name, value in batch.items()
            }

    def partition(
        self, fn: Callable, in_shardings: Any, out_shardings: Any, donate_argnums: tuple[int, ...] = ()
    ) -> "PartitionedFn":
        """Returns `fn`, to be compiled for the mesh at its first call."""
        jitted = jax.jit(
            fn,
            in_shardings=in_shardings,
            out_shardings=out_shardings,
            donate_argnums=donate_argnums,
            compiler_options=self._compiler_options,
        )
        return PartitionedFn(jitted, self._context, self.mesh)

    @contextlib.contextmanager
    def _context(self) -> Iterator[None]:
        """Applies the mesh and the rules to the sharding constraints inside the network."""
        with jax.set_mesh(self.mesh), flax_partitioning.axis_rules(self.rules):
            yield


class PartitionedFn:
    """A jitted function that is always traced with its mesh and its rules.

    A call with a batch of new shapes, which is the last argument, first checks that the devices have the
    memory for it.
    """

    def __init__(self, jitted: Any, context: Callable, mesh: Mesh):
        self._jitted = jitted
        self._context = context
        self._mesh = mesh
        self._checked: set[tuple] = set()

    def __call__(self, *args):
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(args[-1]))
        if shapes not in self._checked:
            there = device_memory.limit(self._mesh.local_devices)
            if there is not None:
                # JAX keeps the program, so the call below doesn't compile it again.
                compiled = self.lower(*args).compile()
                device_memory.check(compiled, self._mesh.local_devices[0], there)
            self._checked.add(shapes)
        with self._context():
            return self._jitted(*args)

    def lower(self, *args) -> jax.stages.Lowered:
        """Lowers the function for `.compile()` ahead of time; arguments may be `ShapeDtypeStruct`s."""
        with self._context():
            return self._jitted.lower(*args)
