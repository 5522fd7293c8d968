"""Reads files of `torch.save`, without torch and without running anything that the file says.

There are two layouts, see `torch/serialization.py` in https://github.com/pytorch/pytorch:

    zip (torch >= 1.6)   NAME/data.pkl, the pickled state dict; NAME/data/KEY, the numbers of a storage;
                         NAME/byteorder, "little" or "big". Nothing in it is compressed.
    legacy               five pickles (magic number, version, facts of the system, the state dict, the keys of
                         storages), then for each key its length (int64) and its numbers, little-endian.

A tensor is a view (offset, shape, strides) of a storage. Pickles are programs; here they may name only an
ordered dictionary, torch's functions that rebuild a tensor or a parameter, and the kinds of storage.
"""

import collections
import dataclasses
import functools
import io
import math
import pathlib
import pickle
import pickletools
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from richhf_jax.convert.source import ConvertError, State, Tensor

STORAGE_DTYPES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
# Names under which trainers put a state dict, beside their own state. The first that a file has is taken, so
# weights as they were trained go before their moving average (EMA).
WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
WRAPPERS += ("ema_state_dict", "state_dict_ema", "model_ema", "ema_model", "ema")

_ZIP_MAGIC, _PICKLE_MAGIC = b"PK\x03\x04", b"\x80"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
# Limits of a pickle: bytes (also those that a zip inflates it to) and operations. A tensor takes about 200
# bytes and 40 operations.
_MAX_PICKLE, _MAX_OPERATIONS = 16 * 2**20, 1_000_000
# Numbers of a tensor that repeats those of its storage.
_MAX_EXPANDED = 2**24
_ZIP_HEADER = struct.Struct("<4s22xHH")  # Of a member: magic, ..., lengths of its name and extra field.


@dataclasses.dataclass
class _Storage:
    """Numbers in the file. In the legacy layout, `start` is known only after the state dict is read.

    Attributes:
      dtype: type of the numbers.
      length: number of numbers.
      start: the first byte in the file.
      byteswapped: whether the file's byte order differs from this machine's.
      crc: the CRC-32 of its bytes; 0: unknown.
    """

    dtype: np.dtype
    length: int
    start: int = 0
    byteswapped: bool = False
    crc: int = 0


@dataclasses.dataclass(frozen=True)
class _View:
    """A tensor, as a view of a storage. Offset and strides count numbers, not bytes."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def check(self) -> None:
        """Raises ValueError if it is no view of its storage. (A pickle can change one that was right.)"""
        ints = (self.offset, *self.shape, *self.strides)
        if len(self.shape) != len(self.strides) or any(type(i) is not int or i < 0 for i in ints):
            raise ValueError(
                f"a tensor with offset {self.offset}, shape {self.shape}, strides {self.strides}"
            )
        if self.offset + self.span > self.storage.length:
            raise ValueError(f"a tensor of shape {self.shape} in a storage of {self.storage.length} numbers")
        if math.prod(self.shape) > max(self.storage.length, _MAX_EXPANDED):
            raise ValueError(f"a tensor of shape {self.shape} repeats {self.storage.length} numbers")

    @property
    def span(self) -> int:
        """Number of the storage's numbers from the tensor's first to its last."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))

    def read(self, path: pathlib.Path) -> np.ndarray:
        """Reads the tensor's numbers from the file, and checks them if they are the whole storage."""
        dtype = self.storage.dtype
        start = self.storage.start + self.offset * dtype.itemsize
        numbers = np.fromfile(path, dtype, self.span, offset=start)
        if (
            self.storage.crc
            and self.span == self.storage.length
            and zlib.crc32(numbers.view(np.uint8).data) != self.storage.crc
        ):
            raise ConvertError(f"{path} is damaged: a storage's checksum is wrong; download it again")
        if self.storage.byteswapped:
            numbers = numbers.byteswap()
        strides = [stride * dtype.itemsize for stride in self.strides]
        return np.asarray(np.ndarray(self.shape, dtype, numbers, strides=strides), order="C")


