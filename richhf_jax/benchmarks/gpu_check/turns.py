"""Lets programs prepare side by side and measure one at a time, on one machine with one device.

Each job is a process. It prepares (compiles) in the background, then asks for the device, which one job has
at a time. While the job measures time, all other jobs are paused (SIGSTOP), so that they disturb neither the
device nor the processors. A job that takes longer than its limit is ended, and the others go on.

A job's process takes part with `Turn`. It writes messages to its standard output, one JSON object a line:

    {"figure": "matrix product", "value": 788.2, "unit": "TFLOP/s"}
    {"ask": "device"}, {"ask": "quiet"}     and waits for a line on its standard input
    {"end": "device"}, {"end": "quiet"}
    {"skip": "no GPU"}                      and exits
"""

import collections
import contextlib
import ctypes
import dataclasses
import json
import os
import pathlib
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

# Lines of a failed job's output that its outcome shows.
_LAST_LINES = 4
# Seconds in which the device ends the work that paused jobs had given it.
_SETTLE_SECONDS = 0.2
# Seconds for a job to exit after its last message.
_EXIT_SECONDS = 15
# Seconds in which a job's process has called `end_with_parent`.
_START_SECONDS = 0.5
_PR_SET_PDEATHSIG = 1
# Environment variable with the id of the scheduler's process.
_PARENT = "GPU_CHECK_PARENT"


class Skip(Exception):
    """The job can't measure anything here, for the reason that the message gives."""


def end_with_parent() -> None:
    """Makes the kernel end this job's process when the scheduler's ends, however that is killed."""
    if parent := os.environ.get(_PARENT):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(parent):
            sys.exit("the program that started this job has ended")


class Turn:
    """The side of the job's own process."""

    def __init__(self):
        """Takes standard output for messages; what others print goes to standard error from now on."""
        # Open until the process has ended, because the scheduler doesn't pause one that has closed it.
        self._messages = os.fdopen(os.dup(1), "w", encoding="utf-8", closefd=False)
        os.dup2(2, 1)

    def figure(self, name: str, value: Any, unit: str = "", **more: Any) -> None:
        """Tells a figure.

        Args:
          name: the figure's name, the same in each run.
          value: a number or a text.
          unit: the number's unit.
          **more: `against`, a job's name: the ratio of that job's figure of this name to this one is told,
            too. `span`, the times of `time.monotonic` at the beginning and the end: the value becomes the
            seconds between them without those in which this job was paused. Anything else is kept as it is.
        """
        self._send(figure=name, value=value, unit=unit, **more)

    @contextlib.contextmanager
    def span(self, name: str, **more: Any) -> Iterator[None]:
        """Tells the seconds that the block takes, without those in which this job was paused."""
        begin = time.monotonic()
        yield
        self.figure(name, None, "s", span=[begin, time.monotonic()], **more)

    @contextlib.contextmanager
    def device(self) -> Iterator[None]:
        """Waits until no other job has the device, and keeps it during the block."""
        with self._granted("device"):
            yield

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Pauses all other jobs during the block; the device must be this job's."""
        with self._granted("quiet"):
            yield

    def skip(self, reason: str) -> None:
        """Tells why there are no figures."""
        self._send(skip=reason)

    @contextlib.contextmanager
    def _granted(self, what: str) -> Iterator[None]:
        self._send(ask=what)
        if not sys.stdin.readline():
            raise RuntimeError("the program that started this job has ended")
        try:
            yield
        finally:
            self._send(end=what)

    def _send(self, **message: Any) -> None:
        self._messages.write(json.dumps(message, allow_nan=False) + "\n")
        self._messages.flush()


@dataclasses.dataclass(frozen=True)
class Job:
    """A program to run.

    Attributes:
      name: the job's name.
      command: the program and its arguments.
      limit: seconds that it may take, without those in which it was paused or waited for the device.
      after: jobs that must have ended before this one starts.
    """

    name: str
    command: Sequence[str]
    limit: float
    after: Sequence[str] = ()


