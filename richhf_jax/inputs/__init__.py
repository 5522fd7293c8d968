"""Reads the inputs of `python -m richhf_jax.predict` as a stream of records, which load their images later.

    an image                  prompt: --prompt, or else <stem>.txt beside it
    a folder                  its images, recursively, by path; prompt: <stem>.txt, or else --prompt
    .csv .jsonl .parquet      columns `image` (a path; in parquet also bytes), `prompt`, optionally `id`
    .tar                      pairs <key>.<image extension> and <key>.txt

A model that reads no text needs no prompts: texts, columns and cells of prompts may then be missing.

A folder is listed once, and its names stay in memory. A table or a tar is streamed twice: once to count its
records, once to give them. A tar's key stays in memory until the other half of its pair comes.
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence

from richhf_jax import errors
from richhf_jax.inputs import archives, files, parquet, tables
from richhf_jax.inputs.record import (
    IMAGE_EXTENSIONS,
    OTHER_IMAGE_EXTENSIONS,
    InputError,
    Record,
    checked_prompt,
    reason,
    unsupported_image,
)

__all__ = ["IMAGE_EXTENSIONS", "InputError", "Inputs", "Record"]

_READERS = {
    ".csv": tables.csv_records,
    ".jsonl": tables.jsonl_records,
    ".parquet": parquet.parquet_records,
    ".tar": archives.tar_records,
}


@dataclasses.dataclass(frozen=True)
class _Place:
    """An image, folder, table or tar.

    Attributes:
      path: as the user gave it.
      read: iterates over the records, from the first on.
      count: number of records.
      status: size and times of the file; None for a folder.
    """

    path: str
    read: Callable[[], Iterator[Record]]
    count: int
    status: os.stat_result | None


class Inputs:
    """The records of all places, in order; an image that can't be read is a record that doesn't load.

    `len()` is the number of records. Each iteration begins with the first one.
    """

    def __init__(self, paths: Sequence[str], prompt: str | None = None, needs_prompts: bool = True):
        """Lists the folders and counts the records of the other places.

        Args:
          paths: images, folders, tables and tars.
          prompt: the prompt of single images, and of images in folders that have no .txt beside them. A blank
            one is as none, if none are needed.
          needs_prompts: whether an image without a prompt doesn't load; else its prompt is "".

        Raises:
          errors.UserError: a place doesn't exist, can't be opened, has an unknown extension, lacks a column
            or is empty, or it has prompts of its own and `prompt` would be ignored.
        """
        if prompt is not None:
            try:
                prompt = checked_prompt(prompt, "--prompt", needs_prompts) or None
            except InputError as error:
                raise errors.UserError(str(error)) from error
        for path in paths:  # A mistake in the last path is found before the others are read.
            _check_kind(path, prompt)
        self._places = [_listed(path, prompt, needs_prompts) for path in paths]

    def __len__(self) -> int:
        return sum(place.count for place in self._places)

    def __iter__(self) -> Iterator[Record]:
        """Yields the records.

        Raises:
          errors.UserError: a table or tar can no longer be read, or has changed.
        """
        hints: set[str] = set()
        for place in self._places:
            count = 0
            with _explained(place.path):
                for record in place.read():
                    count += 1
                    if record.row_id and record.id in hints:
                        record = dataclasses.replace(record, id=record.row_id)
                    elif record.row_id:
                        hints.add(record.id)
                    yield record
            _check_unchanged(place, count)

    def check_unchanged(self) -> None:
        """Checks that the files that were named are still those that were listed.

        A folder's names were listed once, so it may change.

        Raises:
          errors.UserError: a file was written, replaced or removed meanwhile.
        """
        for place in self._places:
            _check_unchanged(place, place.count)

    def fingerprint(self) -> str:
        """Returns 16 characters that depend on the names in folders, and on files' sizes and change times."""
        digest = hashlib.sha256()
        for place in self._places:
            if place.status is None:
                for record in place.read():
                    digest.update(f"{record.id}\n".encode())
            else:
                digest.update(f"{place.status.st_size} {place.status.st_mtime_ns}\n".encode())
        return digest.hexdigest()[:16]


def _check_kind(path: str, prompt: str | None) -> None:
    """Raises errors.UserError where a path can't be an input, without reading it."""
    if os.path.isdir(path):
        return
    if not os.path.exists(path):
        raise errors.UserError(f"{path}: no such file or folder")
    if not os.path.isfile(path):
        fix = "save what comes from it to a file, and name that"
        raise errors.UserError(f"{path}: neither a file nor a folder but a pipe, device or socket; {fix}")
    extension = _extension(path)
    if extension in IMAGE_EXTENSIONS:
        return
    if extension in OTHER_IMAGE_EXTENSIONS:
        raise errors.UserError(unsupported_image(path))
    if extension in (".gz", ".tgz"):
        raise archives.compressed(path)
    if extension not in _READERS:
        kinds = " ".join([*IMAGE_EXTENSIONS, *_READERS])
        raise errors.UserError(f"{path}: unknown kind of file; name a folder or one of {kinds}")
    if prompt is not None:
        raise errors.UserError(f"{path}: has prompts of its own, --prompt would be ignored; leave it out")


def _listed(path: str, prompt: str | None, needs_prompts: bool) -> _Place:
    """Makes a place of a path that `_check_kind` passed, and counts its records."""
    with _explained(path):
        if os.path.isdir(path):
            names = list(files.folder_names(path))
            read = functools.partial(files.folder_records, path, names, prompt, needs_prompts)
            place = _Place(path, read, len(names), None)
        elif _extension(path) in IMAGE_EXTENSIONS:
            read = functools.partial(files.image_records, path, prompt, needs_prompts)
            place = _Place(path, read, 1, os.stat(path))
        else:
            status, reader = os.stat(path), _READERS[_extension(path)]
            read = functools.partial(reader, path, needs_prompts)
            is_parquet = reader is parquet.parquet_records
            count = parquet.count_rows(path, needs_prompts) if is_parquet else sum(1 for _ in read())
            place = _Place(path, read, count, status)
    if not place.count:
        raise _empty(path)
    return place


def _check_unchanged(place: _Place, count: int) -> None:
    """Raises errors.UserError where a file isn't as it was listed, or didn't give that many records."""
    with _explained(place.path):
        status = place.status and os.stat(place.path)
    if count != place.count or _version(status) != _version(place.status):
        raise errors.UserError(
            f"{place.path} was written or replaced while it was read; it had {place.count:,} records. What is"
            " written stays, but it may mix the old file with the new one: begin anew with another --out"
        )


def _version(status: os.stat_result | None) -> tuple[int, ...] | None:
    return status and (status.st_size, status.st_mtime_ns, status.st_ino)


def _extension(path: str) -> str:
    return os.path.splitext(path)[1].lower()


@contextlib.contextmanager
def _explained(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise errors.UserError(f"{path}: {reason(error)}") from error


def _empty(path: str) -> errors.UserError:
    if os.path.isdir(path):
        return errors.UserError(f"{path}: no image in this folder ({' '.join(IMAGE_EXTENSIONS)})")
    if path.lower().endswith(".tar"):
        return errors.UserError(f"{path}: no pairs <key>.jpg, <key>.txt")
    return errors.UserError(f"{path}: no rows")
