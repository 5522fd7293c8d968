"""TFDS builder `synthetic_captions`: clean procedural scenes with prompts that are true.

It stands in for the captioning data of the paper's pretraining mixture.
"""

import tensorflow_datasets as tfds

from richhf_jax.datasets import rendering_pool, scenes
from richhf_jax.datasets.scene_builder import SceneBuilder, SceneBuilderConfig

SPLIT_SIZES = {"train": 8000, "validation": 500}


class SyntheticCaptions(SceneBuilder):
    """Clean procedural scenes with captions; none is a test prompt of `synthetic_rich_hf`."""

    VERSION = tfds.core.Version("2.0.0")
    BUILDER_CONFIGS = [
        SceneBuilderConfig(name=name, scene=scene, split_sizes=SPLIT_SIZES)
        for name, scene in scenes.CAPTIONS_CONFIGS.items()
    ]

    @property
    def make_example(self):
        return rendering_pool.captioned_example
