"""Tests the reader of parquet files: footers that lie, bombs, bad text, and thousands of damaged files."""

import io
import os
import re
import resource
import struct

import hypothesis
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies

from richhf_jax import errors, inputs
from richhf_jax.inputs import row_groups
from tests.inputs.mutation import mutants
from tests.inputs.reading import loaded, read, user_error


def parquet_of(row_group_size=None, schema=None, columns=None, **options):
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns, schema), buffer, row_group_size=row_group_size, **options)
    return buffer.getvalue()


def rows_of(data, columns=("image", "prompt"), most=16):
    """Reads all rows; asserts that they are the file's, in order, and that their number is told before."""
    table = row_groups.Table(io.BytesIO(data))
    rows = list(table.rows(columns, most))
    assert table.count(columns, most) == len(rows)
    end = 0
    for row in rows:
        assert row.number == end
        assert bool(row.fields) != bool(row.problem)
        end += max(row.lost, 1)
    assert end == table.starts[-1]
    return rows


SIX = {"image": [b"J%d" % n for n in range(6)], "prompt": [f"cat {n}" for n in range(6)]}


def varint(value):
    """A whole number as Thrift's compact protocol writes it."""
    value, found = abs(value) * 2 - (value < 0), b""
    while value > 127:
        found, value = found + bytes([value & 127 | 128]), value >> 7
    return found + bytes([value])


def claiming(data, rows, claimed):
    """Returns the file with a footer in which every number of rows and values is another one."""
    (length,) = struct.unpack("<I", data[-8:-4])
    footer = data[-8 - length : -8].replace(b"\x16" + varint(rows), b"\x16" + varint(claimed))
    return data[: -8 - length] + footer + struct.pack("<I", len(footer)) + b"PAR1"


SEVENTY_SEVEN = parquet_of(
    columns={"image": ["x.png"] * 77, "prompt": ["a cat"] * 77},
    write_statistics=False,
    store_schema=False,
    compression="none",
)


def test_a_footer_that_claims_more_rows_than_a_file_can_hold(tmp_path):
    path = tmp_path / "t.parquet"
    path.write_bytes(claiming(SEVENTY_SEVEN, 77, 10**12))
    assert pq.ParquetFile(path).metadata.num_rows == 10**12
    problem = "row group 0 is broken, 1000000000000 rows are lost: it claims 1000000000000 rows, more than"
    ((name, reason),) = read(path).items()
    assert name == "t.parquet:0-999999999999"
    assert reason.startswith(f"{path}, rows 0 to 999999999999: {problem}")


def test_a_footer_that_claims_more_rows_than_are_there(tmp_path):
    path = tmp_path / "t.parquet"
    path.write_bytes(claiming(SEVENTY_SEVEN, 77, 1_000))
    *good, last = rows_of(path.read_bytes())
    assert len(good) <= 77
    assert last.lost == 1_000 - len(good)
    given = inputs.Inputs([str(path)])
    assert len(given) == len(list(given)) == len(good) + 1


def test_a_footer_that_claims_fewer_than_no_rows():
    with pytest.raises(row_groups.ParquetError, match="a row group claims fewer than 0 rows"):
        row_groups.Table(io.BytesIO(claiming(SEVENTY_SEVEN, 77, -1)))


def test_an_encrypted_file_is_refused(tmp_path):
    (tmp_path / "t.parquet").write_bytes(SEVENTY_SEVEN[:-4] + b"PARE")
    assert "no parquet file, or cut off" in user_error(tmp_path / "t.parquet")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "t.parquet")
    with pytest.raises(row_groups.ParquetError, match="not a file"):
        row_groups.Table(str(tmp_path / "t.parquet"))


def groups_of(*images, **options):
    """Writes a row group for each list of images; all have the prompt 'a cat'."""
    schema = pa.schema({"image": pa.binary(), "prompt": pa.string()})
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, schema, compression="zstd", write_statistics=False, **options) as writer:
        for group in images:
            writer.write_table(pa.table({"image": group, "prompt": ["a cat"] * len(group)}, schema))
    return buffer.getvalue()


def test_a_column_that_unpacks_to_gigabytes_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(row_groups, "_MAX_UNPACKED", 10 << 20)
    monkeypatch.setattr(row_groups, "_BATCH_BYTES", 1 << 20)
    path = tmp_path / "t.parquet"
    path.write_bytes(groups_of([b"A"], [bytes(8 << 20)] * 2, [b"B"], use_dictionary=False))
    most = pa.default_memory_pool().bytes_allocated() + (1 << 20)
    found = read(path)
    assert pa.default_memory_pool().bytes_allocated() < most
    assert found.pop("t.parquet:0") == (b"A", "a cat")
    assert found.pop("t.parquet:3") == (b"B", "a cat")
    reason = r"row group 1 is broken from row 1 on: 167\d{5} bytes of `image` are packed into \d{3,4}, which"
    assert list(found) == ["t.parquet:1", "t.parquet:2"]
    assert all(re.search(reason, value) for value in found.values())


