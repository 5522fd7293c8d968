"""Tests the TFDS builders: they store what was made, with any number of processes."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from richhf_jax import feedback
from richhf_jax.datasets import (
    __main__ as command,
)
from richhf_jax.datasets import (
    records,
    rendering_pool,
    scenes,
    synthetic_captions,
    synthetic_rich_hf,
    whole_builder,
)
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


TINY = (synthetic_captions.SyntheticCaptions, scenes.CAPTIONS_CONFIGS["default"], {"train": 2})


def test_a_data_set_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch, capsys):
    synchronised, named = set(), []
    sync, rename = os.fsync, os.replace

    def fsync(descriptor):
        synchronised.add(os.path.realpath(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    def replace(new, final):
        if os.path.isdir(new):
            named.append(final)
            files = {os.path.realpath(path): path.name for path in pathlib.Path(new).iterdir()}
            assert {"dataset_info.json", records.INDEX_NAME} < set(files.values())
            assert files.keys() <= synchronised
        rename(new, final)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    build(*TINY, tmp_path)
    folder = tmp_path / "synthetic_captions/tiny/2.0.0"
    assert named == [folder]
    assert list(folder.parent.iterdir()) == [folder]
    assert ".new" not in capsys.readouterr().out


def test_a_build_that_ends_early_leaves_no_data_set(tmp_path, monkeypatch):
    def end(*_):
        raise RuntimeError

    with monkeypatch.context() as patch:
        patch.setattr(whole_builder.WholeBuilder, "finish", end)
        with pytest.raises(RuntimeError):
            build(*TINY, tmp_path)
    assert not (tmp_path / "synthetic_captions/tiny/2.0.0").exists()
    assert len(build(*TINY, tmp_path)["train"]) == 2


def test_a_file_in_place_of_the_folder_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="file/.*: Not a directory. Make the folder"):
        command.main([f"--data_dir={tmp_path / 'file'}"])


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
