"""Reads T5X's checkpoints, in the older layout (msgpack and zarr) and in Orbax's.

Both hold one zarr array for each parameter, named by its path in T5X's tree, which is also ours. They differ
in the places of the names and of the arrays:

    older    checkpoint                            msgpack: {"version", "optimizer": {"target", "state"}}; a
                                                   leaf is an array, or the TensorStore spec of one
             target.encoder.encoder_norm.scale/    {.zarray, 0}
    Orbax    state/_METADATA                       JSON: {"tree_metadata": {name: {"key_metadata", ...}}}
             state/target.encoder.../              or all of them in one OCDBT database (manifest.ocdbt, d/)
"""

import dataclasses
import mmap
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import serialization, traverse_util

from richhf_jax import checkpoints, reading
from richhf_jax.convert import layers, source, zarr_arrays

_MSGPACK, _ORBAX = "checkpoint", zarr_arrays.ORBAX_INDEX
# Early versions of Orbax wrote this in place of an array into the msgpack file.
_PLACEHOLDER = "PLACEHOLDER://"
_T5X_NAME = re.compile(rb"\('(target|state)'")
_BIAS_IN_LAYER = re.compile(r"(encoder|decoder)/(encoder|decoder|layers_\d+)/relpos_bias/")


def is_t5x(path: str) -> bool:
    """Tells whether a path is a checkpoint of T5X, or a file with the name of T5X's index."""
    return _find_index(path) is not None


def open_t5x(path: str) -> source.Source:
    """Opens a checkpoint of T5X; only small arrays are read.

    Args:
      path: a `checkpoint_<step>` directory, or a MODEL_DIR whose newest checkpoint is taken.

    Returns:
      The parameters under T5X's names. The optimizer's state is left out.

    Raises:
      ConvertError: there is no checkpoint, it is damaged, or it has another architecture. Damaged numbers in
        an array are found only when the array is read.
    """
    index = _find_index(path)
    if index is None:
        raise source.ConvertError(f"{path} is not a checkpoint of T5X: no {_MSGPACK} or {_ORBAX} file in it")
    if index.name == _MSGPACK:
        version, leaves = _read_msgpack(index)
    else:
        version, leaves = None, dict.fromkeys(zarr_arrays.orbax_names(index))
    params = {name: leaf for name, leaf in leaves.items() if name[0] == "target"}
    num_slots = sum(name[0] == "state" for name in leaves)
    _check_architecture(index, ["/".join(name[1:]) for name in params])
    arrays = zarr_arrays.ZarrArrays(index)
    # T5X's own t5 is never scanned, but a model of ours that T5X trained may be.
    tensors = layers.unstack_tensors(
        {"/".join(k[1:]): _tensor(arrays, k, leaf, is_version_2=version == 2) for k, leaf in params.items()}
    )
    depth = [
        len({name.split("/")[1] for name in tensors if name.startswith(f"{stack}/layers_")})
        for stack in ("encoder", "decoder")
    ]
    return source.Source(
        path=str(index.parent),
        description=f"T5X, {depth[0]} + {depth[1]} layers, without {num_slots} arrays of the optimizer",
        tensors=tensors,
        unused={
            "/".join(name): _shape(leaf)
            for name, leaf in leaves.items()
            if name[0] not in ("target", "state")
        },
    )


def _find_index(path: str) -> pathlib.Path | None:
    """Finds the file with the names of a checkpoint's arrays."""
    given = pathlib.Path(path)
    if given.is_file():
        return given if given.name == _MSGPACK else None
    newest = checkpoints.newest_checkpoint(given)
    for place in [given] if newest is None else [given, newest]:
        for index in (place / _MSGPACK, place / "state" / _MSGPACK, place / _ORBAX, place / "state" / _ORBAX):
            # Our own checkpoints also have Orbax's index, but with other names at the top.
            if index.is_file() and (index.name == _MSGPACK or _T5X_NAME.search(reading.read_bytes(index))):
                return index
    return None


