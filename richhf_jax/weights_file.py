"""Writes and reads model.safetensors: parameters by name, with a checksum of each array.

The checksums are in the file's metadata, which other readers of safetensors ignore.
"""

import json
import pathlib
from collections.abc import Mapping

import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from richhf_jax import checksums, errors, foreign_text, reading

FILE = "model.safetensors"
_CHECKSUMS = "crc32c"
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
    safetensors.numpy.save_file(dict(arrays), path, {**metadata, _CHECKSUMS: json.dumps(found)})
    path.chmod(mode)


def read(path: epath.PathLike) -> dict[str, np.ndarray]:
    """Reads all arrays and checks them.

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
        raise errors.UserError(f"{path} can't be read as float32 parameters: {error}") from error
    expected = recorded_checksums(path, header.get("__metadata__", {}))
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
