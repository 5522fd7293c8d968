"""Inference with a model that answers from the labels, and once by the shipped gin files on two processes."""

import dataclasses
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import types
from typing import Any, cast

import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seqio
from etils import epath
from PIL import Image

import tasks  # noqa: F401 (registers them)
from richhf_jax import (
    checkpoints,
    errors,
    feedback,
    gin_utils,
    infer,
    input_pipeline,
    partitioning,
    split_predictions,
)

TASK = "synthetic_rich_hf_multi_head"
# The split's 8 examples don't fill the third batch.
CONFIG = input_pipeline.DatasetConfig(
    TASK,
    {"image": 16, "inputs": 64, "targets": 32, "heatmaps": 2, "scores": 4, "texts": 1},
    "test",
    batch_size=3,
    shuffle=False,
)


class Answers:
    """A trainer whose model writes the targets and marks every word; the call number `broken` fails.

    `changed(call, outputs)` changes the outputs of a call.
    """

    model = types.SimpleNamespace(outputs=feedback.ALL_OUTPUTS, vocab_size=448)

    def __init__(self, broken: int | None = None, changed=lambda call, outputs: outputs):
        self.calls = 0
        self.broken = broken
        self.changed = changed

    def predict(self, params, batch):
        self.calls += 1
        if self.calls == self.broken:
            raise KeyboardInterrupt
        decided = np.arange(1, 33) <= batch["keyword_words"].max(-1, keepdims=True)
        outputs = {
            "heatmaps": batch["heatmap_targets"] / 255,
            "scores": batch["score_targets"].copy(),
            "keyword_probability": np.where(decided, 0.75, np.nan),
            "keyword_misaligned": decided,
        }
        return self.changed(self.calls, outputs)


class Described:
    """A model with a description."""

    has_uncertainty, vocab_size = False, 448

    def __init__(self, name: str):
        self.describe = lambda lengths, shapes, fit: {"name": name}


@pytest.fixture(scope="module")
def read(synthetic_data_dir):
    """Replaces `evaluation_batches` by a function that reads the same data only once."""
    seqio.set_tfds_data_dir_override(str(synthetic_data_dir))
    real, known = input_pipeline.evaluation_batches, {}

    def evaluation_batches(cfg, shard_info, start_step=0):
        key = (str(cfg), shard_info.index, shard_info.num_shards)
        if key not in known:
            known[key] = list(real(cfg, shard_info))
        return iter(known[key][start_step:])

    return evaluation_batches


@pytest.fixture
def run(tmp_path, monkeypatch, read):
    """Runs inference into a folder and gives its model."""
    monkeypatch.setattr(input_pipeline, "evaluation_batches", read)
    monkeypatch.setattr(input_pipeline, "data_shapes", lambda cfg: {})  # It takes half a second.
    (tmp_path / "model/checkpoint_7/state").mkdir(parents=True)

    def start(folder="out", broken=None, cfg=CONFIG, model="mine", changed=lambda _, out: out, **kwargs):
        trainer = Answers(broken, changed)
        monkeypatch.setattr(split_predictions, "load", lambda *args: (trainer, {}, 7))
        infer.infer(
            model=cast(Any, Described(model)),
            checkpoint_path=str(tmp_path / "model"),
            output_dir=folder and str(tmp_path / folder),
            dataset_cfg=cfg,
            partitioner=partitioning.PjitPartitioner(devices=jax.devices()[:1]),
            **kwargs,
        )
        return trainer

    return start


def changed(**values) -> input_pipeline.DatasetConfig:
    return dataclasses.replace(CONFIG, **values)


