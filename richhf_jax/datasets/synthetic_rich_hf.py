"""TFDS builder `synthetic_rich_hf`: procedural scenes with the features of RichHF-18K and its images.

Each picture (`scenes`) is rated by three simulated raters (`raters`); their raw lines go through the
same consolidation as real ones (`consolidate`).
"""

import dataclasses
import functools

import numpy as np
import tensorflow_datasets as tfds

from richhf_jax import feedback
from richhf_jax.datasets import rendering_pool, scenes


@dataclasses.dataclass(kw_only=True)
class SyntheticRichHfConfig(tfds.core.BuilderConfig):
    """Which scenes, and how many examples a split."""

    scene: scenes.SceneConfig
    split_sizes: dict[str, int] = dataclasses.field(
        default_factory=lambda: {"train": 8000, "validation": 500, "test": 500}
    )


class SyntheticRichHf(tfds.core.GeneratorBasedBuilder):
    """Procedural scenes with rich feedback; the prompts of one split are in no other."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [SyntheticRichHfConfig(name=name, scene=s) for name, s in scenes.CONFIGS.items()]

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
        names = [scenes.filename(split, index) for index in range(count)]
        for example in rendering_pool.run(rendering_pool.rated_example, self.builder_config.scene, names):
            yield example[feedback.FILENAME_FIELD], example
