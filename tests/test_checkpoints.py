"""Checkpoints of a training state of two parameters."""

import contextlib
import dataclasses
import gc
import itertools
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl import logging
from jax.sharding import PartitionSpec

from richhf_jax import checkpoints, checksums, errors, optimizers, partitioning, train_state

# If one array can't be read or written, Orbax leaves unfinished work on the others behind.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

AXES = {"dense": {"kernel": PartitionSpec("embed", "mlp"), "bias": PartitionSpec("mlp")}}
POSITION = {"epoch": 2, "files": ["a", "b"], "seed": 7}


@pytest.fixture(scope="module")
def optimizer():
    return optimizers.adamw(lambda step: 0.1)


@pytest.fixture(scope="module")
def state(optimizer):
    """Makes a state after a step, so that no two of its arrays are equal."""
    params = {"dense": {"kernel": jnp.arange(8.0).reshape(2, 4), "bias": jnp.arange(4.0)}}
    fresh = train_state.TrainState.create(optimizer, params)
    return fresh.apply_gradient(optimizer, jax.tree.map(jnp.cos, params))


@pytest.fixture(scope="module")
def abstract(optimizer, state):
    """Makes the state's shapes, laid out over a mesh."""

    def make(num_partitions=1):
        axes = train_state.logical_axes(optimizer, AXES, state)
        shardings = partitioning.PjitPartitioner(num_partitions=num_partitions).state_sharding(axes, state)
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            state,
            shardings,
        )

    return make


@pytest.fixture(autouse=True)
def _sweep():
    """Collects garbage, so that leftovers are found now and not in another module's tests."""
    yield
    gc.collect()


def save(directory, state, steps, **cfg):
    cfg = checkpoints.SaveCheckpointConfig(period=1, **cfg) if cfg else None
    with checkpoints.Checkpointer(str(directory), cfg) as checkpointer:
        for step in steps:
            checkpointer.save(state, POSITION | {"step": step}, step)


def restore(directory, abstract_state):
    """Restores state and position of the newest checkpoint, or None."""
    with checkpoints.Checkpointer(str(directory)) as checkpointer:
        return checkpointer.restore_newest(abstract_state)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def assert_equal(tree, expected):
    jax.tree.map(np.testing.assert_array_equal, tree, expected)


def abstract_params(**shapes):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return {
        "dense": {
            name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=device) for name, shape in shapes.items()
        }
    }


def to_predict(**shapes):
    return train_state.InferenceState(abstract_params(**shapes))


def on_one_device(tree):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), tree)


STATISTICS = {"batch_stats": {"norm": {"mean": jnp.arange(4.0)}}}


def test_mutable_collections_are_saved_and_restored(tmp_path, state):
    state = dataclasses.replace(state, flax_mutables=STATISTICS)
    save(tmp_path, state, [3])
    restored, _ = restore(tmp_path, on_one_device(state))
    assert_equal(restored, state)
    found = checkpoints.restore_inference_state(str(tmp_path), on_one_device(state))
    assert_equal(found, train_state.InferenceState(state.params, STATISTICS))
    _, mutables = checkpoints.restore_matching(str(tmp_path), on_one_device(state))
    assert mutables.keys() == {("batch_stats", "norm", "mean")}


def test_parameters_and_mutable_collections_alone(tmp_path, state):
    checkpoints.save_params(str(tmp_path), state.params, flax_mutables=STATISTICS)
    expected = train_state.InferenceState(state.params, STATISTICS)
    assert_equal(checkpoints.restore_inference_state(str(tmp_path), on_one_device(expected)), expected)


def test_a_model_needs_its_mutable_collections(tmp_path, state):
    save(tmp_path, state, [3])
    wanted = on_one_device(dataclasses.replace(state, flax_mutables=STATISTICS))
    message = r"doesn't fit this model: batch_stats/norm/mean \(4,\): not in the checkpoint"
    with pytest.raises(checkpoints.CheckpointError, match=message):
        checkpoints.restore_inference_state(str(tmp_path), wanted)
    with pytest.raises(checkpoints.CheckpointError, match="batch_stats/norm/mean"):
        restore(tmp_path, wanted)


