"""The launchers for clouds and clusters, with stand-ins for the tools that they call.

The output of `--dry-run` is in golden/. To update a file, replace it by the output of the failing test.
"""

import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest
import yaml

import richhf_jax

ROOT = pathlib.Path(richhf_jax.__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"

# All that a shell could break, in gin's own syntax and beyond.
TRAINING = [
    "--gin_file=experiments/rich_hf_18k.gin",
    "--gin.MODEL_DIR=gs://bucket/run",
    "--gin.TASK_FEATURE_LENGTHS={'image': 512, \"texts\": 1}",
    '--gin.NAME="it\'s 5 $HOME; `id` \\\\ * ~ #"',
    "--tfds_data_dir=gs://bucket/data",
]
ARGUMENTS = {
    "tpu_vm": ["--name=mine", "--zone=us-west4-a", "--type=v5litepod-16", "--spot"],
    "xpk": ["--cluster=ours", "--tpu-type=v5litepod-16", "--image=gcr.io/p/richhf_jax", "--num-slices=2"],
    "sky": ["--accelerators=H100:8", "--num-nodes=2"],
    "slurm": ["--nodes=2", "--time=24:00:00", "--shared=SHARED"],
}
PARTITIONING = {"tpu_vm": "v5e_16", "xpk": "v5e_16", "sky": "gpu_cluster", "slurm": "gpu_cluster"}

# Notes how it was called: its name and arguments, each ended by a zero byte, then a line break. gcloud also
# plays the cloud: `state` is the VMs' state, `codes` the exit codes of the trainings to come, one a line.
FAKE_TOOL = r"""#!/usr/bin/env bash
printf '%s\0' "${0##*/}" "$@" >>"$FAKES/calls"
echo >>"$FAKES/calls"
case "$*" in
  *" describe "*) cat "$FAKES/state" 2>/dev/null || exit 1 ;;
  *" create "*) echo ACTIVE >"$FAKES/state" ;;
  *" delete "*) rm -f "$FAKES/state" ;;
  *restartable.sh*)
    code=$(head -n 1 "$FAKES/codes" 2>/dev/null)
    sed -i 1d "$FAKES/codes" 2>/dev/null
    ((${code:-0} == 143)) && echo SUSPENDED >"$FAKES/state"
    exit "${code:-0}" ;;
esac
exit 0
"""
TOOLS = ("gcloud", "docker", "xpk", "sky", "sbatch", "srun", "scontrol", "sleep", "python")


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> pathlib.Path:
    """Makes a repository with the launchers and gin files, all committed."""
    root = tmp_path_factory.mktemp("my clone")
    for name in ("launch", "gin"):
        shutil.copytree(ROOT / name, root / name)
    (root / ".gitignore").write_text("build/\n")
    # The stand-in for what install.sh would make.
    python = root / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(FAKE_TOOL)
    python.chmod(0o755)
    (root / "setup.py").write_text("")
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
    for command in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", *command], cwd=root, check=True)
    return root


class Fakes:
    """Stand-ins on the PATH, and the calls that they got."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        (folder / "bin").mkdir()
        for tool in TOOLS:
            (folder / "bin" / tool).write_text(FAKE_TOOL)
            (folder / "bin" / tool).chmod(0o755)
        # Not the environment that $VENV names: the jobs use that of the repository.
        kept = {name: value for name, value in os.environ.items() if name != "VENV"}
        self.env = kept | {"FAKES": str(folder), "PATH": f"{folder}/bin:{os.environ['PATH']}"}

    def run(self, command: list[str], **kwargs) -> subprocess.CompletedProcess:
        kwargs.setdefault("env", self.env)
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, **kwargs)

    def calls(self) -> list[list[str]]:
        """Returns name and arguments of each call since the last time."""
        file = self.folder / "calls"
        text = file.read_text() if file.exists() else ""
        file.unlink(missing_ok=True)
        return [call.split("\0") for call in text.split("\0\n")[:-1]]


@pytest.fixture
def fakes(tmp_path: pathlib.Path) -> Fakes:
    return Fakes(tmp_path)


def launch(fakes: Fakes, repository: pathlib.Path, name: str, *args: str) -> subprocess.CompletedProcess:
    return fakes.run(["bash", str(repository / f"launch/{name}.sh"), *args], cwd=fakes.folder)


def arguments(fakes: Fakes, name: str) -> list[str]:
    return [arg.replace("SHARED", f"{fakes.folder}/shared") for arg in ARGUMENTS[name]]


def dry_run(fakes: Fakes, repository: pathlib.Path, name: str, training: list[str]) -> str:
    result = launch(fakes, repository, name, *arguments(fakes, name), "--dry-run", *training)
    assert result.returncode == 0, result.stderr
    assert fakes.calls() == []
    return result.stdout


@pytest.mark.parametrize("name", list(ARGUMENTS))
def test_dry_run_prints_the_commands(fakes, repository, name):
    shown = dry_run(fakes, repository, name, TRAINING)
    commit = fakes.run(["git", "rev-parse", "HEAD"], cwd=repository).stdout.strip()
    places = (
        (commit, "COMMIT"),
        (commit[:12], "SHORT"),
        (str(repository), "ROOT"),
        (str(fakes.folder), "TMP"),
    )
    for value, placeholder in places:
        shown = shown.replace(value, placeholder)
    assert shown == (ROOT / f"tests/golden/{name}.txt").read_text()


def executed(fakes: Fakes, shown: str) -> list[list[str]]:
    """Returns the calls of a shell that runs the printed commands."""
    result = fakes.run(["bash", "-euo", "pipefail", "-c", shown], cwd=fakes.folder)
    assert result.returncode == 0, result.stderr
    return fakes.calls()


def flag(call: list[str], name: str) -> str:
    return next(arg.removeprefix(f"{name}=") for arg in call if arg.startswith(f"{name}="))


def last_command(name: str, call: list[str], fakes: Fakes, repository: pathlib.Path) -> tuple[str, str]:
    """Returns the command that the tool's last call starts on a training machine, and its folder."""
    commit = fakes.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=repository).stdout.strip()
    version = f"richhf_jax-{commit}"
    if name == "tpu_vm":
        home = fakes.folder / "home"
        home.mkdir()
        archive = repository / f"build/{version}.tar.gz"
        subprocess.run(["tar", "-xzf", str(archive), "-C", str(home)], check=True)
        return flag(call, "--command"), str(home)
    if name == "xpk":
        return f"({flag(call, '--command')}) & wait", str(repository / "build" / version)
    if name == "sky":
        fakes.env |= {"TRAINING_ARGUMENTS": flag(call, "--env").removeprefix("TRAINING_ARGUMENTS=")}
        fakes.env |= {"SKYPILOT_NUM_NODES": "1"}
        return yaml.safe_load(pathlib.Path(call[-1]).read_text(encoding="utf-8"))["run"], flag(
            call, "--workdir"
        )
    return pathlib.Path(call[-1]).read_text(encoding="utf-8"), "/"


