"""The quickstart's own gin files end to end: train, stop, resume, evaluate, report; as users run them.

Only sizes and steps are smaller (see SMALL). The fixtures do the runs once; the tests check their results.
"""

import collections
import dataclasses
import errno
import functools
import html
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import types
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from absl import flags, logging
from absl.testing import flagsaver
from flax.linen import partitioning as partitioning_axes
from tensorboard.backend.event_processing import event_accumulator

from richhf_jax import (
    RahfPredictor,
    checkpoints,
    device_memory,
    errors,
    feedback,
    gin_utils,
    input_pipeline,
    locking,
    losses,
    models,
    optimizers,
    partitioning,
    train,
    train_state,
    training_log,
)
from richhf_jax import trainer as trainer_lib

ROOT = pathlib.Path(train.__file__).resolve().parents[1]
TASK = "synthetic_rich_hf_multi_head"

SMALL = """
from __gin__ import dynamic_registration
from richhf_jax.network import rahf
from richhf_jax.network import t5
from richhf_jax.network import vit

t5.T5Config:
  emb_dim = 32
  num_heads = 2
  head_dim = 16
  num_encoder_layers = 1
  num_decoder_layers = 1
  mlp_dim = 32
vit.ViTConfig:
  emb_dim = 32
  num_heads = 2
  num_layers = 1
  mlp_dim = 32
rahf.HeadsConfig:
  heatmap_layers = (('deconv', 8, 3), ('deconv', 4, 3))
  score_conv_layers = ((8, 2),)
  score_dense_layers = (8,)
"""
# The finetuning writes a line a step. A pipe holds fewer than 30 of them, and a program whose lines nobody
# reads waits: so a signal that is sent when a line is read arrives within 30 steps, on any machine.
STEPS, PERIOD, PIPE_BYTES = 40, 10, 4096
PRETRAINING = ("--gin.TRAIN_STEPS=2", "--gin.BATCH_SIZE=4", "--gin.EVAL_STEPS=1")
FINETUNING = (
    *(f"--gin.TRAIN_STEPS={STEPS}", "--gin.LOG_PERIOD=1", "--gin.BATCH_SIZE=4"),
    *("--gin.EVAL_PERIOD=1000", "--gin.EVAL_STEPS=1"),
)


class Program:
    """An entry point that runs on the small data with the small model, in a folder of its own."""

    def __init__(self, folder: pathlib.Path, data_dir: pathlib.Path, module: str, gin_file: str, *flags: str):
        (folder / "small.gin").write_text(SMALL)
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", module, f"--gin_file={gin_file}", "--gin_file=small.gin"),
                *(f"--tfds_data_dir={data_dir}", *flags),
            ],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            pipesize=PIPE_BYTES,
        )
        self.output = ""

    def read_until_step(self, step: int) -> None:
        while not self.output.endswith("\n") or f"step {step}/" not in self.output.splitlines()[-1]:
            line = self._process.stdout.readline().decode()
            assert line, self.output
            self.output += line

    def send(self, signum: int) -> None:
        self._process.send_signal(signum)

    def finish(self) -> int:
        """Waits for the end and returns the exit code."""
        with self._process:
            self.output += self._process.stdout.read().decode()
        return self._process.returncode


@pytest.fixture(scope="module")
def launch(tmp_path_factory, synthetic_data_dir):
    folder = tmp_path_factory.mktemp("runs")

    def start(module: str, gin_file: str, *flags: str) -> Program:
        return Program(folder, synthetic_data_dir, f"richhf_jax.{module}", f"experiments/{gin_file}", *flags)

    start.folder = folder
    return start


@pytest.fixture(scope="module")
def pretrained(launch) -> pathlib.Path:
    """Runs the quickstart's first half and returns its MODEL_DIR."""
    program = launch("train", "quickstart_pretrain.gin", "--gin.MODEL_DIR=pretrain", *PRETRAINING)
    assert program.finish() == 0, program.output
    return launch.folder / "pretrain"


