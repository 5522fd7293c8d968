"""Reads CSV and JSON lines, one image a row, and checks the columns and rows of any table."""

import codecs
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

from richhf_jax import errors, reading
from richhf_jax.inputs import record
from richhf_jax.inputs.record import (
    InputError,
    Record,
    bounded_lines,
    broken_record,
    checked_id,
    checked_prompt,
    parsed_json,
    printable,
    read_bytes,
)

_PATH_FIX = "paths are relative to the table's folder; URLs aren't fetched"
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

# From (number of the row, its prompt, its place in words) to the image's bytes and the checked prompt.
LoadImage = Callable[[int, str, str], tuple[bytes, str]]


def _own_csv() -> Any:
    """Imports the module behind `csv` once more: the limit of a field's size is global, and the user's."""
    spec = importlib.util.find_spec("_csv")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.field_size_limit(record.MAX_ROW)
    return module


_csv = _own_csv()


def csv_records(path: str, needs_prompts: bool = True) -> Iterator[Record]:
    """Yields a record for each row, numbered by its first line, from 1.

    Raises:
      errors.UserError: the header is broken or lacks a column.
    """
    check = functools.partial(check_columns, needs_prompts=needs_prompts)
    for line, fields in csv_rows(path, check):
        if isinstance(fields, str):
            yield broken_row(path, line, fields)
        else:
            yield row_record(path, line, fields, needs_prompt=needs_prompts)


def jsonl_records(path: str, needs_prompts: bool = True) -> Iterator[Record]:
    """Yields a record for each row, numbered by its line, from 1."""
    for number, fields in jsonl_rows(path):
        if isinstance(fields, str):
            yield broken_row(path, number, fields)
        else:
            yield row_record(path, number, fields, needs_prompt=needs_prompts)


def csv_rows(
    path: str, check: Callable[[str, Sequence[str]], None]
) -> Iterator[tuple[int, dict[str, str] | str]]:
    """Yields the first line's number, from 1, of each row, and its cells by column or what is wrong with it.

    Args:
      path: the table.
      check: called with the path and the columns' names; raises errors.UserError where one is missing.

    Raises:
      errors.UserError: the header is broken or lacks a column, or the file is UTF-16.
      OSError: the file can't be read.
    """
    # Text that isn't UTF-8 loses one row at most: a path on disk may be so, a prompt is refused on loading.
    with open(
        path, encoding="utf-8-sig", errors="surrogateescape", newline="", opener=reading.regular
    ) as file:
        lines = _Lines(file)
        rows = _csv.reader(lines, strict=True)
        try:
            header = next(rows, [])
        except (_csv.Error, InputError) as error:
            raise errors.UserError(f"{path}: broken header: {error}") from error
        if "".join(header[:1]).encode(errors="surrogateescape").startswith(_UTF_16):
            raise errors.UserError(f"{path}: this is UTF-16; save it as UTF-8 (Excel: `CSV UTF-8`)")
        check(path, header)
        while True:
            number = lines.begin_row()
            try:
                values = next(rows)
            except StopIteration:
                return
            except (_csv.Error, InputError) as error:  # The reader goes on with the next line.
                last = lines.number
                lost = (
                    f"; lines {number} to {last} are lost (is a quote never closed?)" if last > number else ""
                )
                yield number, f"{error}{lost}"
                continue
            if len(values) == len(header):
                yield number, dict(zip(header, values, strict=True))
            elif values:
                fix = "quote those with commas"
                yield number, f"{len(values)} fields, but the header has {len(header)} ({fix})"


class _Lines:
    """Iterates over a file's lines, and raises InputError in a row that is longer than record.MAX_ROW.

    The next call then gives the line behind the one where it was raised.

    Attributes:
      number: of the line that was given last, from 1.
    """

    def __init__(self, file: TextIO):
        self._file, self.number = file, 0
        self.begin_row()

    def begin_row(self) -> int:
        """Returns the number of the next line, the first of a row."""
        self._left = record.MAX_ROW
        return self.number + 1

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = rest = self._file.readline(record.MAX_ROW)
        if not line:
            raise StopIteration
        self.number += 1
        while rest and not rest.endswith(("\n", "\r")):
            rest = self._file.readline(record.MAX_ROW)
            self._left -= len(rest)
        self._left -= len(line)
        if self._left < 0:
            raise InputError(f"longer than {record.MAX_ROW} characters")
        return line


