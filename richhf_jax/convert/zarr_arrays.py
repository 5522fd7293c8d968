"""Reads the zarr arrays of T5X and Orbax with TensorStore.

Orbax can't read them instead: it doesn't know T5X's older layout, takes 15 ms even for a small array, and
prints damage a second time when the program ends.
"""

import math
import pathlib
import zlib

import numpy as np
import tensorstore as ts

from richhf_jax import reading
from richhf_jax.convert.source import ConvertError, Tensor, read_json

ORBAX_INDEX = "_METADATA"
_OCDBT = "manifest.ocdbt"


def orbax_names(index: pathlib.Path) -> list[tuple[str, ...]]:
    """Returns the names of an Orbax checkpoint's leaves, each as the keys of its path in the tree.

    Raises:
      ConvertError: the index is damaged.
    """
    tree = read_json(index)
    try:
        leaves = [leaf["key_metadata"] for leaf in tree["tree_metadata"].values()]
        names = [tuple(str(key["key"]) for key in leaf) for leaf in leaves]
        if () in names:
            raise ValueError("an array has no name")
        return names
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConvertError(
            f"{index} is truncated, or not Orbax's ({type(error).__name__}: {error})"
        ) from error


class ZarrArrays:
    """The zarr arrays beside an index, each in a folder or all in one OCDBT database.

    Attributes:
      index: the file that names the arrays.
    """

    def __init__(self, index: pathlib.Path):
        """Opens the folder of an index.

        Raises:
          ConvertError: the database is damaged.
          errors.UserError: a file is a named pipe or the like.
        """
        reading.check_files(index.parent)
        self.index, folder = index, f"{index.parent.absolute()}/"
        self._origins: dict[str, str] = {}  # Folder -> the array that it holds.
        spec = {"driver": "file", "path": folder}
        if (index.parent / _OCDBT).is_file():
            spec = {"driver": "ocdbt", "base": spec}
        try:
            self._store = ts.KvStore.open(spec).result()
            self._keys = {key.decode() for key in self._store.list().result()}
        except ValueError as error:
            raise ConvertError(f"{folder}{_OCDBT} {_damaged(error)}") from error

    def tensor(self, name: str, origin: str) -> Tensor:
        """Returns the array of a folder.

        Args:
          name: the folder's name.
          origin: the array's name in the checkpoint.

        Raises:
          ConvertError: the array is missing or damaged. Damaged numbers are found only when they are read.
        """
        other = self._origins.setdefault(name, origin)
        if other != origin:
            raise ConvertError(f"{self.index} names {name} for {origin} and for {other}: it is damaged")
        array, chunks = self._open(name)
        metadata = array.spec().to_json()["metadata"]
        zipped = (metadata["compressor"] or {}).get("id") in ("gzip", "zlib")
        chunk_bytes = math.prod(metadata["chunks"]) * array.dtype.numpy_dtype.itemsize

        def read() -> np.ndarray:
            try:
                for chunk in chunks if zipped else ():
                    _check_inflated(self._store.read(chunk).result().value, chunk_bytes)
                return array.read().result()
            except (ValueError, zlib.error) as error:
                raise ConvertError(f"{self.index.parent / name} {_damaged(error)}") from error

        return Tensor(origin, array.shape, array.dtype.numpy_dtype, read)

    def _open(self, name: str) -> tuple[ts.TensorStore, list[str]]:
        """Opens an array and returns its chunks. Zarr would read a missing one as zeros."""
        where = self.index.parent / name
        try:
            spec = {"driver": "zarr", "kvstore": (self._store / f"{name}/").spec().to_json()}
            array = ts.open(spec, read=True).result()
        except ValueError as error:
            raise ConvertError(f"{where}, which {self.index.name} names, {_damaged(error)}") from error
        metadata = array.spec().to_json()["metadata"]
        shape, chunks = array.shape, metadata["chunks"]
        grid = [-(-size // chunk) for size, chunk in zip(shape, chunks, strict=True)]
        too_large = math.prod(chunks) > 2 ** len(shape) * math.prod(max(size, 1) for size in shape)
        if too_large or math.prod(grid) > len(self._keys):
            raise ConvertError(
                f"{where} says that it has shape {shape} in chunks of {tuple(chunks)}, which is not in its"
                " files: copy the whole checkpoint again"
            )
        keys = []
        for position in np.ndindex(*grid):
            keys.append(f"{name}/{metadata['dimension_separator'].join(map(str, position)) or '0'}")
            if keys[-1] not in self._keys:
                raise ConvertError(
                    f"{self.index.parent / keys[-1]} is missing: copy the whole checkpoint again"
                )
        return array, keys


def _check_inflated(chunk: bytes, size: int) -> None:
    """Checks a chunk of gzip or zlib by the checksum in it, which TensorStore doesn't look at.

    Raises:
      ValueError, zlib.error: the checksum is wrong, or the chunk inflates to another number of bytes.
    """
    inflated = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # Either header.
    length = len(inflated.decompress(chunk, size + 1))
    if length != size or not inflated.eof:
        raise ValueError(f"a chunk doesn't hold its {size} bytes")


def _damaged(error: Exception) -> str:
    """Returns the end of a message: TensorStore's words, without its specs and source lines."""
    return f"can't be read ({str(error).split(' [')[0]}): copy the whole checkpoint again"