def files(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def records(*paths: pathlib.Path) -> list[dict]:
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


@pytest.fixture
def examples(read) -> list[dict]:
    """Returns the split's examples, in its order."""
    return [example for rows, _ in read(CONFIG, seqio.ShardInfo(0, 1)) for example in rows]


def test_every_example_in_the_order_of_the_split(run, tmp_path, examples):
    run(folder=None)
    folder = tmp_path / "model/inference/test/7"
    assert files(folder).keys() == {f"{TASK}-predict.jsonl-00000-of-00001", f"{TASK}-predict.run.json"}
    lines = records(folder / f"{TASK}-predict.jsonl-00000-of-00001")
    assert len(lines) == len(examples) == 8
    for line, example in zip(lines, examples, strict=True):
        strings = (feedback.FILENAME_FIELD, feedback.PROMPT_FIELD, feedback.KEYWORDS_FIELD)
        assert line["inputs"] == {name: example[name].decode() for name in strings}
        prediction = line["prediction"]
        assert prediction.keys() == {"id", "prompt", "scores", "tokens"}
        assert prediction["id"] == line["inputs"][feedback.FILENAME_FIELD]
        assert prediction["prompt"] == line["inputs"][feedback.PROMPT_FIELD]
        assert list(prediction["scores"].values()) == example["scores"].tolist()
        words = feedback.tokenize_prompt(prediction["prompt"])
        assert [token["text"] for token in prediction["tokens"]] == words
        assert {token["probability"] for token in prediction["tokens"]} == {0.75}


def test_heatmaps_are_pictures_beside_the_results(run, tmp_path, examples):
    run(write_heatmaps=True)
    lines = records(tmp_path / f"out/{TASK}-predict.jsonl-00000-of-00001")
    for line, example in zip(lines, examples, strict=True):
        paths = line["prediction"]["heatmaps"]
        for kind, heatmap in zip(feedback.HEATMAPS, example["heatmaps"], strict=True):
            with Image.open(tmp_path / "out" / paths[kind]) as picture:
                assert picture.mode == "L"
                np.testing.assert_array_equal(np.asarray(picture), heatmap)


def test_words_that_the_model_has_no_room_for(run, tmp_path, read):
    cfg = changed(task_feature_lengths=CONFIG.task_feature_lengths | {"inputs": 8})
    run(cfg=cfg)
    lines = records(tmp_path / f"out/{TASK}-predict.jsonl-00000-of-00001")
    cut = [e["inputs_words_cut"] for rows, _ in read(cfg, seqio.ShardInfo(0, 1)) for e in rows]
    assert [line["prediction"].get("prompt_words_cut", 0) for line in lines] == cut
    assert min(cut) == 0 < max(cut)


# A batch is finished when the next one is on the device: of those before the broken one, all but one.
@pytest.mark.parametrize(
    ("period", "broken", "rest"), [(1, 1, 8), (1, 4, 6), (3, 6, 5), (3, 8, 2), (9, 8, 8)]
)
def test_a_run_that_was_interrupted_ends_as_one_in_one_go(run, tmp_path, period, broken, rest):
    kwargs = {"cfg": changed(batch_size=1), "checkpoint_period": period, "write_heatmaps": True}
    run("whole", **kwargs)
    with pytest.raises(KeyboardInterrupt):
        run("parts", broken, **kwargs)
    assert not list((tmp_path / "parts").glob("*.jsonl-*"))
    assert run("parts", **kwargs).calls == rest
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    assert not list((tmp_path / "parts").glob("tmp-*"))


def test_what_is_finished_is_left_alone(run, tmp_path, caplog):
    run()
    before = files(tmp_path / "out")
    with caplog.at_level("INFO", logger="absl"):
        assert run().calls == 0
    assert "finished before" in caplog.text
    assert files(tmp_path / "out") == before


def test_several_jobs_share_a_split(run, tmp_path):
    run("whole")
    for shard_id in (1, 0):
        run(shard_id=shard_id, num_shards=2)
    parts = [tmp_path / f"out/{TASK}-predict.jsonl-{i:05}-of-00002" for i in range(2)]
    whole = (tmp_path / f"whole/{TASK}-predict.jsonl-00000-of-00001").read_text().splitlines()
    # In turn a batch each.
    assert parts[0].read_text().splitlines() == whole[0:3] + whole[6:8]
    assert parts[1].read_text().splitlines() == whole[3:6]


@pytest.mark.parametrize(
    ("process", "every", "result"),
    [
        # (part, finished, chunks) of each process
        (0, [(0, 0, 3)], (True, 3)),
        (1, [(0, 0, 3), (1, 0, 2)], (True, 2)),
        # The chunks are gone when the file is finished.
        (1, [(0, 1, 0), (1, 0, 2)], (True, 2)),
        (0, [(0, 1, 0), (1, 1, 0)], (False, None)),
        # Two processes share a model and a part, of which the first writes.
        (2, [(0, 0, 3), (0, 0, 0), (1, 0, 4), (1, 0, 0)], (True, 3)),
        (3, [(0, 0, 3), (0, 0, 0), (1, 0, 4), (1, 0, 0)], (False, 3)),
    ],
)
def test_processes_continue_from_the_same_batch(monkeypatch, tmp_path, process, every, result):
    monkeypatch.setattr(jax, "process_index", lambda: process)
    monkeypatch.setattr(infer.multihost_utils, "process_allgather", lambda own: np.array(every))
    part, finished, _ = every[process]
    output = infer._Output(epath.Path(tmp_path), "task-predict", part, 2, {})
    if finished:
        output.path.write_text("")
    assert infer._agree(output, part) == result


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cfg": changed(batch_size=4)}, "batch_size was 3, now it is 4. Give another INFER_OUTPUT_DIR"),
        ({"cfg": changed(split="validation")}, "split was 'test', now it is 'validation'"),
        ({"num_shards": 2}, "files was 1, now it is 2"),
        ({"model": "other"}, "model_checksum was '.*', now it is '"),
        ({"write_heatmaps": True}, "write_heatmaps was False, now it is True"),
        ({"cfg": changed(mixture_or_task_name="nope")}, "there is no task 'nope'"),
        (
            {"cfg": changed(mixture_or_task_name="synthetic_pretrain")},
            "synthetic_pretrain is a mixture: predict its tasks one by one: synthetic_captions",
        ),
        (
            {"folder": "new", "cfg": changed(split="nope")},
            "has no split 'nope', only train, validation, test",
        ),
        ({"mode": "score"}, "infer.mode must be 'predict', got 'score'"),
        ({"checkpoint_period": 0}, "infer.checkpoint_period must be at least 1"),
        ({"shard_id": 2, "num_shards": 2}, "num_shards=2: they count from 0"),
    ],
)
def test_mistakes_change_nothing(run, tmp_path, changes, message):
    run()
    before = files(tmp_path)
    with pytest.raises(errors.UserError, match=message):
        run(**changes)
    assert files(tmp_path) == before


