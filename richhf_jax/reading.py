"""Reads files that others made, within limits: regular files alone, of a bounded size, as UTF-8.

A named pipe, a device or a socket would hang a program or fill its memory, and so would a file without end.
"""

import json
import os
import stat
from typing import Any

from etils import epath

from richhf_jax import errors

# The most bytes of a small file: a configuration, an index, a description.
SMALL = 64 * 2**20
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_regular(path: epath.PathLike) -> None:
    """Checks that a local path is a regular file, or a link to one. A URL ("gs://...") always is.

    Raises:
      errors.UserError: it is something else.
      OSError: there is no such file, or no right to look.
    """
    if "://" in os.fspath(path):
        return
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise errors.UserError(
            f"{path} is {_KINDS.get(stat.S_IFMT(mode), 'special')}: a regular file is needed"
        )


def check_tree(folder: epath.PathLike) -> None:
    """Checks that a local folder and those in it hold only regular files, for libraries that open them.

    Raises:
      errors.UserError: something else is there.
      OSError: a link leads nowhere.
    """
    for place, _, files in os.walk(folder):
        for file in files:
            check_regular(os.path.join(place, file))


def read_bytes(path: epath.PathLike, limit: int = SMALL) -> bytes:
    """Reads a small file, never more than `limit` bytes.

    Raises:
      errors.UserError: it is no regular file, or larger than the limit.
      OSError: it can't be read.
    """
    check_regular(path)
    with epath.Path(path).open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise errors.UserError(f"{path} is larger than {limit:,} bytes: name the right file")
    return content


def parse_json(text: str | bytes) -> Any:
    """Parses JSON.

    Raises:
      ValueError: it is no JSON, no UTF-8, or nested too deeply for Python.
    """
    try:
        return json.loads(text.decode() if isinstance(text, bytes) else text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(path: epath.PathLike) -> dict[str, Any]:
    """Reads a small JSON file that holds an object.

    Raises:
      errors.UserError: as `read_bytes`; or the file is damaged, or holds something else.
      OSError: it can't be read.
    """
    try:
        content = parse_json(read_bytes(path))
    except ValueError as error:
        raise errors.UserError(f"{path} is truncated, or no JSON: {error}") from error
    if not isinstance(content, dict):
        raise errors.UserError(f"{path} is no JSON object")
    return content