@pytest.fixture(scope="module")
def finetuned(launch, pretrained) -> dict[str, Program]:
    """Runs the second half: "whole" in one go; "stopped" and "resumed" in another MODEL_DIR."""

    def start(model_dir: str, *flags: str) -> Program:
        where = (f"--gin.MODEL_DIR={model_dir}", f"--gin.INITIAL_CHECKPOINT_PATH={pretrained.name}")
        return launch("train", "quickstart.gin", *where, *FINETUNING, *flags)

    alone = (f"--gin.CHECKPOINT_PERIOD={STEPS}", "--gin.train.train_eval_dataset_cfg=None")
    programs = {"stopped": start("parts", f"--gin.CHECKPOINT_PERIOD={PERIOD}")}
    programs["stopped"].read_until_step(5)
    programs["stopped"].send(signal.SIGTERM)
    programs["whole"] = start("whole", *alone)  # It finds the other's step compiled.
    for program in programs.values():
        assert program.finish() == 0, program.output
    programs["resumed"] = start("parts", f"--gin.CHECKPOINT_PERIOD={PERIOD}")
    assert programs["resumed"].finish() == 0, programs["resumed"].output
    return programs


@pytest.fixture(scope="module")
def evaluated(launch, finetuned) -> pathlib.Path:
    """Evaluates the resumed run and returns the folder of the results."""
    flags = ("--gin.MODEL_DIR=parts", "--gin.INITIAL_CHECKPOINT_PATH=pretrain", "--gin.EVAL_BATCH_SIZE=6")
    program = launch("eval", "quickstart.gin", *flags)
    assert program.finish() == 0, program.output
    assert "trivial (training mean)" in program.output
    return launch.folder / f"parts/inference_eval/{TASK}/test/{STEPS}"


def last_step(program: Program) -> int:
    return int(re.findall(rf" step (\d+)/{STEPS} ", program.output)[-1])


def continued_from(program: Program) -> int:
    return int(re.search(r" continuing from step (\d+)\n", program.output)[1])


def params(model_dir: pathlib.Path) -> dict:
    path = model_dir / f"checkpoint_{STEPS}/state"
    reader = ocp.PyTreeCheckpointer()
    as_numpy = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), reader.metadata(path).item_metadata.tree
    )
    return reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))["params"]


def test_sigterm_saves_and_exits(finetuned):
    output = finetuned["stopped"].output
    stop = last_step(finetuned["stopped"])
    assert 5 <= stop < STEPS
    assert "SIGTERM: saving a checkpoint, then exiting" in output
    assert output.endswith(f" stopped at step {stop}; the same command continues\n")
    assert continued_from(finetuned["resumed"]) == stop


def test_a_resumed_run_ends_as_a_run_in_one_go(launch, finetuned):
    # Bit by bit: the same data, random numbers and optimizer state.
    whole, parts = params(launch.folder / "whole"), params(launch.folder / "parts")
    jax.tree.map(np.testing.assert_array_equal, whole, parts)


def test_finetuning_starts_from_the_pretrained_parameters(finetuned):
    assert re.search(r" initialised \d+ arrays from pretrain, 0 stay fresh\n", finetuned["whole"].output)
    assert "initialised" not in finetuned["resumed"].output


def test_what_training_leaves_in_its_model_dir(launch, finetuned):
    folder = launch.folder / "parts"
    names = {path.name for path in folder.iterdir() if path.name != "inference_eval"}
    kept = {"checkpoint_30", f"checkpoint_{STEPS}"}  # KEEP_CHECKPOINTS
    described = {"config.gin", "model-info.txt", "model.json", "vocabulary.model"}
    assert names == {*described, "train", "training_eval", *kept}
    assert f"TRAIN_STEPS = {STEPS}" in (folder / "config.gin").read_text()
    assert re.search(r"total number of parameters: \d+\n$", (folder / "model-info.txt").read_text())
    assert list((folder / "training_eval" / TASK).glob("events.*"))


def test_metrics_have_every_key(evaluated):
    metrics = json.loads((evaluated / "metrics.json").read_text())
    heatmap_metrics = ("mse", "mse_empty", "cc", "kld", "sim", "nss", "auc_judd")
    assert set(metrics) == {
        "num_examples",
        *(f"score/{metric}/{kind}" for metric in ("plcc", "srcc", "mse") for kind in feedback.SCORES),
        *(f"heatmap/{metric}/{kind}" for metric in heatmap_metrics for kind in feedback.HEATMAPS),
        *(f"keywords/{metric}" for metric in ("precision", "recall", "f1")),
        *(f"synthetic/detection_auc/{kind}" for kind in feedback.HEATMAPS),
        *(f"synthetic/wrong_object/{value}" for value in ("accuracy", "chance", "num_images")),
    }
    assert np.isfinite(list(metrics.values())).all()
    assert metrics["num_examples"] == 8
    assert set(json.loads((evaluated / "baselines.json").read_text())) == {
        "trivial (training mean)",
        "training-free (object mask, detail)",
    }


