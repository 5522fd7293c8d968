"""Writes MODEL_CARD.md, which tells a model's kind, training data, metrics and limits, and how to load it."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jinja2
from etils import epath

import richhf_jax
from richhf_jax import feedback
from richhf_jax.model_description import ModelDescription

FILE = "MODEL_CARD.md"


def write(
    directory: pathlib.Path,
    description: ModelDescription,
    checkpoint: str,
    num_parameters: int,
    export_format: str,
    step: int,
) -> None:
    """Writes the card.

    Args:
      directory: the export's directory.
      description: the model's description.
      checkpoint: the exported checkpoint; the card shows the evaluations beside it.
      num_parameters: number of the model's parameters.
      export_format: "stablehlo", "savedmodel", "safetensors" or "orbax"; it decides how to load the export.
      step: the checkpoint's step.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("richhf_jax", "export"),
        autoescape=False,  # The card is Markdown, not HTML.
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    card = environment.get_template(FILE).render(
        title="RAHF",
        version=richhf_jax.__version__,
        scores=feedback.SCORES,
        heatmaps=feedback.HEATMAPS,
        checkpoint=checkpoint,
        description=description,
        dtype=description.network.t5_config.dtype,
        lengths=description.feature_lengths,
        num_parameters=num_parameters,
        training=description.training,
        evaluations=evaluations(checkpoint),
        format=export_format,
        step=step,
    )
    (directory / FILE).write_text(card, encoding="utf-8")


def evaluations(checkpoint: str) -> dict[str, Mapping[str, Any]]:
    """Reads the evaluations of a `checkpoint_<step>` in its MODEL_DIR: '<task>, <split>' -> metrics.json."""
    path = epath.Path(checkpoint)
    step = path.name.rpartition("_")[2]
    found = {}
    for metrics in sorted((path.parent / "inference_eval").glob(f"*/*/{step}/metrics.json")):
        task, split = metrics.parts[-4:-2]
        found[f"{task}, {split}"] = json.loads(metrics.read_text(encoding="utf-8"))
    return found
