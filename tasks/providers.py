"""The one way by which data sets become seqio tasks."""

import functools
from collections.abc import Callable, Sequence

import seqio
import tensorflow as tf

from richhf_jax import metrics, postprocessors, preprocessors
from tasks import vocabulary

# Variant -> whether each slot has a prompt of its own.
VARIANTS = {"multi_head": False, "augmented_prompt": True}

_TEXT = seqio.Feature(vocabulary.ConfiguredVocabulary(), add_eos=False, dtype=tf.int32, rank=2)
OUTPUT_FEATURES = {
    "image": seqio.ContinuousFeature(dtype=tf.uint8, rank=3),
    "inputs": _TEXT,
    "targets": _TEXT,
    "texts": seqio.ContinuousFeature(dtype=tf.string, rank=1),
    "heatmaps": seqio.ContinuousFeature(dtype=tf.uint8, rank=3),
    "heatmap_weights": seqio.ContinuousFeature(dtype=tf.float32, rank=1),
    "scores": seqio.ContinuousFeature(dtype=tf.float32, rank=1),
    "score_weights": seqio.ContinuousFeature(dtype=tf.float32, rank=1),
}


def add_rich_feedback_task(
    name: str,
    tfds_name: str,
    splits: Sequence[str],
    *,
    augmented_prompt: bool,
    more_metric_fns: Sequence[Callable] = (),
) -> None:
    """Registers the task `name` on a TFDS data set with RichHF-18K's features, images and prompts.

    Args:
      more_metric_fns: (targets, predictions) -> metrics, beside those of the paper's protocol.
    """
    _add(
        name,
        tfds_name,
        splits,
        functools.partial(preprocessors.rich_feedback, augmented_prompt=augmented_prompt),
        postprocess_fn=postprocessors.rich_feedback,
        metric_fns=[metrics.rich_feedback_metrics, *more_metric_fns],
    )


def add_captions_task(name: str, tfds_name: str, splits: Sequence[str], *, augmented_prompt: bool) -> None:
    """Registers the task `name` on a TFDS data set of images with captions (in the prompt's feature)."""
    _add(
        name, tfds_name, splits, functools.partial(preprocessors.captions, augmented_prompt=augmented_prompt)
    )


def _add(name: str, tfds_name: str, splits: Sequence[str], preprocess: Callable, **kwargs) -> None:
    seqio.TaskRegistry.add(
        name,
        # Only reads: data is built by a command of its own.
        source=seqio.TfdsDataSource(tfds_name, splits=splits, read_only=True),
        preprocessors=[preprocessors.add_seed, preprocessors.blind, preprocess],
        output_features=OUTPUT_FEATURES,
        **kwargs,
    )
