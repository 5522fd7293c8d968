"""Reads parquet tables that hold images or paths of images. Rows count from 0."""

import bisect
import itertools
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from richhf_jax import errors
from richhf_jax.inputs.record import InputError, Record, checked_prompt
from richhf_jax.inputs.tables import LoadImage, broken_row, check_columns, load_row, row_record

# Rows that are read at once: of names and prompts, and of images.
_NAME_ROWS = 1024
_IMAGE_ROWS = 16
# Number of batches of images that stay in memory.
_KEPT_BATCHES = 4


def parquet_records(path: str) -> Iterator[Record]:
    """Yields a record for each row; rows that a broken row group loses don't load.

    Raises:
      errors.UserError: pyarrow is missing, or the file is no parquet file or lacks a column.
    """
    file = _open(path)
    kind = str(file.schema_arrow.field("image").type)
    # Images in the table stay on disk until they are loaded. Of a struct {bytes, path}, the path is read now.
    load_image = _Images(path).load if "binary" in kind or kind.startswith("struct") else None
    columns = ["prompt", "id", "image.path" if load_image else "image"]
    row = end = 0
    for group in range(file.num_row_groups):
        end, problem = end + file.metadata.row_group(group).num_rows, ""
        try:
            for batch in _batches(file, _NAME_ROWS, group, columns):
                for index in range(len(batch)):
                    yield _record(path, row, batch.slice(index, 1), load_image)
                    row += 1
        except InputError as error:
            problem = str(error)
        for lost in range(row, end):
            yield broken_row(path, lost, problem)
        row = end


def count_rows(path: str) -> int:
    """Returns the number of rows, from the footer; nothing else is read."""
    return _open(path).metadata.num_rows


def _open(path: str):
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise errors.UserError(f"{path}: parquet needs pyarrow: `pip install pyarrow`") from error
    try:
        # These options read page by page, not whole columns of a row group.
        file = parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except (ValueError, OSError) as error:
        raise errors.UserError(f"{path}: no parquet file, or cut off; copy it again: {error}") from error
    check_columns(path, file.schema_arrow.names)
    return file


def _batches(file: Any, rows: int, group: int, columns: Sequence[str]) -> Iterator:
    """Yields the batches of a row group, without columns that it lacks.

    Raises:
      InputError: the row group is broken.
    """
    import pyarrow as pa

    try:
        yield from file.iter_batches(rows, row_groups=[group], columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"row group {group} is broken: {error}") from error


def _record(path: str, row: int, batch: Any, load_image: LoadImage | None) -> Record:
    try:
        (fields,) = batch.to_pylist()
    except ValueError as error:  # The text isn't UTF-8.
        return broken_row(path, row, str(error))
    if load_image:
        fields["image"] = (fields.get("image") or {}).get("path")
    return row_record(path, row, fields, load_image)


class _Images:
    """Loads the images in a parquet file. It reads forwards, so loading rows about in order is cheap.

    The last few batches stay in memory, and so do those that a thread waits for. For a row before them, its
    row group is read again from the start.
    """

    def __init__(self, path: str):
        self._path = path
        self._file = _open(path)
        groups = (self._file.metadata.row_group(group) for group in range(self._file.num_row_groups))
        self._starts = list(itertools.accumulate((group.num_rows for group in groups), initial=0))[:-1]
        self._group, self._batches = -1, iter(())
        self._next_row = 0  # First row of the next batch.
        self._kept = []  # Pairs of (first row, images).
        self._lock = threading.Lock()
        # Rows that threads wait for. A lock isn't fair: other threads may read on for hundreds of rows.
        self._waiting = set()

    def load(self, row: int, prompt: str, place: str) -> tuple[bytes, str]:
        """Returns a row's image and checked prompt; see `tables.LoadImage`."""
        prompt = checked_prompt(prompt, place)
        self._waiting.add(row)
        with self._lock:
            image = self._image(row, place)
        data, path = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, None)
        if data is None and isinstance(path, str) and path:
            return load_row(os.path.dirname(self._path), path, prompt, place)
        if not isinstance(data, bytes):
            raise InputError(
                f"{place}: no image; `image` must be a path, bytes, or a struct of `bytes` and `path`"
            )
        return data, prompt

    def _image(self, row: int, place: str) -> Any:
        self._waiting.discard(row)
        for first, images in self._kept:
            if first <= row < first + len(images):
                return images[row - first].as_py()
        group = bisect.bisect_right(self._starts, row) - 1
        if group != self._group or row < self._next_row:
            self._group, self._next_row = group, self._starts[group]
            self._batches = _batches(self._file, _IMAGE_ROWS, group, ["image"])
        while self._next_row <= row:
            try:
                images = next(self._batches).column("image")
            except (InputError, StopIteration) as error:  # The generator ends after its first error.
                problem = f"row group {group} is broken from row {self._next_row} on"
                raise InputError(f"{place}: {problem}") from error
            first, self._next_row = self._next_row, self._next_row + len(images)
            late = [batch for batch in self._kept[:-_KEPT_BATCHES] if self._is_waited_for(*batch)]
            self._kept = [*late, *self._kept[-_KEPT_BATCHES:], (first, images)]
        return images[row - first].as_py()

    def _is_waited_for(self, first: int, images: Any) -> bool:
        return not self._waiting.isdisjoint(range(first, first + len(images)))
