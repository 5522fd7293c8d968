"""Tests reading of parquet tables as people have them, whole and broken."""

import os
import pathlib
import random
import subprocess
import sys
import threading
from concurrent import futures

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from richhf_jax import inputs
from richhf_jax.inputs import parquet, row_groups
from tests.inputs.reading import numbered, read, user_error, write, write_parquet

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
STRINGS = [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
BYTES = [pa.binary(), pa.large_binary(), pa.binary(2)]


@pytest.mark.parametrize(
    ("kind", "exact"), [(pa.float16(), 2**11), (pa.float32(), 2**24), (pa.float64(), 2**53)]
)
def test_ids_of_floats_are_whole_numbers_where_their_type_is_exact(tmp_path, kind, exact):
    ids = np.array([exact - 1, exact, -0.0], kind.to_pandas_dtype())
    write(tmp_path, {"a.jpg": b"A"})
    write_parquet(tmp_path / "t.parquet", image=["a.jpg"] * 3, prompt=["p"] * 3, id=pa.array(ids, kind))
    found = read(tmp_path / "t.parquet")
    assert list(found) == [str(exact - 1), "t.parquet:1", "0"]
    assert (
        f"`id` is a float, not a string or whole number, and {exact}.0 may be rounded" in found["t.parquet:1"]
    )


@pytest.mark.parametrize("kind", STRINGS, ids=str)
def test_a_parquet_of_paths(tmp_path, kind):
    write(tmp_path, {"in/ä.jpg": b"A", "b.jpg": b"B"})
    images = pa.array(["in/ä.jpg", "b.jpg", None, "b.jpg", "gone.jpg"], kind)
    prompts = pa.array([" a", "b", "c", None, "d"], kind)
    write_parquet(tmp_path / "t.parquet", image=images, prompt=prompts, id=[None, 5, 6, 7, 8], more=[0] * 5)
    table = f"{tmp_path}/t.parquet"
    found = read(table)
    assert found.pop("8").startswith(f"{table}, row 4: {tmp_path}/gone.jpg: No such file")
    assert found == {
        "in/ä.jpg": (b"A", "a"),
        "5": (b"B", "b"),
        "t.parquet:2": f"{table}, row 2: `image` is empty",
        "t.parquet:3": f"{table}, row 3: `prompt` is empty",
    }


@pytest.mark.parametrize("kind", BYTES, ids=str)
def test_a_parquet_of_bytes(tmp_path, kind):
    write_parquet(tmp_path / "t.parquet", image=pa.array([b"AA", None], kind), prompt=["a", "b"])
    assert read(tmp_path / "t.parquet") == {
        "t.parquet:0": (b"AA", "a"),
        "t.parquet:1": f"{tmp_path}/t.parquet, row 1: no image; `image` must be a path, bytes, or a struct "
        "of `bytes` and `path`",
    }


def test_a_parquet_of_hugging_face(tmp_path):
    write(tmp_path, {"b.jpg": b"B"})
    images = [
        {"bytes": b"A", "path": "a.jpg"},
        {"bytes": None, "path": "b.jpg"},
        {"bytes": b"C", "path": None},
        None,
        {"bytes": None, "path": None},
    ]
    write_parquet(tmp_path / "t.parquet", image=pa.array(images, STRUCT), prompt=["a", "b", "c", "d", "e"])
    found = read(tmp_path / "t.parquet")
    assert all(": no image; `image` must be a path" in found.pop(f"t.parquet:{row}") for row in (3, 4))
    assert found == {"a.jpg": (b"A", "a"), "b.jpg": (b"B", "b"), "t.parquet:2": (b"C", "c")}


def test_a_parquet_of_half_a_struct(tmp_path):
    write(tmp_path, {"b.jpg": b"B"})
    for field, value in [("bytes", b"A"), ("path", "b.jpg")]:
        images = pa.array([{field: value}], pa.struct([STRUCT.field(field)]))
        write_parquet(tmp_path / f"{field}.parquet", image=images, prompt=["a"])
    assert read(tmp_path / "bytes.parquet", tmp_path / "path.parquet") == {
        "bytes.parquet:0": (b"A", "a"),
        "b.jpg": (b"B", "a"),
    }


def test_a_parquet_without_its_columns(tmp_path):
    write_parquet(tmp_path / "t.parquet", image=["a.jpg"], caption=["a"])
    write_parquet(tmp_path / "u.parquet", image=pa.array([], pa.string()), prompt=pa.array([], pa.string()))
    write(tmp_path, {"v.parquet": b"PAR1"})
    assert user_error(tmp_path / "t.parquet").endswith("the columns are 'image', 'caption'")
    assert user_error(tmp_path / "u.parquet") == f"{tmp_path}/u.parquet: no rows"
    assert "no parquet file, or cut off" in user_error(tmp_path / "v.parquet")


def test_parquet_values_of_other_types(tmp_path):
    write_parquet(tmp_path / "t.parquet", image=[[1], [2]], prompt=["a", "b"])
    write_parquet(tmp_path / "u.parquet", image=["a.jpg"], prompt=[b"p"])
    assert read(tmp_path / "t.parquet", tmp_path / "u.parquet") == {
        "t.parquet:0": f"{tmp_path}/t.parquet, row 0: `image` is of type list, not a string",
        "t.parquet:1": f"{tmp_path}/t.parquet, row 1: `image` is of type list, not a string",
        "u.parquet:0": f"{tmp_path}/u.parquet, row 0: `prompt` is of type bytes, not a string",
    }


def test_parquet_text_that_is_not_utf8(tmp_path):
    prompts = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    write_parquet(tmp_path / "t.parquet", image=[b"A", b"B", b"C"], prompt=prompts)
    found = read(tmp_path / "t.parquet")
    assert "row 1: 'utf-8' codec can't decode" in found.pop("t.parquet:1")
    assert found == {"t.parquet:0": (b"A", "a"), "t.parquet:2": (b"C", "c")}


def test_parquet_rows_in_any_order(tmp_path):
    images = numbered(tmp_path / "t.parquet", rows=300, row_group_size=130)
    records = list(inputs.Inputs([str(tmp_path / "t.parquet")]))
    order = list(range(300))
    random.Random(0).shuffle(order)
    for row in [*order, *reversed(range(300)), 299, 0, 129, 130]:
        assert records[row].load() == (images[row], f"p{row}")


@pytest.fixture
def reads(monkeypatch):
    """Records what is read of parquet files: (columns, row group, rows)."""
    found = []
    batches = row_groups.Table.batches

    def counted(table, group, columns, most):
        for batch in batches(table, group, columns, most):
            found.append((columns, group, len(batch)))
            yield batch

    monkeypatch.setattr(row_groups.Table, "batches", counted)
    return found


def test_parquet_images_are_read_once_and_forwards(tmp_path, reads):
    images = numbered(tmp_path / "t.parquet", rows=300, row_group_size=100)
    records = list(inputs.Inputs([str(tmp_path / "t.parquet")]))
    assert sum(rows for columns, _, rows in reads if "image" in columns) == 0
    near = [row ^ 7 for row in range(200, 296)]  # Threads may ask for up to seven rows out of order.
    assert [records[row].load()[0] for row in near] == [images[row] for row in near]
    read_images = [(group, rows) for columns, group, rows in reads if columns == ["image"]]
    assert read_images == [(2, 16)] * 6


def test_a_thread_that_is_kept_waiting_costs_no_second_read(tmp_path, reads, monkeypatch):
    images = numbered(tmp_path / "t.parquet", rows=160, row_group_size=160)
    arrived, go_on = threading.Event(), threading.Event()

    class UnfairLock:
        def __enter__(self):
            if threading.current_thread() is not threading.main_thread():
                arrived.set()
                assert go_on.wait(60)

        def __exit__(self, *_):
            pass

    with monkeypatch.context() as patch:
        patch.setattr(parquet.threading, "Lock", UnfairLock)
        records = list(inputs.Inputs([str(tmp_path / "t.parquet")]))
    with futures.ThreadPoolExecutor(1) as threads:
        late = threads.submit(records[3].load)
        assert arrived.wait(60)
        assert [record.load()[0] for record in records[4:]] == images[4:]
        go_on.set()
        assert late.result() == (images[3], "p3")
    assert [columns for columns, _, _ in reads].count(["image"]) == 10
    assert len(records[0].load.func.__self__._kept) <= 4 + 2


def test_parquet_counts_without_reading_images_or_making_records(tmp_path, reads, monkeypatch):
    numbered(tmp_path / "t.parquet", rows=300, row_group_size=100)
    monkeypatch.setattr(row_groups, "_rows", None)
    assert len(inputs.Inputs([str(tmp_path / "t.parquet")])) == 300
    assert {tuple(columns) for columns, _, _ in reads} == {("prompt", "id", "image.path")}


def test_a_broken_row_group_loses_no_other(tmp_path):
    path = tmp_path / "t.parquet"
    images = numbered(path, rows=300, row_group_size=100, size=100)
    group = pq.ParquetFile(path).metadata.row_group(1)
    data = bytearray(path.read_bytes())
    for column in range(2):  # The pages' headers become garbage.
        start = group.column(column).dictionary_page_offset
        data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)
    found = read(path)
    lost = found.pop("t.parquet:100-199")
    assert lost.startswith(f"{path}, rows 100 to 199: row group 1 is broken, 100 rows are lost: ")
    kept = [*range(100), *range(200, 300)]
    assert found == {f"t.parquet:{row}": (images[row], f"p{row}") for row in kept}


