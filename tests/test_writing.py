import errno
import fcntl
import os
import pathlib
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from concurrent import futures

import pytest

from richhf_jax import errors, writing

FULL = "No space left on device"


def full_disk(*args):
    raise OSError(errno.ENOSPC, FULL)


def tree(folder: pathlib.Path) -> list[str]:
    """Lists everything in a folder, also hidden files."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def permissions(path: pathlib.Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def umask():
    """Sets the process's umask."""
    previous = os.umask(0)
    yield os.umask
    os.umask(previous)


@pytest.fixture
def calls(monkeypatch) -> list[tuple[str, ...]]:
    """Lists the files that are synchronised and renamed, in order."""
    found = []
    fsync, replace = os.fsync, os.replace

    def spy_fsync(descriptor):
        found.append(("fsync", pathlib.Path(f"/proc/self/fd/{descriptor}").readlink().name))
        fsync(descriptor)

    def spy_replace(source, target):
        found.append(("replace", pathlib.Path(source).name, pathlib.Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    return found


@pytest.mark.parametrize("content", ["ü\n", "ü\n".encode()])
def test_a_file_is_written(tmp_path, content):
    writing.write(str(tmp_path / "a.txt"), content)
    assert (tmp_path / "a.txt").read_bytes() == "ü\n".encode()
    assert tree(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError("a bug"), OSError(errno.EIO, "a disk")])
def test_an_error_in_the_middle_leaves_the_old_file_alone(tmp_path, error):
    (tmp_path / "a.txt").write_text("old")

    def write():
        with writing.atomic(tmp_path / "a.txt") as new:
            new.write_text("half")
            assert (tmp_path / "a.txt").read_text() == "old"
            raise error

    with pytest.raises(error if isinstance(error, type) else type(error)):
        write()
    assert tree(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_what_a_killed_process_leaves_is_replaced(tmp_path):
    code = (
        "import os, signal, sys; from richhf_jax import writing\n"
        "with writing.atomic(sys.argv[1]) as new:\n"
        "    new.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    (tmp_path / "a.txt").write_text("old")
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.txt")], check=False)
    assert (tmp_path / "a.txt").read_text() == "old"
    (litter,) = set(tree(tmp_path)) - {"a.txt"}
    (tmp_path / litter).chmod(0o400)
    writing.write(tmp_path / "a.txt", "new")
    assert tree(tmp_path) == ["a.txt"]
    assert permissions(tmp_path / "a.txt") != 0o400


def test_a_writer_waits_for_another_of_the_same_file(tmp_path):
    def write(content):
        with writing.atomic(tmp_path / "a.txt") as new:
            started.set()
            new.write_text(content)
            go_on.wait()

    started, go_on = threading.Event(), threading.Event()
    with futures.ThreadPoolExecutor() as pool:
        first = pool.submit(write, "first")
        started.wait()
        second = pool.submit(writing.write, tmp_path / "a.txt", "second")
        time.sleep(0.05)
        assert not second.done()
        go_on.set()
        first.result()
        second.result()
    assert (tmp_path / "a.txt").read_text() == "second"
    assert tree(tmp_path) == ["a.txt"]


def test_a_writer_that_has_waited_for_long_gives_up_and_leaves_the_other_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "_PATIENCE_SECONDS", 0.05)
    with writing.atomic(tmp_path / "a.txt") as new:
        new.write_text("first")
        with pytest.raises(errors.UserError, match=f"another process is writing {tmp_path}/a.txt: wait"):
            writing.write(tmp_path / "a.txt", "second")
    assert (tmp_path / "a.txt").read_text() == "first"


def test_many_writers_of_one_file(tmp_path):
    contents = [str(number) * 10000 for number in range(10)]
    with futures.ThreadPoolExecutor(10) as pool:
        list(pool.map(lambda content: writing.write(tmp_path / "a.txt", content), contents * 3))
    assert (tmp_path / "a.txt").read_text() in contents
    assert tree(tmp_path) == ["a.txt"]


def test_file_systems_that_know_no_locks(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / ".a.txt.new").write_text("half")
    writing.write(tmp_path / "a.txt", "content")
    assert tree(tmp_path) == ["a.txt"]


def test_a_file_is_on_the_disk_before_it_has_its_name_and_the_name_before_the_end(tmp_path, calls):
    writing.write(tmp_path / "a.txt", "content")
    assert calls == [
        ("fsync", ".a.txt.new"),
        ("replace", ".a.txt.new", "a.txt"),
        ("fsync", tmp_path.name),
    ]


def test_all_of_a_directory_is_on_the_disk_before_it_has_its_name(tmp_path, calls):
    with writing.new_directory(tmp_path / "new", "--to") as directory:
        (directory / "inner").mkdir()
        for name in ("a", "inner/b"):
            (directory / name).write_text("")
    (renamed,) = [number for number, call in enumerate(calls) if call[0] == "replace"]
    assert calls[renamed] == ("replace", "new", "new")
    assert sorted(calls[:renamed]) == [("fsync", name) for name in ("a", "b", "inner", "new")]
    assert calls[renamed + 1 :] == [("fsync", tmp_path.name)]


def test_new_folders_are_synchronised_in_their_parents(tmp_path, calls):
    writing.make_folder(tmp_path / "some/deep/folder")
    assert sorted(calls) == sorted(("fsync", name) for name in (tmp_path.name, "some", "deep"))
    calls.clear()
    writing.make_folder(tmp_path / "some/deep/folder")
    assert calls == []
    with writing.new_directory(tmp_path / "another/new", "--to"):
        pass
    assert ("fsync", tmp_path.name) in calls


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_file_systems_that_can_not_synchronise(tmp_path, monkeypatch, code):
    def refuse(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    writing.write(tmp_path / "a.txt", "content")
    assert (tmp_path / "a.txt").read_text() == "content"


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_are_those_that_the_user_wants(tmp_path, umask, mask):
    umask(mask)
    writing.write(tmp_path / "a.txt", "")
    assert permissions(tmp_path / "a.txt") == 0o666 & ~mask
    with writing.new_directory(tmp_path / "new", "--to") as directory:
        (directory / "a.txt").touch()
    assert permissions(tmp_path / "new") == 0o777 & ~mask
    assert permissions(tmp_path / "new/a.txt") == 0o666 & ~mask


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_that_a_library_gave_become_the_usual_ones(tmp_path, umask, mask):
    umask(mask)
    with writing.new_directory(tmp_path / "new", "--to") as directory:
        (directory / "inner").mkdir()
        (directory / "inner").chmod(0o755)
        for name, mode in (("a", 0o600), ("inner/b", 0o666), ("inner/c", 0o755)):
            (directory / name).touch()
            (directory / name).chmod(mode)
    assert permissions(tmp_path / "new/inner") == 0o777 & ~mask
    assert {permissions(tmp_path / "new" / name) for name in ("a", "inner/b", "inner/c")} == {0o666 & ~mask}


@pytest.mark.parametrize("name", ["the text", "fsync", "replace"])
def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path, monkeypatch, name):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write():
        with writing.explained_disk_errors("elsewhere", "Make room"), writing.atomic(path) as new:
            new.write_text("new")
            if name == "the text":
                full_disk()

    with monkeypatch.context() as patch:
        if name != "the text":
            patch.setattr(os, name, full_disk)
        with pytest.raises(errors.UserError, match=f"^{path}: {FULL}. Make room$"):
            write()
    assert tree(tmp_path) == ["a.txt"]
    assert path.read_text() == "old"


def test_a_folder_in_place_of_a_file_is_told_at_writing_too(tmp_path):
    with pytest.raises(errors.UserError, match=f"^{tmp_path}: Is a directory. Name a file, for instance one"):
        writing.write_or_print("text", str(tmp_path))


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("no/a.txt", "No such file or directory"),
        ("folder", "Is a directory"),
        ("file/a.txt", "Not a directory"),
    ],
)
def test_places_where_no_file_can_be(tmp_path, path, reason):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=f"{reason}: '{tmp_path / path}'$"):
        writing.write(tmp_path / path, "content")
    assert tree(tmp_path) == ["file", "folder"]


