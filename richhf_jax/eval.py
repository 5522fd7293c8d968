r"""Evaluates a checkpoint by the paper's protocol and writes a report.

    python -m richhf_jax.eval --gin_file=experiments/quickstart.gin --gin.MODEL_DIR=runs/mine

Writes metrics.json, image_values.npz, predictions.jsonl and report.html to
MODEL_DIR/inference_eval/<task>/<split>/<step>, and prints the paper's tables. `python -m richhf_jax.tables`
puts several evaluations side by side.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import seqio
import tensorflow as tf
from etils import epath
from tensorboard.backend.event_processing import event_accumulator

from richhf_jax import (
    device_memory,
    errors,
    foreign_text,
    gin_utils,
    image_values,
    input_pipeline,
    locking,
    metrics,
    models,
    partitioning,
    postprocessors,
    split_predictions,
    writing,
)
from richhf_jax.costs import plan
from richhf_jax.feedback import RichFeedback
from richhf_jax.pages import report

# (data, its images, its targets) -> name and predictions of a system to compare the model with.
Baseline = Callable[
    [input_pipeline.DatasetConfig, Sequence[np.ndarray], Sequence[RichFeedback]],
    tuple[str, Sequence[RichFeedback]],
]


def trivial_baseline(
    cfg: input_pipeline.DatasetConfig, images: Sequence[np.ndarray], targets: Sequence[RichFeedback]
) -> tuple[str, Sequence[RichFeedback]]:
    """Predicts the training split's mean score and mean heatmap for every image, and flags no word."""
    del images
    train_cfg = dataclasses.replace(cfg, split="train")
    batches = input_pipeline.evaluation_batches(train_cfg, seqio.ShardInfo(0, 1))
    train_targets = (postprocessors.target(example) for examples, _ in batches for example in examples)
    return "trivial (training mean)", metrics.trivial_baseline(train_targets, targets)


def evaluate(
    *,
    model: models.BaseModel,
    checkpoint_path: str,
    output_dir: str,
    dataset_cfg: input_pipeline.DatasetConfig,
    partitioner: partitioning.PjitPartitioner,
    baseline_fns: Sequence[Baseline] = (trivial_baseline,),
    constrained_keywords: bool = True,
    gallery_size: int = 48,
    curve_dirs: Mapping[str, str | None] | None = None,
    title: str = "RAHF",
) -> Mapping[str, float]:
    """Predicts a whole split and measures the predictions, next to baselines.

    Several processes predict together; process 0 does all the rest.

    Args:
      model: the model as it was trained.
      checkpoint_path: a `checkpoint_<step>` directory, or a MODEL_DIR, whose newest checkpoint is taken.
      output_dir: the results go to inference_eval/<task>/<split>/<step> in this folder.
      dataset_cfg: the data to evaluate on; its feature lengths must ask for every kind that the model
        predicts.
      partitioner: splits states and batches over the mesh.
      baseline_fns: systems to compare with the model in the tables.
      constrained_keywords: True: the decoder can only copy the prompt and mark words, and gives each word a
        probability. False: it writes freely, and its text is matched with the prompt's words.
      gallery_size: number of images in the report.
      curve_dirs: stage of the training -> MODEL_DIR whose loss curves the report shows.
      title: the model's name in the report.

    Returns:
      The model's metrics, as in metrics.json; {} in any process but 0.

    Raises:
      errors.UserError: there is no checkpoint, or it doesn't fit the model; a prediction isn't finite; the
        results can't be written; the devices have too little memory.
    """
    if epath.Path(output_dir).is_file():
        raise errors.UserError(f"EVAL_OUTPUT_DIR: {output_dir} is a file, name a folder")
    with device_memory.explained(plan.LESS_MEMORY["predict"]):
        trainer, state, step = split_predictions.load(model, checkpoint_path, dataset_cfg, partitioner)
        batches = split_predictions.whole_split(
            trainer, state, dataset_cfg, partitioner, constrained_keywords
        )
        images, targets, predictions = _collect(batches, dataset_cfg, trainer.model.vocab_size is not None)
    if jax.process_index() > 0:
        return {}
    raw, factors = predictions, {}
    if any(prediction.uncertainty for prediction in raw):
        factors = split_predictions.deviation_factors(checkpoint_path, dataset_cfg)
        predictions = [prediction.calibrated(factors) for prediction in raw]
    systems = [(title, predictions), *(fn(dataset_cfg, images, targets) for fn in baseline_fns)]
    task = seqio.get_mixture_or_task(dataset_cfg.mixture_or_task_name)
    values = {name: metrics.image_values(targets, answers) for name, answers in systems}
    rows = [report.Row(name, _measure(task, targets, answers, values[name])) for name, answers in systems]
    if factors:
        rows.append(report.Row(f"{title}, not calibrated", metrics.uncertainty_metrics(targets, raw)))
    place = ("inference_eval", dataset_cfg.mixture_or_task_name, dataset_cfg.split, str(step))
    directory = epath.Path(output_dir).joinpath(*place)
    lines = [json.dumps(prediction.to_dict(), allow_nan=False) + "\n" for prediction in predictions]
    gallery = [
        report.GalleryItem(*item)
        for item in itertools.islice(zip(images, targets, predictions, strict=True), gallery_size)
    ]
    curves = {stage: _read_curves(path) for stage, path in (curve_dirs or {}).items() if path}
    measured = image_values.ImageValues(
        *(task.name, dataset_cfg.split, step),
        *([target.id for target in targets], metrics.target_values(targets), values),
    )
    details = {"task": task.name, "split": dataset_cfg.split, "step": step, "images": len(targets)}
    with writing.explained_disk_errors(directory), locking.held(directory, "--gin.EVAL_OUTPUT_DIR=DIR"):
        _write_json(directory / "metrics.json", rows[0].metrics)
        _write_json(directory / "baselines.json", {row.name: row.metrics for row in rows[1:]})
        measured.write(directory)
        writing.write(directory / "predictions.jsonl", "".join(lines))
        score_range = trainer.model.outputs.score_range
        report.write_report(directory / "report.html", title, rows, curves, gallery, details, score_range)
    print(report.format_tables(rows))
    print(f"\nresults in {directory}")
    return rows[0].metrics