def test_broken_images_of_a_row_group(tmp_path):
    path = tmp_path / "t.parquet"
    images = numbered(path, rows=30, row_group_size=10, size=100)
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).dictionary_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)
    found = read(path)
    reasons = [found.pop(f"t.parquet:{row}").partition(": ")[::2] for row in range(10, 20)]
    assert [place for place, _ in reasons] == [f"{path}, row {row}" for row in range(10, 20)]
    (reason,) = {reason for _, reason in reasons}
    assert reason.startswith("row group 1 is broken from row 10 on: Couldn't deserialize")
    assert found == {f"t.parquet:{row}": (images[row], f"p{row}") for row in [*range(10), *range(20, 30)]}


def test_without_pyarrow_only_parquet_is_missing(tmp_path):
    write_parquet(tmp_path / "t.parquet", image=["a.jpg"], prompt=["p"])
    write(tmp_path, {"a.jpg": b"A"})
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from richhf_jax import errors, inputs\n"
        "assert not {'tensorflow', 'jax', 'numpy', 'gin'} & set(sys.modules)\n"
        "assert next(iter(inputs.Inputs(['a.jpg'], 'p'))).load() == (b'A', 'p')\n"
        "try: inputs.Inputs(['t.parquet'])\n"
        "except errors.UserError as error: assert 'pip install pyarrow' in str(error)\n"
        "else: raise AssertionError\n"
    )
    root = pathlib.Path(inputs.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
