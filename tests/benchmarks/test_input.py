import json

import numpy as np
import pytest
import seqio

from richhf_jax.benchmarks import input as input_benchmark
from richhf_jax.benchmarks import noisy_scenes


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("tfds")
    noisy_scenes.write(path, image_size=64, examples=3)
    return path


def test_figures(data_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(input_benchmark, "TURNS", 2)
    path = tmp_path / "figures.json"
    arguments = ["--image_size=64", "--batch_size=2", "--seconds=0.1", f"--data_dir={data_dir}"]
    input_benchmark.main([*arguments, f"--json={path}"])
    figures = json.loads(path.read_text())
    assert figures["ratio"] == figures["pipeline_per_second"] / figures["decoding_per_second"]
    assert 0 < figures["ratio_min"] <= figures["ratio_max"]
    assert figures["memory_growth_bytes"] > 0
    printed = capsys.readouterr().out
    assert f"ratio {figures['ratio']:.2f}" in printed
    assert f"whole pipeline {figures['pipeline_per_second']:.0f} records/s" in printed


def test_pipeline_is_that_of_training_and_decoding_decodes_all_of_it(data_dir):
    batch = next(input_benchmark.pipeline(data_dir, 64, 4).as_numpy_iterator())
    assert batch["image"].shape == (4, 64, 64, 3)
    assert batch["heatmap_targets"].shape == (4, 2, 64, 64)
    assert batch["decoder_loss_weights"].any(axis=(1, 2)).all()
    batches = input_benchmark.pipeline(data_dir, 64, 3).take(4).as_numpy_iterator()
    # In four epochs, augmentation makes the three records look different each time.
    assert len({image.tobytes() for batch in batches for image in batch["image"]}) > 6
    sizes = next(input_benchmark.decoding(data_dir, 4).as_numpy_iterator())
    np.testing.assert_array_equal(sizes, [5 * 64 * 64] * 4)


def test_data_is_written_once(data_dir):
    files = {path: path.stat().st_mtime_ns for path in data_dir.rglob("*.tfrecord*")}
    assert files
    noisy_scenes.write(data_dir, image_size=64, examples=3)
    assert {path: path.stat().st_mtime_ns for path in data_dir.rglob("*.tfrecord*")} == files
    seqio.set_tfds_data_dir_override(None)