def _collect(
    batches: Iterable[Sequence[split_predictions.Pair]], cfg: input_pipeline.DatasetConfig, reads_text: bool
) -> tuple[list[np.ndarray], list[RichFeedback], list[RichFeedback]]:
    """Collects images, targets and predictions of all examples.

    Raises:
      errors.UserError: a prediction isn't finite. Metrics of the other examples would not be the split's.
    """
    images, targets, predictions = [], [], []
    cut = 0
    for example, prediction in itertools.chain.from_iterable(batches):
        cut += example["inputs_words_cut"] > 0
        images.append(postprocessors.in_box(example["image"], example))
        targets.append(postprocessors.target(example))
        if isinstance(prediction, errors.NotFiniteError):
            name = foreign_text.for_terminal(targets[-1].id)
            raise errors.UserError(f"{name}: {prediction}. Metrics need the predictions of all examples")
        predictions.append(prediction)
    if cut and reads_text:
        length = cfg.task_feature_lengths["inputs"]
        print(
            f"{cut} of {len(images)} prompts weren't read to their end: they have more than {length} tokens,"
            " or the token of the end among them"
        )
    return images, targets, predictions


def _measure(task, targets, predictions, values: metrics.Columns) -> dict[str, float]:
    """Returns the task's metrics of a system whose `metrics.image_values` are known."""
    results: dict[str, float] = {}
    for metric_fn in task.metric_fns:
        # Heatmaps take long to measure, so once is enough.
        known = {"values": values} if metric_fn is metrics.rich_feedback_metrics else {}
        results |= metric_fn(targets, predictions, **known)
    return results


def _read_curves(model_dir: str) -> dict[str, list[tuple[int, float]]]:
    """Reads a MODEL_DIR's loss curves: "<train or validation> <loss>" -> points (step, value)."""
    curves = {}
    places = {"train": "train", "validation": "training_eval/*"}
    for name, place in places.items():
        for directory in epath.Path(model_dir).glob(place):
            events = event_accumulator.EventAccumulator(str(directory), size_guidance={"tensors": 0}).Reload()
            for tag in events.Tags()["tensors"]:
                if tag.startswith("loss"):
                    points = events.Tensors(tag)
                    curves[f"{name} {tag}"] = [
                        (p.step, float(tf.make_ndarray(p.tensor_proto))) for p in points
                    ]
    return curves


def _write_json(path: epath.Path, content: Mapping[str, Any]) -> None:
    writing.write(path, json.dumps(content, indent=2, sort_keys=True, allow_nan=False))


if __name__ == "__main__":
    gin_utils.run(evaluate, compilation_cache=True)
