import gin
import numpy as np
import pytest
import seqio

import tasks  # noqa: F401 (registers them)
from richhf_jax import feature_converters, feedback, input_pipeline

LENGTHS = {"image": 64, "inputs": 32, "targets": 32, "heatmaps": 2, "scores": 4, "texts": 1}
RICH_FEEDBACK = [f"synthetic_rich_hf{kind}_{v}" for kind in ("", "_subtle") for v in feedback.VARIANTS]
CORRUPTED_FEEDBACK = [f"synthetic_rich_hf_corrupted_{variant}" for variant in feedback.VARIANTS]
FEEDBACK_PLUS = [f"synthetic_rich_hf_plus_{variant}" for variant in feedback.VARIANTS]
CAPTIONS = ["synthetic_captions", "synthetic_captions_augmented_prompt"]
FLAWED = ["synthetic_flawed_captions", "synthetic_flawed_captions_augmented_prompt"]
CORRUPTED = ["synthetic_corrupted_captions", "synthetic_corrupted_captions_augmented_prompt"]
MIXTURES = ["synthetic_pretrain", "synthetic_pretrain_augmented_prompt"]
PLUS = ["synthetic_pretrain_plus", "synthetic_pretrain_plus_augmented_prompt"]


@pytest.fixture(autouse=True)
def _data_dir(synthetic_data_dir):
    seqio.set_tfds_data_dir_override(str(synthetic_data_dir))


def evaluate(name, **lengths):
    cfg = input_pipeline.DatasetConfig(name, {**LENGTHS, **lengths}, "validation", 8)
    (batch,) = input_pipeline.evaluation_batches(cfg, seqio.ShardInfo(0, 1))
    return batch


def test_names():
    assert set(RICH_FEEDBACK + CAPTIONS + FLAWED + CORRUPTED + CORRUPTED_FEEDBACK) <= set(
        seqio.TaskRegistry.names()
    )
    assert set(MIXTURES + PLUS + FEEDBACK_PLUS) <= set(seqio.MixtureRegistry.names())


@pytest.mark.parametrize("name", ["synthetic_rich_hf_multi_head", "synthetic_rich_hf_augmented_prompt"])
def test_metrics_of_a_perfect_prediction(name):
    task = seqio.get_mixture_or_task(name)
    examples, _ = evaluate(name)
    targets = [task.postprocess_fn(None, example=example, is_target=True) for example in examples]
    assert all(target.heatmaps.keys() == set(feedback.HEATMAPS) for target in targets)
    assert all(target.tokens for target in targets)
    results = {name: value for fn in task.metric_fns for name, value in fn(targets, targets).items()}
    assert results["num_examples"] == len(examples)
    assert results["score/plcc/plausibility"] == pytest.approx(1.0)


@pytest.mark.parametrize("name", CAPTIONS)
def test_captions(name):
    examples, features = evaluate(name, heatmaps=0, scores=0)
    assert features["encoder_input_tokens"].shape == (8, 1, 32)
    for example in examples:
        assert example["texts"].tolist() == [example[feedback.PROMPT_FIELD]]


def test_flawed_captions():
    examples, features = evaluate("synthetic_flawed_captions")
    np.testing.assert_array_equal(features["heatmap_weights"], [[1.0, 0.0]] * 8)
    assert not features["decoder_loss_weights"].any()
    assert not features["score_weights"].any()
    flawed = features["heatmap_targets"].any((1, 2, 3))
    assert 0 < flawed.sum() < 8
    clean, _ = evaluate("synthetic_captions")
    changed = [(a["image"] != b["image"]).any() for a, b in zip(examples, clean, strict=True)]
    assert changed == flawed.tolist()


def test_corrupted_captions():
    examples, _ = evaluate(CORRUPTED[0])
    captions, _ = evaluate(CAPTIONS[0])
    alignment = feedback.SCORES.index(feedback.ALIGNMENT)
    for example, caption in zip(examples, captions, strict=True):
        assert example[feedback.FILENAME_FIELD] == caption[feedback.FILENAME_FIELD]
        np.testing.assert_array_equal(example["image"], caption["image"])
        wrong = example[feedback.PROMPT_FIELD] != caption[feedback.PROMPT_FIELD]
        assert wrong == ("0" in example[feedback.KEYWORDS_FIELD].decode())
        assert example["score_weights"][alignment] or not wrong
    assert 0 < sum(b"_0" in example["texts"][0] for example in examples) < len(examples)


def test_corrupted_feedback():
    examples, _ = evaluate(CORRUPTED_FEEDBACK[0])
    records, _ = evaluate("synthetic_rich_hf_multi_head")
    changed = []
    for example, record in zip(examples, records, strict=True):
        np.testing.assert_array_equal(example["image"], record["image"])
        changed.append(example[feedback.PROMPT_FIELD] != record[feedback.PROMPT_FIELD])
        if not changed[-1]:
            assert example.keys() == record.keys()
            assert all(np.array_equal(example[name], record[name]) for name in record)
        else:
            assert b"_0" in example["texts"][0]
            assert b"_0" not in record["texts"][0]
    assert 0 < sum(changed) < len(examples)


def test_the_mixture_of_feedback_as_it_is_and_corrupted():
    mixture = seqio.MixtureRegistry.get(FEEDBACK_PLUS[0])
    rates = {task.name: mixture.get_rate(task) for task in mixture.tasks}
    assert rates == {"synthetic_rich_hf_multi_head": 1.0, CORRUPTED_FEEDBACK[0]: 1.0}
    gin.bind_parameter("tasks.providers.corrupted_feedback_rate.rate", 2.0)
    assert mixture.get_rate(seqio.TaskRegistry.get(CORRUPTED_FEEDBACK[0])) == 2.0


def test_the_plus_mixture_has_five_kinds_of_example():
    mixture = seqio.MixtureRegistry.get(PLUS[1])
    rates = {task.name: mixture.get_rate(task) for task in mixture.tasks}
    assert rates == dict.fromkeys(
        [CAPTIONS[1], CORRUPTED[1], FLAWED[1], CORRUPTED_FEEDBACK[1], "synthetic_rich_hf_augmented_prompt"],
        1.0,
    )
    gin.bind_parameter("tasks.providers.corrupted_caption_rate.rate", 3.0)
    assert mixture.get_rate(seqio.TaskRegistry.get(CORRUPTED[1])) == 3.0


@pytest.mark.parametrize(("name", "prompts"), list(zip(MIXTURES, (1, 7), strict=True)))
def test_mixtures_have_both_kinds_of_example(name, prompts):
    dataset = seqio.get_dataset(
        name,
        LENGTHS,
        feature_converters.RahfFeatureConverter(),
        num_epochs=None,
        seed=0,
        batch_size=16,
    )
    batch = next(dataset.as_numpy_iterator())
    assert batch["encoder_input_tokens"].shape == (16, prompts, 32)
    labelled = batch["heatmap_weights"].all(1)
    assert 0 < labelled.sum() < 16
    np.testing.assert_array_equal(labelled, batch["score_weights"].any(1))
    assert batch["decoder_loss_weights"].any((1, 2)).all()
