"""Runs Python modules one after the other, each in a process of its own, until one fails or is stopped.

    python -m launch.in_turn [--finished=DIR] IMPORTS TITLE MODULE ARGUMENTS... --then TITLE MODULE ...

IMPORTS names modules, with commas between them. They are imported once, and on Linux the processes are forks
that have them already: importing TensorFlow and its like takes seconds.

With --finished, DIR gets a file for each part that has ended well, and the next run leaves this part out.
"""

import contextlib
import importlib
import itertools
import os
import pathlib
import re
import runpy
import signal
import sys
import time
import warnings
from collections.abc import Sequence


def main(*arguments: str) -> None:
    """Runs the parts, and exits like the one that failed; with 130 after a signal to stop."""
    finished = None
    if arguments[0].startswith("--finished="):
        finished = pathlib.Path(arguments[0].partition("=")[2])
        finished.mkdir(parents=True, exist_ok=True)
        arguments = arguments[1:]
    imports, *rest = arguments
    groups = itertools.groupby(rest, "--then".__eq__)
    parts = [list(group) for is_separator, group in groups if not is_separator]
    marks = {title: finished / re.sub(r"\W+", "_", title) if finished else None for title, *_ in parts}
    remaining = [part for part in parts if not ((mark := marks[part[0]]) and mark.exists())]
    if remaining and sys.platform == "linux":  # On macOS, some system libraries don't survive a fork.
        for name in imports.split(","):
            importlib.import_module(name)
    # Python 3.12 and later warn of threads: here OpenBLAS's and jemalloc's, which both prepare for a fork.
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    for title, module, *flags in parts:
        if [title, module, *flags] not in remaining:
            print(f"\n== {title}: finished before", flush=True)
            continue
        print(f"\n== {title}", flush=True)
        start = time.monotonic()
        if code := _run(title, module, flags):
            sys.exit(code)
        if mark := marks[title]:
            mark.touch()
        print("== took {}:{:02} min".format(*divmod(round(time.monotonic() - start), 60)), flush=True)


def _run(title: str, module: str, arguments: Sequence[str]) -> int:
    """Runs a module in a fork. Returns its exit code, and 130 if this process got a signal to stop."""
    child, received = 0, []

    def forward(signum, frame):
        del frame
        received.append(signum)
        if signum == signal.SIGTERM and child:  # A terminal's Ctrl-C reaches both.
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signum)

    # Before the fork, so that no signal finds this process without them.
    previous = {signum: signal.signal(signum, forward) for signum in (signal.SIGINT, signal.SIGTERM)}
    child = os.fork()
    if not child:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
        if received:
            sys.exit(130)
        sys.argv[1:] = arguments
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        sys.exit()
    if received:  # In the moment of the fork.
        os.kill(child, signal.SIGTERM)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for signum, handler in previous.items():
        signal.signal(signum, handler)
    if received:
        return 130
    if code < 0:
        print(f"{title}: ended by {signal.Signals(-code).name}", file=sys.stderr, flush=True)
        return 128 - code  # As a shell does.
    return code


if __name__ == "__main__":
    main(*sys.argv[1:])
