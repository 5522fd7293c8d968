"""Writes parameters as one .safetensors file, or as a checkpoint."""

import pathlib

import jax
import numpy as np
from flax import traverse_util

from richhf_jax import checkpoints, weights_file, writing
from richhf_jax.convert import own
from richhf_jax.export.program import Arrays


def write_safetensors(directory: pathlib.Path, params: Arrays) -> None:
    """Writes model.safetensors, with the names of `program.flat`."""
    arrays = {name: np.ascontiguousarray(array) for name, array in params.items()}
    weights_file.write(directory / weights_file.FILE, arrays, own.SAFETENSORS_METADATA)


def write_checkpoint(directory: pathlib.Path, params: Arrays, step: int) -> None:
    """Writes checkpoint_<step> without optimizer state, for evaluation and INITIAL_CHECKPOINT_PATH."""
    tree = traverse_util.unflatten_dict(
        {name: jax.numpy.asarray(array) for name, array in params.items()}, sep="/"
    )
    # Orbax raises ValueError or RuntimeError where it can't write an array.
    with writing.explained_disk_errors(directory, also=(ValueError, RuntimeError)):
        checkpoints.save_params(str(directory), tree, step)
