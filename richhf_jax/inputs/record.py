"""What every kind of input gives: records, which load later, in any thread, or tell why they can't."""

import dataclasses
import functools
import os
import stat
from collections.abc import Callable
from typing import NoReturn

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")

# More than any image that is decoded takes. It keeps a disk image of that name out of memory.
_MAX_BYTES = 1 << 30


class InputError(ValueError):
    """Why a record can't be scored: unreadable, no prompt, ... The message is one line, for the user."""

    def __init__(self, message: str):
        super().__init__(" ".join(printable(message).splitlines()))


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """An image to score.

    Attributes:
      id: its name for the user, the same in every run; two inputs may hold the same.
      load: reads the image file's bytes (not decoded) and the prompt (stripped, not empty). Any thread may
        call it, at any time, best in the records' order. Raises InputError.
    """

    id: str
    load: Callable[[], tuple[bytes, str]]


def broken_record(name: str, problem: str) -> Record:
    """A record that doesn't load: `problem` is why, and names the place."""
    return Record(printable(name), functools.partial(_fail, problem))


def _fail(message: str) -> NoReturn:
    raise InputError(message)


def printable(text: str) -> str:
    """Text that any file takes: lone surrogates (in names that aren't UTF-8, in broken JSON) written out."""
    return text.encode("utf-8", "backslashreplace").decode()


def read_bytes(path: str, where: str, fix: str = "", offset: int = 0, size: int | None = None) -> bytes:
    """A file's bytes, or a part of it; `where` and `fix` are what an error's message begins and ends with."""
    fix = fix and f" ({fix})"
    try:
        status = os.stat(path)
        is_file = stat.S_ISREG(status.st_mode)  # Opening a pipe would wait for ever.
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
    """A prompt as it is scored: stripped, UTF-8, not empty."""
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        text.encode()
    except UnicodeError as error:
        raise InputError(f"{where}: the prompt isn't UTF-8; save it as UTF-8") from error
    if not text.strip():
        raise InputError(f"{where}: the prompt is empty")
    return text.strip()
