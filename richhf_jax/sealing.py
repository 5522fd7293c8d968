"""Checksums of a checkpoint, in its file checksums.json: written before it gets its name, checked when read.

    {"files": {"state/_METADATA": "1b2c3d4e", ...}, "arrays": {"params/dense/kernel": "...", ...},
     "checksum": that of the two entries above}

`arrays` are the arrays' own bytes, so their checksums are the same in every format and on every mesh. `files`
are all others: the small ones that say what the arrays are. A checkpoint without checksums.json is taken as
one that an older version wrote, and its numbers are only checked for being finite. So whoever changes a
checkpoint on purpose deletes the file.
"""

import asyncio
import errno
import json
import os
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from richhf_jax import checksums, reading, writing

FILE = "checksums.json"
_CUT = "it is cut off or has other bytes than were written"

# Path of names of an array in its checkpoint -> the array.
Arrays = Mapping[tuple[str, ...], jax.Array]


class DamageError(ValueError):
    """Something isn't what was saved; the message names the file or the array."""


def of_arrays(arrays: Arrays) -> dict[str, str]:
    """Computes checksums of arrays on the devices of all processes, which must all call it.

    Returns:
      Name, joined by "/" -> checksum.
    """
    pieces = {name: checksums.Pieces(array.shape, array.dtype.itemsize) for name, array in arrays.items()}

    def contribution(name: tuple[str, ...], shard: Any) -> int:
        return pieces[name].contribution(np.asarray(shard.data), shard.index)

    joined = _over_shards(arrays, contribution, np.bitwise_xor)
    return {
        "/".join(name): pieces[name].checksum(int(value)) for name, value in zip(arrays, joined, strict=True)
    }


def _over_shards(
    arrays: Arrays, function: Callable[[tuple[str, ...], Any], int], join: np.ufunc
) -> Sequence[int]:
    """Applies a function to one replica of each shard of all processes, and joins an array's results."""
    own = np.zeros(len(arrays), np.uint32)
    for number, (name, array) in enumerate(arrays.items()):
        for shard in array.addressable_shards:
            if shard.replica_id == 0:
                own[number] = join(own[number], np.uint32(function(name, shard)))
    if not all(array.is_fully_addressable for array in arrays.values()):
        own = join.reduce(multihost_utils.process_allgather(own).reshape(-1, len(own)))
    return own.tolist()


def check_arrays(arrays: Arrays, expected: Mapping[str, str] | None) -> None:
    """Checks arrays that were read, in all processes at once.

    Args:
      arrays: arrays of the types in which they were saved.
      expected: the checksums that `read` returned; None: the arrays must be finite.

    Raises:
      DamageError: an array isn't the one that was saved, or isn't finite.
    """
    if expected is not None:
        found = of_arrays(arrays)
        wrong = [name for name, checksum in found.items() if checksum != expected.get(name)]
        reason = "other numbers than were saved"
    else:
        wrong = ["/".join(name) for name in _not_finite(arrays)]
        reason = "numbers that are not finite"
    if wrong:
        names = f"{', '.join(wrong[:3])}{' ...' if len(wrong) > 3 else ''}"
        raise DamageError(f"{len(wrong)} of {len(arrays)} arrays have {reason}: {names}")


def _not_finite(arrays: Arrays) -> list[tuple[str, ...]]:
    floating = {name: array for name, array in arrays.items() if jnp.issubdtype(array.dtype, jnp.floating)}
    bad = _over_shards(floating, lambda _, shard: not np.isfinite(shard.data).all(), np.bitwise_or)
    return [name for name, value in zip(floating, bad, strict=True) if value]