def test_the_layout_of_a_checkpoint_without_mutable_collections(tmp_path, state):
    """Checkpoints of versions without mutable collections have the same form."""
    save(tmp_path, state, [3])
    saved = ocp.StandardCheckpointHandler().metadata(tmp_path / "checkpoint_3/state").tree
    assert set(saved) == {"step", "params", "opt_state"}


AVERAGE = {"dense": {"kernel": jnp.full((2, 4), 5.0), "bias": jnp.full(4, 6.0)}}


@pytest.mark.parametrize("num_partitions", [1, 2])
def test_an_average_is_restored_and_is_what_evaluation_and_the_next_training_read(
    tmp_path, state, abstract, num_partitions
):
    averaged = dataclasses.replace(state, ema_params=AVERAGE)
    save(tmp_path, averaged, [3])
    wanted = abstract(num_partitions)
    restored, _ = restore(tmp_path, dataclasses.replace(wanted, ema_params=wanted.params))
    assert_equal(restored, averaged)
    found = checkpoints.restore_inference_state(str(tmp_path), wanted)
    assert_equal(found, train_state.InferenceState(AVERAGE))
    found, _ = checkpoints.restore_matching(str(tmp_path), to_predict(bias=(4,)))
    np.testing.assert_array_equal(found["dense", "bias"], AVERAGE["dense"]["bias"])
    message = r"dense/kernel \(2, 5\): \(2, 4\) in the checkpoint"
    with pytest.raises(checkpoints.CheckpointError, match=message):
        checkpoints.restore_inference_state(str(tmp_path), to_predict(kernel=(2, 5)))


@pytest.mark.parametrize("num_partitions", [1, 2])
def test_an_average_begins_or_ends_between_two_parts_of_a_run(
    tmp_path, state, abstract, num_partitions, caplog
):
    with_average = dataclasses.replace(state, ema_params=AVERAGE)
    wanted = abstract(num_partitions)
    wanted_average = dataclasses.replace(wanted, ema_params=wanted.params)
    save(tmp_path / "on", state, [3])
    caplog.clear()
    restored, _ = restore(tmp_path / "on", wanted_average)
    assert_equal(restored, dataclasses.replace(state, ema_params=state.params))
    layout = [jax.tree.map(lambda leaf: leaf.sharding, tree) for tree in (restored, wanted_average)]
    assert layout[0] == layout[1]
    # The next step gives all arrays away, so no two may be one.
    pointers = [leaf.addressable_shards[0].data.unsafe_buffer_pointer() for leaf in jax.tree.leaves(restored)]
    assert len(set(pointers)) == len(pointers)
    assert "checkpoint_3 has no average of the parameters (EMA_DECAY): it begins here" in caplog.text

    save(tmp_path / "off", with_average, [3])
    caplog.clear()
    restored, position = restore(tmp_path / "off", wanted)
    assert_equal(restored, state)
    assert position == POSITION | {"step": 3}
    assert "checkpoint_3 has an average of the parameters, which is dropped: EMA_DECAY = None" in caplog.text


def test_damage_to_an_average_is_found(tmp_path, large):
    average = jax.tree.map(lambda leaf: leaf + 1, large.params)
    save(tmp_path, dataclasses.replace(large, ema_params=average), [3])
    content = json.loads((tmp_path / "checkpoint_3/checksums.json").read_text())
    assert "ema_params/dense/kernel" in content["arrays"]
    content.pop("checksum")
    content["arrays"]["ema_params/dense/kernel"] = "00000000"
    content["checksum"] = checksums.of_json(content)
    (tmp_path / "checkpoint_3/checksums.json").write_text(json.dumps(content))
    with pytest.raises(checkpoints.CheckpointError, match="other numbers than were saved: ema_params/dense"):
        checkpoints.restore_inference_state(str(tmp_path), like(large))


