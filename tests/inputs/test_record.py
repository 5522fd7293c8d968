"""Tests reading a file's bytes, whatever input names it."""

from richhf_jax.inputs import record
from tests.inputs.reading import read, write


def test_a_file_without_permission(tmp_path, monkeypatch):
    write(tmp_path, {"a.jpg": b"A"})

    def denied(path, *_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(record, "open", denied, raising=False)
    assert read(tmp_path / "a.jpg", prompt="p") == {"a.jpg": f"{tmp_path}/a.jpg: Permission denied"}


def test_an_image_larger_than_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "_MAX_BYTES", 3)
    write(tmp_path, {"a.jpg": b"abc", "b.jpg": b"abcd"})
    found = read(tmp_path, prompt="p")
    assert found["a.jpg"] == (b"abc", "p")
    assert found["b.jpg"] == f"{tmp_path}/b.jpg: 4 bytes; at most 3 are taken"
