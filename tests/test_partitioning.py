import dataclasses
import pathlib

import gin
import jax
import numpy as np
import pytest
from flax.linen import partitioning as flax_partitioning
from jax.sharding import AxisType, PartitionSpec

from richhf_jax import gin_utils, partitioning

BATCH = ("replica", "data")
GIN_FILES = sorted((pathlib.Path(__file__).parents[1] / "gin/partitioning").glob("*.gin"))


def partitioner(**kwargs):
    rules = partitioning.standard_logical_axis_rules(kwargs.pop("parameter_partitioning_dims", 1))
    return partitioning.PjitPartitioner(logical_axis_rules=rules, **kwargs)


def test_batches_are_split_and_other_axes_follow_the_rules():
    found = partitioner()
    assert found.mesh.shape == {"replica": 1, "data": 2, "model": 1}
    assert found.sharding(("batch", "length")).spec == PartitionSpec(BATCH, None)
    assert found.sharding(("embed", "mlp")).spec == PartitionSpec(None, "model")


def test_fully_sharded_parameters_are_split_over_the_data_axis_and_activations_are_not():
    found = partitioner(parameter_partitioning_dims=2)
    assert found.sharding(("embed", "mlp")).spec == PartitionSpec("data", "model")
    assert found.sharding(("batch", "length", "embed")).spec == PartitionSpec(BATCH, None, None)
    # The first dense layer's inputs go to the parts of its kernel.
    assert found.sharding(("dense_batch", "dense_features")).spec == PartitionSpec("replica", "data")
    assert partitioner().sharding(("dense_batch", "dense_features")).spec == PartitionSpec(BATCH, None)


def test_a_mesh_axis_is_used_once():
    assert partitioner(num_partitions=2).sharding(("heads", "mlp")).spec == PartitionSpec(None, "model")


def test_additional_rules_win():
    rules = partitioning.standard_logical_axis_rules(additional_rules=[("embed", "data"), ("mlp", None)])
    found = partitioning.PjitPartitioner(logical_axis_rules=rules)
    assert found.sharding(("embed", "mlp")).spec == PartitionSpec("data", None)


def test_other_numbers_of_parameter_partitioning_dims_are_refused():
    with pytest.raises(ValueError, match="must be 1 or 2, got 3"):
        partitioning.standard_logical_axis_rules(3)


def test_a_batch_reaches_the_devices_in_order():
    batch = {"x": np.arange(8).reshape(4, 2)}
    array = partitioner().shard_batch(batch)["x"]
    np.testing.assert_array_equal(array, batch["x"])
    assert [shard.data.shape for shard in array.addressable_shards] == [(2, 2), (2, 2)]


def test_impossible_layouts_are_refused_with_the_numbers():
    with pytest.raises(partitioning.PartitioningError, match="batch size 5 .* 2 data-parallel"):
        partitioner().get_data_layout(5)
    with pytest.raises(partitioning.PartitioningError, match="2 devices .* groups of 3"):
        partitioner(num_partitions=3)
    with pytest.raises(partitioning.PartitioningError, match=r"\(1, 3, 1\) .* takes 3 devices; there are 2"):
        partitioner(ici_mesh_shape=(1, 3, 1))
    with pytest.raises(partitioning.PartitioningError, match="three numbers .* got \\(2, 1\\)"):
        partitioner(ici_mesh_shape=(2, 1))


def test_an_array_that_cannot_be_split_is_named():
    axes = {"kernel": PartitionSpec("embed", "mlp")}
    array = {"kernel": jax.ShapeDtypeStruct((3, 4), np.float32)}
    with pytest.raises(partitioning.PartitioningError, match=r"kernel of shape \(3, 4\) .* 'data': 2"):
        partitioner(parameter_partitioning_dims=2).state_sharding(axes, array)
    found = partitioner().state_sharding(axes, array)["kernel"]
    assert found.shard_shape((3, 4)) == (3, 4)


def test_the_constraints_of_a_network_hold():
    def network(x):
        return flax_partitioning.with_sharding_constraint(2 * x, ("dense_batch", "dense_features"))

    found = partitioner(parameter_partitioning_dims=2)
    step = found.partition(network, found.batch_sharding, None)
    array = step(np.ones((4, 6), np.float32))
    assert [shard.data.shape for shard in array.addressable_shards] == [(4, 3), (4, 3)]
    assert step.lower(jax.ShapeDtypeStruct((4, 6), np.float32)).out_info.shape == (4, 6)


def test_compiler_options_reach_xla_but_for_those_of_another_platform():
    def compiled(**options):
        step = partitioner(compiler_options=options).partition(lambda x: x + 1, None, None)
        return step(np.ones(2))

    elsewhere = {"xla_tpu_scoped_vmem_limit_kib": "12288", "xla_gpu_no_such_option": True}
    np.testing.assert_array_equal(compiled(**elsewhere), [2, 2])
    np.testing.assert_array_equal(compiled(xla_cpu_enable_fast_math=False), [2, 2])
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
        compiled(no_such_option="1")


@pytest.mark.parametrize("path", GIN_FILES, ids=lambda path: path.stem)
def test_every_gin_file_goes_with_an_experiment(path):
    gin.clear_config()
    files = ["experiments/rich_hf_18k.gin", f"partitioning/{path.name}"]
    gin_utils.parse_gin_flags(gin_utils.DEFAULT_SEARCH_PATHS, files, ["MODEL_DIR = 'none'"])
    if path.stem.startswith(("v4", "v5", "v6")):
        assert gin.query_parameter("rahf.HeadsConfig.row_strips") == 8
        assert gin.query_parameter("standard_logical_axis_rules.parameter_partitioning_dims") == 2


def test_a_process_takes_the_rows_of_its_devices(monkeypatch):
    np.testing.assert_array_equal(partitioner().own_rows(6), range(6))
    np.testing.assert_array_equal(partitioner(num_partitions=2).own_rows(6), range(6))

    class OfTwoDevices:
        """Returns the third and the first quarter of a batch, in the mesh's order."""

        def addressable_devices_indices_map(self, shape):
            assert shape == (8,)
            return {"a": (slice(4, 6),), "b": (slice(0, 2),)}

    monkeypatch.setattr(partitioning.PjitPartitioner, "batch_sharding", OfTwoDevices())
    np.testing.assert_array_equal(partitioner().own_rows(8), [0, 1, 4, 5])


@dataclasses.dataclass(frozen=True)
class Device:
    """The attributes of a device that `make_mesh` reads."""

    id: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "some GPU"
    process_index: int = 0


def test_each_slice_is_a_replica():
    mesh = partitioning.make_mesh([Device(i, slice_index=i // 4) for i in range(8)], num_partitions=2)
    assert mesh.shape == {"replica": 2, "data": 2, "model": 2}
    assert set(mesh.axis_types) == {AxisType.Auto}
    for replica in range(2):
        assert {d.slice_index for d in mesh.devices[replica].flat} == {replica}


def test_slices_must_fit_the_mesh():
    devices = [Device(i, slice_index=i // 4) for i in range(8)]
    with pytest.raises(partitioning.PartitioningError, match=r"dcn_mesh_shape \(4, 1, 1\) .* 2 slices"):
        partitioning.make_mesh(devices, ici_mesh_shape=(1, 2, 1), dcn_mesh_shape=(4, 1, 1))


def test_asking_for_cpu_devices_too_late_keeps_those_there_are():
    count = jax.device_count()
    assert partitioner(num_cpu_devices=count + 2).mesh.size == count