class _Run:
    """A job's process."""

    def __init__(
        self, job: Job, log: pathlib.Path, env: Mapping[str, str], cwd: pathlib.Path, messages: queue.Queue
    ):
        self.job = job
        self.asks = ""  # What it waits for, "device" or "quiet".
        self.skipped = ""
        self.pauses: list[list[float]] = []
        self.paused = False
        self._log = log
        self._used, self._since = 0.0, time.monotonic()
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                job.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file,
                env={**env, _PARENT: str(os.getpid())}, cwd=cwd, text=True, start_new_session=True,
            )  # fmt: skip
        self._reader = threading.Thread(target=self._read, args=(messages,), daemon=True)
        self._reader.start()

    def _read(self, messages: queue.Queue) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            with contextlib.suppress(json.JSONDecodeError):  # Of a process that was killed as it wrote.
                messages.put((self, json.loads(line)))
        messages.put((self, None))

    def used(self) -> float:
        """Returns the seconds that count for the limit."""
        stopped = self.paused or self.asks
        return self._used + (0 if stopped else time.monotonic() - self._since)

    def wait_for(self, what: str) -> None:
        self._used, self.asks = self.used(), what

    def grant(self) -> None:
        self.asks, self._since = "", time.monotonic()
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # It has ended.
            self._process.stdin.write("\n")
            self._process.stdin.flush()

    def pause(self) -> None:
        if not self.paused and self._signal(signal.SIGSTOP):
            self._used, self.paused = self.used(), True
            self.pauses.append([time.monotonic(), float("inf")])

    def resume(self) -> None:
        if self.paused:
            self.pauses[-1][1] = time.monotonic()
            self.paused, self._since = False, time.monotonic()
            self._signal(signal.SIGCONT)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def seconds(self, begin: float, end: float) -> float:
        """Returns the seconds between two times in which it wasn't paused."""
        paused = sum(max(0.0, min(end, until) - max(begin, since)) for since, until in self.pauses)
        return end - begin - paused

    def outcome(self) -> str:
        """Waits for its end, and tells how it ended."""
        try:
            code = self._process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            code = self._process.wait(_EXIT_SECONDS)
        self.kill()  # Processes that it may have left behind.
        self._reader.join(_EXIT_SECONDS)
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()  # type: ignore[union-attr]
        if code == 0:
            return f"skipped: {self.skipped}" if self.skipped else "done"
        lines = self._log.read_text("utf-8", "replace").strip().splitlines()[-_LAST_LINES:]
        return f"failed with exit code {code}: " + " | ".join(lines)

    def _signal(self, number: int) -> bool:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return False
        return True


