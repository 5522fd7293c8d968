import io
import struct
import sys
import tracemalloc

import pytest
import tensorflow as tf

from richhf_jax import errors
from richhf_jax.datasets import tfrecord
from tests.inputs.mutation import mutants

RECORDS = [b"", b"12345", b"x" * 3_000_000, b"the last"]


def file_of(contents):
    file = io.BytesIO()
    for content in contents:
        tfrecord.write(file, content)
    return file.getvalue()


def reasons(data):
    """Reads records; reasons take the place of broken ones."""
    found = tfrecord.read(io.BytesIO(data))
    return [str(record) if isinstance(record, tfrecord.RecordError) else record for record in found]


def test_tensorflow_reads_what_is_written(tmp_path):
    (tmp_path / "a.tfrecord").write_bytes(file_of(RECORDS))
    dataset = tf.data.TFRecordDataset(str(tmp_path / "a.tfrecord"))
    assert list(dataset.as_numpy_iterator()) == RECORDS


def test_what_tensorflow_writes_is_read(tmp_path):
    path = tmp_path / "a.tfrecord"
    with tf.io.TFRecordWriter(str(path)) as writer:
        for record in RECORDS:
            writer.write(record)
    assert path.read_bytes() == file_of(RECORDS)
    assert reasons(path.read_bytes()) == RECORDS
    assert reasons(b"") == []


@pytest.mark.parametrize("missing", [1, 4, 8, 12, 16, 23])
def test_a_torn_file_keeps_the_records_before(missing):
    *whole, reason = reasons(file_of(RECORDS)[:-missing])
    assert whole == RECORDS[:-1]
    assert reason == "cut off: the file ends within this record"


def test_a_garbled_record_is_left_out():
    data = bytearray(file_of(RECORDS))
    data[16 + 12] ^= 1
    assert reasons(data) == [b"", "garbled: its checksum is wrong", *RECORDS[2:]]


def test_behind_a_garbled_length_nothing_is_read():
    data = bytearray(file_of(RECORDS))
    data[16] ^= 1
    first, reason = reasons(data)
    assert first == b""
    assert "rest of the file" in reason


def test_a_length_that_claims_more_than_memory():
    length = struct.pack("<Q", 1 << 60)
    data = file_of([b"first"]) + length + tfrecord._checksum(length) + file_of(RECORDS)
    tracemalloc.start()
    try:
        first, reason = reasons(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert first == b"first"
    assert reason == f"it claims {1 << 60} bytes; this record and the rest of the file are lost"
    assert peak < 1 << 20


def test_thousands_of_damaged_files_give_only_what_was_written():
    contents = [b"%d" % number * 40 for number in range(5)]
    whole = file_of(contents)
    good = bad = 0
    for data in mutants([whole], 10_000):
        found = list(tfrecord.read(io.BytesIO(data)))
        for number, record in enumerate(found):
            if isinstance(record, tfrecord.RestLostError):
                assert number == len(found) - 1
            if isinstance(record, tfrecord.RecordError):
                bad += 1
            else:
                good += 1
                assert record in contents
    assert min(good, bad) > 5_000


def test_examples_are_tensorflows():
    values = {"text": "猫", "number": 0.5, "image": b"\xff\0"}
    data = tfrecord.serialize_example(values)
    features = tf.train.Example.FromString(data).features.feature
    assert features["text"].bytes_list.value == ["猫".encode()]
    assert features["number"].float_list.value == [0.5]
    assert features["image"].bytes_list.value == [b"\xff\0"]
    assert data == tfrecord.serialize_example(dict(reversed(values.items())))
    assert tfrecord.parse_example(data)["number"].float_list.value == [0.5]
    with pytest.raises(tfrecord.RecordError, match="no tf.train.Example"):
        tfrecord.parse_example(b"\xff\xff")


def test_examples_need_tfds(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets.proto", None)
    tfrecord._example_class.cache_clear()
    with pytest.raises(errors.UserError, match="pip install tensorflow-datasets"):
        tfrecord.serialize_example({"a": 1.0})
    assert file_of(RECORDS)
