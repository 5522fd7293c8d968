"""Reads parquet files row group by row group, in bounded memory, whatever their footers claim.

Nothing here imports pyarrow before a file is opened.
"""

import dataclasses
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from richhf_jax import reading
from richhf_jax.inputs.record import EXACT

# Most rows a byte of a file. Tables of images and prompts have less than one.
_MAX_ROWS_A_BYTE = 64
# Of smaller files, whole columns of a row group are read, of a size that pyarrow checks. Page by page, it
# takes as much memory as a garbled page claims, up to 2 GB.
_SMALL_FILE = 1 << 26
# Columns of a row group above this size, in bytes, may be this many times larger than in the file.
_MAX_UNPACKED, _MAX_RATIO = 1 << 30, 100
# Aim for the bytes of a batch.
_BATCH_BYTES = 1 << 28
# Encodings whose pages store each value. With others, a large value that is stored once may come in all rows.
_STORES_EACH = {"PLAIN", "RLE", "BIT_PACKED", "DELTA_LENGTH_BYTE_ARRAY"}
# Types of floats that hold fewer whole numbers than those of 64 bits: all below this one.
_EXACT = {"halffloat": 1 << 11, "float": 1 << 24}


class ParquetError(Exception):
    """A file is no parquet file, or it is cut off or encrypted. The message says why."""


class GroupError(Exception):
    """A row group can't be read to its end. The message says why."""


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """A row, or several that are lost together.

    Attributes:
      number: the (first) row's number, from 0.
      fields: column -> value; empty if there is a problem.
      problem: why there are no fields, or ''.
      lost: number of rows that a broken row group loses; 0 where the problem is this row's own.
    """

    number: int
    fields: Mapping[str, Any]
    problem: str = ""
    lost: int = 0


def exact(schema: Any, column: str) -> int:
    """Returns below which number a column (of a pyarrow.Schema) holds every whole number as a float."""
    return _EXACT.get(str(schema.field(column).type), EXACT) if column in schema.names else EXACT


