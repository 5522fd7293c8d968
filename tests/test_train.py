"""The quickstart's own gin files end to end: train, stop, kill, resume, evaluate, report; as users run them.

Only sizes and steps are smaller (see SMALL). The fixtures tell one story, which the tests look at.
"""

import dataclasses
import itertools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorflow_datasets as tfds

from richhf_jax import (
    checkpoints,
    errors,
    feedback,
    input_pipeline,
    losses,
    partitioning,
    train,
    train_state,
)

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
STEPS, PERIOD, PIPE_BYTES = 90, 10, 4096
# Three runs of the same program compile it once, to slower code. The folder is in the working directory.
QUICK_COMPILATION = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_COMPILATION_CACHE_DIR": "compiled",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}
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
            env=os.environ | QUICK_COMPILATION | {"PYTHONPATH": str(ROOT)},
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
        """The exit code."""
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
    """MODEL_DIR of the quickstart's first half."""
    program = launch("train", "quickstart_pretrain.gin", "--gin.MODEL_DIR=pretrain", *PRETRAINING)
    assert program.finish() == 0, program.output
    return launch.folder / "pretrain"


@pytest.fixture(scope="module")
def finetuned(launch, pretrained) -> dict[str, Program]:
    """The second half: "whole" in one go; in another MODEL_DIR "stopped", "killed" and "resumed"."""

    def start(model_dir: str, *flags: str) -> Program:
        where = (f"--gin.MODEL_DIR={model_dir}", f"--gin.INITIAL_CHECKPOINT_PATH={pretrained.name}")
        return launch("train", "quickstart.gin", *where, *FINETUNING, *flags)

    def start_part() -> Program:
        return start("parts", f"--gin.CHECKPOINT_PERIOD={PERIOD}")

    alone = (f"--gin.CHECKPOINT_PERIOD={STEPS}", "--gin.train.train_eval_dataset_cfg=None")
    programs = {"stopped": start_part()}
    programs["stopped"].read_until_step(5)
    programs["stopped"].send(signal.SIGTERM)
    assert programs["stopped"].finish() == 0, programs["stopped"].output
    programs |= {"killed": start_part(), "whole": start("whole", *alone)}
    # The second checkpoint is begun after the first is complete.
    programs["killed"].read_until_step(last_step(programs["stopped"]) + 2 * PERIOD + 1)
    programs["killed"].send(signal.SIGKILL)
    assert programs["killed"].finish() == -signal.SIGKILL
    assert programs["whole"].finish() == 0, programs["whole"].output
    programs["resumed"] = start_part()
    assert programs["resumed"].finish() == 0, programs["resumed"].output
    return programs


@pytest.fixture(scope="module")
def evaluated(launch, finetuned) -> pathlib.Path:
    """Where the evaluation of the resumed run writes."""
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
    assert continued_from(finetuned["killed"]) == stop


def test_a_killed_run_continues_from_its_last_complete_checkpoint(finetuned):
    step = continued_from(finetuned["resumed"])
    assert last_step(finetuned["stopped"]) < step <= last_step(finetuned["killed"]) < STEPS
    assert step % PERIOD == 0


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
    assert names == {"config.gin", "model-info.txt", f"checkpoint_{STEPS}", "train", "training_eval"}
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


def test_the_report_needs_no_network(evaluated):
    page = (evaluated / "report.html").read_text()
    assert page.count("<img") >= 8
    assert "pretraining" in page
    assert re.findall(r"""(?:src|href)=["']?(?!data:|#)[^"' >]+|url\((?!['"]?data:)|@import""", page) == []


def test_dry_run_prints_the_configuration_and_does_nothing(launch):
    program = launch("train", "quickstart.gin", "--gin.MODEL_DIR=dry", "--gin.TRAIN_STEPS=7", "--dry_run")
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


class BreakingLoop:
    """In place of the trainer: at step 3 one of the metrics is not finite."""

    broken: str

    def __init__(self, *args, **kwargs):
        self.abstract_state = None

    def init_state(self, given):
        params = {"kernel": jnp.zeros(2)}
        return train_state.TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=())

    def train_step(self, state, batch):
        state = dataclasses.replace(state, step=state.step + 1)
        values = {"loss": 1.0, "gradient_norm": 1.0}
        if state.step == 3:
            values[self.broken] = np.nan
        ones = np.ones((), np.float32)
        return state, {name: losses.WeightedMean(value * ones, ones) for name, value in values.items()}


class NoData:
    """In place of the training data."""

    batch_shapes = None

    def __init__(self, *args):
        pass

    def batches(self, position):
        return itertools.repeat({})

    def position(self, step):
        return {"step": step}


@pytest.mark.parametrize("broken", ["loss", "gradient_norm"])
def test_a_state_that_is_not_finite_is_never_saved(tmp_path, monkeypatch, broken):
    monkeypatch.setattr(BreakingLoop, "broken", broken, raising=False)
    monkeypatch.setattr(input_pipeline, "TrainStream", NoData)
    monkeypatch.setattr(input_pipeline, "check_vocabulary", lambda cfg, vocab_size: None)
    with pytest.raises(errors.UserError, match=f"{broken} not finite between step 2 and 3: lower the"):
        train.train(
            model=types.SimpleNamespace(vocab_size=0),
            model_dir=str(tmp_path),
            train_dataset_cfg=None,
            train_eval_dataset_cfg=None,
            partitioner=partitioning.PjitPartitioner(),
            checkpoint_cfg=checkpoints.CheckpointConfig(checkpoints.SaveCheckpointConfig(period=1, keep=9)),
            total_steps=5,
            trainer_cls=BreakingLoop,
        )
    assert sorted(path.name for path in tmp_path.glob("checkpoint_*")) == ["checkpoint_1", "checkpoint_2"]
