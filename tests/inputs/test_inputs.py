"""Tests all kinds of inputs together: which are refused, and how often each is read."""

import dataclasses
import gzip
import itertools
import os
import socket
import tarfile
from concurrent import futures

import pyarrow as pa
import pytest

from richhf_jax import errors, inputs
from richhf_jax.inputs import files, tables
from tests.inputs.reading import numbered, read, user_error, write, write_parquet, write_tar


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


@pytest.mark.parametrize("kind", ["png", "csv", "jsonl", "tar", "parquet"])
def test_inputs_without_end_are_refused(tmp_path, kind):
    os.mkfifo(tmp_path / f"pipe.{kind}")
    (tmp_path / f"zero.{kind}").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / f"socket.{kind}"))
        for name in ("pipe", "zero", "socket"):
            message = user_error(tmp_path / f"{name}.{kind}")
            assert message.startswith(f"{tmp_path}/{name}.{kind}: neither a file nor a folder but a pipe")


def test_a_table_that_becomes_a_pipe(tmp_path):
    """It may happen between the first and the second reading."""
    for kind, content in (("csv", "image,prompt\na.jpg,p\n"), ("jsonl", '{"image": "a.jpg", "prompt": "p"}')):
        path = tmp_path / f"t.{kind}"
        path.write_text(content)
        given = inputs.Inputs([str(path)])
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(errors.UserError, match=f"t.{kind}: not a file"):
            list(given)


def test_an_embedded_image_has_an_id_of_its_own(tmp_path):
    """Its path is a hint: Hugging Face keeps of cat/1.png and dog/1.png only 1.png."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for name, rows in (("a.parquet", 4), ("b.parquet", 2)):
        images = [{"bytes": f"{name} {row}".encode(), "path": f"{row % 2}.png"} for row in range(rows)]
        write_parquet(tmp_path / name, image=pa.array(images, kind), prompt=["p"] * rows)
    expected = ["0.png", "1.png", "a.parquet:2", "a.parquet:3", "b.parquet:0", "b.parquet:1"]
    found = read(tmp_path / "a.parquet", tmp_path / "b.parquet")
    assert list(found) == expected
    assert [image for image, _ in found.values()] == [
        f"{n} {row}".encode()
        for n, row in [*(("a.parquet", row) for row in range(4)), *(("b.parquet", row) for row in range(2))]
    ]
    named = pa.array([{"bytes": b"A", "path": "1.png"}] * 2, kind)
    write_parquet(tmp_path / "c.parquet", image=named, prompt=["p", "q"], id=["x", "y"])
    assert list(read(tmp_path / "c.parquet")) == ["x", "y"]


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


@pytest.mark.parametrize("kind", ["csv", "jsonl", "tar", "parquet", "jpg"])
@pytest.mark.parametrize("change", ["shorter", "replaced", "gone"])
def test_a_file_that_changes_while_it_is_read(tmp_path, kind, change):
    path, new = tmp_path / f"t.{kind}", tmp_path / f"new.{kind}"
    for place, rows in ((path, 3), (new, 2 if change == "shorter" else 3)):
        if kind == "csv":
            place.write_text("image,prompt\n" + "a.jpg,p\n" * rows)
        elif kind == "jsonl":
            place.write_text('{"image": "a.jpg", "prompt": "p"}\n' * rows)
        elif kind == "tar":
            write_tar(place, [(f"{row}.{end}", b"p") for row in range(rows) for end in ("jpg", "txt")])
        elif kind == "parquet":
            numbered(place, rows, 2)
        else:
            place.write_bytes(b"a" * rows)
    os.utime(new, ns=(0, path.stat().st_mtime_ns))
    given = inputs.Inputs([str(path)], "p" if kind == "jpg" else None)
    records = iter(given)
    next(records)
    given.check_unchanged()
    if change == "gone":
        path.unlink()
    else:
        new.replace(path)
    message = (
        f"^{path}: No such" if change == "gone" else f"^{path} was written or replaced while it was read"
    )
    with pytest.raises(errors.UserError, match=message):
        list(records)
    with pytest.raises(errors.UserError, match=message):
        given.check_unchanged()


def test_a_reader_that_ends_early(tmp_path):
    numbered(tmp_path / "t.parquet", 3, 2)
    given = inputs.Inputs([str(tmp_path / "t.parquet")])
    [place] = given._places
    given._places = [dataclasses.replace(place, read=lambda: itertools.islice(place.read(), 2))]
    with pytest.raises(errors.UserError, match="it had 3 records"):
        list(given)


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