@pytest.mark.parametrize("use_dictionary", [True, False])
def test_large_cells_come_in_small_batches(use_dictionary, monkeypatch):
    monkeypatch.setattr(row_groups, "_BATCH_BYTES", 5 << 20)
    images = [b"%d" % (n % 2) * (1 << 20) for n in range(16)]
    table = row_groups.Table(io.BytesIO(groups_of(images, use_dictionary=use_dictionary)))
    batches = list(table.batches(0, ["image"], 16))
    # A dictionary of two megabytes: each row may have all of it.
    assert max(len(batch) for batch in batches) == (2 if use_dictionary else 4)
    assert [image.as_py() for batch in batches for image in batch.column(0)] == images


def test_a_footer_whose_levels_differ_does_not_end_the_process(monkeypatch):
    """pyarrow calls `terminate` when it is asked for the sizes of such a column."""
    monkeypatch.setattr(row_groups, "_BATCH_BYTES", 1)
    images = [{"bytes": b"J"}, None]
    data = parquet_of(columns={"image": images, "prompt": ["a cat"] * 2}, store_schema=False)
    optional, required = b"\x35\x02\x18\x05image", b"\x35\x00\x18\x05image"
    assert data.count(optional) == 1
    (row,) = rows_of(data.replace(optional, required), ["image.bytes"])
    assert row.lost == 2
    assert "histogram" in row.problem


VALUES = strategies.fixed_dictionaries(
    {
        "image": strategies.sampled_from([b"A", b"BB", b"", None]),
        "prompt": strategies.sampled_from([b"a", "ä".encode(), b"\xff", b" ", None]),
        "id": strategies.sampled_from([b"1", b"\xfe", b"", None]),
    }
)


@hypothesis.given(
    rows=strategies.lists(VALUES, min_size=1, max_size=12),
    row_group_size=strategies.integers(1, 13),
    compression=strategies.sampled_from(["none", "zstd"]),
    use_dictionary=strategies.booleans(),
    version=strategies.sampled_from(["1.0", "2.0"]),
)
@hypothesis.settings(max_examples=100)
def test_every_row_is_loaded_or_named(
    tmp_path_factory, rows, row_group_size, compression, use_dictionary, version
):
    columns = {name: pa.array([row[name] for row in rows], pa.binary()) for name in VALUES_NAMES}
    columns = {
        name: column if name == "image" else column.view(pa.string()) for name, column in columns.items()
    }
    path = tmp_path_factory.getbasetemp() / "t.parquet"
    options = {"compression": compression, "use_dictionary": use_dictionary, "data_page_version": version}
    path.write_bytes(parquet_of(row_group_size, columns=columns, **options))
    given = inputs.Inputs([str(path)])
    records = list(given)
    assert len(given) == len(records) == len(rows)
    for number, (record, row) in enumerate(zip(records, rows, strict=True)):
        good = row["image"] is not None and row["prompt"] in (b"a", "ä".encode()) and row["id"] != b"\xfe"
        if good:
            assert loaded(record) == (row["image"], row["prompt"].decode())
            assert record.id == ("1" if row["id"] == b"1" else f"t.parquet:{number}")
        else:
            assert loaded(record).startswith(f"{path}, row {number}: ")


VALUES_NAMES = ("image", "prompt", "id")


def test_thousands_of_damaged_files_take_little_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    whole = [
        parquet_of(4, columns=SIX, store_schema=False, write_page_checksum=True),
        parquet_of(4, columns=SIX, use_dictionary=False, compression="none", write_page_checksum=True),
        parquet_of(columns=SIX, data_page_version="2.0", compression="zstd", write_page_checksum=True),
    ]
    good = lost = refused = 0
    for data in mutants(whole, 9_000):
        try:
            rows = rows_of(data)
        except row_groups.ParquetError:
            refused += 1
            continue
        for row in rows:
            good += bool(row.fields)
            lost += row.lost
            image, prompt = (str(row.fields.get(name)) for name in ("image", "prompt"))
            both = {image[3:-1], prompt[4:]}
            assert len(both) == 1 or not both <= set("012345")  # No image has the prompt of another one.
    assert min(good, lost, refused) > 3_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


def test_thousands_of_damaged_files_are_scored_or_listed(tmp_path):
    whole = parquet_of(4, columns=SIX, write_page_checksum=True)
    path = tmp_path / "t.parquet"
    scored = failed = 0
    for data in mutants([whole], 1_000):
        path.write_bytes(data)
        try:
            given = inputs.Inputs([str(path)])
        except errors.UserError:
            continue
        results = [loaded(record) for record in given]
        assert len(results) == len(given)
        scored += sum(isinstance(result, tuple) for result in results)
        failed += sum(isinstance(result, str) for result in results)
    assert scored > 300
    assert failed > 100