@pytest.mark.parametrize("num_partitions", [1, 2])
def test_what_is_restored_is_what_was_saved_on_whichever_mesh(tmp_path, state, abstract, num_partitions):
    save(tmp_path, state, [3])
    wanted = abstract(num_partitions)
    restored, position = restore(tmp_path, wanted)
    assert_equal(restored, state)
    assert position == POSITION | {"step": 3}
    assert jax.tree.map(lambda leaf: leaf.sharding, restored) == jax.tree.map(
        lambda leaf: leaf.sharding, wanted
    )
    kernel = restored.params["dense"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 4 // num_partitions)


def test_the_newest_are_kept(tmp_path, state):
    save(tmp_path, state, [1, 2, 10, 11], keep=2)
    assert names(tmp_path) == ["checkpoint_10", "checkpoint_11"]
    assert checkpoints.find_checkpoint(str(tmp_path)) == (str(tmp_path / "checkpoint_11"), 11)


@pytest.mark.parametrize(("mode", "best"), [("min", {2, 4}), ("max", {1, 5})])
def test_the_best_are_kept_besides(tmp_path, state, mode, best):
    losses = {1: 7.0, 2: 1.0, 3: 5.0, 4: 2.0, 5: 8.0, 6: None, 7: float("nan")}
    cfg = checkpoints.SaveCheckpointConfig(1, keep=1, keep_best=2, metric_mode=mode)
    # In two runs: the metrics are saved with the checkpoints.
    for steps in ([1, 2, 3], [4, 5, 6, 7]):
        with checkpoints.Checkpointer(str(tmp_path), cfg) as checkpointer:
            for step in steps:
                metrics = None if losses[step] is None else {"loss": losses[step]}
                checkpointer.save(state, POSITION, step, metrics)
    assert set(names(tmp_path)) == {f"checkpoint_{step}" for step in best | {7}}


def test_a_metric_that_is_not_measured_is_named(tmp_path, state):
    cfg = checkpoints.SaveCheckpointConfig(1, keep_best=2, metric_name_to_monitor="los")
    with (
        checkpoints.Checkpointer(str(tmp_path), cfg) as checkpointer,
        pytest.raises(checkpoints.CheckpointError, match="have no 'los', only loss, loss/score"),
    ):
        checkpointer.save(state, POSITION, 1, {"loss": 1.0, "loss/score": 2.0})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"period": 0}, "period must be at least 1, got 0"),
        ({"period": 1, "keep": 0}, "keep must be at least 1, got 0"),
        ({"period": 1, "keep_best": -1}, "keep_best must be at least 1, got -1"),
        ({"period": 1, "metric_mode": "least"}, "metric_mode must be 'min' or 'max', got 'least'"),
    ],
)
def test_a_configuration_without_sense(kwargs, message):
    with pytest.raises(errors.UserError, match=f"SaveCheckpointConfig.{message}"):
        checkpoints.SaveCheckpointConfig(**kwargs)


def test_a_step_saved_twice_stays_as_it_was(tmp_path, state, abstract):
    save(tmp_path, state, [5])
    with checkpoints.Checkpointer(str(tmp_path)) as checkpointer:
        checkpointer.save(state, {}, 5)
    assert restore(tmp_path, abstract())[1] == POSITION | {"step": 5}


def test_an_empty_directory_has_no_checkpoint(tmp_path, abstract):
    assert restore(tmp_path, abstract()) is None
    with pytest.raises(checkpoints.CheckpointError, match=f"no checkpoint_<step> in {tmp_path}: train first"):
        checkpoints.find_checkpoint(str(tmp_path))


@pytest.mark.parametrize("name", ["", "saved_model"])
def test_a_saved_model_is_no_checkpoint(tmp_path, name):
    (tmp_path / name).mkdir(exist_ok=True)
    (tmp_path / name / "saved_model.pb").touch()
    with pytest.raises(
        checkpoints.CheckpointError, match=f"{tmp_path} is a SavedModel, .* name the checkpoint"
    ):
        checkpoints.find_checkpoint(str(tmp_path))


