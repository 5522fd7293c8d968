"""Reads parquet tables that hold images or paths of images. Rows count from 0."""

import bisect
import os
import threading
from collections.abc import Iterator
from typing import Any

from richhf_jax import errors
from richhf_jax.inputs import row_groups
from richhf_jax.inputs.record import InputError, Record, broken_record, checked_id, checked_prompt
from richhf_jax.inputs.tables import LoadImage, broken_row, check_columns, load_row, row_record

# Most rows that are read at once: of names and prompts, and of images.
_NAME_ROWS = 1024
_IMAGE_ROWS = 16
# Most rows, and about the most bytes, of images that stay in memory.
_KEPT_ROWS, _KEPT_BYTES = 4 * _IMAGE_ROWS, 1 << 28


def parquet_records(path: str, needs_prompts: bool = True) -> Iterator[Record]:
    """Yields a record for each row, and one that doesn't load for all rows that a row group loses.

    Raises:
      errors.UserError: pyarrow is missing, or the file is no parquet file or lacks a column.
    """
    table = _open(path, needs_prompts)
    load_image = _Images(path, needs_prompts).load if _holds_images(table) else None
    exact = row_groups.exact(table.schema, "id")
    for row in table.rows(_name_columns(table), _NAME_ROWS):
        if row.lost > 1:
            last = row.number + row.lost - 1
            name = f"{os.path.basename(path)}:{row.number}-{last}"
            yield broken_record(name, f"{path}, rows {row.number} to {last}: {row.problem}")
        elif row.problem:
            yield broken_row(path, row.number, row.problem)
        else:
            yield _record(path, row, exact, load_image, needs_prompts)


def count_rows(path: str, needs_prompts: bool = True) -> int:
    """Counts the records. It reads what `parquet_records` reads, because a footer may claim anything."""
    table = _open(path, needs_prompts)
    return table.count(_name_columns(table), _NAME_ROWS)


def _open(path: str, needs_prompts: bool) -> row_groups.Table:
    try:
        table = row_groups.Table(path)
    except ImportError as error:
        raise errors.UserError(f"{path}: parquet needs pyarrow: `pip install pyarrow`") from error
    except row_groups.ParquetError as error:
        raise errors.UserError(f"{path}: no parquet file, or cut off; copy it again: {error}") from error
    check_columns(path, table.schema.names, needs_prompts)
    return table


def _holds_images(table: row_groups.Table) -> bool:
    """Tells whether the images themselves, or structs {bytes, path}, are in the table."""
    kind = str(table.schema.field("image").type)
    return "binary" in kind or kind.startswith("struct")


def _name_columns(table: row_groups.Table) -> list[str]:
    # Images in the table stay on disk until they are loaded. Of a struct {bytes, path}, the path is read now.
    return ["prompt", "id", "image.path" if _holds_images(table) else "image"]


def _record(
    path: str, row: row_groups.Row, exact: int, load_image: LoadImage | None, needs_prompt: bool
) -> Record:
    try:
        fields = {**row.fields, "id": checked_id(row.fields.get("id"), exact)}
    except InputError as error:
        return broken_row(path, row.number, str(error))
    if load_image:
        fields["image"] = (fields.get("image") or {}).get("path")
    return row_record(path, row.number, fields, load_image, needs_prompt)


class _Images:
    """Loads the images in a parquet file. It reads forwards, so loading rows about in order is cheap.

    The last few batches stay in memory, and so do those that a thread waits for. For a row before them, its
    row group is read again from the start.
    """

    def __init__(self, path: str, needs_prompts: bool):
        self._path, self._needs_prompts = path, needs_prompts
        self._table = _open(path, needs_prompts)
        self._group, self._batches = -1, iter(())
        self._next_row = 0  # First row of the next batch.
        self._problem = ""  # Why the row group has no next batch.
        self._kept: list[tuple[int, Any]] = []  # Pairs of (first row, images).
        self._lock = threading.Lock()
        # Rows that threads wait for. A lock isn't fair: other threads may read on for hundreds of rows.
        self._waiting: set[int] = set()

    def load(self, row: int, prompt: str, place: str) -> tuple[bytes, str]:
        """Returns a row's image and checked prompt; see `tables.LoadImage`."""
        prompt = checked_prompt(prompt, place, self._needs_prompts)
        self._waiting.add(row)
        with self._lock:
            image = self._image(row, place)
        data, path = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, None)
        if data is None and isinstance(path, str) and path:
            path = os.path.join(os.path.dirname(self._path), path)
            return load_row(path, prompt, place, self._needs_prompts)
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
        starts = self._table.starts
        group = bisect.bisect_right(starts, row) - 1
        if group != self._group or row < self._next_row:
            self._group, self._next_row, self._problem = group, starts[group], ""
            self._batches = self._table.batches(group, ["image"], _IMAGE_ROWS)
        while self._next_row <= row:
            try:
                images = next(self._batches).column("image")
            except (
                row_groups.GroupError,
                StopIteration,
            ) as error:  # The generator ends after its first error.
                begin = f"row group {group} is broken from row {self._next_row} on"
                self._problem = self._problem or f"{begin}: {error}"
                raise InputError(f"{place}: {self._problem}") from error
            first, self._next_row = self._next_row, self._next_row + len(images)
            self._keep(first, images)
        return images[row - first].as_py()

    def _keep(self, first: int, images: Any) -> None:
        """Adds a batch to those in memory, and drops the ones that are far behind it."""
        rows, size, kept = len(images), images.nbytes, [(first, images)]
        for batch in reversed(self._kept):
            rows, size = rows + len(batch[1]), size + batch[1].nbytes
            if (rows <= _KEPT_ROWS and size <= _KEPT_BYTES) or self._is_waited_for(*batch):
                kept.append(batch)
        self._kept = kept[::-1]

    def _is_waited_for(self, first: int, images: Any) -> bool:
        return not self._waiting.isdisjoint(range(first, first + len(images)))
