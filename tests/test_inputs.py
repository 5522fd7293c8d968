"""Images, folders, tables and tars as people have them, whole and broken -> records."""

import csv
import gzip
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import threading
import tracemalloc
from concurrent import futures

import pyarrow as pa
import pytest
from pyarrow import parquet

from richhf_jax import errors, inputs

FOLDER_FILES = 20_000


def write(folder, files):
    """Files by name, folders included; a string's line ends stay as they are."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def loaded(record):
    """What load() gives, or the message of its InputError, of one line."""
    try:
        return record.load()
    except inputs.InputError as error:
        message = str(error)
        assert message.splitlines() == [message]
        message.encode()
        return message


def read(*paths, prompt=None):
    """id -> what is loaded, in order. The second time, and count(), tell the same."""
    paths = [str(path) for path in paths]
    records = list(inputs.records(paths, prompt))
    found = {record.id: loaded(record) for record in records}
    assert len(found) == len(records)
    assert [record.id for record in inputs.records(paths, prompt)] == list(found)
    assert inputs.count(paths, prompt) == len(found)
    for name in found:
        name.encode()
    return found


def user_error(*paths, prompt=None):
    """The message for the user, which records() gives before the first record, and count() too."""
    paths = [str(path) for path in paths]
    with pytest.raises(errors.UserError) as caught:
        next(inputs.records(paths, prompt))
    with pytest.raises(errors.UserError) as counted:
        inputs.count(paths, prompt)
    assert str(counted.value) == str(caught.value)
    return str(caught.value)


# Images and folders.


def test_an_image_with_a_prompt(tmp_path):
    write(tmp_path, {"a.JPG": b"A", "a.txt": "beside it"})
    assert read(tmp_path / "a.JPG", prompt=" a cat\n") == {"a.JPG": (b"A", "a cat")}
    assert read(tmp_path / "a.JPG") == {"a.JPG": (b"A", "beside it")}


def test_an_image_without_a_prompt(tmp_path):
    write(tmp_path, {"a.jpg": b"A"})
    message = read(tmp_path / "a.jpg")["a.jpg"]
    assert message.startswith(f"{tmp_path}/a.txt: No such file")
    assert "--prompt" in message


@pytest.mark.parametrize(
    ("prompt", "message"), [("", "--prompt: the prompt is empty"), ("\udcff", "--prompt: the prompt isn't")]
)
def test_a_prompt_that_is_none(tmp_path, prompt, message):
    write(tmp_path, {"a.jpg": b"A"})
    assert user_error(tmp_path / "a.jpg", prompt=prompt).startswith(message)


def test_a_folder_by_path(tmp_path):
    names = [
        "B.png",
        "a-1.webp",
        "a.jpeg",
        "a/b.GIF",
        "a/c/d.bmp",
        "a0.jpg",
        "ä.jpg",
        "猫/😀 x.jpg",
        "ﬁ.jpg",
        "😀.jpg",
    ]
    others = {".hidden.jpg": b"", ".git/a.jpg": b"", "a/.b/c.jpg": b"", "README.md": b"", "x.tif": b""}
    texts = {f"{os.path.splitext(name)[0]}.txt": f"\ufeff {name}\r\n" for name in names}
    write(tmp_path, {**dict.fromkeys(reversed(names), b"I"), **others, **texts})
    assert names == sorted(names, key=str.encode)
    assert list(read(tmp_path).items()) == [(name, (b"I", name)) for name in names]


def test_the_prompt_is_for_images_without_sidecar(tmp_path):
    write(tmp_path, {"a.jpg": b"A", "b.jpg": b"B", "b.txt": "its own", "c.jpg": b"C", "c.txt": " "})
    found = read(tmp_path, prompt="a cat")
    assert found["a.jpg"] == (b"A", "a cat")
    assert found["b.jpg"] == (b"B", "its own")
    assert found["c.jpg"] == f"{tmp_path}/c.txt: the prompt is empty"


def test_what_cannot_be_read_in_a_folder(tmp_path, monkeypatch):
    write(tmp_path, {"a.jpg": b"", "a.txt": b"\xff\xfec\x00", "in/b.jpg": b"", "z.jpg": b"Z"})
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.jpg")
    scandir = os.scandir

    def denied(path):
        if path.endswith("in/"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    assert read(tmp_path, prompt="p") == {
        "a.jpg": f"{tmp_path}/a.txt: the prompt isn't UTF-8; save it as UTF-8",
        "gone.jpg": f"{tmp_path}/gone.jpg: No such file or directory",
        "in/": f"{tmp_path}/in/: Permission denied",
        "pipe.jpg": f"{tmp_path}/pipe.jpg: not a file",
        "z.jpg": (b"Z", "p"),
    }


def test_a_file_without_permission(tmp_path, monkeypatch):
    write(tmp_path, {"a.jpg": b"A"})

    def denied(path, *_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(inputs, "open", denied, raising=False)
    assert read(tmp_path / "a.jpg", prompt="p") == {"a.jpg": f"{tmp_path}/a.jpg: Permission denied"}


def test_an_image_larger_than_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "_MAX_BYTES", 3)
    write(tmp_path, {"a.jpg": b"abc", "b.jpg": b"abcd"})
    found = read(tmp_path, prompt="p")
    assert found["a.jpg"] == (b"abc", "p")
    assert found["b.jpg"] == f"{tmp_path}/b.jpg: 4 bytes; at most 3 are taken"


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path):
    write(tmp_path, {"in/a/x.jpg": b"X", "out/y.jpg": b"Y"})
    (tmp_path / "in/a/up").symlink_to(tmp_path / "in")
    (tmp_path / "in/b").symlink_to(tmp_path / "out")
    (tmp_path / "out/back").symlink_to(tmp_path / "in/a")
    assert list(read(tmp_path / "in", prompt="p")) == ["a/x.jpg", "b/back/x.jpg", "b/y.jpg"]


def test_names_that_are_not_utf8(tmp_path):
    with open(os.fsencode(tmp_path) + b"/caf\xe9.jpg", "wb") as file:
        file.write(b"C")
    assert read(tmp_path, prompt="p") == {r"caf\udce9.jpg": (b"C", "p")}
    assert read(tmp_path) == {
        r"caf\udce9.jpg": rf"{tmp_path}/caf\udce9.txt: No such file or directory (the image needs a prompt: "
        "write it into this file, or give --prompt)"
    }


def test_a_large_folder_costs_little(tmp_path):
    for number in range(FOLDER_FILES):
        (tmp_path / f"{number:07}.jpg").touch()
    tracemalloc.start()
    try:
        found = sum(1 for _ in inputs.records([str(tmp_path)], "p"))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found == FOLDER_FILES
    assert peak < 150 * FOLDER_FILES  # Bytes: names alone. A million is 150 MB at most.


def test_records_read_nothing(tmp_path, monkeypatch):
    write(tmp_path, {"a.jpg": b"A", "b.jpg": b"B"})
    (tmp_path / "t.jsonl").write_text('{"image": "a.jpg", "prompt": "p"}\n')
    monkeypatch.setattr(inputs, "_read", None)
    paths = [str(tmp_path), str(tmp_path / "t.jsonl")]
    assert [record.id for record in inputs.records(paths)] == ["a.jpg", "b.jpg", "a.jpg"]
    assert inputs.count(paths) == 3


def test_inputs_that_are_none(tmp_path):
    write(tmp_path, {"a.jpg": b"", "x.xyz": b"", "a.tar.gz": b"", "empty/readme": b"", "a.jsonl": "\n"})
    write(tmp_path, {"b.tar": gzip.compress(b"")})
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    assert user_error(tmp_path / "a.jpg", tmp_path / "b.jpg") == f"{tmp_path}/b.jpg: no such file or folder"
    assert "unknown kind of file; taken are folders and .jpg" in user_error(tmp_path / "x.xyz")
    assert "compressed; unpack it first (`gunzip`" in user_error(tmp_path / "a.tar.gz")
    assert "compressed; unpack it first (`gunzip`" in user_error(tmp_path / "b.tar")
    assert "no image in this folder" in user_error(tmp_path / "a.jpg", tmp_path / "empty")
    assert "no rows" in user_error(tmp_path / "a.jsonl")
    assert "no pairs" in user_error(tmp_path / "empty.tar")
    assert "--prompt would be ignored" in user_error(tmp_path / "a.jsonl", prompt="p")


def test_an_input_without_permission(tmp_path, monkeypatch):
    write(tmp_path, {"a.csv": ""})

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(inputs, "open", denied, raising=False)
    assert user_error(tmp_path / "a.csv") == f"{tmp_path}/a.csv: Permission denied"


def test_several_inputs_in_order(tmp_path):
    write(tmp_path, {"b.jpg": b"B", "in/a.jpg": b"A", "in/c.jpg": b"C"})
    assert list(read(tmp_path / "in", tmp_path / "b.jpg", prompt="p")) == ["a.jpg", "c.jpg", "b.jpg"]


# Tables.


def test_a_csv(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, {"t/in/ä.jpg": b"A", "b.jpg": b"B", "t/c.jpg": b"C"})
    long = "x" * 1_000_000
    rows = [
        "\ufeffprompt,more,id,image",
        '" a cat,\r\na dog\r\n",,one,in/ä.jpg',
        "",
        f"sie „schläft“,{long},,{tmp_path}/b.jpg",
        "a dog,,7,c.jpg",
    ]
    write(tmp_path, {"t/t.CSV": "\r\n".join(rows)})
    assert read("t/t.CSV") == {
        "one": (b"A", "a cat,\r\na dog"),
        f"{tmp_path}/b.jpg": (b"B", "sie „schläft“"),
        "7": (b"C", "a dog"),
    }


def test_broken_rows_of_a_csv(tmp_path):
    url = "https://x.org/a.jpg"
    rows = [
        b"image,prompt",
        b"a.jpg,p,q",
        b'"a.jpg"x,p',
        b"a.jpg",
        b",p",
        b"a.jpg,",
        b"gone.jpg,p",
        b"b.jpg,\xff",
        b"c\0.jpg,p",
        b".,p",
        f"{url},p".encode(),
        b"a b.jpg,p",
        b'd.jpg,"never closed',
        b"",
    ]
    write(tmp_path, {"t.csv": b"\n".join(rows), "a.jpg": b"A", "a b.jpg": b"AB"})
    table, fix = f"{tmp_path}/t.csv", "(paths are relative to the table's folder; URLs aren't fetched)"
    assert read(tmp_path / "t.csv") == {
        "t.csv:2": f"{table}, line 2: 3 fields, but the header has 2 (quote those with commas)",
        "t.csv:3": f"{table}, line 3: ',' expected after '\"'",
        "t.csv:4": f"{table}, line 4: 1 fields, but the header has 2 (quote those with commas)",
        "t.csv:5": f"{table}, line 5: `image` is empty",
        "a.jpg": f"{table}, line 6: the prompt is empty",
        "gone.jpg": f"{table}, line 7: {tmp_path}/gone.jpg: No such file or directory {fix}",
        "b.jpg": f"{table}, line 8: the prompt isn't UTF-8; save it as UTF-8",
        "c\0.jpg": f"{table}, line 9: {tmp_path}/c\0.jpg: embedded null byte {fix}",
        ".": f"{table}, line 10: {tmp_path}/.: not a file {fix}",
        url: f"{table}, line 11: {tmp_path}/{url}: No such file or directory {fix}",
        "a b.jpg": (b"AB", "p"),
        "t.csv:13": f"{table}, line 13: unexpected end of data",
    }


def test_a_quote_that_is_never_closed_costs_no_more_than_its_row(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "_MAX_FIELD", 200_000)
    before = csv.field_size_limit(1000)
    rows = "a.jpg,p\n" * 50_000
    write(tmp_path, {"t.csv": f'image,prompt\na.jpg,"p\n{rows}'})
    try:
        found = [record.id for record in inputs.records([str(tmp_path / "t.csv")])]
    finally:
        csv.field_size_limit(before)
    assert found[0] == "t.csv:2"
    assert 24_000 < len(found) < 26_000
    assert set(found[1:]) == {"a.jpg"}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("image;prompt", "column `image`: .*separated by commas.*; the columns are 'image;prompt'$"),
        ("image,text", "column `prompt`: .*'image', 'text'$"),
        ("image,prompt,prompt", "column `prompt`: .*each once"),
        ("", "column `image`"),
        ('"image', "broken header"),
        ("image,prompt", "no rows"),
        ("image,prompt".encode("utf-16"), "UTF-8"),
    ],
)
def test_a_csv_without_its_columns(tmp_path, header, message):
    write(tmp_path, {"t.csv": header, "a.jpg": b""})
    with pytest.raises(errors.UserError, match=message):
        raise errors.UserError(user_error(tmp_path / "t.csv"))


def test_a_jsonl(tmp_path):
    rows = [
        {"image": "in/ä.jpg", "prompt": "eine Katze\u2028schläft "},
        {"image": str(tmp_path / "b.jpg"), "prompt": "p", "id": 7, "more": [1]},
        {"image": "b.jpg", "prompt": "q", "id": None},
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    write(tmp_path, {"t.jsonl": "\ufeff" + "\r\n \n".join(lines), "in/ä.jpg": b"A", "b.jpg": b"B"})
    assert read(tmp_path / "t.jsonl") == {
        "in/ä.jpg": (b"A", "eine Katze\u2028schläft"),
        "7": (b"B", "p"),
        "b.jpg": (b"B", "q"),
    }


def test_broken_rows_of_a_jsonl(tmp_path):
    lines = [
        b'{"image": "a.jpg", "prompt": "p"',
        b"",
        b'["image", "prompt"]',
        b'{"image": "a.jpg", "text": "p"}',
        b'{"image": null, "prompt": "p"}',
        b'{"image": {"path": "a.jpg"}, "prompt": "p"}',
        b'{"image": "a.jpg", "prompt": ["p"]}',
        b'{"image": "a.jpg", "prompt": "p", "id": true}',
        b'{"image": "a.jpg", "prompt": "\xff"}',
        b"[" * 100_000,
        b'{"image": "b\\ud800.jpg", "prompt": "p"}',
        b'{"image": "c.jpg", "prompt": "\\ud800"}',
        b'{"image": "d\\n.jpg", "prompt": "p"}',
    ]
    write(tmp_path, {"t.jsonl": b"\n".join(lines)})
    table, fix = f"{tmp_path}/t.jsonl", "(paths are relative to the table's folder; URLs aren't fetched)"
    found = read(tmp_path / "t.jsonl")
    assert "surrogates not allowed" in found.pop(r"b\ud800.jpg")
    assert found.pop("t.jsonl:9").startswith(f"{table}, line 9: no JSON: 'utf-8' codec can't decode")
    assert found.pop("t.jsonl:10").startswith(f"{table}, line 10: no JSON: maximum recursion")
    assert found == {
        "t.jsonl:1": f"{table}, line 1: no JSON: Expecting ',' delimiter",
        "t.jsonl:3": f"{table}, line 3: not a JSON object",
        "t.jsonl:4": f"{table}, line 4: no `prompt`; there are 'image', 'text'",
        "t.jsonl:5": f"{table}, line 5: `image` is empty",
        "t.jsonl:6": f"{table}, line 6: `image` is a dict, not a string",
        "t.jsonl:7": f"{table}, line 7: `prompt` is a list, not a string",
        "t.jsonl:8": f"{table}, line 8: `id` is a bool, not a string or whole number",
        "c.jpg": f"{table}, line 12: the prompt isn't UTF-8; save it as UTF-8",
        "d\n.jpg": f"{table}, line 13: {tmp_path}/d .jpg: No such file or directory {fix}",
    }


# Parquet.

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
STRINGS = [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
BYTES = [pa.binary(), pa.large_binary(), pa.binary(2)]


def write_parquet(path, row_group_size=None, **columns):
    parquet.write_table(pa.table(columns), path, row_group_size=row_group_size)


def numbered(path, rows, row_group_size, size=4):
    """A table whose row 7 has the prompt 'p7' and the image b'0007...' of `size` bytes."""
    images = [f"{row:04}".encode().ljust(size, b"x") for row in range(rows)]
    write_parquet(path, row_group_size, image=images, prompt=[f"p{row}" for row in range(rows)])
    return images


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
        "t.parquet:1": f"{tmp_path}/t.parquet, row 1: no image; needed is a path, bytes, or a struct of "
        "`bytes` and `path`",
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
    assert all(": no image; needed is a path" in found.pop(f"t.parquet:{row}") for row in (3, 4))
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
        "t.parquet:0": f"{tmp_path}/t.parquet, row 0: `image` is a list, not a string",
        "t.parquet:1": f"{tmp_path}/t.parquet, row 1: `image` is a list, not a string",
        "u.parquet:0": f"{tmp_path}/u.parquet, row 0: `prompt` is a bytes, not a string",
    }


def test_parquet_text_that_is_not_utf8(tmp_path):
    prompts = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    write_parquet(tmp_path / "t.parquet", image=[b"A", b"B", b"C"], prompt=prompts)
    found = read(tmp_path / "t.parquet")
    assert "row 1: 'utf-8' codec can't decode" in found.pop("t.parquet:1")
    assert found == {"t.parquet:0": (b"A", "a"), "t.parquet:2": (b"C", "c")}


def test_parquet_rows_in_any_order(tmp_path):
    images = numbered(tmp_path / "t.parquet", rows=300, row_group_size=130)
    records = list(inputs.records([str(tmp_path / "t.parquet")]))
    order = list(range(300))
    random.Random(0).shuffle(order)
    for row in [*order, *reversed(range(300)), 299, 0, 129, 130]:
        assert records[row].load() == (images[row], f"p{row}")


@pytest.fixture
def reads(monkeypatch):
    """What is read of parquet files: (columns, row group, rows)."""
    found = []
    batches = inputs._batches

    def counted(file, rows, group, columns):
        for batch in batches(file, rows, group, columns):
            found.append((columns, group, len(batch)))
            yield batch

    monkeypatch.setattr(inputs, "_batches", counted)
    return found


def test_parquet_images_are_read_once_and_forwards(tmp_path, reads):
    images = numbered(tmp_path / "t.parquet", rows=300, row_group_size=100)
    records = list(inputs.records([str(tmp_path / "t.parquet")]))
    assert sum(rows for columns, _, rows in reads if "image" in columns) == 0
    near = [row ^ 7 for row in range(200, 296)]  # As threads may come: up to seven rows out of order.
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
        patch.setattr(inputs.threading, "Lock", UnfairLock)
        records = list(inputs.records([str(tmp_path / "t.parquet")]))
    with futures.ThreadPoolExecutor(1) as threads:
        late = threads.submit(records[3].load)
        assert arrived.wait(60)
        assert [record.load()[0] for record in records[4:]] == images[4:]
        go_on.set()
        assert late.result() == (images[3], "p3")
    assert [columns for columns, _, _ in reads].count(["image"]) == 10
    assert len(records[0].load.func.__self__._kept) <= inputs._KEPT_BATCHES + 2


def test_parquet_counts_by_its_footer_alone(tmp_path, monkeypatch):
    numbered(tmp_path / "t.parquet", rows=300, row_group_size=100)
    monkeypatch.setattr(inputs, "_batches", None)
    assert inputs.count([str(tmp_path / "t.parquet")]) == 300


def test_a_broken_row_group_loses_no_other(tmp_path):
    path = tmp_path / "t.parquet"
    images = numbered(path, rows=300, row_group_size=100, size=100)
    group = parquet.ParquetFile(path).metadata.row_group(1)
    data = bytearray(path.read_bytes())
    for column in range(2):  # The pages' headers.
        start = group.column(column).dictionary_page_offset
        data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)
    found = read(path)
    lost = [found.pop(f"t.parquet:{row}") for row in range(100, 200)]
    assert lost[0].startswith(f"{path}, row 100: row group 1 is broken: ")
    assert lost[99].startswith(f"{path}, row 199: row group 1 is broken: ")
    kept = [*range(100), *range(200, 300)]
    assert found == {f"t.parquet:{row}": (images[row], f"p{row}") for row in kept}


def test_broken_images_of_a_row_group(tmp_path):
    path = tmp_path / "t.parquet"
    images = numbered(path, rows=30, row_group_size=10, size=100)
    start = parquet.ParquetFile(path).metadata.row_group(1).column(0).dictionary_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)
    found = read(path)
    assert [found.pop(f"t.parquet:{row}") for row in range(10, 20)] == [
        f"{path}, row {row}: row group 1 is broken from row 10 on" for row in range(10, 20)
    ]
    assert found == {f"t.parquet:{row}": (images[row], f"p{row}") for row in [*range(10), *range(20, 30)]}


def test_without_pyarrow_only_parquet_is_missing(tmp_path):
    write_parquet(tmp_path / "t.parquet", image=["a.jpg"], prompt=["p"])
    write(tmp_path, {"a.jpg": b"A"})
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from richhf_jax import errors, inputs\n"
        "assert not {'tensorflow', 'jax', 'numpy', 'gin'} & set(sys.modules)\n"
        "assert next(inputs.records(['a.jpg'], 'p')).load() == (b'A', 'p')\n"
        "for call in (inputs.count, lambda paths: next(inputs.records(paths))):\n"
        "    try: call(['t.parquet'])\n"
        "    except errors.UserError as error: assert 'pip install pyarrow' in str(error)\n"
        "    else: raise AssertionError\n"
    )
    root = os.path.dirname(os.path.dirname(inputs.__file__))
    environment = {**os.environ, "PYTHONPATH": root}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)


# Tars.


def write_tar(path, members, **options):
    """Members by name, in this order; the same name may come again."""
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


PAIRS = [
    ("./a.jpg", b"A"),
    ("./a.txt", b" a cat\n"),
    ("in.1/b.TXT", b"\xef\xbb\xbfb"),
    ("in.1/b.PNG", b"B"),
    (f"{'long' * 50}/猫.webp", b"C"),
    (f"{'long' * 50}/猫.txt", "猫".encode()),
]
LOADED = {"a": (b"A", "a cat"), "in.1/b": (b"B", "b"), f"{'long' * 50}/猫": (b"C", "猫")}


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_tar(tmp_path, form):
    others = [("a.json", b"{}"), ("._a.jpg", b""), (".jpg", b""), (".b/._c.txt", b"")]
    write_tar(tmp_path / "t.tar", [*PAIRS[:1], *others, *PAIRS[1:]], format=form)
    with tarfile.open(tmp_path / "t.tar", "a") as tar:
        folder = tarfile.TarInfo("folder.jpg")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    assert list(read(tmp_path / "t.tar").items()) == list(LOADED.items())


def test_pairs_of_a_tar_need_not_be_adjacent(tmp_path):
    shuffled = [PAIRS[index] for index in (5, 0, 2, 1, 3, 4)]
    write_tar(tmp_path / "t.tar", shuffled)
    found = read(tmp_path / "t.tar")
    assert found == LOADED
    assert list(found)[:2] == ["a", "in.1/b"]  # As their second halves come.


def test_halves_in_a_tar(tmp_path):
    members = [
        ("a.jpg", b"A"),
        ("b.txt", b"b"),
        ("c.jpg", b"C"),
        ("c.txt", b" "),
        ("d.jpg", b"D"),
        ("d.txt", b"\xff"),
        ("e.jpg", b"E"),
        ("e.txt", b"e"),
    ]
    write_tar(tmp_path / "t.tar", members)
    tar = f"{tmp_path}/t.tar"
    assert list(read(tar).items()) == [
        ("c", f"{tar}, c.txt: the prompt is empty"),
        ("d", f"{tar}, d.txt: the prompt isn't UTF-8; save it as UTF-8"),
        ("e", (b"E", "e")),
        ("a", f"{tar}, a: a.jpg has no .txt with its prompt beside it in the tar"),
        ("b", f"{tar}, b: b.txt has no image beside it in the tar"),
    ]


def test_a_key_that_comes_twice_in_a_tar(tmp_path):
    write_tar(tmp_path / "t.tar", [("a.jpg", b"A"), ("a.png", b"P"), ("a.txt", b"a")])
    records = list(inputs.records([str(tmp_path / "t.tar")]))
    assert [(record.id, loaded(record)) for record in records] == [
        ("a", f"{tmp_path}/t.tar, a: both .jpg and .png are there"),
        ("a", (b"A", "a")),
    ]


BLOCK = tarfile.BLOCKSIZE
TWO_PAIRS = [("a.jpg", b"A"), ("a.txt", b"a"), ("b.txt", b"b"), ("b.jpg", b"B" * 600)]
BEFORE_END = 9 * BLOCK  # Four headers, five blocks of content.


def garbled(data, offset):
    return (
        data[:offset] + bytes(byte ^ 0xFF for byte in data[offset : offset + BLOCK]) + data[offset + BLOCK :]
    )


def negative_size(data):
    """The third header says -1024 (base 256), with the right checksum: reading on from there goes round."""
    header = bytearray(data[4 * BLOCK : 5 * BLOCK])
    header[124:136] = (-1024).to_bytes(12, "big", signed=True)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[: 4 * BLOCK] + bytes(header) + data[5 * BLOCK :]


@pytest.mark.parametrize(
    ("damage", "whole", "reason"),
    [
        (lambda data: data[: 2 * BLOCK], [], "no mark"),
        (lambda data: data[: 4 * BLOCK], ["a"], "no mark"),
        (lambda data: data[: 4 * BLOCK + 100], ["a"], "no mark"),
        (lambda data: data[: 8 * BLOCK], ["a"], "unexpected end of data"),
        (lambda data: data[:BEFORE_END], ["a", "b"], "no mark"),
        (lambda data: garbled(data, 0), [], "bad checksum|invalid header"),
        (lambda data: garbled(data, 4 * BLOCK), ["a"], "no mark"),
        (lambda data: data + data, ["a", "b"], "something follows"),
        (lambda data: b"", [], "empty file"),
        (lambda data: b"<html>not found</html>", [], "truncated header"),
        (negative_size, ["a"], "garbled header"),
    ],
)
def test_a_broken_tar_gives_what_is_readable(tmp_path, damage, whole, reason):
    path = tmp_path / "t.tar"
    write_tar(path, TWO_PAIRS)
    path.write_bytes(damage(path.read_bytes()))
    found = read(path)
    *_, (last, message) = found.items()
    assert last == "t.tar:end"
    assert message.startswith(f"{path}: cut off or broken behind the last member found, the rest is lost: ")
    assert any(part in message for part in reason.split("|")), message
    assert [name for name, value in found.items() if isinstance(value, tuple)] == whole


def test_a_tar_that_is_cut_off_in_an_image(tmp_path):
    path = tmp_path / "t.tar"
    write_tar(path, TWO_PAIRS)
    path.write_bytes(path.read_bytes()[: 8 * BLOCK])
    assert read(path)["b"] == f"{path}, b: cut off, 512 of 600 bytes are there"


def test_a_tar_holds_no_more_than_the_halves(tmp_path):
    path = tmp_path / "t.tar"
    numbers = range(5_000)
    write_tar(
        path, [(f"{n:05}.{end}", b"x") for n in numbers for end in ("jpg", "txt")], format=tarfile.GNU_FORMAT
    )
    tracemalloc.start()
    try:
        assert sum(1 for _ in inputs.records([str(path)])) == len(numbers)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_500_000  # Bytes: the block that is read last. tarfile's own list takes 10 MB.


# Threads.


def test_records_load_in_many_threads(tmp_path):
    images = numbered(tmp_path / "t.parquet", rows=400, row_group_size=90, size=5_000)
    members = [(f"{n}.{end}", f"{n} {end}".encode()) for n in range(400) for end in ("jpg", "txt")]
    write_tar(tmp_path / "t.tar", members)
    expected = [(image, f"p{row}") for row, image in enumerate(images)]
    expected += [(f"{n} jpg".encode(), f"{n} txt") for n in range(400)]
    records = list(inputs.records([str(tmp_path / "t.parquet"), str(tmp_path / "t.tar")]))
    with futures.ThreadPoolExecutor(16) as threads:
        assert list(threads.map(lambda record: record.load(), records)) == expected
