"""Tests all kinds of inputs together: which are refused, and how often each is read."""

import gzip
import os
import tarfile
from concurrent import futures

import pytest

from richhf_jax import inputs
from richhf_jax.inputs import files, tables
from tests.inputs.reading import numbered, read, user_error, write, write_tar


@pytest.mark.parametrize(
    ("prompt", "message"), [("", "--prompt: the prompt is empty"), ("\udcff", "--prompt: the prompt isn't")]
)
def test_a_prompt_that_is_none(tmp_path, prompt, message):
    write(tmp_path, {"a.jpg": b"A"})
    assert user_error(tmp_path / "a.jpg", prompt=prompt).startswith(message)


def test_records_read_nothing(tmp_path, monkeypatch):
    write(tmp_path, {"a.jpg": b"A", "b.jpg": b"B"})
    (tmp_path / "t.jsonl").write_text('{"image": "a.jpg", "prompt": "p"}\n')
    for module in (files, tables):
        monkeypatch.setattr(module, "read_bytes", None)
    paths = [str(tmp_path), str(tmp_path / "t.jsonl")]
    given = inputs.Inputs(paths)
    assert [record.id for record in given] == ["a.jpg", "b.jpg", "a.jpg"]
    assert len(given) == 3


def test_inputs_that_are_none(tmp_path):
    write(tmp_path, {"a.jpg": b"", "x.xyz": b"", "a.tar.gz": b"", "empty/readme": b"", "a.jsonl": "\n"})
    write(tmp_path, {"b.tar": gzip.compress(b"")})
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    assert user_error(tmp_path / "a.jpg", tmp_path / "b.jpg") == f"{tmp_path}/b.jpg: no such file or folder"
    assert "unknown kind of file; name a folder or one of .jpg" in user_error(tmp_path / "x.xyz")
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

    monkeypatch.setattr(tables, "open", denied, raising=False)
    assert user_error(tmp_path / "a.csv") == f"{tmp_path}/a.csv: Permission denied"


def test_a_fingerprint_is_the_same_in_every_version(tmp_path):
    """The names stay, so that a run that an older version began can be continued."""
    write(tmp_path, {"in/b.jpg": b"A", "in/sub/a.png": b"B", "t.csv": "image,prompt\n in/b.jpg,p\n"})
    os.utime(tmp_path / "t.csv", ns=(0, 1_700_000_000_123_456_789))
    folder, table = str(tmp_path / "in"), str(tmp_path / "t.csv")
    assert inputs.Inputs([folder], "p").fingerprint() == "2db128bc7f00a30e"
    assert inputs.Inputs([folder, table]).fingerprint() == "f732ff5ad2e2beb4"
    (tmp_path / "in/b.jpg").rename(tmp_path / "in/c.jpg")
    assert inputs.Inputs([folder, table]).fingerprint() != "f732ff5ad2e2beb4"


def test_a_folder_that_changes_is_read_as_it_was_listed(tmp_path):
    write(tmp_path, {"a.jpg": b"A", "c.jpg": b"C"})
    given = inputs.Inputs([str(tmp_path)], "p")
    fingerprint = given.fingerprint()
    write(tmp_path, {"b.jpg": b"B"})
    assert [record.id for record in given] == ["a.jpg", "c.jpg"]
    assert (len(given), given.fingerprint()) == (2, fingerprint)


def test_several_inputs_in_order(tmp_path):
    write(tmp_path, {"b.jpg": b"B", "in/a.jpg": b"A", "in/c.jpg": b"C"})
    assert list(read(tmp_path / "in", tmp_path / "b.jpg", prompt="p")) == ["a.jpg", "c.jpg", "b.jpg"]


def test_records_load_in_many_threads(tmp_path):
    images = numbered(tmp_path / "t.parquet", rows=400, row_group_size=90, size=5_000)
    members = [(f"{n}.{end}", f"{n} {end}".encode()) for n in range(400) for end in ("jpg", "txt")]
    write_tar(tmp_path / "t.tar", members)
    expected = [(image, f"p{row}") for row, image in enumerate(images)]
    expected += [(f"{n} jpg".encode(), f"{n} txt") for n in range(400)]
    records = list(inputs.Inputs([str(tmp_path / "t.parquet"), str(tmp_path / "t.tar")]))
    with futures.ThreadPoolExecutor(16) as threads:
        assert list(threads.map(lambda record: record.load(), records)) == expected