@pytest.mark.parametrize("name", ["checkpoint", "vocabulary", "data"])
def test_other_sources_of_the_same_names_are_another_run(run, tmp_path, monkeypatch, name):
    run()
    before = files(tmp_path / "out")
    if name == "checkpoint":
        (tmp_path / "model/checkpoint_7/checksums.json").write_text('{"files": {}}')
    elif name == "vocabulary":
        monkeypatch.setattr(input_pipeline, "vocabulary_model", lambda cfg: b"other")
    else:
        identity = input_pipeline.data_identity(CONFIG)
        monkeypatch.setattr(input_pipeline, "data_identity", lambda cfg: identity | {"data": "data/9.9.9"})
    with pytest.raises(errors.UserError, match=rf"other arguments: {name}\w* was '.*', now it is '"):
        run()
    assert files(tmp_path / "out") == before


def test_the_parts_of_a_run_json_that_was_cut_off(run, tmp_path):
    run()
    os.truncate(tmp_path / f"out/{TASK}-predict.run.json", 40)
    with pytest.raises(errors.UserError, match="run.json is truncated, or no JSON: .*Give another INFER"):
        run()


@pytest.mark.parametrize("vanishes", ["out", "tmp-"])
def test_a_folder_that_disappears_ends_the_run(run, tmp_path, vanishes):
    def vanish(call, outputs):
        if call == 6:
            (gone,) = [
                path for path in (tmp_path / "out", *(tmp_path / "out").iterdir()) if vanishes in path.name
            ]
            shutil.rmtree(gone)
        return outputs

    kwargs = {"cfg": changed(batch_size=1), "checkpoint_period": 2}
    with pytest.raises(errors.UserError, match="tmp-.* was deleted, moved or emptied while this process"):
        run(changed=vanish, **kwargs)
    assert not list(tmp_path.glob("out/*.jsonl-*"))
    assert run(**kwargs).calls == 8


