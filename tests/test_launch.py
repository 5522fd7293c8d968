"""The scripts of launch/ with a stand-in for Python, and linters on all files of launch/."""

import os
import pathlib
import re
import signal
import subprocess
import sys

import dockerfile_parse
import pytest
import yaml

import richhf_jax

LAUNCH = pathlib.Path(richhf_jax.__file__).resolve().parents[1] / "launch"
TOOLS = pathlib.Path(sys.executable).parent

# Passes the check of its version; writes a report where evaluation would.
FAKE_PYTHON = """#!/usr/bin/env bash
[[ $1 == -c ]] && exit
echo "$*" >>"$LOG"
echo "tunables: $GLIBC_TUNABLES"
if [[ $2 == launch.in_turn ]]; then
  for argument; do
    [[ $argument == --gin.MODEL_DIR=* ]] && model_dir=${argument#*=}
  done
  mkdir -p "${model_dir//\\"/}/inference_eval/task/test/1"
  echo page >"${model_dir//\\"/}/inference_eval/task/test/1/report.html"
fi
[[ $2 != "$FAIL" ]]
"""


@pytest.fixture
def venv(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "venv/bin").mkdir(parents=True)
    log_call = '#!/usr/bin/env bash\necho "$(basename "$0") $*" >>"$LOG"\n'
    for name, text in (("python", FAKE_PYTHON), ("ruff", log_call), ("basedpyright", log_call)):
        script = tmp_path / "venv/bin" / name
        script.write_text(text)
        script.chmod(0o755)
    return tmp_path / "venv"


def launch(script: str, venv: pathlib.Path, *args: str, fail: str = "") -> tuple[int, str, list[str]]:
    """Runs a script; returns exit code, stdout and stderr, and the commands that it ran."""
    log = venv.parent / "log"
    log.unlink(missing_ok=True)
    result = subprocess.run(
        ["bash", str(LAUNCH / script), *args],
        cwd=venv.parent,
        env=os.environ | {"VENV": str(venv), "LOG": str(log), "FAIL": fail},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return result.returncode, result.stdout, log.read_text().splitlines() if log.exists() else []


def test_quickstart_runs_its_parts_in_order(venv):
    out = venv.parent / "my run"
    code, output, commands = launch("quickstart.sh", venv, "--out", "my run", "--gin.BATCH_SIZE=2")
    assert code == 0
    install, training, use = commands
    assert install.endswith(f"--editable {LAUNCH.parent}[train]")
    flags = f"--tfds_data_dir={out}/data"
    imports = "richhf_jax.training_log,richhf_jax.split_predictions,tasks"
    assert training.split(" --then ") == [
        f"-m launch.in_turn {imports} 1/6 data sets richhf_jax.datasets --data_dir={out}/data",
        "2/6 pretraining on captions richhf_jax.train --gin_file=experiments/quickstart_pretrain.gin"
        f' --gin.MODEL_DIR="{out}/pretrain" {flags} --gin.BATCH_SIZE=2',
        "3/6 finetuning richhf_jax.train --gin_file=experiments/quickstart.gin"
        f' --gin.MODEL_DIR="{out}/finetune" {flags} --gin.INITIAL_CHECKPOINT_PATH="{out}/pretrain"'
        " --gin.BATCH_SIZE=2",
        "4/6 evaluation richhf_jax.eval --gin_file=experiments/quickstart.gin"
        f' --gin.MODEL_DIR="{out}/finetune" {flags} --gin.INITIAL_CHECKPOINT_PATH="{out}/pretrain"'
        " --gin.BATCH_SIZE=2",
    ]
    assert use.split(" --then ") == [
        "-m launch.in_turn richhf_jax.predict.pipeline,richhf_jax.export.program"
        " 5/6 prediction richhf_jax.predict"
        f" --checkpoint={out}/finetune --out={out}/predictions --overlay"
        " docs/example.png --prompt=two large blue crosses and a green star",
        f"6/6 export richhf_jax.export --checkpoint={out}/finetune --to=stablehlo --out={out}/exported",
    ]
    assert output.endswith(f"open {out}/report.html\n")
    assert (out / "report.html").read_text() == "page\n"


@pytest.mark.parametrize(("given", "used"), [("", "glibc.malloc.hugetlb=1"), ("glibc.malloc.hugetlb=0",) * 2])
def test_quickstart_asks_for_huge_pages(venv, monkeypatch, given, used):
    monkeypatch.setenv("GLIBC_TUNABLES", given)
    output = launch("quickstart.sh", venv, "--out=out")[1]
    assert re.findall("tunables: (.*)", output)[-1] == used  # pip ran before.


def test_quickstart_fails_if_a_part_does_and_keeps_earlier_results(venv):
    earlier = venv.parent / "out/predictions/earlier"
    earlier.parent.mkdir(parents=True)
    earlier.touch()
    code, output, commands = launch("quickstart.sh", venv, "--out=out", fail="launch.in_turn")
    assert code == 1
    assert "report.html" not in output
    assert len(commands) == 2  # pip and training
    assert earlier.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_quickstart_alone_ends_the_running_part(venv, number):
    python = venv / "bin/python"
    waits = "[[ $2 == launch.in_turn ]] && { echo running; exec sleep 30; }"
    python.write_text(python.read_text().replace('echo "$*"', f'{waits}\necho "$*"'))
    command = ["bash", str(LAUNCH / "quickstart.sh"), "--out=out"]
    env = os.environ | {"VENV": str(venv), "LOG": str(venv / "log"), "FAIL": ""}
    with subprocess.Popen(command, env=env, cwd=venv.parent, stdout=subprocess.PIPE, text=True) as program:
        assert "running\n" in iter(program.stdout.readline, "")
        program.send_signal(number)
        assert program.stdout.read() == "stopped; the same command continues\n"
    assert program.returncode == 130


def test_what_a_quickstart_before_predicted_and_exported_is_made_anew(venv):
    stale = venv.parent / "out/exported/stale"
    stale.parent.mkdir(parents=True)
    stale.touch()
    assert launch("quickstart.sh", venv, "--out=out")[0] == 0
    assert not stale.exists()


def test_packages_are_installed_again_only_when_setup_py_changed(venv):
    def run() -> list[str]:
        return launch("quickstart.sh", venv, "--out=out")[2]

    assert "pip install" in run()[0]
    assert not any("pip install" in command for command in run())
    (venv / ".installed-train").write_text("of another setup.py\n")
    assert "pip install" in run()[0]
    assert not any("pip install" in command for command in run())


def test_an_install_that_failed_is_done_again(venv):
    assert launch("quickstart.sh", venv, "--out=out", fail="pip")[0] == 1
    assert "pip install" in launch("quickstart.sh", venv, "--out=out")[2][0]


def test_test_sh_checks_then_tests(venv):
    code, _, commands = launch("test.sh", venv, "tests/network", "-k", "a or b")
    assert code == 0
    assert commands[0].endswith(f"--editable {LAUNCH.parent}[test]")
    assert commands[1:] == [
        "ruff check .",
        "ruff format --check .",
        f"basedpyright --pythonpath {venv}/bin/python",
        "-m pytest -n 2 --dist loadfile tests/network -k a or b",
    ]


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
def test_help(venv, script):
    code, output, commands = launch(script, venv, "--help")
    assert code == 0
    assert output.startswith(f"Usage: bash launch/{script} ")
    assert commands == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--steps=3"], "quickstart.sh: what is '--steps=3'? See --help"),
        (["--gin.STEPS"], "what is '--gin.STEPS'?"),
        (["--out"], "--out needs a value"),
        (["--python", "/no/python"], "/no/python is no Python 3.11, 3.12 or 3.13 with the venv module"),
    ],
)
def test_mistakes(venv, args, message):
    (venv / "bin/python").unlink()
    code, output, commands = launch("quickstart.sh", venv, *args)
    assert code == 1
    assert message in output
    assert commands == []


