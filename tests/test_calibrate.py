"""Calibration, and what evaluation and inference make of it, with a model whose errors are known."""

import json
import pathlib
import types

import jax
import numpy as np
import pytest
import seqio

import tasks  # noqa: F401 (registers them)
from richhf_jax import (
    calibrate,
    checkpoints,
    errors,
    feedback,
    infer,
    input_pipeline,
    locking,
    model_description,
    models,
    partitioning,
    split_predictions,
    train,
)
from richhf_jax import eval as eval_script

TASK = "synthetic_rich_hf_multi_head"
LENGTHS = {"image": 64, "inputs": 32, "targets": 32, "heatmaps": 2, "scores": 4, "texts": 1}
# Every score is wrong by this, and these are the uncertainties of the four kinds.
ERROR, DEVIATIONS = 0.1, (0.05, 0.1, 0.2, 0.4)
FACTORS = dict(zip(feedback.SCORES, (2, 1, 0.5, 0.25), strict=True))
WHERE = "synthetic_rich_hf_multi_head, validation"


class Answers:
    """A trainer whose model is wrong by `error` in every score."""

    model = types.SimpleNamespace(outputs=feedback.ALL_OUTPUTS, vocab_size=448)

    def __init__(self, error: float):
        self._error = error

    def predict(self, params, batch):
        targets = batch["score_targets"]
        decided = np.arange(1, 33) <= batch["keyword_words"].max(-1, keepdims=True)
        return {
            "heatmaps": batch["heatmap_targets"] / 255,
            "scores": np.where(targets < 0.5, targets + self._error, targets - self._error),
            "score_deviations": np.tile(np.float32(DEVIATIONS), (len(targets), 1)),
            "keyword_probability": np.where(decided, 0.25, np.nan),
            "keyword_misaligned": np.zeros_like(decided),
        }


def config(split: str, **lengths) -> input_pipeline.DatasetConfig:
    # The split's 8 examples don't fill the second batch.
    return input_pipeline.DatasetConfig(TASK, LENGTHS | lengths, split, batch_size=5, shuffle=False)


@pytest.fixture
def directory(make_model_dir, synthetic_data_dir) -> pathlib.Path:
    """Makes a MODEL_DIR of a model with uncertainties, at step 7."""
    seqio.set_tfds_data_dir_override(str(synthetic_data_dir))
    directory = make_model_dir(uncertainty=True)
    (directory / "checkpoint_0").rename(directory / "checkpoint_7")
    return directory


@pytest.fixture
def run(directory, monkeypatch):
    """Runs `calibrate`, `evaluate` or `infer`."""

    def start(function, split, error=ERROR, has_uncertainty=True, **kwargs):
        monkeypatch.setattr(split_predictions, "load", lambda *args: (Answers(error), {}, 7))
        return function(
            model=types.SimpleNamespace(
                has_uncertainty=has_uncertainty, vocab_size=448, describe=lambda *args: {}
            ),
            checkpoint_path=str(directory),
            dataset_cfg=config(split),
            partitioner=partitioning.PjitPartitioner(devices=jax.devices()[:1]),
            **kwargs,
        )

    return start


def test_the_factors_are_printed_and_written(run, directory, capsys):
    before = model_description.read(directory)
    assert run(calibrate.calibrate, "validation") == pytest.approx(FACTORS, rel=1e-5)
    found = model_description.read(directory)
    assert found.deviation_factors == pytest.approx(FACTORS, rel=1e-5)
    calibration = found.calibration
    assert (calibration.step, calibration.task, calibration.split, calibration.examples) == (
        *(7, TASK, "validation", 8),
    )
    assert found.of_step(8).network == before.network
    printed = capsys.readouterr().out
    assert "plausibility: standard deviations x 2.000" in printed
    assert f"{directory}/model.json, for checkpoint_7" in printed
    # An error of two uncertainties lies in neither interval, one of one in the 95 % alone.
    table = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.strip()}
    assert table["before"][0:2] == ["0.0%", "0.0%"]
    assert table["after"][0:2] == ["0.0%", "100.0%"]


def test_an_export_is_refused(run, directory):
    (directory / "SHA256SUMS").touch()
    before = (directory / "model.json").read_bytes()
    with pytest.raises(errors.UserError, match=f"{directory} is an export.*then export again"):
        run(calibrate.calibrate, "validation")
    assert (directory / "model.json").read_bytes() == before


