"""The GPU check: its scheduler with stand-ins for jobs, its command, and a few of its jobs on the CPU."""

import contextlib
import importlib.util
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
import zipfile
from typing import Any

import numpy as np
import pytest

import richhf_jax
from richhf_jax import errors, feedback
from richhf_jax.benchmarks import attention
from richhf_jax.benchmarks.gpu_check import __main__ as gpu_check
from richhf_jax.benchmarks.gpu_check import carried, machine, model, parts, plan, turns, uses
from richhf_jax.benchmarks.gpu_check.context import Context

ROOT = pathlib.Path(richhf_jax.__file__).resolve().parents[1]
BLOCKED = (
    "tensorflow",
    "tensorflow_text",
    "tensorflow_datasets",
    "seqio",
    "ml_collections",
    "t5",
    "transformers",
)


def job(name: str, code: str, limit: float = 30, after: tuple[str, ...] = ()) -> turns.Job:
    """Makes a job of lines of Python, which have a `turn`."""
    start = "import os, sys, time\nfrom richhf_jax.benchmarks.gpu_check import turns\nturn = turns.Turn()\n"
    return turns.Job(name, [sys.executable, "-c", start + textwrap.dedent(code)], limit, after)


class Run:
    """A run of jobs, and what it told."""

    def __init__(self, folder: pathlib.Path, *jobs: turns.Job, parallel: int = 4, seconds: float = 60):
        self.figures: list[tuple[str, str, Any]] = []
        self.times: list[float] = []
        begin = time.monotonic()

        def tell(name, message):
            self.figures.append((name, message["figure"], message["value"]))
            self.times.append(time.monotonic() - begin)

        env = os.environ | {"PYTHONPATH": str(ROOT), "FOLDER": str(folder)}
        scheduler = turns.Scheduler(jobs, parallel, tell, folder, env, folder)
        scheduler.run(seconds)
        self.seconds = time.monotonic() - begin
        self.outcomes = scheduler.outcomes


def test_jobs_that_hang_or_fail_do_not_stop_the_others(tmp_path):
    run = Run(
        tmp_path,
        job("hangs", "turn.figure('seen', 1)\ntime.sleep(99)", limit=1.5),
        job("fails", "print('on the way')\nraise ValueError('broken kernel')"),
        job("skips", "turn.skip('no GPU')"),
        job("works", "with turn.device(): turn.figure('rate', 2.5, 'images/s')", after=("hangs",)),
        parallel=3,
    )
    assert run.outcomes["hangs"] == "skipped: it took more than its 2 s"
    assert run.outcomes["fails"].startswith("failed with exit code 1: ")
    assert run.outcomes["fails"].endswith("ValueError: broken kernel")
    assert run.outcomes["skips"] == "skipped: no GPU"
    assert run.outcomes["works"] == "done"
    assert set(run.figures) == {("hangs", "seen", 1), ("works", "rate", 2.5)}


def test_the_time_is_over(tmp_path):
    run = Run(
        tmp_path,
        job("long", "turn.figure('early', 1)\ntime.sleep(99)"),
        job("never", "turn.figure('late', 1)"),
        parallel=1,
        seconds=1.5,
    )
    assert run.outcomes == {
        "long": "stopped: the time was over",
        "never": "not started: the time was over",
    }
    assert run.figures == [("long", "early", 1)]
    assert run.times[0] < 1.4  # At once, and not with the job's end.
    assert run.seconds < 5


COUNT = """
    path = os.path.join(os.environ["FOLDER"], "counter")
    begin, count = time.monotonic(), 0
    with turn.span("counting"):
        while not os.path.exists(os.path.join(os.environ["FOLDER"], "measured")):
            count += 1
            with open(path, "w") as file:
                file.write(str(count))
            time.sleep(0.01)
    turn.figure("wall", time.monotonic() - begin)
"""
MEASURE = """
    path = os.path.join(os.environ["FOLDER"], "counter")
    while not os.path.exists(path): time.sleep(0.01)
    def read():
        first = os.stat(path).st_mtime_ns
        time.sleep(0.6)
        return os.stat(path).st_mtime_ns != first
    turn.figure("counts before", read())
    with turn.device():
        turn.figure("counts with the device taken", read())
        with turn.quiet():
            turn.figure("counts in the quiet", read())
        turn.figure("counts after", read())
    open(os.path.join(os.environ["FOLDER"], "measured"), "w").close()
"""


