"""Writes and reads model.safetensors: parameters by name, with a checksum of each array and of the header.

The checksums are in the file's metadata, which other readers of safetensors ignore. The header's is of the
arrays' names, types, shapes and places. Equal arrays and metadata make equal files.
"""

import json
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from richhf_jax import checksums, errors, foreign_text, reading

FILE = "model.safetensors"
_CHECKSUMS, _HEADER = "crc32c", "header_crc32c"
_METADATA = "__metadata__"
_FLOATING = ("F64", "F32", "F16", "BF16")  # Types of parameters, as the header names them.
_shown = foreign_text.for_terminal  # For names out of a file.


def write(path: pathlib.Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes arrays, and metadata beside the checksums.

    Raises:
      errors.UserError: an array holds NaN or infinity.
      OSError, safetensors.SafetensorError: the file can't be written.
    """
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise errors.UserError(
                f"the parameter {_shown(name)} holds NaN or infinity, so its training has failed:"
                " take an older checkpoint"
            )
    found = {name: checksums.of_array(array) for name, array in arrays.items()}
    path.touch()
    mode = path.stat().st_mode  # That of the umask. The library's file is for its owner alone.
    filled_in = {**metadata, _CHECKSUMS: json.dumps(found), _HEADER: "0" * 8}
    safetensors.numpy.save_file(dict(arrays), path, filled_in)
    path.chmod(mode)
    _finish_header(path, filled_in)


def _finish_header(path: pathlib.Path, metadata: Mapping[str, str]) -> None:
    """Writes the header's checksum, and the metadata in one order. The library takes a random one."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header[_METADATA] = {**metadata, _HEADER: _header_checksum(header)}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length
        file.seek(8)
        file.write(text.ljust(length))


def _header_checksum(header: Mapping[str, Any]) -> str:
    return checksums.of_json({name: entry for name, entry in header.items() if name != _METADATA})


def check_header(
    path: epath.PathLike, header: Mapping[str, Any], names: Collection[str] | None = None
) -> None:
    """Checks that a file's header is the one that was written, and that arrays are of floating point.

    Args:
      path: the file, for messages.
      header: the parsed header.
      names: the arrays that must be of floating point; None: all.

    Raises:
      errors.UserError: it isn't, or an array is of another type.
    """
    if header.get(_METADATA, {}).get(_HEADER) not in (None, _header_checksum(header)):
        raise errors.UserError(f"{path}: its header isn't as it was written; copy the file again")
    for name, entry in header.items():
        is_wanted = name != _METADATA and (names is None or name in names)
        if is_wanted and entry["dtype"] not in _FLOATING:
            raise errors.UserError(
                f"{path}: {_shown(name)} can't be of type {entry['dtype']}; copy the file again"
            )


def of_file(path: epath.PathLike) -> str:
    """Returns a checksum of a file's header, in which are those of its arrays.

    Raises:
      OSError: it can't be read.
    """
    with epath.Path(path).open("rb") as file:
        return checksums.of_bytes(file.read(min(int.from_bytes(file.read(8), "little"), reading.SMALL)))


def read(path: epath.PathLike, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """Reads all arrays and checks them.

    Args:
      path: the file.
      names: see `check_header`.

    Raises:
      errors.UserError: the file is damaged, or is no file of safetensors.
      OSError: it can't be read.
    """
    reading.check_regular(path)
    content = epath.Path(path).read_bytes()
    try:
        arrays = safetensors.numpy.load(content)
        header = reading.parse_json(content[8 : 8 + int.from_bytes(content[:8], "little")])
    except (safetensors.SafetensorError, KeyError, ValueError) as error:  # KeyError: a type that numpy lacks.
        raise errors.UserError(
            f"{path} can't be read as float32 parameters: {error}; copy the file again"
        ) from error
    check_header(path, header, names)
    expected = recorded_checksums(path, header.get(_METADATA, {}))
    for name, array in arrays.items():
        check(path, name, array, expected)
        if not expected and not np.isfinite(array).all():
            raise errors.UserError(f"{path}: {_shown(name)} holds NaN or infinity: copy the file again")
    return arrays


def recorded_checksums(path: epath.PathLike, metadata: Mapping[str, str]) -> dict[str, str]:
    """Returns the checksums in a file's metadata, by name of the array; {} for a file of others.

    Raises:
      errors.UserError: they are damaged.
    """
    try:
        return dict(reading.parse_json(metadata.get(_CHECKSUMS, "{}")))
    except (TypeError, ValueError) as error:
        raise errors.UserError(f"{path}: its checksums are damaged; copy it again") from error


def check(path: epath.PathLike, name: str, array: np.ndarray, expected: Mapping[str, str]) -> None:
    """Checks an array that was read, if its file has checksums.

    Raises:
      errors.UserError: the array isn't the one that was written.
    """
    if expected and checksums.of_array(array) != expected.get(name):
        raise errors.UserError(
            f"{path}: {_shown(name)} isn't the array that was written, its checksum is wrong; copy it again"
        )
