import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from richhf_jax import partitioning


def test_batches_are_split_and_other_axes_follow_the_rules():
    partitioner = partitioning.PjitPartitioner()
    assert partitioner.mesh.shape == {"replica": 1, "data": 2, "model": 1}
    assert partitioner.sharding(("batch", "length")).spec == PartitionSpec(("replica", "data"), None)
    assert partitioner.sharding(("embed", "mlp")).spec == PartitionSpec(None, "model")


def test_a_mesh_axis_is_used_once():
    partitioner = partitioning.PjitPartitioner(num_partitions=2)
    assert partitioner.sharding(("heads", "mlp")).spec == PartitionSpec("model", None)


def test_additional_rules_win():
    rules = partitioning.standard_logical_axis_rules([("embed", "data"), ("mlp", None)])
    partitioner = partitioning.PjitPartitioner(logical_axis_rules=rules)
    assert partitioner.sharding(("embed", "mlp")).spec == PartitionSpec("data", None)


def test_a_batch_reaches_the_devices_in_order():
    batch = {"x": np.arange(8).reshape(4, 2)}
    array = partitioning.PjitPartitioner().shard_batch(batch)["x"]
    np.testing.assert_array_equal(array, batch["x"])
    assert [shard.data.shape for shard in array.addressable_shards] == [(2, 2), (2, 2)]


def test_impossible_layouts_are_refused_with_the_numbers():
    with pytest.raises(ValueError, match="batch size 5 .* 2 data-parallel"):
        partitioning.PjitPartitioner().get_data_layout(5)
    with pytest.raises(ValueError, match="2 devices .* groups of 3"):
        partitioning.PjitPartitioner(num_partitions=3)


def test_asking_for_cpu_devices_too_late_keeps_those_there_are():
    count = jax.device_count()
    assert partitioning.PjitPartitioner(num_cpu_devices=count + 2).mesh.size == count