def test_other_jobs_are_paused_while_one_measures(tmp_path):
    run = Run(tmp_path, job("counter", COUNT), job("measure", MEASURE))
    told = {figure: value for _, figure, value in run.figures}
    whens = ("before", "with the device taken", "in the quiet", "after")
    assert [told[f"counts {when}"] for when in whens] == [True, True, False, True]
    # The pause isn't among the seconds of the job that was paused.
    assert 0.6 <= told["wall"] - told["counting"] < 1.5
    assert set(run.outcomes.values()) == {"done"}


def test_a_job_is_not_paused_before_it_ends_with_its_parent(tmp_path):
    """Otherwise it would stay, stopped, if the check is killed meanwhile."""
    asks = "with turn.device(), turn.quiet(): turn.figure('started', os.path.exists('young'))"
    starts = "turns.end_with_parent()\nopen('young', 'w').close()"
    run = Run(tmp_path, job("asks", asks), job("young", starts), parallel=1)
    assert run.figures == [("asks", "started", True)]
    assert set(run.outcomes.values()) == {"done"}


def test_a_job_has_not_ended_before_its_process_has(tmp_path, monkeypatch):
    """It may be paused on its way out, which takes JAX a while."""
    monkeypatch.setattr(turns, "_EXIT_SECONDS", 0.3)
    ends = "turn.figure('last', 1)\ndel turn\nopen('ending', 'w').close()\ntime.sleep(0.5)"
    measures = """
        while not os.path.exists("ending"): time.sleep(0.01)
        with turn.device(), turn.quiet(): time.sleep(1)
    """
    run = Run(tmp_path, job("ends", ends), job("measures", measures))
    assert run.outcomes == {"measures": "done", "ends": "done"}


def test_the_device_is_one_jobs_at_a_time_in_order(tmp_path):
    start = """
        def path(name): return os.path.join(os.environ["FOLDER"], name)
        def touch(name): open(path(name), "w").close()
        def wait(name):
            while not os.path.exists(path(name)): time.sleep(0.01)
    """
    hold = (
        start
        + """
        with turn.device():
            touch("taken")
            wait("second"), wait("third")
            time.sleep(0.5)
    """
    )
    measure = (
        start
        + """
        wait("taken"), wait({first!r})
        touch({name!r})
        with turn.device():
            turn.figure("begin", time.monotonic())
            time.sleep(0.2)
            turn.figure("images a second", {rate}, against={against!r})
            turn.figure("end", time.monotonic())
    """
    )
    run = Run(
        tmp_path,
        job("holds", hold),
        # It asks after the third, but it comes first.
        job("second", measure.format(first="third", name="second", rate=4, against=None)),
        job("third", measure.format(first="taken", name="third", rate=2, against="second")),
        job("dies", start + "    wait('third')\n        with turn.device(): os._exit(3)"),
    )
    at = {(name, figure): value for name, figure, value in run.figures}
    assert at["second", "end"] <= at["third", "begin"]
    assert at["third", "images a second: second / third"] == 2
    assert run.outcomes["dies"] == "failed with exit code 3: "


MAIN = """
import sys
from richhf_jax.benchmarks.gpu_check import __main__ as check, plan, turns
code = {code!r}
plan.jobs = lambda *_: [turns.Job("stand-in", [sys.executable, "-c", code], 60)]
check.main(["--tiny", "--out={out}", "--carry_mib=0"])
"""
STAND_IN = """
import os, time
from richhf_jax.benchmarks.gpu_check import turns
turns.end_with_parent()
turn = turns.Turn()
turn.figure("pid", os.getpid())
time.sleep(60)
"""


