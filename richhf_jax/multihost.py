"""Several processes that run one program together, by `jax.distributed`: one for each host, or each GPU.

Who belongs together, jax finds out by itself on Cloud TPU pods, GKE's TPU node pools, SLURM and Open MPI;
elsewhere it must be told. A process alone, the usual case, needs nothing.
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

import jax
from absl import logging

from richhf_jax import errors

# How long process 0 may work when the others are done: evaluation measures and writes its report there.
_FAREWELL_SECONDS = 3600
# Others may have failed for the same reason, and shall say so before the end of process 0 ends them.
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
    """Inside, jax sees the devices of all processes. No jax computation may have run before.

    No process outlives another by more than `heartbeat_timeout`, and each that didn't finish says so in its
    last line.

    Args:
      coordinator_address: host:port of process 0; with the next two, in place of what jax finds out.
      process_count: how many processes there are.
      process_index: which one this is, from 0.
      enabled: False: this process is alone. None: it is where the environment knows of no others.
      initialization_timeout: seconds that the processes wait for each other at the start.
      heartbeat_timeout: seconds without a sign of life after which a process counts as lost.

    Raises:
      errors.UserError: the three numbers don't fit together, or jax can't find out what they are.
    """
    given = _check(coordinator_address, process_count, process_index)
    if not (given or _has_others() if enabled is None else enabled):
        yield
        return
    name = f"process {process_index} of {process_count}" if given else f"process on {socket.gethostname()}"
    words = _LastWords()
    words.say(
        f"{name}: the others aren't there after {initialization_timeout} s (--initialization_timeout); start"
        " all, each with its --process_index and with a --coordinator_address of process 0 that all can reach"
    )
    try:
        _connect(coordinator_address, process_count, process_index, initialization_timeout, heartbeat_timeout)
        logging.info("%s; a lost one ends all within %d s", name, heartbeat_timeout)
        words.say(
            f"{name} ended before its work did: it failed or was killed, or another process was lost (see"
            " above). Give the same command again to all; it continues where it was saved last"
        )
        yield
    except BaseException as error:
        if isinstance(error, errors.UserError):
            words.cancel()  # The error says it all.
        atexit.register(_exit_now)
        raise
    jax.distributed.shutdown()
    words.cancel()


def _check(address: str | None, count: int | None, index: int | None) -> bool:
    """Whether the three are given."""
    flags = {"--coordinator_address": address, "--process_count": count, "--process_index": index}
    missing = [flag for flag, value in flags.items() if value is None]
    if len(missing) == len(flags):
        return False
    if missing:
        raise errors.UserError(f"{', '.join(flags)} belong together; give {' and '.join(missing)}, too")
    if not 0 <= index < count:
        raise errors.UserError(f"--process_index={index} of --process_count={count}: they count from 0")
    if not re.fullmatch(r".+:\d+", address):
        raise errors.UserError(f"--coordinator_address={address}: write HOST:PORT, of process 0")
    return True


def _has_others() -> bool:
    """Whether the environment knows of other processes, which jax then finds by itself.

    jax's own detection would also take a shell in a SLURM allocation for one of several tasks, and leave a
    single task only one of its GPUs.
    """
    env = os.environ
    if "tpu" in _platforms():
        hosts = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES")
        if hosts:  # on GKE
            return "," in hosts or int(env.get("MEGASCALE_NUM_SLICES", 1)) > 1
        # A Cloud TPU VM has a server to ask. It may well be alone, which jax takes for 1 process.
        return "TPU_SKIP_MDS_QUERY" not in env
    return any(int(env.get(size, 1)) > 1 for size in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))


def _platforms() -> str:
    """Of jax: as the user says, or "tpu,cpu" where jax sees a TPU, or ""."""
    return jax.config.jax_platforms or ""


def _connect(address: str | None, count: int | None, index: int | None, timeout: int, heartbeat: int) -> None:
    try:
        if index == 0:  # jax may crash where the port is taken.
            with socket.create_server(("", int(address.rpartition(":")[2]))):
                pass
        jax.distributed.initialize(
            address,
            count,
            index,
            # Otherwise jax looks for a cluster even so, and gives each process one GPU.
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
    """Prints a line when this process has ended in whatever way.

    jax aborts the process when another one is lost, and the system kills one that takes too much memory:
    neither lets Python say a word.
    """

    _PRINT_LAST = 'while IFS= read -r line; do last=$line; done; [ -z "$last" ] || printf "%s\\n" "$last" >&2'

    def __init__(self):
        # A session of its own: Ctrl-C is not for it.
        self._printer = subprocess.Popen(
            ["sh", "-c", self._PRINT_LAST], stdin=subprocess.PIPE, start_new_session=True
        )

    def say(self, line: str) -> None:
        """What will be printed, in place of what was."""
        self._printer.stdin.write(f"{line}\n".encode())
        self._printer.stdin.flush()

    def cancel(self) -> None:
        """Nothing will be printed."""
        self._printer.communicate(b"\n")


def _exit_now() -> None:
    """Ends this process without jax's farewell, which would wait until the others are done, too."""
    time.sleep(_LINGER_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