@pytest.mark.parametrize("damage", ["cut", "digit", "empty", "zeros"])
def test_a_damaged_chunk_is_predicted_again(run, tmp_path, caplog, damage):
    kwargs = {"cfg": changed(batch_size=1), "checkpoint_period": 2}
    run("whole", **kwargs)
    with pytest.raises(KeyboardInterrupt):
        run(broken=8, **kwargs)
    (chunk,) = (tmp_path / "out").rglob("*-chunk00001")
    content = chunk.read_bytes()
    harmed = {
        "cut": content[: content.index(b"\n") + 1],
        "digit": content.replace(b"0.75", b"0.85", 1),
        "empty": b"",
        "zeros": bytes(len(content)),
    }
    chunk.write_bytes(harmed[damage])
    assert run(**kwargs).calls == 6
    assert "chunk00001 is damaged: its batches are predicted again" in caplog.text
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_chunk_that_is_lost_while_the_run_goes_on(run, tmp_path):
    def lose(call, outputs):
        if call == 6:
            next((tmp_path / "out").rglob("*-chunk00000")).unlink()
        return outputs

    kwargs = {"cfg": changed(batch_size=1), "checkpoint_period": 2}
    with pytest.raises(errors.UserError, match="has the results of 6 of 8 examples: files in it were"):
        run(changed=lose, **kwargs)
    assert not list((tmp_path / "out").glob("*.jsonl-*"))
    assert run(**kwargs).calls == 8


@pytest.mark.parametrize("kind", ["scores", "heatmaps", "keyword_probability"])
def test_a_record_without_a_prediction_fails_alone(run, tmp_path, examples, kind):
    def damage(call, outputs):
        if call == 1:
            outputs[kind][1] = np.nan
        return outputs

    run("whole")
    name = examples[1][feedback.FILENAME_FIELD].decode()
    for _ in range(2):  # Also when all was done before.
        with pytest.raises(
            errors.UserError, match=f"^1 records have no prediction, see .*; the first is {name}: "
        ):
            run(changed=damage, write_heatmaps=True)
    lines, whole = (
        records(tmp_path / f"{out}/{TASK}-predict.jsonl-00000-of-00001") for out in ("out", "whole")
    )
    assert [line["inputs"] for line in lines] == [line["inputs"] for line in whole[:1] + whole[2:]]
    (failure,) = records(tmp_path / f"out/{TASK}-predict.errors.jsonl-00000-of-00001")
    assert failure["id"] == name
    assert "aren't finite numbers" in failure["reason"]
    assert len(list((tmp_path / "out").rglob("*.png"))) == 14


def test_memory_that_runs_out_names_the_macro(run):
    with pytest.raises(
        errors.UserError, match="too small: RESOURCE_EXHAUSTED.*A smaller EVAL_BATCH_SIZE, or"
    ):
        run(changed=lambda *_: jnp.zeros(1 << 50, jnp.int8))


def test_a_model_that_predicts_nothing_is_blamed(run):
    def damage(call, outputs):
        return outputs | {"scores": np.full_like(outputs["scores"], np.nan)}

    with pytest.raises(errors.UserError, match="checkpoint_7 predicts no record: its outputs aren't finite"):
        run(changed=damage)


def test_no_checkpoint(run, tmp_path):
    shutil.rmtree(tmp_path / "model/checkpoint_7")
    with pytest.raises(errors.UserError, match="no checkpoint_<step> in .*/model: train first"):
        run()


