"""Mutated files of every format give the right arrays, or a message: no traceback, no hang, no full memory.

The mutations are random, but the same in each run.
"""

import json
import pathlib
import tarfile
import zipfile
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import safetensors.numpy
import tensorstore
import torch

from richhf_jax import errors, weights_file
from richhf_jax.convert import __main__ as command
from richhf_jax.convert import huggingface, safetensors_files, torch_files, vit_npz, zarr_arrays

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "layers/b": np.linspace(-1, 1, 4, dtype=np.float32),
    "c": np.full((2, 2), 0.5, np.float32),
}
# What a writer of damaged or hostile files puts where a number or a bracket was.
TOKENS = [b"\0", b"\xff", b"[", b"{", b"(", b"9" * 25, b"-1", b"1e999", b"null", b'"']
TOKENS += [b"\xff" * 8, b"\x7f" * 4]


def mutations(content: bytes, count: int) -> Iterator[bytes]:
    """Yields copies of a file with one to three changes each."""
    rng = np.random.default_rng(len(content))
    for _ in range(count):
        mutated = bytearray(content)
        for _ in range(rng.integers(1, 4)):
            place, length = rng.integers(len(mutated) or 1), int(rng.integers(1, 9))
            kind = rng.integers(5)
            if kind == 0 and mutated:
                mutated[place] ^= 1 << int(rng.integers(8))
            elif kind == 1:
                del mutated[place : place + length]
            elif kind == 2:
                mutated[place : place + int(rng.integers(2))] = TOKENS[rng.integers(len(TOKENS))]
            elif kind == 3:
                mutated[place:place] = mutated[place : place + length]
            elif rng.random() < 0.2:
                del mutated[place:]
        yield bytes(mutated)


def is_right(read: Callable, arrays, exact: bool) -> bool:
    """Returns whether arrays can be read; False if there is a message. Compares those of the same shape."""
    try:
        for name, tensor in read().items():
            if name in arrays and tensor.shape == arrays[name].shape:
                found = tensor.read()
                if exact and found.dtype == arrays[name].dtype:
                    np.testing.assert_array_equal(found, arrays[name], err_msg=name)
    except errors.UserError:
        return False
    return True


def check(path: pathlib.Path, read: Callable, count: int, arrays=ARRAYS, exact: bool = True) -> None:
    """Reads mutations of a file.

    Args:
      path: the file to mutate.
      read: reads name -> tensor.
      count: number of mutations.
      arrays: the arrays in the file, by name.
      exact: whether an array with its name and shape must have its numbers; so it is if they have checksums.
    """
    assert is_right(read, arrays, exact=True)
    content, fine = path.read_bytes(), 0
    for mutated in mutations(content, count):
        path.write_bytes(mutated)
        fine += is_right(read, arrays, exact)
    # Some mutations change nothing that matters, most do.
    assert fine < count


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(save, tmp_path):
    path = tmp_path / "x.npz"
    save(path, **ARRAYS)
    check(path, lambda: vit_npz.read_npz(str(path)), 1000)


def test_our_safetensors(tmp_path):
    path = tmp_path / "x.safetensors"
    weights_file.write(path, ARRAYS, {})  # With more metadata, the library would write them in any order.

    def read():
        # Without the name of the checksums it is a file of others.
        return safetensors_files.read_safetensors(path) if b'"crc32c":' in path.read_bytes() else {}

    check(path, read, 1000)


def test_safetensors_of_others(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(ARRAYS, path)
    check(path, lambda: safetensors_files.read_safetensors(path), 1500, exact=False)


@pytest.fixture
def state():
    return {name: torch.tensor(array) for name, array in ARRAYS.items()}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_torch(zipped, state, tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"model": state, "epoch": 1}, path, _use_new_zipfile_serialization=zipped)
    check(path, lambda: torch_files.read_torch_file(path).tensors, 1000, exact=zipped)


def test_the_pickle_in_a_zip(state, tmp_path):
    """The zip's checksum finds a change of its pickle, so here the zip is made after the change."""
    path = tmp_path / "x.pt"
    torch.save(state, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    pickled = tmp_path / "data.pkl"
    pickled.write_bytes(members.pop("x/data.pkl"))

    def read():
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in (*members.items(), ("x/data.pkl", pickled.read_bytes())):
                archive.writestr(name, content)
        return torch_files.read_torch_file(path).tensors

    check(pickled, read, 500, exact=False)


@pytest.mark.parametrize("file", [".zarray", "0.0"])
def test_zarr(file, tmp_path):
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{tmp_path}/a/"},
        "metadata": {"chunks": [1, 3], "compressor": {"id": "gzip", "level": 1}},
    }
    array = tensorstore.open(spec, create=True, dtype=tensorstore.float32, shape=[2, 3]).result()
    array.write(ARRAYS["a"]).result()

    def read():
        return {"a": zarr_arrays.ZarrArrays(tmp_path / "checkpoint").tensor("a", "a")}

    # gzip checks the numbers of a chunk, but nothing checks what the metadata say of them.
    check(tmp_path / "a" / file, read, 400, exact=file != ".zarray")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_hugging_faces_json(name, tmp_path):
    sizes = {"image_size": 8, "patch_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", **sizes, "layer_norm_eps": 1e-6}))
    shapes = dict.fromkeys(huggingface.vit_names(1).values(), (4,))
    shapes |= {huggingface.POSITIONS: (1, 5, 4), huggingface.CLASS_TOKEN: (1, 1, 4)}
    arrays = {name: np.full(shape, i, np.float32) for i, (name, shape) in enumerate(shapes.items())}
    safetensors.numpy.save_file(arrays, tmp_path / "one.safetensors")
    index = {"weight_map": dict.fromkeys(arrays, "one.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))

    def read():
        return huggingface.open_huggingface(str(tmp_path)).tensors

    check(tmp_path / name, read, 300, {name: tensor.read() for name, tensor in read().items()})


@pytest.mark.parametrize(
    ("archive", "file"), [("t5x_msgpack", "checkpoint"), ("t5x_orbax_files", "state/_METADATA")]
)
def test_t5x(archive, file, tmp_path):
    with tarfile.open(pathlib.Path(__file__).parent / "data" / f"{archive}.tar.xz") as data:
        data.extractall(tmp_path, filter="data")
    path = tmp_path / "checkpoint_7"

    def read():
        return command.open_weights(str(path)).tensors

    # The msgpack file itself holds small arrays, without a checksum.
    arrays = {name: tensor.read() for name, tensor in read().items() if len(tensor.shape) > 1}
    check(path / file, read, 40, arrays)
