"""The TFDS configuration of the builders of procedural scenes."""

import dataclasses

import tensorflow_datasets as tfds

from richhf_jax.datasets import scenes


@dataclasses.dataclass(kw_only=True)
class SceneBuilderConfig(tfds.core.BuilderConfig):
    """Which scenes, and how many examples a split."""

    scene: scenes.SceneConfig
    split_sizes: dict[str, int]
