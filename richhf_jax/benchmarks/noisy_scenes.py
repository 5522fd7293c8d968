"""Writes a data set in RichHF-18K's format, of procedural scenes that decode as slowly as photographs."""

import io
import pathlib

import tensorflow_datasets as tfds
from PIL import Image

from richhf_jax import feedback
from richhf_jax.datasets import rendering_pool, scenes
from richhf_jax.datasets.rich_hf_18k import builder

JPEG_QUALITY = 95
# Noise, in grey levels. With it, a JPEG has 4 bits a pixel, like a photograph's (130 KB at 512 px).
GRAIN = 8.0


class _NoisyScenes(builder.RichHf18k, skip_registration=True):
    """RichHF-18K's data set, with rated scenes in place of real images."""

    name = builder.RichHf18k.name  # The name of the tasks' data set.

    def __init__(self, image_size: int, examples: int, **kwargs):
        self._scene = scenes.SceneConfig(image_size=image_size, grain=GRAIN)
        self._count = examples
        super().__init__(**kwargs)

    def _split_generators(self, dl_manager):
        del dl_manager
        return {"train": self._scenes()}

    def _scenes(self):
        make = rendering_pool.rated_example
        for name, example in rendering_pool.examples(make, self._scene, "train", self._count):
            yield name, example | {feedback.IMAGE_FIELD: _as_jpeg(example[feedback.IMAGE_FIELD])}


def write(data_dir: pathlib.Path, image_size: int, examples: int) -> None:
    """Writes the data set, with one split 'train', into a TFDS folder, unless it is there."""
    data = _NoisyScenes(image_size, examples, data_dir=data_dir)
    if not data.is_prepared():
        data.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))


def _as_jpeg(png: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(png)).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()