def test_what_a_crash_left_half_written_is_ignored(tmp_path, state, abstract):
    save(tmp_path, state, [3])
    # Orbax writes under such a name, and renames it when all is there.
    (tmp_path / "checkpoint_4.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "checkpoint_4.orbax-checkpoint-tmp/state").mkdir()
    assert checkpoints.find_checkpoint(str(tmp_path))[1] == 3
    assert_equal(restore(tmp_path, abstract())[0], state)
    save(tmp_path, state, [4])
    assert checkpoints.find_checkpoint(str(tmp_path))[1] == 4
    assert restore(tmp_path, abstract())[1]["step"] == 4


SAVE_FOREVER = """
import itertools, sys
import jax, jax.numpy as jnp
from richhf_jax import checkpoints, train_state
params = {"kernel": jnp.arange(2e6)}
with checkpoints.Checkpointer(sys.argv[1], checkpoints.SaveCheckpointConfig(1)) as checkpointer:
    for step in itertools.count(1):
        params = {"kernel": params["kernel"] + 1}
        state = train_state.TrainState(jnp.full((), step), params, ())
        checkpointer.save(state, {"step": step}, step)
"""


def test_killed_while_writing_leaves_the_checkpoint_before(tmp_path):
    def being_written():
        return [path for path in tmp_path.glob("*-tmp") if (path / "state.orbax-checkpoint-tmp").exists()]

    with subprocess.Popen([sys.executable, "-c", SAVE_FOREVER, tmp_path]) as program:
        while not ((tmp_path / "checkpoint_2").exists() and being_written()):
            assert program.poll() is None
        program.kill()
    torn = being_written()
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = train_state.TrainState(
        jax.ShapeDtypeStruct((), jnp.int32, sharding=one),
        {"kernel": jax.ShapeDtypeStruct((2_000_000,), jnp.float32, sharding=one)},
        (),
    )
    found, position = restore(tmp_path, like)
    step = position["step"]
    assert int(found.step) == step
    np.testing.assert_array_equal(found.params["kernel"], np.arange(2e6, dtype=np.float32) + step)
    assert [path.name for path in torn] == [f"checkpoint_{step + 1}.orbax-checkpoint-tmp"]


def data_files(directory):
    """Returns the files with the values of `large`: one or two, as its arrays came to be written."""
    files = (directory / "state/ocdbt.process_0/d").iterdir()
    return [path for path in files if path.stat().st_size > 10_000]  # An array takes some 15,000 compressed.


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    "missing shard": lambda path: shutil.rmtree(path / "state/ocdbt.process_0"),
    "truncated shard": lambda path: truncate(data_files(path)[-1]),
    "truncated index": lambda path: truncate(path / "state/manifest.ocdbt"),
    "no metadata": lambda path: (path / "state/_METADATA").unlink(),
    "truncated metadata": lambda path: truncate(path / "state/_METADATA"),
    "no position": lambda path: shutil.rmtree(path / "data_position"),
    "empty": lambda path: (shutil.rmtree(path), path.mkdir()),
}


@pytest.fixture(scope="module")
def large(state):
    """Makes a state of arrays too large for a checkpoint's index, which holds the values of small ones."""
    values = np.random.default_rng(0).random((2, 64, 64), np.float32)  # Not compressible.
    params = {"dense": {"bias": jnp.asarray(values[0]), "kernel": jnp.asarray(values[1])}}
    return train_state.TrainState(jnp.zeros((), jnp.int32), params, ())


def like(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory, large):
    folder = tmp_path_factory.mktemp("two")
    save(folder, large, [3, 4])
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_and_set_aside(tmp_path, two_checkpoints, large, caplog, damage):
    shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)
    DAMAGES[damage](tmp_path / "checkpoint_4")
    found, position = restore(tmp_path, like(large))
    assert position["step"] == 3
    assert_equal(found, large)
    (warning,) = [r.getMessage() for r in caplog.records if r.module == "checkpoints"]
    assert warning.startswith(f"skipping {tmp_path}/checkpoint_4: ")
    # The run that goes on saves this step again.
    save(tmp_path, large, [4])
    assert names(tmp_path) == ["checkpoint_3", "checkpoint_4", "damaged_checkpoint_4"]
    assert restore(tmp_path, like(large))[1]["step"] == 4


@pytest.fixture(scope="module")
def measured(tmp_path_factory, large):
    """Saves two checkpoints with metrics, whose positions differ."""
    folder = tmp_path_factory.mktemp("measured")
    cfg = checkpoints.SaveCheckpointConfig(1, keep_best=1)
    with checkpoints.Checkpointer(str(folder), cfg) as checkpointer:
        for step in (3, 4):
            checkpointer.save(large, POSITION | {"step": step}, step, {"loss": 1.0})
    return folder


