"""TFDS builder `synthetic_captions`: clean procedural scenes with prompts that are true.

It stands in for the captioning data of the paper's pretraining mixture.
"""

import tensorflow_datasets as tfds

from richhf_jax import feedback
from richhf_jax.datasets import rendering_pool, scenes
from richhf_jax.datasets.builder_config import SceneBuilderConfig

SPLIT_SIZES = {"train": 8000, "validation": 500}


class SyntheticCaptions(tfds.core.GeneratorBasedBuilder):
    """Clean procedural scenes with captions; none is a test prompt of `synthetic_rich_hf`."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [
        SceneBuilderConfig(name=name, scene=scene, split_sizes=SPLIT_SIZES)
        for name, scene in scenes.CAPTIONS_CONFIGS.items()
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        size = self.builder_config.scene.image_size
        features = {
            feedback.FILENAME_FIELD: tfds.features.Text(),
            feedback.IMAGE_FIELD: tfds.features.Image(shape=(size, size, 3), encoding_format="png"),
            feedback.PROMPT_FIELD: tfds.features.Text(),
        }
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        del dl_manager
        return {
            split: self._generate_examples(split, count)
            for split, count in self.builder_config.split_sizes.items()
        }

    def _generate_examples(self, split: str, count: int):
        return rendering_pool.examples(
            rendering_pool.captioned_example, self.builder_config.scene, split, count
        )
