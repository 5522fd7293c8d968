"""Tests balanced sampling: worked examples of its rules, independence of the row order, and bad tables."""

import collections
import csv
import hashlib
import json
import os
import pathlib
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from richhf_jax import errors
from richhf_jax.datasets import balance
from richhf_jax.datasets.attributes import CATEGORIES


@pytest.mark.parametrize(
    ("total", "lows", "highs", "expected"),
    [
        (10, [0, 0], [9, 9], [5, 5]),
        (11, [0, 0, 0], [9, 9, 9], [4, 4, 3]),  # The remainder goes to the first share.
        (11, [0, 0, 0], [3, 9, 9], [3, 4, 4]),
        (10, [0, 0, 0], [1, 2, 9], [1, 2, 7]),  # The third makes up for two that have too few.
        (10, [7, 0, 0], [9, 9, 9], [7, 2, 1]),
        (0, [0, 0], [0, 4], [0, 0]),
        (4, [0, 0], [0, 4], [0, 4]),
    ],
)
def test_water_filling(total, lows, highs, expected):
    assert balance.water_fill(total, lows, highs) == expected


@pytest.mark.parametrize("total", [2, 9])
def test_water_filling_of_what_does_not_fit(total):
    with pytest.raises(ValueError, match="can't be split"):
        balance.water_fill(total, [3, 0], [4, 4])


def test_no_share_can_be_made_more_equal(rng):
    for _ in range(200):
        lows = rng.integers(0, 8, 5)
        highs = lows + rng.integers(0, 8, 5)
        total = int(rng.integers(lows.sum(), highs.sum() + 1))
        shares = np.array(balance.water_fill(total, lows.tolist(), highs.tolist()))
        assert shares.sum() == total
        assert np.all((lows <= shares) & (shares <= highs))
        # No move of one image from a share that may shrink to one that may grow brings the two closer.
        assert shares[shares > lows].max(initial=0) - shares[shares < highs].min(initial=total + 1) <= 1


@pytest.mark.parametrize(
    ("pool", "count", "share", "expected"),
    [
        # Enough of everything: all categories get the same number, and 70 % of each are photo-realistic.
        ([[50, 50]] * 5, 50, 0.7, [[3, 7]] * 5),
        # Few photo-realistic animals: other animals stand in for them, other categories make up the share.
        (
            [[50, 50], [50, 1], [50, 50], [50, 50], [50, 50]],
            50,
            0.7,
            [[1, 9], [9, 1], [1, 9], [2, 8], [2, 8]],
        ),
        # Few animals at all: the others share the rest equally.
        ([[50, 50], [1, 1], [50, 50], [50, 50], [50, 50]], 50, 0.5, [[6, 6], [1, 1], [6, 6], [6, 6], [6, 6]]),
        # Nothing is photo-realistic.
        ([[50, 0]] * 5, 10, 0.7, [[2, 0]] * 5),
        # Everything is photo-realistic.
        ([[0, 50]] * 5, 10, 0.7, [[0, 2]] * 5),
        # The whole pool is drawn.
        ([[3, 1], [0, 2], [5, 0], [1, 1], [0, 1]], 14, 0.7, [[3, 1], [0, 2], [5, 0], [1, 1], [0, 1]]),
    ],
)
def test_allocation(pool, count, share, expected):
    np.testing.assert_array_equal(balance.allocate(np.array(pool), count, share), expected)


def make_rows(count: int = 400) -> list[dict]:
    rng = np.random.default_rng(5)
    categories = rng.choice(CATEGORIES, count, p=[0.5, 0.25, 0.15, 0.07, 0.03])
    real = rng.random(count) < 0.6
    return [
        {"id": f"image-{i}, with a comma", "photorealistic": bool(r), "category": str(c)}
        for i, (c, r) in enumerate(zip(categories, real, strict=True))
    ]


def write_table(path: pathlib.Path, rows: list[dict]) -> pathlib.Path:
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    else:
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=100)
    return path


def test_the_drawn_are_those_with_the_smallest_hashes(tmp_path):
    rows = make_rows()
    subset = balance.draw(write_table(tmp_path / "table.csv", rows), 60, 0.7, seed=3)

    def hash_of(row):
        digest = hashlib.blake2b(f"3/{row['id']}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little")

    cells = collections.defaultdict(list)
    for row in sorted(rows, key=hash_of):
        cells[row["category"], row["photorealistic"]].append(row)
    expected = []
    for index, category in enumerate(CATEGORIES):
        for real in (False, True):
            cell = cells[category, real]
            assert subset.pool[index, int(real)] == len(cell)
            expected += cell[: subset.drawn[index, int(real)]]
    expected.sort(key=hash_of)
    assert subset.rows == [(row["id"], row["photorealistic"], row["category"]) for row in expected]
    assert len(subset.rows) == 60
    assert subset.drawn.sum(axis=1).tolist() == [13, 12, 12, 12, 11]  # there are 11 outdoor scenes
    assert subset.drawn[:, 1].sum() == 42


