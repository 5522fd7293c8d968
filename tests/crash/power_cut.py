r"""Cuts the power at random moments of each command, and gives the command again.

    python tests/crash/power_cut.py --checkpoint=MODEL_DIR --data_dir=DIR
    python tests/crash/power_cut.py --checkpoint=MODEL_DIR --data_dir=DIR --cuts=20 'predict png' train

The command's writes are recorded once. For each moment the folder is built as the disk could have it after
a power cut, by one of the models in disk.py. Then the same command must end with the files of an undisturbed
run ("same"; of checkpoints, with the same arrays), or with a message that names what was lost ("told").
The data of launch/quickstart.sh will do: runs/quickstart/finetune and runs/quickstart/data.

Prints a table, and each failure with the way to see it again. Exit code 1: something failed.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import os
import pathlib
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import commands
import disk

SAME, TOLD, WRONG = VERDICTS = ("same", "told", "WRONG")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a command after a power cut."""

    cut: int
    model: str
    seed: int
    verdict: str
    message: str

    def __str__(self) -> str:
        return f"{self.verdict} after {self.cut} events, model {self.model}, seed {self.seed}: {self.message}"


def outcomes(
    record: disk.Record,
    again: Callable[[], tuple[int, str]],
    content: Callable[[], Any],
    wanted: Any,
    codes: tuple[int, ...],
    cuts: int,
    seed: int,
) -> Iterator[Outcome]:
    """Cuts the power and gives the command again, many times.

    Args:
      record: the command's writes.
      again: gives the command again; returns its exit code and what it printed.
      content: reads the folder.
      wanted: its content after an undisturbed run.
      codes: exit codes of success.
      cuts: number of power cuts.
      seed: of the moments, and of what is lost.
    """
    rng = random.Random(seed)
    for number, cut in enumerate(record.moments(cuts, rng)):
        model, own = disk.MODELS[number % len(disk.MODELS)], rng.randrange(1 << 30)
        record.build(record.root, cut, model, random.Random(own))
        code, printed = again()
        verdict, message = _judge(record.root, code, printed, content, wanted, codes)
        yield Outcome(cut, model, own, verdict, message)


def _judge(root, code, printed, content, wanted, codes) -> tuple[str, str]:
    lines = [line for line in printed.splitlines() if str(root) in line]
    tail = printed[-400:] if code not in codes else ""
    if "Traceback (most recent call last)" in printed:
        return WRONG, f"a traceback: {printed[-400:]}"
    found = content()
    if found == wanted:
        return SAME, tail
    if code not in codes and lines:
        return TOLD, lines[-1]
    different = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)][:5]
    return WRONG, f"exit code {code}, other content: {different} {tail}"


def cut_power(command: commands.Command, recorder: pathlib.Path, cuts: int, seed: int) -> bool:
    """Records a command, and cuts its power many times. Returns whether nothing went wrong."""
    root, log = command.out.parents[1], command.out.parents[1].with_suffix(".log")
    root.mkdir()
    record = disk.Record(root, recorder)
    # It compiles programs, which the others find in the cache.
    record.run([sys.executable, "-c", command.code()], os.environ, command.codes)
    begin, counts, told = time.monotonic(), collections.Counter(), set()
    again = (lambda: command.run(log)) if command.alone else command.run_here
    with contextlib.nullcontext() if command.alone else commands.loaded_once():
        wanted = command.content(root)
        for outcome in outcomes(
            record, again, lambda: command.content(root), wanted, command.codes, cuts, seed
        ):
            counts[outcome.verdict] += 1
            if outcome.verdict == TOLD:
                told.add(outcome.message)
            elif outcome.verdict == WRONG:
                print(f"  {command.name}: {outcome}", flush=True)
    shown = "  ".join(f"{verdict} {counts[verdict]:4}" for verdict in VERDICTS)
    seconds = time.monotonic() - begin
    print(f"{command.name:20} {len(record.events):6} events  {shown}  {seconds:.0f} s", flush=True)
    for message in sorted(told)[:5]:
        print(f"  told: {message}", flush=True)
    shutil.rmtree(root)
    return not counts[WRONG]


def main() -> None:
    """Runs the comparison that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands.add_options(parser, ("cuts", "200"))
    options = parser.parse_args()
    folder = pathlib.Path(options.out or tempfile.mkdtemp()).resolve()
    folder.mkdir(exist_ok=True)
    try:
        recorder = disk.build_recorder(folder)
    except disk.NoRecorderError as error:
        sys.exit(str(error))
    codes = []
    for command in commands.choose(options, folder):
        cut = functools.partial(cut_power, command, recorder, options.cuts, options.seed)
        # In a process of its own, because commands start threads, which no fork survives.
        codes.append(commands.wait(commands.fork(lambda cut=cut: sys.exit(not cut()))))
    sys.exit(any(codes))


if __name__ == "__main__":
    main()