def test_evaluation_and_inference_take_the_factors(run, directory, tmp_path, caplog):
    def evaluate():
        metrics = run(eval_script.evaluate, "test", output_dir=str(tmp_path), baseline_fns=())
        folder = tmp_path / f"inference_eval/{TASK}/test/7"
        records = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        return metrics, records, json.loads((folder / "baselines.json").read_text())

    raw, records, others = evaluate()
    assert "aren't calibrated for this checkpoint" in caplog.text
    assert {tuple(record["uncertainty"].values()) for record in records} == {
        tuple(float(np.float32(deviation)) for deviation in DEVIATIONS)
    }
    assert others == {}
    run(calibrate.calibrate, "validation")
    caplog.clear()
    calibrated, records, others = evaluate()
    assert "calibrated" not in caplog.text
    for record in records:
        assert list(record["uncertainty"].values()) == pytest.approx(4 * [ERROR], rel=1e-5)
    # What the calibration changes stands beside the model's row; all else is as it was.
    changed = {name for name in raw if raw[name] != calibrated[name]}
    assert changed
    assert all(name.startswith(("score/coverage", "score/nll")) for name in changed)
    for kind in feedback.SCORES:
        assert raw[f"score/coverage95/{kind}"] == (kind != feedback.PLAUSIBILITY)
        assert calibrated[f"score/coverage95/{kind}"] == 1
        assert calibrated[f"score/nll/{kind}"] == pytest.approx(np.log(0.1) + np.log(2 * np.pi * np.e) / 2)
    assert others == {"RAHF, not calibrated": {name: raw[name] for name in others["RAHF, not calibrated"]}}
    page = next(tmp_path.rglob("report.html")).read_text()
    assert "Uncertainty of the scores" in page
    assert "± 0.10" in page

    run(infer.infer, "test", output_dir=str(tmp_path / "inferred"))
    [file] = (tmp_path / "inferred").glob("*.jsonl-*")
    lines = [json.loads(line)["prediction"] for line in file.read_text().splitlines()]
    assert [line["uncertainty"] for line in lines] == [record["uncertainty"] for record in records]
    # Another calibration is another run.
    model_description.read(directory).of_step(-1).write(directory)
    with pytest.raises(errors.UserError, match="deviation_factors was .*, now it is {}"):
        run(infer.infer, "test", output_dir=str(tmp_path / "inferred"))


def test_evaluation_on_the_calibrations_split_is_told(run, tmp_path, caplog):
    run(calibrate.calibrate, "validation")
    run(eval_script.evaluate, "validation", output_dir=str(tmp_path), baseline_fns=())
    assert "calibrated on this split, so their coverage is no test" in caplog.text


@pytest.mark.parametrize("damaged", [False, True])
def test_training_keeps_the_calibration_of_a_whole_file(run, directory, damaged):
    run(calibrate.calibrate, "validation")
    before = model_description.read(directory)
    if damaged:
        file = directory / "model.json"
        file.write_text(file.read_text().replace('"step": 7', '"step": 8'))
    content = models.describe_system("rahf", before.network, before.feature_lengths, before.fit, 0.5)
    model = types.SimpleNamespace(
        outputs=feedback.ALL_OUTPUTS, has_uncertainty=True, describe=lambda *_: content
    )
    stream = types.SimpleNamespace(batch_shapes={})
    train._write_description(
        model, config("train"), stream, checkpoints.CheckpointConfig(None), str(directory), 0, step=7
    )
    assert model_description.read(directory).calibration == (None if damaged else before.calibration)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"has_uncertainty": False}, "predicts no uncertainty.* --gin.SCORE_UNCERTAINTY=True"),
        ({"error": 0.0}, f"{WHERE}: every prediction of plausibility is exactly right"),
        ({"error": np.nan}, r"\.png: the model's scores aren't finite"),
    ],
)
def test_what_cannot_be_calibrated_is_told(run, directory, settings, message):
    before = (directory / "model.json").read_bytes()
    with pytest.raises(errors.UserError, match=message):
        run(calibrate.calibrate, "validation", **settings)
    assert (directory / "model.json").read_bytes() == before


def test_a_kind_without_labels_is_named(run, monkeypatch):
    monkeypatch.setattr(
        calibrate.postprocessors, "target", lambda example: feedback.RichFeedback("a", "", {}, {}, ())
    )
    monkeypatch.setattr(
        split_predictions, "whole_split", lambda *args: [[({}, feedback.RichFeedback("a", "", {}, {}, ()))]]
    )
    with pytest.raises(errors.UserError, match=f"{WHERE}: no example has the score plausibility"):
        run(calibrate.calibrate, "validation")


def test_a_training_that_writes_there_is_in_the_way(run, directory):
    with locking.held(directory, "--gin.MODEL_DIR=DIR"), pytest.raises(errors.UserError, match="another"):
        run(calibrate.calibrate, "validation")
