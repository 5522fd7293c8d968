"""Draws a balanced subset of a large pool of images, by their attributes (section 3.3 of the paper).

The table (.csv, .jsonl or .parquet) has one row per image and the columns

    id              text or number, each one once
    photorealistic  true or false (also yes/no, 1/0, 1.0/0.0)
    category        human, animal, object, indoor scene or outdoor scene

Rows with an empty photorealistic or category are left out. `datasets.attributes` makes such tables.

The number of each kind follows two rules:

 1. Each category gets the same number. A category with too few gives all, and the others share the rest.
 2. A share of them (--photorealistic_share) is photo-realistic, the same number in each category. If a
    category has too few of either sort, the others make up for it as far as they can; rule 1 still holds.

SUBSET.csv has the same columns. Ids stay as they are, for programs to read. A spreadsheet would take those
that begin with = + - or @ for formulas: import them as text. The command says if there are any.

The images drawn are those with the smallest hashes of seed and id. So the same seed draws the same images,
whatever the order of the rows. Memory: a few dozen bytes per row of the table, and the ids drawn.
"""

import argparse
import array
import csv
import dataclasses
import hashlib
import io
import pathlib
import sys
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tqdm

from richhf_jax import errors, foreign_text, reading, writing
from richhf_jax.datasets.attributes import CATEGORIES
from richhf_jax.inputs import row_groups, tables
from richhf_jax.inputs.record import InputError, checked_id, reason, whole

COLUMNS = ID, PHOTOREALISTIC, CATEGORY = ("id", "photorealistic", "category")
# The paper says "the majority"; the figure is ours.
PHOTOREALISTIC_SHARE = 0.7

_TRUE, _FALSE = ("true", "yes", "1", "1.0"), ("false", "no", "0", "0.0")
_TRUTH = {**dict.fromkeys(_TRUE, True), **dict.fromkeys(_FALSE, False)}
# A cell is a pair of attributes: 2 * category + photorealistic.
_CELLS = 2 * len(CATEGORIES)
_UNKNOWN = _CELLS


def water_fill(total: int, lows: Sequence[int], highs: Sequence[int]) -> list[int]:
    """Splits a total as equally as the bounds allow: each share in [low, high].

    The remainder goes to the first shares that have room.

    >>> water_fill(10, [0, 0, 0], [9, 2, 9])
    [4, 2, 4]
    >>> water_fill(10, [0, 6, 0], [9, 9, 9])
    [2, 6, 2]

    Raises:
      ValueError: no split keeps to the bounds.
    """
    if not sum(lows) <= total <= sum(highs):
        raise ValueError(f"{total} can't be split between {list(lows)} and {list(highs)}")

    def shares(level):
        return [min(max(level, low), high) for low, high in zip(lows, highs, strict=True)]

    # Bisection finds the highest level whose shares don't exceed the total.
    level, too_high = 0, max(highs) + 1
    while too_high - level > 1:
        middle = (level + too_high) // 2
        level, too_high = (middle, too_high) if sum(shares(middle)) <= total else (level, middle)
    result = shares(level)
    for i, more in enumerate(shares(level + 1)):
        if sum(result) < total:
            result[i] = more
    return result


def allocate(pool: np.ndarray, count: int, photorealistic_share: float = PHOTOREALISTIC_SHARE) -> np.ndarray:
    """Computes how many images to draw of each cell, by the module's two rules.

    Args:
      pool: int [categories, 2], number of images; the second axis is: not photo-realistic, photo-realistic.
      count: number of images to draw.
      photorealistic_share: share of photo-realistic images, 0 to 1.

    Returns:
      int [categories, 2], number of images to draw.

    Raises:
      ValueError: the pool has fewer than `count` images.
    """
    other, photorealistic = pool.T
    totals = np.array(water_fill(count, [0] * len(pool), pool.sum(axis=1).tolist()))
    lows, highs = np.maximum(totals - other, 0), np.minimum(totals, photorealistic)
    wanted = int(np.clip(round(photorealistic_share * count), lows.sum(), highs.sum()))
    real = np.array(water_fill(wanted, lows.tolist(), highs.tolist()))
    return np.stack([totals - real, real], axis=1)


@dataclasses.dataclass(frozen=True)
class Subset:
    """A balanced subset and its counts.

    Attributes:
      rows: the drawn (id, photorealistic, category), in the order of their hashes.
      pool, drawn: int [categories, 2], as in `allocate`.
      unknown: number of rows in the table that lack an attribute.
    """

    rows: list[tuple[str, bool, str]]
    pool: np.ndarray
    drawn: np.ndarray
    unknown: int


