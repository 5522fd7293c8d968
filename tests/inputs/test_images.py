"""Tests every kind of image file: TensorFlow shows the checked bytes as Pillow shows the file."""

import io
import struct
import time
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image

from richhf_jax.inputs import containers, images

HEIGHT, WIDTH = 24, 36


@pytest.fixture
def colours(rng) -> np.ndarray:
    """Makes uint8 [height, width, 3]: a gradient with some noise, which JPEG hardly changes."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    gradient = np.stack([rows * 6, columns * 5, 200 - rows * 3], -1)
    return (gradient + rng.integers(0, 20, gradient.shape)).astype(np.uint8)


def encode(image: np.ndarray | Image.Image, image_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def shown(data: bytes) -> np.ndarray:
    """Decodes checked bytes as training does; asserts that prediction shows the file alike, to the pixel."""
    import tensorflow as tf

    from richhf_jax import augmentation

    pixels = augmentation.decode(tf.constant(images.checked(data)), 3).numpy()
    np.testing.assert_array_equal(images.decode(data), pixels)
    return pixels


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def with_chunk(png: bytes, name: bytes, content: bytes) -> bytes:
    """Returns a PNG with one more chunk behind its header."""
    return png[:33] + chunk(name, content) + png[33:]


def png_of(width: int, height: int) -> bytes:
    """Makes a small file of a large RGB picture whose pixels deflate to almost nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    deflate = zlib.compressobj(9)
    row = bytes(1 + 3 * width)
    pixels = b"".join(deflate.compress(row) for _ in range(height)) + deflate.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("image_format", "options"),
    [
        ("JPEG", {"quality": 95}),
        ("JPEG", {"quality": 80, "progressive": True, "subsampling": 2}),
        ("PNG", {}),
        ("WEBP", {"quality": 80}),
        ("WEBP", {"lossless": True}),
    ],
)
@pytest.mark.parametrize("grey", [False, True])
def test_plain_images_stay_as_they_are(colours, image_format, options, grey):
    data = encode(colours[..., 0] if grey else colours, image_format, **options)
    assert images.checked(data) is data
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(shown(data), expected)


def test_one_bit_png(colours):
    one_bit = Image.fromarray(colours[..., 0]).convert("1")
    data = encode(one_bit, "PNG")
    assert images.checked(data) != data
    np.testing.assert_array_equal(shown(data), np.asarray(one_bit.convert("RGB")))


def test_palette(colours):
    palette = Image.fromarray(colours).quantize(16)
    for data in (encode(palette, "PNG"), encode(palette, "GIF"), encode(palette, "BMP")):
        np.testing.assert_array_equal(shown(data), np.asarray(palette.convert("RGB")))


def test_transparent_palette_is_over_white(colours):
    palette = Image.fromarray(colours).quantize(16)
    data = encode(palette, "PNG", transparency=3)
    expected = np.where((np.asarray(palette) == 3)[..., None], 255, np.asarray(palette.convert("RGB")))
    np.testing.assert_array_equal(shown(data), expected)


@pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
def test_alpha_is_over_white(colours, image_format):
    alpha = np.zeros((HEIGHT, WIDTH, 1), np.uint8)
    alpha[:, :12], alpha[:, 12:24] = 255, 128
    data = encode(np.concatenate([colours, alpha], -1), image_format, lossless=True, exact=True)
    expected = colours * (alpha / 255) + 255 * (1 - alpha / 255)
    np.testing.assert_allclose(shown(data), expected, atol=0.51)  # rounding


def test_grey_with_alpha_and_a_transparent_colour(colours):
    grey = colours[..., 0]
    alpha = np.where(np.arange(WIDTH) < 9, 0, 255).astype(np.uint8) + np.zeros_like(grey)
    expected = np.where(alpha == 0, 255, grey)[..., None].repeat(3, -1)
    np.testing.assert_array_equal(shown(encode(np.stack([grey, alpha], -1), "PNG")), expected)
    colours[:9] = 1, 2, 3
    expected = np.where((colours == (1, 2, 3)).all(-1, keepdims=True), 255, colours)
    np.testing.assert_array_equal(shown(encode(colours, "PNG", transparency=(1, 2, 3))), expected)


