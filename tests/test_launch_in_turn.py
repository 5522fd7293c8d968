"""launch/in_turn.py with small modules."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

import richhf_jax

ROOT = pathlib.Path(richhf_jax.__file__).resolve().parents[1]
PART = """
import atexit, os, signal, sys, time
import heavy
print("run", __name__, __spec__.name, sys.argv[1:], "heavy of", os.getpid() == heavy.pid, flush=True)
atexit.register(print, "ended")
if sys.argv[1:] == ["crash"]:
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1:] == ["wait"]:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    print("waiting", flush=True)
    time.sleep(60)
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "heavy.py").write_text("import os\npid = os.getpid()\nprint('imported', flush=True)\n")
    (tmp_path / "part.py").write_text(PART)
    return tmp_path


def start(folder: pathlib.Path, *arguments: str, first: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Starts the program, which finds the modules of a folder."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "launch.in_turn", *first, "heavy,json", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_parts_run_in_turn_with_one_import_until_one_fails(folder):
    parts = ("one", "part", "0", "a b", "--then", "two", "part", "3", "--then", "three", "part", "0")
    program = start(folder, *parts)
    output = program.communicate()[0]
    assert program.returncode == 3
    took = "== took 0:00 min"
    assert output.splitlines() == [
        "imported",
        *("", "== one", "run __main__ part ['0', 'a b'] heavy of False", "ended", took),
        *("", "== two", "run __main__ part ['3'] heavy of False", "ended"),
    ]


def test_a_signal_goes_to_the_part_and_ends_the_sequence(folder):
    program = start(folder, "one", "part", "wait", "--then", "two", "part", "0")
    assert program.stdout is not None
    while program.stdout.readline() != "waiting\n":
        pass
    program.send_signal(signal.SIGTERM)
    assert program.communicate()[0] == "ended\n"  # By the part's own handler.
    assert program.returncode == 130


def test_a_part_that_is_killed_is_named(folder):
    program = start(folder, "1/2 one", "part", "crash", "--then", "two", "part", "0")
    assert program.communicate()[0].endswith("1/2 one: ended by SIGKILL\n")
    assert program.returncode == 128 + signal.SIGKILL


def test_parts_that_are_finished_are_left_out_and_nothing_is_imported_for_them(folder):
    def run(*parts):
        program = start(folder, *parts, first=(f"--finished={folder / 'finished'}",))
        return program.communicate()[0].splitlines(), program.returncode

    output, code = run(
        "1: one", "part", "0", "--then", "2: two", "part", "3", "--then", "3: three", "part", "0"
    )
    assert code == 3
    assert "== 3: three" not in output
    output, code = run("1: one", "part", "0", "--then", "2: two", "part", "0")
    assert code == 0
    assert output[:5] == ["imported", "", "== 1: one: finished before", "", "== 2: two"]
    output, code = run("1: one", "part", "0", "--then", "2: two", "part", "0")
    assert output == ["", "== 1: one: finished before", "", "== 2: two: finished before"]


def test_a_part_that_was_stopped_is_not_finished(folder):
    program = start(folder, "one", "part", "wait", first=(f"--finished={folder / 'finished'}",))
    assert program.stdout is not None
    while program.stdout.readline() != "waiting\n":
        pass
    program.send_signal(signal.SIGTERM)
    program.communicate()
    assert not list((folder / "finished").iterdir())
