"""What the TFDS builders of procedural scenes share."""

import abc
import dataclasses
from collections.abc import Callable

import tensorflow_datasets as tfds

from richhf_jax import feedback
from richhf_jax.datasets import rendering_pool, scenes


@dataclasses.dataclass(kw_only=True)
class SceneBuilderConfig(tfds.core.BuilderConfig):
    """Which scenes, and how many examples a split."""

    scene: scenes.SceneConfig
    split_sizes: dict[str, int]


class SceneBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Pictures with file names and prompts; a subclass says how one is made and what else it has."""

    @property
    @abc.abstractmethod
    def make_example(self) -> Callable[[scenes.SceneConfig, str], dict]:
        """(configuration, file name) -> an example; a function that other processes can import."""

    def more_features(self, size: int) -> dict[str, tfds.features.FeatureConnector]:
        """Features of an example beside the common ones; `size` is the picture's side."""
        del size
        return {}

    def _info(self) -> tfds.core.DatasetInfo:
        size = self.builder_config.scene.image_size
        features = {
            feedback.FILENAME_FIELD: tfds.features.Text(),
            feedback.IMAGE_FIELD: tfds.features.Image(shape=(size, size, 3), encoding_format="png"),
            feedback.PROMPT_FIELD: tfds.features.Text(),
            **self.more_features(size),
        }
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        del dl_manager
        return {
            split: self._generate_examples(split, count)
            for split, count in self.builder_config.split_sizes.items()
        }

    def _generate_examples(self, split: str, count: int):
        return rendering_pool.examples(self.make_example, self.builder_config.scene, split, count)