def flips(path):
    """Yields after each flip of one bit in the file, all over its length; then it is whole again."""
    content = path.read_bytes()
    for number in range(6):
        flipped = bytearray(content)
        flipped[len(content) * number // 6] ^= 1 << number
        path.write_bytes(flipped)
        yield
    path.write_bytes(content)


def files_of(checkpoint):
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def test_after_a_flipped_bit_parameters_are_the_saved_ones_or_refused(tmp_path, measured, large, capfd):
    shutil.copytree(measured / "checkpoint_4", tmp_path / "checkpoint_4")
    refused = set()
    for path in files_of(tmp_path / "checkpoint_4"):
        for _ in flips(path):
            try:
                found = checkpoints.restore_inference_state(str(tmp_path), like(large)).params
            except checkpoints.CheckpointError as error:
                message = str(error)
                assert str(path) in message or "params/dense/" in message
                refused.add(path.name)
            else:
                assert_equal(found, large.params)
    gc.collect()
    assert {"_METADATA", "_sharding", "process_0", "manifest.ocdbt", "checksums.json"} < refused
    data = {path.name for path in data_files(tmp_path / "checkpoint_4")}
    assert data
    assert data < refused
    assert "Traceback" not in "".join(capfd.readouterr())


def test_after_a_flipped_bit_training_goes_on_from_a_whole_checkpoint(tmp_path, measured, large, caplog):
    skipped = set()
    cfg = checkpoints.SaveCheckpointConfig(1, keep_best=1)
    for number, place in enumerate(files_of(measured / "checkpoint_4")):
        folder = tmp_path / str(number)
        shutil.copytree(measured, folder)
        path = folder / place.relative_to(measured)
        next(itertools.islice(flips(path), 3, None))  # In the middle.
        with checkpoints.Checkpointer(str(folder), cfg) as checkpointer:
            found, position = checkpointer.restore_newest(like(large))
        assert_equal(found, large)
        assert position in (POSITION | {"step": 3}, POSITION | {"step": 4})
        if position["step"] == 3:
            skipped.add(f"{path.parent.name}/{path.name}")
            warning = caplog.records[-1].getMessage()
            assert str(path) in warning or "params/dense" in warning
    assert {"data_position/metadata", "state/_METADATA", "checkpoint_4/checksums.json"} < skipped


def test_a_changed_array_is_named(tmp_path, measured, large):
    """The numbers of another checkpoint, which nothing but a checksum tells from those that were saved."""
    shutil.copytree(measured / "checkpoint_4", tmp_path / "checkpoint_4")
    path = tmp_path / "checkpoint_4/checksums.json"
    content = json.loads(path.read_text())
    content["arrays"]["params/dense/bias"] = "00000000"
    del content["checksum"]
    path.write_text(json.dumps(content | {"checksum": checksums.of_json(content)}))
    message = (
        f"{tmp_path}/checkpoint_4 is damaged.*1 of 2 arrays have other numbers.*: params/dense/bias. Bring"
    )
    for restore_ in (checkpoints.restore_inference_state, checkpoints.restore_matching):
        with pytest.raises(checkpoints.CheckpointError, match=message):
            restore_(str(tmp_path), like(large))


def test_a_checkpoint_without_checksums_is_taken_if_it_is_finite(tmp_path, large, capfd):
    broken = {"dense": large.params["dense"] | {"bias": large.params["dense"]["bias"].at[3, 4].set(jnp.nan)}}
    checkpoints.save_params(str(tmp_path), large.params, 1)
    checkpoints.save_params(str(tmp_path), broken, 2)
    for step in (1, 2):
        (tmp_path / f"checkpoint_{step}/checksums.json").unlink()
    for _ in range(2):  # The warning comes once.
        found = checkpoints.restore_inference_state(str(tmp_path / "checkpoint_1"), like(large)).params
        assert_equal(found, large.params)
    (warning,) = capfd.readouterr().err.splitlines()
    assert warning.startswith(f"warning: {tmp_path}/checkpoint_1 has no checksums.json (an older version wro")
    with pytest.raises(
        checkpoints.CheckpointError, match="1 of 2 arrays have numbers.*finite: params/dense/b"
    ):
        checkpoints.restore_inference_state(str(tmp_path), like(large))


def test_parameters_of_another_type_are_checked_and_converted(tmp_path, large):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), large.params)
    checkpoints.save_params(str(tmp_path), half)
    found = checkpoints.restore_inference_state(str(tmp_path), like(large)).params
    assert_equal(found, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half))


