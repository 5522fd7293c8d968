"""model.safetensors holds the arrays that were written, or its reader says which one it doesn't."""

import json
import os

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from richhf_jax import errors, weights_file

ARRAYS = {"a/kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float32)}


@pytest.fixture
def file(tmp_path):
    weights_file.write(tmp_path / "x.safetensors", ARRAYS, {"format": "mine"})
    return tmp_path / "x.safetensors"


def test_there_and_back(file):
    found = weights_file.read(file)
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)
    with safetensors.safe_open(file, "numpy") as opened:
        assert opened.metadata()["format"] == "mine"
        assert json.loads(opened.metadata()["crc32c"]).keys() == ARRAYS.keys()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o027, 0o640)])
def test_the_file_keeps_to_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        weights_file.write(tmp_path / "x.safetensors", ARRAYS, {})
    finally:
        os.umask(before)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == mode


def test_every_flipped_bit_is_found_or_harmless(file):
    content = file.read_bytes()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        file.write_bytes(damaged)
        try:
            found, message = weights_file.read(file), str(file)
        except errors.UserError as error:
            found, message = {}, str(error)
        assert message.startswith(str(file))
        if found:  # A flip in the metadata's other words changes nothing.
            assert found.keys() == ARRAYS.keys()
        for name, array in found.items():
            assert array.dtype == np.float32
            np.testing.assert_array_equal(array, ARRAYS[name])
        assert not found or place < len(content) - 40


def test_a_changed_type_is_refused(file):
    """Also where no checksum says so."""
    content = file.read_bytes()
    file.write_bytes(content.replace(b'"F32"', b'"I32"', 1))
    with pytest.raises(errors.UserError, match="x.safetensors: its header isn't as it was written"):
        weights_file.read(file)
    safetensors.numpy.save_file({"a": np.ones(2, np.int32)}, file)
    with pytest.raises(errors.UserError, match="x.safetensors: a can't be of type I32"):
        weights_file.read(file)


def test_equal_arrays_make_equal_files(tmp_path):
    contents = set()
    metadata = dict.fromkeys("abcdefgh", 'é "\\\n\x7f')
    for number in range(8):
        weights_file.write(tmp_path / f"{number}", ARRAYS, metadata)
        contents.add((tmp_path / f"{number}").read_bytes())
    assert len(contents) == 1
    with safetensors.safe_open(tmp_path / "0", "numpy") as opened:
        assert metadata.items() <= opened.metadata().items()


@pytest.mark.parametrize("checked", [True, False])
def test_nan_is_refused(file, checked):
    metadata = {}
    if checked:
        with safetensors.safe_open(file, "numpy") as opened:
            metadata = opened.metadata()
    bad = ARRAYS | {"b": np.array([1, np.nan, 1, 1], np.float32)}
    safetensors.numpy.save_file(bad, file, metadata)
    reason = "b isn't the array that was written, its checksum" if checked else "b holds NaN or infinity"
    with pytest.raises(errors.UserError, match=rf"x\.safetensors: {reason}"):
        weights_file.read(file)
    with pytest.raises(errors.UserError, match="the parameter b holds NaN or infinity"):
        weights_file.write(file, bad, {})


def test_other_files_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(errors.UserError, match="pipe is a named pipe"):
        weights_file.read(tmp_path / "pipe")
    (tmp_path / "x").write_bytes(b"\xff" * 100)
    with pytest.raises(
        errors.UserError, match="x can't be read as float32 parameters: .*copy the file again"
    ):
        weights_file.read(tmp_path / "x")