def test_predictions_stand_in_the_order_of_the_split(evaluated, synthetic_data_dir):
    records = [json.loads(line) for line in (evaluated / "predictions.jsonl").read_text().splitlines()]
    builder = tfds.builder("synthetic_rich_hf", data_dir=synthetic_data_dir)
    data = list(tfds.as_numpy(builder.as_dataset(split="test")))
    assert [record["id"] for record in records] == [
        example[feedback.FILENAME_FIELD].decode() for example in data
    ]
    for record, example in zip(records, data, strict=True):
        assert record["prompt"] == example[feedback.PROMPT_FIELD].decode()
        assert set(record["scores"]) == set(feedback.SCORES)
        assert [t["text"] for t in record["tokens"]] == feedback.tokenize_prompt(record["prompt"])


def test_the_predictor_says_of_the_images_what_evaluation_said(evaluated, launch, synthetic_data_dir):
    records = [json.loads(line) for line in (evaluated / "predictions.jsonl").read_text().splitlines()]
    builder = tfds.builder("synthetic_rich_hf", data_dir=synthetic_data_dir)
    raw = {feedback.IMAGE_FIELD: tfds.decode.SkipDecoding()}
    data = tfds.as_numpy(builder.as_dataset(split="test", decoders=raw))
    images, prompts = zip(
        *((e[feedback.IMAGE_FIELD], e[feedback.PROMPT_FIELD].decode()) for e in data), strict=True
    )
    predictor = RahfPredictor.from_checkpoint(launch.folder / "parts")
    assert predictor.description.training["task"] == TASK
    for found, expected in zip(predictor(images, prompts), records, strict=True):
        # The evaluation's program was compiled with fewer optimizations.
        assert found.scores == pytest.approx(expected["scores"], abs=1e-5)
        for token, other in zip(found.to_dict()["tokens"], expected["tokens"], strict=True):
            assert token["text"] == other["text"]
            assert token["probability"] == pytest.approx(other["probability"], abs=1e-5)


def test_the_report_needs_no_network(evaluated):
    page = html.unescape((evaluated / "report.html").read_text())
    assert page.count("<img") >= 8
    assert "pretraining" in page
    assert re.findall(r"""(?:src|href)=["']?(?!data:|#)[^"' >]+|url\((?!['"]?data:)|@import""", page) == []


def test_dry_run_prints_the_configuration_and_does_nothing(launch):
    flags = ("--gin.MODEL_DIR=dry", "--gin.TRAIN_STEPS=7", "--dry_run", "--nocompilation_cache")
    program = launch("train", "quickstart.gin", *flags)
    assert program.finish() == 0
    assert "MODEL_DIR = 'dry'\n" in program.output
    assert "TRAIN_STEPS = 7\n" in program.output
    assert not (launch.folder / "dry").exists()


def test_evaluating_what_is_not_there(launch, finetuned):
    messages = {
        ("--gin.MODEL_DIR=nowhere",): f"no checkpoint_<step> in {launch.folder}/nowhere: train first",
        (
            "--gin.MODEL_DIR=whole",
            "--gin.VARIANT=augmented_prompt",
            "--gin.MIXTURE_OR_TASK_NAME=synthetic_rich_hf_augmented_prompt",
        ): f"whole/checkpoint_{STEPS} doesn't fit this model: heatmap_head/",
    }
    programs = [launch("eval", "quickstart.gin", *flags) for flags in messages]
    for program, message in zip(programs, messages.values(), strict=True):
        assert program.finish() == 1
        assert message in program.output
        assert "Traceback" not in program.output


class Stream:
    """Replaces the training data; it has no arrays."""

    batch_shapes = {}

    def __init__(self, *args):
        pass

    def batches(self, position):
        return itertools.repeat({})

    def position(self, step):
        return {"step": step}


class Counting:
    """Replaces the trainer. The state counts steps; at step 3 the metric `broken` is not finite."""

    broken: tuple[str, ...] = ()

    def __init__(self, model, *args, **kwargs):
        self.model = model
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        self.abstract_state = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one), self.init_state()
        )

    def init_state(self):
        params = {"kernel": jnp.zeros((64, 64))}
        return train_state.TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=())

    def train_step(self, state, batch):
        state = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state))(state)
        values = {"loss": 1.0, "gradient_norm": 1.0}
        if int(state.step) == 3:
            values |= dict.fromkeys(self.broken, np.nan)
        ones = np.ones((), np.float32)
        return state, {name: losses.WeightedMean(value * ones, ones) for name, value in values.items()}

    def evaluate(self, state, batches):
        # Best after four steps.
        return {"loss": abs(float(state.params["kernel"][0, 0]) - 4)}