def test_a_folder_that_can_not_be_written(run, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(
        errors.UserError, match="out/.*: Not a directory. Make the folder, make room or give the right"
    ):
        run()


def test_a_folder_that_disappears(tmp_path):
    output = infer._Output(epath.Path(tmp_path / "out"), "task-predict", 0, 1, {})
    gone = pytest.raises(errors.UserError, match="was deleted, moved or emptied while this process")
    with output.locked():
        output.write_chunk(0, ["a\n"])
        (tmp_path / "out").rename(tmp_path / "moved")
        with gone:
            output.write_chunk(1, ["b\n"])
        with gone:
            output.finish(1, [], 1)
    assert not (tmp_path / "out").exists()


FILES = ("experiments/quickstart.gin", "runs/infer.gin")
# Compiles faster.
SMALL = {
    "T5Config.num_encoder_layers": 1,
    "T5Config.num_decoder_layers": 1,
    "ViTConfig.num_layers": 1,
    "HeadsConfig.score_conv_layers": ((8, 2), (8, 2)),
}


@pytest.fixture
def bindings(tmp_path) -> dict:
    return SMALL | {"MODEL_DIR": str(tmp_path), "INFER_BATCH_SIZE": 2, "infer.checkpoint_period": 1}


@pytest.fixture
def one_process(tmp_path, random_values, bindings, synthetic_data_dir) -> list[dict]:
    """Predicts in a single process, with random parameters in MODEL_DIR."""
    seqio.set_tfds_data_dir_override(str(synthetic_data_dir))
    given = [f"{name} = {value!r}" for name, value in bindings.items()]
    own_devices = "PjitPartitioner.num_cpu_devices = None"
    gin_utils.parse_gin_flags(gin_utils.DEFAULT_SEARCH_PATHS, FILES, [*given, own_devices])
    model = gin_utils.macro("MODEL")
    cfg = changed(task_feature_lengths=gin_utils.macro("TASK_FEATURE_LENGTHS"))
    shapes = {name: array.shape for name, array in input_pipeline.data_shapes(cfg).items()}
    variables = jax.eval_shape(lambda: model.get_initial_variables(jax.random.key(0), shapes))
    checkpoints.save_params(str(tmp_path), jax.tree.map(jnp.asarray, random_values(variables["params"])))
    gin.get_configurable(infer.infer)()
    return records(tmp_path / f"inference/test/0/{TASK}-predict.jsonl-00000-of-00001")


def run_two_processes(flags: list[str]) -> str:
    """Starts the program in two processes as users do; returns the output of both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
    command = [sys.executable, "-m", "richhf_jax.infer", *flags, f"--coordinator_address={address}"]
    processes = [
        subprocess.Popen(
            [*command, "--process_count=2", f"--process_index={index}"],
            cwd=pathlib.Path(infer.__file__).resolve().parents[1],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    return "".join(outputs)


def assert_close(line: dict, expected: dict) -> None:
    assert line["inputs"] == expected["inputs"]
    got, wanted = line["prediction"], expected["prediction"]
    np.testing.assert_allclose([*got["scores"].values()], [*wanted["scores"].values()], atol=1e-6)
    assert [token["text"] for token in got["tokens"]] == [token["text"] for token in wanted["tokens"]]
    probabilities = ([token["probability"] for token in answer["tokens"]] for answer in (got, wanted))
    np.testing.assert_allclose(*probabilities, atol=1e-5)


def test_two_processes_continue_and_find_what_one_finds(tmp_path, bindings, one_process, synthetic_data_dir):
    output = tmp_path / "two"
    paths = [output / f"{TASK}-predict.jsonl-{i:05}-of-00002" for i in range(2)]
    # They were killed at different points, with 2 batches and with 1.
    for path, chunks in zip(paths, (2, 1), strict=True):
        temporary = output / f"tmp-{path.name.replace('.jsonl', '')}"
        temporary.mkdir(parents=True)
        for number in range(chunks):
            content = f'"chunk {number}"\n'.encode()
            (temporary / f"{path.name}-chunk{number:05}").write_bytes(content + infer._checksum(content))
    given = bindings | {"INFER_OUTPUT_DIR": str(output), "PjitPartitioner.num_cpu_devices": 1}
    log = run_two_processes(
        [
            *(f"--gin_file={name}" for name in FILES),
            *(f"--gin.{name}={value!r}" for name, value in given.items()),
            f"--tfds_data_dir={synthetic_data_dir}",
        ]
    )
    assert log.count("continuing from batch 1") == 2
    assert files(output).keys() == {path.name for path in paths} | {f"{TASK}-predict.run.json"}
    for index, path in enumerate(paths):
        kept, *lines = records(path)
        assert kept == "chunk 0"
        # Of each batch of 2 examples, each process has one.
        for line, expected in zip(lines, one_process[2 + index :: 2], strict=True):
            assert_close(line, expected)


def test_pictures_that_become_square_in_another_way_are_another_models(monkeypatch):
    for name in ("vocabulary_model", "data_shapes"):
        monkeypatch.setattr(input_pipeline, name, lambda cfg: None)
    monkeypatch.setattr(input_pipeline, "data_identity", lambda cfg: {})
    monkeypatch.setattr(infer.sealing, "of_checkpoint", lambda path: "")
    model = types.SimpleNamespace(describe=lambda lengths, shapes, fit: {"fit": fit})
    cfg = types.SimpleNamespace(task_feature_lengths={})
    found = set()
    for fit in ("resize", "letterbox", "centre_crop"):
        gin.bind_parameter("richhf_jax.augmentation.show.fit", fit)
        found.add(infer._sources(model, "checkpoint_1", cfg)["model_checksum"])
    assert len(found) == 3
