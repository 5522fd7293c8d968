import numpy as np
import pytest
import tensorflow as tf

from richhf_jax.datasets import records


def write(path, contents):
    with tf.io.TFRecordWriter(str(path)) as writer:
        for content in contents:
            writer.write(content)
    return str(path)


def test_record_offsets(tmp_path):
    # Each record has 12 bytes before and 4 bytes behind its data.
    path = write(tmp_path / "a.tfrecord", [b"", b"12345", b"x" * 100])
    np.testing.assert_array_equal(records.record_offsets(path), [0, 16, 37])


def test_no_records(tmp_path):
    assert records.record_offsets(write(tmp_path / "a.tfrecord", [])).tolist() == []


@pytest.mark.parametrize("kept", [140, 50, 40])
def test_torn_file_is_named(tmp_path, kept):
    path = tmp_path / "a.tfrecord"
    write(path, [b"", b"12345", b"x" * 100])
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"a\.tfrecord: record 2 is cut off"):
        records.record_offsets(str(path))


def test_locate_skips_and_takes(tmp_path):
    a = write(tmp_path / "a.tfrecord", [b"1234"] * 3)
    b = write(tmp_path / "b.tfrecord", [b""] * 4)
    numbers, offsets = records.locate([(a, 1, 2), (b, 0, 1)])
    np.testing.assert_array_equal(numbers, [0, 0, 1])
    np.testing.assert_array_equal(offsets, [20, 40, 0])