@pytest.mark.parametrize("name", list(ARGUMENTS))
def test_arguments_arrive_as_they_were_given(fakes, repository, name):
    calls = executed(fakes, dry_run(fakes, repository, name, TRAINING))
    if name == "tpu_vm":
        calls.pop()  # It deletes the VMs.
    command, folder = last_command(name, calls[-1], fakes, repository)
    result = fakes.run(["bash", "-c", command], cwd=folder)
    assert result.returncode == 0, result.stderr
    *_, call = fakes.calls()
    start = call.index("richhf_jax.train")
    assert call[start - 1] == "-m"
    assert call[start + 1 :] == [*TRAINING, f"--gin_file=partitioning/{PARTITIONING[name]}.gin"]


@pytest.mark.parametrize("name", ["xpk", "sky", "slurm"])
def test_it_runs_what_dry_run_prints(fakes, repository, name):
    expected = executed(fakes, dry_run(fakes, repository, name, TRAINING))
    shutil.rmtree(fakes.folder / "shared", ignore_errors=True)  # An installed version isn't installed again.
    result = launch(fakes, repository, name, *arguments(fakes, name), *TRAINING)
    assert result.returncode == 0, result.stderr
    assert fakes.calls() == expected


def test_flags_of_other_names_and_the_users_own_partitioning(fakes, repository):
    training = [
        "--gin_file",
        "partitioning/cpu.gin",
        *TRAINING,
        "--",
        "--verbosity=1",
        "--gin_bindings=A = 1",
    ]
    calls = executed(fakes, dry_run(fakes, repository, "sky", training))
    result = fakes.run(["bash", "-c", f"printf '%s\\n' {flag(calls[-1], '--env').split('=', 1)[1]}"])
    own = ["--gin_file=partitioning/cpu.gin", *TRAINING, "--verbosity=1", "--gin_bindings=A = 1"]
    assert result.stdout.splitlines() == own


