"""Raw ratings -> TFRecord -> Pick-a-Pic join -> TFDS -> seqio -> model batch: the labels arrive as given."""

import collections
import json

import numpy as np
import pytest
import seqio

import tasks  # noqa: F401 (registers them)
from richhf_jax import feedback, input_pipeline
from tasks import vocabulary

SIDE = 64
LENGTHS = {"image": SIDE, "inputs": 64, "targets": 96, "heatmaps": 2, "scores": 4, "texts": 1}
SPLITS = {"train": "train", "dev": "validation", "test": "test"}


def ratings_of_images(path):
    ratings = collections.defaultdict(list)
    for line in path.read_text().splitlines():
        rating = json.loads(line)
        ratings[rating["image_id"]].append(rating)
    return ratings


def expected_heatmap(ratings, kind):
    """Averages the raters' disks of radius height / 20, from each pixel's distance to the nearest point."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    heatmaps = []
    for rating in ratings:
        heatmap = np.zeros((SIDE, SIDE))
        for x, y in rating[f"{kind}_points"]:
            heatmap[np.hypot(columns - x, rows - y) <= SIDE / 20] = 1
        heatmaps.append(heatmap)
    return np.rint(255 * np.mean(heatmaps, axis=0)).astype(np.uint8)


@pytest.mark.parametrize("split", SPLITS)
def test_labels_of_a_batch_are_the_raters(sample_sources_dir, sample_data_dir, split):
    seqio.set_tfds_data_dir_override(str(sample_data_dir))
    cfg = input_pipeline.DatasetConfig("rich_hf_18k_multi_head", LENGTHS, SPLITS[split], 4)
    raw = ratings_of_images(sample_sources_dir / f"raw/{split}.jsonl")
    seen = []
    for examples, batch in input_pipeline.evaluation_batches(cfg, seqio.ShardInfo(0, 1)):
        for row, example in enumerate(examples):
            name = example[feedback.FILENAME_FIELD].decode()
            seen.append(name)
            check_row({name: value[row] for name, value in batch.items()}, raw[name])
    assert sorted(seen) == sorted(raw)


def check_row(features, ratings):
    scores = np.mean([[(r["ratings"][kind] - 1) / 4 for kind in feedback.SCORES] for r in ratings], axis=0)
    np.testing.assert_allclose(features["score_targets"], scores, rtol=1e-6)  # float32 of the same means
    assert features["score_weights"].tolist() == [1, 1, 1, 1]
    for heatmap, kind in zip(features["heatmap_targets"], feedback.HEATMAPS, strict=True):
        np.testing.assert_array_equal(heatmap, expected_heatmap(ratings, kind))
    prompt = ratings[0]["prompt"]
    votes = np.sum([r["token_labels"] for r in ratings], axis=0)
    words = [word for word in feedback.SEPARATORS.split(prompt) if word]
    target = " ".join(w if 2 * v >= len(ratings) else f"{w}_0" for w, v in zip(words, votes, strict=True))
    assert decode(features["encoder_input_tokens"][0]) == prompt
    assert decode(features["decoder_target_tokens"][0]) == target
    assert feedback.labels_from_text(words, target) == (2 * votes >= len(ratings)).astype(int).tolist()


def decode(tokens):
    return vocabulary.get_vocabulary().decode(tokens[tokens > 1].tolist())
