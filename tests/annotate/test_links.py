"""Images that a project links: which are, and what happens when they go away or change."""

import contextlib
import pathlib
import tarfile

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from starlette.testclient import TestClient

from richhf_jax.annotate import __main__ as command
from richhf_jax.annotate import server
from richhf_jax.annotate.store import Store


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as end:
        command.main([str(argument) for argument in arguments])
    return end.value.code


@pytest.fixture
def images(tmp_path, rng) -> pathlib.Path:
    """Makes a folder with a plain image, and one with metadata."""
    folder = tmp_path / "images"
    folder.mkdir()
    metadata = PngImagePlugin.PngInfo()
    metadata.add_text("parameters", "a cat")
    for name, info in {"plain.png": None, "text.png": metadata}.items():
        pixels = rng.integers(0, 256, (40, 50, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / name, pnginfo=info)
        (folder / name).with_suffix(".txt").write_text("a cat")
    return folder


@pytest.fixture
def linked(tmp_path, images) -> pathlib.Path:
    assert run("init", tmp_path / "study", "--images", images / "plain.png", "--link") == 0
    return tmp_path / "study"


def places(project) -> dict[str, pathlib.Path]:
    """Returns the path of each image's file by the image's name."""
    with contextlib.closing(Store(project)) as store:
        return {item.id: store.image_path(item) for item in store.items()}


def served(project) -> list:
    """Returns the page's reply for the first image, to a rater and to the manager."""
    with contextlib.closing(Store(project)) as store, TestClient(server.make_app(store)) as client:
        client.get(f"/r/{store.add_rater(f'rater {len(list(store.people()))}')}")
        client.get(f"/m/{store.make_manager()}")
        work = client.get("/api/next").json()["work"]["id"]
        return [client.get(f"/image/{work}"), client.get(f"/manage/image/{work}")]


def test_files_that_need_no_change_are_linked(images, tmp_path, monkeypatch, capsys):
    (tmp_path / "table.csv").write_text("image,prompt,id\nimages/plain.png,a dog,of a table\n")
    with tarfile.open(tmp_path / "pairs.tar", "w") as tar:
        for name in ("plain.png", "plain.txt"):
            tar.add(images / name, f"in a tar{name[-4:]}")
    (tmp_path / "way").symlink_to(images)
    monkeypatch.chdir(tmp_path)
    # The table and the folder have the same image.
    assert run("init", "study", "--images", "table.csv", "way", "--link") == 0
    assert "images/: 2 files, 1 of them links" in capsys.readouterr().out
    found = places("study")
    assert found["plain.png"] == found["of a table"]
    # The path stays right where the project moves, and where `way` leads elsewhere.
    assert found["plain.png"].readlink() == images / "plain.png"
    assert found["plain.png"].read_bytes() == (images / "plain.png").read_bytes()
    assert not found["text.png"].is_symlink()
    assert found["text.png"].read_bytes() != (images / "text.png").read_bytes()
    assert run("init", "tar", "--images", "pairs.tar", "--link") == 0
    assert run("init", "copies", "--images", "way") == 0
    assert not any(path.is_symlink() for path in (*places("tar").values(), *places("copies").values()))


@pytest.mark.parametrize("missing", [False, True])
def test_another_image_is_never_shown(linked, images, tmp_path, capsys, missing):
    original = (images / "plain.png").read_bytes()
    assert [reply.content for reply in served(linked)] == [original] * 2
    if missing:
        (images / "plain.png").rename(tmp_path / "plain.png")
        told = f"{places(linked)['plain.png']}, a link to {images / 'plain.png'}: No such file"
    else:
        Image.open(images / "text.png").save(images / "plain.png")
        told = f"{images / 'plain.png'} isn't the image any more that the project took"
    capsys.readouterr()
    for reply in served(linked):
        assert reply.status_code == 404
        assert "missing or has changed. Please tell who sent you the link" in reply.text
        assert str(tmp_path) not in reply.text
    shown = capsys.readouterr().err
    assert told in shown
    assert "name it to `add --images` by the same id" in shown
    # From elsewhere it is the same image again.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "plain.png").write_bytes(original)
    assert run("add", linked, "--images", elsewhere, "--prompt=a cat", "--link") == 0
    assert places(linked)["plain.png"].readlink() == elsewhere / "plain.png"
    assert [reply.content for reply in served(linked)] == [original] * 2


def test_a_link_becomes_a_copy(linked, images):
    before = (images / "plain.png").stat()
    assert run("add", linked, "--images", images / "plain.png") == 0
    place = places(linked)["plain.png"]
    assert not place.is_symlink()
    (images / "plain.png").write_bytes(b"")
    assert (images / "plain.png").stat().st_ino == before.st_ino
    with Image.open(place) as image:
        assert image.size == (50, 40)
    # A copy stays one.
    (images / "plain.png").write_bytes(place.read_bytes())
    assert run("add", linked, "--images", images / "plain.png", "--link") == 0
    assert not place.is_symlink()