def vm_calls(fakes: Fakes) -> list[str]:
    """Returns the actions on the VMs, in order."""
    verbs = []
    for call in fakes.calls():
        trains = any("restartable.sh" in arg for arg in call)
        verbs += ["train"] if trains else [call[4]] if call[0] == "gcloud" and call[4] != "describe" else []
    return verbs


_ROUND = ["create", "scp", "ssh", "train"]


@pytest.mark.parametrize(
    ("codes", "exit_code", "verbs"),
    [
        ([0], 0, [*_ROUND, "delete"]),
        ([143, 143, 0], 0, [*_ROUND, "delete", *_ROUND, "delete", *_ROUND, "delete"]),
        ([255, 0], 0, [*_ROUND, "delete", *_ROUND, "delete"]),
        ([1, 0], 1, [*_ROUND, "delete"]),
        ([143] * 4, 1, [*_ROUND, "delete"] * 4),
    ],
    ids=["done", "preempted twice", "connection lost", "a mistake", "too often"],
)
def test_tpu_vms_are_asked_for_again(fakes, repository, codes, exit_code, verbs):
    (fakes.folder / "codes").write_text("".join(f"{code}\n" for code in codes))
    flags = [*ARGUMENTS["tpu_vm"], "--max-restarts=3"]
    result = launch(fakes, repository, "tpu_vm", *flags, *TRAINING)
    assert result.returncode == exit_code, result.stderr
    assert vm_calls(fakes) == verbs
    if exit_code:
        assert f"training ended with exit code {codes[-1] or 1} after" in result.stderr


def test_tpu_vms_that_are_there_already_are_left_alone(fakes, repository):
    (fakes.folder / "state").write_text("ACTIVE\n")
    result = launch(fakes, repository, "tpu_vm", *ARGUMENTS["tpu_vm"], *TRAINING)
    assert result.returncode == 1
    assert "a queued resource mine is there already" in result.stderr
    assert vm_calls(fakes) == []
    result = launch(fakes, repository, "tpu_vm", *ARGUMENTS["tpu_vm"][:2], "--delete")
    assert (result.returncode, vm_calls(fakes)) == (0, ["delete"])


def test_tpu_slices(fakes, repository):
    flags = ["--name=mine", "--zone=z", "--type=v6e-64", "--node-count=4", "--reserved", "--keep"]
    assert launch(fakes, repository, "tpu_vm", *flags, *TRAINING).returncode == 0
    calls = fakes.calls()
    create = next(call for call in calls if "create" in call)
    assert create[5:] == [
        *("mine", "--zone=z", "--accelerator-type=v6e-64", "--runtime-version=v2-alpha-tpuv6e"),
        *("--node-count=4", "--node-prefix=mine", "--reserved"),
    ]
    assert "delete" not in calls[-1]


def test_sky_writes_the_tpu_into_its_task(fakes, repository):
    assert (
        launch(fakes, repository, "sky", "--accelerators=tpu-v6e-8", "--no-spot", *TRAINING).returncode == 0
    )
    (call,) = fakes.calls()
    assert "--no-use-spot" in call
    assert "partitioning/v6e_8.gin" in flag(call, "--env")
    resources = yaml.safe_load(pathlib.Path(call[-1]).read_text(encoding="utf-8"))["resources"]
    assert resources["accelerators"] == "tpu-v6e-8"
    assert resources["accelerator_args"] == {"runtime_version": "v2-alpha-tpuv6e"}


