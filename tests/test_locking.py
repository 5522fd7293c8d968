"""Locks of directories: who is refused, who takes over, and what an owner learns."""

import contextlib
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
import types

import pytest
import tensorstore as ts

from richhf_jax import errors, locking

FLAG = "--out"
HOLD = """
import sys, time
from richhf_jax import locking
with locking.held(sys.argv[1], "--out"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def no_flock(monkeypatch):
    """Stands for a file system that has no `flock` for directories."""

    def refuse(*args):
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(locking, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(locking, "STALE_SECONDS", 0.3)
    monkeypatch.setattr(locking, "_POLL_SECONDS", 0.02)


def leave_a_record(folder, **changes) -> None:
    """Writes the record of a process that was killed."""
    with locking.held(folder, FLAG):
        record = json.loads((folder / locking.RECORD).read_text())
    (folder / locking.RECORD).write_text(json.dumps(record | {"pid": 12345, "token": "x"} | changes))


def test_the_second_is_refused_and_told_whose_lock_it_is(tmp_path):
    folder = tmp_path / "a b%20?#/ü"
    with locking.held(folder, FLAG) as lock:
        record = json.loads((folder / locking.RECORD).read_text())
        assert record["pid"] == os.getpid()
        owner = (
            f"another process (host {record['host']}, pid {os.getpid()}, since {record['since']}) writes to"
        )
        with pytest.raises(errors.UserError) as refused, locking.held(os.path.relpath(folder), FLAG):
            pass
        lock.check()
    assert str(refused.value) == f"{owner} {folder}: wait for it, or name another directory with --out"
    assert list(folder.iterdir()) == []  # Nothing is left.
    with locking.held(folder, FLAG):
        pass


def test_a_killed_owner_is_replaced_at_once(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout.readline() == "held\n"
        with pytest.raises(errors.UserError, match=f"pid {owner.pid}, "), locking.held(tmp_path, FLAG):
            pass
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        assert (tmp_path / locking.RECORD).exists()
        begin = time.monotonic()
        with locking.held(tmp_path, FLAG):
            assert time.monotonic() - begin < locking.BEAT_SECONDS


def test_an_owner_on_another_machine_that_lives_is_seen_by_its_beats(tmp_path, fast, no_flock, capsys):
    with locking.held(tmp_path, FLAG) as lock:
        with pytest.raises(errors.UserError, match="another process"), locking.held(tmp_path, FLAG):
            pass
        lock.check()
    assert "whether that lives" in capsys.readouterr().err


@pytest.mark.parametrize("has_flock", [True, False])
def test_a_record_of_another_machine_that_is_not_renewed_is_taken_over(
    tmp_path, fast, capsys, has_flock, request
):
    leave_a_record(tmp_path, host="other\x1b[1m", machine="another")
    if not has_flock:
        request.getfixturevalue("no_flock")
    begin = time.monotonic()
    with locking.held(tmp_path, FLAG) as lock:
        assert time.monotonic() - begin >= locking.STALE_SECONDS
        lock.check()
    assert (
        "taking over the lock, which wasn't renewed (host other\\x1b[1m, pid 12345" in capsys.readouterr().err
    )


def test_a_lock_that_is_released_while_it_is_watched(tmp_path, fast, no_flock, monkeypatch):
    leave_a_record(tmp_path)
    monkeypatch.setattr(locking, "STALE_SECONDS", 60)
    sleep = time.sleep

    def release(seconds):
        (tmp_path / locking.RECORD).unlink(missing_ok=True)
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", release)
    with locking.held(tmp_path, FLAG):
        pass


def test_a_damaged_record_has_no_owner(tmp_path, no_flock):
    (tmp_path / locking.RECORD).write_text("{")
    with locking.held(tmp_path, FLAG) as lock:
        lock.check()


def test_a_record_over_the_rest_of_a_longer_one_is_read(tmp_path, fast, no_flock):
    """TensorStore writes over a file that a kill left, and doesn't shorten it."""
    (tmp_path / locking.FILES[1]).write_bytes(b'}"\xff' * 200)
    with locking.held(tmp_path, FLAG) as lock:
        assert (tmp_path / locking.RECORD).read_bytes().endswith(b'}"\xff')
        lock.check()
        with pytest.raises(errors.UserError, match=f"pid {os.getpid()}, "), locking.held(tmp_path, FLAG):
            pass
    assert list(tmp_path.iterdir()) == []