class Scheduler:
    """Runs jobs.

    Attributes:
      outcomes: job's name -> how it ended: "done", "skipped: …" or "failed …".
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        parallel: int,
        tell: Callable[[str, Mapping[str, Any]], None],
        logs: pathlib.Path,
        env: Mapping[str, str],
        cwd: pathlib.Path,
        ended: Callable[[str, str], None] = lambda name, outcome: None,
    ):
        """Starts nothing yet.

        Args:
          jobs: in the order in which they start, and get the device if several wait for it.
          parallel: number of jobs that may prepare at once.
          tell: gets each figure at once, with its job's name. See `Turn.figure`.
          logs: a folder for the jobs' standard error, a file each.
          env: environment of the jobs.
          cwd: working directory of the jobs.
          ended: gets each job's name and outcome at once.
        """
        self.outcomes: dict[str, str] = {}
        self._waiting = collections.OrderedDict((job.name, job) for job in jobs)
        self._order = list(self._waiting)
        self._parallel, self._tell, self._ended = parallel, tell, ended
        self._logs, self._env, self._cwd = logs, env, cwd
        self._runs: dict[str, _Run] = {}
        self._holder: _Run | None = None  # It has the device,
        self._quiet = False  # and all others are paused.
        self._messages: queue.Queue[tuple[_Run, Mapping[str, Any] | None]] = queue.Queue()
        self._values: dict[tuple[str, str], Any] = {}

    def run(self, seconds: float) -> None:
        """Runs all jobs; after the seconds, ends those that are left."""
        deadline, reason = time.monotonic() + seconds, "it was interrupted"
        try:
            while (self._waiting or self._runs) and time.monotonic() < deadline:
                self._start()
                self._grant_device()
                left = [run.job.limit - run.used() for run in self._runs.values() if not run.asks]
                wait = min([deadline - time.monotonic(), 1.0, *left])
                with contextlib.suppress(queue.Empty):
                    self._handle(*self._messages.get(timeout=max(wait, 0.01)))
                self._end_overdue()
            reason = "the time was over"
        finally:
            for run in list(self._runs.values()):
                run.kill()
                self._end(run, f"stopped: {reason}")
            for name in self._waiting:
                self._told_end(name, f"not started: {reason}")
            self._waiting.clear()

    def _start(self) -> None:
        for job in list(self._waiting.values()):
            preparing = sum(not run.asks and run is not self._holder for run in self._runs.values())
            if preparing >= self._parallel or self._quiet:
                return
            if not any(name in self._waiting or name in self._runs for name in job.after):
                del self._waiting[job.name]
                log = self._logs / f"{job.name}.log"
                self._runs[job.name] = _Run(job, log, self._env, self._cwd, self._messages)

    def _grant_device(self) -> None:
        asking = [name for name in self._order if name in self._runs and self._runs[name].asks == "device"]
        if self._holder is None and asking:
            self._holder = self._runs[asking[0]]
            self._holder.grant()

    def _handle(self, run: _Run, message: Mapping[str, Any] | None) -> None:
        if run.job.name not in self._runs:
            return  # It was ended.
        if message is None:
            self._end(run, None)
        elif "figure" in message:
            self._figure(run, dict(message))
        elif "skip" in message:
            run.skipped = message["skip"]
        elif message.get("ask") == "device":
            run.wait_for("device")
        elif message.get("ask") == "quiet":
            run.wait_for("quiet")
            self._quiet = True
            # A process that is paused before it called `end_with_parent` would stay if this one is killed.
            young = [_START_SECONDS - other.used() for other in self._runs.values() if other is not run]
            time.sleep(max([0.0, *young]))
            self._others(run, _Run.pause)
            time.sleep(_SETTLE_SECONDS)
            run.grant()
        else:
            self._release(run, message["end"])

    def _figure(self, run: _Run, message: dict[str, Any]) -> None:
        if span := message.pop("span", None):
            message["value"] = run.seconds(*span)
            message["paused_seconds"] = span[1] - span[0] - message["value"]
        name, value = message["figure"], message["value"]
        self._values[run.job.name, name] = value
        self._tell(run.job.name, message)
        if other := self._values.get((str(message.get("against")), name)):
            ratio = {"figure": f"{name}: {message['against']} / {run.job.name}", "value": other / value}
            self._tell(run.job.name, ratio)

    def _release(self, run: _Run, what: str) -> None:
        self._quiet = False
        self._others(run, _Run.resume)
        if what == "device":
            self._holder = None

    def _others(self, run: _Run, action: Callable[[_Run], None]) -> None:
        for other in self._runs.values():
            if other is not run:
                action(other)

    def _end_overdue(self) -> None:
        for run in list(self._runs.values()):
            if run.used() >= run.job.limit:
                run.kill()
                self._end(run, f"skipped: it took more than its {run.job.limit:.0f} s")

    def _end(self, run: _Run, outcome: str | None) -> None:
        if self._holder is run:
            self._release(run, "device")
        del self._runs[run.job.name]
        own = run.outcome()
        self._told_end(run.job.name, outcome or own)

    def _told_end(self, name: str, outcome: str) -> None:
        self.outcomes[name] = outcome
        self._ended(name, outcome)
