"""Parquet tables, of paths or with the images in them. Rows count from 0."""

import bisect
import itertools
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from richhf_jax import errors
from richhf_jax.inputs.record import InputError, Record, checked_prompt
from richhf_jax.inputs.tables import LoadImage, broken_row, check_columns, load_row, row_record

# Rows that are read at once: names and prompts; images, of which some batches stay.
_NAME_ROWS = 1024
_IMAGE_ROWS = 16
_KEPT_BATCHES = 4


def parquet_records(path: str) -> Iterator[Record]:
    """The rows; those that a broken row group loses don't load."""
    file = _open(path)
    kind = str(file.schema_arrow.field("image").type)
    # Images that are in the table stay on disk until they are loaded; of {bytes, path}, the path is read.
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
    """How many there are by the footer, which alone is read."""
    return _open(path).metadata.num_rows


def _open(path: str):
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise errors.UserError(f"{path}: parquet needs pyarrow: `pip install pyarrow`") from error
    try:
        # Pages are read as they are asked for, not whole columns of a row group.
        file = parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except (ValueError, OSError) as error:
        raise errors.UserError(f"{path}: no parquet file, or cut off; copy it again: {error}") from error
    check_columns(path, file.schema_arrow.names)
    return file


def _batches(file: Any, rows: int, group: int, columns: Sequence[str]) -> Iterator:
    """Batches of a row group; those columns that aren't there are left out. InputError where it is broken."""
    import pyarrow as pa

    try:
        yield from file.iter_batches(rows, row_groups=[group], columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"row group {group} is broken: {error}") from error


def _record(path: str, row: int, batch: Any, load_image: LoadImage | None) -> Record:
    try:
        (fields,) = batch.to_pylist()
    except ValueError as error:  # No UTF-8.
        return broken_row(path, row, str(error))
    if load_image:
        fields["image"] = (fields.get("image") or {}).get("path")
    return row_record(path, row, fields, load_image)


class _Images:
    """The images in a parquet file. It is read forwards: cheap where rows are loaded about in order.

    The last few batches stay in memory, and those that a thread waits for; a row before them costs reading
    its row group from the start.
    """

    def __init__(self, path: str):
        self._path = path
        self._file = _open(path)
        groups = (self._file.metadata.row_group(group) for group in range(self._file.num_row_groups))
        self._starts = list(itertools.accumulate((group.num_rows for group in groups), initial=0))[:-1]
        self._group, self._batches = -1, iter(())
        self._next_row = 0  # The first of the next batch.
        self._kept = []  # (first row, images)
        self._lock = threading.Lock()
        self._waiting = set()  # Rows. A lock isn't fair: the others may read on for hundreds of rows.

    def load(self, row: int, prompt: str, place: str) -> tuple[bytes, str]:
        """A row's image and checked prompt."""
        prompt = checked_prompt(prompt, place)
        self._waiting.add(row)
        with self._lock:
            image = self._image(row, place)
        data, path = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, None)
        if data is None and isinstance(path, str) and path:
            return load_row(os.path.dirname(self._path), path, prompt, place)
        if not isinstance(data, bytes):
            raise InputError(f"{place}: no image; needed is a path, bytes, or a struct of `bytes` and `path`")
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
            except (InputError, StopIteration) as error:  # It stops behind the first error.
                problem = f"row group {group} is broken from row {self._next_row} on"
                raise InputError(f"{place}: {problem}") from error
            first, self._next_row = self._next_row, self._next_row + len(images)
            late = [batch for batch in self._kept[:-_KEPT_BATCHES] if self._is_waited_for(*batch)]
            self._kept = [*late, *self._kept[-_KEPT_BATCHES:], (first, images)]
        return images[row - first].as_py()

    def _is_waited_for(self, first: int, images: Any) -> bool:
        return not self._waiting.isdisjoint(range(first, first + len(images)))