def test_an_owner_learns_that_another_took_over(tmp_path, fast, no_flock):
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(locking.held(tmp_path, FLAG))
        record = json.loads((tmp_path / locking.RECORD).read_text())
        (tmp_path / locking.RECORD).write_text(json.dumps(record | {"token": "x", "pid": 12345}))
        lock._thread.join()  # It ends when the lock is lost.
        with pytest.raises(
            errors.UserError, match=r"was taken by another process \(.*pid 12345.* while this"
        ):
            lock.check()
    assert (tmp_path / locking.RECORD).exists()  # The other's record stays.


def remove(folder):
    for path in [*folder.iterdir()]:
        path.unlink()
    folder.rmdir()


def remove_and_make(folder):
    remove(folder)
    folder.mkdir()


@pytest.mark.parametrize(
    "change",
    [
        remove,
        remove_and_make,
        lambda folder: folder.rename(f"{folder}.old"),
        lambda folder: (folder / locking.RECORD).unlink(),
    ],
)
@pytest.mark.parametrize("at_once", [True, False])
def test_a_directory_that_disappears(tmp_path, fast, monkeypatch, change, at_once):
    folder = tmp_path / "run"
    if at_once:  # Before the next beat.
        monkeypatch.setattr(locking, "BEAT_SECONDS", 60)
    with locking.held(folder, FLAG) as lock:
        change(folder)
        if not at_once:
            lock._thread.join()
        with pytest.raises(
            errors.UserError, match=f"{folder} was deleted, moved or emptied while this process"
        ):
            lock.check()
        there = folder.exists()
    # Releasing the lock makes nothing anew.
    assert folder.exists() == there
    assert not there or list(folder.iterdir()) == []


def test_what_can_not_be_locked(tmp_path):
    (tmp_path / "file").touch()
    for place, words in (
        ("file", "file is no directory: name another one with --out"),
        ("file/run", "Not a directory"),
        ("a\0b", "embedded null"),
    ):
        with pytest.raises(errors.UserError, match=words), locking.held(tmp_path / place, FLAG):
            pass


def test_the_record_keeps_to_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with locking.held(tmp_path / "run", FLAG):
            assert (tmp_path / "run" / locking.RECORD).stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


@pytest.mark.parametrize(("failures", "stays"), [(1, False), (9, True)])
@pytest.mark.parametrize("failure", [b"other", ValueError("busy")])
def test_a_record_that_can_not_be_deleted_at_once(
    tmp_path, fast, monkeypatch, capsys, failures, stays, failure
):
    write, ways = locking.Lock._write, [failure] * failures

    def fail(self, record, generation):
        way = ways.pop() if record is None and ways else generation
        if isinstance(way, Exception):
            raise way
        return write(self, record, way)

    monkeypatch.setattr(locking.Lock, "_write", fail)
    with locking.held(tmp_path, FLAG):
        pass
    assert (tmp_path / locking.RECORD).exists() == stays
    assert (f"{tmp_path}: .lock can't be deleted" in capsys.readouterr().err) == stays


def test_a_bucket_is_locked_by_its_record_alone(fast, monkeypatch):
    """Of TensorStore's in-memory store, which stands for a bucket: it has the same conditional writes."""
    shared = ts.Context()
    store = types.SimpleNamespace(open=lambda url: ts.KvStore.open(url, context=shared))
    monkeypatch.setattr(locking, "ts", types.SimpleNamespace(KvStore=store))
    with locking.held("memory://bucket/run", FLAG) as lock:
        refused = pytest.raises(errors.UserError, match="writes to memory://bucket/run: wait")
        with refused, locking.held("memory://bucket/run", FLAG):
            pass
        lock.check()
        lock._store.write(locking.RECORD, None).result()
        lock._thread.join()
        with pytest.raises(errors.UserError, match="memory://bucket/run was deleted"):
            lock.check()
    with locking.held("memory://bucket/run", FLAG):
        pass


def test_of_two_that_take_over_at_once_one_wins(tmp_path, no_flock):
    with locking.held(tmp_path, FLAG) as lock:
        _, generation = lock._read()
        assert lock._write(lock._own | {"beat": 1}, generation)
        assert not lock._write({"token": "late"}, generation)
        assert lock._read()[0] == lock._own | {"beat": 1}