def test_paths_may_hold_spaces_and_cd_goes_nowhere_else(venv, monkeypatch):
    (venv.parent / "my python").mkdir()
    python = (venv / "bin/python").rename(venv.parent / "my python/python")
    monkeypatch.setenv("CDPATH", str(LAUNCH.parent))
    _, output, commands = launch("quickstart.sh", venv, f"--python={python}")
    assert commands[:2] == ["--version", f"-m venv --clear {venv}"], output
    shown = subprocess.run(
        ["bash", "-c", 'source launch/setup_venv.sh && echo "$root $venv"'],
        cwd=LAUNCH.parent, env=os.environ | {"VENV": "a b"}, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert shown == f"{LAUNCH.parent} {LAUNCH.parent}/a b\n"


def lint(tool: str, *args: str, stdin: str = "") -> str:
    """Returns the output of a linter of the test packages."""
    command = [str(TOOLS / tool), *args]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False).stdout


# Fields that SkyPilot 0.14's task schema has, those that are used here.
TASK = {"name": str, "workdir": str, "resources": dict, "envs": dict, "setup": str, "run": str}
RESOURCES = {
    "infra": str,
    "accelerators": str,
    "accelerator_args": dict,
    "use_spot": bool,
    "disk_size": int,
    "job_recovery": dict,
}


@pytest.mark.parametrize("name", ["tpu", "gpu"])
def test_sky_tasks(name):
    task = yaml.safe_load((LAUNCH / f"sky/{name}.yaml").read_text())
    for fields, schema in ((task, TASK), (task["resources"], RESOURCES)):
        assert {field: type(value) for field, value in fields.items()}.items() <= schema.items()
    assert task["envs"] == {"TRAINING_ARGUMENTS": None}
    for script in (task["setup"], task["run"]):
        assert lint("shellcheck", "--shell=bash", "-", stdin=script) == ""


def test_shellcheck():
    scripts = sorted(str(path) for path in LAUNCH.glob("*.sh"))
    assert lint("shellcheck", "--external-sources", "--source-path=SCRIPTDIR", *scripts) == ""


@pytest.mark.parametrize("name", ["tpu", "cuda"])
def test_dockerfiles(name):
    path = LAUNCH / f"docker/Dockerfile.{name}"
    assert lint("hadolint", "--no-color", str(path)) == ""
    with path.open("rb") as file:
        parsed = dockerfile_parse.DockerfileParser(fileobj=file)
        assert parsed.baseimage == "python:3.11-slim"
        steps = [(step["instruction"], step["value"]) for step in parsed.structure]
    installs = [value for instruction, value in steps if instruction == "RUN" and "pip" in value]
    assert f"'.[train,gcs,{name}]'" in installs[0]
    users = [value for instruction, value in steps if instruction in ("USER", "ARG")]
    assert users[-1] in ("1000", "$USER")
    assert re.search(r"richhf_jax\.train", dict(steps)["ENTRYPOINT"])


def test_gpu_check_runs_with_a_python_that_has_jax(venv):
    code, _, commands = launch("gpu_check.sh", venv, "--tiny", "--out=my out")
    assert (code, commands) == (0, ["-m richhf_jax.benchmarks.gpu_check --tiny --out=my out"])


def test_gpu_check_without_jax(venv, monkeypatch):
    monkeypatch.setenv("PYTHON", "/bin/false")
    code, output, commands = launch("gpu_check.sh", venv)
    assert (code, commands) == (1, [])
    assert "with jax among: /bin/false; name one with PYTHON=" in output
