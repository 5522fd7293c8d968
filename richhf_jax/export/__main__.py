"""Writes a checkpoint for use elsewhere.

    python -m richhf_jax.export --checkpoint MODEL_DIR --to stablehlo --out exported

    stablehlo    rahf.stablehlo: all outputs in one program, for CPU, GPU and TPU and any number of images;
                 its parameters are in model.safetensors
    savedmodel   saved_model/: a TensorFlow SavedModel that takes image bytes and prompts, or arrays; if it
                 reads text, it has tensorflow-text's operations, as TensorFlow Serving does
                 (pip install -e '.[export]')
    safetensors  model.safetensors
    orbax        checkpoint_<step>/ without optimizer state

Each has model.json, vocabulary.model, MODEL_CARD.md and SHA256SUMS beside it. `RahfPredictor` and
`richhf_jax.predict` take each, except savedmodel, as a checkpoint: they read the parameters and what
describes the model, not the program.
"""

import argparse
import dataclasses
import hashlib
import importlib
import json
import pathlib
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import safetensors
from absl import logging

from richhf_jax import errors, model_description, writing
from richhf_jax.convert import own
from richhf_jax.export import card, program, stablehlo, weights
from richhf_jax.predict import forward, predictor

INTERFACE = "interface.json"
_EXAMPLE = "example.py"
_HERE = pathlib.Path(__file__).parent


class Job(NamedTuple):
    """The model to export: its description, its arrays as by `forward.flatten`, and the checkpoint's step."""

    description: model_description.ModelDescription
    params: program.Arrays
    step: int


def _write_stablehlo(directory: pathlib.Path, job: Job) -> None:
    stablehlo.write(directory, job.description, job.params)
    weights.write_safetensors(directory, job.params)
    interface = program.interface(job.description) | {"requires": [f"jax>={jax.__version__}"]}
    _write_guide(directory, interface)
    shutil.copyfile(_HERE / "example_stablehlo.py", directory / _EXAMPLE)


def _write_saved_model(directory: pathlib.Path, job: Job) -> None:
    try:
        # This module needs TensorFlow; the others don't.
        saved_model = importlib.import_module("richhf_jax.export.saved_model")
    except ModuleNotFoundError as error:
        raise errors.UserError(f"a SavedModel needs {error.name}: pip install -e '.[export]'") from error
    if program.reads_clip_tokens(job.description):
        raise errors.UserError(
            f"--to=savedmodel: TensorFlow has no operations for the vocabulary of {job.description.system};"
            " give another --to"
        )
    saved_model.write(directory, job.description, job.params)
    interface = program.interface(job.description) | {"requires": saved_model.requires(job.description)}
    _write_guide(directory, interface)
    shutil.copyfile(_HERE / "example_saved_model.py", directory / _EXAMPLE)


def _write_guide(directory: pathlib.Path, interface: dict[str, Any]) -> None:
    """Writes interface.json, for programs that call the export; example.py is for their authors."""
    writing.write(directory / INTERFACE, json.dumps(interface, indent=2) + "\n")


def _write_checksums(directory: pathlib.Path) -> None:
    """Writes SHA256SUMS for all files of an export, which `sha256sum --check` and example.py read."""
    lines = []
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        lines.append(f"{digest}  {path.relative_to(directory).as_posix()}\n")
    writing.write(directory / model_description.EXPORT_FILE, "".join(lines))


FORMATS: dict[str, Callable[[pathlib.Path, Job], None]] = {
    "stablehlo": _write_stablehlo,
    "savedmodel": _write_saved_model,
    "safetensors": lambda directory, job: weights.write_safetensors(directory, job.params),
    "orbax": lambda directory, job: weights.write_checkpoint(directory, job.params, job.step),
}


def export(checkpoint: str, to: str, out: str, dtype: str | None = None) -> None:
    """Writes an export.

    Args:
      checkpoint: a path that `RahfPredictor.from_checkpoint` takes.
      to: one of `FORMATS`.
      out: a new directory; nothing is left of it after an error.
      dtype: type of activations, 'float32' or 'bfloat16'; None: as in training.

    Raises:
      errors.UserError: the checkpoint can't be loaded; the directory isn't new; TensorFlow is missing.
    """
    writing.check_is_new(out, "--out")
    own.check_outside_checkpoints(out, "--out")
    path = forward.checkpoint_path(checkpoint)
    loaded = predictor.RahfPredictor.from_checkpoint(path, dtype=dtype)
    description = loaded.description
    if program.reads_clip_tokens(description):  # example.py takes all that is in the file.
        description = dataclasses.replace(description, vocabulary=description.encoder.content)
    params = jax.device_get(forward.flatten(loaded.state))
    step = re.search(r"checkpoint_(\d+)$", path)
    job = Job(description, params, int(step[1]) if step else 0)
    with writing.new_directory(out, "--out") as directory:
        FORMATS[to](directory, job)
        description.write(directory)
        num_parameters = sum(array.size for array in params.values())
        card.write(directory, description, path, num_parameters, to, job.step)
        _write_checksums(directory)
    if description.not_calibrated:
        print(f"export: {description.not_calibrated}, then export again", file=sys.stderr)
    for place in sorted(pathlib.Path(out).iterdir()):
        print(place)


@errors.command("export")
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m richhf_jax.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="a MODEL_DIR, a checkpoint_<step> in it, or an export",
    )
    parser.add_argument("--to", required=True, choices=list(FORMATS))
    parser.add_argument("--out", required=True, metavar="DIR", help="a new directory")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="type of activations; default: as in training"
    )
    options = parser.parse_args(arguments)
    logging.set_verbosity(logging.ERROR)  # Orbax warns of missing files that a checkpoint doesn't need.
    with writing.explained_disk_errors(options.out, also=(safetensors.SafetensorError,)):
        export(options.checkpoint, options.to, options.out, options.dtype)


if __name__ == "__main__":
    main()