def test_a_folder_that_is_read_only(tmp_path, monkeypatch):
    # As root nothing is read-only.
    def refuse(path, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr("io.open", refuse)
    with (
        pytest.raises(errors.UserError, match=f"^{tmp_path}/a.txt: Permission denied. Make the folder, make"),
        writing.explained_disk_errors(tmp_path),
    ):
        writing.write(tmp_path / "a.txt", "content")


def test_a_link_stays_one(tmp_path):
    (tmp_path / "place").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "place/a.txt")
    for content in ("first", "second"):
        writing.write(tmp_path / "link", content)
        assert (tmp_path / "place/a.txt").read_text() == content
    assert tree(tmp_path) == ["link", "place", "place/a.txt"]
    assert (tmp_path / "link").is_symlink()


def test_a_pipe_is_written_directly(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    writing.write(tmp_path / "pipe", "content")
    assert os.read(reader, 100) == b"content"
    os.close(reader)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_standard_output_is_not_replaced(tmp_path):
    code = "from richhf_jax import writing; print('before', flush=True); writing.write('/dev/stdout', 'text')"
    with (tmp_path / "out.txt").open("a") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True)
        assert os.path.samestat(os.fstat(out.fileno()), (tmp_path / "out.txt").stat())
    assert "text" in (tmp_path / "out.txt").read_text()
    assert tree(tmp_path) == ["out.txt"]


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no /dev/shm")
def test_a_disk_among_the_devices_is_a_disk(calls):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        writing.write(f"{folder}/a.txt", "content")
    assert ("replace", ".a.txt.new", "a.txt") in calls


