"""Reads our own checkpoints, with or without an optimizer's state, and our own .safetensors files."""

import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from etils import epath

from richhf_jax import checkpoints, errors, sealing, train_state, weights_file
from richhf_jax.convert import layers, safetensors_files, zarr_arrays
from richhf_jax.convert.source import ConvertError, Source, Tensor
from richhf_jax.train_state import MUTABLES

# Metadata of our .safetensors files.
SAFETENSORS_METADATA = {"format": "richhf_jax"}
_CHECKPOINT = re.compile(r"checkpoint_\d+")


def is_checkpoint(path: str) -> bool:
    """Tells whether a path is a `checkpoint_<step>`, or a MODEL_DIR with one."""
    try:
        checkpoints.find_checkpoint(path)
    except checkpoints.CheckpointError:
        return False
    return True


def open_checkpoint(path: str) -> Source:
    """Opens a checkpoint of `richhf_jax.train` or of a conversion; the optimizer's state is left out.

    Of a checkpoint with an average of the parameters, that is taken.

    Raises:
      ConvertError: the checkpoint is damaged, or holds no parameters.
    """
    directory, step = checkpoints.find_checkpoint(path)
    index = pathlib.Path(directory, "state", zarr_arrays.ORBAX_INDEX)
    if not index.is_file():
        raise ConvertError(f"{directory} is damaged: it lacks state/{index.name}")
    found = zarr_arrays.orbax_names(index)
    part = train_state.inference_part([name[0] for name in found])
    names = [name for name in found if name[0] in (part, MUTABLES)]
    arrays = zarr_arrays.ZarrArrays(index)
    checksums = sealing.read(epath.Path(directory), "state") or {}
    tensors = {}
    for name in names:
        tensor = arrays.tensor(".".join(name), "/".join(name[name[0] != MUTABLES :]))
        if not jnp.issubdtype(tensor.dtype, jnp.floating):  # Checksums are of bytes, and don't say the type.
            raise ConvertError(f"{directory} is damaged: {tensor.origin} can't be of type {tensor.dtype}")
        tensors[tensor.origin] = _checked(tensor, "/".join(name), directory, checksums)
    average = ", average of the parameters" if part != "params" else ""
    left_out = f", without {len(found) - len(names)} other arrays" if len(found) > len(names) else ""
    return _source(directory, f"our checkpoint of step {step}{average}{left_out}", tensors)


def _checked(tensor: Tensor, name: str, directory: str, checksums: Mapping[str, str]) -> Tensor:
    """Returns a tensor whose `read` compares the array with its checksum, if the checkpoint has any."""

    def read() -> np.ndarray:
        array = tensor.read()
        weights_file.check(directory, name, array, checksums)
        return array

    return dataclasses.replace(tensor, read=read)


def check_outside_checkpoints(path: str, flag: str) -> None:
    """Checks that a result isn't written into a checkpoint, nor in the place of one.

    Raises:
      errors.UserError: it is; the message names the flag that gave the path.
    """
    place = pathlib.Path(path).resolve()
    for part in (place, *place.parents):
        if _CHECKPOINT.fullmatch(part.name):
            raise errors.UserError(f"{flag}={path} lies in the checkpoint {part}: name a directory elsewhere")


def is_safetensors(path: str) -> bool:
    """Tells whether a path is a .safetensors file, or a directory with a model.safetensors."""
    return _safetensors_file(path) is not None


def open_safetensors(path: str) -> Source:
    """Opens a file that `--format=safetensors` wrote, or its directory.

    Raises:
      ConvertError: there is no such file, it is damaged, or this project did not write it.
    """
    file = _safetensors_file(path)
    if file is None:
        raise ConvertError(f"{path} is no .safetensors file, nor a directory with a model.safetensors")
    metadata = safetensors_files.read_metadata(file)
    if SAFETENSORS_METADATA.items() - metadata.items():
        raise ConvertError(
            f"{file} is a safetensors file, but not of this project; if it is Hugging Face's, give its"
            " directory"
        )
    return _source(str(file), "our safetensors", safetensors_files.read_safetensors(file, own=True))


def _safetensors_file(path: str) -> pathlib.Path | None:
    given = pathlib.Path(path)
    places = [given] if given.suffix == ".safetensors" else [given / weights_file.FILE]
    return next((place for place in places if place.is_file()), None)


def _source(path: str, description: str, tensors: dict[str, Tensor]) -> Source:
    numbers = sum(math.prod(t.shape) for t in tensors.values())
    return Source(path, f"{description}, {numbers:,} parameters", layers.unstack_tensors(tensors))