class _Unpickler(pickle.Unpickler):
    """An unpickler that makes only plain data and `_View`s."""

    def __init__(self, file: BinaryIO, path: pathlib.Path, storage: Callable[[np.dtype, str, int], _Storage]):
        start = file.tell()
        for count, (operation, argument, _) in enumerate(pickletools.genops(file)):
            # A place in the table of remembered objects: the table is made as long as the place says.
            place = int(argument or 0) if operation.name.endswith("PUT") else 0
            if count > _MAX_OPERATIONS or place > _MAX_OPERATIONS:
                raise ConvertError(f"{path}: its pickle is too long for plain weights")
        file.seek(start)
        super().__init__(file)
        self._path, self._storage = path, storage

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.storage") and name in STORAGE_DTYPES:
            return name
        allowed = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): self._rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): self._rebuild_parameter,
        }
        if (module, name) not in allowed:
            raise ConvertError(
                f"{self._path}: holds {module}.{name}, which plain weights do not; it was not run. "
                "Save the weights alone: torch.save(model.state_dict(), path)"
            )
        return allowed[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        # ("storage", its class, key, device, length); the legacy layout adds None, as it is no view itself.
        kind, storage_class, key, _device, length, *view_of = pid
        if kind != "storage" or type(length) is not int or any(view_of):
            raise ValueError(f"unknown kind of storage: {pid}")
        return self._storage(STORAGE_DTYPES[storage_class], key, length)

    def _rebuild_tensor(self, storage: _Storage, offset, shape, strides, *_ignored) -> _View:
        return _View(storage, offset, tuple(shape), tuple(strides))

    def _rebuild_parameter(self, view: _View, *_ignored) -> _View:
        return view


def read_torch_file(path: str | pathlib.Path) -> State:
    """Opens a state dict that `torch.save` wrote, in either layout; values are read when needed.

    A state dict that a trainer put under a name of `WRAPPERS` is found there; the note tells of arrays beside
    it.

    Returns:
      The state dict. Tensors are in torch's layout and stored type (bfloat16 by ml_dtypes), with views and
      tied weights.

    Raises:
      ConvertError: there is no such file; it is truncated or not torch's; or it holds no plain state dict.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ConvertError(f"{path}: no such file")
    with path.open("rb") as file:
        start = file.read(64)
        file.seek(0)
        if not is_torch_start(start):
            raise ConvertError(f"{path}: {_what_it_is(start)}")
        try:
            content = (_read_zip if start.startswith(_ZIP_MAGIC) else _read_legacy)(file, path)
            views, note = _state_dict(content, path)
            for view in views.values():
                view.check()
        except ConvertError:
            raise
        except Exception as error:  # A broken pickle may raise anything.
            raise ConvertError(
                f"{path}: truncated, or not a file of torch.save ({type(error).__name__}: {error})"
            ) from error
    tensors = {
        name: Tensor(name, view.shape, view.storage.dtype, functools.partial(view.read, path))
        for name, view in views.items()
    }
    return State(tensors, note)


def is_torch_start(start: bytes) -> bool:
    """Tells from a file's first bytes whether it may be one of `torch.save`: a zip, or a pickle."""
    return start.startswith((_ZIP_MAGIC, _PICKLE_MAGIC))


def _what_it_is(start: bytes) -> str:
    if not start:
        return "an empty file; download it again"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "a web page, not weights; the download needs a step before (a sign-in, a confirmation)"
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of git-lfs, not weights; fetch them with `git lfs pull`"
    return "not a file of torch.save"


def _read_zip(file: BinaryIO, path: pathlib.Path) -> Any:
    archive = zipfile.ZipFile(file)
    members = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in members if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ConvertError(f"{path}: a zip file, but not one of torch.save: it has no data.pkl")
    folder = pickles[0].removesuffix("data.pkl")
    named = folder + "byteorder" in members
    order = _member(archive, folder + "byteorder").decode() if named else sys.byteorder
    end = path.stat().st_size

    def storage(dtype: np.dtype, key: str, length: int) -> _Storage:
        info = members[f"{folder}data/{key}"]
        if info.compress_type != zipfile.ZIP_STORED:
            raise ConvertError(
                f"{path}: compressed, which torch.save never does; load and save it with torch"
            )
        if info.file_size < length * dtype.itemsize:
            raise ValueError(f"storage {key} has {info.file_size} bytes, not {length} numbers of {dtype}")
        file.seek(info.header_offset)
        magic, name_length, extra_length = _ZIP_HEADER.unpack(file.read(_ZIP_HEADER.size))
        if magic != _ZIP_MAGIC:
            raise ValueError(f"storage {key} is not where the zip file says")
        start = info.header_offset + _ZIP_HEADER.size + name_length + extra_length
        if start + info.file_size > end:
            raise ValueError(f"storage {key} ends behind the file")
        # Files of other libraries may hold more than the storage's numbers.
        crc = info.CRC if info.file_size == length * dtype.itemsize else 0
        return _Storage(dtype, length, start, byteswapped=order != sys.byteorder, crc=crc)

    return _Unpickler(io.BytesIO(_member(archive, pickles[0])), path, storage).load()


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    """Reads a small member of a zip, whatever size the zip says it has."""
    with archive.open(name) as file:
        content = file.read(_MAX_PICKLE + 1)
    if len(content) > _MAX_PICKLE:
        raise ValueError(f"{name} has more than {_MAX_PICKLE:,} bytes")
    return content


def _read_legacy(file: BinaryIO, path: pathlib.Path) -> Any:
    storages: dict[str, _Storage] = {}
    pickles = io.BytesIO(file.read(_MAX_PICKLE))

    def storage(dtype: np.dtype, key: str, length: int) -> _Storage:
        return storages.setdefault(key, _Storage(dtype, length, byteswapped=sys.byteorder != "little"))

    def load() -> Any:
        return _Unpickler(pickles, path, storage).load()

    if load() != _LEGACY_MAGIC:
        raise ConvertError(f"{path}: a pickle, but not one of torch.save")
    _version, _system, content, keys = load(), load(), load(), load()
    if set(keys) != set(storages):
        raise ValueError(f"{len(storages)} storages in use, {len(keys)} in the file")
    end = path.stat().st_size
    file.seek(pickles.tell())
    for key in keys:
        (length,) = struct.unpack("<q", file.read(8))
        found = storages[key]
        found.start = file.tell()
        size = found.length * found.dtype.itemsize
        if length != found.length or found.start + size > end:
            raise ValueError(f"storage {key} has not its {found.length} numbers")
        file.seek(size, io.SEEK_CUR)
    return content


def _state_dict(content: Any, path: pathlib.Path) -> tuple[Mapping[str, _View], str]:
    """Finds the state dict, which is the content itself or in it. Returns it, and a note of other arrays."""
    taken, beside = [], {}
    while isinstance(content, dict) and len(taken) < 3:
        name = next((name for name in WRAPPERS if isinstance(content.get(name), dict)), None)
        if name is None:
            break
        beside |= {key: value for key, value in content.items() if key != name}
        content = content[name]
        taken.append(name)
    if not isinstance(content, dict):
        raise ConvertError(
            f"{path}: expected a state dict (name -> tensor), found a {type(content).__name__}"
        )
    for name, value in content.items():
        if not isinstance(value, _View) or not isinstance(name, str):
            kind = "tensor" if isinstance(value, _View) else type(value).__name__
            raise ConvertError(
                f"{path}: expected a state dict (name -> tensor), but it holds {name!r} -> {kind}. "
                "Save the weights alone: torch.save(model.state_dict(), path)"
            )
    left_out = [f"{key!r} ({found})" for key, value in beside.items() if (found := _size(value))]
    if not left_out:
        return content, ""
    return content, f"the weights under {'/'.join(taken)!r} are taken; left out are {', '.join(left_out)}"


def _size(value: Any) -> str:
    """Returns the number of arrays in a tree, and of their numbers; "" if there is none."""
    shapes = [view.shape for view in _views(value)]
    numbers = sum(math.prod(shape) for shape in shapes)
    return f"{len(shapes)} arrays, {numbers:,} numbers" if shapes else ""


def _views(value: Any) -> Iterator[_View]:
    """Yields the tensors in a tree of dictionaries, lists and tuples, each object once."""
    seen, left = set(), [value]
    while left:
        part = left.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, _View):
            yield part
        elif isinstance(part, dict):
            left += part.values()
        elif isinstance(part, list | tuple):
            left += part
