"""Checkpoints that T5X and Orbax wrote (see data/README.md), whole and damaged."""

import json
import pathlib
import shutil
import tarfile
import zlib

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import serialization

from richhf_jax import checkpoints, train_state
from richhf_jax.convert import source, t5x

DATA = pathlib.Path(__file__).parent / "data"
WHOLE = ["t5x_msgpack", "t5x_msgpack_bfloat16", "t5x_orbax", "t5x_orbax_files", "t5x_orbax_early"]
KERNEL = "encoder/layers_1/mlp/wi_0/kernel"
FOLDER = "target." + KERNEL.replace("/", ".")


@pytest.fixture
def unpack(tmp_path):
    """Lays out a copy of one of the data files; returns its `checkpoint_7`."""

    def unpack(name: str, to: str = "model_dir") -> pathlib.Path:
        with tarfile.open(DATA / f"{name}.tar.xz") as archive:
            archive.extractall(tmp_path / to, filter="data")
        return tmp_path / to / "checkpoint_7"

    return unpack


def expected(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns an array's values by the rule of data/README.md."""
    start = zlib.crc32(name.encode())
    return ((start + np.arange(np.prod(shape))) % 251 - 125).astype(np.float32).reshape(shape)


def check_values(opened: source.Source) -> None:
    for name, tensor in opened.tensors.items():
        array = tensor.read()
        assert (array.shape, array.dtype) == (tensor.shape, tensor.dtype), name
        np.testing.assert_array_equal(array.astype(np.float32), expected(name, tensor.shape), err_msg=name)


def edit_msgpack(directory: pathlib.Path, edit) -> None:
    """Rewrites T5X's msgpack file after `edit` of its content."""
    content = serialization.msgpack_restore((directory / "checkpoint").read_bytes())
    edit(content)
    (directory / "checkpoint").write_bytes(serialization.msgpack_serialize(content))


def leaf_of(content):
    """Returns the spec of KERNEL in the msgpack file."""
    leaf = content["optimizer"]["target"]
    for part in KERNEL.split("/"):
        leaf = leaf[part]
    return leaf


@pytest.mark.parametrize("name", WHOLE)
def test_reads_every_parameter(unpack, name):
    directory = unpack(name)
    assert t5x.is_t5x(str(directory))
    opened = t5x.open_t5x(str(directory))
    assert len(opened.tensors) == 38
    assert opened.unused == {}
    assert {tensor.dtype for tensor in opened.tensors.values()} == {
        np.dtype(ml_dtypes.bfloat16 if "bfloat16" in name else np.float32)
    }
    assert opened.tensors[KERNEL].shape == (4, 6)
    assert opened.tensors[KERNEL].origin == FOLDER
    assert opened.tensors["encoder/relpos_bias/rel_embedding"].shape == (2, 32)
    assert "2 + 1 layers" in opened.description
    num_slots = 1 if "early" in name else 153  # The step, and four arrays of Adafactor a parameter.
    assert f"{num_slots} arrays of the optimizer" in opened.description
    check_values(opened)


def test_some_arrays_have_several_chunks_and_some_none(unpack):
    """Without this, the tests below would show nothing."""
    assert (unpack("t5x_msgpack") / FOLDER / "0.1").is_file()
    assert not list(unpack("t5x_msgpack_bfloat16", "other").glob("target.*scale"))


def test_finds_the_newest_of_a_model_dir(unpack):
    directory = unpack("t5x_orbax")
    shutil.copytree(directory, directory.with_name("checkpoint_12"))
    (directory.parent / "checkpoint_90.tmp-1700000000").mkdir()
    assert t5x.is_t5x(str(directory.parent))
    assert t5x.open_t5x(str(directory.parent)).path == str(directory.with_name("checkpoint_12") / "state")


def test_takes_the_msgpack_file_itself(unpack):
    opened = t5x.open_t5x(str(unpack("t5x_msgpack") / "checkpoint"))
    assert len(opened.tensors) == 38


def test_path_with_a_blank(unpack):
    assert len(t5x.open_t5x(str(unpack("t5x_orbax", "model dir %20"))).tensors) == 38


@pytest.mark.parametrize(
    "spec",
    [
        {"kvstore": {"driver": "gfile", "path": f"/cns/there/checkpoint_7/{FOLDER}/"}},
        {"kvstore": {"driver": "gcs", "bucket": "t5x-dummy-bucket", "path": f"{FOLDER}/"}},
        {"kvstore": {"driver": "gcs", "bucket": "t5x-dummy-bucket"}, "path": FOLDER},
        {"kvstore": {"driver": "file", "path": f"../../{FOLDER}/"}},
    ],
)
def test_a_spec_of_another_place_is_looked_up_beside_the_file(unpack, spec):
    directory = unpack("t5x_msgpack")

    def edit(content):
        leaf = leaf_of(content)
        leaf.pop("path", None)
        leaf.update(spec)

    edit_msgpack(directory, edit)
    check_values(t5x.open_t5x(str(directory)))


def test_version_2_holds_the_bits_of_bfloat16(unpack):
    directory = unpack("t5x_msgpack_bfloat16")
    metadata = json.loads((directory / FOLDER / ".zarray").read_text())
    (directory / FOLDER / ".zarray").write_text(json.dumps({**metadata, "dtype": "<u2"}))
    edit_msgpack(directory, lambda content: content.update(version=2))
    tensor = t5x.open_t5x(str(directory)).tensors[KERNEL]
    assert tensor.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(tensor.read().astype(np.float32), expected(KERNEL, (4, 6)))


def test_what_is_neither_parameter_nor_optimizer_is_unused(unpack):
    directory = unpack("t5x_msgpack")
    edit_msgpack(directory, lambda c: c["optimizer"].update(flax_mutables={"batch_stats": np.zeros(2)}))
    assert t5x.open_t5x(str(directory)).unused == {"flax_mutables/batch_stats": (2,)}


def test_scanned_layers_are_taken_apart(unpack):
    """T5X's t5 has no scanned layers, but a model of ours that T5X trained may."""
    directory = unpack("t5x_msgpack")
    stacked = {"layers": {"mlp": {"wi": {"bias": np.arange(6.0).reshape(2, 3)}}}}
    edit_msgpack(directory, lambda content: content["optimizer"]["target"].update(vit=stacked))
    tensor = t5x.open_t5x(str(directory)).tensors["vit/layers_1/mlp/wi/bias"]
    assert tensor.shape == (3,)
    np.testing.assert_array_equal(tensor.read(), [3.0, 4.0, 5.0])


def test_a_checkpoint_of_ours_is_not_t5x(tmp_path):
    saver = checkpoints.Checkpointer(str(tmp_path))
    saver.save(train_state.TrainState(jnp.int32(3), {"w": jnp.zeros(2)}, ()), {}, 3)
    saver.close()
    assert (tmp_path / "checkpoint_3/state/_METADATA").is_file()
    assert not t5x.is_t5x(str(tmp_path))
    with pytest.raises(source.ConvertError, match="is not a checkpoint of T5X"):
        t5x.open_t5x(str(tmp_path))


def truncate(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def set_shape(directory: pathlib.Path) -> None:
    metadata = json.loads((directory / FOLDER / ".zarray").read_text())
    (directory / FOLDER / ".zarray").write_text(json.dumps({**metadata, "shape": [3, 6]}))


def set_path(directory: pathlib.Path) -> None:
    edit_msgpack(directory, lambda content: leaf_of(content)["kvstore"].update(path="target/.."))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("t5x_msgpack", lambda d: truncate(d / "checkpoint"), "checkpoint is truncated"),
        ("t5x_msgpack", lambda d: (d / "checkpoint").write_bytes(b""), "checkpoint is truncated"),
        ("t5x_msgpack", lambda d: (d / "checkpoint").write_bytes(b"\x80"), "holds no optimizer/target"),
        ("t5x_msgpack", lambda d: (d / "checkpoint").write_bytes(b"\x07"), "holds no optimizer/target"),
        (
            "t5x_msgpack",
            lambda d: (d / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-0"\n'),
            "checkpoint is TensorFlow's: convert it",
        ),
        (
            "t5x_msgpack",
            lambda d: shutil.rmtree(d / FOLDER),
            rf"{FOLDER}, which checkpoint names, can't be read \(NOT_FOUND",
        ),
        ("t5x_msgpack", lambda d: truncate(d / FOLDER / ".zarray"), f"{FOLDER}, which checkpoint names"),
        ("t5x_msgpack", lambda d: (d / FOLDER / "0.1").unlink(), f"{FOLDER}/0.1 is missing"),
        ("t5x_msgpack", set_shape, rf"{FOLDER} holds \(3, 6\), but checkpoint says \(4, 6\)"),
        ("t5x_msgpack", set_path, f"{FOLDER} lies at 'target/..'"),
        ("t5x_orbax", lambda d: truncate(d / "state/_METADATA"), "_METADATA is truncated"),
        ("t5x_orbax", lambda d: (d / "state/manifest.ocdbt").unlink(), "_METADATA names, can't be read"),
        ("t5x_orbax", lambda d: truncate(d / "state/manifest.ocdbt"), "manifest.ocdbt can't be read"),
        ("t5x_orbax", lambda d: shutil.rmtree(d / "state/d"), "manifest.ocdbt can't be read"),
        ("t5x_orbax", lambda d: truncate(*(d / "state/d").iterdir()), "manifest.ocdbt can't be read"),
        ("t5x_orbax_files", lambda d: (d / "state" / FOLDER / "0.0").unlink(), f"{FOLDER}/0.0 is missing"),
        ("t5x_orbax_early", lambda d: shutil.rmtree(d / "state" / FOLDER), f"{FOLDER}, which checkpoint"),
        ("t5x_scalable", lambda d: None, "is of T5X's scalable_t5"),
    ],
)
def test_damage_is_found_at_opening(unpack, name, damage, message):
    directory = unpack(name)
    damage(directory)
    with pytest.raises(source.ConvertError, match=message):
        t5x.open_t5x(str(directory))


@pytest.mark.parametrize("name", ["t5x_msgpack", "t5x_orbax_files"])
def test_a_damaged_chunk_is_found_at_reading(unpack, name):
    """Opening reads no values, so it doesn't find the damage."""
    directory = unpack(name)
    for chunk in directory.glob(f"**/{FOLDER}/0.0"):
        truncate(chunk)
    opened = t5x.open_t5x(str(directory))
    with pytest.raises(source.ConvertError, match=f"{FOLDER} can't be read"):
        opened.tensors[KERNEL].read()


def test_a_decoder_alone_is_refused(unpack):
    directory = unpack("t5x_msgpack")
    edit_msgpack(directory, lambda content: content["optimizer"]["target"].pop("encoder"))
    with pytest.raises(source.ConvertError, match="holds no encoder"):
        t5x.open_t5x(str(directory))