def test_row_order_and_format_change_nothing_but_the_seed_does(tmp_path):
    rows = make_rows()
    first = balance.draw(write_table(tmp_path / "a.csv", rows), 60).rows
    assert balance.draw(write_table(tmp_path / "b.jsonl", rows[::-1]), 60).rows == first
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    assert balance.draw(write_table(tmp_path / "c.parquet", shuffled), 60).rows == first
    assert balance.draw(tmp_path / "a.csv", 60, seed=1).rows != first


def test_rows_without_an_attribute_are_left_out(tmp_path):
    rows = [
        {"id": "a", "photorealistic": "", "category": "human"},
        {"id": "b", "photorealistic": "Yes", "category": " Outdoor Scene "},
        {"id": "c", "photorealistic": "0", "category": "animal"},
        {"id": "d", "photorealistic": "no", "category": ""},
    ]
    subset = balance.draw(write_table(tmp_path / "a.csv", rows), 2)
    assert sorted(subset.rows) == [("b", True, "outdoor scene"), ("c", False, "animal")]
    assert subset.unknown == 2
    nulls = [{key: value or None for key, value in row.items()} for row in rows]
    assert balance.draw(write_table(tmp_path / "a.jsonl", nulls), 2).rows == subset.rows
    assert balance.draw(write_table(tmp_path / "a.parquet", nulls), 2).rows == subset.rows


GOOD = {"id": "a", "photorealistic": True, "category": "human"}


@pytest.mark.parametrize(
    ("suffix", "bad", "message"),
    [
        (
            ".csv",
            {"id": "b", "photorealistic": "true", "category": "robot"},
            ":3: category must be one of human,",
        ),
        (
            ".jsonl",
            {"id": "b", "photorealistic": "maybe", "category": "human"},
            ":2: photorealistic must be true",
        ),
        (
            ".parquet",
            {"id": "b", "photorealistic": True, "category": "robot"},
            ": row 1: category must be one of",
        ),
        (".jsonl", {"id": "b", "category": "human"}, ":2: there is no photorealistic"),
        (".csv", {"id": "", "photorealistic": "true", "category": "human"}, ":3: the id is empty"),
        (".csv", {**GOOD, "category": "animal"}, ":3: id 'a' is already in "),
        (".jsonl", GOOD, ":2: id 'a' is already in "),
        (".parquet", GOOD, ": row 1: id 'a' is already in "),
    ],
)
def test_a_bad_row_is_named(tmp_path, suffix, bad, message):
    path = write_table(tmp_path / f"table{suffix}", [GOOD, bad])
    with pytest.raises(errors.UserError, match=f"^{re.escape(str(path) + message)}"):
        balance.draw(path, 1)


def test_a_record_of_several_lines_is_named_by_its_first(tmp_path):
    rows = [{**GOOD, "id": "two\nlines"}, {**GOOD, "id": "three\nmore\nlines", "category": "robot"}]
    path = write_table(tmp_path / "a.csv", rows)
    with pytest.raises(errors.UserError, match=re.escape(f"{path}:4: category must be one of")):
        balance.draw(path, 1)


def test_numbers_that_pandas_wrote_as_floats(tmp_path):
    """It does so in columns with an empty cell."""
    real = [1.0, 0.0, None, float("nan"), 1.0]
    rows = [{"id": float(n), "photorealistic": value, "category": "human"} for n, value in enumerate(real)]
    expected = [("0", True, "human"), ("1", False, "human"), ("4", True, "human")]
    for name in ("a.jsonl", "a.parquet"):
        subset = balance.draw(write_table(tmp_path / name, rows), 3)
        assert (sorted(subset.rows), subset.unknown) == (expected, 2)
    rows = [{**row, "id": str(row["id"]), "photorealistic": row["photorealistic"]} for row in rows]
    rows[3]["photorealistic"] = ""
    subset = balance.draw(write_table(tmp_path / "a.csv", rows), 3)
    assert [row[0] for row in sorted(subset.rows)] == ["0.0", "1.0", "4.0"]  # Text, as a CSV has no numbers.


