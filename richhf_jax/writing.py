"""Writes files and directories that are complete once they have their name, and explains disk errors.

    with writing.explained_disk_errors(out), writing.atomic(out) as new:
        new.write_text(...)

A file with its final name is complete, also after a kill or a power cut. It is written as `.NAME.new` in the
same folder and synchronised to the disk; then it is renamed, and the folder is synchronised. A folder that is
made for it is synchronised in its parent. What a killed process left as `.NAME.new` is replaced; what another
process is writing there is not touched. A file's path may be a URL ("gs://..."): a bucket keeps each file
that it has taken, so nothing is synchronised there.
"""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import re
import shutil
import stat
import time
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from etils import epath

from richhf_jax import errors, foreign_text

# Longest wait for another process that writes the same file, such as a small one of the same command.
_PATIENCE_SECONDS = 10
# Time in which a process makes or removes its lock.
_MOMENT_SECONDS = 0.5
FIX = "Make the folder, make room or give the right to write; then give the same command again"
# Codes of the errors that mean no room, or no right to write.
NO_ROOM_OR_RIGHT = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
)
# Codes of file systems that can't synchronise a folder.
_CAN_NOT_SYNC = (errno.EINVAL, errno.ENOTSUP)
# The last file and the error code in a message of TensorStore. A specification in it has escaped quotes.
_TENSORSTORE_OS_ERROR = re.compile(r".*(?<!\\)\"(?P<file>[^\"\\]+)\".*os_error_code='(?P<code>\d+)'")


@contextlib.contextmanager
def atomic(path: epath.PathLike) -> Iterator[epath.Path]:
    """Yields a path to write a file to. The file becomes `path` at the end; after an error, `path` stays.

    If several processes write the same file at once, one waits for the other, and the last one's file stays.
    Links are followed. A device or a pipe, such as /dev/stdout, is written directly.

    Raises:
      errors.UserError: another process has been writing the same file for ten seconds.
      OSError: the file can't be written. The error names `path`.
    """
    if _is_written_directly(path):
        yield epath.Path(path)
        return
    final = epath.Path(path if _is_url(path) else os.path.realpath(path))
    new = final.with_name(f".{final.name}.new")
    try:
        with contextlib.nullcontext() if _is_url(path) else _claimed(new, path, _PATIENCE_SECONDS):
            try:
                yield new
                move(new, final)
            except BaseException:
                with contextlib.suppress(OSError):
                    new.unlink(missing_ok=True)
                raise
    except OSError as error:
        if error.strerror and error.filename in (None, os.fspath(new)):
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        raise


def _is_written_directly(path: epath.PathLike) -> bool:
    if _is_url(path):
        return False
    # /dev/stdout may stand for a file that the shell has opened, and that must not be replaced by another.
    place = os.path.abspath(path)
    target = os.readlink(place) if os.path.islink(place) else place
    if any(name.startswith(("/dev/fd/", "/proc/")) for name in (place, target)):
        return True
    return os.path.exists(path) and not os.path.isfile(path)


@contextlib.contextmanager
def _claimed(new: epath.PathLike, final: epath.PathLike, patience: float) -> Iterator[None]:
    """Makes an empty file that only this process writes, in place of what a killed process left.

    Args:
      new: the file. It is locked until the end of the block or of the process, also under another name.
      final: the path that it is for, for the message.
      patience: longest wait for another process that has the file, in seconds.

    Raises:
      errors.UserError: another process has it.
      OSError: it can't be made.
    """
    give_up = time.monotonic() + patience
    while (descriptor := _claim(new)) is None:
        if time.monotonic() > give_up:
            raise errors.UserError(f"another process is writing {final}: wait for it, or name another place")
        time.sleep(0.02)
    try:
        yield
    finally:
        os.close(descriptor)


def _claim(new: epath.PathLike) -> int | None:
    """Makes and locks a file. Returns its descriptor; None if another process has it, or had it until now."""
    try:
        descriptor, is_new = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), True
    except FileExistsError:
        # NFS locks only what may be written. A pipe must not wait for its other end.
        access = os.O_RDWR if os.access(new, os.W_OK) else os.O_RDONLY
        try:
            descriptor, is_new = os.open(new, access | os.O_NONBLOCK | os.O_NOFOLLOW), False
        except FileNotFoundError:
            return None
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, descriptor)
        # Before it was locked, another process may have removed it or given it its final name.
        if _lock(descriptor) and _is_at(descriptor, new):
            if is_new:
                stack.pop_all()
                return descriptor
            os.unlink(new)  # A killed process left it.
    return None


