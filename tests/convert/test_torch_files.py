"""Files of torch.save, as our reader and torch.load read them."""

import collections
import os
import pathlib
import pickle
import re
import zipfile

import numpy as np
import pytest
import torch

from richhf_jax.convert import torch_files
from richhf_jax.convert.source import ConvertError

LAYOUTS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def save(content, path: pathlib.Path, zipped: bool) -> pathlib.Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def assert_same(tensor, expected: torch.Tensor) -> None:
    values = tensor.read()
    assert values.dtype == tensor.dtype
    assert values.shape == tensor.shape == tuple(expected.shape)
    assert values.flags.c_contiguous
    assert str(values.dtype) == str(expected.dtype).removeprefix("torch.")
    # numpy can't take torch's bfloat16; float32 holds it exactly.
    as_read = values.astype(np.float32) if expected.dtype == torch.bfloat16 else values
    expected = expected.float() if expected.dtype == torch.bfloat16 else expected
    np.testing.assert_array_equal(as_read, expected.detach().numpy())


@LAYOUTS
@pytest.mark.parametrize(
    "dtype",
    ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"],
)
def test_every_type(tmp_path, zipped, dtype):
    values = torch.arange(-4, 8).reshape(3, 4).to(getattr(torch, dtype))
    path = save({"values": values}, tmp_path / "weights.pt", zipped)
    read = torch_files.read_torch_file(path).tensors
    assert list(read) == ["values"]
    assert read["values"].origin == "values"
    assert_same(read["values"], values)


@LAYOUTS
def test_views_share_a_storage(tmp_path, zipped):
    table = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    state = {
        "table": table,
        "tied": table,
        "transposed": table.T,
        "column": table[:, 2],
        "part": table[2:5, 1::2],
        "expanded": table[:, :1].expand(6, 3),
        "scalar": table[3, 4],
        "nothing": table[:0],
    }
    path = save(state, tmp_path / "weights.pt", zipped)
    read = torch_files.read_torch_file(path).tensors
    assert list(read) == list(state)
    for name, expected in state.items():
        assert_same(read[name], expected)
    assert path.stat().st_size < 5000 + table.nbytes, "the views should share their numbers"


@LAYOUTS
def test_the_state_dict_of_a_module(tmp_path, zipped):
    """A saved OrderedDict has an attribute of metadata; parameters may be saved themselves."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    state = module.state_dict()
    state["parameter"] = module[0].weight
    read = torch_files.read_torch_file(save(state, tmp_path / "weights.pt", zipped)).tensors
    assert list(read) == list(state)
    assert "1.num_batches_tracked" in read
    for name, expected in state.items():
        assert_same(read[name], expected)


@pytest.mark.parametrize("wrapper", torch_files.WRAPPERS)
def test_a_state_dict_under_a_name(tmp_path, wrapper):
    weights = torch.ones(2)
    content = {"epoch": 3, wrapper: {"weight": weights}, "losses": [0.5, 0.25]}
    read = torch_files.read_torch_file(save(content, tmp_path / "weights.pt", zipped=True)).tensors
    assert list(read) == ["weight"]
    assert_same(read["weight"], weights)


def test_values_are_read_when_asked_for(tmp_path):
    path = save({"a": torch.ones(4), "b": torch.zeros(4)}, tmp_path / "weights.pt", zipped=False)
    read = torch_files.read_torch_file(path).tensors
    content = path.read_bytes()
    path.write_bytes(content.replace(np.ones(4, np.float32).tobytes(), np.full(4, 2, np.float32).tobytes()))
    np.testing.assert_array_equal(read["a"].read(), np.full(4, 2))


def rewritten(path: pathlib.Path, change, compression=zipfile.ZIP_STORED) -> pathlib.Path:
    """Copies a zip and changes each member by a function (name, content) -> content."""
    copy = path.with_name("rewritten.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(copy, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return copy


def test_the_byte_order_of_another_machine(tmp_path):
    values = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    path = save({"values": values.T}, tmp_path / "weights.pt", zipped=True)

    def swap(name, content):
        if name.endswith("byteorder"):
            return b"big"
        return np.frombuffer(content, np.float32).byteswap().tobytes() if "/data/" in name else content

    swapped = rewritten(path, swap)
    torch.testing.assert_close(torch.load(swapped)["values"], values.T)  # torch agrees that it is one
    assert_same(torch_files.read_torch_file(swapped).tensors["values"], values.T)


class Malicious:
    """A usual unpickler would make a folder here."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@LAYOUTS