def is_running(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return "State:\tZ" not in pathlib.Path(f"/proc/{pid}/status").read_text("utf-8")
    return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_a_check_that_is_killed_has_written_its_figures(tmp_path, number):
    code = MAIN.format(code=STAND_IN, out=tmp_path / "out")
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            if "stand-in: pid" in line:
                break
        process.send_signal(number)
        rest = process.stdout.read()
    first, *others = map(json.loads, (tmp_path / "out/figures.jsonl").read_text().splitlines())
    assert (first["job"], first["figure"]) == ("stand-in", "pid")
    page = (tmp_path / "out/report.md").read_text()
    assert f"| stand-in | pid | {first['value']} |  |" in page
    for _ in range(100):
        if not is_running(first["value"]):
            break
        time.sleep(0.05)
    assert not is_running(first["value"])
    if number != signal.SIGKILL:
        assert "stand-in: stopped: it was interrupted" in rest
        assert others[-1]["figure"] == "outcome"


def test_a_check_that_loses_its_terminal_ends_well(tmp_path):
    command = [sys.executable, "-c", MAIN.format(code=STAND_IN, out=tmp_path / "out")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        while b"stand-in: pid" not in process.stdout.readline():
            pass
        process.stdout.close()
        process.send_signal(signal.SIGHUP)
        assert process.wait(30) == 1
    assert "\n| stand-in | stopped: it was interrupted |" in (tmp_path / "out/report.md").read_text()


def run_job(name: str, *arguments: str, parent: int = os.getpid()) -> subprocess.CompletedProcess[str]:
    """Runs a job of the tiny model as the check does, and tells what it imports."""
    command = [sys.executable, "-X", "importtime", "-m", plan.PROGRAM, name, "--size=tiny", *arguments]
    env = os.environ | {"PYTHONPATH": str(ROOT), turns._PARENT: str(parent)}
    # Not in the project's folder, where gin finds its files at once.
    return subprocess.run(command, env=env, cwd="/", capture_output=True, text=True, check=False)


def test_a_job_whose_check_was_killed_ends_before_it_imports_jax():
    result = run_job("versions", parent=1)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.endswith("the program that started this job has ended\n")
    assert "richhf_jax" in result.stderr
    assert "jax._src" not in result.stderr


@pytest.mark.parametrize(
    ("argument", "message"),
    [("NONSENSE=3", "NONSENSE: no gin file uses a macro"), ("SCAN_LAYERS=maybe", "SCAN_LAYERS must be")],
)
def test_every_job_refuses_a_wrong_gin_value_and_tells_nothing_else(argument, message):
    result = run_job("versions", f"--gin.{argument}")
    assert (result.returncode, result.stdout) == (1, "")
    told = [line for line in result.stderr.splitlines() if not line.startswith("import time:")]
    assert len(told) == 1
    assert message in told[0]


def test_compiled_programs_are_carried_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(carried, "_PART_BYTES", 40_000)
    monkeypatch.setattr(carried, "_SMALL", 5_000)
    cache, out, other = (tmp_path / name for name in ("cache", "out", "other"))
    for folder in (cache / "tuning", cache / "torch", out, other):
        folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    sizes = {"torch/kernel": 300, "old": 30_000, "large": 200_000, "new": 45_000, "tuning/kernel": 900}
    for age, (name, size) in enumerate(sizes.items()):
        (cache / name).write_bytes(rng.bytes(size))
        os.utime(cache / name, (age, age))
    assert carried.pack(cache, out, 110_000) == ["large (0.2 MiB)"]
    written = sorted(out.iterdir())
    assert [path.name for path in written] == [f"programs.tar.{i:02}" for i in range(len(written))]
    assert max(path.stat().st_size for path in written) <= 40_000
    assert sum(path.stat().st_size for path in written) <= 110_000
    for path in written:
        (other / path.name).write_bytes(path.read_bytes())
    (other / "programs").mkdir()
    (other / "programs/new").write_text("mine")
    assert carried.unpack(other, other / "programs") == 3
    assert (other / "programs/new").read_text() == "mine"
    for name in ("old", "tuning/kernel", "torch/kernel"):
        assert (other / "programs" / name).read_bytes() == (cache / name).read_bytes()
    # The next, smaller set replaces all parts. Of a part that is cut off, what is whole is taken.
    monkeypatch.setattr(carried, "_PART_BYTES", 60_000)
    assert carried.pack(cache, out, 44_500) == ["large (0.2 MiB)", "new (0.0 MiB)", "kernel (0.0 MiB)"]
    (part,) = out.iterdir()
    part.write_bytes(part.read_bytes()[:20_000])
    assert carried.unpack(out, out / "programs") == 1
    assert not (out / "programs/old").exists()


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_an_archive_that_reaches_out_of_the_folder_is_refused(tmp_path, kind):
    """Nothing is deleted, neither outside nor what a link of the same name would replace."""
    cache = tmp_path / "programs"
    cache.mkdir()
    (tmp_path / "victim").write_text("mine")
    (cache / "kept").write_text("mine, too")
    member = tarfile.TarInfo("../victim" if kind == tarfile.REGTYPE else "kept")
    member.type, member.linkname = kind, "/etc/passwd"
    with tarfile.open(tmp_path / "programs.tar.00", "w") as tar:
        tar.addfile(member)
    with pytest.raises(errors.UserError, match=rf"programs.tar.00: its member '{member.name}' is no file"):
        carried.unpack(tmp_path, cache)
    assert (tmp_path / "victim").read_text() == "mine"
    assert (cache / "kept").read_text() == "mine, too"


def test_plan():
    names = [one.name for one in plan.jobs("base")]
    assert names[:5] == ["versions", "ceilings", "numbers", "predict-8", "train-8"]
    assert names[-1] == "learn-300"
    assert {"torch-train-8", "part-optimizer", "command-512", "export", "train-8-cudnn"} < set(names)
    assert [one.name for one in plan.jobs("base", (), ["train", "export"])] == [
        "train-8", "train-16", "train-32", "export",
        "train-8-xla", "train-8-cudnn", "train-8-untuned", "train-8-notriton",
    ]  # fmt: skip
    for size in plan.SIZES:
        jobs = plan.jobs(size)
        assert {name for one in jobs for name in one.after} <= {one.name for one in jobs}


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: None)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no NVIDIA GPU here; --tiny"),
        (["--tiny", "--wheels=nowhere"], "--wheels=nowhere: there are no .whl files"),
    ],
)
def test_mistakes(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        gpu_check.main(arguments)


def test_other_mistakes(tmp_path, capsys):
    for argument, message in (
        ("--only=trian", "known: versions,"),
        *((f"--minutes={text}", "--minutes: it must be a number from 0.1") for text in ("0", "nan", "inf")),
        *((f"--jobs={text}", "--jobs: it must be a whole number from 1") for text in ("0", "1.5")),
        ("--carry_mib=-5", "--carry_mib: it must be a whole number from 0"),
    ):
        with pytest.raises(SystemExit):
            gpu_check.main([argument, "--dry-run"])
        assert message in capsys.readouterr().err
    (tmp_path / "figures.jsonl").touch()
    with pytest.raises(SystemExit, match="has the figures of another run"):
        gpu_check.main(["--tiny", f"--out={tmp_path}"])


def test_files_and_folders_in_each_others_place(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "cache/programs.tar.00").mkdir(parents=True)
    for name, message in (
        ("out", "file: can't make"),
        ("cache", "file/programs: can't make"),
        ("cache", "00: Is"),
    ):
        folder = tmp_path / ("cache" if message == "00: Is" else "file")
        with pytest.raises(SystemExit, match=message):
            gpu_check.main(["--tiny", f"--out={tmp_path / 'out'}", f"--{name}={folder}"])


def test_a_run_in_which_no_job_was_done_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "jobs", lambda *_: [job("skips", "turn.skip('no GPU')")])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(gpu_check, "_END_SIGNALS", ())  # They are those of pytest.
    with pytest.raises(SystemExit, match="no job was done"):
        gpu_check.main(["--tiny", f"--out={tmp_path / 'out'}"])


