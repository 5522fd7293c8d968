"""Runs one program in several processes, by `jax.distributed`: one for each host, or for each GPU.

On Cloud TPU pods, GKE's TPU node pools, SLURM and Open MPI, jax finds the processes by itself; elsewhere
flags say where they are. A single process, the usual case, needs no flags.
"""

import atexit
import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, TypeVar, cast

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from richhf_jax import errors

_T = TypeVar("_T")
# Length of a message that one process tells the others, in bytes.
_MAX_WORDS = 2000
# How long process 0 may work after the others: evaluation measures and writes its report there.
_FAREWELL_SECONDS = 3600
# Time for other processes, which may fail for the same reason, to print it: the end of process 0 ends them.
_LINGER_SECONDS = 3


@contextlib.contextmanager
def session(
    coordinator_address: str | None = None,
    process_count: int | None = None,
    process_index: int | None = None,
    enabled: bool | None = None,
    initialization_timeout: int = 300,
    heartbeat_timeout: int = 100,
) -> Iterator[None]:
    """Connects the processes: inside, jax sees the devices of all. No jax computation may have run before.

    No process outlives another by more than `heartbeat_timeout`, and each process that didn't finish says so
    in its last line.

    Args:
      coordinator_address: host:port of process 0. Give this and the next two together, or none: then jax
        finds them.
      process_count: number of processes.
      process_index: index of this process, from 0.
      enabled: False: this process is alone. None: it is alone if the environment names no others.
      initialization_timeout: seconds that the processes wait for each other at the start.
      heartbeat_timeout: seconds without a sign of life after which a process counts as lost.

    Raises:
      errors.UserError: the first three don't fit together, or jax can't find the processes.
    """
    given = _check(coordinator_address, process_count, process_index)
    if not (given or _has_others() if enabled is None else enabled):
        yield
        return
    name = f"process {process_index} of {process_count}" if given else f"process on {socket.gethostname()}"
    words = _LastWords()
    words.say(
        f"{name}: the others haven't come within {initialization_timeout} s (--initialization_timeout); start"
        " all, each with its --process_index and with a --coordinator_address of process 0 that all can reach"
    )
    try:
        _connect(coordinator_address, process_count, process_index, initialization_timeout, heartbeat_timeout)
        logging.info("%s; if one is lost, all end within %d s", name, heartbeat_timeout)
        words.say(
            f"{name} ended before its work did: it failed or was killed, or another process was lost (see"
            " above). Give the same command again to all; it continues where it was saved last"
        )
        yield
    except BaseException as error:
        if isinstance(error, errors.UserError):
            words.cancel()  # The error's own message is enough.
        atexit.register(_exit_now)
        raise
    jax.distributed.shutdown()
    words.cancel()


@contextlib.contextmanager
def entered_by_all(context: contextlib.AbstractContextManager[_T]) -> Iterator[_T]:
    """Enters each process's own context, or none if one can't be entered. All processes must call it.

    Args:
      context: this process's context.

    Yields:
      What the context yields.

    Raises:
      errors.UserError: that of the first process whose context raised one, in every process.
    """
    with contextlib.ExitStack() as stack:
        entered, words = None, ""
        try:
            entered = stack.enter_context(context)
        except errors.UserError as error:
            words = str(error)
        own = np.frombuffer(words.encode()[:_MAX_WORDS].ljust(_MAX_WORDS), np.uint8)
        every = np.asarray(multihost_utils.process_allgather(own)).reshape(-1, _MAX_WORDS)
        for said in every:
            if words := said.tobytes().decode(errors="ignore").rstrip():
                raise errors.UserError(words)
        yield cast(_T, entered)


def _check(address: str | None, count: int | None, index: int | None) -> bool:
    """Returns whether the three flags are given, and checks their values."""
    flags = {"--coordinator_address": address, "--process_count": count, "--process_index": index}
    missing = [flag for flag, value in flags.items() if value is None]
    if len(missing) == len(flags):
        return False
    if address is None or count is None or index is None:
        raise errors.UserError(f"{', '.join(flags)} belong together; give {' and '.join(missing)}, too")
    if not 0 <= index < count:
        raise errors.UserError(f"--process_index={index} of --process_count={count}: they count from 0")
    if not re.fullmatch(r".+:\d+", address):
        raise errors.UserError(f"--coordinator_address={address}: write HOST:PORT, of process 0")
    return True


def _has_others() -> bool:
    """Returns whether the environment names other processes, which jax then finds by itself.

    jax's own detection can't say: it takes a shell in a SLURM allocation for one of several tasks, and gives
    a single task only one of its GPUs.
    """
    env = os.environ
    if "tpu" in _platforms():
        hosts = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES")
        if hosts:  # on GKE
            return "," in hosts or int(env.get("MEGASCALE_NUM_SLICES", 1)) > 1
        # A Cloud TPU VM asks a metadata server. If the VM is alone, jax starts with 1 process.
        return "TPU_SKIP_MDS_QUERY" not in env
    return any(int(env.get(size, 1)) > 1 for size in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))


def _platforms() -> str:
    """Returns jax's platforms: those the user set, or "tpu,cpu" where jax sees a TPU, or ""."""
    config: Any = jax.config  # Its attributes are not declared.
    return config.jax_platforms or ""


def _connect(address: str | None, count: int | None, index: int | None, timeout: int, heartbeat: int) -> None:
    try:
        if address and index == 0:  # jax may crash if the port is in use.
            with socket.create_server(("", int(address.rpartition(":")[2]))):
                pass
        jax.distributed.initialize(
            address,
            count,
            index,
            # Else jax looks for a cluster even if it has an address, and gives each process one GPU.
            cluster_detection_method="deactivate" if address else None,
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=heartbeat,
            shutdown_timeout_seconds=_FAREWELL_SECONDS,
        )
    except (ValueError, RuntimeError, OSError) as error:
        what = f"can't be the coordinator at {address}" if address else "can't find the other processes"
        raise errors.UserError(
            f"{what}: {error}\nGive --coordinator_address=HOST:PORT (of process 0, with a port that is free"
            " there), --process_count and --process_index; or --nomultiprocess_gpu for this process alone"
        ) from error


class _LastWords:
    """Prints a line when this process has ended, in any way.

    Python can't print it: jax aborts the process when another one is lost, and the system kills a process
    that takes too much memory.
    """

    _PRINT_LAST = 'while IFS= read -r line; do last=$line; done; [ -z "$last" ] || printf "%s\\n" "$last" >&2'

    def __init__(self):
        # In a session of its own, so that Ctrl-C doesn't end it.
        self._printer = subprocess.Popen(
            ["sh", "-c", self._PRINT_LAST], stdin=subprocess.PIPE, start_new_session=True
        )

    def say(self, line: str) -> None:
        """Sets the line to print, in place of an earlier one."""
        pipe = self._printer.stdin
        assert pipe is not None
        pipe.write(f"{line}\n".encode())
        pipe.flush()

    def cancel(self) -> None:
        """Ends the printer, so that nothing is printed."""
        self._printer.communicate(b"\n")


def _exit_now() -> None:
    """Ends this process without jax's shutdown, which would wait for the other processes."""
    time.sleep(_LINGER_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
