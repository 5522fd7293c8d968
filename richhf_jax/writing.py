"""Files and directories that are complete once they have their name; the messages where that fails.

    with writing.explained_disk_errors(out), writing.atomic(out) as new:
        new.write_text(...)

What stands under its final name is complete, also after a kill or a power cut. It is written beside that
place and brought to the disk; then it is renamed, and the folder is brought to the disk. A file's path may be
a URL ("gs://..."): a bucket keeps what it has taken, so nothing is synchronised there.
"""

import contextlib
import errno
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from etils import epath

from richhf_jax import errors

FIX = "Make the folder, make room or give the right to write; then give the same command again"
# No room, or no right to write.
NO_ROOM_OR_RIGHT = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
)
# File systems that can't synchronise a folder answer so.
_CAN_NOT_SYNC = (errno.EINVAL, errno.ENOTSUP)
# The last file and the code that a line of TensorStore's names.
_TENSORSTORE_OS_ERROR = re.compile(r".*\"(?P<file>[^\"]+)\".*os_error_code='(?P<code>\d+)'")


@contextlib.contextmanager
def atomic(path: epath.PathLike) -> Iterator[epath.Path]:
    """Yields a path to write a file to, which becomes `path` at the end; after an error, `path` is as before.

    The file is `.NAME.new` in the same folder. A kill leaves it there, and the next call replaces it: two
    processes must not write the same file at the same time. Links are followed. A device or a pipe, such as
    /dev/stdout, is written directly.

    Raises:
      OSError: it can't be written. The error names `path`.
    """
    final = epath.Path(path if _is_url(path) else os.path.realpath(path))
    if not _is_url(path) and os.path.exists(final) and not os.path.isfile(final):
        yield final
        return
    new = final.with_name(f".{final.name}.new")
    try:
        new.unlink(missing_ok=True)
        yield new
        move(new, final)
    except BaseException as error:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.strerror and error.filename in (None, os.fspath(new)):
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        raise


def write(path: epath.PathLike, content: str | bytes) -> None:
    """Writes a file as `atomic` does; text as UTF-8.

    Raises:
      OSError: as `atomic`.
    """
    with atomic(path) as new:
        new.write_bytes(content.encode() if isinstance(content, str) else content)


def move(new: epath.PathLike, final: epath.PathLike) -> None:
    """Gives a finished file or directory its final name, in place of a file or an empty directory there.

    Raises:
      OSError: it can't be renamed, or not be brought to the disk.
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


@contextlib.contextmanager
def new_directory(path: epath.PathLike, flag: str) -> Iterator[pathlib.Path]:
    """Yields a directory to write to, which becomes `path` at the end; after an error nothing is left of it.

    Args:
      path: a local place that isn't there, or an empty directory. Its parents are made.
      flag: which flag gave it, for messages.

    Raises:
      errors.UserError: see `check_is_new`.
      OSError: it can't be written, or something appeared at `path` meanwhile, which stays.
    """
    check_is_new(path, flag)
    final = pathlib.Path(path).absolute()
    final.parent.mkdir(parents=True, exist_ok=True)
    # Beside it, so that it is on the same disk and renaming moves nothing.
    with tempfile.TemporaryDirectory(
        prefix=f".{final.name}.", dir=final.parent, ignore_cleanup_errors=True
    ) as private:  # For the user alone; the directory in it has the usual permissions.
        directory = pathlib.Path(private) / final.name
        directory.mkdir()
        yield directory
        move(directory, final)


def check_is_new(path: epath.PathLike, flag: str) -> None:
    """Checks that a new directory can be made.

    Raises:
      errors.UserError: the path isn't local, or there is a file or a directory that isn't empty.
    """
    check_is_local(path, flag)
    place = pathlib.Path(path)
    if place.exists() and not place.is_dir():
        raise errors.UserError(f"{place} is no directory: name a new one with {flag}")
    if place.is_dir() and any(place.iterdir()):
        raise errors.UserError(f"{place} is not empty: name a new directory with {flag}")


def check_is_local(path: epath.PathLike, flag: str) -> None:
    """Raises errors.UserError where a path is a URL."""
    if _is_url(path):
        raise errors.UserError(
            f"{flag}={path}: a local directory is needed; copy the files when they are there"
        )


def _is_url(path: epath.PathLike) -> bool:
    return "://" in os.fspath(path)


@contextlib.contextmanager
def explained_disk_errors(
    path: epath.PathLike,
    fix: str = FIX,
    also: tuple[type[Exception], ...] = (),
    only: Collection[int] | None = None,
) -> Iterator[None]:
    """Turns an OSError into a UserError: "FILE: REASON. FIX".

    Args:
      path: the file to name where the error names none.
      fix: what stays, and what to do.
      also: other exceptions that a library raises where it can't write.
      only: the codes (`errno`) of OSErrors to explain; others pass. None: all.

    Raises:
      errors.UserError: in place of these errors.
    """
    try:
        yield
    except (OSError, *also) as error:
        if isinstance(error, OSError) and only is not None and error.errno not in only:
            raise
        file, words = _file_and_words(error)
        raise errors.UserError(f"{file or path}: {words}. {fix}") from error


def reason(error: BaseException) -> str:
    """Returns what is wrong, in one line: "No space left on device: FILE"."""
    file, words = _file_and_words(error)
    return f"{words}: {file}" if file else words


def _file_and_words(error: BaseException) -> tuple[str | None, str]:
    """Returns the file that an error names, and what it says; the operating system's words where known."""
    if isinstance(error, OSError) and error.strerror:
        return error.filename and os.fsdecode(error.filename), error.strerror
    first = str(error).partition("\n")[0]
    if found := _TENSORSTORE_OS_ERROR.search(first):
        return found["file"], os.strerror(int(found["code"]))
    return None, f"{type(error).__name__}: {first}"


def check_same_run(place: epath.PathLike, then: Mapping[str, Any], now: Mapping[str, Any], fix: str) -> None:
    """Checks that a run is continued with the arguments that it was begun with.

    Args:
      place: where the run's results are.
      then: the arguments that the run recorded, as JSON gives them back.
      now: those given now, JSON-able; arguments that `then` has besides are of no account.
      fix: what to do, for the message.

    Raises:
      errors.UserError: an argument differs; all that do are named with both values.
    """
    changes = [
        f"{name} was {then.get(name)!r}, now it is {value!r}"
        for name, value in json.loads(json.dumps(now)).items()
        if then.get(name) != value
    ]
    if changes:
        raise errors.UserError(f"{place} holds a run with other arguments: {'; '.join(changes)}. {fix}")
