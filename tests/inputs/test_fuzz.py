"""Reads 10,000 damaged files of each format: each gives a picture or an error, and each row a record."""

import io
import json
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from richhf_jax import errors, inputs
from richhf_jax.inputs import images
from tests.inputs.mutation import mutants
from tests.inputs.reading import loaded

COUNT = 10_000
SIDE = 8


def encoded(picture: Image.Image, image_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, image_format, **options)
    return buffer.getvalue()


def pictures() -> dict[str, Image.Image]:
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8))
    alpha = Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 4), np.uint8))
    return {"rgb": rgb, "grey": rgb.convert("L"), "palette": rgb.quantize(8), "alpha": alpha}


def files_of(image_format: str) -> list[bytes]:
    kinds, exif = pictures(), Image.Exif()
    exif[0x0112] = 6
    rgb, frames = kinds["rgb"], {"save_all": True, "append_images": [kinds["grey"], kinds["palette"]]}
    if image_format == "JPEG":
        options = [{}, {"progressive": True}, {"exif": exif, "icc_profile": b"profile", "comment": b"words"}]
        files = [encoded(rgb, image_format, **more) for more in options]
        return [*files, encoded(kinds["grey"], image_format), encoded(rgb.convert("CMYK"), image_format)]
    if image_format == "BMP":
        return [encoded(kinds[kind], image_format) for kind in ("rgb", "grey", "palette")]
    files = [encoded(kind, image_format) for kind in kinds.values()]
    files.append(encoded(rgb, image_format, **frames))
    if image_format == "GIF":
        return [*files, encoded(kinds["palette"], image_format, comment=b"words", interlace=True)]
    return [*files, encoded(rgb, image_format, exif=exif, icc_profile=b"profile", xmp=b"<xmp>")]


def with_right_checksums(png: bytes) -> bytes:
    """Writes the checksums of a PNG's chunks anew, so that damage behind them is met."""
    data, position = bytearray(png), 8
    while position + 12 <= len(data):
        end = position + 8 + int.from_bytes(data[position : position + 4])
        data[end : end + 4] = struct.pack(">I", zlib.crc32(data[position + 4 : end]))
        position = end + 4
        if end > len(png):
            return png
    return bytes(data)


def outcome(error: type[Exception], function: Callable, *arguments):
    """Returns a function's result, or the message of its error."""
    try:
        return function(*arguments)
    except error as caught:
        return str(caught)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_damaged_images(image_format):
    shown = refused = 0
    for number, data in enumerate(mutants(files_of(image_format), COUNT)):
        if image_format == "PNG" and number % 2:
            data = with_right_checksums(data)
        picture = outcome(images.ImageError, images.decode, data)
        if isinstance(picture, str):
            refused += 1
            assert picture
            assert isinstance(outcome(images.ImageError, images.decode, data, False), str)
            continue
        shown += 1
        assert (picture.dtype, picture.shape[2:]) == (np.uint8, (3,))
        assert 0 < min(picture.shape) <= max(picture.shape) <= images.MAX_SIDE
        if number % 16 == 0:
            np.testing.assert_array_equal(images.decode(images.checked(data)), picture)
    assert shown + refused == COUNT
    assert min(shown, refused) > COUNT / 50


def rewrite(path, data: bytes) -> None:
    """Replaces a file's content. On many disks this is much faster than to empty it first."""
    with path.open("r+b") as file:
        file.write(data)
        file.truncate()


def count_records(path) -> tuple[int, int]:
    """Returns the number of records, and of those that load; asserts that each is told once."""
    given = inputs.Inputs([str(path)])
    results = [loaded(record) for record in given]
    assert len(results) == len(given)
    good = [result for result in results if not isinstance(result, str)]
    assert all(image and prompt.strip() == prompt != "" for image, prompt in good)
    return len(results), len(good)


ROWS = ["image,prompt,id", 'a.png,"a ""red"" cat,\r\nasleep",7', "a.png,b\u00e4r,", "", "b.png,x,y", ""]
CSV = ("\ufeff" + "\r\n".join(ROWS)).encode()


def test_damaged_csv(tmp_path):
    (tmp_path / "a.png").write_bytes(b"A")
    (tmp_path / "t.csv").touch()
    records = good = refused = 0
    for data in mutants([CSV, CSV[3:].replace(b"\r", b"")], COUNT):
        rewrite(tmp_path / "t.csv", data)
        counts = outcome(errors.UserError, count_records, tmp_path / "t.csv")
        if isinstance(counts, str):
            refused += 1
            assert counts.startswith(f"{tmp_path}/t.csv: ")
        else:
            records, good = records + counts[0], good + counts[1]
    assert COUNT / 50 < refused < COUNT / 2
    assert COUNT / 4 < good < records


def test_damaged_jsonl(tmp_path):
    (tmp_path / "a.png").write_bytes(b"A")
    (tmp_path / "t.jsonl").touch()
    rows = [
        {"image": "a.png", "prompt": "a cat", "id": 7.0, "more": {"seed": [1, 2.5, None]}},
        {"image": "a.png", "prompt": "b\u00e4r", "id": None},
        {"image": "b.png", "prompt": "x", "id": "y"},
    ]
    table = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    good = 0
    for data in mutants([table, table.replace(b"\n", b"\r\n\n")], COUNT):
        rewrite(tmp_path / "t.jsonl", data)
        lines = sum(1 for line in data.split(b"\n") if line.strip())
        if not lines:
            continue
        records, more = count_records(tmp_path / "t.jsonl")
        assert records == lines
        good += more
    assert COUNT / 2 < good < 2 * COUNT


def test_damaged_side_files(tmp_path):
    texts = [b"a red cat\n", "\ufeffein B\u00e4r, \u732b".encode(), b"x"]
    paths = [tmp_path / f"{number}{('.txt', '.TXT')[number % 2]}" for number in range(500)]
    for path in paths:
        path.touch()
        path.with_suffix(".png").write_bytes(b"A")
    changed, good = mutants(texts, COUNT), 0
    for _ in range(COUNT // len(paths)):
        for path, data in zip(paths, changed, strict=False):
            rewrite(path, data)
        total, more = count_records(tmp_path)
        assert total == len(paths)
        good += more
    assert COUNT / 4 < good < COUNT
