"""Tests reading of CSV and JSON lines as people have them, whole and broken."""

import csv
import json
import sys
import tracemalloc

import pytest

from richhf_jax import errors, inputs
from richhf_jax.inputs import record
from tests.inputs.reading import loaded, read, user_error, write


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
        ".": f"{table}, line 10: {tmp_path}/.: not a file but a folder {fix}",
        url: f"{table}, line 11: {tmp_path}/{url}: No such file or directory {fix}",
        "a b.jpg": (b"AB", "p"),
        "t.csv:13": f"{table}, line 13: unexpected end of data",
    }


def test_a_quote_that_is_never_closed_costs_no_more_than_its_row(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "MAX_ROW", 200_000)
    before = csv.field_size_limit()
    rows = "a.jpg,p\n" * 50_000
    write(tmp_path, {"t.csv": f'image,prompt\na.jpg,"p\n{rows}'})
    found = [one.id for one in inputs.Inputs([str(tmp_path / "t.csv")])]
    assert csv.field_size_limit() == before  # It is the whole process's.
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


def test_a_csv_of_excel(tmp_path):
    for encoding in ("utf-16", "utf-16-be"):
        text = "image\tprompt\n" if encoding == "utf-16" else "\ufeffimage\tprompt\n"
        write(tmp_path, {"t.csv": text.encode(encoding)})
        assert user_error(tmp_path / "t.csv").endswith(
            "t.csv: this is UTF-16; save it as UTF-8 (Excel: `CSV UTF-8`)"
        )


def test_columns_that_differ_in_capitals(tmp_path):
    write(tmp_path, {"t.csv": "image,prompt,Prompt\na.jpg,p,q\n", "u.csv": "Image,prompt\na.jpg,p\n"})
    assert "column `prompt`: " in user_error(tmp_path / "t.csv")
    assert "each once, in small letters" in user_error(tmp_path / "u.csv")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_line_without_end_stays_out_of_memory(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(record, "MAX_ROW", 1000)
    good = {"csv": b"a.jpg,p", "jsonl": b'{"image": "a.jpg", "prompt": "p"}'}[kind]
    head = b"image,prompt" if kind == "csv" else b""
    quoted = [b'"' + b"x\n" * 600] if kind == "csv" else []
    write(
        tmp_path, {f"t.{kind}": b"\n".join([head, good, b"x" * 1001, good, b"x" * 3_000_000, good, *quoted])}
    )
    tracemalloc.start()
    try:
        found = [loaded(one) for one in inputs.Inputs([str(tmp_path / f"t.{kind}")])]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000
    table = f"{tmp_path}/t.{kind}"
    too_long = f"longer than 1000 {'characters' if kind == 'csv' else 'bytes'}"
    assert [found[1], found[3]] == [f"{table}, line {line}: {too_long}" for line in (3, 5)]
    assert all("a.jpg: No such file" in found[index] for index in (0, 2, 4))
    if kind == "csv":
        lost = "lines 7 to 506 are lost (is a quote never closed?)"
        assert found[5] == f"{table}, line 7: {too_long}; {lost}"


def test_ids_of_a_jsonl(tmp_path):
    """Whole numbers may be floats, as pandas writes them in a column with an empty cell."""
    ids = ["7.0", "NaN", "null", '""', "-0.0", '"1.0"', "12345678901234567890", "9007199254740991.0"]
    bad = ["0.5", "1e300", "Infinity", "true", "[7]", "9007199254740992.0", "-9007199254740994.0"]
    lines = [f'{{"image": "{n}.jpg", "prompt": "p", "id": {value}}}' for n, value in enumerate([*ids, *bad])]
    write(tmp_path, {"t.jsonl": "\n".join(lines), **{f"{n}.jpg": b"A" for n in range(len(lines))}})
    found = read(tmp_path / "t.jsonl")
    assert list(found)[: len(ids)] == [
        *("7", "1.jpg", "2.jpg", "3.jpg", "0", "1.0", "12345678901234567890", "9007199254740991"),
    ]
    assert all("not a string or whole number" in message for message in list(found.values())[len(ids) :])


def test_ids_of_a_csv_are_text(tmp_path):
    write(
        tmp_path, {"t.csv": "id,image,prompt\n7.0,a.jpg,p\n7,a.jpg,p\n,a.jpg,p\nnan,a.jpg,p\n", "a.jpg": b"A"}
    )
    assert list(read(tmp_path / "t.csv")) == ["7.0", "7", "a.jpg", "nan"]


def test_an_object_with_two_prompts(tmp_path):
    lines = [
        '{"image": "a.jpg", "prompt": "p", "prompt": "q"}',
        '{"image": "a.jpg", "prompt": "p", "prompt": "p"}',
    ]
    write(tmp_path, {"t.jsonl": "\n".join(lines), "a.jpg": b"A"})
    assert read(tmp_path / "t.jsonl") == {
        "t.jsonl:1": f"{tmp_path}/t.jsonl, line 1: no JSON: 'prompt' has two values",
        "a.jpg": (b"A", "p"),
    }


def test_a_name_that_is_there_twice_within_another_object_does_not_decide(tmp_path):
    line = '{"image": "a.jpg", "prompt": "p", "more": [{"x": 1, "x": 2}], "other": {"x": 1, "x": 2}}'
    write(tmp_path, {"t.jsonl": line, "a.jpg": b"A"})
    assert read(tmp_path / "t.jsonl") == {"a.jpg": (b"A", "p")}


def test_nested_json_does_not_use_the_stack(tmp_path):
    """Not even where a program has raised Python's limit, behind which the process would die."""
    lines = [
        b'{"a":' * 100_000,
        b'{"image": "a.jpg", "prompt": "[[[[", "more": ' + b"[" * 100 + b"]" * 100 + b"}",
    ]
    write(tmp_path, {"t.jsonl": b"\n".join(lines), "a.jpg": b"A"})
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1_000_000)
    try:
        found = read(tmp_path / "t.jsonl")
    finally:
        sys.setrecursionlimit(limit)
    assert found["t.jsonl:1"].endswith("no JSON: lists or objects are nested more than 200 deep")
    assert found["a.jpg"] == (b"A", "[[[[")


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
    assert found.pop("t.jsonl:10").startswith(f"{table}, line 10: no JSON: lists or objects are")
    assert found == {
        "t.jsonl:1": f"{table}, line 1: no JSON: Expecting ',' delimiter",
        "t.jsonl:3": f"{table}, line 3: not a JSON object",
        "t.jsonl:4": f"{table}, line 4: no `prompt`; there are 'image', 'text'",
        "t.jsonl:5": f"{table}, line 5: `image` is empty",
        "t.jsonl:6": f"{table}, line 6: `image` is of type dict, not a string",
        "t.jsonl:7": f"{table}, line 7: `prompt` is of type list, not a string",
        "t.jsonl:8": f"{table}, line 8: `id` is a bool, not a string or whole number",
        "c.jpg": f"{table}, line 12: the prompt isn't UTF-8; save it as UTF-8",
        "d\n.jpg": f"{table}, line 13: {tmp_path}/d .jpg: No such file or directory {fix}",
    }
