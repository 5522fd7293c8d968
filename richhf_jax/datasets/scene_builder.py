"""Base of the TFDS builders of procedural scenes."""

import abc
import dataclasses
from collections.abc import Callable
from typing import cast

import tensorflow_datasets as tfds

from richhf_jax import feedback
from richhf_jax.datasets import rendering_pool, scenes, whole_builder


@dataclasses.dataclass(kw_only=True)
class SceneBuilderConfig(tfds.core.BuilderConfig):
    """The scenes of a configuration, and the number of examples in each split."""

    scene: scenes.SceneConfig
    split_sizes: dict[str, int]


class SceneBuilder(whole_builder.WholeBuilder, skip_registration=True):
    """Builder of pictures with file names and prompts; a subclass makes the examples and may add features."""

    @property
    @abc.abstractmethod
    def make_example(self) -> Callable[[scenes.SceneConfig, str], dict]:
        """Function (configuration, file name) -> example, which other processes can import."""

    def more_features(self, size: int) -> dict[str, tfds.features.FeatureConnector]:
        """Returns the features beside the common ones; `size` is the picture's side, in pixels."""
        del size
        return {}

    @property
    def _scene_config(self) -> SceneBuilderConfig:
        return cast(SceneBuilderConfig, self.builder_config)

    def _info(self) -> tfds.core.DatasetInfo:
        size = self._scene_config.scene.image_size
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
            for split, count in self._scene_config.split_sizes.items()
        }

    def _generate_examples(self, split: str, count: int):
        return rendering_pool.examples(self.make_example, self._scene_config.scene, split, count)
