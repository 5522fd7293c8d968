"""Writes StableHLO: one program for CPU, GPU and TPU and any number of images, without its parameters."""

import pathlib

import jax
import jax.export

from richhf_jax.export import program
from richhf_jax.model_description import ModelDescription

FILE = "rahf.stablehlo"
PLATFORMS = ("cpu", "cuda", "tpu")


def export(description: ModelDescription, params: program.Arrays) -> jax.export.Exported:
    """Makes the program: the function of parameters and inputs that `program.make` returns.

    The parameters are arguments, not constants, because a file of this kind holds at most 2 GB. Only their
    shapes and types are used.
    """
    (batch,) = jax.export.symbolic_shape("batch")
    shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in params.items()}
    return jax.export.export(jax.jit(program.make(description)), platforms=PLATFORMS)(
        shapes, program.input_shapes(description, batch)
    )


def write(directory: pathlib.Path, description: ModelDescription, params: program.Arrays) -> None:
    """Writes the program."""
    (directory / FILE).write_bytes(export(description, params).serialize())
