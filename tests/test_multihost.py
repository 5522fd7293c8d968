"""Several processes find each other, and neither their number nor the mesh changes the results."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from richhf_jax import errors, locking, multihost

HERE = pathlib.Path(__file__).resolve().parent


@pytest.fixture
def initialize(monkeypatch):
    """Replaces jax's functions by ones that list the calls."""
    calls = []
    for name in (
        "SLURM_STEP_NUM_TASKS",
        "OMPI_COMM_WORLD_SIZE",
        "TPU_SKIP_MDS_QUERY",
        "TPU_WORKER_HOSTNAMES",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kwargs: calls.append((args, kwargs)))
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: calls.append("shutdown"))
    return calls


@pytest.mark.parametrize(
    ("platforms", "environment", "enabled", "several"),
    [
        ("cpu", {}, None, False),
        (None, {}, None, False),
        ("cpu", {}, True, True),
        (None, {"SLURM_STEP_NUM_TASKS": "4"}, None, True),
        (None, {"SLURM_STEP_NUM_TASKS": "4"}, False, False),
        (None, {"SLURM_STEP_NUM_TASKS": "1"}, None, False),
        # A shell in an allocation for 4 tasks.
        (None, {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None, False),
        ("cuda", {"OMPI_COMM_WORLD_SIZE": "2"}, None, True),
        ("tpu,cpu", {}, None, True),
        ("tpu,cpu", {"TPU_SKIP_MDS_QUERY": "1"}, None, False),
        ("tpu,cpu", {"TPU_WORKER_HOSTNAMES": "a,b"}, None, True),
        ("tpu,cpu", {"TPU_WORKER_HOSTNAMES": "localhost"}, None, False),
        ("tpu,cpu", {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, None, True),
        # A TPU that isn't used.
        ("cpu", {"TPU_WORKER_HOSTNAMES": "a,b"}, None, False),
    ],
)
def test_the_environment_tells_of_other_processes(
    monkeypatch, initialize, platforms, environment, enabled, several
):
    # A stand-in: another value of jax's own would start that platform.
    monkeypatch.setattr(multihost, "_platforms", lambda: platforms or "")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with multihost.session(enabled=enabled):
        assert len(initialize) == several
    assert initialize[1:] == ["shutdown"] * several


def test_what_the_flags_say_is_what_jax_gets(initialize):
    with multihost.session("host:1234", 2, 1, heartbeat_timeout=7):
        pass
    (args, kwargs), shutdown = initialize
    assert args == ("host:1234", 2, 1)
    # jax would otherwise look for a cluster, and take one GPU for each process in one of SLURM's.
    assert kwargs["cluster_detection_method"] == "deactivate"
    assert kwargs["heartbeat_timeout_seconds"] == 7
    assert shutdown == "shutdown"


def test_a_process_that_fails_does_not_wait_for_the_others(monkeypatch, initialize):
    at_exit = []
    monkeypatch.setattr(multihost.atexit, "register", at_exit.append)
    with pytest.raises(errors.UserError, match="mistake"), multihost.session("host:1", 2, 1):
        raise errors.UserError("mistake")
    assert initialize[1:] == []
    assert at_exit == [multihost._exit_now]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("host:1", None, None), "give --process_count and --process_index, too"),
        ((None, 2, 1), "belong together; give --coordinator_address, too"),
        (("host:1", 2, 2), "--process_index=2 of --process_count=2: they count from 0"),
        (("host", 2, 0), "--coordinator_address=host: write HOST:PORT"),
    ],
)
def test_flags_that_do_not_fit_together(initialize, given, message):
    with pytest.raises(errors.UserError, match=message), multihost.session(*given):
        pass
    assert initialize == []


def run_python(*args: str, **environment: str) -> subprocess.Popen:
    """Starts a script, which sets its own number of CPU devices."""
    kept = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
    kept |= {"PYTHONPATH": str(HERE.parent), **environment}
    return subprocess.Popen(
        [sys.executable, *args], env=kept, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_a_port_in_use():
    """The failing process prints its message, too, and ends with exit code 1."""
    code = """
import sys
from richhf_jax import errors, multihost
try:
    with multihost.session(sys.argv[1], 1, 0):
        pass
except errors.UserError as error:
    sys.exit(str(error))
"""
    with socket.socket() as busy:
        busy.bind(("0.0.0.0", 0))
        busy.listen()
        address = f"127.0.0.1:{busy.getsockname()[1]}"
        process = run_python("-c", code, address)
        output = process.communicate()[0]
    assert process.returncode == 1
    assert f"can't be the coordinator at {address}" in output
    assert "--nomultiprocess_gpu" in output
    assert "Traceback" not in output
    assert "ended before" not in output


def test_a_context_that_one_process_can_not_enter_is_entered_by_none(tmp_path):
    """Here it is the lock of a directory, which process 0 takes for both."""
    code = """
import contextlib, sys
from richhf_jax import errors, locking, multihost
folder, address, index = sys.argv[1], sys.argv[2], int(sys.argv[3])
try:
    with multihost.session(address, 2, index):
        context = locking.held(folder, "--out") if index == 0 else contextlib.nullcontext()
        with multihost.entered_by_all(context):
            print("entered")
except errors.UserError as error:
    sys.exit(str(error))
"""
    with locking.held(tmp_path, "--out"):
        address = f"127.0.0.1:{free_port()}"
        both = [run_python("-c", code, str(tmp_path), address, str(index)) for index in range(2)]
        outputs = [process.communicate(timeout=100)[0] for process in both]
    for process, output in zip(both, outputs, strict=True):
        assert process.returncode == 1
        assert f"pid {os.getpid()}, since " in output
        assert "entered" not in output
        assert "Traceback" not in output


@pytest.fixture(scope="module")
def twenty_steps(tmp_path_factory, make_model, make_batch) -> dict[str, np.ndarray]:
    """Computes the losses of 20 steps of RAHF, for each layout."""
    folder = tmp_path_factory.mktemp("steps")
    # 8 examples a step; the decoder, which takes longest to compile, has nothing to learn.
    batches = make_batch(make_model("augmented_prompt"), 1, 1, 0, batch_size=160)
    np.savez(folder / "batch.npz", **batches)
    script, address = str(HERE / "twenty_steps.py"), f"127.0.0.1:{free_port()}"
    processes = [run_python(script, str(folder), str(index), address) for index in range(2)]
    processes.append(run_python(script, str(folder)))
    for process in processes:
        output = process.communicate()[0]
        assert process.returncode == 0, output
    return {path.stem: np.array(json.loads(path.read_text())) for path in folder.glob("*.json")}


@pytest.mark.parametrize("layout", ["process_0", "process_1", "fully_sharded", "tensor"])
def test_twenty_steps_are_the_same_on_every_mesh(twenty_steps, layout):
    assert len(twenty_steps[layout]) == 20
    # float32; 1e-7 was measured.
    np.testing.assert_allclose(twenty_steps[layout], twenty_steps["data"], rtol=1e-5)


def test_a_lost_process_ends_the_others_and_fewer_continue(tmp_path, synthetic_data_dir):
    """Two processes, one of which is killed, and then one, give the same curve as one process alone."""
    process = run_python(
        *(str(HERE / "kill_and_resume.py"), f"--data_dir={synthetic_data_dir}", f"--out={tmp_path}"),
        *("--model=mlp", "--elastic", "--processes=2,1", "--steps=30", "--period=5"),
    )
    output = process.communicate()[0]
    assert process.returncode == 0, output
    log = (tmp_path / "parts.log").read_text()
    assert "ended before its work did: it failed or was killed, or another process was lost" in log
    assert "the same command again" in log