def jsonl_rows(path: str) -> Iterator[tuple[int, Any]]:
    """Yields the number of each line that isn't blank, from 1, and its object or what is wrong with it.

    Raises:
      OSError: the file can't be read.
    """
    with open(path, "rb", opener=reading.regular) as file:
        for number, line in enumerate(bounded_lines(file), 1):
            if not line.strip():
                continue
            try:
                fields = parsed_json(line)
            except InputError as error:
                yield number, str(error)
                continue
            yield number, fields if isinstance(fields, dict) else "not a JSON object"


def check_columns(path: str, names: Sequence[str], needs_prompts: bool = True) -> None:
    """Raises errors.UserError where a needed column is missing, or a column is there twice."""
    counts = {
        name: [other.strip().lower() for other in names].count(name) for name in ("image", "prompt", "id")
    }
    wrong = [name for name, number in counts.items() if number > 1]
    wrong += [name for name in _needed(needs_prompts) if name not in names]
    if wrong:
        there = printable(", ".join(map(repr, names[:20])))
        columns = (
            "`image` and `prompt`, and may have" if needs_prompts else "`image`, and may have `prompt` and"
        )
        needed = f"a table needs {columns} `id`, each once, in small letters"
        commas = " (UTF-8, separated by commas)" if path.lower().endswith(".csv") else ""
        raise errors.UserError(f"{path}: column `{wrong[0]}`: {needed}{commas}; the columns are {there}")


def _needed(needs_prompts: bool) -> tuple[str, ...]:
    return ("image", "prompt") if needs_prompts else ("image",)


def row_record(
    table: str,
    number: int,
    fields: dict[str, Any],
    load_image: LoadImage | None = None,
    needs_prompt: bool = True,
) -> Record:
    """Makes a row's record; it doesn't load where the row is broken.

    Args:
      table: the table's path.
      number: the row's number, as users count.
      fields: the row's values by column.
      load_image: loads an image that is in the table itself; `fields` may then lack it, and its `image` is
        no more than a hint at a name. None: `image` is a path.
      needs_prompt: whether a row without a prompt is broken.
    """
    if not needs_prompt and fields.get("prompt") is None:
        fields = {**fields, "prompt": ""}
    for name in ("prompt",) if load_image else ("image", "prompt"):
        value = fields.get(name)
        if name not in fields:
            there = ", ".join(map(repr, list(fields)[:20]))
            return broken_row(table, number, f"no `{name}`; there are {there}")
        if value is None or (name == "image" and value == ""):
            return broken_row(table, number, f"`{name}` is empty")
        if not isinstance(value, str):
            return broken_row(table, number, f"`{name}` is of type {type(value).__name__}, not a string")
    try:
        row_id = checked_id(fields.get("id"))
    except InputError as error:
        return broken_row(table, number, str(error))
    prompt, place = fields["prompt"], _place(table, number)
    if not load_image:
        path = os.path.join(os.path.dirname(table), fields["image"])
        load = functools.partial(load_row, path, prompt, place, needs_prompt)
        return Record(row_id or printable(fields["image"]), load, path=path)
    load = functools.partial(load_image, number, prompt, place)
    numbered = _numbered(table, number)
    # Rows of different images may have the same path there: writers keep of it only the file's name.
    hint = row_id or printable(fields.get("image") or numbered)
    return Record(hint, load, "" if row_id else numbered)


def broken_row(table: str, number: int, problem: str) -> Record:
    """Makes the record of a row that doesn't load; `problem` says why."""
    return broken_record(_numbered(table, number), f"{_place(table, number)}: {problem}")


def _numbered(table: str, number: int) -> str:
    return printable(f"{os.path.basename(table)}:{number}")


def _place(table: str, number: int) -> str:
    return f"{table}, {'row' if table.lower().endswith('.parquet') else 'line'} {number}"


def load_row(path: str, prompt: str, where: str, needs_prompt: bool) -> tuple[bytes, str]:
    """Returns the image at a path, and the checked prompt."""
    prompt = checked_prompt(prompt, where, needs_prompt)
    return read_bytes(path, f"{where}: {path}", _PATH_FIX), prompt
