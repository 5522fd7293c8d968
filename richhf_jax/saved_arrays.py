"""Reads the arrays of a checkpoint, of Orbax's format, onto the devices, and checks that they are whole."""

import contextlib
import functools
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from richhf_jax import errors, foreign_text, reading, sealing, writing

STATE = "state"  # The folder of the arrays in a `checkpoint_<step>`.
# The files of a checkpoint that Orbax and TensorStore open. Others may lie beside them.
_READ = (
    *(
        "*_METADATA",
        f"{STATE}/_*",
        f"{STATE}/manifest.ocdbt",
        f"{STATE}/d/*",
        f"{STATE}/ocdbt.process_*/**/*",
    ),
    *(f"{STATE}/array_metadatas/*", "data_position/*", "metrics/*"),
)


def flat(tree: Any) -> dict[tuple[str, ...], Any]:
    """Flattens a tree, even of tuples and dataclasses, or Orbax's metadata, to {path of names: leaf}."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {tuple(jax.tree_util.keystr((key,), simple=True) for key in path): leaf for path, leaf in paths}


def metadata(directory: epath.Path) -> Mapping[str, Any]:
    """Reads which arrays a checkpoint holds: a tree of leaves with `shape` and `dtype`."""
    return ocp.PyTreeCheckpointHandler().metadata(directory / STATE).tree


def check_files(directory: epath.Path) -> dict[str, str] | None:
    """Checks that all files of the state are there, and returns the arrays' checksums as `sealing.read` does.

    It reads little of each array: the last byte.

    Raises:
      Exception: of many kinds, if a file is damaged or can't be read.
    """
    reading.check_files(directory, _READ)
    checksums = sealing.read(directory, STATE)
    base = directory / STATE
    store = ts.KvStore.open(_database(directory)).result()
    reads = {key: store.read(key, byte_range=slice(-1, None)) for key in store.list().result()}
    absent = [key.decode() for key, read in reads.items() if read.result().state != "value"]
    if absent or not reads:
        raise sealing.DamageError(f"{base} has lost {absent[0] if absent else 'all values'}")
    return checksums


def _database(directory: epath.Path) -> dict[str, Any]:
    """Returns TensorStore's specification of the database of a checkpoint's arrays."""
    text = f"{os.fspath(directory / STATE)}/"
    # A local path is no URL: "%25", "#" or "?" in it are characters like others.
    return {"driver": "ocdbt", "base": text if "://" in text else {"driver": "file", "path": text}}


def read(directory: epath.Path, abstract: Any) -> Any:
    """Reads the arrays of a tree of `ShapeDtypeStruct`s, each with the type in which it was saved.

    TensorStore reads them: Orbax would leave its work on the other arrays behind after an error, which prints
    tracebacks.

    Raises:
      sealing.DamageError: an array can't be read; the message names it.
    """
    leaves = flat(abstract)
    context = ts.Context({"cache_pool": {"total_bytes_limit": 10**8}})  # For the index.
    stores = {name: ts.open(_spec(directory, name), open=True, context=context) for name in leaves}
    parts, arrays = {}, []
    for name, leaf in leaves.items():
        with _explained(name):
            store = stores[name].result()
            assert leaf.sharding is not None
            places = leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
            parts[name] = {str(place): store[place].read() for place in places}
    for name, leaf in leaves.items():  # All reads have begun before the first one is waited for.
        with _explained(name):
            own = parts.pop(name)
            arrays.append(
                jax.make_array_from_callback(
                    leaf.shape, leaf.sharding, lambda place, own=own: own[str(place)].result()
                )
            )
    return jax.tree.unflatten(jax.tree.structure(abstract), arrays)


def _spec(directory: epath.Path, name: tuple[str, ...]) -> dict[str, Any]:
    """Returns TensorStore's specification of an array."""
    return {
        "driver": "zarr",
        "kvstore": {**_database(directory), "path": ".".join(name)},
        "fill_missing_data_reads": False,  # Else what is missing would be zeros.
    }


@contextlib.contextmanager
def _explained(name: tuple[str, ...]) -> Iterator[None]:
    """Turns any exception while reading an array into a DamageError that names the array."""
    try:
        yield
    except Exception as error:  # TensorStore raises many kinds.
        raise sealing.DamageError(f"{'/'.join(name)}: {writing.reason(error)}") from error


def checked(directory: epath.Path, arrays: Any, abstract: Any, checksums: Mapping[str, str] | None) -> Any:
    """Checks the arrays of `read` in all processes, and converts them to the wanted types.

    Raises:
      sealing.DamageError: an array isn't the one that was saved.
    """
    if checksums is None and jax.process_index() == 0:
        _warn_of_no_checksums(directory)
    kinds = flat(jax.tree.map(lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating), abstract))
    for name, array in flat(arrays).items():  # Checksums are of bytes, and don't say what the bytes mean.
        if jnp.issubdtype(array.dtype, jnp.floating) != kinds[name]:
            raise sealing.DamageError(f"{'/'.join(name)} can't be of type {array.dtype}")
    sealing.check_arrays(flat(arrays), checksums)
    return jax.tree.map(
        lambda array, leaf: array if array.dtype == leaf.dtype else array.astype(leaf.dtype), arrays, abstract
    )


@functools.cache
def _warn_of_no_checksums(directory: epath.Path) -> None:
    """Warns once of a checkpoint. The programs that predict don't show the log's warnings."""
    words = (
        f"warning: {directory} has no {sealing.FILE} (an older version wrote it, or the file was deleted):"
    )
    words += " damage may stay unseen, only numbers that are not finite are found"
    print(foreign_text.for_terminal(words), file=sys.stderr, flush=True)


def reason(error: Exception) -> str:
    """Describes an error while reading."""
    return str(error) if isinstance(error, sealing.DamageError | errors.UserError) else writing.reason(error)
