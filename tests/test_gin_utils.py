"""The command line of entry points: a small program in a package of its own, run as users run ours."""

import logging
import os
import pathlib
import re
import subprocess
import sys
import textwrap

import gin
import pytest

from richhf_jax import errors, gin_utils

ROOT = pathlib.Path(gin_utils.__file__).resolve().parents[1]

PROGRAM = '''
"""Greets."""
from richhf_jax import errors, gin_utils

class Net:
    def __init__(self, width, depth=2):
        self.width, self.depth = width, depth

def greet(model_dir, net, steps=3):
    if steps < 0:
        raise errors.UserError("steps is negative")
    print("greeting", model_dir, net.width, net.depth, steps)
    gin_utils.write_operative_config(f"{model_dir}/config.gin")

if __name__ == "__main__":
    gin_utils.run(greet)
'''

CONFIG = """
from __gin__ import dynamic_registration
from program import greet as greet_script

MODEL_DIR = %gin.REQUIRED
STEPS = 7

greet_script.greet:
    model_dir = %MODEL_DIR
    net = @greet_script.Net()
    steps = %STEPS
greet_script.Net.width = 4
"""


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "program").mkdir()
    (tmp_path / "program/__init__.py").touch()
    (tmp_path / "program/greet.py").write_text(PROGRAM)
    (tmp_path / "config.gin").write_text(CONFIG)
    return tmp_path


def run(folder: pathlib.Path, *args: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "program.greet", *args],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{folder}"},
        capture_output=True,
        text=True,
        check=False,
    )


def fails_with(folder: pathlib.Path, *args: str) -> str:
    """Returns the message of a run that must fail with a user's mistake."""
    result = run(folder, *args)
    assert result.returncode == 1
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert "In call to configurable" not in result.stderr
    return result.stderr


@pytest.mark.parametrize(
    ("arg", "rewritten"),
    [
        ("--gin.TRAIN_STEPS=10", "--gin_bindings=TRAIN_STEPS = 10"),
        ("--gin.MODEL_DIR=/tmp/run_1", "--gin_bindings=MODEL_DIR = '/tmp/run_1'"),
        ("--gin.MODEL_DIR=gs://bucket/a", "--gin_bindings=MODEL_DIR = 'gs://bucket/a'"),
        ("--gin.MODEL_DIR='/tmp/a b'", "--gin_bindings=MODEL_DIR = '/tmp/a b'"),
        ("--gin.train.random_seed=None", "--gin_bindings=train.random_seed = None"),
        ("--gin.LENGTHS={'a': 1}", "--gin_bindings=LENGTHS = {'a': 1}"),
        ("--gin.RATE=-1e-3", "--gin_bindings=RATE = -1e-3"),
        ("--gin.NET=@net.Net()", "--gin_bindings=NET = @net.Net()"),
        ("--gin.A=b=c", "--gin_bindings=A = 'b=c'"),
        ("--gin.RATE=.1", "--gin_bindings=RATE = .1"),
        ("--gin_file=a.gin", "--gin_file=a.gin"),
    ],
)
def test_rewrite_gin_args(arg, rewritten):
    assert gin_utils.rewrite_gin_args([arg]) == [rewritten]


def test_rewrite_gin_args_without_a_value():
    with pytest.raises(errors.UserError, match="--gin.STEPS: write --gin.NAME=value"):
        gin_utils.rewrite_gin_args(["--gin.STEPS"])


def test_runs_with_the_configuration_and_writes_it(folder):
    result = run(folder, "--gin_file=config.gin", "--gin.MODEL_DIR=out", "--gin.Net.depth=5")
    assert result.stdout == "greeting out 4 5 7\n"
    assert result.stderr == ""
    assert result.returncode == 0
    # The file written is a configuration of its own.
    assert run(folder, "--gin_file=out/config.gin").stdout == "greeting out 4 5 7\n"


def test_later_files_and_bindings_override(folder):
    (folder / "more.gin").write_text("STEPS = 8\nMODEL_DIR = 'more'\n")
    files = ["--gin_file=config.gin", "--gin_file=more.gin"]
    assert run(folder, *files).stdout == "greeting more 4 2 8\n"
    assert run(folder, *files, "--gin_bindings=STEPS = 9").stdout == "greeting more 4 2 9\n"
    assert run(folder, *files, "--gin.greet.steps=10").stdout == "greeting more 4 2 10\n"


