"""StableHLO: one program for CPU, GPU and TPU, for any number of images, beside its parameters."""

import pathlib

import jax
import jax.export

from richhf_jax.export import program
from richhf_jax.model_description import ModelDescription

FILE = "rahf.stablehlo"
PLATFORMS = ("cpu", "cuda", "tpu")


def write(directory: pathlib.Path, description: ModelDescription, params: program.Arrays) -> None:
    """Writes the program, a function of parameters by name and of inputs; see `program.make`.

    The parameters are arguments, not constants: a file of this kind holds at most 2 GB.
    """
    (batch,) = jax.export.symbolic_shape("batch")
    shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in params.items()}
    exported = jax.export.export(jax.jit(program.make(description)), platforms=PLATFORMS)(
        shapes, program.input_shapes(description, batch)
    )
    (directory / FILE).write_bytes(exported.serialize())