def _lock(descriptor: int) -> bool:
    """Locks a file for this process alone. Returns whether no other process has; true where nothing locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _is_at(descriptor: int, path: epath.PathLike) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def write(path: epath.PathLike, content: str | bytes) -> None:
    """Writes a file as `atomic` does; text as UTF-8.

    Raises:
      OSError: as `atomic`.
    """
    with atomic(path) as new:
        new.write_bytes(content.encode() if isinstance(content, str) else content)


def write_or_print(text: str, path: str | None) -> None:
    """Writes a text and a line break to a file, and prints the file's name; without a file, prints the text.

    Raises:
      errors.UserError: the file can't be written.
    """
    if not path:
        return print(text)
    with explained_disk_errors(path):
        write(path, text + "\n")
    print(path)


def move(new: epath.PathLike, final: epath.PathLike) -> None:
    """Gives a finished file or directory its final name, in place of a file or an empty directory there.

    Raises:
      OSError: it can't be renamed, or can't be synchronised to the disk.
    """
    if _is_url(final):
        epath.Path(new).replace(final)
        return
    for folder, _, files in os.walk(new):
        for place in (*files, ""):  # The folder itself comes last.
            _sync(os.path.join(folder, place))
    if not os.path.isdir(new):
        _sync(new)
    os.replace(new, final)
    _sync(os.path.dirname(os.path.abspath(final)))


def _sync(path: epath.PathLike) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CAN_NOT_SYNC:
            raise
    finally:
        os.close(descriptor)


def make_folder(path: epath.PathLike) -> None:
    """Makes a folder and its parents, if they are missing. They stay after a power cut.

    Raises:
      OSError: one can't be made, or can't be synchronised to the disk.
    """
    parents = [] if _is_url(path) else [place for place in _and_parents(path) if not place.exists()]
    epath.Path(path).mkdir(parents=True, exist_ok=True)
    for place in parents:
        _sync(place.parent)


def _and_parents(path: epath.PathLike) -> list[pathlib.Path]:
    place = pathlib.Path(os.path.abspath(path))
    return [place, *place.parents]


@contextlib.contextmanager
def new_directory(path: epath.PathLike, flag: str) -> Iterator[pathlib.Path]:
    """Yields a directory to write to. It becomes `path` at the end; after an error it is deleted.

    All files and folders in it get the permissions that the umask says, whatever a library gave them.

    Args:
      path: a local path that doesn't exist, or an empty directory. Its parents are made.
      flag: the flag that gave the path, for messages.

    Raises:
      errors.UserError: see `check_is_new`; or another process is writing the same directory.
      OSError: it can't be written; or meanwhile something else was made at `path`, which stays. It names
        final paths.
    """
    check_is_new(path, flag)
    final = pathlib.Path(os.path.realpath(path))  # A link to an empty directory is followed.
    make_folder(final.parent)
    # In the same folder, so that it is on the same disk and renaming copies nothing.
    private = final.with_name(f".{final.name}.new")
    private.mkdir(exist_ok=True)
    with _claimed(private / "lock", path, _MOMENT_SECONDS):
        directory = private / final.name
        try:
            if directory.exists():  # A killed process left it.
                shutil.rmtree(directory)
            directory.mkdir()
            yield directory
            give_usual_permissions(directory)
            move(directory, final)
        except OSError as error:
            if not isinstance(error.filename, str) or not error.filename.startswith(str(directory)):
                raise
            place = os.fspath(path) + error.filename.removeprefix(str(directory))
            raise OSError(error.errno, error.strerror, place) from error
        finally:
            shutil.rmtree(private, ignore_errors=True)


def give_usual_permissions(directory: pathlib.Path) -> None:
    """Gives all that is in a directory the permissions of the directory itself; files can't be executed."""
    usual = stat.S_IMODE(directory.stat().st_mode)
    for path in directory.rglob("*"):
        if not path.is_symlink():
            path.chmod(usual if path.is_dir() else usual & 0o666)


def check_is_new(path: epath.PathLike, flag: str) -> None:
    """Checks that a new directory can be made.

    Raises:
      errors.UserError: the path isn't local, or is a file or a directory that isn't empty.
    """
    check_is_local(path, flag)
    place = pathlib.Path(path)
    if place.exists() and not place.is_dir():
        raise errors.UserError(f"{place} is no directory: name a new one with {flag}")
    if place.is_dir() and any(place.iterdir()):
        _remove_leftovers(pathlib.Path(os.path.realpath(place)))
        raise errors.UserError(f"{place} is not empty: name a new directory with {flag}")