class Points(models.BaseModel):
    """points @ kernel, centred by batch statistics; its inputs have other names than RAHF's, and no text."""

    def get_initial_variables(self, rng, input_shapes, input_types=None):
        kernel = jax.random.normal(rng, (input_shapes["points"][1], 4))
        axes = {"kernel_axes": partitioning_axes.AxisMetadata(("embed", "mlp"))}
        statistics = {"mean": jnp.zeros(input_shapes["points"][1])}
        return {"params": {"kernel": kernel}, "params_axes": axes, "batch_stats": statistics}

    def loss_weights(self, batch):
        return {"loss": jnp.float32(batch["points"].shape[0])}

    def loss_fn(self, params, batch, dropout_rng, normalizers=None, *, flax_mutables):
        outputs = self.predict_batch(params, batch, flax_mutables=flax_mutables)["outputs"]
        total = jnp.sum(jnp.square(outputs - batch["answers"]))
        normalizers = normalizers or self.loss_weights(batch)
        mean = (flax_mutables["batch_stats"]["mean"] + batch["points"].mean(axis=0)) / 2
        loss = losses.WeightedMean(total, normalizers["loss"])
        return loss.compute(), ({"loss": loss}, {"batch_stats": {"mean": mean}})

    def predict_batch_with_aux(self, params, batch, rng=None, *, flax_mutables):
        mean = flax_mutables["batch_stats"]["mean"][None]
        return {"outputs": (batch["points"] - mean) @ params["kernel"]}, {}

    def score_batch(self, params, batch):
        raise AssertionError("training scores nothing")

    def describe(self, feature_lengths, batch_shapes, fit):
        return {"lengths": feature_lengths, "features": sorted(batch_shapes)}

    def summary_images(self, batch, predict):
        grey = np.clip(255 * predict()["outputs"], 0, 255).astype(np.uint8)  # [examples, 4]
        assert len(grey) == len(batch["points"]) == 8
        return {"outputs": np.repeat(grey[:, None, :, None], 3, axis=-1)}


# `Counting` asks nothing of its model; the loop asks what a model says of itself.
COUNTED = Points(optimizer_def=optimizers.adamw(lambda step: 0.01))
COUNTED.describe = models.BaseModel.describe.__get__(COUNTED)
COUNTED.summary_images = models.BaseModel.summary_images.__get__(COUNTED)


@pytest.fixture
def small_train(tmp_path, monkeypatch):
    """Trains a `Counting`, or another given trainer, in this process."""
    monkeypatch.setattr(Counting, "broken", ())
    monkeypatch.setattr(input_pipeline, "TrainStream", Stream)
    monkeypatch.setattr(input_pipeline, "check_vocabulary", lambda *_: None)
    monkeypatch.setattr(input_pipeline, "vocabulary_model", lambda cfg: None)
    monkeypatch.setattr(
        input_pipeline, "example_names", lambda cfg, batch: [f"task: {batch}_{n}.png" for n in range(20)]
    )
    cfg = types.SimpleNamespace(
        batch_size=20, mixture_or_task_name="task", task_feature_lengths={"points": 3}
    )

    def run(
        total_steps=5,
        save=None,
        restore=None,
        eval_cfg=None,
        model=COUNTED,
        trainer_cls=Counting,
        model_dir=None,
        **kwargs,
    ):
        train.train(
            model=model,
            model_dir=str(tmp_path) if model_dir is None else model_dir,
            train_dataset_cfg=cfg,
            train_eval_dataset_cfg=eval_cfg,
            partitioner=partitioning.PjitPartitioner(),
            checkpoint_cfg=checkpoints.CheckpointConfig(save, restore),
            total_steps=total_steps,
            trainer_cls=trainer_cls,
            **kwargs,
        )

    run.cfg = cfg
    return run


def checkpoint_names(folder):
    return sorted(path.name for path in folder.glob("checkpoint_*"))