def test_sky_tells_each_machine_who_it_is(fakes, repository):
    run = yaml.safe_load((LAUNCH / "sky/gpu.yaml").read_text())["run"]
    fakes.env |= {
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8",
    }
    result = fakes.run(
        ["bash", "-c", run], cwd=repository, env=fakes.env | {"TRAINING_ARGUMENTS": "--a '--b=1 2'"}
    )
    assert result.returncode == 0, result.stderr
    (call,) = fakes.calls()
    processes = ["--coordinator_address=10.0.0.7:8476", "--process_count=2", "--process_index=1"]
    assert call[3:] == ["--a", "--b=1 2", *processes]


@pytest.mark.parametrize(
    ("accelerator", "file"),
    [
        *(("v4-32", "v4_32"), ("v5litepod-4", "v5e_4"), ("v5litepod-16", "v5e_16")),
        *(("v5litepod-256", "v5e_256"), ("v5p-8", "v5p_8"), ("v6e-8", "v6e_8"), ("v6e-64", "v6e_64")),
    ],
)
def test_each_tpu_has_its_partitioning(fakes, repository, accelerator, file):
    flags = ["--name=mine", "--zone=z", f"--type={accelerator}", "--dry-run"]
    result = launch(fakes, repository, "tpu_vm", *flags, *TRAINING)
    assert f"--gin_file=partitioning/{file}.gin" in result.stdout, result.stderr


@pytest.mark.parametrize(
    ("nodes", "gpus", "file"), [("1", "1", "gpu_1"), ("1", "8", "gpu_8"), ("2", "4", "gpu_cluster")]
)
def test_gpus_have_their_partitioning(fakes, repository, nodes, gpus, file):
    flags = [f"--nodes={nodes}", f"--gpus-per-node={gpus}", f"--shared={fakes.folder}", "--dry-run"]
    result = launch(fakes, repository, "slurm", *flags, *TRAINING)
    assert f"--gin_file=partitioning/{file}.gin" in result.stdout, result.stderr


@pytest.mark.parametrize(
    ("code", "calls"), [(0, []), (1, []), (137, []), (143, [["scontrol", "requeue", "7"]])]
)
def test_slurm_job_that_was_told_to_stop_queues_again(fakes, repository, code, calls):
    assert launch(fakes, repository, "slurm", *arguments(fakes, "slurm"), *TRAINING).returncode == 0
    script = fakes.calls()[-1][-1]
    (fakes.folder / "bin/srun").write_text(f"#!/usr/bin/env bash\nexit {code}\n")
    assert fakes.run(["bash", script], env=fakes.env | {"SLURM_JOB_ID": "7"}).returncode == code
    assert fakes.calls() == calls


@pytest.mark.parametrize("code", [0, 1, 137])
def test_restartable_has_the_commands_exit_code(fakes, code):
    restartable = str(LAUNCH / "restartable.sh")
    assert fakes.run(["bash", restartable, "bash", "-c", f"exit {code}"]).returncode == code