def test_checksums_for_readers_of_their_own(tmp_path, large):
    checkpoints.save_params(str(tmp_path), large.params)
    found = checkpoints.array_checksums(str(tmp_path / "checkpoint_0"))
    assert found == {
        f"params/dense/{name}": checksums.of_array(np.asarray(leaf))
        for name, leaf in large.params["dense"].items()
    }


def test_a_pipe_in_a_checkpoint_is_not_read(tmp_path, large):
    checkpoints.save_params(str(tmp_path), large.params)
    (tmp_path / "checkpoint_0/checksums.json").unlink()
    (tmp_path / "checkpoint_0/state/_METADATA").unlink()
    os.mkfifo(tmp_path / "checkpoint_0/state/_METADATA")
    with pytest.raises(checkpoints.CheckpointError, match="_METADATA is a named pipe"):
        checkpoints.restore_inference_state(str(tmp_path), like(large))


def test_other_files_in_a_checkpoint_do_not_matter(tmp_path, large):
    checkpoints.save_params(str(tmp_path), large.params)
    for place in (".", "state", "state/d", "state/ocdbt.process_0/d"):
        (tmp_path / "checkpoint_0" / place / "link").symlink_to("nowhere")
    os.mkfifo(tmp_path / "checkpoint_0/pipe")
    os.mkfifo(tmp_path / "checkpoint_0/state/pipe")
    assert_equal(checkpoints.restore_inference_state(str(tmp_path), like(large)).params, large.params)


@pytest.mark.parametrize("name", ["n 50%25", "n 50%", "run #1", "x?y", "a|b", "é *"])
def test_a_path_is_taken_as_it_is(tmp_path, state, name):
    other = tmp_path / "n 50%"  # The place of "n 50%25", were it a URL.
    checkpoints.save_params(str(other), jax.tree.map(jnp.zeros_like, state.params))
    checkpoints.save_params(str(tmp_path / name), state.params, 1)
    found = checkpoints.restore_inference_state(str(tmp_path / name), like(state)).params
    assert_equal(found, state.params)


def test_a_path_that_orbax_takes_for_a_pattern_is_refused(tmp_path, state):
    path = str(tmp_path / "run[1]")
    for write in (
        lambda: checkpoints.save_params(path, state.params),
        lambda: checkpoints.Checkpointer(path),
    ):
        with pytest.raises(checkpoints.CheckpointError, match=r"run\[1\] can't hold checkpoints"):
            write()
    checkpoints.save_params(str(tmp_path), state.params)
    tmp_path.rename(path := str(tmp_path.parent / "read[1]"))
    assert_equal(checkpoints.restore_inference_state(path, like(state)).params, state.params)


@pytest.mark.parametrize("part", ["params", "step"])
def test_an_array_of_another_kind_of_numbers_is_refused(tmp_path, large, part):
    """One byte in the database says float or integer, and nothing else there would show its change."""
    save(tmp_path, large, [3])
    kind = {"params": jnp.int32, "step": jnp.float32}[part]
    wrong = jax.tree.map(lambda leaf: leaf.astype(kind), getattr(large, part))
    save(tmp_path / "other", large.replace(**{part: wrong}), [3])
    with pytest.raises(checkpoints.CheckpointError, match="no checkpoint in .* is whole"):
        restore(tmp_path / "other", large)


def test_a_finished_checkpoint_was_synchronised_before_it_had_its_name(tmp_path, large, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def sync(descriptor):
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def rename(old, new):
        events.append(("renamed", os.fspath(new)))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", rename)
    save(tmp_path, large, [3])
    named = events.index(("renamed", f"{tmp_path}/checkpoint_3"))
    synced = {str(path).partition("orbax-checkpoint-tmp/")[2] for path in events[:named]}
    final = tmp_path / "checkpoint_3"
    assert {str(path.relative_to(final)) for path in files_of(final)} <= synced
    assert {"state", "data_position"} <= synced
    assert events[named + 1] == str(tmp_path)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(tmp_path, two_checkpoints, large):
    shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)
    for step in (3, 4):
        DAMAGES["missing shard"](tmp_path / f"checkpoint_{step}")
    message = (
        f"no checkpoint in {tmp_path} is whole: checkpoint_4, checkpoint_3,.*begin anew in another MODEL"
    )
    with pytest.raises(checkpoints.CheckpointError, match=message):
        restore(tmp_path, like(large))
    assert names(tmp_path) == ["checkpoint_3", "checkpoint_4"]