@pytest.mark.parametrize("adobe", [True, False])
def test_cmyk_jpeg(colours, adobe):
    cmyk = Image.fromarray(colours).convert("CMYK")
    data = encode(cmyk, "JPEG", quality=100, subsampling=0)
    marker = data.index(b"\xff\xee")  # Adobe's marker, which says that the inks are stored inverted
    assert data[marker + 4 : marker + 9] == b"Adobe"
    if not adobe:
        data = data[:marker] + data[marker + 16 :]
    np.testing.assert_allclose(
        shown(data).astype(int), np.asarray(cmyk.convert("RGB")), atol=4
    )  # JPEG's loss
    np.testing.assert_allclose(shown(data).astype(int), colours, atol=4)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(colours, image_format, orientation):
    options = {"quality": 100, "subsampling": 0} if image_format == "JPEG" else {"lossless": True}
    turned = {  # https://www.cipa.jp/std/documents/e/DC-008-2012_E.pdf, Orientation
        1: colours,
        2: colours[:, ::-1],
        3: colours[::-1, ::-1],
        4: colours[::-1],
        5: colours.transpose(1, 0, 2),
        6: colours.transpose(1, 0, 2)[:, ::-1],
        7: colours.transpose(1, 0, 2)[::-1, ::-1],
        8: colours.transpose(1, 0, 2)[::-1],
    }[orientation]
    data = encode(colours, image_format, exif=oriented(orientation), **options)
    tolerance = 10 if image_format == "JPEG" else 0  # JPEG's loss, and TensorFlow's coarser transform
    np.testing.assert_allclose(shown(data).astype(int), turned, atol=tolerance)


def test_16_bit_png(colours):
    grey = colours[..., 0].astype(np.uint16) * 256 + 77
    np.testing.assert_array_equal(
        shown(encode(Image.fromarray(grey), "PNG")), (grey >> 8)[..., None].repeat(3, -1)
    )
    rows = (colours * np.uint16(256) + np.uint16(77)).astype(">u2").reshape(HEIGHT, -1)
    pixels = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    data += chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    np.testing.assert_array_equal(shown(data), colours)


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "GIF"])
def test_first_frame_of_an_animation(colours, image_format):
    frames = [Image.fromarray(pixels).quantize(16).convert("RGB") for pixels in (colours, 255 - colours)]
    data = encode(frames[0], image_format, save_all=True, append_images=frames[1:], lossless=True)
    np.testing.assert_array_equal(shown(data), np.asarray(frames[0]))


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_cut_off_anywhere_is_either_whole_or_an_error(colours, image_format):
    data = encode(colours, image_format)
    whole = shown(data)
    refused = 0
    for length in range(len(data)):
        try:
            image = shown(data[:length])
        except images.ImageError:
            refused += 1
            continue
        # Nothing but the end marker is missing. Re-encoded pixels are Pillow's, hence the tolerance.
        np.testing.assert_allclose(image.astype(int), whole, atol=8)
    assert refused >= len(data) - 12


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "JPEG"])
def test_what_passes_with_a_changed_byte_can_be_decoded(colours, image_format, capfd):
    data = bytearray(encode(colours, image_format))
    if image_format == "PNG":  # A changed text doesn't matter.
        data = with_chunk(bytes(data), b"tEXt", b"key\0text")
    passed = 0
    for position in range(0, len(data), 3):
        changed = bytes([*data[:position], data[position] ^ 0x55, *data[position + 1 :]])
        try:
            shown(changed)  # Bad bytes would raise TensorFlow's InvalidArgumentError.
            passed += 1
        except images.ImageError:
            pass
    assert passed
    capfd.readouterr()  # libjpeg's complaints


def test_what_follows_an_image_does_not_matter(colours):
    for image_format in ("JPEG", "PNG"):
        data = encode(colours, image_format)
        np.testing.assert_allclose(shown(data + b"junk").astype(int), shown(data), atol=8)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no bytes"),
        (b"<!DOCTYPE html><html>404</html>", "an HTML page"),
        (b"\n <html>404</html>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"nothing of the kind", "neither JPEG, PNG, WebP, GIF nor BMP.* b'nothing '"),
        (png_of(8193, 2), "8193 x 2 pixels; at most 8192 x 8192"),
        (png_of(2, 8193), "2 x 8193 pixels; at most 8192 x 8192"),
    ],
)
def test_no_image(data, message):
    with pytest.raises(images.ImageError, match=message):
        images.checked(data)


@pytest.mark.parametrize("side", [10_000, 60_000])
def test_a_picture_too_large_is_refused_before_it_is_opened(side, monkeypatch):
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("opened"))
    png = png_of(side, 3).replace(struct.pack(">II", side, 3), struct.pack(">II", side, side))
    png = png[:29] + struct.pack(">I", zlib.crc32(png[12:29])) + png[33:]
    with pytest.raises(images.ImageError, match=f"^{side} x {side} pixels; at most 8192 x 8192 are taken$"):
        images.checked(png)


