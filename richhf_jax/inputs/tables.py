"""Reads CSV and JSON lines, one image a row, and checks the columns and rows of any table."""

import csv
import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from richhf_jax import errors
from richhf_jax.inputs.record import Record, broken_record, checked_prompt, printable, read_bytes

# Longest field of a CSV, in characters. A quote that is never closed swallows so much before an error.
_MAX_FIELD = 1 << 24
_PATH_FIX = "paths are relative to the table's folder; URLs aren't fetched"

# From (number of the row, its prompt, its place in words) to the image's bytes and the checked prompt.
LoadImage = Callable[[int, str, str], tuple[bytes, str]]


def csv_records(path: str) -> Iterator[Record]:
    """Yields a record for each row, numbered by its first line, from 1.

    Raises:
      errors.UserError: the header is broken or lacks a column.
    """
    csv.field_size_limit(max(_MAX_FIELD, csv.field_size_limit()))
    # Text that isn't UTF-8 loses one row at most: a path on disk may be so, a prompt is refused on loading.
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.reader(file, strict=True)
        try:
            header = next(rows, [])
        except csv.Error as error:
            raise errors.UserError(f"{path}: broken header: {error}") from error
        check_columns(path, header)
        while True:
            line = rows.line_num + 1
            try:
                values = next(rows)
            except StopIteration:
                return
            except csv.Error as error:  # The reader goes on with the next line.
                yield broken_row(path, line, str(error))
                continue
            if len(values) == len(header):
                yield row_record(path, line, dict(zip(header, values, strict=True)))
            elif values:
                problem = f"{len(values)} fields, but the header has {len(header)} (quote those with commas)"
                yield broken_row(path, line, problem)


def jsonl_records(path: str) -> Iterator[Record]:
    """Yields a record for each row, numbered by its line, from 1."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield broken_row(path, number, f"no JSON: {getattr(error, 'msg', error)}")
                continue
            yield row_record(path, number, fields)


def check_columns(path: str, names: Sequence[str]) -> None:
    """Raises errors.UserError where a needed column is missing, or a column is there twice."""
    counts = {name: list(names).count(name) for name in ("image", "prompt", "id")}
    wrong = [name for name, number in counts.items() if number > 1 or (number == 0 and name != "id")]
    if wrong:
        there = printable(", ".join(map(repr, names[:20])))
        needed = "a table needs `image` and `prompt`, and may have `id`, each once"
        commas = " (UTF-8, separated by commas)" if path.lower().endswith(".csv") else ""
        raise errors.UserError(f"{path}: column `{wrong[0]}`: {needed}{commas}; the columns are {there}")


def row_record(table: str, number: int, fields: Any, load_image: LoadImage | None = None) -> Record:
    """Makes a row's record; it doesn't load where the row is broken.

    Args:
      table: the table's path.
      number: the row's number, as users count.
      fields: the row's values by column.
      load_image: loads an image that is in the table itself; `fields` may then lack it. None: `image` is a
        path.
    """
    if not isinstance(fields, dict):
        return broken_row(table, number, "not a JSON object")
    row_id = fields.get("id")
    for name in ("prompt",) if load_image else ("image", "prompt"):
        value = fields.get(name)
        if name not in fields:
            there = ", ".join(map(repr, list(fields)[:20]))
            return broken_row(table, number, f"no `{name}`; there are {there}")
        if value is None or (name == "image" and value == ""):
            return broken_row(table, number, f"`{name}` is empty")
        if not isinstance(value, str):
            return broken_row(table, number, f"`{name}` is a {type(value).__name__}, not a string")
    if row_id is not None and type(row_id) not in (str, int):  # A bool is an int.
        return broken_row(table, number, f"`id` is a {type(row_id).__name__}, not a string or whole number")
    prompt, place = fields["prompt"], _place(table, number)
    if load_image:
        load = functools.partial(load_image, number, prompt, place)
    else:
        load = functools.partial(load_row, os.path.dirname(table), fields["image"], prompt, place)
    if row_id in (None, ""):
        row_id = fields.get("image") or f"{os.path.basename(table)}:{number}"
    return Record(printable(str(row_id)), load)


def broken_row(table: str, number: int, problem: str) -> Record:
    """Makes the record of a row that doesn't load; `problem` says why."""
    return broken_record(f"{os.path.basename(table)}:{number}", f"{_place(table, number)}: {problem}")


def _place(table: str, number: int) -> str:
    return f"{table}, {'row' if table.lower().endswith('.parquet') else 'line'} {number}"


def load_row(folder: str, image: str, prompt: str, where: str) -> tuple[bytes, str]:
    """Returns the image at a path relative to the table's folder, and the checked prompt."""
    prompt = checked_prompt(prompt, where)
    path = os.path.join(folder, image)
    return read_bytes(path, f"{where}: {path}", _PATH_FIX), prompt
