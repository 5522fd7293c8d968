"""Registers tasks on the synthetic data sets, for both variants of the model.

    synthetic_rich_hf_{multi_head,augmented_prompt}          rich feedback
    synthetic_rich_hf_<kind>_{multi_head,augmented_prompt}   a single kind of it
    synthetic_rich_hf_corrupted_...                          rich feedback, some of its prompts made wrong
    synthetic_rich_hf_plus_...                               mixtures: rich feedback as it is and this
    synthetic_rich_hf_subtle...                              all of these with small flaws and noise
    synthetic_captions, synthetic_captions_augmented_prompt  captions
    synthetic_corrupted_captions, ...                        captions, half of them made wrong, with labels
    synthetic_flawed_captions, ...                           the same images with painted flaws, see `flaws`
    synthetic_pretrain, synthetic_pretrain_augmented_prompt  mixtures: captions and rich feedback
    synthetic_pretrain_plus, ...                             the same, and all corrupted and flawed tasks

A caption's heatmap and score slots have weight 0. If TASK_FEATURE_LENGTHS has no such slots, pretraining uses
texts only: captions, and the keywords of rich feedback.
"""

import functools
from collections.abc import Sequence
from typing import cast

import gin
import numpy as np

from richhf_jax import input_pipeline, metrics, word_table
from richhf_jax.datasets import caption_words, scenes, synthetic_captions, synthetic_rich_hf
from richhf_jax.feedback import RichFeedback
from tasks import providers

_RICH_HF_VERSION = synthetic_rich_hf.SyntheticRichHf.VERSION
_CAPTIONS_VERSION = synthetic_captions.SyntheticCaptions.VERSION


def truth_metrics(
    targets: Sequence[RichFeedback], predictions: Sequence[RichFeedback], config: scenes.SceneConfig
) -> dict[str, float]:
    """Compares predictions with the true contents of the scenes, which are drawn again from their names."""
    return metrics.synthetic_metrics(targets, predictions, _truths(_ids(targets), config))


@gin.configurable
def training_free_baseline(
    cfg: input_pipeline.DatasetConfig,
    images: Sequence[np.ndarray],
    targets: Sequence[RichFeedback],
    config: str = "default",
) -> tuple[str, Sequence[RichFeedback]]:
    """Predicts for `eval.evaluate`'s tables: all objects are misaligned, busy textures implausible."""
    del cfg
    truths = _truths(_ids(targets), scenes.CONFIGS[config])
    return "training-free (object mask, detail)", metrics.training_free_baseline(images, targets, truths)


@gin.configurable
def synthetic_words(**changes) -> word_table.Words:
    """Returns the table of the synthetic world's words; gin may set each field of `word_table.Words`."""
    return word_table.Words.changed(caption_words.SYNTHETIC, **changes)


def _ids(targets: Sequence[RichFeedback]) -> tuple[str, ...]:
    return tuple(target.id for target in targets)


@functools.lru_cache(maxsize=1)  # The model's and the baselines' metrics ask for the same.
def _truths(ids: tuple[str, ...], config: scenes.SceneConfig) -> list[metrics.SceneTruth]:
    truths = [scenes.truth(name, config) for name in ids]
    return cast(list[metrics.SceneTruth], truths)  # The protocol's attributes count as writable.


for _suffix, _config in {"": "default", "_subtle": "subtle"}.items():
    providers.add_rich_feedback_tasks(
        f"synthetic_rich_hf{_suffix}",
        f"synthetic_rich_hf/{_config}:{_RICH_HF_VERSION}",
        ["train", "validation", "test"],
        synthetic_words,
        more_metric_fns=[functools.partial(truth_metrics, config=scenes.CONFIGS[_config])],
    )
providers.add_captions_tasks(
    "synthetic",
    f"synthetic_captions/default:{_CAPTIONS_VERSION}",
    ["train", "validation"],
    synthetic_words,
)
providers.add_pretraining_mixture("synthetic_pretrain", "synthetic_captions", "synthetic_rich_hf")
providers.add_pretraining_mixture(
    "synthetic_pretrain_plus",
    "synthetic_captions",
    "synthetic_rich_hf",
    {
        "synthetic_corrupted_captions": providers.corrupted_caption_rate,
        "synthetic_flawed_captions": providers.flawed_caption_rate,
    },
    {"synthetic_rich_hf_corrupted": providers.corrupted_feedback_rate},
)
