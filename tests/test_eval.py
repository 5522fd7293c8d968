"""Evaluation with a model that answers from the labels, so that no network is compiled."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seqio

import tasks  # noqa: F401 (registers them)
from richhf_jax import (
    errors,
    feedback,
    image_values,
    input_pipeline,
    metrics,
    partitioning,
    split_predictions,
)
from richhf_jax import eval as eval_script

CONFIG = input_pipeline.DatasetConfig(
    "synthetic_rich_hf_multi_head",
    {"image": 64, "inputs": 32, "targets": 32, "heatmaps": 2, "scores": 4, "texts": 1},
    "test",
    # The split's 8 examples don't fill the second batch.
    batch_size=5,
    shuffle=False,
)


class Answers:
    """A trainer whose model writes the targets, or with a constrained decoder marks every word."""

    model = types.SimpleNamespace(outputs=feedback.ALL_OUTPUTS, vocab_size=448, exact_vocabulary=False)

    def __init__(self):
        self.seen = []

    def predict(self, params, batch):
        self.seen.append(batch)
        outputs = {"heatmaps": batch["heatmap_targets"] / 255, "scores": batch["score_targets"]}
        if "keyword_pieces" not in batch:
            return outputs | {"tokens": batch["decoder_target_tokens"]}
        numbers = np.arange(1, 1 + batch["keyword_words"].shape[-1])
        decided = numbers <= batch["keyword_words"].max(-1, keepdims=True)
        probability = np.where(decided, 0.75, np.nan)
        return outputs | {"keyword_probability": probability, "keyword_misaligned": decided}


@pytest.fixture
def evaluate(tmp_path, monkeypatch, synthetic_data_dir):
    seqio.set_tfds_data_dir_override(str(synthetic_data_dir))
    trainer = Answers()
    monkeypatch.setattr(split_predictions, "load", lambda *args: (trainer, {}, 7))

    def run(**kwargs):
        found = eval_script.evaluate(
            model=None,
            checkpoint_path="",
            output_dir=str(tmp_path),
            partitioner=partitioning.PjitPartitioner(devices=jax.devices()[:1]),
            **{"dataset_cfg": CONFIG, **kwargs},
        )
        (path,) = tmp_path.rglob("7/predictions.jsonl")
        return found, [json.loads(line) for line in path.read_text().splitlines()], trainer.seen

    return run


def test_free_decoding_is_matched_with_the_prompt(evaluate):
    found, records, _ = evaluate(constrained_keywords=False, baseline_fns=())
    assert found["num_examples"] == len(records) == 8
    assert found["keywords/f1"] == 1
    assert {token["probability"] for record in records for token in record["tokens"]} == {None}


def test_constrained_keywords_have_probabilities(evaluate):
    found, records, batches = evaluate(baseline_fns=())
    assert found["keywords/recall"] == 1
    assert 0 < found["keywords/precision"] < 1
    for record in records:
        assert [token["text"] for token in record["tokens"]] == feedback.tokenize_prompt(record["prompt"])
        for token in record["tokens"]:
            assert token["misaligned"]
            assert token["probability"] == 0.75
    assert [batch["keyword_pieces"].shape for batch in batches] == [(5, 1, 32)] * 2
    # Rows that only fill the batch end at once.
    assert batches[1]["keyword_pieces"][:3].any()
    assert not batches[1]["keyword_pieces"][3:].any()


def test_corrupted_captions_are_measured_by_what_is_labelled(evaluate):
    task = dataclasses.replace(
        CONFIG, mixture_or_task_name="synthetic_corrupted_captions", split="validation"
    )
    found, records, _ = evaluate(dataset_cfg=task, constrained_keywords=False)
    assert found["num_examples"] == len(records) == 8
    assert found["keywords/f1"] == 1
    assert found[f"score/plcc/{feedback.ALIGNMENT}"] == pytest.approx(1)
    assert not [name for name in found if "heatmap" in name or feedback.PLAUSIBILITY in name]


def test_metrics_are_made_of_the_values_of_each_image(evaluate, tmp_path):
    found, records, _ = evaluate()
    (path,) = tmp_path.rglob(image_values.FILE)
    measured = image_values.read(path.parent)
    assert (measured.task, measured.split, measured.step) == (CONFIG.mixture_or_task_name, "test", 7)
    assert measured.ids == [record["id"] for record in records]
    baselines = json.loads((path.parent / "baselines.json").read_text())
    rows = {"RAHF": json.loads((path.parent / "metrics.json").read_text())} | baselines
    assert found == rows["RAHF"]
    assert list(measured.systems) == list(rows) == ["RAHF", "trivial (training mean)"]
    for name, written in rows.items():
        made = metrics.aggregate(measured.targets, measured.systems[name])
        assert made | {"num_examples": 8} == {k: v for k, v in written.items() if "synthetic/" not in k}
        assert {key.partition("/")[0] for key in made} == {"score", "heatmap", "keywords"}


def test_metrics_of_a_part_of_the_split_are_no_metrics(evaluate, monkeypatch, tmp_path):
    answers = Answers.predict

    def predict(self, params, batch):
        outputs = answers(self, params, batch)
        outputs["scores"] = np.where(np.arange(5)[:, None] == 2, np.nan, outputs["scores"])
        return outputs

    monkeypatch.setattr(Answers, "predict", predict)
    with pytest.raises(
        errors.UserError, match=r"^test/.*\.png: the model's scores aren't finite numbers.*all"
    ):
        evaluate()
    assert not list(tmp_path.iterdir())


def test_memory_that_runs_out_names_the_macro(evaluate, monkeypatch):
    monkeypatch.setattr(Answers, "predict", lambda *args: jnp.zeros(1 << 50, jnp.int8))
    with pytest.raises(
        errors.UserError, match="too small: RESOURCE_EXHAUSTED.*A smaller EVAL_BATCH_SIZE, or"
    ):
        evaluate()


def test_only_process_0_writes(evaluate, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises(ValueError, match="not enough values"):  # There is no file to read.
        evaluate(baseline_fns=())
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_an_output_that_is_a_file_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(split_predictions, "load", lambda *args: pytest.fail("began"))
    with pytest.raises(errors.UserError, match="EVAL_OUTPUT_DIR: .*/file is a file, name a folder"):
        eval_script.evaluate(
            model=None,
            checkpoint_path="",
            output_dir=str(tmp_path / "file"),
            dataset_cfg=CONFIG,
            partitioner=partitioning.PjitPartitioner(devices=jax.devices()[:1]),
        )


def test_data_of_another_vocabulary_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(input_pipeline, "vocabulary_model", lambda cfg: b"other")
    (tmp_path / "checkpoint_3/state").mkdir(parents=True)
    (tmp_path / "vocabulary.model").write_bytes(b"first")
    model = types.SimpleNamespace(vocab_size=None, exact_vocabulary=False)
    with pytest.raises(
        errors.UserError, match=f"isn't {tmp_path}/vocabulary.model, .*Set VOCABULARY to that"
    ):
        split_predictions.load(model, str(tmp_path), CONFIG, partitioning.PjitPartitioner())