@pytest.mark.parametrize("log_period", [1, 50])
@pytest.mark.parametrize("broken", [("loss",), ("gradient_norm", "loss")])
def test_a_state_that_is_not_finite_is_never_saved(tmp_path, monkeypatch, small_train, broken, log_period):
    monkeypatch.setattr(Counting, "broken", broken)
    period = 2 if log_period > 1 else 1
    message = (
        rf"^{' and '.join(broken)} not finite at step 3. Its 20 examples, all in"
        rf" {tmp_path}/examples_of_step_3.txt: task: 2_0.png, .* task: 2_15.png ...\n"
        rf"Last good checkpoint: {tmp_path}/checkpoint_2. Lower the learning rate"
    )
    with pytest.raises(errors.UserError, match=message):
        small_train(save=checkpoints.SaveCheckpointConfig(period, keep=9), log_period=log_period)
    assert checkpoint_names(tmp_path)[-1] == "checkpoint_2"
    examples = (tmp_path / "examples_of_step_3.txt").read_text().splitlines()
    assert examples == [f"task: 2_{n}.png" for n in range(20)]


def test_the_best_checkpoints_are_those_of_the_validation_data(tmp_path, small_train, monkeypatch):
    save = checkpoints.SaveCheckpointConfig(period=1, keep=1, keep_best=1)
    kwargs = {"total_steps": 8, "save": save, "eval_cfg": small_train.cfg}
    with pytest.raises(
        errors.UserError, match="CHECKPOINT_PERIOD, 1 steps, .*multiple of EVAL_PERIOD, 2 steps"
    ):
        small_train(**kwargs, eval_period=2)
    small_train(**kwargs, eval_period=1)
    assert checkpoint_names(tmp_path) == ["checkpoint_4", "checkpoint_8"]
    with pytest.raises(errors.UserError, match="keep_best needs validation data"):
        small_train(**kwargs | {"eval_cfg": None})


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(tmp_path, small_train, caplog):
    save = checkpoints.SaveCheckpointConfig(period=2)
    small_train(total_steps=4, save=save)
    shutil.rmtree(tmp_path / "checkpoint_4/state/d")
    logging.set_verbosity(logging.INFO)
    with caplog.at_level("INFO", logger="absl"):
        small_train(total_steps=6, save=save)
    lines = [record.getMessage() for record in caplog.records]
    (skipped,) = [line for line in lines if line.startswith(f"skipping {tmp_path}/checkpoint_4: ")]
    assert "continuing from step 2" in lines[lines.index(skipped) :]
    assert checkpoint_names(tmp_path) == ["checkpoint_4", "checkpoint_6"]
    assert (tmp_path / "damaged_checkpoint_4").is_dir()


@pytest.mark.parametrize("macro", ["LOG_PERIOD", "EVAL_PERIOD"])
def test_a_period_is_a_number_of_steps(small_train, macro):
    with pytest.raises(errors.UserError, match=f"{macro} must be at least 1 step, got 0"):
        small_train(**{macro.lower(): 0})


def test_a_model_dir_without_a_name(small_train):
    with pytest.raises(errors.UserError, match="MODEL_DIR is empty: name a directory"):
        small_train(model_dir="")


@pytest.mark.parametrize("file", ["config.gin", "train"])
def test_what_can_not_be_written_is_named(tmp_path, small_train, monkeypatch, file):
    # As root nothing is read-only.
    def refuse(*args):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / file))

    monkeypatch.setattr(gin_utils, "write_operative_config", refuse)
    with pytest.raises(
        errors.UserError, match=f"{tmp_path}/{file}: Permission denied. Complete checkpoints stay; make room"
    ):
        small_train()


class PointsStream(Stream):
    """Yields batches of 20 points, no two of which are equal."""

    batch_shapes = {
        "points": jax.ShapeDtypeStruct((20, 3), np.float32),
        "answers": jax.ShapeDtypeStruct((20, 4), np.float32),
    }

    def batches(self, position):
        for step in itertools.count(position.get("step", 0)):
            rng = np.random.default_rng(step)
            points = rng.normal(1, 1, (20, 3)).astype(np.float32)
            yield {"points": points, "answers": points @ np.eye(3, 4, dtype=np.float32)}


@pytest.fixture
def train_points(small_train, monkeypatch):
    """Trains `Points` with the real trainer."""
    monkeypatch.setattr(input_pipeline, "TrainStream", PointsStream)

    def run(**kwargs):
        model = Points(optimizers.adamw(lambda step: 0.01))
        small_train(**{"model": model, "trainer_cls": trainer_lib.Trainer, "eval_steps": 2} | kwargs)

    run.cfg = small_train.cfg
    return run


