import pathlib

import numpy as np
import pytest
import tensorflow as tf
from absl import logging
from etils import epath

from richhf_jax.datasets import records
from tests.inputs.mutation import mutants


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


def test_a_garbled_length_is_named(tmp_path):
    path = tmp_path / "a.tfrecord"
    data = bytearray(pathlib.Path(write(path, [b"", b"12345", b"x" * 100])).read_bytes())
    data[16] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.tfrecord: record 1 is .*its length is garbled"):
        records.record_offsets(str(path))


def test_locate_skips_and_takes(tmp_path):
    a = write(tmp_path / "a.tfrecord", [b"1234"] * 3)
    b = write(tmp_path / "b.tfrecord", [b""] * 4)
    numbers, offsets = records.locate([(a, 1, 2), (b, 0, 1)])
    np.testing.assert_array_equal(numbers, [0, 0, 1])
    np.testing.assert_array_equal(offsets, [20, 40, 0])


FILES = {
    "a-train.tfrecord-00000-of-00002": [b"1234"] * 3,
    "a-train.tfrecord-00001-of-00002": [],
    "a-test.tfrecord-00000-of-00001": [b"", b"x" * 100],
}


@pytest.fixture
def folder(tmp_path):
    for name, contents in FILES.items():
        write(tmp_path / name, contents)
    records.write_index(tmp_path)
    return tmp_path


@pytest.fixture
def scanned(monkeypatch):
    """Records the files whose headers are read."""
    names = []
    scan = records.record_offsets

    def record_offsets(path):
        names.append(path.name)
        return scan(path)

    monkeypatch.setattr(records, "record_offsets", record_offsets)
    return names


def whole_files(folder):
    return [(str(folder / name), 0, len(contents)) for name, contents in FILES.items()]


def test_the_index_says_what_a_scan_says_without_opening_files(folder, scanned):
    numbers, offsets = records.locate(whole_files(folder))
    assert scanned == []
    np.testing.assert_array_equal(numbers, [0, 0, 0, 2, 2])
    np.testing.assert_array_equal(offsets, [0, 20, 40, 0, 16])
    assert offsets.dtype == np.int64
    (folder / records.INDEX_NAME).unlink()
    by_scan = records.locate(whole_files(folder))
    assert sorted(scanned) == sorted(FILES)
    np.testing.assert_array_equal(by_scan, (numbers, offsets))


def test_parts_of_indexed_files(folder):
    name = str(folder / "a-train.tfrecord-00000-of-00002")
    numbers, offsets = records.locate([(name, 2, 1), (name, 0, 1)])
    assert (numbers.tolist(), offsets.tolist()) == ([0, 1], [40, 0])


def test_a_file_of_another_size_than_the_index_says_is_scanned(folder, scanned, monkeypatch):
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda message, *values: warnings.append(message % values))
    changed = "a-test.tfrecord-00000-of-00001"
    write(folder / changed, [b"12", b"34"])
    _, offsets = records.locate(whole_files(folder))
    assert scanned == [changed]
    assert offsets.tolist() == [0, 20, 40, 0, 18]
    (warning,) = warnings
    assert changed in warning


@pytest.mark.parametrize("kept", [0, 100, -1])
def test_a_broken_index_is_not_used(folder, scanned, kept):
    index = folder / records.INDEX_NAME
    index.write_bytes(index.read_bytes()[:kept])
    _, offsets = records.locate(whole_files(folder))
    assert len(scanned) == len(FILES)
    assert offsets.tolist() == [0, 20, 40, 0, 16]


def test_a_damaged_index_is_right_or_not_used(folder):
    index = folder / records.INDEX_NAME
    whole = records._read_index(epath.Path(folder))
    used = 0
    for data in mutants([index.read_bytes()], 500):
        index.write_bytes(data)
        found = records._read_index(epath.Path(folder))
        used += bool(found)
        for name, (size, offsets) in found.items():
            assert (size, offsets.tolist()) == (whole[name][0], whole[name][1].tolist())
    assert 0 < used < 250


def test_the_index_of_the_same_files_is_the_same(folder):
    before = (folder / records.INDEX_NAME).read_bytes()
    records.write_index(folder)
    assert (folder / records.INDEX_NAME).read_bytes() == before
    assert {path.name for path in folder.iterdir()} == {*FILES, records.INDEX_NAME}


def test_command(folder):
    (folder / records.INDEX_NAME).unlink()
    records.main([str(folder)])
    assert (folder / records.INDEX_NAME).exists()
    with pytest.raises(SystemExit, match=r"no files"):
        records.main([str(folder / "elsewhere")])


def test_no_index_of_a_torn_file(folder):
    (folder / records.INDEX_NAME).unlink()
    path = folder / "a-train.tfrecord-00000-of-00002"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SystemExit, match="00000-of-00002: record 2 is cut off"):
        records.main([str(folder)])
    assert not (folder / records.INDEX_NAME).exists()