def test_ids_that_floats_of_32_bits_may_have_rounded(tmp_path):
    rows = {"photorealistic": [True] * 2, "category": ["animal"] * 2}
    pq.write_table(pa.table({"id": pa.array([7, 2**24 - 1], pa.float32()), **rows}), tmp_path / "a.parquet")
    assert [row[0] for row in balance.draw(tmp_path / "a.parquet", 2).rows] == ["16777215", "7"]
    pq.write_table(pa.table({"id": pa.array([7, 2**24], pa.float32()), **rows}), tmp_path / "a.parquet")
    with pytest.raises(errors.UserError, match="row 1: `id` is a float.* may be rounded"):
        balance.draw(tmp_path / "a.parquet", 2)


def test_a_pipe_is_no_table(tmp_path):
    for name in ("a.csv", "a.jsonl", "a.parquet"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(errors.UserError, match=f"{name}: not a file"):
            balance.draw(tmp_path / name, 1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"id,category\n", "there is no column photorealistic, only id, category"),
        ("a.csv", b"", "there is no column id, only none"),
        ("a.csv", b"id,photorealistic,category\n", "1 are to be drawn, but only 0 rows have both attributes"),
        ("a.csv", b"id,photorealistic,category\n\xff,true,human\n", ":2: the id isn't UTF-8"),
        ("a.csv", b"id,photorealistic,category\na,true\n", ":2: 2 fields, but the header has 3"),
        ("a.csv", "id,photorealistic,category\n".encode("utf-16"), "save it as UTF-8"),
        ("a.jsonl", b"{\n", ":1: no JSON: "),
        ("a.jsonl", b"[" * 100_000, ":1: no JSON: lists or objects are nested more than 200 deep"),
        ("a.jsonl", b"[]\n", ":1: not a JSON object"),
        ("a.parquet", b"PAR?", "a.parquet: "),
        ("a.txt", b"", "a table's name must end in .csv, .jsonl, .parquet"),
        ("b.csv", None, "b.csv: No such file or directory"),
    ],
)
def test_a_table_that_cannot_be_read(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(errors.UserError, match=re.escape(message)) as caught:
        balance.draw(tmp_path / name, 1)
    assert str(caught.value).startswith(str(tmp_path / name))


def test_command_line(tmp_path, capsys):
    table, out = write_table(tmp_path / "table.csv", make_rows()), tmp_path / "subset.csv"
    arguments = [f"--attributes={table}", f"--out={out}", "--count=60"]
    balance.main(arguments)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["pool", "wanted", "drawn"]
    assert re.fullmatch(r"human, photo-realistic +\d+ +8 +9", printed[1])
    assert printed[-1] == f"{out}: 60 images, 42 photo-realistic"
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    expected = balance.draw(table, 60).rows
    assert [(r["id"], r["photorealistic"] == "true", r["category"]) for r in rows] == expected
    # A subset can be drawn from, since it is a table, too.
    assert balance.draw(out, 60).rows == expected


def test_ids_that_a_spreadsheet_would_run_stay_and_are_counted(tmp_path, capsys):
    ids = ["=1+1", "-a", "b"]
    rows = [{"id": name, "photorealistic": True, "category": "human"} for name in ids]
    table, out = write_table(tmp_path / "table.jsonl", rows), tmp_path / "subset.csv"
    balance.main([f"--attributes={table}", f"--out={out}", "--count=3"])
    assert sorted(row[0] for row in balance.draw(out, 3).rows) == sorted(ids)
    assert "2 ids look like formulas" in capsys.readouterr().err


def test_a_message_shows_columns_on_one_line(tmp_path):
    table = write_table(tmp_path / "table.csv", [{"id": "a", "x\n\x1b[31m": 1}])
    with pytest.raises(SystemExit, match=r"no column photorealistic, only id, x\\n\\x1b\[31m$"):
        balance.main([f"--attributes={table}", f"--out={tmp_path / 'o.csv'}", "--count=1"])


def test_too_few_and_nothing_is_written(tmp_path):
    table, out = write_table(tmp_path / "table.csv", make_rows()), tmp_path / "subset.csv"
    out.write_text("mine")
    with pytest.raises(SystemExit, match="401 are to be drawn, but only 400 rows have both attributes"):
        balance.main([f"--attributes={table}", f"--out={out}", "--count=401"])
    assert out.read_text() == "mine"
    with pytest.raises(SystemExit, match=r"no/subset.csv: No such file or directory. Nothing written."):
        balance.main([f"--attributes={table}", f"--out={tmp_path / 'no/subset.csv'}", "--count=4"])


def test_columns_are_those_that_attributes_writes():
    from richhf_jax.datasets import attributes

    (row,) = attributes.ask(lambda images, questions: ["yes", "human"], ["a"], [None])
    assert set(balance.COLUMNS) <= set(row)
