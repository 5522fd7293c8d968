"""Keeps two jobs from writing to the same directory, on local disks, shared disks and buckets.

    with locking.held(model_dir, "--gin.MODEL_DIR=DIR") as lock:
        ...
        lock.check()  # Before a write: the directory may be gone, or another job's.

Two things make a lock:

- `flock` of the directory. The system ends it with the process, also after SIGKILL. It counts on one machine;
  buckets don't have it, nor does NFS for a directory.
- A record in the directory, `.lock`: host, process, time, and a number that the owner raises every
  `BEAT_SECONDS`. TensorStore writes it on the condition that nobody else did meanwhile.

A record that a dead process left on a disk of this machine is taken over at once. Any other record is
watched: if its number rises, its owner lives; if it stays the same for `STALE_SECONDS`, it is taken over. So
no clocks are compared. An owner that was suspended meanwhile learns of it by `Lock.check`.
"""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import tensorstore as ts
from etils import epath

from richhf_jax import errors, foreign_text, writing

RECORD = ".lock"
# The record, and the file that TensorStore renames to it, which a kill may leave.
FILES = (RECORD, f"{RECORD}.__lock")
BEAT_SECONDS = 15
STALE_SECONDS = 75
_POLL_SECONDS = 1
# Attempts to delete the record.
_DELETIONS = 3
# Codes of `flock` where the file system has none for directories.
_NO_FLOCK = frozenset({errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP})
_BOOT_ID = pathlib.Path("/proc/sys/kernel/random/boot_id")


@contextlib.contextmanager
def held(directory: epath.PathLike, flag: str) -> Iterator["Lock"]:
    """Locks a directory until the end of the block, or of the process.

    Args:
      directory: a path, or the URL of a bucket's folder. A local directory is made if it doesn't exist.
      flag: the flag that names the directory, for messages.

    Raises:
      errors.UserError: another process holds the lock; or the directory can't be made, read or written.
    """
    place = os.fspath(directory)
    place = place if "://" in place else os.path.abspath(place)
    with contextlib.ExitStack() as stack:
        with writing.explained_disk_errors(place, also=(ValueError,)):  # ValueError is TensorStore's.
            descriptor = None
            if "://" not in place:
                if os.path.lexists(place) and not os.path.isdir(place):
                    raise errors.UserError(f"{place} is no directory: name another one with {flag}")
                writing.make_folder(place)
                descriptor = os.open(place, os.O_RDONLY)
                stack.callback(os.close, descriptor)
            lock = Lock(place, flag, descriptor)
        stack.callback(lock.release)
        yield lock


