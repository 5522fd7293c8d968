"""Tests reading a file's bytes, whatever input names it."""

import os

from richhf_jax.inputs import record
from tests.inputs.reading import read, write


def test_a_file_without_permission(tmp_path, monkeypatch):
    write(tmp_path, {"a.jpg": b"A"})

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(record, "open", denied, raising=False)
    assert read(tmp_path / "a.jpg", prompt="p") == {"a.jpg": f"{tmp_path}/a.jpg: Permission denied"}


def test_an_image_larger_than_memory(tmp_path):
    write(tmp_path, {"a.jpg": b"A", "b.jpg": b""})
    os.truncate(tmp_path / "b.jpg", record.MAX_IMAGE_BYTES + 1)  # It has holes: no bytes on the disk.
    found = read(tmp_path, prompt="p")
    assert found["a.jpg"] == (b"A", "p")
    assert found["b.jpg"] == f"{tmp_path}/b.jpg: 1073741825 bytes; at most 1073741824 are taken"