class Table:
    """A parquet file.

    Attributes:
      schema: its columns (pyarrow.Schema).
      starts: first row of each row group, and the number of all rows, as the footer claims.
      metadata: the footer (pyarrow.parquet.FileMetaData).
    """

    def __init__(self, source: str | BinaryIO, buffer_size: int = 1 << 20):
        """Reads the footer.

        Args:
          source: a regular file's path, or an open file that can seek. What it raises passes, unless it is an
            OSError.
          buffer_size: bytes that are read at once of a large file, at least a page.

        Raises:
          ParquetError: the footer can't be read.
        """
        import pyarrow as pa
        from pyarrow import parquet

        self._broken = (pa.ArrowException, OSError, ValueError, IndexError, OverflowError, MemoryError)
        try:
            if isinstance(source, str):
                with open(source, "rb", opener=reading.regular) as file:
                    self._size = file.seek(0, io.SEEK_END)
            else:
                self._size = source.seek(0, io.SEEK_END)
            buffer_size = 0 if self._size <= _SMALL_FILE else buffer_size
            self._file = parquet.ParquetFile(
                source, buffer_size=buffer_size, pre_buffer=False, page_checksum_verification=True
            )
            self.metadata, self.schema = self._file.metadata, self._file.schema_arrow
            groups = [self.metadata.row_group(group).num_rows for group in range(self._file.num_row_groups)]
            if any(rows < 0 for rows in groups):
                raise ParquetError("a row group claims fewer than 0 rows")
            self.starts = list(itertools.accumulate(groups, initial=0))
            paths = self._file.schema
            self._paths = [paths.column(index).path for index in range(len(paths))]
        except self._broken as error:
            raise ParquetError(_line(error)) from error

    def leaf(self, column: str, field: str) -> str:
        """Names what to read of a column: a struct's field if it has it, else all of the column."""
        import pyarrow as pa

        kind = self.schema.field(column).type
        return (
            f"{column}.{field}" if pa.types.is_struct(kind) and kind.get_field_index(field) >= 0 else column
        )

    def batches(self, group: int, columns: Sequence[str], most: int) -> Iterator[Any]:
        """Yields the batches (pyarrow.RecordBatch) of a row group; columns that it lacks are left out.

        Args:
          group: number of the row group.
          columns: columns, or a struct's fields as `leaf` names them.
          most: most rows of a batch; it has fewer if they are large.

        Raises:
          GroupError: the row group is broken, or unpacks to much more than an honest one does. It comes after
            the batches that can be read.
        """
        read, rows = 0, self.starts[group + 1] - self.starts[group]
        try:
            if self.starts[group + 1] > _MAX_ROWS_A_BYTE * self._size:
                raise GroupError(f"it claims {rows} rows, more than the file can hold")
            if self.metadata.row_group(group).total_byte_size * most > _BATCH_BYTES:
                # Reading the first row raises where pyarrow ends the process when it is asked for the sizes.
                next(self._iter_batches(1, group, columns), None)
                most = self._rows_at_once(group, columns, most)
            for batch in self._iter_batches(most, group, columns):
                yield batch
                read += len(batch)
        except self._broken as error:
            raise GroupError(_line(error)) from error
        if read < rows:
            raise GroupError(f"it claims {rows} rows, but {read} are there")

    def _iter_batches(self, rows: int, group: int, columns: Sequence[str]) -> Iterator[Any]:
        return self._file.iter_batches(rows, row_groups=[group], columns=list(columns), use_threads=False)

    def rows(self, columns: Sequence[str], most: int) -> Iterator[Row]:
        """Yields all rows. One whose text isn't UTF-8 has a problem; so have those that a row group loses.

        Args:
          columns: see `batches`.
          most: most rows that are in memory at once.
        """
        for part in self._parts(columns, most):
            if isinstance(part, Row):
                yield part
            else:
                yield from _rows(*part)

    def count(self, columns: Sequence[str], most: int) -> int:
        """Counts what `rows` yields."""
        return sum(1 if isinstance(part, Row) else len(part[1]) for part in self._parts(columns, most))

    def _parts(self, columns: Sequence[str], most: int) -> Iterator[Row | tuple[int, Any]]:
        """Yields (first row, batch), and a row with a problem for the rest of each broken row group."""
        for group, end in enumerate(self.starts[1:]):
            row = self.starts[group]
            try:
                for batch in self.batches(group, columns, most):
                    yield row, batch
                    row += len(batch)
            except GroupError as error:
                lost = end - row
                if lost:  # Else the error came behind the last row.
                    yield Row(row, {}, f"row group {group} is broken, {lost} rows are lost: {error}", lost)

    def _rows_at_once(self, group: int, columns: Sequence[str], most: int) -> int:
        """Returns the rows of a batch. Raises GroupError where the columns take too much memory."""
        metadata = self.metadata.row_group(group)
        for index, path in enumerate(self._paths):
            if not any(path == column or path.startswith(f"{column}.") for column in columns):
                continue
            chunk = metadata.column(index)
            unpacked, stored = chunk.total_uncompressed_size, min(chunk.total_compressed_size, self._size)
            if unpacked > max(_MAX_UNPACKED, _MAX_RATIO * stored):
                raise GroupError(
                    f"{unpacked} bytes of `{path}` are packed into {stored}, which no table of images needs"
                )
            if _STORES_EACH.issuperset(chunk.encodings):
                unpacked = unpacked / max(metadata.num_rows, 1)
            most = max(1, min(most, int(_BATCH_BYTES / max(unpacked, 1))))
        return most


def _rows(first: int, batch: Any) -> Iterator[Row]:
    unreadable = (ValueError, OverflowError, NotImplementedError)  # Text that isn't UTF-8, years behind 9999.
    try:
        found = batch.to_pylist()
    except unreadable:
        found = (batch.slice(index, 1) for index in range(len(batch)))
    for number, fields in enumerate(found, first):
        try:
            yield Row(number, fields if isinstance(fields, dict) else fields.to_pylist()[0])
        except unreadable as error:
            yield Row(number, {}, _line(error))


def _line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).partition("\n")[0][:200]
