r"""Calibrates the uncertainties of a checkpoint's scores on the validation split.

    python -m richhf_jax.calibrate --gin_file=experiments/quickstart.gin --gin_file=runs/calibrate.gin \
        --gin.MODEL_DIR=runs/mine

For each kind of score it finds the one factor of the standard deviations with which the mean of
(error / deviation)^2 is 1, and writes the factors into model.json beside the checkpoint. Predictions,
evaluations, inference and exports then use them, for this checkpoint alone. A training that continues, or is
given again, writes model.json without them.
"""

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Mapping

import jax
from etils import epath

from richhf_jax import (
    checkpoints,
    device_memory,
    errors,
    feedback,
    foreign_text,
    gin_utils,
    input_pipeline,
    locking,
    metrics,
    model_description,
    models,
    multihost,
    partitioning,
    postprocessors,
    split_predictions,
    writing,
)
from richhf_jax.costs import plan
from richhf_jax.pages import report


def calibrate(
    *,
    model: models.BaseModel,
    checkpoint_path: str,
    dataset_cfg: input_pipeline.DatasetConfig,
    partitioner: partitioning.PjitPartitioner,
) -> Mapping[str, float]:
    """Finds the factors, prints what they change, and writes them into the checkpoint's model.json.

    Several processes predict together; process 0 does all the rest.

    Args:
      model: the model as it was trained.
      checkpoint_path: a `checkpoint_<step>` directory, or a MODEL_DIR, whose newest checkpoint is taken.
      dataset_cfg: the data to calibrate on, which the model wasn't trained on; its feature lengths must ask
        for every kind of score.
      partitioner: splits states and batches over the mesh.

    Returns:
      Kind of score -> factor; {} in any process but 0.

    Raises:
      errors.UserError: the model predicts no uncertainty; there is no checkpoint, it doesn't fit the model,
        or it is an export; a kind of score has no labels, or only perfect predictions; model.json can't be
        read or written, or a training writes to its directory.
    """
    if not model.has_uncertainty:
        raise errors.UserError(
            "the model predicts no uncertainty: there is nothing to calibrate. Train one with"
            " --gin.SCORE_UNCERTAINTY=True, and give that here, too"
        )
    checkpoint, step = checkpoints.find_checkpoint(checkpoint_path)
    directory = epath.Path(os.path.dirname(checkpoint))
    if (directory / model_description.EXPORT_FILE).exists():
        raise errors.UserError(
            f"{directory} is an export, whose {model_description.EXPORT_FILE} would no longer be true:"
            " calibrate the checkpoint that it was made of, then export again"
        )
    lock = locking.held(directory, "--gin.CHECKPOINT_PATH=DIR")
    with (
        device_memory.explained(plan.LESS_MEMORY["predict"]),
        multihost.entered_by_all(contextlib.nullcontext() if jax.process_index() else lock),
    ):
        description = model_description.read(directory)
        trainer, state, _ = split_predictions.load(model, checkpoint, dataset_cfg, partitioner)
        batches = split_predictions.whole_split(trainer, state, dataset_cfg, partitioner, True)
        pairs = list(itertools.chain.from_iterable(map(_without_heatmaps, batches)))
        if jax.process_index() > 0:
            return {}
        targets, predictions = zip(*pairs, strict=True)
        task, split = dataset_cfg.mixture_or_task_name, dataset_cfg.split
        factors = _factors(targets, predictions, f"{task}, {split}")
        calibration = model_description.Calibration(step, factors, task, split, len(pairs))
        with writing.explained_disk_errors(directory):
            dataclasses.replace(description, calibration=calibration).write(directory)
    after = [prediction.calibrated(factors) for prediction in predictions]
    systems = {"before": predictions, "after": after}
    rows = [report.Row(name, metrics.uncertainty_metrics(targets, one)) for name, one in systems.items()]
    print(report.format_tables(rows))
    for kind, factor in factors.items():
        print(f"{kind}: standard deviations x {factor:.3f}")
    print(f"written to {directory / model_description.FILE}, for {os.path.basename(checkpoint)}")
    return factors


def _without_heatmaps(
    batch: list[split_predictions.Pair],
) -> list[tuple[feedback.RichFeedback, feedback.RichFeedback]]:
    """Returns targets and predictions without the heatmaps, which would fill the memory.

    Raises:
      errors.UserError: a prediction isn't finite.
    """
    pairs = []
    for example, prediction in batch:
        target = postprocessors.target(example)
        if isinstance(prediction, errors.NotFiniteError):
            raise errors.UserError(f"{foreign_text.for_terminal(target.id)}: {prediction}")
        pairs.append(tuple(dataclasses.replace(one, heatmaps={}) for one in (target, prediction)))
    return pairs


def _factors(
    targets: tuple[feedback.RichFeedback, ...], predictions: tuple[feedback.RichFeedback, ...], where: str
) -> dict[str, float]:
    """Returns the factors; see `calibrate` for the errors. `where` names the data."""
    factors = metrics.deviation_factors(targets, predictions)
    for kind in feedback.SCORES:
        if kind not in factors:
            raise errors.UserError(
                f"{where}: no example has the score {kind}: name a task that has all scores"
            )
        if not factors[kind]:
            raise errors.UserError(
                f"{where}: every prediction of {kind} is exactly right: nothing to calibrate by"
            )
    return factors


if __name__ == "__main__":
    gin_utils.run(calibrate, compilation_cache=True)