def test_nothing_in_a_file_is_run(tmp_path, zipped):
    trace = tmp_path / "it_ran"
    path = save({"weight": torch.ones(2), "x": Malicious(trace)}, tmp_path / "weights.pt", zipped)
    with pytest.raises(ConvertError, match=rf"{re.escape(str(path))}: holds {os.mkdir.__module__}.mkdir"):
        torch_files.read_torch_file(path)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists(), "the file does not do what it was refused for"


def test_a_plain_pickle_is_not_run(tmp_path):
    trace, path = tmp_path / "it_ran", tmp_path / "weights.pt"
    path.write_bytes(pickle.dumps(Malicious(trace), protocol=2))
    with pytest.raises(ConvertError, match=r"weights\.pt: holds .*mkdir"):
        torch_files.read_torch_file(path)
    assert not trace.exists()


@LAYOUTS
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.nn.Linear(2, 2), r"holds torch\.nn\.modules\.linear\.Linear, .*state_dict"),
        ([torch.ones(2)], "expected a state dict .* found a list"),
        ({"step": 3, "weight": torch.ones(2)}, "holds 'step' -> int"),
        ({1: torch.ones(2)}, "holds 1 -> tensor"),
        ({"weight": torch.ones(2, dtype=torch.complex64)}, r"holds torch\.ComplexFloatStorage"),
    ],
    ids=["module", "list", "number", "number_as_name", "complex"],
)
def test_more_than_weights(tmp_path, zipped, content, message):
    path = save(content, tmp_path / "weights.pt", zipped)
    with pytest.raises(ConvertError, match=rf"weights\.pt: .*{message}"):
        torch_files.read_torch_file(path)


@LAYOUTS
def test_truncated_anywhere(tmp_path, zipped):
    state = collections.OrderedDict(first=torch.randn(64), second=torch.randn(64))
    content = save(state, tmp_path / "whole.pt", zipped).read_bytes()
    path = tmp_path / "weights.pt"
    for length in range(1, len(content), 37):
        path.write_bytes(content[:length])
        with pytest.raises(ConvertError, match=r"weights\.pt: (truncated|not a file of torch)"):
            torch_files.read_torch_file(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (b"\n<!DOCTYPE html><html><title>Google Drive - Virus scan warning</title>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"\x89HDF\r\n", "not a file of torch.save"),
        (pickle.dumps({"a": 1}, protocol=2), "a pickle, but not one of torch.save"),
        (b"\x80\x02garbage", "truncated, or not a file of torch.save"),
    ],
)
def test_other_files(tmp_path, content, message):
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(ConvertError, match=rf"weights\.pt: {message}|weights\.pt: .*{message}"):
        torch_files.read_torch_file(path)


def test_no_file(tmp_path):
    with pytest.raises(ConvertError, match=r"weights\.pt: no such file"):
        torch_files.read_torch_file(tmp_path / "weights.pt")


def test_other_zips(tmp_path):
    path = save({"weight": torch.ones(64)}, tmp_path / "weights.pt", zipped=True)
    compressed = rewritten(path, lambda name, content: content, zipfile.ZIP_DEFLATED)
    with pytest.raises(ConvertError, match=r"rewritten\.pt: compressed"):
        torch_files.read_torch_file(compressed)
    shorter = rewritten(path, lambda name, content: content[:-4] if "/data/" in name else content)
    with pytest.raises(
        ConvertError, match=r"rewritten\.pt: truncated.* 252 bytes, not 64 numbers of float32"
    ):
        torch_files.read_torch_file(shorter)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as other:
        other.writestr("readme.txt", "hello")
    with pytest.raises(ConvertError, match=r"other\.zip: a zip file, but not one of torch\.save"):
        torch_files.read_torch_file(tmp_path / "other.zip")


def test_a_view_outside_its_storage(tmp_path):
    """A pickle that was tampered with asks a storage of 4 for 5 numbers."""
    path = save({"weight": torch.ones(4)}, tmp_path / "weights.pt", zipped=True)

    def grow(name, content):
        # The shape, (4,), is one byte and the opcode of a tuple with one element.
        return content.replace(b"K\x04\x85", b"K\x05\x85") if name.endswith("data.pkl") else content

    with pytest.raises(ConvertError, match=r"shape \(5,\) in a storage of 4 numbers"):
        torch_files.read_torch_file(rewritten(path, grow))


