"""Records, which every kind of input gives, and what all readers share: limits, JSON, ids.

Records load later, in any thread, or tell why they can't. A row or file that breaks a limit fails alone.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NoReturn

from richhf_jax import foreign_text, reading

# All readers of folders, tars and shards take images by this list, so a name means the same everywhere.
# JPEG's names are those of Windows and Chrome, too; Firefox saves animations as .apng.
IMAGE_EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".pjpeg", ".pjp"),
    *(".png", ".apng", ".webp", ".gif", ".bmp", ".dib"),
)
# Pictures that no decoder here reads.
OTHER_IMAGE_EXTENSIONS = (
    *(".heic", ".heif", ".avif", ".jxl", ".jp2", ".j2k", ".jpx", ".tif", ".tiff", ".svg", ".svgz", ".ico"),
    *(".psd", ".tga", ".exr", ".hdr", ".qoi", ".ppm", ".pgm", ".pbm", ".pnm", ".dng", ".cr2", ".nef", ".arw"),
)

# Bytes of an image's file: more than any image that is decoded has.
MAX_IMAGE_BYTES = 1 << 30
# Bytes of a text file with a prompt.
MAX_TEXT_BYTES = 1 << 20
# Characters of a CSV's row, or bytes of a JSON line.
MAX_ROW = 1 << 24
# From here on, a float of 64 bits can't hold every whole number.
EXACT = 1 << 53


class InputError(ValueError):
    """A record can't be scored (unreadable, no prompt, ...). The message tells the user why, in one line."""

    def __init__(self, message: str):
        super().__init__(" ".join(printable(message).splitlines()))


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """An image to score.

    Attributes:
      id: the image's name for the user, the same in every run. Two records may have the same id.
      load: returns the image file's bytes (not decoded) and the prompt (stripped; "" only where none is
        needed), or raises InputError. Any thread may call it at any time; it is fastest in the records'
        order.
      row_id: the id to take where an earlier record has this one. '' where `id` is more than a hint.
      path: the image's own file; '' where the image is in a table or a tar, or can't be loaded.
    """

    id: str
    load: Callable[[], tuple[bytes, str]]
    row_id: str = ""
    path: str = ""


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


def unsupported_image(path: str) -> str:
    """Returns why a file with one of OTHER_IMAGE_EXTENSIONS isn't scored, and what to do."""
    extension = os.path.splitext(path)[1].lower()
    return f"{path}: {extension} isn't read; convert it to PNG or JPEG"


def reason(error: Exception) -> str:
    """Returns an OSError's reason, which doesn't repeat the file's name as the whole message does."""
    return getattr(error, "strerror", None) or str(error)


def read_bytes(
    path: str,
    where: str,
    fix: str = "",
    offset: int = 0,
    size: int | None = None,
    most: int = MAX_IMAGE_BYTES,
) -> bytes:
    """Reads a file, or a part of it.

    Args:
      path: the file.
      where: the beginning of an error's message: the place, for the user.
      fix: the end of an error's message: what to do.
      offset: first byte of the part.
      size: bytes of the part; None: the whole file.
      most: most bytes that are taken.

    Raises:
      InputError: the file can't be read, is no regular file, is too large, or is shorter than the part.
    """
    fix = fix and f" ({fix})"
    try:
        with open(path, "rb", opener=reading.regular) as file:
            wanted = os.fstat(file.fileno()).st_size if size is None else size
            if wanted > most:
                raise InputError(f"{where}: {wanted} bytes; at most {most} are taken")
            file.seek(offset)
            data = file.read(wanted)
    except InputError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name.
        raise InputError(f"{where}: {reason(error)}{fix}") from error
    if len(data) < wanted:
        raise InputError(f"{where}: cut off, {len(data)} of {wanted} bytes are there")
    return data


def checked_prompt(text: str | bytes, where: str, needed: bool = True) -> str:
    """Returns a prompt as it is scored: stripped.

    Args:
      text: the prompt; bytes are UTF-8.
      where: the beginning of an error's message: the place, for the user.
      needed: whether a prompt must be there; if not, "" is returned for a blank one.

    Raises:
      InputError: it isn't UTF-8; or it is needed, but shows nothing.
    """
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        text.encode()
    except UnicodeError as error:
        raise InputError(f"{where}: the prompt isn't UTF-8; save it as UTF-8") from error
    if not foreign_text.is_blank(text):
        return text.strip()
    if needed:
        raise InputError(f"{where}: the prompt is empty")
    return ""


def bounded_lines(file: BinaryIO) -> Iterator[bytes]:
    """Yields a file's lines; one of more than MAX_ROW bytes is cut there, and `parsed_json` refuses it.

    So a file that is one endless line stays out of memory.
    """
    while line := file.readline(MAX_ROW + 1):
        rest = line
        while len(rest) > MAX_ROW and not rest.endswith(b"\n"):
            rest = file.readline(MAX_ROW + 1)
        yield line


def parsed_json(line: str | bytes) -> Any:
    """Parses JSON of at most MAX_ROW bytes as `reading.parse_json` does.

    Raises:
      InputError: it is broken, too long or too deep, or the outermost object has two values of one name.
    """
    if len(line) > MAX_ROW:
        raise InputError(f"longer than {MAX_ROW} bytes")
    try:
        return reading.parse_json(line)
    except ValueError as error:
        raise InputError(f"no JSON: {error}") from error


def whole(value: Any, exact: int = EXACT) -> Any:
    """Returns a float that is a whole number as int, NaN as None, and any other value as it is.

    JSON has one kind of number, and pandas writes whole numbers as 7.0 where a column has an empty cell.
    A float from `exact` on stays: which whole number was meant isn't known, as it may be rounded.
    """
    if not isinstance(value, float):
        return value
    if math.isnan(value):
        return None
    return int(value) if value.is_integer() and abs(value) < exact else value


def checked_id(value: Any, exact: int = EXACT) -> str:
    """Returns the id in a table's cell as text; '' where the cell is empty.

    Args:
      value: the cell.
      exact: from here on, floats of the cell's type can't hold every whole number.

    Raises:
      InputError: it is neither text nor a whole number, or one that may be rounded.
    """
    value = whole(value, exact)
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        fix = "write it as text or as a whole number"
        raise InputError(
            f"`id` is a float, not a string or whole number, and {value!r} may be rounded; {fix}"
        )
    if type(value) not in (str, int):  # A bool is an int.
        raise InputError(f"`id` is a {type(value).__name__}, not a string or whole number")
    return printable(str(value))