def test_a_text_that_inflates_to_gigabytes_costs_nothing(colours):
    deflate = zlib.compressobj(9)
    text = b"".join(deflate.compress(bytes(1 << 20)) for _ in range(64)) + deflate.flush()
    png = encode(colours, "PNG")
    for key in (b"comment", b"XML:com.adobe.xmp", b"Raw profile type exif"):
        bomb = with_chunk(png, b"zTXt", key + b"\0\0" + text)
        tracemalloc.start()
        try:
            assert images.checked(bomb) == png
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 4 << 20


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def exif_of(orientation: int) -> bytes:
    """Makes EXIF data whose other tags are broken: one has a type that isn't there, one points nowhere."""
    entries = [(0x010E, 99, 1, 0), (0x0112, 3, 1, orientation), (0x8769, 4, 1, 1 << 30)]
    return b"II*\0\x08\0\0\0" + struct.pack("<H", 3) + b"".join(struct.pack("<HHII", *e) for e in entries)


BROKEN_EXIF = (b"", b"II", b"II*\0\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff", b"garbage", exif_of(77))
TEXT = b"workflow\0" + b'{"seed": 1}' * 200_000  # over Pillow's limits of 1 MB


def with_webp_chunk(webp: bytes, name: bytes, content: bytes) -> bytes:
    body = webp[8:] + name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def test_metadata_of_a_png_does_not_decide(colours):
    plain = encode(colours, "PNG")
    packed = zlib.compress(TEXT)
    bad_checksum = bytearray(with_chunk(plain, b"tEXt", b"key\0text"))
    bad_checksum[45] ^= 1
    files = [
        bytes(bad_checksum),
        with_chunk(plain, b"tEXt", TEXT),
        with_chunk(plain, b"zTXt", b"workflow\0\0" + packed),
        with_chunk(plain, b"iTXt", b"workflow\0\1\0\0\0" + packed),
        with_chunk(plain, b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0nothing packed"),
        with_chunk(plain, b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n4\nno digits")),
        with_chunk(plain, b"iCCP", b"profile\0\0" + zlib.compress(bytes(1_500_000))),
        with_chunk(plain, b"iCCP", b""),
        with_chunk(plain, b"gAMA", b"\0"),
        with_chunk(plain, b"pHYs", b""),
        with_chunk(plain, b"acTL", b""),
        with_chunk(plain, b"fcTL", b"too short"),
        *(with_chunk(plain, b"eXIf", exif) for exif in BROKEN_EXIF),
    ]
    for data in files:
        assert images.checked(data) == plain
        np.testing.assert_array_equal(images.decode(data, convert=False), colours)
    shown(files[0])


def test_metadata_of_a_jpeg_does_not_decide(colours):
    plain = encode(colours, "JPEG")
    contents = [
        *((0xE1, b"Exif\0\0" + exif) for exif in BROKEN_EXIF),
        (0xE1, b"http://ns.adobe.com/xap/1.0/\0<broken"),
        (0xE0, b"JFIF"),
        (0xE2, b"ICC_PROFILE\0"),
        (0xE2, b"MPF\0" + b"\xff" * 30),
        (0xED, b"Photoshop 3.0\0" + b"8BIM\x04"),
        (0xEE, b"Adobe"),
        (0xFE, b""),
    ]
    for marker, content in contents:
        data = plain[:2] + segment(marker, content) + plain[2:] + b"what follows"
        assert images.checked(data) == plain
        np.testing.assert_array_equal(images.decode(data, convert=False), shown(plain))


def test_metadata_of_a_webp_does_not_decide(colours):
    plain = encode(colours, "WEBP", lossless=True)
    extended = encode(colours, "WEBP", lossless=True, exif=exif_of(1), xmp=b"<xmp>", icc_profile=b"none")
    files = [with_webp_chunk(extended, name, b"\xff" * 5) for name in (b"EXIF", b"XMP ", b"ICCP", b"????")]
    files += [encode(colours, "WEBP", lossless=True, exif=exif) for exif in BROKEN_EXIF]
    files += [extended[:-3], plain + b"what follows"]
    for data in files:
        np.testing.assert_array_equal(shown(data), colours)
        assert len(images.checked(data)) <= len(plain) + 18


def test_what_is_no_picture_in_a_gif_does_not_decide(colours):
    palette = Image.fromarray(colours).quantize(16)
    plain = encode(palette, "GIF")
    start = plain.index(b",", 13 + 48)
    for extension in (b"!\xf9\x01\x01\0", b"!\xff\x03abc\x01\0\0", b"!\xfe\x02ab\0", b"!\x01\0", b"junk"):
        data = plain[:start] + extension + plain[start:]
        np.testing.assert_array_equal(images.decode(data), np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_broken_exif_still_turns_a_picture(colours, orientation):
    turned = np.rot90(colours, {1: 0, 3: 2, 6: 3}[orientation])
    exif, xmp = exif_of(orientation), f'<tiff:Orientation="{orientation}"'.replace("<", "").encode()
    png, webp = encode(colours, "PNG"), encode(colours, "WEBP", lossless=True, exif=exif)
    raw_profile = b"\nexif\n 9\n" + (b"Exif\0\0" + exif).hex().encode() + b"\n"
    files = [
        with_chunk(png, b"eXIf", exif),
        with_chunk(png, b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
        with_chunk(png, b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw_profile)),
        webp,
    ]
    for data in files:
        np.testing.assert_array_equal(shown(data), turned)
    jpeg = encode(colours, "JPEG", quality=100, subsampling=0)
    for content in (b"Exif\0\0" + exif, b"http://ns.adobe.com/xap/1.0/\0" + xmp):
        data = jpeg[:2] + segment(0xE1, content) + jpeg[2:]
        np.testing.assert_allclose(shown(data).astype(int), turned, atol=10)


def test_broken_exif_of_a_picture_in_memory(colours):
    image = Image.fromarray(colours)
    image.info["exif"] = b"Exif\0\0II*\0\x08\0\0\0\xff\xff"
    np.testing.assert_array_equal(images.of_pillow(image), colours)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda png: png[:45] + b"?" + png[46:], "the checksum of its IDAT is wrong"),
        (lambda png: with_chunk(png, b"ABCD", b""), "its chunk b'ABCD' isn't known"),
        (lambda png: with_chunk(png, b"IHDR", png[16:29]), "IHDR isn't where it must be"),
        (lambda png: png[:8] + png[33:], "IDAT isn't where it must be"),
        (lambda png: with_chunk(png, b"IEND", b""), "broken PNG"),
        (lambda png: png[:-13], "cut off"),
    ],
)
def test_what_pixels_need_does_decide(colours, change, message):
    with pytest.raises(images.ImageError, match=message):
        images.checked(change(encode(colours, "PNG")))


