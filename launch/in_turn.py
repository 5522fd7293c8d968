"""Runs Python modules one after the other, each in a process of its own, until one fails or is stopped.

    python -m launch.in_turn IMPORTS TITLE MODULE ARGUMENTS... --then TITLE MODULE ARGUMENTS... --then ...

IMPORTS names modules, with commas between them. They are imported once, and on Linux the processes are forks
that have them already: importing TensorFlow and its like takes seconds.
"""

import contextlib
import importlib
import itertools
import os
import runpy
import signal
import sys
import time
import warnings
from collections.abc import Sequence


def main(imports: str, *arguments: str) -> None:
    """Runs the parts, and exits like the one that failed; with 130 after a signal to stop."""
    if sys.platform == "linux":  # On macOS, some system libraries don't survive a fork.
        for name in imports.split(","):
            importlib.import_module(name)
    # Python 3.12 and later warn of threads: here OpenBLAS's and jemalloc's, which both prepare for a fork.
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    groups = itertools.groupby(arguments, "--then".__eq__)
    for title, module, *rest in (list(group) for is_separator, group in groups if not is_separator):
        print(f"\n== {title}", flush=True)
        start = time.monotonic()
        if code := _run(title, module, rest):
            sys.exit(code)
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
