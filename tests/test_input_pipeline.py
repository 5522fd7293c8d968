import json
import shutil
import subprocess
import sys

import gin
import numpy as np
import pytest
import seqio
import tensorflow as tf

import tasks  # noqa: F401 (registers them)
from richhf_jax import errors, feature_converters, feedback, input_pipeline, partitioning
from tasks import vocabulary

LENGTHS = {"image": 64, "inputs": 32, "targets": 32, "heatmaps": 2, "scores": 4, "texts": 1}
TASK = "synthetic_rich_hf_multi_head"
ONE_HOST = seqio.ShardInfo(0, 1)
TRAIN_EXAMPLES, TEST_EXAMPLES = 32, 8


@pytest.fixture(autouse=True)
def _data_dir(synthetic_data_dir):
    seqio.set_tfds_data_dir_override(str(synthetic_data_dir))


def config(name=TASK, split="train", batch_size=4, lengths=None, **kwargs):
    return input_pipeline.DatasetConfig(name, {**LENGTHS, **(lengths or {})}, split, batch_size, **kwargs)


def take(cfg, count, shard_info=ONE_HOST, **kwargs):
    dataset = input_pipeline.get_dataset(cfg, shard_info, **kwargs)
    return list(dataset.take(count).as_numpy_iterator())


def ids(batches):
    """Returns the sum of an image's pixels, which tells examples apart."""
    return [int(image.astype(np.int64).sum()) for batch in batches for image in batch["image"]]


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert batch.keys() == other.keys()
        for name, value in batch.items():
            np.testing.assert_array_equal(value, other[name], err_msg=name)


def test_each_epoch_has_every_record_once_in_an_order_of_its_own():
    seen = ids(take(config(), 24))
    epochs = [seen[start : start + TRAIN_EXAMPLES] for start in (0, 32, 64)]
    assert len(set(epochs[0])) == TRAIN_EXAMPLES
    assert set(epochs[0]) == set(epochs[1]) == set(epochs[2])
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize("name", [TASK, "synthetic_pretrain"])
def test_no_tuner_sleeps_when_a_stream_is_closed(name):
    assert not input_pipeline.get_dataset(config(name), ONE_HOST).options().autotune.enabled


def test_order_depends_on_the_seed_alone():
    seen = ids(take(config(seed=3), 8))
    assert ids(take(config(seed=4), 8)) != seen
    assert ids(take(config(seed=3, batch_size=16), 2)) == seen


def test_without_shuffle_records_come_in_order():
    seen = ids(take(config(shuffle=False), 16))
    assert seen[:TRAIN_EXAMPLES] == seen[TRAIN_EXAMPLES:]
    assert seen[:TRAIN_EXAMPLES] != ids(take(config(), 8))


@pytest.mark.parametrize("name", [TASK, "synthetic_pretrain"])
def test_resumed_stream_is_the_uninterrupted_one(name, rng):
    cfg = config(name)
    uninterrupted = take(cfg, 30)
    for step in rng.choice(29, 2, replace=False):
        assert_same(take(cfg, 2, start_step=int(step)), uninterrupted[step : step + 2])


def test_augmented_letterboxes():
    gin.bind_parameter("richhf_jax.augmentation.show.fit", "letterbox")
    batches = take(config(augment=True), 8)
    plain = take(config(), 8)
    assert all(batch["image_box"].tolist() == [[0, 0, 64, 64]] * 4 for batch in batches)
    assert all(batch["image"].shape == (4, 64, 64, 3) for batch in batches)
    changed = [(a["image"] != b["image"]).any((1, 2, 3)) for a, b in zip(batches, plain, strict=True)]
    # Half are cropped, 0.27 of the others recoloured: 0.64 of all. Of 32, fewer than 10 or all is unlikely.
    assert 10 <= np.sum(changed) < 32