def test_another_vocabulary(tmp_path, train_points, monkeypatch, caplog):
    save = checkpoints.SaveCheckpointConfig(period=2)
    monkeypatch.setattr(input_pipeline, "vocabulary_model", lambda cfg: b"first")
    train_points(total_steps=2, save=save)
    monkeypatch.setattr(input_pipeline, "vocabulary_model", lambda cfg: b"other")
    with pytest.raises(
        errors.UserError, match=f"isn't {tmp_path}/vocabulary.model.*or begin anew in another"
    ):
        train_points(total_steps=4, save=save)
    assert (tmp_path / "vocabulary.model").read_bytes() == b"first"
    restore = checkpoints.RestoreCheckpointConfig(str(tmp_path))
    caplog.clear()
    train_points(total_steps=2, restore=restore, model_dir=str(tmp_path / "tuned"))
    assert f"the data's vocabulary isn't {tmp_path}/vocabulary.model" in caplog.text
    assert (tmp_path / "tuned/vocabulary.model").read_bytes() == b"other"


def test_a_model_of_other_inputs_trains_evaluates_and_continues(tmp_path, train_points):
    save = checkpoints.SaveCheckpointConfig(period=30, keep=None)
    for total_steps in (30, 60):
        train_points(total_steps=total_steps, save=save, eval_cfg=train_points.cfg, eval_period=30)
    assert checkpoint_names(tmp_path) == ["checkpoint_30", "checkpoint_60"]
    description = json.loads((tmp_path / "model.json").read_text())
    assert description.pop("checksums").keys() == {"model.json"}
    assert description == {
        "lengths": {"points": 3},
        "features": ["answers", "points"],
        "training": {"task": "task", "batch_size": 20, "random_seed": 0, "initial_checkpoint": None},
    }
    events = event_accumulator.EventAccumulator(str(tmp_path / "training_eval/task"), {"tensors": 0}).Reload()
    losses_by_step = {e.step: float(tf.make_ndarray(e.tensor_proto)) for e in events.Tensors("loss")}
    assert 0 < losses_by_step[60] < losses_by_step[30]
    assert [event.step for event in events.Tensors("outputs")] == [30, 60]
    # One run of 60 steps ends with the same state, bit by bit: batch statistics go on, too.
    shutil.rmtree(tmp_path / "checkpoint_30")
    shutil.move(tmp_path / "checkpoint_60", tmp_path / "in_two_parts/checkpoint_60")
    train_points(total_steps=60, save=save)
    whole, parts = (saved_arrays(tmp_path / name) for name in ("checkpoint_60", "in_two_parts/checkpoint_60"))
    assert "flax_mutables/batch_stats/mean" in whole
    assert whole.keys() == parts.keys()
    for name, array in whole.items():
        np.testing.assert_array_equal(array, parts[name], err_msg=str(name))


def test_an_average_of_the_parameters_is_measured_kept_and_continued(tmp_path, train_points, caplog):
    save = checkpoints.SaveCheckpointConfig(period=10, keep=1, keep_best=1)
    averaging = functools.partial(trainer_lib.Trainer, ema_decay=0.99)
    kwargs = {"save": save, "eval_cfg": train_points.cfg, "eval_period": 10}

    def run(name, total_steps, **others):
        train_points(model_dir=str(tmp_path / name), total_steps=total_steps, **kwargs | others)

    for total_steps in (10, 30):
        run("in_two_parts", total_steps, trainer_cls=averaging)
    run("whole", 30, trainer_cls=averaging)
    run("plain", 30)
    whole, parts, plain = (
        saved_arrays(tmp_path / f"{name}/checkpoint_30") for name in ("whole", "in_two_parts", "plain")
    )
    assert whole.keys() == parts.keys() == plain.keys() | {"ema_params/kernel"}
    for name, array in whole.items():
        np.testing.assert_array_equal(array, parts[name], err_msg=name)
    for name, array in plain.items():
        np.testing.assert_array_equal(array, whole[name], err_msg=name)

    # The metrics, by which the best are kept, are those of the average.
    model = Points(optax.sgd(0))
    losses_of = {}
    for name in ("params/kernel", "ema_params/kernel"):
        trainer = trainer_lib.Trainer(model, partitioning.PjitPartitioner(), PointsStream.batch_shapes)
        state = trainer.init_state(
            {("kernel",): whole[name]}, {("batch_stats", "mean"): whole["flax_mutables/batch_stats/mean"]}
        )
        losses_of[name] = trainer.evaluate(state, itertools.islice(PointsStream().batches({}), 2))["loss"]
    metrics = json.loads((tmp_path / "whole/checkpoint_30/metrics/metrics").read_text())
    assert metrics["loss"] == losses_of["ema_params/kernel"] != losses_of["params/kernel"]

    # The next training begins at the average, and so does its own.
    first = checkpoints.RestoreCheckpointConfig(str(tmp_path / "whole"))
    model = Points(optax.sgd(0))
    run("next", 1, restore=first, trainer_cls=lambda _, *args, **kw: averaging(model, *args, **kw))
    following = saved_arrays(tmp_path / "next/checkpoint_1")
    for name in ("params/kernel", "ema_params/kernel"):
        np.testing.assert_allclose(following[name], whole["ema_params/kernel"], rtol=1e-6)