def test_weights_go_before_their_moving_average_and_the_rest_is_named(tmp_path):
    weights = {"w": torch.ones(2)}
    content = {
        "state_dict_ema": {"w": torch.zeros(2)},
        "state_dict": weights,
        "optimizer": {"state": {0: {"m": torch.ones(2, 3), "v": torch.ones(2, 3)}}, "groups": [1, 2]},
        "epoch": 3,
    }
    read = torch_files.read_torch_file(save(content, tmp_path / "weights.pt", zipped=True))
    assert_same(read.tensors["w"], weights["w"])
    assert read.note == (
        "the weights under 'state_dict' are taken; left out are 'state_dict_ema' (1 arrays, 2 numbers), "
        "'optimizer' (2 arrays, 12 numbers)"
    )
    del content["state_dict"]
    read = torch_files.read_torch_file(save(content, tmp_path / "weights.pt", zipped=True))
    assert_same(read.tensors["w"], torch.zeros(2))


def test_wrappers_in_wrappers(tmp_path):
    content = {"model": {"state_dict": {"w": torch.ones(2)}}, "epoch": 3}
    read = torch_files.read_torch_file(save(content, tmp_path / "weights.pt", zipped=True))
    assert (list(read.tensors), read.note) == (["w"], "")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_a_trainers_prefix_is_taken_off(tmp_path, prefix):
    state = {f"{prefix}{name}": torch.ones(2) for name in ("a", "module.b")}
    read = torch_files.read_torch_file(save(state, tmp_path / "weights.pt", zipped=True)).unwrapped()
    assert {name: tensor.origin for name, tensor in read.tensors.items()} == {
        "a": f"{prefix}a",
        "module.b": f"{prefix}module.b",
    }
    assert read.note == f"all names begin with {prefix!r}, which is taken off"


def test_a_prefix_of_some_names_stays(tmp_path):
    state = {"module.a": torch.ones(2), "b": torch.ones(2)}
    read = torch_files.read_torch_file(save(state, tmp_path / "weights.pt", zipped=True))
    assert read.unwrapped() is read


def test_a_flipped_bit_of_a_storage(tmp_path):
    path = save({"w": torch.ones(64)}, tmp_path / "weights.pt", zipped=True)
    content = bytearray(path.read_bytes())
    content[content.index(np.ones(64, np.float32).tobytes()) + 17] ^= 4
    path.write_bytes(content)
    with pytest.raises(ConvertError, match=r"weights\.pt is damaged: a storage's checksum"):
        torch_files.read_torch_file(path).tensors["w"].read()


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        # 6 GB of spaces in a text; a million lists; a place in the memory of 2**31 - 1 objects.
        (b"\x80\x02X\x00\x00\x00\x01" + b" " * 2**24 + b".", "data.pkl has more than 16,777,216 bytes"),
        (b"\x80\x02(" + b"]" * 1_000_001 + b"l.", "its pickle is too long"),
        (b"\x80\x02]r\xff\xff\xff\x7f.", "its pickle is too long"),
    ],
    ids=["long", "many", "far"],
)
def test_a_pickle_without_end(tmp_path, pickled, message):
    path = save({"w": torch.ones(2)}, tmp_path / "weights.pt", zipped=True)
    bomb = rewritten(path, lambda n, c: pickled if n.endswith("data.pkl") else c, zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 40_000
    with pytest.raises(ConvertError, match=message):
        torch_files.read_torch_file(bomb)


def test_a_legacy_pickle_without_end(tmp_path):
    path = save({"w": torch.ones(2)}, tmp_path / "weights.pt", zipped=False)
    path.write_bytes(path.read_bytes()[:14] + b"\x80\x02]r\xff\xff\xff\x7f.")
    with pytest.raises(ConvertError, match="its pickle is too long|truncated"):
        torch_files.read_torch_file(path)


def test_a_tensor_that_repeats_one_number_without_end(tmp_path):
    state = {"w": torch.ones(1).expand(2**40)}
    with pytest.raises(ConvertError, match=r"shape \(1099511627776,\) repeats 1 numbers"):
        torch_files.read_torch_file(save(state, tmp_path / "weights.pt", zipped=True))