def test_stopped_at_ten_random_steps_the_examples_are_those_of_one_run(rng):
    cfg = config(lengths={"heatmaps": 0, "scores": 0})
    layout = partitioning.DataLayout(batch_size=4, shard_id=0, num_shards=1)
    uninterrupted = ids(take(cfg, 44))
    stops = [*sorted(rng.choice(np.arange(1, 44), 10, replace=False)), 44]
    stream = input_pipeline.TrainStream(cfg, lambda batch_size: layout)
    seen, saved = [], "{}"
    for start, stop in zip([0, *stops], stops, strict=False):
        batches = stream.batches(json.loads(saved))
        seen += ids([next(batches) for _ in range(stop - start)])
        saved = json.dumps(stream.position(int(stop)))
        assert len(saved) <= len('{"step": 12345678}')
    assert seen == uninterrupted


def test_random_choices_are_resumed_too():
    cfg = config("synthetic_rich_hf_augmented_prompt", lengths={"heatmaps": 1, "scores": 1})
    assert_same(take(cfg, 2, start_step=10), take(cfg, 12)[10:])


@pytest.mark.parametrize("name", [TASK, "synthetic_pretrain"])
def test_hosts_have_consecutive_parts_of_each_batch(name):
    cfg = config(name, batch_size=6)
    hosts = [take(cfg, 5, seqio.ShardInfo(index, 2)) for index in range(2)]
    assert hosts[0][0]["image"].shape[0] == 3
    joined = [
        {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        for parts in zip(*hosts, strict=True)
    ]
    assert_same(joined, take(cfg, 5))
    if name == TASK:  # These are 30 examples of an epoch of 32.
        assert not set(ids(hosts[0])) & set(ids(hosts[1]))


def test_batch_that_does_not_split_over_the_hosts():
    with pytest.raises(errors.UserError, match="batch of 4 doesn't split evenly over 3 hosts"):
        take(config(), 1, seqio.ShardInfo(0, 3))


def test_mixture_has_its_rates_and_sees_records_equally_often():
    gin.bind_parameter("tasks.providers.caption_rate.rate", 3.0)
    batches = take(config("synthetic_pretrain", batch_size=50), 20)  # One block of the schedule.
    captions = np.concatenate([batch["heatmap_weights"][:, 0] == 0 for batch in batches])
    assert captions.sum() == 750
    # Mixed: no long run of either.
    assert captions[:100].sum() > 50
    seen = np.array(ids(batches))
    for task, count in ((captions, 750), (~captions, 250)):
        times_seen = np.unique(seen[task], return_counts=True)[1]
        assert len(times_seen) == TRAIN_EXAMPLES
        assert set(times_seen) == {count // TRAIN_EXAMPLES, count // TRAIN_EXAMPLES + 1}


def test_blind_by_gin():
    gin.parse_config("richhf_jax.preprocessors.blind.to = 'image'")
    (batch,) = take(config(), 1)
    assert not batch["image"].any()
    assert batch["heatmap_targets"].any()


def test_quotas_are_whole_and_rounded_fairly():
    mixture = seqio.MixtureRegistry.get("synthetic_pretrain")
    names = [task.name for task in mixture.tasks]
    thirds = seqio.Mixture("thirds", [(names[0], 2), (names[1], 1)])
    np.testing.assert_array_equal(input_pipeline._quotas(thirds, thirds.tasks), [667, 333])
    rare = seqio.Mixture("rare", [(names[0], 1), (names[1], 1e-5)])
    with pytest.raises(errors.UserError, match=f"the rate of {names[1]} is below 1 in 1000"):
        input_pipeline._quotas(rare, rare.tasks)


def test_a_task_of_rate_0_is_left_out():
    for task in ("corrupted_caption", "corrupted_feedback", "flawed_caption"):
        gin.bind_parameter(f"tasks.providers.{task}_rate.rate", 0.0)
    left, plain = (
        input_pipeline._tasks(seqio.MixtureRegistry.get(f"synthetic_pretrain{plus}"))
        for plus in ("_plus", "")
    )
    assert left == plain


@pytest.mark.parametrize(
    ("rates", "message"),
    [((0, 0), "mixed: the rates of all its tasks are 0"), ((1, -1), "the rate of .* must be 0 or more")],
)
def test_rates_that_make_no_sense(rates, message):
    mixture = seqio.Mixture("mixed", list(zip(["synthetic_captions", TASK], rates, strict=True)))
    with pytest.raises(errors.UserError, match=message):
        input_pipeline._tasks(mixture)


def test_evaluation_takes_each_record_once_and_fills_up_the_last_batch():
    cfg = config(split="test", batch_size=3)
    batches = list(input_pipeline.evaluation_batches(cfg, ONE_HOST))
    assert [len(examples) for examples, _ in batches] == [3, 3, 2]
    names = [example[feedback.FILENAME_FIELD] for examples, _ in batches for example in examples]
    assert len(set(names)) == TEST_EXAMPLES
    for examples, features in batches:
        assert features["image"].shape == (3, 64, 64, 3)
        for example, image in zip(examples, features["image"], strict=False):
            np.testing.assert_array_equal(example["image"], image)
    last = batches[-1][1]
    for name in ("heatmap_weights", "score_weights", "decoder_loss_weights"):
        assert last[name][:2].any()
        assert not last[name][2].any()


def test_evaluation_on_several_hosts_is_that_of_one():
    cfg = config(split="test", batch_size=6)
    hosts = [list(input_pipeline.evaluation_batches(cfg, seqio.ShardInfo(i, 3))) for i in range(3)]
    # The last batch holds two records: the first host's.
    assert [[len(examples) for examples, _ in host] for host in hosts] == [[2, 2], [2, 0], [2, 0]]
    one = list(input_pipeline.evaluation_batches(cfg, ONE_HOST))
    for number, (_, features) in enumerate(one):
        joined = np.concatenate([host[number][1]["image"] for host in hosts])
        np.testing.assert_array_equal(joined, features["image"])


@pytest.mark.parametrize("start", [1, 2, 3])
def test_evaluation_from_a_later_batch_on(start):
    cfg = config(split="test", batch_size=3)
    expected = list(input_pipeline.evaluation_batches(cfg, ONE_HOST))[start:]
    found = list(input_pipeline.evaluation_batches(cfg, ONE_HOST, start_step=start))
    assert len(found) == len(expected) == 3 - start
    for (examples, features), (expected_examples, expected_features) in zip(found, expected, strict=True):
        assert len(examples) == len(expected_examples)
        np.testing.assert_array_equal(features["image"], expected_features["image"])


def test_evaluation_of_a_mixture_is_refused():
    with pytest.raises(errors.UserError, match="synthetic_pretrain is a mixture"):
        next(input_pipeline.evaluation_batches(config("synthetic_pretrain"), ONE_HOST))


def test_split_that_is_not_there():
    with pytest.raises(
        errors.UserError, match=r"synthetic_captions has no split 'test', only train, validation"
    ):
        take(config("synthetic_captions", split="test"), 1)


def test_data_that_is_not_built_is_named():
    with pytest.raises(
        errors.UserError, match=r"synthetic_rich_hf/subtle.*\n.*datasets --data_dir=DIR --config=subtle\n"
    ):
        take(config("synthetic_rich_hf_subtle_multi_head"), 1)


def test_a_vocabulary_larger_than_the_models():
    size = vocabulary.get_vocabulary().vocab_size
    input_pipeline.check_vocabulary(config(), size)
    with pytest.raises(
        errors.UserError, match=rf"{TASK}: its vocabulary has {size} tokens, the model {size - 1}"
    ):
        input_pipeline.check_vocabulary(config(), size - 1)


def test_train_stream():
    cfg = config(batch_size=4)
    layout = partitioning.DataLayout(batch_size=4, shard_id=1, num_shards=2)
    stream = input_pipeline.TrainStream(cfg, lambda batch_size: layout)
    batches = stream.batches({})
    first = [next(batches) for _ in range(3)]
    assert {name: (4, *value.shape[1:]) for name, value in first[0].items()} == {
        name: value.shape for name, value in stream.batch_shapes.items()
    }
    assert all(value.dtype == stream.batch_shapes[name].dtype for name, value in first[0].items())
    assert_same([next(stream.batches(stream.position(2)))], first[2:])


def test_stock_seqio_reads_the_same_records():
    dataset = seqio.get_dataset(
        TASK, LENGTHS, feature_converters.RahfFeatureConverter(), dataset_split="train", batch_size=4
    )
    assert_same(list(dataset.as_numpy_iterator()), take(config(shuffle=False), 8))
    mixture = seqio.get_dataset(
        "synthetic_pretrain",
        LENGTHS,
        feature_converters.RahfFeatureConverter(),
        shuffle=True,
        num_epochs=None,
        seed=0,
        batch_size=4,
    )
    assert next(iter(mixture))["image"].shape == (4, 64, 64, 3)


def test_program_ends_while_data_is_read_ahead(synthetic_data_dir):
    program = (
        "import seqio, tasks; from richhf_jax import input_pipeline\n"
        f"seqio.set_tfds_data_dir_override({str(synthetic_data_dir)!r})\n"
        f"cfg = input_pipeline.DatasetConfig({TASK!r}, {LENGTHS}, 'train', 4)\n"
        "batches = input_pipeline.get_dataset(cfg, seqio.ShardInfo(0, 1)).as_numpy_iterator()\n"
        "next(batches)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=100)


@pytest.mark.parametrize("name", [TASK, "synthetic_pretrain"])
def test_names_of_a_batchs_examples(name):
    cfg = config(name, batch_size=6)
    names = input_pipeline.example_names(cfg, 4)
    places = [tuple(line.split(": ")) for line in names]
    # Each file's picture is the one at this place of the batch.
    pictures = {}
    for task in {task for task, _ in places}:
        for examples, features in input_pipeline.evaluation_batches(config(task, batch_size=1), ONE_HOST):
            pictures[task, examples[0][feedback.FILENAME_FIELD].decode()] = ids([features])[0]
    batch = take(cfg, 1, start_step=4)
    assert [pictures[place] for place in places] == ids(batch)


def test_a_shard_that_is_lost_while_it_is_read_is_named(tmp_path):
    lost = tf.data.TFRecordDataset(str(tmp_path / "lost"))
    message = f"the data can't be read: .*{tmp_path}/lost.*\nBring the file back"
    with pytest.raises(errors.UserError, match=message):
        next(input_pipeline._numpy(config(), lost))


def test_a_shard_that_is_not_there_is_named(monkeypatch):
    def fail(parts):
        raise FileNotFoundError(2, "No such file or directory", parts[0][0])

    monkeypatch.setattr(input_pipeline.records, "locate", fail)
    with pytest.raises(errors.UserError, match=f"{TASK}: its data can't be read: .*train.tfrecord"):
        take(config(), 1)


def test_a_damaged_record_is_told_with_its_shard(tmp_path, synthetic_data_dir, monkeypatch):
    data_dir = tmp_path / "data"
    shutil.copytree(synthetic_data_dir, data_dir)
    (shard,) = data_dir.rglob("synthetic_rich_hf-test.tfrecord*")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    loader = seqio.get_mixture_or_task(TASK).source.tfds_dataset
    monkeypatch.setattr(loader, "_data_dir_override", str(data_dir))
    batches = input_pipeline.evaluation_batches(config(split="test"), ONE_HOST)
    assert len(next(batches)[0]) == 4
    message = f"can't be read: {shard}: the record at byte \\d+ is garbled\nBring the file back"
    with pytest.raises(errors.UserError, match=message):
        next(batches)


def test_a_task_that_is_not_there_is_told_with_those_of_like_names():
    message = (
        "there is no task 'synthetic_rich_hf_mult_head' in tasks/; did you mean synthetic_rich_hf_multi_head"
    )
    with pytest.raises(errors.UserError, match=message):
        input_pipeline.check_vocabulary(config("synthetic_rich_hf_mult_head"), 32)


@pytest.mark.parametrize("size", [0, -2, 1.5, "x"])
def test_a_batch_has_a_number_of_examples(size):
    with pytest.raises(errors.UserError, match=f"BATCH_SIZE must be a whole number above 0, got {size!r}"):
        config(batch_size=size)
