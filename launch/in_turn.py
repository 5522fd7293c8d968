"""Runs Python modules one after the other, each in a process of its own, until one fails or is stopped.

    python -m launch.in_turn IMPORTS TITLE MODULE ARGUMENTS... --then TITLE MODULE ARGUMENTS... --then ...

IMPORTS names modules, with commas between them. They are imported once, and on Linux the processes are forks
that have them already: importing TensorFlow and its like takes seconds.
"""

import importlib
import itertools
import os
import runpy
import signal
import sys
import time
import warnings


def main(imports: str, *arguments: str) -> None:
    """Runs the parts, and exits like the one that failed; with 130 after a signal."""
    if sys.platform == "linux":  # On macOS, some system libraries don't survive a fork.
        for name in imports.split(","):
            importlib.import_module(name)
    # Python 3.12 and later warn of threads: here OpenBLAS's and jemalloc's, which both prepare for a fork.
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    groups = itertools.groupby(arguments, "--then".__eq__)
    for title, module, *rest in (list(group) for is_separator, group in groups if not is_separator):
        print(f"\n== {title}", flush=True)
        start = time.monotonic()
        child = os.fork()
        if not child:
            sys.argv[1:] = rest
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            return
        if code := _wait(child):
            sys.exit(code)
        print("== took {}:{:02} min".format(*divmod(round(time.monotonic() - start), 60)), flush=True)


def _wait(child: int) -> int:
    """Waits for a process, and returns its exit code; 130 if it or this process got a signal."""
    received = []

    def forward(signum, frame):
        del frame
        received.append(signum)
        if signum == signal.SIGTERM:  # A terminal's Ctrl-C reaches both.
            os.kill(child, signum)

    previous = {signum: signal.signal(signum, forward) for signum in (signal.SIGINT, signal.SIGTERM)}
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for signum, handler in previous.items():
        signal.signal(signum, handler)
    return 130 if received or code < 0 else code


if __name__ == "__main__":
    main(*sys.argv[1:])
