"""TFDS builder `synthetic_rich_hf`: procedural scenes with the features of RichHF-18K and its images.

Each picture (`scenes`) is rated by three simulated raters (`raters`); their raw lines go through the
same consolidation as real ones (`consolidate`).
"""

import functools

import numpy as np
import tensorflow_datasets as tfds

from richhf_jax import feedback
from richhf_jax.datasets import rendering_pool, scenes
from richhf_jax.datasets.builder_config import SceneBuilderConfig

SPLIT_SIZES = {"train": 8000, "validation": 500, "test": 500}


class SyntheticRichHf(tfds.core.GeneratorBasedBuilder):
    """Procedural scenes with rich feedback; the prompts of one split are in no other."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [
        SceneBuilderConfig(name=name, scene=scene, split_sizes=SPLIT_SIZES)
        for name, scene in scenes.CONFIGS.items()
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        size = self.builder_config.scene.image_size
        heatmap = functools.partial(tfds.features.Image, shape=(size, size, 1), encoding_format="png")
        features = {
            feedback.FILENAME_FIELD: tfds.features.Text(),
            feedback.IMAGE_FIELD: tfds.features.Image(shape=(size, size, 3), encoding_format="png"),
            feedback.PROMPT_FIELD: tfds.features.Text(),
            **{field: tfds.features.Scalar(np.float32) for field in feedback.SCORE_FIELDS.values()},
            **{field: heatmap() for field in feedback.HEATMAP_FIELDS.values()},
            feedback.KEYWORDS_FIELD: tfds.features.Text(),
        }
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        del dl_manager
        return {
            split: self._generate_examples(split, count)
            for split, count in self.builder_config.split_sizes.items()
        }

    def _generate_examples(self, split: str, count: int):
        return rendering_pool.examples(rendering_pool.rated_example, self.builder_config.scene, split, count)
