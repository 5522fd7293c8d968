"""Reads files that others made, within limits: regular files alone, of a bounded size, as UTF-8.

A named pipe, a device or a socket would hang a program or fill its memory, and so would a file without end.
"""

import errno
import itertools
import json
import os
import pathlib
import re
import stat
from collections.abc import Sequence
from typing import Any

from etils import epath

from richhf_jax import errors

# The most bytes of a small file: a configuration, an index, a description.
SMALL = 64 * 2**20
# Levels of objects and lists in JSON. Python's parser would use the stack of the process for each.
MAX_DEPTH = 200
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"?', re.DOTALL)
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def regular(path: str, flags: int) -> int:
    """Opens a regular file: the argument `opener` of `open`. A pipe or device would never end.

    Raises:
      OSError: there is no such file, or it is a folder, pipe, device or socket.
    """
    # Without O_NONBLOCK, opening a pipe waits for its writer.
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, f"not a file but {_KINDS.get(stat.S_IFMT(mode), 'special')}", path)


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


def check_files(folder: epath.PathLike, patterns: Sequence[str] = ("**/*",)) -> None:
    """Checks that files in a local folder are regular ones, for libraries that open them.

    A link that leads nowhere is as good as no file: who needs the file finds that it is missing.

    Args:
      folder: a path. The files under a URL ("gs://...") always are regular.
      patterns: glob patterns, relative to the folder, of the files that will be read.

    Raises:
      errors.UserError: a file is something else.
    """
    if "://" in os.fspath(folder):
        return
    for path in itertools.chain.from_iterable(map(pathlib.Path(folder).glob, patterns)):
        if path.exists() and not path.is_dir():
            check_regular(path)


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
    """Parses JSON within MAX_DEPTH.

    Raises:
      ValueError: it is no JSON, no UTF-8, or too deep, or the outermost object has two values of one name.
    """
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH and _depth(data) > MAX_DEPTH:
        raise ValueError(f"lists or objects are nested more than {MAX_DEPTH} deep")
    try:
        value = _DECODER.decode(data.decode(json.detect_encoding(data), "surrogatepass"))
    except json.JSONDecodeError as error:
        raise ValueError(error.msg) from error
    if isinstance(value, _Doubled):
        raise ValueError(f"{value.twice!r} has two values")
    return value


def _depth(line: bytes) -> int:
    depth = deepest = 0
    for bracket in re.findall(rb"[][{}]", _STRING.sub(b"", line)):
        depth += 1 if bracket in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest


class _Doubled(dict[str, Any]):
    """An object in which the name `twice` has two values. Within another object, nobody may need it."""

    twice: str


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs) and (twice := [name for name, value in pairs if value != fields[name]]):
        fields = _Doubled(fields)
        fields.twice = twice[0]
    return fields


# `json.loads` would make one for each text, which takes longer than parsing a line.
_DECODER = json.JSONDecoder(object_pairs_hook=_object)


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