def test_only_programs_are_carried(tmp_path, monkeypatch):
    """The folder of a run's figures is the cache folder of the next, too."""
    code = "open('program', 'w').close(); time.sleep(0.5)"
    monkeypatch.setattr(plan, "jobs", lambda *_: [job("stand-in", code)])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(gpu_check, "_END_SIGNALS", ())  # They are those of pytest.
    first, second = tmp_path / "first", tmp_path / "second"
    gpu_check.main(["--tiny", f"--out={first}"])
    gpu_check.main(["--tiny", f"--out={second}", f"--cache={first}"])
    with tarfile.open(second / "programs.tar.00") as tar:
        assert tar.getnames() == ["program"]


def test_missing_packages_are_named(monkeypatch):
    found = importlib.util.find_spec
    missing = ("gin", "google_crc32c")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else found(name))
    with pytest.raises(
        errors.UserError, match="missing modules: gin, google_crc32c.* gin-config google-crc32c"
    ):
        gpu_check.check_packages()


def test_wheels_are_installed_into_a_folder(tmp_path):
    with zipfile.ZipFile(tmp_path / "brought-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("brought.py", "")
        info = "brought-1.0.dist-info"
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: brought\nVersion: 1.0\nRequires-Dist: more\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    gpu_check.install(tmp_path, tmp_path / "site")
    assert (tmp_path / "site/brought.py").exists()


@pytest.fixture
def blocked(tmp_path: pathlib.Path) -> pathlib.Path:
    """Makes a folder for PYTHONPATH that hides what the machine of the check lacks."""
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden/sitecustomize.py").write_text(
        "import sys\n"
        "class Without:\n"
        "    def __init__(self, finder):\n"
        "        self.finder = finder\n"
        "    def __getattr__(self, name):\n"
        "        return getattr(self.finder, name)\n"
        "    def find_spec(self, name, *more):\n"
        f"        hidden = name.split('.')[0] in {BLOCKED}\n"
        "        return None if hidden else self.finder.find_spec(name, *more)\n"
        "sys.meta_path[:] = map(Without, sys.meta_path)\n"
    )
    return tmp_path / "hidden"


