"""launch/local.sh with a stand-in for Python, whose action depends on the process's index."""

import os
import pathlib
import signal
import subprocess

import pytest

import richhf_jax

SCRIPT = pathlib.Path(richhf_jax.__file__).resolve().parents[1] / "launch/local.sh"

# Passes the check of its version and installs nothing; what else it is asked to run depends on $CASE.
FAKE_PYTHON = """#!/usr/bin/env bash
[[ $1 == -c || $2 == pip ]] && exit
index=${!#}
index=${index#--process_index=}
trap 'echo saved; exit' TERM
echo "started with GPUs $JAX_LOCAL_DEVICE_IDS"
case $CASE$index in
  one_fails1) echo "a mistake" >&2; exit 3 ;;
  one_fails* | stopped*) while :; do sleep 0.1; done ;;
esac
"""


@pytest.fixture
def start(tmp_path: pathlib.Path):
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)

    def popen(*args: str, case: str = "") -> subprocess.Popen:
        # Where the tests run in the background, a shell has Ctrl-C ignored, and bash can't trap that.
        return subprocess.Popen(
            ["env", "--default-signal=INT", "bash", str(SCRIPT), *args],
            env=os.environ | {"VENV": str(tmp_path / "venv"), "CASE": case},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return popen


def finish(process: subprocess.Popen) -> tuple[int, list[str]]:
    """Returns exit code and output lines, sorted because those of several processes come in any order."""
    output = process.communicate(timeout=60)[0]
    return process.returncode, sorted(line for line in output.splitlines() if not line.startswith("inst"))


def test_each_process_has_its_index_and_devices(start):
    code, lines = finish(start("--processes=3", "--devices_per_process=2", "--", "train", "--gin.A=b c"))
    assert code == 0
    assert lines == [f"[{i}] started with GPUs {2 * i},{2 * i + 1}" for i in range(3)]


def test_dry_run_prints_the_commands(start):
    code, lines = finish(start("--dry-run", "--processes", "2", "--", "eval", "--gin.A=b c"))
    assert code == 0
    assert len(lines) == 2
    (port,) = {line.partition("127.0.0.1:")[2].split()[0] for line in lines}
    for index, line in enumerate(lines):
        assert line.startswith(f"env JAX_LOCAL_DEVICE_IDS={index} ")
        assert line.endswith(
            "-m richhf_jax.eval --gin.A=b\\ c --gin.PjitPartitioner.num_cpu_devices=1"
            f" --coordinator_address=127.0.0.1:{port} --process_count=2 --process_index={index}"
        )


def test_one_that_fails_ends_all(start):
    code, lines = finish(start("--", "train", case="one_fails"))
    assert code == 1
    assert "[1] a mistake" in lines
    assert any(line.startswith("local.sh: process 1 failed with exit code 3") for line in lines)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on(start, signum):
    process = start("--", "train", case="stopped")
    read = [process.stdout.readline() for _ in range(3)]  # also that of the installation
    assert sum("started" in line for line in read) == 2
    process.send_signal(signum)
    code, lines = finish(process)
    assert code == 0
    assert lines == ["[0] saved", "[1] saved"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "what shall run?"),
        (["--", "convert"], "'convert' is neither train, eval nor infer"),
        (["--processes=0", "--", "train"], "'0' is no number of processes"),
        (["--devices_per_process"], "--devices_per_process needs a value"),
        (["train"], "what is 'train'? See --help"),
    ],
)
def test_mistakes(start, args, message):
    code, lines = finish(start(*args))
    assert code == 1
    assert len(lines) == 1
    assert message in lines[0]


def test_help(start):
    code, lines = finish(start("--help"))
    assert code == 0
    assert any(line.startswith("Usage: bash launch/local.sh") for line in lines)
