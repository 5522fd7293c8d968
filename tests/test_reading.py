"""Files that would hang a reader or fill its memory are refused, by name."""

import os
import pathlib
import socket

import pytest

from richhf_jax import errors, reading


def test_a_small_file_is_read(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert reading.read_bytes(tmp_path / "link", limit=5) == b"12345"
    with pytest.raises(errors.UserError, match="link is larger than 4 bytes"):
        reading.read_bytes(tmp_path / "link", limit=4)


def special_files(folder: pathlib.Path) -> dict[str, str]:
    """Makes files that can't be read to their end. Returns name -> what it is."""
    os.mkfifo(folder / "pipe")
    (folder / "zero").symlink_to("/dev/zero")
    (folder / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(folder / "socket"))
    return {"pipe": "a named pipe", "zero": "a device", "folder": "a folder", "socket": "a socket"}


def test_other_kinds_of_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # A socket's path must be short.
    for name, kind in special_files(pathlib.Path()).items():
        with pytest.raises(errors.UserError, match=f"{name} is {kind}: a regular file is needed"):
            reading.read_bytes(tmp_path / name)


def test_a_tree_holds_regular_files_alone(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/file").touch()
    reading.check_files(tmp_path)
    os.mkfifo(tmp_path / "a/b/c")
    with pytest.raises(errors.UserError, match="a/b/c is a named pipe"):
        reading.check_files(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "is truncated, or no JSON: lists or objects are nested more than 200 deep"),
        ('{"a": ' * 100_000, "nested more than 200 deep"),
        ('{"a"', "is truncated, or no JSON"),
        (b'{"a": "\xff"}', "is truncated, or no JSON"),
        ("9" * 5000, "is truncated, or no JSON"),
        ("[]", "is no JSON object"),
    ],
)
def test_broken_json(tmp_path, content, message):
    (tmp_path / "x.json").write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(errors.UserError, match=f"x.json {message}|x.json .*{message}"):
        reading.read_json(tmp_path / "x.json")
