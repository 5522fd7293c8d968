"""Writes parameters as one .safetensors file, or as a checkpoint."""

import pathlib

import jax
import numpy as np

from richhf_jax import weights_file
from richhf_jax.convert import own, writers
from richhf_jax.export.program import Arrays


def write_safetensors(directory: pathlib.Path, params: Arrays) -> None:
    """Writes model.safetensors, with the names of `forward.flatten`."""
    arrays = {name: np.asarray(array, order="C") for name, array in params.items()}
    weights_file.write(directory / weights_file.FILE, arrays, own.SAFETENSORS_METADATA)


def write_checkpoint(directory: pathlib.Path, params: Arrays, step: int) -> None:
    """Writes checkpoint_<step> without optimizer state, for evaluation and INITIAL_CHECKPOINT_PATH."""
    arrays = {name: jax.numpy.asarray(array) for name, array in params.items()}
    writers.save_checkpoint(directory, arrays, step)