def test_restartable_that_was_told_to_stop_lets_the_command_end(fakes, tmp_path):
    # As training does: saves, which takes a while, and exits with 0.
    program = """
import pathlib, signal, sys, time
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
print("runs", flush=True)
signal.sigwait({signal.SIGTERM})
time.sleep(0.5)
pathlib.Path(sys.argv[1]).touch()
"""
    saved = tmp_path / "saved"
    command = ["bash", str(LAUNCH / "restartable.sh"), sys.executable, "-c", program, str(saved)]
    with subprocess.Popen(command, env=fakes.env, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout.readline() == "runs\n"
        job.send_signal(signal.SIGTERM)
        assert job.wait(timeout=60) == 143
        assert saved.exists()


def test_install_takes_another_python_where_there_is_none(fakes, repository, tmp_path):
    # python3 is too old, but has pip; uv makes the environment.
    makes = 'if [[ $2 == uv ]]; then mkdir -p "$VENV/bin"; ln -s "$(type -p python)" "$VENV/bin/python"; fi'
    script = f'#!/usr/bin/env bash\n[[ $1 == -c ]] && exit 1\necho "$*" >>"$FAKES/log"\n{makes}\n'
    (fakes.folder / "bin/python3").write_text(script)
    (fakes.folder / "bin/python3").chmod(0o755)
    env = fakes.env | {"VENV": str(tmp_path / "venv"), "PYTHON": "python3"}
    result = fakes.run(["bash", str(repository / "launch/install.sh"), "train,gcs,tpu"], env=env)
    assert result.returncode == 0, result.stderr
    log = (fakes.folder / "log").read_text().splitlines()
    assert log[0] == "-m pip install --quiet --user uv"
    assert log[1].startswith("-m uv venv ")
    assert fakes.calls()[-1][-1] == f"{repository}[train,gcs,tpu]"


@pytest.mark.parametrize("name", list(ARGUMENTS))
def test_help(fakes, name):
    result = launch(fakes, ROOT, name, "--help")
    assert result.returncode == 0
    assert result.stdout.startswith(f"Usage: bash launch/{name}.sh ")
    assert "--dry-run" in result.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--gin_file=experiments/rich_hf_18k.gin"], "give --gin.MODEL_DIR=gs://BUCKET/FOLDER"),
        (TRAINING[1:], "give --gin_file=FILE"),
        ([*TRAINING, "--gin.MODEL_DIR=runs/mine"], "--gin.MODEL_DIR=runs/mine is a folder of one machine"),
        (
            [*TRAINING, '--gin.MODEL_DIR="/data/mine"'],
            "--gin.MODEL_DIR=/data/mine is a folder of one machine",
        ),
        ([*TRAINING, "--tfds_data_dir=/data"], "--tfds_data_dir=/data is a folder of one machine"),
        ([*TRAINING, "--gin_file=mine.gin"], "mine.gin is not in commit "),
        ([*TRAINING, "--zone=z", "--steps=3"], "what is '--steps=3'? See --help"),
        ([*TRAINING, "--zone"], "--zone needs a value"),
        ([*TRAINING, "--spot=1"], "--spot takes no value"),
        ([*TRAINING, "--type=v5litepod-12"], "there is no gin/partitioning/v5e_12.gin"),
        ([*TRAINING, "--type="], "give --type"),
        ([*TRAINING, "--commit=nope"], "there is no commit nope"),
        ([*TRAINING, "--gin.A='b\nc'"], "an argument can't have several lines"),
    ],
)
def test_mistakes(fakes, repository, args, message):
    result = launch(fakes, repository, "tpu_vm", *ARGUMENTS["tpu_vm"], *args)
    assert result.returncode == 1
    assert message in result.stderr
    assert [call for call in fakes.calls() if "describe" not in call] == []


def test_slurm_takes_a_shared_folder(fakes, repository):
    shared = ["--gin.MODEL_DIR=/shared/me/run", "--gin_file=experiments/rich_hf_18k.gin", "--dry-run"]
    assert launch(fakes, repository, "slurm", "--nodes=2", "--shared=/shared/me", *shared).returncode == 0
    result = launch(fakes, repository, "slurm", "--nodes=2", "--shared=/shared/mine", *shared)
    assert "or a folder under --shared=/shared/mine" in result.stderr


def test_what_is_not_committed_does_not_run(fakes, repository):
    (repository / "new.gin").touch()
    try:
        result = launch(fakes, repository, "xpk", *ARGUMENTS["xpk"], "--dry-run", *TRAINING)
        assert (result.returncode, "?? new.gin" in result.stderr) == (1, True)
        flags = [*ARGUMENTS["xpk"], "--commit=HEAD", "--dry-run"]
        assert launch(fakes, repository, "xpk", *flags, *TRAINING).returncode == 0
    finally:
        (repository / "new.gin").unlink()
