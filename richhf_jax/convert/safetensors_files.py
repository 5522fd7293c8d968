"""Reads .safetensors files array by array.

The `safetensors` library only checks a file. The numbers are read here, because the library's numpy side
knows no bfloat16, and because the memory map that it reads through would add to the memory of the arrays.
"""

import json
import pathlib
import struct
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from richhf_jax import weights_file
from richhf_jax.convert.source import ConvertError, Tensor

# Names of types in a header, see https://github.com/huggingface/safetensors. Numbers are little-endian.
_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


def read_safetensors(path: str | pathlib.Path, own: bool = False) -> dict[str, Tensor]:
    """Returns a file's arrays by name; only the header is read.

    Args:
      path: the file.
      own: whether this project wrote it, so that all arrays are parameters.

    Raises:
      ConvertError: there is no such file, it is truncated or no safetensors file, or a type is unknown.
      errors.UserError: the header or the checksums in the file are damaged. An array whose checksum is wrong
        is found only when it is read.
    """
    header, start = _header(path)
    if own:
        weights_file.check_header(path, header)
    checksums = weights_file.recorded_checksums(path, header.pop("__metadata__", {}))
    return {name: _tensor(path, name, entry, start, checksums) for name, entry in header.items()}


def read_metadata(path: str | pathlib.Path) -> dict[str, str]:
    """Returns a file's metadata, {} if it has none. Raises the errors of `read_safetensors`."""
    return _header(path)[0].get("__metadata__", {})


def _header(path: str | pathlib.Path) -> tuple[dict[str, Any], int]:
    """Returns the checked header, and the byte at which the numbers begin."""
    try:
        # This checks the header, and that the arrays fill the file exactly.
        with safetensors.safe_open(path, framework="numpy"):
            pass
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            return json.loads(file.read(length)), 8 + length
    except FileNotFoundError as error:
        raise ConvertError(f"{path}: no such file") from error
    except safetensors.SafetensorError as error:
        raise ConvertError(f"{path} is truncated, or no safetensors file: {error}") from error


def _tensor(
    path: str | pathlib.Path, name: str, entry: Mapping[str, Any], start: int, checksums: Mapping[str, str]
) -> Tensor:
    if entry["dtype"] not in _DTYPES:
        raise ConvertError(
            f"{path}: {name} has the unknown type {entry['dtype']}; known are {', '.join(_DTYPES)}"
        )
    shape, dtype = tuple(entry["shape"]), _DTYPES[entry["dtype"]]
    begin, end = (start + offset for offset in entry["data_offsets"])

    def read() -> np.ndarray:
        array = np.fromfile(path, dtype, (end - begin) // dtype.itemsize, offset=begin).reshape(shape)
        weights_file.check(path, name, array, checksums)
        return array

    return Tensor(name, shape, dtype, read)