def _remove_leftovers(final: pathlib.Path) -> None:
    """Removes what a process left beside a finished directory, if it was killed just behind the renaming."""
    private = final.with_name(f".{final.name}.new")
    if private.is_dir():
        claimed = _claimed(private / "lock", final, _MOMENT_SECONDS)
        with contextlib.suppress(errors.UserError, OSError), claimed:
            shutil.rmtree(private, ignore_errors=True)


def check_is_local(path: epath.PathLike, flag: str) -> None:
    """Checks that a path is no URL.

    Raises:
      errors.UserError: it is one.
    """
    if _is_url(path):
        raise errors.UserError(
            f"{flag}={path}: a local directory is needed; copy the files when they are there"
        )


def check_file(path: epath.PathLike) -> None:
    """Checks, before long work, that a file for its results can be written.

    Raises:
      errors.UserError: the file's folder isn't there or can't be written, or the path is a folder.
    """
    is_special = os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)
    if _is_url(path) or is_special:  # /dev/stdout
        return
    folder = os.path.dirname(os.path.realpath(path))
    code = None if os.access(folder, os.W_OK) else errno.EACCES
    code = code if os.path.isdir(folder) else errno.ENOENT
    code = errno.EISDIR if os.path.isdir(path) else code
    if code is not None:
        raise errors.UserError(f"{os.fspath(path)}: {os.strerror(code)}. {_fix(code)}")


def _fix(code: int | None) -> str:
    """Returns what to do about an error of the operating system, by its code."""
    return "Name a file, for instance one inside it" if code == errno.EISDIR else FIX


def _is_url(path: epath.PathLike) -> bool:
    return "://" in os.fspath(path)


@contextlib.contextmanager
def explained_disk_errors(
    path: epath.PathLike,
    fix: str | None = None,
    also: tuple[type[Exception], ...] = (),
    only: Collection[int] | None = None,
) -> Iterator[None]:
    """Turns an OSError into a UserError: "FILE: REASON. FIX".

    Args:
      path: the file to name if the error names none.
      fix: what remains of the results, and what to do; None: as `FIX`, or that a folder is no file.
      also: other exceptions that a library raises when it can't write.
      only: codes (`errno`) of the OSErrors to explain; others pass unchanged. None: all.

    Raises:
      errors.UserError: in place of these exceptions.
    """
    try:
        yield
    except (OSError, *also) as error:
        if isinstance(error, OSError) and only is not None and error.errno not in only:
            raise
        file, words = _file_and_words(error)
        fix = fix or _fix(getattr(error, "errno", None))
        raise errors.UserError(f"{file or path}: {words}. {fix}") from error


def reason(error: BaseException) -> str:
    """Describes an error in one line: "No space left on device: FILE"."""
    file, words = _file_and_words(error)
    return f"{words}: {file}" if file else words


def _file_and_words(error: BaseException) -> tuple[str | None, str]:
    """Returns the file that an error names, and its message, from the operating system if it has one."""
    if isinstance(error, OSError) and error.strerror:
        named = isinstance(error.filename, str | bytes)  # It may be a descriptor.
        return foreign_text.for_terminal(os.fsdecode(error.filename)) if named else None, error.strerror
    first = str(error).partition("\n")[0]
    if found := _TENSORSTORE_OS_ERROR.search(first):
        return foreign_text.for_terminal(found["file"]), os.strerror(int(found["code"]))
    return None, f"{type(error).__name__}: {foreign_text.for_terminal(first)}"


def check_same_run(place: epath.PathLike, then: Mapping[str, Any], now: Mapping[str, Any], fix: str) -> None:
    """Checks that a run continues with the arguments with which it began.

    Args:
      place: the run's results, for the message.
      then: the arguments that the run recorded, read from JSON.
      now: the arguments given now, JSON-able. Further arguments in `then` are ignored.
      fix: what to do, for the message.

    Raises:
      errors.UserError: arguments differ; the message names each with both values.
    """
    changes = [
        f"{name} was {then.get(name)!r}, now it is {value!r}"
        for name, value in json.loads(json.dumps(now)).items()
        if then.get(name) != value
    ]
    if changes:
        raise errors.UserError(f"{place} holds a run with other arguments: {'; '.join(changes)}. {fix}")