@pytest.mark.parametrize("damage", [truncate, lambda path: path.write_text('{"loss": 1.0}')])
def test_damaged_metrics_cost_a_checkpoint_its_rank_alone(tmp_path, large, damage):
    cfg = checkpoints.SaveCheckpointConfig(1, keep=1, keep_best=1)
    with checkpoints.Checkpointer(str(tmp_path), cfg) as checkpointer:
        checkpointer.save(large, POSITION, 1, {"loss": 5.0})
    damage(tmp_path / "checkpoint_1/metrics/metrics")
    with checkpoints.Checkpointer(str(tmp_path), cfg) as checkpointer:
        assert checkpointer.restore_newest(like(large)) is not None
        checkpointer.save(large, POSITION, 2, {"loss": 2.0})
    assert names(tmp_path) == ["checkpoint_2"]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"bias": (64, 64), "kernel": (64, 65)},
            r"params/dense/kernel \(64, 65\): \(64, 64\) in the checkpoint",
        ),
        ({"bias": (64, 64)}, r"params/dense/kernel \(not in the model\): \(64, 64\) in the checkpoint"),
    ],
)
def test_a_checkpoint_of_another_model_is_not_damaged(tmp_path, two_checkpoints, large, params, message):
    shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)
    other = dataclasses.replace(like(large), params=abstract_params(**params))
    with pytest.raises(checkpoints.CheckpointError, match=f"checkpoint_4 doesn't fit this model: {message}"):
        restore(tmp_path, other)
    assert names(tmp_path) == ["checkpoint_3", "checkpoint_4"]