def test_the_jobs_import_only_packages_that_are_checked(blocked):
    code = (
        "import sys\n"
        "from richhf_jax.benchmarks.gpu_check import __main__, job\n"
        "from torch_twin import steps\n"
        "missing = [name for name in __main__.PACKAGES if name not in sys.modules]\n"
        "assert not missing, missing\n"
        "import importlib\n"
        "for name in ('tensorflow', 'seqio'):\n"
        "    try:\n"
        "        importlib.import_module(name)\n"
        "    except ModuleNotFoundError:\n"
        "        continue\n"
        "    raise AssertionError(name)\n"
    )
    env = os.environ | {"PYTHONPATH": f"{blocked}{os.pathsep}{ROOT}"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_a_few_jobs_twice(blocked, tmp_path):
    """The second run has another folder, in which the first run's programs are found."""

    def check(out: str, jobs: str, *more: str) -> dict[tuple[str, str], dict]:
        env = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(blocked)}
        command = [
            "bash",
            str(ROOT / "launch/gpu_check.sh"),
            "--tiny",
            f"--out={out}",
            f"--only={jobs}",
            *more,
        ]
        result = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
        lines = (tmp_path / out / "figures.jsonl").read_text().splitlines()
        return {(line["job"], line["figure"]): line for line in map(json.loads, lines)}

    first = check("first", "versions,ceilings,part-score,train-2-cudnn", "--jobs=2")
    assert first["versions", "device"]["value"] == "cpu"
    assert first["ceilings", "product of 256 x 256, bfloat16"]["value"] > 0
    assert first["train-2-cudnn", "outcome"]["value"] == "skipped: no GPU"
    compile_name = "compile forward and backward"
    assert first["part-score", compile_name]["from_cache"] == 0
    assert first["part-score", compile_name]["compiled"] == 1
    page = (tmp_path / "first/report.md").read_text()
    assert "| train-2-cudnn | skipped: no GPU |  |" in page
    assert re.search(r"\| part-score \| done \| compile forward [\d.]+ s; .* backward [\d.]+ ms \|", page)
    assert first["part-score", "score head, 2 images, forward"]["value"] > 0
    (tmp_path / "kept").mkdir()
    for path in (tmp_path / "first").glob("programs.tar.*"):
        path.rename(tmp_path / "kept" / path.name)
    again = check("again", "part-score", "--cache=kept")
    assert again["part-score", compile_name]["from_cache"] == 1


class Told(turns.Turn):
    """A turn that has all to itself, and notes the figures."""

    def __init__(self):
        self.values: dict[str, Any] = {}

    def figure(self, name, value, unit="", **more):
        self.values[name] = value

    device = quiet = contextlib.nullcontext


@pytest.fixture
def check(tmp_path, monkeypatch) -> Context:
    """Makes a context of the sizes of small.gin."""
    preset = tmp_path / "small.gin"
    files = ("gin/models/rahf.gin", ROOT / "tests/small.gin", "gin/variants/multi_head.gin")
    preset.write_text("".join(f"include '{file}'\n" for file in files))
    monkeypatch.setitem(plan.SIZES, "small", plan.dataclasses.replace(plan.SIZES["tiny"], preset=str(preset)))
    return Context(Told(), plan.SIZES["small"], ())


