"""Makes seqio tasks of data sets."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import gin
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from richhf_jax import corruption, feedback, metrics, postprocessors, preprocessors, word_table
from tasks import vocabulary

_TEXT = seqio.Feature(vocabulary.ConfiguredVocabulary(), add_eos=False, dtype=tf.int32, rank=2)
OUTPUT_FEATURES = {
    "image": seqio.ContinuousFeature(dtype=tf.uint8, rank=3),
    "image_box": seqio.ContinuousFeature(dtype=tf.int32, rank=1, required=False),
    "inputs": _TEXT,
    "targets": _TEXT,
    "texts": seqio.ContinuousFeature(dtype=tf.string, rank=1),
    "inputs_words_cut": seqio.ContinuousFeature(dtype=tf.int32, rank=0),
    "targets_words_cut": seqio.ContinuousFeature(dtype=tf.int32, rank=0),
    "heatmaps": seqio.ContinuousFeature(dtype=tf.uint8, rank=3),
    "heatmap_weights": seqio.ContinuousFeature(dtype=tf.float32, rank=1),
    "scores": seqio.ContinuousFeature(dtype=tf.float32, rank=1),
    "score_weights": seqio.ContinuousFeature(dtype=tf.float32, rank=1),
}


@gin.configurable
def caption_rate(task: seqio.Task, rate: float = 1.0) -> float:
    """Returns the number of captions for each record of rich feedback in a pretraining mixture."""
    del task
    return rate


@gin.configurable
def corrupted_caption_rate(task: seqio.Task, rate: float = 1.0) -> float:
    """Returns the number of corrupted captions for each record of rich feedback in a `..._plus` mixture."""
    del task
    return rate


@gin.configurable
def corrupted_feedback_rate(task: seqio.Task, rate: float = 1.0) -> float:
    """Returns the number of records with corrupted prompts for each one as it is in a `..._plus` mixture."""
    del task
    return rate


@gin.configurable
def flawed_caption_rate(task: seqio.Task, rate: float = 1.0) -> float:
    """Returns the number of images with painted flaws for each record of rich feedback in such a mixture."""
    del task
    return rate


def add_rich_feedback_tasks(
    name: str,
    tfds_name: str,
    splits: Sequence[str] | Mapping[str, str],
    words: Callable[[], word_table.Words],
    more_metric_fns: Sequence[Callable] = (),
) -> None:
    """Registers a TFDS data set that has RichHF-18K's features, images and prompts, for both variants.

    `<name>_<variant>` trains every kind of label. `<name>_<kind>_<variant>` trains a single kind (a score, a
    heatmap or `keywords`); the other kinds' slots have weight 0. `<name>_corrupted_<variant>` has prompts
    made wrong, see `corruption.corrupted_rich_feedback`; the mixture `<name>_plus_<variant>` has these beside
    the first, `corrupted_feedback_rate` for each.

    Args:
      name: beginning of the tasks' names.
      tfds_name: data set and version.
      splits: the data set's splits, or a mapping of the tasks' splits to TFDS's.
      words: returns the table of the words that may be wrong.
      more_metric_fns: (targets, predictions) -> metrics; added to those of the paper's protocol.
    """
    rich_feedback = preprocessors.rich_feedback
    kinds = {
        f"{name}_{kind}": functools.partial(rich_feedback, kinds=(kind,)) for kind in preprocessors.ALL_KINDS
    }
    kinds |= {
        name: rich_feedback,
        f"{name}_corrupted": functools.partial(corruption.corrupted_rich_feedback, words=words),
    }
    for variant in feedback.VARIANTS:
        for prefix, preprocess in kinds.items():
            _add(
                f"{prefix}_{variant}",
                tfds_name,
                splits,
                [functools.partial(preprocess, variant=variant)],
                encoded=(feedback.IMAGE_FIELD, *feedback.HEATMAP_FIELDS.values()),
                postprocess_fn=postprocessors.rich_feedback,
                metric_fns=[metrics.rich_feedback_metrics, *more_metric_fns],
            )
        rates = [(f"{name}_{variant}", 1.0), (f"{name}_corrupted_{variant}", corrupted_feedback_rate)]
        seqio.MixtureRegistry.add(f"{name}_plus_{variant}", rates)


def add_captions_tasks(
    source: str,
    tfds_name: str,
    splits: Sequence[str] | Mapping[str, str],
    words: Callable[[], word_table.Words],
    first_preprocessors: Sequence[Callable] = (),
) -> None:
    """Registers a TFDS data set of images with captions, as it is, with wrong captions, with painted flaws.

    The tasks are `<source>_captions`, `<source>_corrupted_captions`, `<source>_flawed_captions`, and the same
    with `_augmented_prompt` behind. Wrong captions can be evaluated: keywords and alignment have metrics.

    Args:
      source: the beginning of the tasks' names.
      tfds_name: data set and version.
      splits: the data set's splits, or a mapping of the tasks' splits to TFDS's.
      words: returns the table of the words that may be wrong.
      first_preprocessors: make a file name, an image and a prompt (`feedback`'s names) from a record that
        lacks them; they may use the example's `preprocessors.SEED`.
    """
    corrupted = functools.partial(corruption.corrupted_captions, words=words)
    measured = {"postprocess_fn": postprocessors.rich_feedback, "metric_fns": [metrics.rich_feedback_metrics]}
    kinds: dict[str, tuple[Callable, dict[str, Any]]] = {
        "captions": (preprocessors.captions, {}),
        "corrupted_captions": (corrupted, measured),
        "flawed_captions": (preprocessors.flawed_captions, {}),
    }
    for kind, (preprocess, measures) in kinds.items():
        for variant in feedback.VARIANTS:
            _add(
                captions_name(f"{source}_{kind}", variant),
                tfds_name,
                splits,
                [functools.partial(preprocess, variant=variant)],
                encoded=(feedback.IMAGE_FIELD,),
                first_preprocessors=first_preprocessors,
                **measures,
            )


def captions_name(name: str, variant: str) -> str:
    """Returns the task's name for a variant; multi-head has the plain name."""
    return name if variant == feedback.MULTI_HEAD else f"{name}_{variant}"


def add_pretraining_mixture(
    name: str,
    captions: str,
    rich_feedback: str,
    more: Mapping[str, Callable[[seqio.Task], float]] | None = None,
    more_feedback: Mapping[str, Callable[[seqio.Task], float]] | None = None,
) -> None:
    """Registers the mixtures `<name>` and `<name>_augmented_prompt`: `caption_rate` captions per record.

    Args:
      name: the multi-head mixture's name.
      captions: the multi-head task's name of true captions.
      rich_feedback: the beginning of the names of rich feedback's tasks.
      more: multi-head task's name of other captions -> their rate per record.
      more_feedback: beginning of the names of other tasks of rich feedback -> their rate per record.
    """
    rates = {captions: caption_rate, **(more or {})}
    feedback_rates = {**(more_feedback or {}), rich_feedback: 1.0}
    for variant in feedback.VARIANTS:
        tasks = [(captions_name(task, variant), rate) for task, rate in rates.items()]
        tasks += [(f"{beginning}_{variant}", rate) for beginning, rate in feedback_rates.items()]
        seqio.MixtureRegistry.add(captions_name(name, variant), tasks)


def _add(
    name: str,
    tfds_name: str,
    splits: Sequence[str] | Mapping[str, str],
    last_preprocessors: Sequence[Callable],
    *,
    encoded: Sequence[str],
    first_preprocessors: Sequence[Callable] = (),
    **kwargs,
) -> None:
    source = seqio.TfdsDataSource(
        tfds_name,
        splits=splits,
        # As in `input_pipeline`: the preprocessors decode what a slot uses.
        decoders={field: tfds.decode.SkipDecoding() for field in encoded},
        # Tasks only read data; the builders' commands make it.
        read_only=True,
    )
    seqio.TaskRegistry.add(
        name,
        source=cast(Any, source),  # seqio's sources don't quite follow its own protocol.
        preprocessors=[
            preprocessors.add_seed,
            *first_preprocessors,
            preprocessors.blind,
            *last_preprocessors,
        ],
        output_features=OUTPUT_FEATURES,
        **kwargs,
    )