def test_a_run_that_continues_says_what_changed_and_keeps_what_it_began_from(tmp_path, train_points, caplog):
    save = checkpoints.SaveCheckpointConfig(period=1)

    def recorded():
        return json.loads((tmp_path / "model.json").read_text())["training"]

    train_points(total_steps=1, save=save)
    shutil.move(tmp_path / "checkpoint_1", tmp_path / "first/checkpoint_1")
    first = checkpoints.RestoreCheckpointConfig(str(tmp_path / "first"))
    train_points(total_steps=1, save=save, restore=first)
    caplog.clear()
    other = checkpoints.RestoreCheckpointConfig(str(tmp_path / "other"))
    train_points(total_steps=2, save=save, restore=other, random_seed=7)
    assert recorded()["initial_checkpoint"] == first.path
    assert recorded()["random_seed"] == 7
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert sorted(lines) == [
        f"initial_checkpoint was {first.path!r}, now it is {other.path!r}",
        "random_seed was 0, now it is 7",
        "the run continues from step 1 of its own, so initial_checkpoint isn't read",
    ]


def saved_arrays(checkpoint):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(array)
        for path, array in jax.tree_util.tree_leaves_with_path(
            ocp.StandardCheckpointHandler().restore(checkpoint / "state")
        )
    }


@pytest.fixture
def fetches(monkeypatch):
    """Counts, by kind, how often the main thread waits for an array or copies one to the host."""
    counts = collections.Counter()
    array_type = type(jnp.zeros(()))

    outermost = [True]

    def counted(name, original):
        def call(*args, **kwargs):
            if threading.current_thread() is not threading.main_thread() or not outermost[0]:
                return original(*args, **kwargs)
            counts[name] += 1
            outermost[0] = False  # Calls within it belong to the same fetch.
            try:
                return original(*args, **kwargs)
            finally:
                outermost[0] = True

        return call

    for name in ("__array__", "__float__", "__int__", "__bool__", "block_until_ready", "item", "tolist"):
        monkeypatch.setattr(array_type, name, counted(name, getattr(array_type, name)))
    for name in ("device_get", "block_until_ready"):
        monkeypatch.setattr(jax, name, counted(f"jax.{name}", getattr(jax, name)))
    monkeypatch.setattr(array_type, "_value", property(counted("_value", array_type._value.fget)))
    return counts


def test_nothing_in_the_loop_waits_for_the_device(train_points, fetches, monkeypatch):
    def run(steps, **kwargs):
        fetches.clear()
        train_points(total_steps=steps, **kwargs)
        return dict(fetches)

    # Beginning, end and one line of the log: as many fetches for many steps as for few.
    short, long = run(4, log_period=1000), run(40, log_period=1000)
    assert short == long
    # Only a line of the log fetches.
    assert run(40, log_period=10)["jax.device_get"] == 4 * short["jax.device_get"] > 0

    # The spy sees what waits.
    train_step = trainer_lib.Trainer.train_step

    def waiting(*args):
        state, metrics = train_step(*args)
        float(metrics["loss"].total)
        return state, metrics

    monkeypatch.setattr(trainer_lib.Trainer, "train_step", waiting)
    assert run(40, log_period=1000)["__float__"] == long.get("__float__", 0) + 40


class Huge(Points):
    """Fills a device's memory, and more, with its first parameters or with a step's numbers."""

    where = "state"

    def get_initial_variables(self, rng, input_shapes, input_types=None):
        variables = super().get_initial_variables(rng, input_shapes)
        if self.where == "state":
            variables["params"]["kernel"] = jnp.zeros((1 << 48, 4))
        return variables

    def loss_fn(self, params, batch, dropout_rng, normalizers=None, *, flax_mutables):
        numbers = jnp.cumsum(jnp.broadcast_to(batch["points"][0, 0], 1 << 50))
        batch = batch | {"answers": batch["answers"] + jax.lax.stop_gradient(numbers[-1])}
        return super().loss_fn(params, batch, dropout_rng, normalizers, flax_mutables=flax_mutables)