def png_chunks(png: bytes) -> list[bytes]:
    parts, position = [], 8
    while position < len(png):
        end = position + 12 + int.from_bytes(png[position : position + 4])
        parts.append(png[position:end])
        position = end
    return parts


def test_chunks_out_of_their_place_do_not_decide(colours):
    palette = Image.fromarray(colours).quantize(16)
    png = encode(palette, "PNG", transparency=3)
    head, plte, trns, idat, end = png_chunks(png)
    opaque = np.asarray(palette.convert("RGB"))
    for parts in (
        (head, plte, plte, trns, idat, end),
        (head, plte, trns, trns, idat, end),
        (head, plte, idat, trns, end),  # Pillow takes it.
    ):
        np.testing.assert_array_equal(shown(png[:8] + b"".join(parts)), shown(png))
    np.testing.assert_array_equal(shown(png[:8] + b"".join((head, plte, idat, plte, end))), opaque)
    for image in (colours, colours[:, :, 0]):
        head, idat, end = png_chunks(plain := encode(image, "PNG"))
        for parts in ((plte, plte, idat), (idat, plte), (plte, idat, plte)):
            data = png[:8] + b"".join((head, *parts, end))
            assert (images.decode(data) == images.decode(plain)).all(-1).mean() > 0.9
            shown(data)


def test_the_end_of_a_png_does_not_decide(colours):
    png = encode(colours, "PNG")
    more = png[:-12] + chunk(b"tEXt", b"key\0text")
    ends = [
        png[:-4],
        png[:-8],
        png[:-12],
        png[:-1] + b"?",
        more[:-3],
        more[:-15],
        png[:-12] + chunk(b"IEND", b"x"),
    ]
    for data in ends:
        assert images.checked(data) == png


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("kind", "form", "numbers", "turns"),
    [
        *(
            (kind, form, 1, True)
            for kind, form in {3: "H2x", 4: "I", 6: "b3x", 8: "h2x", 9: "i", 13: "I"}.items()
        ),
        *((kind, form, 1, False) for kind, form in {1: "B3x", 7: "B3x", 11: "f"}.items()),
        (3, "H2x", 2, False),
    ],
)
def test_a_file_turns_as_its_picture_in_memory(colours, order, kind, form, numbers, turns):
    entry = struct.pack(f"{order}HHI{form}", 0x0112, kind, numbers, 6)
    start = struct.pack(f"{order}2sHIH", b"II" if order == "<" else b"MM", 42, 8, 1)
    xmp = b'tiff:Orientation="3"'  # It counts only where EXIF has none.
    data = encode(colours, "WEBP", lossless=True, exif=b"Exif\0\0" + start + entry + bytes(4), xmp=xmp)
    expected = np.rot90(colours, 3) if turns else colours
    np.testing.assert_array_equal(images.decode(data), expected)
    np.testing.assert_array_equal(images.of_pillow(Image.open(io.BytesIO(data))), expected)


