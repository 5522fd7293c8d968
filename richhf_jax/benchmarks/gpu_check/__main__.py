"""Measures all that a machine with one NVIDIA GPU can tell about this model, within minutes.

It needs JAX with CUDA, flax, optax, orbax, a few small packages, and PyTorch for the comparison with it. It
needs no network. Programs compile side by side from the start, each in a process of its own. Measurements run
one at a time; the other processes are paused as long. What takes longer than its limit is skipped. Each
figure is printed and written at once:

    OUT/figures.jsonl      {"at": seconds, "job": …, "figure": …, "value": …, "unit": …}
    OUT/report.md          the same as tables, with the outcome of each job
    OUT/log.txt            last lines of the jobs that failed or were ended
    OUT/programs.tar.NN    the compiled programs: give the folder with --cache to the next run

--tiny goes through all of it with a tiny model within minutes on two cores, without a GPU, too.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from richhf_jax import errors
from richhf_jax.benchmarks.gpu_check import carried, plan, turns

_ROOT = pathlib.Path(__file__).resolve().parents[3]
# Module -> package that brings it, as on PyPI.
PACKAGES = {
    "absl": "absl-py", "clu": "clu", "etils": "etils", "flax": "flax", "gin": "gin-config",
    "google_crc32c": "google-crc32c", "jax": "jax", "jaxtyping": "jaxtyping", "jinja2": "jinja2",
    "numpy": "numpy", "optax": "optax", "orbax": "orbax-checkpoint", "PIL": "pillow",
    "safetensors": "safetensors", "sentencepiece": "sentencepiece", "tqdm": "tqdm", "wrapt": "wrapt",
}  # fmt: skip
# Seconds for the last words.
_RESERVE = 3
_LOG_LINES = 60
# End the check early, like Ctrl+C: also the loss of its terminal.
_END_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
# Names of the figures that the summary repeats.
_MAIN = re.compile(
    "(images a second|share|compile|memory|command|bare|mean loss|.*largest|product|copy|.*forward|.*update)"
)


class Report:
    """Prints and writes figures as they come."""

    def __init__(self, out: pathlib.Path, logs: pathlib.Path):
        self._begin = time.monotonic()
        self._logs, self._log = logs, out / "log.txt"
        self._told: dict[str, dict[str, str]] = {}
        self._figures = (out / "figures.jsonl").open("w", encoding="utf-8")
        self._page = (out / "report.md").open("w", encoding="utf-8")
        self._write(
            self._page, "# GPU check\n\n| s | job | figure | value | unit |\n| --- | --- | --- | --- | --- |"
        )

    def figure(self, job: str, message: Mapping[str, Any]) -> None:
        """Tells a figure, see `turns.Turn.figure`."""
        at = round(time.monotonic() - self._begin, 1)
        line = {"at": at, "job": job, **{name: value for name, value in message.items() if value is not None}}
        self._write(self._figures, json.dumps(line, allow_nan=False))
        text, unit = _text(message["value"]), message.get("unit", "")
        self._told.setdefault(job, {})[message["figure"]] = f"{text} {unit}".rstrip()
        notes = [
            f"{name} {_text(message[name])}"
            for name in ("from_cache", "compiled", "paused_seconds")
            if message.get(name)
        ]
        name = message["figure"] + (f" ({', '.join(notes)})" if notes else "")
        self._write(self._page, f"| {at:.1f} | {job} | {name} | {text.replace('|', '/')} | {unit} |")
        _say(f"{at:6.1f} s  {job}: {name}: {text} {unit}".rstrip())

    def ended(self, job: str, outcome: str) -> None:
        """Tells how a job ended."""
        self.figure(job, {"figure": "outcome", "value": outcome})
        log = self._logs / f"{job}.log"
        if outcome.startswith(("failed", "skipped: it took", "stopped")):
            lines = log.read_text("utf-8", "replace").splitlines()[-_LOG_LINES:]
            with self._log.open("a", encoding="utf-8") as file:
                file.write("\n".join([f"== {job}: {outcome}", *lines, ""]))

    def summary(self, outcomes: Mapping[str, str]) -> None:
        """Tells each job's outcome and its main figures."""
        self._write(self._page, "\n| job | outcome | main figures |\n| --- | --- | --- |")
        _say("\nsummary")
        for job, outcome in outcomes.items():
            told = self._told.get(job, {})
            main = [f"{name} {value}" for name, value in told.items() if _MAIN.match(name)]
            _say(f"  {job}: {'; '.join([outcome, *main])}")
            self._write(self._page, f"| {job} | {outcome.replace('|', '/')} | {'; '.join(main)} |")

    def close(self) -> None:
        """Closes the files."""
        self._figures.close()
        self._page.close()

    def _write(self, file: Any, line: str) -> None:
        file.write(line + "\n")
        file.flush()


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _say(line: str) -> None:
    """Prints a line, as long as there is a terminal."""
    try:
        print(line, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def install(wheels: pathlib.Path, site: pathlib.Path) -> None:
    """Installs the wheels of a folder into another, without looking for anything else.

    Raises:
      errors.UserError: there are no wheels, or pip refuses them.
    """
    files = [str(path) for path in sorted(wheels.glob("*.whl"))]
    if not files:
        raise errors.UserError(f"--wheels={wheels}: there are no .whl files")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    command += ["--disable-pip-version-check", "--no-cache-dir", "--target", str(site), *files]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise errors.UserError(f"--wheels={wheels}: pip failed: {result.stderr.strip()}")


def check_packages() -> None:
    """Raises a UserError that names the packages that are missing, if any."""
    missing = {
        module: package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None
    }
    if missing:
        raise errors.UserError(
            f"missing modules: {', '.join(missing)}. Install {' '.join(missing.values())}; or, where there is"
            f" no network, bring the wheels (elsewhere: pip download --no-deps --dest=wheels"
            f" {' '.join(missing.values())}) and give --wheels=wheels"
        )


def _make_folders(folders: Mapping[str, pathlib.Path]) -> None:
    """Makes the folders of options, {option: folder}."""
    for option, folder in folders.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise errors.UserError(
                f"{option}={folder}: can't make this folder: {error.filename}: {error.strerror}"
            ) from error


def _interrupt(number: int, frame: Any) -> None:
    """Acts like Ctrl+C; a lost terminal sends its signals more than once."""
    for other in _END_SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise KeyboardInterrupt


def _number(kind: type[int] | type[float], least: float, most: float) -> Callable[[str], float]:
    """Makes a function that reads an option's number."""

    def read(text: str) -> float:
        with contextlib.suppress(ValueError):
            if least <= kind(text) <= most:
                return kind(text)
        noun = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"it must be {noun} from {least} to {most}, not {text!r}")

    return read