def test_dry_run_prints_the_resolved_configuration_and_stops(folder):
    result = run(folder, "--gin_file=config.gin", "--gin.MODEL_DIR=out", "--gin.STEPS=9", "--dry_run")
    assert result.returncode == 0
    assert "MODEL_DIR = 'out'\nSTEPS = 9\n" in result.stdout
    assert "greet_script.greet.steps = %STEPS" in result.stdout
    assert "greeting" not in result.stdout
    assert not (folder / "out").exists()


def test_search_paths(folder):
    (folder / "sub").mkdir()
    (folder / "sub/small.gin").write_text("STEPS = 1\nMODEL_DIR = 'out'\n")
    files = ["--gin_file=config.gin", "--gin_file=small.gin"]
    result = run(folder, "--gin_search_paths=sub", *files)
    assert result.stdout == "greeting out 4 2 1\n"
    assert "Path not found" not in result.stderr
    message = fails_with(folder, *files)
    assert "Unable to open file: small.gin" in message
    # There is a folder of the first part's name, which gin would take for a package.
    assert "Unable to open file: sub/none.gin. There is" in fails_with(folder, "--gin_file=sub/none.gin")
    assert str(ROOT / "gin") in message


def test_help_lists_the_flags(folder):
    output = run(folder, "--help").stdout
    assert "Greets." in output
    for flag in ("--gin_file", "--gin_bindings", "--gin_search_paths", "--tfds_data_dir", "dry_run"):
        assert flag in output
    for flag in ("--coordinator_address", "--process_count", "--process_index", "multiprocess_gpu"):
        assert flag in output


def test_a_program_may_have_a_compilation_cache(folder, monkeypatch):
    flag = "--[no]compilation_cache"
    assert flag not in run(folder, "--help").stdout
    program = folder / "program/greet.py"
    program.write_text(
        PROGRAM.replace("run(greet)", "run(greet, compilation_cache=True)").replace(
            'print("greeting"', 'import jax; print(jax.config.jax_compilation_cache_dir, "greeting"'
        )
    )
    assert flag in run(folder, "--help").stdout
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    given = ("--gin_file=config.gin", "--gin.MODEL_DIR=out")
    assert run(folder, *given, "--nocompilation_cache").stdout == "None greeting out 4 2 7\n"
    assert run(folder, *given).stdout == f"{folder}/richhf_jax/compiled greeting out 4 2 7\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--gin_file=FILE"),
        (["config.gin"], "unexpected argument 'config.gin'"),
        (["--gin_file=config.gin"], "no value for MODEL_DIR; give: --gin.MODEL_DIR=..."),
        (["--gin_file=config.gin", "--gin.STPES=1"], "--gin.STPES: no gin file uses a macro of this name"),
        (["--gin_file=config.gin", "--gin.STPES=1"], "did you mean STEPS?"),
        (["--gin_file=config.gin", "--gin.greet.x=1"], "doesn't have a parameter named 'x'"),
        (["--gin_file=config.gin", "--gin.nope.x=1"], "No configurable matching 'nope'"),
        (["--gin_file=config.gin", "--gin.MODEL_DIR=%FOO"], "%FOO is used but has no value"),
        (["--gin_file=config.gin", "--gin.MODEL_DIR=[1,"], "a quote or bracket is not closed"),
        (["--gin_file=config.gin", "--gin.MODEL_DIR=a", "--gin.STEPS=-1"], "steps is negative\n"),
        (
            ["--gin_file=config.gin", "--gin.MODEL_DIR=a", "--tfds_data_dir=config.gin"],
            "config.gin is a file",
        ),
        (["--gin_file=config.gin", "--gin.MODEL_DIR="], "there is no value behind the ="),
        (["--gin_file=config.gin", "--gin.MODEL_DIR=a", "--process_index=1"], "give --coordinator_address"),
    ],
)
def test_mistakes_on_the_command_line(folder, args, message):
    assert message in fails_with(folder, *args)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nope.module", "No module named 'nope'\n  In file \"bad.gin\", line 1"),
        ("include 'none.gin'", "Unable to open file: none.gin"),
        ("STEPS = ", "Unable to parse value. (bad.gin, line 1)"),
        ("greet.net = None", "no value for greet.model_dir"),
        ("greet.model_dir = 'a'\ngreet.net = %gin.REQUIRED", "greet.net set to `%gin.REQUIRED`"),
    ],
)
def test_mistakes_in_a_gin_file(folder, text, message):
    (folder / "bad.gin").write_text(textwrap.dedent(text) + "\n")
    assert message in fails_with(folder, "--gin_file=bad.gin")