def test_metadata_in_thousands_of_parts_costs_nothing(colours):
    """Each of them took milliseconds once, or a copy of all before it."""
    jpeg, png = encode(colours, "JPEG"), encode(colours, "PNG")
    text = zlib.compress(b"z" * (1 << 20), 9)
    start = time.process_time()
    assert images.checked(jpeg[:2] + segment(0xE1, b"Exif\0\0" + bytes(60_000)) * 1000 + jpeg[2:]) == jpeg
    for key in (b"XML:com.adobe.xmp", b"Raw profile type exif"):
        assert images.checked(png[:33] + chunk(b"zTXt", key + b"\0\0" + text) * 2000 + png[33:]) == png
    assert time.process_time() - start < 2


def test_a_jpeg_of_thousands_of_scans_is_refused_before_it_is_opened(monkeypatch):
    jpeg = encode(np.full((1024, 1024), 128, np.uint8), "JPEG", progressive=True)
    start = jpeg.rindex(b"\xff\xda")
    scan = jpeg[start:-2]
    assert images.decode(jpeg[:-2] + scan * 20 + jpeg[-2:]).shape == (1024, 1024, 3)
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(images.ImageError, match="a JPEG of 1024 x 1024 pixels in over 2048 scans"):
        images.decode(jpeg[:-2] + scan * 4000 + jpeg[-2:])


def test_an_animation_costs_one_frame(monkeypatch, colours):
    frames = [Image.fromarray(colours + np.uint8(n)).quantize(16) for n in range(30)]
    for image_format in ("GIF", "WEBP", "PNG"):
        data = encode(frames[0], image_format, save_all=True, append_images=frames[1:], lossless=True)
        container = containers.read(data)
        assert container.frames == 30
        assert len(container.data) < len(data) / 10
        with pytest.raises(images.ImageError, match="an animation of 30 frames"):
            images.decode(data, convert=False)


def test_parts_of_a_file_are_counted(monkeypatch, colours):
    monkeypatch.setattr(containers, "MAX_PARTS", 100)
    monkeypatch.setattr(containers, "MAX_BLOCKS", 100)
    gif = encode(Image.fromarray(colours).quantize(16), "GIF")
    files = [
        png_of(8, 8)[:33] + chunk(b"tEXt", b"") * 200,
        b"\xff\xd8" + b"\xff\xd8" * 200,
        b"RIFF\xff\xff\0\0WEBP" + b"????\0\0\0\0" * 200,
        gif[:-1] + b"!\xfe" + b"\1a" * 200,
    ]
    for data in files:
        with pytest.raises(images.ImageError, match="more than 100"):
            images.checked(data)


def test_a_run_length_encoded_bmp(colours):
    body = bytes([WIDTH, 3, 0, 0]) * HEIGHT + b"\0\1"
    palette = b"".join(bytes([n, 255 - n, n, 0]) for n in range(256))

    def bmp(width, height):
        head = struct.pack("<IHHI", 54 + len(palette) + len(body), 0, 0, 54 + len(palette))
        return (
            b"BM"
            + head
            + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(body), 0, 0, 256, 0)
            + palette
            + body
        )

    np.testing.assert_array_equal(shown(bmp(WIDTH, HEIGHT)), np.full((HEIGHT, WIDTH, 3), (3, 252, 3)))
    with pytest.raises(images.ImageError, match="run-length encoded BMP of 8000 x 8000 pixels"):
        images.checked(bmp(8000, 8000))


def test_nothing_global_changes(colours, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # Pillow would raise an error at 20.
    png = encode(colours, "PNG")
    with pytest.raises(images.ImageError, match="decompression bomb"):
        images.decode(png)
    monkeypatch.undo()
    filters = list(warnings.filters)

    def refused(*_, **__):
        pytest.fail("changes the filters of all threads")

    monkeypatch.setattr(warnings, "catch_warnings", refused)
    monkeypatch.setattr(warnings, "simplefilter", refused)
    for image_format in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
        images.checked(encode(colours, image_format))
        images.decode(encode(colours, image_format))
    assert warnings.filters == filters