def _environment(cache: pathlib.Path, site: pathlib.Path, has_gpu: bool) -> dict[str, str]:
    """Makes the environment of the jobs."""
    paths = [str(_ROOT), str(site), os.environ.get("PYTHONPATH", "")]
    env = {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        # A relative path, because JAX's keys hold it (of XLA's folder with the tuning of kernels, in it):
        # in another folder no program would be found. The jobs run in the cache folder.
        "JAX_COMPILATION_CACHE_DIR": ".",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TORCHINDUCTOR_CACHE_DIR": str(cache / carried.TORCH),
        # Many processes share the device.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_CLIENT_MEM_FRACTION": "0.95",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        # The last lines of a log then name the error.
        "JAX_TRACEBACK_FILTERING": "off",
    }
    if not has_gpu:
        # `torch.compile` then does nothing: it would need minutes and a C++ compiler.
        env["TORCHDYNAMO_DISABLE"] = "1"
        # Compiles in half the time; nothing of a CPU's speed is of interest here.
        env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    others = {name: value for name, value in os.environ.items() if name != "XLA_PYTHON_CLIENT_MEM_FRACTION"}
    return others | env


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gpu_check.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes",
        type=_number(float, 0.1, 1440),
        default=8,
        help="ends after this time; default %(default)s",
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("gpu_check"),
        metavar="DIR",
        help="folder for the figures; default %(default)s",
    )
    parser.add_argument(
        "--cache",
        type=pathlib.Path,
        metavar="DIR",
        help="folder of compiled programs, which the run adds to; may hold an earlier run's programs.tar.NN",
    )
    parser.add_argument(
        "--wheels",
        type=pathlib.Path,
        metavar="DIR",
        help="folder of wheels of Python packages that are missing here",
    )
    parser.add_argument("--size", choices=list(plan.SIZES), default="base", help="default %(default)s")
    parser.add_argument(
        "--tiny", action="store_const", const="tiny", dest="size", help="the same as --size=tiny"
    )
    parser.add_argument(
        "--jobs",
        type=_number(int, 1, 1000),
        metavar="N",
        help="programs that compile at once; default: a third of the cores",
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME,...",
        help="jobs to run: train-8, or all that begin with train-",
    )
    parser.add_argument(
        "--carry_mib",
        type=_number(int, 0, carried.MOST_MIB),
        default=50,
        metavar="MIB",
        help="size of all programs.tar.NN; 0: none; default %(default)s",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="prints the jobs with their limits and commands, and stops"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; `--gin.NAME=VALUE` sets the model's gin values."""
    begin = time.monotonic()
    parser = _parser()
    arguments = sys.argv[1:] if arguments is None else arguments
    gin_arguments = [argument for argument in arguments if argument.startswith("--gin.")]
    options = parser.parse_args([argument for argument in arguments if argument not in gin_arguments])
    cores = len(os.sched_getaffinity(0))
    parallel = options.jobs or max(1, cores // 3)
    only = [name for names in options.only for name in names.split(",")]
    jobs = plan.jobs(options.size, gin_arguments, only)
    if not jobs:
        known = ", ".join(job.name for job in plan.jobs(options.size))
        parser.error(f"--only={','.join(only)}: no job has such a name; known: {known}")
    if options.dry_run:
        for job in jobs:
            after = f", after {', '.join(job.after)}" if job.after else ""
            print(f"{job.name}: at most {job.limit:.0f} s{after}: {shlex.join(job.command)}")
        return
    with tempfile.TemporaryDirectory(prefix="gpu_check") as name, errors.command("gpu_check.sh"):
        _run(options, jobs, parallel, pathlib.Path(name), begin)


def _run(
    options: argparse.Namespace, jobs: Sequence[turns.Job], parallel: int, work: pathlib.Path, begin: float
) -> None:
    site, logs, out = work / "site", work / "logs", options.out
    if options.wheels:
        install(options.wheels, site)
        sys.path.insert(0, str(site))
    check_packages()
    has_gpu = pathlib.Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None
    if not has_gpu and options.size == "base":
        raise errors.UserError("there is no NVIDIA GPU here; --tiny is a dry run on the CPU")
    brought = (options.cache or work / "cache").absolute()
    cache = brought / carried.PROGRAMS
    _make_folders({"--out": out, "--cache": cache})
    logs.mkdir()
    if (out / "figures.jsonl").exists():
        raise errors.UserError(f"--out={out} has the figures of another run: name another folder")
    unpacked = carried.unpack(brought, cache)
    print(f"{unpacked} files of compiled programs unpacked; {parallel} programs compile at once")
    left_out: list[str] = []
    with contextlib.closing(Report(out, logs)) as report:

        def ended(job: str, outcome: str) -> None:
            report.ended(job, outcome)
            if options.carry_mib and not outcome.startswith("not started"):
                left_out[:] = carried.pack(cache, out, options.carry_mib * carried.MIB)

        env = _environment(cache, site, has_gpu)
        scheduler = turns.Scheduler(jobs, parallel, report.figure, logs, env, cache, ended)
        for number in _END_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # As `nohup` sets it.
                signal.signal(number, _interrupt)
        interrupted = False
        try:
            scheduler.run(60 * options.minutes - (time.monotonic() - begin) - _RESERVE)
        except KeyboardInterrupt:
            interrupted = True
        report.summary({job.name: scheduler.outcomes[job.name] for job in jobs})
    if left_out:
        _say(f"no room in programs.tar.NN for: {', '.join(left_out)}")
    _judge(scheduler.outcomes, out, interrupted)


def _judge(outcomes: Mapping[str, str], out: pathlib.Path, interrupted: bool) -> None:
    """Raises a UserError if the run isn't a good one."""
    if failed := [name for name, outcome in outcomes.items() if outcome.startswith("failed")]:
        raise errors.UserError(f"failed: {', '.join(failed)}; see {out / 'log.txt'}")
    if interrupted:
        raise errors.UserError("interrupted")
    if "done" not in outcomes.values():
        raise errors.UserError("no job was done; the summary says why")


if __name__ == "__main__":
    main()