@pytest.mark.parametrize("where", ["state", "step"])
def test_memory_that_runs_out_names_the_macros(train_points, monkeypatch, where):
    monkeypatch.setattr(Huge, "where", where)
    monkeypatch.setitem(globals(), "Points", Huge)
    # XLA waits for ever if memory runs out for two devices of a CPU.
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    with pytest.raises(
        errors.UserError, match="memory is too small: RESOURCE.*smaller BATCH_SIZE, more NUM_"
    ):
        train_points(total_steps=2)


def test_a_batch_that_does_not_fit_is_told_before_the_first_step(train_points, monkeypatch):
    monkeypatch.setattr(device_memory, "stats", lambda device: {"bytes_limit": 10**6})
    train_points(total_steps=1)
    monkeypatch.setattr(device_memory, "stats", lambda device: {"bytes_limit": 100})
    monkeypatch.setattr(training_log.TrainingLog, "add", None)  # It would take the first step's metrics.
    with pytest.raises(errors.UserError, match=r"a batch takes .* cpu has .*REMAT_POLICY = 'full', or param"):
        train_points(total_steps=1)


def test_a_step_that_copies_to_the_device_by_itself_is_refused(train_points, monkeypatch):
    train_step = trainer_lib.Trainer.train_step

    def careless(self, state, batch):
        jnp.asarray(batch["points"]) + np.ones((20, 3), np.float32)
        return train_step(self, state, batch)

    monkeypatch.setattr(trainer_lib.Trainer, "train_step", careless)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        train_points(total_steps=2)


@pytest.fixture
def profile_steps():
    """Sets the flag."""
    with flagsaver.flagsaver():
        flags.FLAGS.mark_as_parsed()
        yield lambda value: setattr(flags.FLAGS, "profile_steps", value)
    flags.FLAGS.unparse_flags()


def test_a_profile(tmp_path, small_train, profile_steps):
    profile_steps("2:3")
    small_train(total_steps=4)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize("steps", ["2:5", "0:1", "3:2", "2", "a:b", "2:3:4", "-1:2"])
def test_a_profile_of_steps_that_there_are_not(small_train, profile_steps, steps):
    profile_steps(steps)
    with pytest.raises(
        errors.UserError, match=f"--profile_steps={steps}: give FIRST:LAST.*this run's 4 steps"
    ):
        small_train(total_steps=4)


def test_two_trainings_in_one_model_dir(tmp_path, small_train):
    with locking.held(tmp_path, "--gin.MODEL_DIR=DIR"):
        with pytest.raises(errors.UserError, match=rf"another process \(.*\) writes to {tmp_path}: wait"):
            small_train()
        assert os.listdir(tmp_path) == [locking.RECORD]
    small_train()


# After an error Orbax leaves futures of TensorStore behind, which complain of the closed event loop.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("moved", "period"), [(True, 1), (True, 1000), (False, 1000)])
def test_a_model_dir_that_disappears_ends_the_training(tmp_path, small_train, moved, period):
    folder = tmp_path / "run"

    class Vanishing(Counting):
        def train_step(self, state, batch):
            state, metrics = super().train_step(state, batch)
            if int(state.step) == 3:
                folder.rename(tmp_path / "moved") if moved else shutil.rmtree(folder)
            return state, metrics

    save = checkpoints.SaveCheckpointConfig(period)
    with pytest.raises(errors.UserError, match=f"{folder} was deleted, moved or emptied while this process"):
        small_train(model_dir=str(folder), trainer_cls=Vanishing, save=save)
    # Orbax may make folders for a checkpoint that it is writing, but nothing gets its final name.
    assert not [path for path in folder.glob("*") if ".orbax-checkpoint-tmp" not in path.name]


@pytest.mark.parametrize(
    ("made_anew", "told"), [("checkpoint_3.orbax-checkpoint-tmp", True), ("config.gin", False)]
)
def test_what_a_checkpoint_made_anew_is_told(tmp_path, made_anew, told):
    folder = tmp_path / "run"

    class Writing:
        def wait(self):
            (folder / made_anew).mkdir(parents=True)

    loop = train._TrainingLoop(*cast(Any, [None, Writing(), None, None, None, str(folder), None]))
    with locking.held(folder, "--gin.MODEL_DIR=DIR") as lock:
        folder.rename(tmp_path / "moved")
        with pytest.raises(errors.UserError, match="was deleted, moved or emptied") as refused:
            dataclasses.replace(loop, lock=lock)._check_lock()
    assert (
        f"There is a new {folder} with what was being written ({made_anew})" in str(refused.value)
    ) == told
