"""What `python -m richhf_jax.predict INPUT...` reads -> a stream of records: an id, and how to load the rest.

    an image                  prompt: --prompt, or else <stem>.txt beside it
    a folder                  its images, recursively, by path; prompt: <stem>.txt, or else --prompt
    .csv .jsonl .parquet      columns `image` (a path; in parquet also bytes), `prompt`, optionally `id`
    .tar                      pairs <key>.<image extension> and <key>.txt

Nothing is held but names: of a folder those in it, of a tar those whose other half is still to come.
"""

import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence

from richhf_jax import errors
from richhf_jax.inputs import archives, files, parquet, tables
from richhf_jax.inputs.record import IMAGE_EXTENSIONS, InputError, Record, checked_prompt

__all__ = ["IMAGE_EXTENSIONS", "InputError", "Record", "count", "fingerprint", "records"]

_READERS = {
    ".csv": tables.csv_records,
    ".jsonl": tables.jsonl_records,
    ".parquet": parquet.parquet_records,
    ".tar": archives.tar_records,
}


def records(inputs: Sequence[str], prompt: str | None = None) -> Iterator[Record]:
    """Streams the records of all inputs, in this order; what can't be read is a record that doesn't load.

    Args:
      inputs: paths of images, folders, tables and tars.
      prompt: of images that are named, and of those in folders that have no sidecar.

    Raises:
      errors.UserError: before the first record, if an input doesn't exist, can't be opened, is of an unknown
        kind, lacks a column or is empty, or if it has prompts of its own and `prompt` would be ignored.
    """
    readers = [_reader(path, prompt) for path in inputs]
    for path, reader in zip(inputs, readers, strict=True):  # A mistake in the last costs no hours of scoring.
        if next(_stream(path, reader), None) is None:
            raise _empty(path)
    for path, reader in zip(inputs, readers, strict=True):
        yield from _stream(path, reader)


def count(inputs: Sequence[str], prompt: str | None = None) -> int:
    """How many records there are, without reading images; of parquet, only the footer is read.

    Raises:
      errors.UserError: as `records` does.
    """
    total = 0
    for path, reader in [(path, _reader(path, prompt)) for path in inputs]:
        is_parquet = reader.func is parquet.parquet_records
        found = parquet.count_rows(path) if is_parquet else sum(1 for _ in _stream(path, reader))
        if not found:
            raise _empty(path)
        total += found
    return total


def fingerprint(inputs: Sequence[str]) -> str:
    """Changes where records would be other ones: a folder's names, or a file's size or time of change."""
    digest = hashlib.sha256()
    for path in inputs:
        if os.path.isdir(path):
            for record in _stream(path, _reader(path, None)):
                digest.update(f"{record.id}\n".encode())
        else:
            status = os.stat(path)
            digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _reader(path: str, prompt: str | None) -> functools.partial:
    """What gives the input's records when it is called."""
    if prompt is not None:
        try:
            prompt = checked_prompt(prompt, "--prompt")
        except InputError as error:
            raise errors.UserError(str(error)) from error
    if os.path.isdir(path):
        return functools.partial(files.folder_records, path, prompt)
    if not os.path.exists(path):
        raise errors.UserError(f"{path}: no such file or folder")
    extension = os.path.splitext(path)[1].lower()
    if extension in IMAGE_EXTENSIONS:
        return functools.partial(files.image_records, path, prompt)
    if extension in (".gz", ".tgz"):
        raise archives.compressed(path)
    if extension not in _READERS:
        kinds = " ".join([*IMAGE_EXTENSIONS, *_READERS])
        raise errors.UserError(f"{path}: unknown kind of file; taken are folders and {kinds}")
    if prompt is not None:
        raise errors.UserError(f"{path}: has prompts of its own, --prompt would be ignored; leave it out")
    return functools.partial(_READERS[extension], path)


def _stream(path: str, reader: Callable[[], Iterator[Record]]) -> Iterator[Record]:
    try:
        yield from reader()
    except OSError as error:
        raise errors.UserError(f"{path}: {error.strerror or error}") from error


def _empty(path: str) -> errors.UserError:
    if os.path.isdir(path):
        return errors.UserError(f"{path}: no image in this folder ({' '.join(IMAGE_EXTENSIONS)})")
    if path.lower().endswith(".tar"):
        return errors.UserError(f"{path}: no pairs <key>.jpg, <key>.txt")
    return errors.UserError(f"{path}: no rows")