def read(checkpoint: epath.Path, item: str) -> dict[str, str] | None:
    """Reads the checksums of a checkpoint's arrays, and checks the files of an item by theirs.

    Args:
      checkpoint: a `checkpoint_<step>`.
      item: a folder in it.

    Returns:
      Name of an array -> checksum; None: the checkpoint has no checksums.

    Raises:
      DamageError: a file isn't the one that was written.
      errors.UserError: a file is none that can be read, such as a pipe.
      OSError: a file can't be read.
    """
    path = checkpoint / FILE
    if not path.exists():
        return None
    try:
        content = reading.parse_json(reading.read_bytes(path))
        checksum = content.pop("checksum")
        files, arrays = content["files"], content["arrays"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamageError(f"{path}: {_CUT}") from error
    if checksum != checksums.of_json(content):
        raise DamageError(f"{path}: {_CUT}")
    for name, expected in files.items():
        if name.startswith(f"{item}/"):
            file = checkpoint / name
            if not file.exists():
                raise DamageError(f"{file} is missing")
            if checksums.of_bytes(reading.read_bytes(file)) != expected:
                raise DamageError(f"{file}: {_CUT}")
    return arrays


def of_checkpoint(checkpoint: epath.Path) -> str:
    """Returns a checksum that tells checkpoints of the same path apart.

    It is that of the checkpoint's own ones; if it has none, that of its files' names and sizes.
    """
    own = checkpoint / FILE
    if own.exists():
        return checksums.of_bytes(reading.read_bytes(own))
    paths = [folder / name for folder, _, names in checkpoint.walk() for name in names]
    return checksums.of_json({path.relative_to(checkpoint).as_posix(): path.stat().length for path in paths})


def write(checkpoint: epath.Path, arrays: Mapping[str, str]) -> None:
    """Writes checksums.json into a checkpoint of which everything else is written.

    Args:
      checkpoint: the checkpoint's directory.
      arrays: the result of `of_arrays`.
    """
    paths = [folder / name for folder, _, names in checkpoint.walk() for name in names]
    places = {path: path.relative_to(checkpoint) for path in paths}
    files = {
        place.as_posix(): checksums.of_bytes(path.read_bytes())
        for path, place in places.items()
        if not any(part == "d" or part.startswith("ocdbt.process_") for part in place.parts)
    }
    content = {"files": files, "arrays": dict(arrays)}
    text = json.dumps(content | {"checksum": checksums.of_json(content)}, indent=1)
    (checkpoint / FILE).write_text(text + "\n", encoding="utf-8")


def _identity(directory: epath.Path) -> tuple[int, int] | None:
    """Returns what a local directory keeps when it is moved; None if there is none."""
    try:
        found = os.stat(directory)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def temporary_path_class(
    parent: epath.Path, arrays: MutableMapping[str, dict[str, str]]
) -> type[ocp.path.atomicity.TemporaryPathBase]:
    """Makes the class by which Orbax finishes a checkpoint: it writes checksums.json and gives the name.

    Orbax brings the arrays to the disk, but not the small files: here all are, before the checkpoint has its
    name. Items in a checkpoint are finished as always. If the parent is deleted or moved meanwhile, nothing
    gets its name.

    Args:
      parent: the checkpoints' parent.
      arrays: name of a checkpoint's directory -> the result of `of_arrays`, which is removed at the end.
    """
    identity = _identity(parent)
    base: Any = ocp.path.atomicity_defaults.get_default_temporary_path_class(parent)

    class _Path(base):
        async def finalize(self) -> None:
            new, final = self.get(), self.get_final()
            if final.name not in arrays:
                await super().finalize()
                return
            # TensorStore would go on in a new directory of the same name.
            if identity not in (None, _identity(parent)):
                raise FileNotFoundError(errno.ENOENT, "was deleted or moved meanwhile", os.fspath(parent))
            await asyncio.to_thread(self._checkpoint_metadata_store.wait_until_finished)
            await asyncio.to_thread(write, new, arrays.pop(final.name))
            if new == final:  # In a bucket, which can't rename: a last file says that all is there.
                await super().finalize()
            else:
                await asyncio.to_thread(writing.move, new, final)

    return _Path
