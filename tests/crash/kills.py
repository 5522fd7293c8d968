r"""Kills each command at random moments, again and again, and then lets it end.

    python tests/crash/kills.py --checkpoint=MODEL_DIR --data_dir=DIR
    python tests/crash/kills.py --checkpoint=MODEL_DIR --data_dir=DIR --kills=10 'predict png' train

SIGKILL goes to the command and the processes that it started. Then the same command is given again in the
same folder. When it ends, which it may do between two kills, the folder must hold the files of an undisturbed
run (of checkpoints, the same arrays), and nothing else; then it begins anew in an empty folder.
The data of launch/quickstart.sh will do: runs/quickstart/finetune and runs/quickstart/data.

Prints a table, and each failure. Exit code 1: something failed.
"""

import argparse
import contextlib
import os
import pathlib
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from typing import Any

import commands

# Seconds between two looks at a process.
_POLL = 0.002
# Names of arrays' files, and of TensorBoard's.
_CHOSEN = re.compile(r"(?<=/d/)[0-9a-f]{32}$|(?<=/events\.out\.tfevents\.).*$")


def kill_at_random_moments(command: commands.Command, count: int, seed: int) -> bool:
    """Kills a command many times. Returns whether nothing went wrong."""
    rng, root = random.Random(seed), command.out.parents[1]
    log = root.with_suffix(".log")
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    command.run(log)  # It compiles programs, which the others find in the cache.
    wanted, names = command.content(root), _names(root)
    shutil.rmtree(root)
    root.mkdir()
    first, last = _measure(command, root, log)
    begin, killed, ended, most, wrong, is_new = time.monotonic(), 0, 0, 0, [], True
    while killed < count or not ended:
        started = time.monotonic()
        process = command.start(log)
        # From just before the first file appears to the end.
        code = (
            _kill_after(process, rng.uniform(0.9 * first, last)) if killed < count else commands.wait(process)
        )
        if code == -signal.SIGKILL:
            killed, is_new = killed + 1, False
            most = max(most, len(_names(root) - names))
            continue
        ended += 1
        if is_new and killed < count:  # The machine has become faster.
            seconds = time.monotonic() - started
            first, last = first * seconds / last, seconds
        printed = log.read_text(errors="replace")
        if problem := _problem(command, root, code, printed, wanted, names):
            wrong.append(problem)
            print(f"  {command.name}: after {killed} kills: {problem}", flush=True)
        shutil.rmtree(root)
        root.mkdir()
        is_new = True
    seconds = time.monotonic() - begin
    print(
        f"{command.name:20} killed {killed:4}  ended {ended:4}  most leftovers {most:3}  WRONG {len(wrong):4}"
        f"  {seconds:.0f} s",
        flush=True,
    )
    shutil.rmtree(root)
    return not wrong


def _names(root: pathlib.Path) -> set[str]:
    """Lists the names in a folder; those that a run chooses at random or by the time of day are one."""
    return {_CHOSEN.sub("*", str(path.relative_to(root))) for path in root.rglob("*")}


def _measure(command: commands.Command, root: pathlib.Path, log: pathlib.Path) -> tuple[float, float]:
    """Runs a command in an empty folder. Returns when it wrote the first file, and its end, in seconds."""
    begin, first = time.monotonic(), None
    process = command.start(log)
    while not os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        if first is None and any(root.iterdir()):
            first = time.monotonic() - begin
        time.sleep(_POLL)
    code = commands.wait(process)
    seconds = time.monotonic() - begin
    assert code in command.codes, log.read_text(encoding="utf-8")[-3000:]
    shutil.rmtree(root)
    root.mkdir()
    return first or 0, seconds


def _kill_after(process: int, seconds: float) -> int:
    """Kills a process and those that it started after some time. Returns its exit code; it may have ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
        time.sleep(_POLL)
    else:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)
    code = commands.wait(process)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)  # A process that it left behind.
    return code


def _problem(
    command: commands.Command, root: pathlib.Path, code: int, printed: str, wanted: Any, names: set[str]
) -> str | None:
    """Says what is wrong at the end of a command; None: nothing."""
    if command.content(root) != wanted:
        return f"exit code {code}, other content: {printed[-400:]}"
    # A command that makes a new directory refuses one that is complete.
    if code not in command.codes and "not empty" not in printed:
        return f"exit code {code}: {printed[-400:]}"
    if leftovers := _names(root) - names:
        return f"leftovers: {', '.join(sorted(leftovers)[:5])}"
    return None


def main() -> None:
    """Runs the comparison that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands.add_options(parser, ("kills", "100"))
    options = parser.parse_args()
    folder = pathlib.Path(options.out or tempfile.mkdtemp()).resolve()
    folder.mkdir(exist_ok=True)
    fine = [
        kill_at_random_moments(command, options.kills, options.seed)
        for command in commands.choose(options, folder)
    ]
    sys.exit(not all(fine))


if __name__ == "__main__":
    main()
