"""CSV and JSON lines, an image a row; and what the columns and rows of any table must be."""

import csv
import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from richhf_jax import errors
from richhf_jax.inputs.record import Record, broken_record, checked_prompt, printable, read_bytes

# Of a CSV's field. A quote that is never closed swallows as much before the rows go on.
_MAX_FIELD = 1 << 24
_PATH_FIX = "paths are relative to the table's folder; URLs aren't fetched"

# (row's number, its prompt, where it is in words) -> the image's bytes and the checked prompt.
LoadImage = Callable[[int, str, str], tuple[bytes, str]]


def csv_records(path: str) -> Iterator[Record]:
    """The rows, numbered by their first line from 1."""
    csv.field_size_limit(max(_MAX_FIELD, csv.field_size_limit()))
    # What isn't UTF-8 costs a row at most: a path may be so on disk, a prompt is found out on loading.
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
    """The rows, numbered by their line from 1."""
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
    """Raises errors.UserError where a column that is needed isn't there, or one is there twice."""
    counts = {name: list(names).count(name) for name in ("image", "prompt", "id")}
    wrong = [name for name, number in counts.items() if number > 1 or (number == 0 and name != "id")]
    if wrong:
        there = printable(", ".join(map(repr, names[:20])))
        needed = "needed are `image` and `prompt`, and `id` may be there, each once"
        commas = " (UTF-8, separated by commas)" if path.lower().endswith(".csv") else ""
        raise errors.UserError(f"{path}: column `{wrong[0]}`: {needed}{commas}; the columns are {there}")


def row_record(table: str, number: int, fields: Any, load_image: LoadImage | None = None) -> Record:
    """A row, or why it is broken.

    Args:
      table: the file's path.
      number: the row's, as users count.
      fields: its values by column.
      load_image: loads the record where the image is in the table; `fields` may then lack it.
    """
    if not isinstance(fields, dict):
        return broken_row(table, number, "not a JSON object")
    image, prompt, row_id = (fields.get(name) for name in ("image", "prompt", "id"))
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
    place = _place(table, number)
    if load_image:
        load = functools.partial(load_image, number, prompt, place)
    else:
        load = functools.partial(load_row, os.path.dirname(table), image, prompt, place)
    if row_id in (None, ""):
        row_id = image or f"{os.path.basename(table)}:{number}"
    return Record(printable(str(row_id)), load)


def broken_row(table: str, number: int, problem: str) -> Record:
    """A row that doesn't load, and why."""
    return broken_record(f"{os.path.basename(table)}:{number}", f"{_place(table, number)}: {problem}")


def _place(table: str, number: int) -> str:
    return f"{table}, {'row' if table.lower().endswith('.parquet') else 'line'} {number}"


def load_row(folder: str, image: str, prompt: str, where: str) -> tuple[bytes, str]:
    """The image at a path relative to the table's folder, and the checked prompt."""
    prompt = checked_prompt(prompt, where)
    path = os.path.join(folder, image)
    return read_bytes(path, f"{where}: {path}", _PATH_FIX), prompt