@pytest.fixture
def small_disk():
    """Limits the size of files, which resembles a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save_and_wait(checkpointer, state):
    checkpointer.save(state, POSITION, 2)
    checkpointer.wait()


def save_and_go_on(checkpointer, state):
    checkpointer.save(state, POSITION, 2)
    while True:
        checkpointer.check()


def save_and_end(checkpointer, state):
    with checkpointer:
        checkpointer.save(state, POSITION, 2)


@pytest.mark.parametrize("saves", [save_and_wait, save_and_go_on, save_and_end])
def test_a_full_disk_ends_the_run_and_leaves_what_was_there(tmp_path, large, small_disk, saves):
    save(tmp_path, large, [1])
    checkpointer = checkpoints.Checkpointer(str(tmp_path))
    small_disk(10_000)
    message = (
        f"^{tmp_path}: a checkpoint can't be written: File too large: {tmp_path}/.*\n.*/checkpoint_1. Make"
    )
    with pytest.raises(checkpoints.CheckpointError, match=message):
        saves(checkpointer, large)
    assert restore(tmp_path, like(large))[1]["step"] == 1


def test_a_model_dir_that_can_not_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(checkpoints.CheckpointError, match=f"{tmp_path}/file/run can't be used.*Not a direc"):
        checkpoints.Checkpointer(str(tmp_path / "file/run"))


def test_a_directory_that_is_no_checkpoint_is_named(tmp_path):
    directory = tmp_path / "checkpoint_7"
    for path in (directory, tmp_path):
        directory.mkdir(exist_ok=True)
        with pytest.raises(checkpoints.CheckpointError, match=f"{directory} is not a checkpoint.*state/"):
            checkpoints.find_checkpoint(str(path))


def test_a_model_dir_may_be_called_as_a_checkpoint(tmp_path, state):
    save(tmp_path / "checkpoint_test", state, [2])
    found, step = checkpoints.find_checkpoint(str(tmp_path / "checkpoint_test"))
    assert (pathlib.Path(found).name, step) == ("checkpoint_2", 2)


def test_the_parameters_of_the_newest_checkpoint_or_of_a_named_one(tmp_path, state):
    save(tmp_path, state, [3])
    wanted = to_predict(kernel=(2, 4), bias=(4,))
    for path in (tmp_path, tmp_path / "checkpoint_3"):
        assert_equal(checkpoints.restore_inference_state(str(path), wanted).params, state.params)


def test_parameters_alone(tmp_path, state):
    part = {"dense": {"bias": state.params["dense"]["bias"]}}
    checkpoints.save_params(str(tmp_path), part)
    directory, step = checkpoints.find_checkpoint(str(tmp_path))
    assert (directory, step) == (str(tmp_path / "checkpoint_0"), 0)
    found, _ = checkpoints.restore_matching(str(tmp_path), to_predict(bias=(4,), kernel=(2, 4)))
    assert found.keys() == {("dense", "bias")}
    np.testing.assert_array_equal(found["dense", "bias"], state.params["dense"]["bias"])


def test_a_training_does_not_continue_from_parameters_alone(tmp_path, state, abstract):
    checkpoints.save_params(str(tmp_path), state.params)
    with pytest.raises(
        checkpoints.CheckpointError, match="checkpoint_0 holds parameters alone.*INITIAL_CHECK"
    ):
        restore(tmp_path, abstract())


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"kernel": (2, 5), "bias": (4,)}, r"dense/kernel \(2, 5\): \(2, 4\) in the checkpoint"),
        ({"kernel": (2, 4), "scale": (3,)}, r"dense/scale \(3,\): not in the checkpoint"),
    ],
)
def test_a_misfit_names_the_parameter_and_both_shapes(tmp_path, state, shapes, message):
    save(tmp_path, state, [3])
    with pytest.raises(checkpoints.CheckpointError, match=f"{tmp_path} doesn't fit this model: {message}"):
        checkpoints.restore_inference_state(str(tmp_path), to_predict(**shapes))


def test_restore_matching_takes_what_fits_and_lists_the_rest(tmp_path, state, caplog):
    save(tmp_path, state, [3])
    wanted = to_predict(bias=(4,), kernel=(2, 5), scale=(3,))
    logging.set_verbosity(logging.INFO)
    with caplog.at_level("INFO", logger="absl"):
        found, mutables = checkpoints.restore_matching(str(tmp_path), wanted)
    assert mutables == {}
    assert found.keys() == {("dense", "bias")}
    np.testing.assert_array_equal(found["dense", "bias"], state.params["dense"]["bias"])
    lines = [record.getMessage() for record in caplog.records if record.module == "checkpoints"]
    assert lines == [
        f"initialised 1 arrays from {tmp_path}, 2 stay fresh",
        "fresh: dense/kernel (2, 5): (2, 4) in the checkpoint",
        "fresh: dense/scale (3,): not in the checkpoint",
    ]


def test_restore_matching_refuses_another_model(tmp_path, state):
    save(tmp_path, state, [3])
    with pytest.raises(checkpoints.CheckpointError, match=f"{tmp_path} shares no parameter"):
        checkpoints.restore_matching(str(tmp_path), to_predict(kernel=(9, 9)))


@pytest.mark.parametrize("scanned", [False, True])
def test_stacked_and_single_layers_are_not_taken_for_each_other(tmp_path, scanned):
    def params(stacked):
        stack = {"layers": {"w": jnp.ones((2, 3))}}
        single = {f"layers_{i}": {"w": jnp.ones(3)} for i in range(2)}
        return {"encoder": {"scale": jnp.ones(3), **(stack if stacked else single)}}

    checkpoints.save_params(str(tmp_path), params(scanned))
    message = (
        f"{tmp_path} is of a model with SCAN_LAYERS = {scanned}, but this model has SCAN_LAYERS ="
        f" {not scanned}: give --gin.SCAN_LAYERS={scanned} "
    )
    for stacked, refused in ((scanned, False), (not scanned, True)):
        wanted = on_one_device(train_state.InferenceState(params(stacked)))
        refusal = pytest.raises(checkpoints.CheckpointError, match=message)
        with refusal if refused else contextlib.nullcontext():
            found, _ = checkpoints.restore_matching(str(tmp_path), wanted)
            assert len(found) == len(jax.tree.leaves(params(stacked)))


def test_a_training_does_not_continue_with_layers_stacked_otherwise(tmp_path):
    def state(names):
        params = {"encoder": {name: {"w": jnp.ones((2, 3))} for name in names}}
        return train_state.TrainState(jnp.zeros((), jnp.int32), params, ())

    save(tmp_path, state(["layers_0", "layers_1"]), [3])
    with pytest.raises(
        checkpoints.CheckpointError, match="checkpoint_3 is of a model with SCAN_LAYERS = False"
    ):
        restore(tmp_path, on_one_device(state(["layers"])))
