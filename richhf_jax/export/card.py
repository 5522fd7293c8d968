"""Writes MODEL_CARD.md, which tells a model's kind, training data, metrics and limits, and how to load it."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jinja2
from etils import epath

import richhf_jax
from richhf_jax import foreign_text, reading, writing
from richhf_jax.model_description import SYSTEMS, ModelDescription

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
        autoescape=False,  # The card is Markdown, not HTML: `_shown` escapes what others wrote.
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    card = environment.get_template(FILE).render(
        version=richhf_jax.__version__,
        model=description.model,
        arrays=[f"`{name}`" for name in ("scores", "heatmaps") if getattr(description.model.outputs, name)],
        score_range="{:g} to {:g}".format(*description.model.outputs.score_range),
        vocabulary_file=SYSTEMS[description.system].vocabulary_file,
        arguments="IMAGE PROMPT" if description.reads_text else "IMAGE",
        predictions=_predictions(description),
        checkpoint=_shown(checkpoint),
        description=description,
        dtype=_shown(_dtype(description)),
        lengths=description.feature_lengths,
        num_parameters=num_parameters,
        training={
            _shown(name.replace("_", " ")): _shown(fact) for name, fact in description.training.items()
        },
        evaluations={
            _shown(place): {_shown(name): _shown(value) for name, value in metrics.items()}
            for place, metrics in evaluations(checkpoint).items()
        },
        format=export_format,
        step=step,
    )
    writing.write(directory / FILE, card)


def _predictions(description: ModelDescription) -> str:
    """Returns what example.py prints, in words."""
    outputs = description.model.outputs
    there = {
        "scores": outputs.scores,
        "heatmaps' peaks": outputs.heatmaps,
        "misaligned words": outputs.keywords,
        "uncertainties": description.model.has_uncertainty,
    }
    return ", ".join(name for name, kinds in there.items() if kinds)


def _dtype(description: ModelDescription) -> str | None:
    """Returns the type of the network's activations, by the first of its configurations that has one."""
    parts = (part for part in description.network.describe().values() if isinstance(part, Mapping))
    return next((part["dtype"] for part in parts if "dtype" in part), None)


def _shown(fact: Any) -> str:
    """Returns a fact of a checkpoint's files as one line of text, without their markup."""
    if isinstance(fact, float):
        return f"{fact:.4g}"
    return foreign_text.for_markdown("none" if fact is None else str(fact))


def evaluations(checkpoint: str) -> dict[str, Mapping[str, Any]]:
    """Reads the evaluations of a `checkpoint_<step>` in its MODEL_DIR: '<task>, <split>' -> metrics.json.

    Raises:
      errors.UserError: a metrics.json is damaged.
    """
    path = epath.Path(checkpoint)
    step = path.name.rpartition("_")[2]
    found = {}
    for metrics in sorted((path.parent / "inference_eval").glob(f"*/*/{step}/metrics.json")):
        task, split = metrics.parts[-4:-2]
        found[f"{task}, {split}"] = reading.read_json(metrics)
    return found
