"""Reads tars of pairs: <key>.<image extension> and <key>.txt, which need not be adjacent."""

import functools
import os
import tarfile
from collections.abc import Iterator
from typing import BinaryIO

from richhf_jax import errors
from richhf_jax.inputs.record import (
    IMAGE_EXTENSIONS,
    Record,
    broken_record,
    checked_prompt,
    printable,
    read_bytes,
)

_GZIP = b"\x1f\x8b"


def tar_records(path: str) -> Iterator[Record]:
    """Yields a record for each pair, in the order of the pairs' second halves.

    Then come records that don't load: one for each half without its other, and one if the tar is damaged.

    Raises:
      errors.UserError: the tar is compressed.
    """
    waiting: dict[str, tuple[str, tuple[int, int]]] = {}
    problem = ""
    with open(path, "rb") as file:
        if file.read(len(_GZIP)) == _GZIP:
            raise compressed(path)
        file.seek(0)
        try:
            for key, extension, place in _members(file):
                other_extension, other_place = waiting.setdefault(key, (extension, place))
                if place == other_place:
                    continue
                if (extension == ".txt") == (other_extension == ".txt"):
                    yield _broken_member(path, key, f"both {other_extension} and {extension} are there")
                    continue
                del waiting[key]
                image, text = (other_place, place) if extension == ".txt" else (place, other_place)
                yield Record(printable(key), functools.partial(_load_pair, path, key, image, text))
        except Exception as error:  # tarfile raises what it likes at garbled headers.
            problem = f"cut off or broken behind the last member found, the rest is lost: {error}"
    for key, (extension, _) in waiting.items():
        lacks = "image" if extension == ".txt" else ".txt with its prompt"
        yield _broken_member(path, key, f"{key}{extension} has no {lacks} beside it in the tar")
    if problem:
        yield broken_record(f"{os.path.basename(path)}:end", f"{path}: {problem}")


def compressed(path: str) -> errors.UserError:
    """Returns the error for a file that must be unpacked first."""
    return errors.UserError(f"{path}: compressed; unpack it first (`gunzip` for .gz and .tgz)")


def _broken_member(path: str, key: str, problem: str) -> Record:
    return broken_record(key, f"{path}, {key}: {problem}")


def _members(file: BinaryIO) -> Iterator[tuple[str, str, tuple[int, int]]]:
    """Yields key, extension and (offset, size) of each image and text.

    Raises:
      tarfile.ReadError: the tar is cut off or damaged.
    """
    with tarfile.open(fileobj=file, mode="r:") as tar:
        end = 0
        while (member := tar.next()) is not None:
            tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  # Else it keeps all in memory.
            if member.size < 0 or tar.offset <= end:  # A negative size would lead to an endless loop.
                raise tarfile.ReadError("garbled header")
            end = tar.offset
            folder, slash, name = member.name.removeprefix("./").rpartition("/")
            stem, extension = os.path.splitext(name)
            extension = extension.lower()
            # Hidden files are left out, among them macOS's '._a.jpg'.
            wanted = not name.startswith(".") and extension in (*IMAGE_EXTENSIONS, ".txt")
            if wanted and member.isfile() and not member.issparse():
                yield f"{folder}{slash}{stem}", extension, (member.offset_data, member.size)
        # tarfile takes a missing or garbled header for the end, which is a block of zeros.
        file.seek(tar.offset)
        if len(file.read(tarfile.BLOCKSIZE).strip(b"\0")) or file.tell() - tar.offset < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("no mark of the end")
        while chunk := file.read(1 << 20):
            if chunk.strip(b"\0"):
                raise tarfile.ReadError("something follows the mark of the end (joined tars?)")


def _load_pair(path: str, key: str, image: tuple[int, int], text: tuple[int, int]) -> tuple[bytes, str]:
    where = f"{path}, {key}"
    prompt = checked_prompt(read_bytes(path, f"{where}.txt", "", *text), f"{where}.txt")
    return read_bytes(path, where, "", *image), prompt