def test_a_step_of_the_model(check):
    model.step(check, "predict", 2)
    told = check.turn.values
    assert told["images a second"] == pytest.approx(2000 / told["a step, median"])
    assert told["a step, least"] <= told["a step, median"] <= told["a step, most"]
    assert told["memory by the compiler's count"] > 0


def test_a_part_of_the_model(check):
    parts.part(check, "encoder")
    times = {key: value for key, value in check.turn.values.items() if "2 images" in key}
    assert len(times) == 2
    assert min(times.values()) > 0


@pytest.mark.parametrize("agree", [True, False])
def test_attention_runs_in_the_jobs_own_process(check, monkeypatch, agree):
    row = {"shape": "ViT", "step": "forward", "agree": agree}
    row |= {kernel: {"error": "none"} for kernel in attention.KERNELS}
    monkeypatch.setattr(attention, "compare", lambda shape: [row])
    monkeypatch.setitem(attention.SIZES, "tiny", attention.SIZES["tiny"][:1])
    with contextlib.nullcontext() if agree else pytest.raises(errors.UserError, match="do not agree"):
        model.attention(check)
    assert check.turn.values["printed"].endswith("the kernels agree" if agree else "DO NOT AGREE")
    assert check.turn.values["cudnn is"] == "its formulas, computed by XLA"


def test_numbers_that_are_not_the_cpus_are_noticed(check, monkeypatch):
    def numbers(dtype, precision, device):
        return {"the scores": np.array([0.5, 0.6 if precision is None else 0.5])}

    monkeypatch.setattr(machine, "_tiny_numbers", numbers)
    with pytest.raises(errors.UserError, match="default precision: the scores differ from the CPU's by 0.1"):
        machine.numbers(check)
    assert check.turn.values["float32, highest precision: largest difference of the scores"] == 0


def test_a_step_that_does_not_fit_is_skipped(check, monkeypatch):
    class Device:
        def memory_stats(self):
            return {"bytes_limit": 2**30}

    class Steps:
        def peak_bytes(self):
            return 3 * 2**30

        temporary_bytes = peak_bytes

    monkeypatch.setattr(Context, "device", Device())
    with pytest.raises(turns.Skip, match=r"it takes 3.0 GiB, and the device has 1.0"):
        model.check_room(check, Steps())


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([3.0, 2.0, 1.0], None),
        ([1.0, 2.0, 3.0], "didn't fall"),
        ([1.0, float("nan"), 0.5], "of step 2 is nan"),
    ],
)
def test_learning_notices_a_loss_that_does_not_fall(check, monkeypatch, losses, message):
    class Loss:
        def __init__(self, value):
            self.value = value

        def compute(self):
            return self.value

    class Steps:
        values = iter(losses)

        def initialise(self):
            pass

        def run(self, batch):
            return {"loss": Loss(next(self.values))}

    monkeypatch.setattr(uses, "_STEPS_TOLD", 1)
    monkeypatch.setattr(uses, "_drawn_batches", lambda *_: [{}])
    monkeypatch.setattr(model, "compiled", lambda *_: (Steps(), {}))
    monkeypatch.setattr(model, "check_room", lambda *_: None)
    with pytest.raises(errors.UserError, match=message) if message else contextlib.nullcontext():
        uses.learn(check, len(losses))
    assert check.turn.values["mean loss until step 1"] == losses[0]


def test_drawn_batches_have_the_labels_of_their_scenes(monkeypatch):
    from richhf_jax.benchmarks import steps

    monkeypatch.setattr(uses, "_PICTURES", 4)
    module = steps.make_model("models/rahf_tiny.gin", feedback.MULTI_HEAD).module
    like = steps.random_batch(module, feedback.ALL_SLOTS, 2)
    batches = uses._drawn_batches(like, 2)
    assert len(batches) == 2
    for batch in batches:
        assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
            name: (x.shape, x.dtype) for name, x in like.items()
        }
    heatmaps = np.concatenate([batch["heatmap_targets"] for batch in batches])
    assert set(np.unique(heatmaps)) == {0, 255}
    scores = np.concatenate([batch["score_targets"] for batch in batches])
    # A picture without artifacts is the most plausible one.
    best = scores[:, feedback.SCORES.index(feedback.PLAUSIBILITY)].argmax()
    assert heatmaps[best, feedback.HEATMAPS.index(feedback.IMPLAUSIBILITY)].sum() == 0
