"""Records, which every kind of input gives. They load later, in any thread, or tell why they can't."""

import dataclasses
import functools
import os
import stat
from collections.abc import Callable
from typing import NoReturn

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")

# Larger than any image that is decoded. It keeps a huge file with an image's extension out of memory.
_MAX_BYTES = 1 << 30


class InputError(ValueError):
    """A record can't be scored (unreadable, no prompt, ...). The message tells the user why, in one line."""

    def __init__(self, message: str):
        super().__init__(" ".join(printable(message).splitlines()))


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """An image to score.

    Attributes:
      id: the image's name for the user, the same in every run. Two records may have the same id.
      load: returns the image file's bytes (not decoded) and the prompt (stripped, not empty), or raises
        InputError. Any thread may call it at any time; it is fastest in the records' order.
    """

    id: str
    load: Callable[[], tuple[bytes, str]]


def broken_record(name: str, problem: str) -> Record:
    """Makes a record that doesn't load; `problem` says why, and names the place."""
    return Record(printable(name), functools.partial(_fail, problem))


def _fail(message: str) -> NoReturn:
    raise InputError(message)


def printable(text: str) -> str:
    r"""Writes lone surrogates as \udcXX, so that the text can be written to any file.

    Such surrogates stand in names that aren't UTF-8, and in broken JSON.
    """
    return text.encode("utf-8", "backslashreplace").decode()


def read_bytes(path: str, where: str, fix: str = "", offset: int = 0, size: int | None = None) -> bytes:
    """Reads a file, or a part of it.

    Args:
      path: the file.
      where: the beginning of an error's message: the place, for the user.
      fix: the end of an error's message: what to do.
      offset: first byte of the part.
      size: bytes of the part; None: the whole file.

    Raises:
      InputError: the file can't be read, is no regular file, is too large, or is shorter than the part.
    """
    fix = fix and f" ({fix})"
    try:
        status = os.stat(path)
        is_file = stat.S_ISREG(status.st_mode)  # Opening a pipe could wait for ever.
        wanted = status.st_size if size is None else size
        data = b""
        if is_file and wanted <= _MAX_BYTES:
            with open(path, "rb") as file:
                file.seek(offset)
                data = file.read(wanted)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name.
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{where}: {reason}{fix}") from error
    if not is_file:
        raise InputError(f"{where}: not a file{fix}")
    if wanted > _MAX_BYTES:
        raise InputError(f"{where}: {wanted} bytes; at most {_MAX_BYTES} are taken")
    if len(data) < wanted:
        raise InputError(f"{where}: cut off, {len(data)} of {wanted} bytes are there")
    return data


def checked_prompt(text: str | bytes, where: str) -> str:
    """Returns a prompt as it is scored: stripped. Raises InputError where it isn't UTF-8, or is empty."""
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        text.encode()
    except UnicodeError as error:
        raise InputError(f"{where}: the prompt isn't UTF-8; save it as UTF-8") from error
    if not text.strip():
        raise InputError(f"{where}: the prompt is empty")
    return text.strip()
