"""Tests the TFDS builders: they store what was made, with any number of processes."""

import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from richhf_jax import feedback
from richhf_jax.datasets import rendering_pool, scenes, synthetic_captions, synthetic_rich_hf
from richhf_jax.datasets.scene_builder import SceneBuilderConfig

OFFLINE = tfds.download.DownloadConfig(try_download_gcs=False)


def build(builder_class, scene: scenes.SceneConfig, sizes: dict[str, int], data_dir) -> dict[str, list[dict]]:
    config = SceneBuilderConfig(name="tiny", scene=scene, split_sizes=sizes)
    builder = builder_class(config=config, data_dir=data_dir)
    builder.download_and_prepare(download_config=OFFLINE)
    return {split: list(tfds.as_numpy(builder.as_dataset(split=split))) for split in sizes}


def test_rich_hf_round_trip(tmp_path):
    scene = scenes.SceneConfig(image_size=80, seed=3)
    splits = build(synthetic_rich_hf.SyntheticRichHf, scene, {"train": 8, "test": 4}, tmp_path)
    assert {split: len(examples) for split, examples in splits.items()} == {"train": 8, "test": 4}
    for split, examples in splits.items():
        names = [example["filename"].decode() for example in examples]
        assert sorted(names) == sorted(scenes.filename(split, index) for index in range(len(names)))
        for name, example in zip(names, examples, strict=True):
            image, truth = scenes.render(scene, name)
            made = rendering_pool.rated_example(scene, name)
            np.testing.assert_array_equal(example["image"], image)
            assert example["prompt"].decode() == truth.scene.description.prompt
            assert example["prompt_misalignment_label"].decode() == made[feedback.KEYWORDS_FIELD]
            for field in feedback.SCORE_FIELDS.values():
                assert example[field] == np.float32(made[field])
            for field in feedback.HEATMAP_FIELDS.values():
                assert example[field].shape == (80, 80, 1)
                assert example[field].dtype == np.uint8
            assert set(example) == set(made)


def test_captions_round_trip(tmp_path):
    scene = scenes.CAPTIONS_CONFIGS["default"]
    splits = build(synthetic_captions.SyntheticCaptions, scene, {"train": 4, "validation": 2}, tmp_path)
    for example in splits["train"] + splits["validation"]:
        image, truth = scenes.render(scene, example["filename"].decode())
        assert set(example) == {"filename", "image", "prompt"}
        np.testing.assert_array_equal(example["image"], image)
        assert example["prompt"].decode() == truth.scene.description.prompt


def test_two_processes_make_what_one_makes():
    arguments = (rendering_pool.rated_example, scenes.CONFIGS["subtle"], "train", 40)
    one, two = (list(rendering_pool.examples(*arguments, processes=n)) for n in (1, 2))
    assert one == two
    assert [name for name, _ in one] == [scenes.filename("train", index) for index in range(40)]


@pytest.mark.parametrize(
    ("builder_class", "sizes"),
    [
        (synthetic_rich_hf.SyntheticRichHf, {"train": 8000, "validation": 500, "test": 500}),
        (synthetic_captions.SyntheticCaptions, {"train": 8000, "validation": 500}),
    ],
)
def test_registered_configurations(builder_class, sizes, tmp_path):
    builder = tfds.builder(builder_class.name, data_dir=tmp_path, try_gcs=False)
    assert builder.builder_config.name == "default"
    assert builder.builder_config.split_sizes == sizes
    large = tfds.builder(f"{builder_class.name}/default_256", data_dir=tmp_path, try_gcs=False)
    assert large.info.features["image"].shape == (256, 256, 3)


def test_rendering_processes_start_without_tensorflow():
    code = "import sys, richhf_jax.datasets.rendering_pool; print('tensorflow' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"