def _read_msgpack(index: pathlib.Path) -> tuple[int | None, dict[tuple[str, ...], Any]]:
    """Returns T5X's version of the file (None: not given), and its leaves by name."""
    with index.open("rb") as file:
        if file.read(21) == b"model_checkpoint_path":
            raise source.ConvertError(
                f"{index} is TensorFlow's: convert it with t5x/scripts/convert_tf_checkpoint.py first"
            )
        try:
            # The file is mapped, so it isn't in memory beside the arrays that are read from it.
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                tree = serialization.msgpack_restore(content)  # pyright: ignore[reportArgumentType]: a buffer
                leaves = _leaves(index, tree)
        except source.ConvertError:
            raise
        except Exception as error:  # Bytes that aren't msgpack lead to errors of many types.
            raise source.ConvertError(
                f"{index} is truncated, or not a checkpoint of T5X ({type(error).__name__}: {error})"
            ) from error
    return tree.get("version") if isinstance(tree, Mapping) else None, leaves


def _leaves(index: pathlib.Path, tree: Any) -> dict[tuple[str, ...], Any]:
    """Returns the leaves of the msgpack file's tree by name."""
    tree = tree.get("optimizer", tree) if isinstance(tree, Mapping) else {}
    if not isinstance(tree, Mapping) or not isinstance(tree.get("target"), Mapping):
        raise source.ConvertError(f"{index} is not a checkpoint of T5X: it holds no optimizer/target")
    leaves = traverse_util.flatten_dict(tree, is_leaf=lambda _, value: _is_spec(value))
    return {tuple(map(str, name)): leaf for name, leaf in leaves.items()}


def _is_spec(value: Any) -> bool:
    return isinstance(value, Mapping) and {"driver", "kvstore"} <= value.keys()


def _check_architecture(index: pathlib.Path, names: list[str]) -> None:
    if any(_BIAS_IN_LAYER.match(name) for name in names):
        raise source.ConvertError(
            f"{index} is of T5X's scalable_t5 (umT5), where each layer has its own position biases; in T5 "
            "all layers share them: give a checkpoint of T5X's t5 network"
        )
    if not any(name.startswith("encoder/") for name in names):
        raise source.ConvertError(f"{index} holds no encoder: give a checkpoint of T5X's t5 network")


def _shape(leaf: Any) -> tuple[int, ...] | None:
    """Returns the shape of a leaf that isn't loaded, if the index says it."""
    if not _is_spec(leaf):
        return getattr(leaf, "shape", None)
    try:
        return tuple(map(int, leaf["metadata"]["shape"]))
    except (KeyError, TypeError, ValueError):
        return None


def _tensor(
    arrays: zarr_arrays.ZarrArrays, key: tuple[str, ...], leaf: Any, is_version_2: bool
) -> source.Tensor:
    """Makes a parameter's tensor from its leaf in the index."""
    origin = ".".join(key)
    if isinstance(leaf, np.ndarray):
        return source.Tensor(origin, leaf.shape, leaf.dtype, lambda: leaf)
    path, shape = origin, None
    if _is_spec(leaf):
        kvstore = leaf["kvstore"] if isinstance(leaf["kvstore"], Mapping) else {}
        path = kvstore.get("path") or leaf.get("path")  # The second is TensorStore's before 0.1.14.
        shape = _shape(leaf)
    elif isinstance(leaf, str) and leaf.startswith(_PLACEHOLDER):
        path = leaf
    elif leaf is not None:
        raise source.ConvertError(f"{arrays.index}: {origin} is not an array but {leaf!r:.60}")
    # The path may be of a place where the checkpoint once was, so only the folder's name counts.
    name = str(path).rstrip("/").rpartition("/")[2]
    if not path or name in ("", ".", ".."):
        raise source.ConvertError(f"{arrays.index}: {origin} lies at {path!r}, which names no folder")
    tensor = arrays.tensor(name, origin)
    if shape is not None and shape != tensor.shape:
        raise source.ConvertError(
            f"{arrays.index.parent / name} holds {tensor.shape}, but {arrays.index.name} says {shape}"
        )
    if is_version_2 and tensor.dtype == np.uint16:
        # Before version 3, T5X wrote the bits of bfloat16 as integers.
        bits, dtype = tensor.read, np.dtype(jnp.bfloat16)
        return dataclasses.replace(tensor, dtype=dtype, read=lambda: bits().view(dtype))
    return tensor
