"""Tests reading of images and folders as people have them."""

import os
import tracemalloc

import pytest

from richhf_jax import inputs
from richhf_jax.inputs import record
from tests.inputs.reading import read, user_error, write

FOLDER_FILES = 20_000


def test_an_image_with_a_prompt(tmp_path):
    write(tmp_path, {"a.JPG": b"A", "a.txt": "beside it"})
    assert read(tmp_path / "a.JPG", prompt=" a cat\n") == {"a.JPG": (b"A", "a cat")}
    assert read(tmp_path / "a.JPG") == {"a.JPG": (b"A", "beside it")}


def test_an_image_without_a_prompt(tmp_path):
    write(tmp_path, {"a.jpg": b"A"})
    message = read(tmp_path / "a.jpg")["a.jpg"]
    assert message.startswith(f"{tmp_path}/a.txt: No such file")
    assert "--prompt" in message


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
    others = {".hidden.jpg": b"", ".git/a.jpg": b"", "a/.b/c.jpg": b"", "README.md": b"", "x.mp4": b""}
    texts = {f"{os.path.splitext(name)[0]}.txt": f"\ufeff {name}\r\n" for name in names}
    write(tmp_path, {**dict.fromkeys(reversed(names), b"I"), **others, **texts})
    assert names == sorted(names, key=str.encode)
    assert list(read(tmp_path).items()) == [(name, (b"I", name)) for name in names]


def test_a_hidden_pair_is_told(tmp_path):
    write(
        tmp_path,
        {".a.jpg": b"A", ".a.txt": "a", "._b.jpg": b"", "._b.txt": "", ".c.jpg": b"C", "d.jpg": b"D"},
    )
    hidden = f"{tmp_path}/.a.jpg: hidden, as its name begins with a dot; rename it and its text"
    assert read(tmp_path, prompt="p") == {".a.jpg": hidden, "d.jpg": (b"D", "p")}


def test_the_prompt_is_for_images_without_sidecar(tmp_path):
    write(tmp_path, {"a.jpg": b"A", "b.jpg": b"B", "b.txt": "its own", "c.jpg": b"C", "c.txt": " "})
    found = read(tmp_path, prompt="a cat")
    assert found["a.jpg"] == (b"A", "a cat")
    assert found["b.jpg"] == (b"B", "its own")
    assert found["c.jpg"] == f"{tmp_path}/c.txt: the prompt is empty"


@pytest.mark.parametrize("text", ["IMG_1.txt", "IMG_1.TXT", "IMG_1.Txt", "IMG_1.tXt"])
def test_a_text_with_an_extension_in_capitals(tmp_path, text):
    write(tmp_path, {"IMG_1.JPG": b"A", text: "its own"})
    for prompt in (None, "of all"):
        assert read(tmp_path, prompt=prompt) == {"IMG_1.JPG": (b"A", "its own")}
    assert read(tmp_path / "IMG_1.JPG") == {"IMG_1.JPG": (b"A", "its own")}


def test_two_texts_of_an_image(tmp_path):
    write(tmp_path, {"a.jpg": b"A", "a.txt": "this?", "a.TXT": "or this?", "b.jpg": b"B"})
    message = f"{tmp_path}/a.jpg: two texts may be its prompt: {tmp_path}/a.TXT, {tmp_path}/a.txt"
    assert read(tmp_path, prompt="p") == {"a.jpg": message, "b.jpg": (b"B", "p")}
    assert read(tmp_path / "a.jpg") == {"a.jpg": message}
    (tmp_path / "a.TXT").unlink()
    os.link(tmp_path / "a.txt", tmp_path / "a.TXT")  # As on a disk where capitals don't count.
    assert read(tmp_path)["a.jpg"] == (b"A", "this?")


def test_a_text_whose_name_is_almost_the_images(tmp_path):
    """On other disks, or in other encodings of accents, these would be the images' texts."""
    write(tmp_path, {"IMG_1.JPG": b"A", "img_1.txt": "a", "in/caf\u00e9.png": b"B", "in/cafe\u0301.txt": "b"})
    write(
        tmp_path,
        {"X.png": b"C", "x.png": b"D", "x.txt": "of the small one", "other.txt": "", "README.txt": ""},
    )
    found = read(tmp_path, prompt="p")
    assert found.pop("X.png") == (b"C", "p")
    assert found.pop("x.png") == (b"D", "of the small one")
    fix = "has almost its name; rename it if it is the image's prompt, else move it elsewhere"
    assert found == {
        "IMG_1.JPG": f"{tmp_path}/IMG_1.JPG: the text file img_1.txt {fix}",
        "in/caf\u00e9.png": f"{tmp_path}/in/caf\u00e9.png: the text file cafe\u0301.txt {fix}",
    }


def test_images_of_one_name_share_its_text(tmp_path):
    write(tmp_path, {"a.jpg": b"A", "a.png": b"B", "a.txt": "a cat"})
    assert read(tmp_path) == {"a.jpg": (b"A", "a cat"), "a.png": (b"B", "a cat")}


def test_every_name_of_the_formats_that_are_read(tmp_path):
    names = [f"{end[1:]}{end}" for end in inputs.IMAGE_EXTENSIONS]
    assert {".jfif", ".jpe", ".pjpeg", ".pjp", ".apng"} < set(inputs.IMAGE_EXTENSIONS)
    write(tmp_path, dict.fromkeys(names, b"A"))
    assert list(read(tmp_path, prompt="p")) == sorted(names)
    for name in names:
        assert read(tmp_path / name, prompt="p") == {name: (b"A", "p")}


def test_pictures_of_other_kinds_are_named(tmp_path):
    write(tmp_path, {"a.png": b"A", "b.HEIC": b"", "in/c.tiff": b"", "d.avif": b"", "e.svg": b""})
    found = read(tmp_path, prompt="p")
    assert found.pop("a.png") == (b"A", "p")
    assert list(found) == ["b.HEIC", "d.avif", "e.svg", "in/c.tiff"]
    assert found["in/c.tiff"] == f"{tmp_path}/in/c.tiff: .tiff isn't read; convert it to PNG or JPEG"
    assert user_error(tmp_path / "d.avif").endswith("d.avif: .avif isn't read; convert it to PNG or JPEG")


def test_a_text_that_is_none(tmp_path):
    write(tmp_path, dict.fromkeys(["a.jpg", "b.jpg", "c.jpg"], b"A"))
    (tmp_path / "a.txt").write_bytes(b"x" * (record.MAX_TEXT_BYTES + 1))
    os.mkfifo(tmp_path / "b.txt")
    (tmp_path / "c.txt").symlink_to("/dev/zero")
    found = read(tmp_path, prompt="p")
    assert found["a.jpg"] == f"{tmp_path}/a.txt: 1048577 bytes; at most 1048576 are taken"
    assert found["b.jpg"].startswith(f"{tmp_path}/b.txt: not a file")
    assert found["c.jpg"].startswith(f"{tmp_path}/c.txt: not a file")


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
        "pipe.jpg": f"{tmp_path}/pipe.jpg: not a file but a named pipe",
        "z.jpg": (b"Z", "p"),
    }


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
        found = sum(1 for _ in inputs.Inputs([str(tmp_path)], "p"))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found == FOLDER_FILES
    assert peak < 150 * FOLDER_FILES  # Bytes of the names. A million names are 150 MB at most.