class TestNewDirectory:
    def test_appears_at_the_end_with_its_parents(self, tmp_path):
        with writing.new_directory(str(tmp_path / "some/new"), "--to") as directory:
            (directory / "a").touch()
            assert not (tmp_path / "some/new").exists()
        assert tree(tmp_path) == ["some", "some/new", "some/new/a"]

    def test_takes_the_place_of_an_empty_one(self, tmp_path):
        (tmp_path / "to").mkdir()
        with writing.new_directory(tmp_path / "to", "--to") as directory:
            (directory / "a").touch()
        assert tree(tmp_path) == ["to", "to/a"]

    @pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.ENOSPC, FULL)])
    def test_nothing_is_left_after_an_error(self, tmp_path, error):
        def write():
            with writing.new_directory(tmp_path / "to", "--to") as directory:
                (directory / "a").touch()
                raise error

        with pytest.raises(error if isinstance(error, type) else type(error)):
            write()
        assert tree(tmp_path) == []

    def test_what_a_killed_process_left_is_replaced(self, tmp_path):
        code = (
            "import os, signal, sys; from richhf_jax import writing\n"
            "with writing.new_directory(sys.argv[1], '--to') as directory:\n"
            "    (directory / 'half').touch(); os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        for _ in range(2):
            subprocess.run([sys.executable, "-c", code, str(tmp_path / "to")], check=False)
            assert tree(tmp_path) == [".to.new", ".to.new/lock", ".to.new/to", ".to.new/to/half"]
        with writing.new_directory(tmp_path / "to", "--to") as directory:
            (directory / "a").touch()
        assert tree(tmp_path) == ["to", "to/a"]

    def test_another_process_that_writes_the_same_is_left_alone(self, tmp_path):
        def write():
            with writing.new_directory(tmp_path / "to", "--to"):
                pass

        with writing.new_directory(tmp_path / "to", "--to") as directory:
            (directory / "a").touch()
            with pytest.raises(errors.UserError, match=f"another process is writing {tmp_path}/to: wait"):
                write()
        assert tree(tmp_path) == ["to", "to/a"]

    def test_an_error_names_the_final_path(self, tmp_path):
        def write():
            with writing.new_directory(tmp_path / "to", "--to") as directory:
                (directory / "no/a").touch()

        with pytest.raises(FileNotFoundError, match=f"No such file or directory: '{tmp_path}/to/no/a'$"):
            write()

    def test_a_parent_that_vanishes(self, tmp_path):
        def write():
            with (
                writing.explained_disk_errors("OUT", "Fix it"),
                writing.new_directory(tmp_path / "some/to", "--to"),
            ):
                shutil.rmtree(tmp_path / "some")

        with pytest.raises(
            errors.UserError, match=f"^{tmp_path}/some/to: No such file or directory. Fix it$"
        ):
            write()
        assert tree(tmp_path) == []

    def test_a_directory_that_appears_meanwhile_is_not_overwritten(self, tmp_path):
        def write():
            with writing.new_directory(str(tmp_path / "to"), "--to") as directory:
                (directory / "ours").touch()
                (tmp_path / "to").mkdir()
                (tmp_path / "to/theirs").touch()

        with pytest.raises(OSError, match="not empty"):
            write()
        assert tree(tmp_path) == ["to", "to/theirs"]

    @pytest.mark.parametrize(
        ("path", "message"),
        [
            ("to", "to is not empty: name a new directory with --out"),
            ("to/mine", "to/mine is no directory: name a new one with --out"),
            ("gs://a/b", "--out=gs://a/b: a local directory is needed; copy the files when they are there"),
        ],
    )
    def test_what_is_there_stays(self, tmp_path, monkeypatch, path, message):
        monkeypatch.chdir(tmp_path)
        pathlib.Path("to").mkdir()
        pathlib.Path("to/mine").touch()
        with pytest.raises(errors.UserError, match=f"^{re.escape(message)}$"):
            writing.check_is_new(path, "--out")
        told = pytest.raises(errors.UserError, match=f"^{re.escape(message)}$")
        with told, writing.new_directory(path, "--out"):
            pass
        assert tree(tmp_path) == ["to", "to/mine"]


class LibraryError(Exception):
    """A library's own exception."""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.EROFS, "Read-only file system", "a/b"), "a/b: Read-only file system. Fix it"),
        (OSError(errno.ENOSPC, FULL), f"OUT: {FULL}. Fix it"),
        (OSError("Forbidden: bucket\nmore"), "OUT: OSError: Forbidden: bucket. Fix it"),
        (LibraryError("can't\nmore"), "OUT: LibraryError: can't. Fix it"),
        (
            ValueError("""Error opening "zarr": Writing "/a/b.lock": [os_error_code='28'] [more]"""),
            f"/a/b.lock: {FULL}. Fix it",
        ),
    ],
)
def test_disk_errors_are_explained(error, message):
    also = (LibraryError, ValueError)
    with pytest.raises(errors.UserError) as explained, writing.explained_disk_errors("OUT", "Fix it", also):
        raise error
    assert str(explained.value) == message
    assert explained.value.__cause__ is error


