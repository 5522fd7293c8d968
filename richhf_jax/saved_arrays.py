"""Reads the arrays of a checkpoint, of Orbax's format, onto the devices, and checks that they are whole."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
import tensorstore as ts
from absl import logging
from etils import epath

from richhf_jax import errors, reading, sealing, writing

STATE = "state"  # The folder of the arrays in a `checkpoint_<step>`.


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
    reading.check_tree(directory)
    checksums = sealing.read(directory, STATE)
    base = directory / STATE
    store = ts.KvStore.open(f"{_url(base)}/|ocdbt:").result()
    reads = {key: store.read(key, byte_range=slice(-1, None)) for key in store.list().result()}
    absent = [key.decode() for key, read in reads.items() if read.result().state != "value"]
    if absent or not reads:
        raise sealing.DamageError(f"{base} has lost {absent[0] if absent else 'all values'}")
    return checksums


def _url(path: epath.Path) -> str:
    """Returns a path as TensorStore wants it."""
    text = os.fspath(path)
    return text if "://" in text else f"file://{text}"


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
        "kvstore": {"driver": "ocdbt", "base": _url(directory / STATE), "path": ".".join(name)},
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
    if checksums is None:
        logging.warning(
            "%s has no %s (an older version wrote it, or the file was deleted): damage may stay unseen,"
            " only numbers that are not finite are found",
            directory,
            sealing.FILE,
        )
    sealing.check_arrays(flat(arrays), checksums)
    return jax.tree.map(
        lambda array, leaf: array if array.dtype == leaf.dtype else array.astype(leaf.dtype), arrays, abstract
    )


def reason(error: Exception) -> str:
    """Describes an error while reading."""
    return str(error) if isinstance(error, sealing.DamageError | errors.UserError) else writing.reason(error)