def test_a_required_argument_deep_inside_is_named(folder):
    program = folder / "program/greet.py"
    program.write_text("import gin\n" + PROGRAM.replace("width, depth=2", "width=gin.REQUIRED, depth=2"))
    config = folder / "config.gin"
    config.write_text(CONFIG.replace("greet_script.Net.width = 4\n", ""))
    message = fails_with(folder, "--gin_file=config.gin", "--gin.MODEL_DIR=out")
    assert "Required bindings for `Net` not provided in config: ['width']" in message


def test_logs_are_ours_and_warnings(folder):
    lines = "from absl import logging; logging.info('others'); logging.warning('careful'); "
    (folder / "program/greet.py").write_text(PROGRAM.replace("print(", lines + "print("))
    args = ["--gin_file=config.gin", "--gin.MODEL_DIR=out"]
    assert re.fullmatch(r"\d\d:\d\d:\d\d careful\n", run(folder, *args).stderr)
    assert "others" in run(folder, *args, "--verbosity=0").stderr


def test_a_bug_keeps_its_traceback(folder):
    program = folder / "program/greet.py"
    program.write_text(PROGRAM.replace("if steps < 0:", "if steps.nope:"))
    result = run(folder, "--gin_file=config.gin", "--gin.MODEL_DIR=out")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "AttributeError: 'int' object has no attribute 'nope'" in result.stderr


def test_tfds_data_dir_overrides_that_of_tasks(folder):
    program = folder / "program/greet.py"
    program.write_text(PROGRAM.replace("print(", "import seqio; print(seqio.utils._TFDS_DATA_DIR_OVERRIDE, "))
    result = run(folder, "--gin_file=config.gin", "--gin.MODEL_DIR=out", "--tfds_data_dir=/data")
    assert result.stdout == "/data greeting out 4 2 7\n"


def test_parse_gin_flags_in_process(folder):
    (folder / "values.gin").write_text("A = 1\nB = %A\n")
    gin_utils.parse_gin_flags([str(folder)], ["values.gin"], ["A = 2"])
    assert gin.config_is_locked()
    assert "A = 2\n" in gin.config_str()


def test_macro(folder):
    (folder / "values.gin").write_text("MY_NET = 1\nNET = %MY_NET\nFIT = 'banana'\nIMAGE_SIDE = 0\n")
    gin_utils.parse_gin_flags([str(folder)], ["values.gin"], [])
    assert gin_utils.macro("NET") == 1
    with pytest.raises(errors.UserError, match="no gin file sets MODEL; is it a file of gin/models/"):
        gin_utils.macro("MODEL")
    # The end of another's name is none.
    with pytest.raises(errors.UserError, match="no gin file sets ET"):
        gin_utils.macro("ET")
    with pytest.raises(errors.UserError, match="FIT must be 'resize' or .*, got the text 'banana'"):
        gin_utils.macro("FIT", "fit", str)
    with pytest.raises(errors.UserError, match="IMAGE_SIDE must be a whole number from 1 to 8192, got 0"):
        gin_utils.macro("IMAGE_SIDE", "task_feature_lengths[image]", int)


def test_the_shipped_files_are_found_beside_folders_of_their_names(tmp_path):
    """Gin takes the quickstart's folder `runs/`, in the working directory, for a package."""
    for folder in ("runs", "experiments", "models"):
        (tmp_path / folder).mkdir()
    result = subprocess.run(
        [
            *(sys.executable, "-m", "richhf_jax.train", "--dry_run"),
            *("--gin_file=experiments/quickstart.gin", "--gin.MODEL_DIR=/nowhere"),
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "MODEL_DIR = '/nowhere'" in result.stdout


def test_a_logged_text_acts_on_no_terminal():
    record = logging.makeLogRecord({"msg": "%s:\n%s", "args": ("a\x1b[31m", "b\x9b")})
    assert gin_utils._Formatter("%(message)s").format(record) == "a\\x1b[31m:\nb\\x9b"