class Lock:
    """The lock of a directory; `held` makes it."""

    def __init__(self, place: str, flag: str, descriptor: int | None):
        """Takes the lock, and begins to renew it.

        Args:
          place: the directory, an absolute path or a URL.
          flag: the flag that names the directory.
          descriptor: the open directory; None for a URL.

        Raises:
          errors.UserError: another process holds the lock.
          OSError, ValueError: the directory can't be read or written.
        """
        self._place, self._flag, self._descriptor = place, flag, descriptor
        self._loss: str | None = None
        self._own: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
            "machine": _machine(),
            "token": uuid.uuid4().hex,
            "beat": 0,
        }
        path = {"driver": "file", "path": f"{place}/"} if descriptor is not None else f"{place}/"
        self._store = ts.KvStore.open(path).result()
        self._take(self._has_flock())
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Checks that the directory is still there and this process still owns it.

        A local directory is looked at now; of a bucket, it tells what was found at the last renewal.

        Raises:
          errors.UserError: it isn't. Nothing more must be written.
        """
        if self._loss is None and not self._is_there():
            self._loss = "was deleted, moved or emptied"
        if self._loss:
            raise errors.UserError(
                f"{self._place} {self._loss} while this process wrote to it. Bring the directory back and"
                " give the same command again, or begin anew"
            )

    def release(self) -> None:
        """Ends the renewals and deletes the record; warns where it can't be deleted."""
        self._end.set()
        self._thread.join()
        problem = ""
        for attempt in range(_DELETIONS):
            time.sleep(_POLL_SECONDS * bool(attempt))
            try:
                record, generation = self._read()
                # TensorStore would make a directory that was deleted.
                if not (self._is_own(record) and self._is_there()) or self._write(None, generation):
                    return
                problem = "its generation changes"  # A file system may tell of another time than before.
            except (OSError, ValueError) as error:
                problem = writing.reason(error)
        _say(f"{self._place}: {RECORD} can't be deleted, and stays until another process takes it: {problem}")

    def _has_flock(self) -> bool:
        """Locks the directory on this machine. Returns False where the file system can't."""
        if self._descriptor is None:
            return False
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise self._refusal(self._read()[0] or {}) from error
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
            return False
        return True

    def _take(self, has_flock: bool) -> None:
        """Writes this process's record, maybe in place of one whose owner is dead."""
        while True:
            record, generation = self._read()
            # With `flock`, a process of this machine that wrote the record isn't alive.
            if record and not (has_flock and record.get("machine") == self._own["machine"]):
                self._watch(record, generation)
            if self._write(self._own, generation):
                return

    def _watch(self, record: Mapping[str, Any], generation: bytes) -> None:
        """Returns when a record is deleted or stale; fails when it is renewed."""
        owner = _describe(record)
        _say(
            f"{self._place} is locked by another process ({owner}): watching for up to"
            f" {STALE_SECONDS} s whether that lives"
        )
        end = time.monotonic() + STALE_SECONDS
        while time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
            now, new_generation = self._read()
            if now is None:
                return
            if new_generation != generation:
                raise self._refusal(now)
        _say(f"{self._place}: taking over the lock, which wasn't renewed ({owner})")

    def _keep(self) -> None:
        """Renews the record until the end."""
        while not self._end.wait(BEAT_SECONDS):
            try:
                record, generation = self._read()
                if not self._is_own(record):
                    taker = f"taken by another process ({_describe(record)})" if record else None
                    self._loss = f"was {taker or 'deleted, moved or emptied'}"
                    return
                self._own["beat"] += 1
                self._write(self._own, generation)
            except (OSError, ValueError) as error:
                _say(f"{self._place}: the lock can't be renewed now: {writing.reason(error)}")

    def _read(self) -> tuple[dict[str, Any] | None, bytes]:
        """Returns (record, its generation). The record is None if there is none, and {} if it is damaged."""
        found = self._store.read(RECORD).result()
        if found.state != "value":
            return None, found.stamp.generation
        # Where a kill left TensorStore's file with more bytes in it, the record is followed by their rest.
        text = found.value.decode(errors="replace")
        try:
            return dict(json.JSONDecoder().raw_decode(text)[0]), found.stamp.generation
        except (ValueError, TypeError):
            return {}, found.stamp.generation

    def _write(self, record: Mapping[str, Any] | None, generation: bytes) -> bool:
        """Writes the record, or deletes it (None). Returns False if it changed since `generation`."""
        content = None if record is None else json.dumps(record).encode()
        return bool(self._store.write(RECORD, content, if_equal=generation).result().generation)

    def _is_own(self, record: Mapping[str, Any] | None) -> bool:
        return bool(record) and record.get("token") == self._own["token"]

    def _is_there(self) -> bool:
        """Returns whether a local directory is the one that was locked, with a record. True for a URL."""
        if self._descriptor is None:
            return True
        try:
            same = os.path.samestat(os.stat(self._place), os.fstat(self._descriptor))
            return same and os.path.exists(os.path.join(self._place, RECORD))
        except OSError:
            return False

    def _refusal(self, record: Mapping[str, Any]) -> errors.UserError:
        return errors.UserError(
            f"another process ({_describe(record)}) writes to {self._place}: wait for it, or name another"
            f" directory with {self._flag}"
        )


def _describe(record: Mapping[str, Any]) -> str:
    known = ", ".join(f"{name} {record[name]}" for name in ("host", "pid", "since") if name in record)
    return foreign_text.for_terminal(known or "unknown")


def _say(words: str) -> None:
    """Prints a warning. Not by absl, whose warnings some commands hide."""
    print(f"warning: {words}", file=sys.stderr, flush=True)


def _machine() -> str:
    """Returns a name that no other machine has, and this one until its next start."""
    try:
        return _BOOT_ID.read_text(encoding="utf-8").strip()
    except OSError:  # no Linux
        return socket.gethostname()