def draw(
    path: pathlib.Path, count: int, photorealistic_share: float = PHOTOREALISTIC_SHARE, seed: int = 0
) -> Subset:
    """Draws a balanced subset; the table is read twice, row by row.

    Raises:
      errors.UserError: the table can't be read, a row is bad, an id occurs twice, or there are too few rows.
    """
    hashes, cells = array.array("Q"), bytearray()
    for _, image_id, cell in _read(path):
        hashes.append(_hash(seed, image_id))
        cells.append(cell)
    hashes, cells = np.frombuffer(hashes, np.uint64), np.frombuffer(cells, np.uint8)
    counts = np.bincount(cells, minlength=_CELLS + 1)
    pool = counts[:_CELLS].reshape(-1, 2)
    if count > pool.sum():
        raise errors.UserError(
            f"{path}: {count:,} are to be drawn, but only {pool.sum():,} rows have both attributes"
        )
    drawn = allocate(pool, count, photorealistic_share)
    order = np.argsort(hashes, kind="stable")
    ranked = cells[order]
    chosen = np.concatenate([np.flatnonzero(ranked == cell)[:n] for cell, n in enumerate(drawn.ravel())])
    rows = _rows(path, order[np.sort(chosen)], seed, _repeated(hashes[order]))
    return Subset(rows, pool, drawn, int(counts[_UNKNOWN]))


def _repeated(ordered: np.ndarray) -> set[int]:
    """Returns the values that occur at least twice in a sorted array."""
    return set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())


def _rows(
    path: pathlib.Path, chosen: np.ndarray, seed: int, suspects: set[int]
) -> list[tuple[str, bool, str]]:
    """Reads the chosen rows, in the order given, and checks that no id with a suspect hash occurs twice."""
    places = {row: place for place, row in enumerate(chosen.tolist())}
    rows, first_seen = [("", False, "")] * len(places), {}
    for row, (number, image_id, cell) in enumerate(_read(path)):
        if suspects and _hash(seed, image_id) in suspects:
            first = first_seen.setdefault(image_id, number)
            if first != number:
                raise errors.UserError(
                    f"{_where(path, number)}: id {image_id!r} is already in {_where(path, first)}"
                )
        if row in places:
            category, photorealistic = divmod(cell, 2)
            rows[places[row]] = (image_id, bool(photorealistic), CATEGORIES[category])
    return rows


