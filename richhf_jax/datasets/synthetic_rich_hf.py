"""TFDS builder `synthetic_rich_hf`: procedural scenes with the features of RichHF-18K and its images.

Each picture (`scenes`) is rated by three simulated raters (`raters`); their raw lines go through the
same consolidation as real ones (`consolidate`).
"""

import functools

import numpy as np
import tensorflow_datasets as tfds

from richhf_jax import feedback
from richhf_jax.datasets import rendering_pool, scenes
from richhf_jax.datasets.scene_builder import SceneBuilder, SceneBuilderConfig

SPLIT_SIZES = {"train": 8000, "validation": 500, "test": 500}


class SyntheticRichHf(SceneBuilder):
    """Procedural scenes with rich feedback; no two splits share a prompt."""

    VERSION = tfds.core.Version("2.0.0")
    BUILDER_CONFIGS = [
        SceneBuilderConfig(name=name, scene=scene, split_sizes=SPLIT_SIZES)
        for name, scene in scenes.CONFIGS.items()
    ]

    @property
    def make_example(self):
        return rendering_pool.rated_example

    def more_features(self, size: int):
        heatmap = functools.partial(tfds.features.Image, shape=(size, size, 1), encoding_format="png")
        return {
            **{field: tfds.features.Scalar(np.float32) for field in feedback.SCORE_FIELDS.values()},
            **{field: heatmap() for field in feedback.HEATMAP_FIELDS.values()},
            feedback.KEYWORDS_FIELD: tfds.features.Text(),
        }