def test_foreign_names_stay_on_one_line():
    error = OSError(errno.EACCES, "Permission denied", "a\x1b]0;\nb")
    told = pytest.raises(errors.UserError, match=re.escape(r"a\x1b]0;\nb: Permission denied. Fix"))
    with told, writing.explained_disk_errors("OUT", "Fix it"):
        raise error
    assert writing.reason(error) == r"Permission denied: a\x1b]0;\nb"
    assert writing.reason(OSError(errno.EIO, "Input/output error", 7)) == "Input/output error"


def test_other_errors_pass():
    with pytest.raises(LibraryError), writing.explained_disk_errors("OUT"):
        raise LibraryError
    only = writing.NO_ROOM_OR_RIGHT
    with pytest.raises(FileNotFoundError), writing.explained_disk_errors("OUT", only=only):
        raise FileNotFoundError(errno.ENOENT, "No such file", "data")
    with pytest.raises(errors.UserError, match=FULL), writing.explained_disk_errors("OUT", only=only):
        full_disk()


def test_the_reason_for_a_message_of_ones_own():
    assert writing.reason(OSError(errno.ENOSPC, FULL, "a/b")) == f"{FULL}: a/b"
    assert writing.reason(ValueError("wrong\nmore")) == "ValueError: wrong"


def test_a_run_continues_with_the_same_arguments():
    # JSON has no tuples.
    then = {"split": "test", "sizes": [1, 2], "of an older version": 1}
    writing.check_same_run("OUT", then, {"split": "test", "sizes": (1, 2)}, "Fix it")


def test_arguments_that_differ_are_named():
    with pytest.raises(errors.UserError) as told:
        writing.check_same_run(
            "OUT", {"a": 1, "b": "x", "c": 0}, {"a": 1, "b": "y", "c": 0, "d": 2}, "Fix it"
        )
    assert str(told.value) == (
        "OUT holds a run with other arguments: b was 'x', now it is 'y'; d was None, now it is 2. Fix it"
    )


def test_a_link_to_an_empty_directory_is_followed(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    with writing.new_directory(tmp_path / "link", "--to") as directory:
        (directory / "a").write_text("here")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "empty/a").read_text() == "here"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no/a.html", "no/a.html: No such file or directory. Make the folder, "),
        (".", "Is a directory. Name a file, for instance one inside it$"),
        ("file/a.html", "No such file"),
    ],
)
def test_a_file_is_checked_before_the_work(tmp_path, path, message):
    (tmp_path / "file").touch()
    with pytest.raises(errors.UserError, match=message):
        writing.check_file(tmp_path / path)
    for good in (tmp_path / "file", tmp_path / "new", "gs://bucket/x", "/dev/stdout"):
        writing.check_file(good)


def test_what_a_kill_behind_the_renaming_left_is_removed(tmp_path):
    out, left = tmp_path / "out", tmp_path / ".out.new"
    with writing.new_directory(out, "--out") as directory:
        (directory / "file").write_text("whole")
    left.mkdir()
    (left / "lock").touch()
    with pytest.raises(errors.UserError, match="is not empty"):
        writing.check_is_new(out, "--out")
    assert not left.exists()
    assert (out / "file").read_text() == "whole"
