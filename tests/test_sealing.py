"""Checksums of arrays on a mesh, and the file of a checkpoint that holds them."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from richhf_jax import checkpoints, checksums, errors, sealing


@pytest.fixture
def mesh():
    auto = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((2, 1), ("data", "model"), axis_types=auto, devices=jax.devices()[:2])


@pytest.mark.parametrize(
    "spec",
    [
        PartitionSpec(),
        PartitionSpec("data"),
        PartitionSpec(None, "data"),
        PartitionSpec("model", None, "data"),
        PartitionSpec(("data", "model")),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_checksum_does_not_depend_on_the_mesh(rng, mesh, spec, dtype):
    array = rng.random((4, 6, 2), np.float32).astype(dtype)
    placed = jax.device_put(array, NamedSharding(mesh, spec))
    assert sealing.of_arrays({("a", "b"): placed}) == {"a/b": checksums.of_array(array)}


def test_scalars_and_no_arrays():
    step = np.int32(3)
    assert sealing.of_arrays({("step",): jnp.asarray(step)}) == {"step": checksums.of_array(np.asarray(step))}
    assert sealing.of_arrays({}) == {}


def test_arrays_without_checksums_must_be_finite(mesh):
    column = NamedSharding(mesh, PartitionSpec(None, "data"))
    arrays = {
        ("whole",): jnp.arange(3),
        ("both",): jax.device_put(np.full((2, 2), np.nan, np.float32), column),
        ("right",): jax.device_put(np.array([[0, 1], [0, np.inf]], np.float32), column),
    }
    with pytest.raises(sealing.DamageError, match="2 of 3 arrays have numbers that are not finite: both, r"):
        sealing.check_arrays(arrays, None)
    sealing.check_arrays({("whole",): arrays["whole",]}, None)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "state/d").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    for name in ("state/_METADATA", "state/d/numbers", "other/file"):
        (tmp_path / name).write_text(name)
    sealing.write(epath.Path(tmp_path), {"kernel": "01234567"})
    return epath.Path(tmp_path)


def test_files_are_checked_item_by_item(folder):
    assert sealing.read(folder, "state") == {"kernel": "01234567"}
    assert json.loads((folder / sealing.FILE).read_text())["files"].keys() == {
        "state/_METADATA",
        "other/file",
    }
    (folder / "other/file").write_text("changed")
    assert sealing.read(folder, "state") == {"kernel": "01234567"}
    with pytest.raises(sealing.DamageError, match=f"{folder}/other/file: it is cut off or has other bytes"):
        sealing.read(folder, "other")
    (folder / "state/_METADATA").unlink()
    with pytest.raises(sealing.DamageError, match=f"{folder}/state/_METADATA is missing"):
        sealing.read(folder, "state")


def test_a_folder_without_checksums(tmp_path):
    assert sealing.read(epath.Path(tmp_path), "state") is None


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "[" * 100_000, '{"files": 1, "arrays": 2, "checksum": "3"}']
)
def test_checksums_that_are_damaged_themselves(folder, text):
    (folder / sealing.FILE).write_text(text)
    with pytest.raises(sealing.DamageError, match=f"{folder}/{sealing.FILE}: it is cut off"):
        sealing.read(folder, "state")


def test_a_pipe_in_the_place_of_a_file_is_not_read(folder):
    (folder / "state/_METADATA").unlink()
    os.mkfifo(folder / "state/_METADATA")
    with pytest.raises(errors.UserError, match="is a named pipe"):
        sealing.read(folder, "state")


def test_nothing_gets_its_name_in_a_directory_that_was_moved_and_made_anew(tmp_path, monkeypatch):
    folder, moved = tmp_path / "run", tmp_path / "moved"
    folder.mkdir()
    identity, calls = sealing._identity, []

    def move_before_the_end(directory):
        calls.append(directory)
        if len(calls) == 2:
            folder.rename(moved)
            shutil.copytree(moved, folder)
        return identity(directory)

    monkeypatch.setattr(sealing, "_identity", move_before_the_end)
    with pytest.raises(FileNotFoundError, match="was deleted or moved meanwhile"):
        checkpoints.save_params(str(folder), {"a": jnp.zeros(2)})
    assert not (folder / "checkpoint_0").exists()
    checkpoints.save_params(str(folder), {"a": jnp.zeros(2)})
    assert (folder / "checkpoint_0").exists()
