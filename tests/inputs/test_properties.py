"""Tests what holds for any JSON, table, id and side file."""

import contextlib
import csv
import io
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from richhf_jax import errors, inputs, reading
from richhf_jax.inputs import record, tables
from tests.inputs.reading import loaded

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NUMBERS = st.integers() | st.floats(allow_nan=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)


@given(VALUES)
def test_json_is_read_as_it_was_written(value):
    assert record.parsed_json(json.dumps(value)) == value
    assert record.parsed_json(json.dumps(value, ensure_ascii=False).encode()) == value


@given(st.binary(max_size=60) | st.lists(st.sampled_from(list(b'{}[]",:\\ 1ea')), max_size=60).map(bytes))
def test_any_bytes_are_json_or_an_error(data):
    with contextlib.suppress(record.InputError):
        assert record.parsed_json(data) == json.loads(data)


@given(st.integers(reading.MAX_DEPTH - 3, reading.MAX_DEPTH + 3), st.sampled_from("[{"), TEXT)
def test_depth_is_that_of_brackets_outside_of_text(depth, bracket, text):
    text = json.dumps(text + '[{"\\' * 300)
    opened, closed = ("[", "]") if bracket == "[" else ('{"a":', "}")
    line = opened * depth + text + closed * depth
    if depth <= reading.MAX_DEPTH:
        assert json.dumps(record.parsed_json(line)) == json.dumps(json.loads(line))
    else:
        with pytest.raises(record.InputError, match="nested more than 200 deep"):
            record.parsed_json(line)


@given(st.integers())
def test_an_id_is_the_same_number_as_int_and_float(number):
    assert record.checked_id(number) == str(number)
    if abs(number) < 1 << 53:
        assert record.checked_id(float(number)) == str(number)


@given(st.floats())
def test_a_float_is_an_id_only_where_it_is_a_whole_number(number):
    if math.isnan(number):
        assert record.checked_id(number) == ""
    elif number.is_integer() and abs(number) < 1 << 53:
        assert float(record.checked_id(number)) == number
    else:
        with pytest.raises(record.InputError, match="is a float"):
            record.checked_id(number)


@given(st.text(max_size=20))
def test_text_stays_as_an_id(text):
    assert record.checked_id(text) == record.printable(text)
    record.checked_id(text).encode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tables")


@settings(max_examples=50)
@given(st.lists(st.tuples(TEXT, TEXT, TEXT), max_size=5), st.sampled_from(["\n", "\r\n"]))
def test_a_csv_is_read_as_it_was_written(folder, rows, end):
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator=end)
    writer.writerows([("image", "prompt", "id"), *rows])
    (folder / "t.csv").write_bytes(text.getvalue().encode())
    found = list(tables.csv_rows(str(folder / "t.csv"), tables.check_columns))
    assert [tuple(fields.values()) for _, fields in found] == rows
    assert all(
        1 < number <= 1 + text.getvalue().count("\n") + text.getvalue().count("\r") for number, _ in found
    )


@settings(max_examples=50)
@given(st.sampled_from(["csv", "jsonl"]), st.binary(max_size=200))
def test_any_bytes_behind_a_good_row_lose_nothing(folder, kind, data):
    start = {"csv": b"image,prompt\ngone.png,p\n", "jsonl": b'{"image": "gone.png", "prompt": "p"}\n'}[kind]
    (folder / f"u.{kind}").write_bytes(start + data)
    found = inputs.Inputs([str(folder / f"u.{kind}")])
    results = [(one.id, loaded(one)) for one in found]
    assert len(results) == len(found)
    assert results[0][0] == "gone.png"
    assert all(isinstance(result, str) and result for _, result in results)


@settings(max_examples=30)
@given(
    st.dictionaries(
        st.text("abAB", min_size=1, max_size=3), st.sampled_from([None, "", "a cat", "b"]), max_size=6
    )
)
def test_each_image_of_a_folder_has_its_own_text_or_none(tmp_path_factory, prompts):
    folder = tmp_path_factory.mktemp("images")
    for stem, prompt in prompts.items():
        (folder / f"{stem}.png").write_bytes(stem.encode())
        if prompt is not None:
            (folder / f"{stem}.TXT").write_text(prompt)
    if not prompts:
        with pytest.raises(errors.UserError, match="no image in this folder"):
            inputs.Inputs([str(folder)])
        return
    found = {one.id: loaded(one) for one in inputs.Inputs([str(folder)], "of all")}
    assert sorted(found) == sorted(f"{stem}.png" for stem in prompts)
    for stem, prompt in prompts.items():
        expected = (stem.encode(), prompt or "of all")
        empty = f"{folder}/{stem}.TXT: the prompt is empty"
        assert found[f"{stem}.png"] == (empty if prompt == "" else expected)