def _hash(seed: int, image_id: str) -> int:
    digest = hashlib.blake2b(f"{seed}/{image_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _where(path: pathlib.Path, number: int) -> str:
    return f"{path}: row {number}" if path.suffix.lower() == ".parquet" else f"{path}:{number}"


def _read(path: pathlib.Path) -> Iterator[tuple[int, str, int]]:
    """Yields (number of a row's first line, or of a parquet file's row from 0; id; cell) for each row."""
    readers = {
        ".csv": lambda: tables.csv_rows(str(path), _check_columns),
        ".jsonl": lambda: tables.jsonl_rows(str(path)),
        ".parquet": lambda: _read_parquet(path),
    }
    kind = path.suffix.lower()
    if kind not in readers:
        raise errors.UserError(f"{path}: a table's name must end in {', '.join(readers)}")
    try:
        for number, row in tqdm.tqdm(readers[kind](), unit=" rows", disable=None):
            try:
                yield number, *_parse(row)
            except ValueError as error:
                raise errors.UserError(f"{_where(path, number)}: {error}") from None
    except OSError as error:
        raise errors.UserError(f"{path}: {reason(error)}") from None


def _read_parquet(path: pathlib.Path) -> Iterator[tuple[int, dict | str]]:
    try:
        with open(path, "rb", opener=reading.regular) as source, pq.ParquetFile(source) as file:
            _check_columns(str(path), file.schema_arrow.names)
            number, exact = 0, row_groups.exact(file.schema_arrow, ID)
            for batch in file.iter_batches(columns=list(COLUMNS)):
                for row in batch.to_pylist():
                    yield number, _with_id(row, exact)
                    number += 1
    except pa.ArrowInvalid as error:
        raise errors.UserError(f"{path}: {error}") from None


def _with_id(row: dict, exact: int) -> dict | str:
    """Returns a row with its id as text, or what is wrong with the id."""
    try:
        return {**row, ID: checked_id(row[ID], exact)}
    except InputError as error:
        return str(error)


def _check_columns(path: str, names: Sequence[str]) -> None:
    if missing := [name for name in COLUMNS if name not in names]:
        found = foreign_text.for_terminal(", ".join(names))
        raise errors.UserError(f"{path}: there is no column {missing[0]}, only {found or 'none'}")


def _parse(row: dict | str) -> tuple[str, int]:
    """Returns the id and the cell of a row; a row that couldn't be read is the reason.

    Raises:
      ValueError: a value is missing or not allowed.
    """
    if isinstance(row, str):
        raise ValueError(row)
    if missing := [name for name in COLUMNS if name not in row]:
        raise ValueError(f"there is no {missing[0]}")
    if not (image_id := checked_id(row[ID])):
        raise ValueError("the id is empty")
    if image_id != str(whole(row[ID])):
        raise ValueError("the id isn't UTF-8; save the table as UTF-8")
    cells = [whole(row[name]) for name in (PHOTOREALISTIC, CATEGORY)]
    values = photorealistic, category = ["" if cell is None else str(cell).strip().lower() for cell in cells]
    if photorealistic and photorealistic not in _TRUTH:
        raise ValueError(f"photorealistic must be true or false, got {row[PHOTOREALISTIC]!r}")
    if category and category not in CATEGORIES:
        raise ValueError(f"category must be one of {', '.join(CATEGORIES)}, got {row[CATEGORY]!r}")
    if not all(values):
        return image_id, _UNKNOWN
    return image_id, 2 * CATEGORIES.index(category) + _TRUTH[photorealistic]


def format_cells(subset: Subset, photorealistic_share: float) -> str:
    """Formats one line per cell: images in the pool, wanted (if nothing were short) and drawn."""
    total = int(subset.drawn.sum())
    lines = [f"{'':32}{'pool':>12}{'wanted':>10}{'drawn':>10}"]
    for photorealistic, share in ((1, photorealistic_share), (0, 1 - photorealistic_share)):
        for category, pool, drawn in zip(CATEGORIES, subset.pool, subset.drawn, strict=True):
            name = f"{category}{', photo-realistic' if photorealistic else ''}"
            wanted = share * total / len(CATEGORIES)
            lines.append(f"{name:32}{pool[photorealistic]:>12,}{wanted:>10,.0f}{drawn[photorealistic]:>10,}")
    return "\n".join(lines)


def write(subset: Subset, out: pathlib.Path) -> None:
    """Writes the subset as CSV, with the table's three columns; the file appears complete or not at all.

    Raises:
      errors.UserError: the file can't be written.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows((i, str(real).lower(), category) for i, real, category in subset.rows)
    with writing.explained_disk_errors(out, f"Nothing written. {writing.FIX}"):
        writing.write(out, text.getvalue())


@errors.command()
def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m richhf_jax.datasets.balance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--attributes", required=True, type=pathlib.Path, metavar="TABLE", help="see above")
    parser.add_argument("--count", required=True, type=int, metavar="N", help="images to draw")
    parser.add_argument("--out", required=True, type=pathlib.Path, metavar="SUBSET.csv", help="overwritten")
    parser.add_argument(
        "--photorealistic_share",
        type=float,
        default=PHOTOREALISTIC_SHARE,
        metavar="SHARE",
        help=f"0 to 1; default: {PHOTOREALISTIC_SHARE} (ours; the paper says: the majority)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="different seeds draw different subsets; default: 0"
    )
    options = parser.parse_args(arguments)
    if options.count < 1:
        parser.error("--count must be at least 1")
    if not 0 <= options.photorealistic_share <= 1:
        parser.error("--photorealistic_share must be 0 to 1")
    subset = draw(options.attributes, options.count, options.photorealistic_share, options.seed)
    write(subset, options.out)
    print(format_cells(subset, options.photorealistic_share))
    if subset.unknown:
        print(f"{subset.unknown:,} rows without an attribute were left out")
    if formulas := sum(foreign_text.is_formula(image_id) for image_id, _, _ in subset.rows):
        print(
            f"{formulas:,} ids look like formulas: if a spreadsheet opens {options.out}, import id as text",
            file=sys.stderr,
        )
    print(f"{options.out}: {len(subset.rows):,} images, {subset.drawn[:, 1].sum():,} photo-realistic")


if __name__ == "__main__":
    main()
