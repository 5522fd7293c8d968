import collections

import gin
import numpy as np
import pytest
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from richhf_jax import errors, feature_converters, feedback, input_pipeline, preprocessors
from richhf_jax.datasets import sample_sources
from richhf_jax.datasets.web_captions import __main__ as web_captions
from tasks import captions as captions

LENGTHS = {"image": 32, "inputs": 64, "targets": 64, "heatmaps": 0, "scores": 0, "texts": 1}
CORRUPTED = ["coco_corrupted_captions", "web_corrupted_captions_augmented_prompt"]
NAMES = ["coco_captions", "coco_captions_augmented_prompt", "web_captions", "web_captions_augmented_prompt"]
NAMES += ["coco_flawed_captions", "web_flawed_captions_augmented_prompt"]
# Split of TFDS's coco_captions -> images.
COCO_SPLITS = {"train": 4, "val": 3, "test": 2, "restval": 2}
CAPTIONS_OF_AN_IMAGE = 5


def coco_example(split, number):
    """An image of TFDS's coco_captions, with five captions."""
    rng = np.random.default_rng(number)
    return {
        "image": rng.integers(0, 256, (24 + 8 * number, 40, 3), dtype=np.uint8),
        "image/filename": f"COCO_{split}_{number}.jpg",
        "image/id": number,
        "objects": [
            {
                "id": 1,
                "area": 9,
                "bbox": tfds.features.BBox(0.0, 0.0, 1.0, 1.0),
                "label": 3,
                "is_crowd": False,
            }
        ],
        "captions": [
            {"id": 10 * number + i, "text": f"caption {i} of {split} {number}"}
            for i in range(CAPTIONS_OF_AN_IMAGE)
        ],
    }


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    sample_sources.write_web(folder / "web", sample_sources.make_web_pairs(24))
    patterns = {"shards": "captions-{00000..00001}-of-*", "validation_shards": "captions-00002-of-*"}
    arguments = [f"--{name}={folder}/web/webdataset/{pattern}" for name, pattern in patterns.items()]
    web_captions.main([*arguments, f"--data_dir={folder}", "--processes=1"])
    # TFDS's own features and splits, with few images.
    builder = tfds.builder("coco_captions/2014", data_dir=folder, try_gcs=False)
    builder.data_path.mkdir(parents=True)
    writer = tfds.core.SequentialWriter(builder.info, max_examples_per_shard=2)
    writer.initialize_splits(list(COCO_SPLITS))
    writer.add_examples(
        {split: [coco_example(split, n) for n in range(count)] for split, count in COCO_SPLITS.items()}
    )
    writer.close_all()
    return folder


def set_data_dir(folder):
    for name in NAMES + CORRUPTED:
        seqio.get_mixture_or_task(name).source.tfds_dataset.override_data_dir(folder)


@pytest.fixture(autouse=True)
def _data_dir(data_dir):
    set_data_dir(str(data_dir))
    yield
    set_data_dir(None)


def evaluate(name, split="validation", **lengths):
    cfg = input_pipeline.DatasetConfig(name, {**LENGTHS, **lengths}, split, 8)
    batches = input_pipeline.evaluation_batches(cfg, seqio.ShardInfo(0, 1))
    return [example for examples, _ in batches for example in examples]


def drawn_captions(split, draws):
    """Returns file name -> the captions that are drawn for it with so many seeds."""
    dataset = seqio.get_mixture_or_task("coco_captions").source.get_dataset(split, shuffle=False)
    dataset = dataset.repeat(draws).enumerate()
    dataset = dataset.map(lambda k, example: example | {preprocessors.SEED: tf.stack([0, k])})
    drawn = collections.defaultdict(list)
    for example in preprocessors.draw_caption(dataset).as_numpy_iterator():
        assert {feedback.IMAGE_FIELD, preprocessors.SEED} <= example.keys()
        drawn[example[feedback.FILENAME_FIELD].decode()].append(example[feedback.PROMPT_FIELD].decode())
    return drawn


@pytest.mark.parametrize("name", ["coco_captions", "web_captions_augmented_prompt"])
def test_examples(name):
    examples = evaluate(name)
    assert len(examples) == (COCO_SPLITS["val"] if name.startswith("coco") else 7)
    for example in examples:
        assert example["texts"].tolist() == [example[feedback.PROMPT_FIELD]]
        assert example["image"].shape == (32, 32, 3)
        assert example["inputs"].shape == (1, 64)
        assert example["targets"].any()
    assert len({example[feedback.FILENAME_FIELD] for example in examples}) == len(examples)


def test_flawed_examples():
    flawed = evaluate("web_flawed_captions_augmented_prompt", heatmaps=1)
    for example, original in zip(flawed, evaluate("web_captions"), strict=True):
        assert example[feedback.PROMPT_FIELD] == original[feedback.PROMPT_FIELD]
        assert example["heatmaps"][0].any() == (example["image"] != original["image"]).any()
    assert {example["heatmaps"].any() for example in flawed} == {True, False}


def test_corrupted_captions():
    # COCO's stand-ins have captions without a known word, the web's have shapes and colours.
    for example in evaluate(CORRUPTED[0]):
        assert example["texts"].tolist() == [example[feedback.PROMPT_FIELD]]
    gin.bind_parameter("richhf_jax.corruption.corrupted_captions.true_share", 0.0)
    assert any(b"_0" in example["texts"][0] for example in evaluate(CORRUPTED[1]))


def test_one_of_an_images_captions_is_drawn():
    drawn = drawn_captions("train", 30)
    # Karpathy and Li's restval belongs to training.
    numbers = {split: range(COCO_SPLITS[split]) for split in ("train", "restval")}
    names = {f"COCO_{split}_{n}.jpg": f"{split} {n}" for split, ns in numbers.items() for n in ns}
    assert drawn.keys() == names.keys()
    for filename, texts in drawn.items():
        # In 30 fair draws, some caption of the five is never drawn with a probability of 0.6 %.
        assert set(texts) == {f"caption {i} of {names[filename]}" for i in range(CAPTIONS_OF_AN_IMAGE)}
    assert drawn == drawn_captions("train", 30)


def test_other_splits():
    assert len(drawn_captions("validation", 1)) == COCO_SPLITS["val"]
    assert len(drawn_captions("test", 1)) == COCO_SPLITS["test"]


def test_captions_change_between_epochs():
    cfg = input_pipeline.DatasetConfig("coco_captions", LENGTHS, "train", 6)
    task = seqio.get_mixture_or_task("coco_captions")
    stream = input_pipeline.get_dataset(cfg, seqio.ShardInfo(0, 1)).as_numpy_iterator()
    vocabulary = task.output_features["targets"].vocabulary
    epochs = [
        {vocabulary.decode(row[0].tolist()) for row in next(stream)["decoder_target_tokens"]}
        for _ in range(2)
    ]
    images = [{text.partition(" of ")[2] for text in epoch} for epoch in epochs]
    assert images[0] == images[1]
    assert len(images[0]) == 6
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("name", ["coco_captions_augmented_prompt", "web_captions"])
def test_stock_seqio_reads_them(name):
    dataset = seqio.get_dataset(
        name, LENGTHS, feature_converters.RahfFeatureConverter(), seed=0, batch_size=4, num_epochs=1
    )
    batch = next(dataset.as_numpy_iterator())
    assert batch["decoder_loss_weights"].any((1, 2)).all()


def test_data_that_isnt_there_is_named_with_its_command(tmp_path):
    set_data_dir(str(tmp_path))
    with pytest.raises(errors.UserError, match=r"python -m richhf_jax\.datasets\.web_captions"):
        evaluate("web_captions")
