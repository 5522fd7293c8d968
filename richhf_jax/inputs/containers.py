"""Reads the containers of image files: their sizes, and the pixels' data without all that isn't pixels.

Text, colour profiles, EXIF, comments, previews and further frames never decide whether pixels are good, nor
what they cost: the decoder doesn't get them. Only the orientation is read. What an image will cost is known
here, before anything is decoded.
"""

import dataclasses
import re
import struct
import zlib
from collections.abc import Iterator
from typing import Any

# Largest side of an image, in pixels.
MAX_SIDE = 8192
# Pixels of a JPEG times its scans, each of which costs a pass over the whole picture. This is 32 scans of
# MAX_SIDE x MAX_SIDE pixels; libjpeg writes 6 to 24 scans.
MAX_SCANNED_PIXELS = 1 << 31
# Pixels of a BMP that is run-length encoded, which Pillow decodes in Python.
MAX_RLE_PIXELS = 1 << 22
# Chunks or segments of a file: those of a file of 1 GiB have 4 KB then.
MAX_PARTS = 1 << 18
# Blocks of a GIF, none of which has more than 255 bytes.
MAX_BLOCKS = 1 << 22
# Bytes of metadata in which the orientation could stand, inflated; and texts of a PNG that are looked at.
_MAX_TEXT, _MAX_TEXTS = 1 << 20, 16

UPRIGHT = 1
_ORIENTATION_TAG = 0x0112
# TIFF's types of whole numbers that Pillow takes for an orientation, as `struct` writes them.
_NUMBERS = {3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 13: "I"}
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')

_PNG = b"\x89PNG\r\n\x1a\n"
# Chunks that a picture is made of (https://www.w3.org/TR/png-3/#4Concepts.FormatTypes).
_PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT")
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_PLAIN_PNG = ((8, 0), (8, 2))  # Bits and colour type: 8-bit greyscale, 8-bit RGB.
# Keys of text that holds an orientation: XMP, and EXIF as ImageMagick writes it.
_XMP_KEY, _EXIF_KEY = b"XML:com.adobe.xmp", b"Raw profile type exif"

# A marker, other than those within a scan's data.
_JPEG_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")
_SOI, _EOI, _SOS, _APP0, _APP1, _APP14, _COM = 0xD8, 0xD9, 0xDA, 0xE0, 0xE1, 0xEE, 0xFE
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_EXIF, _JPEG_XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"

_WEBP_PIXELS = (b"VP8X", b"ANIM", b"ALPH", b"VP8 ", b"VP8L", b"ANMF")


class ImageError(ValueError):
    """There is no usable picture in a file's bytes; the message says why."""


@dataclasses.dataclass(frozen=True)
class Container:
    """An image file's pixels, still encoded.

    Attributes:
      format: Pillow's name of the format.
      width, height: pixels, before the picture is turned upright.
      data: the file without what isn't pixels. It has one frame, the first.
      is_plain: whether TensorFlow shows an upright picture in L or RGB as Pillow does.
      orientation: EXIF's number, 1 to 8.
      frames: number of pictures in an animation, else 1.
      bits: bits a colour.
    """

    format: str
    width: int
    height: int
    data: bytes
    is_plain: bool = False
    orientation: int = UPRIGHT
    frames: int = 1
    bits: int = 8


def read(data: bytes) -> Container:
    """Reads an image's container.

    Raises:
      ImageError: it is no image of a kind that is read, or is broken, larger than MAX_SIDE a side, or costs
        too much to decode.
    """
    name = next((name for magic, name in _MAGIC.items() if data.startswith(magic)), "")
    if not name or (name == "WEBP" and data[8:12] != b"WEBP"):
        raise ImageError(_why_not_an_image(data))
    try:
        container = _READERS[name](data)
    except (struct.error, IndexError):
        raise ImageError(f"broken {name}: cut off") from None
    if max(container.width, container.height) > MAX_SIDE:
        raise ImageError(
            f"{container.width} x {container.height} pixels; at most {MAX_SIDE} x {MAX_SIDE} are taken"
        )
    return container


def _png(data: bytes) -> Container:
    kept: list[bytes | memoryview] = [_PNG]
    exif, xmp, frames, texts, last, in_order = b"", b"", 1, 0, -1, True
    for name, chunk in _png_chunks(data):
        content = chunk[8:-4]
        whole = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])
        if name in _PNG_PIXELS:
            if not whole:
                raise ImageError(f"broken PNG: the checksum of its {name.decode()} is wrong")
            place = _PNG_PIXELS.index(name)
            if (last < 0) != (place == 0):
                raise ImageError(f"broken PNG: {name.decode()} isn't where it must be")
            # Pillow and TensorFlow may differ about what isn't in its place, or is there twice.
            in_order = in_order and (place > last or name == b"IDAT" == _PNG_PIXELS[last])
            last = place
            kept.append(chunk)
        elif not name[0] & 0x20:  # Small letters at the beginning: the picture can be shown without it.
            raise ImageError(f"broken PNG: its chunk {name!r} isn't known")
        elif name == b"eXIf" and whole:
            exif = bytes(content)
        elif name == b"acTL":
            frames = max(1, int.from_bytes(content[:4]))
        elif name in (b"tEXt", b"zTXt", b"iTXt") and texts < _MAX_TEXTS:
            texts += bytes(content[:80]).startswith((_XMP_KEY, _EXIF_KEY))
            xmp = _png_text(name, content, _XMP_KEY) or xmp
            exif = exif or _hexadecimal(_png_text(name, content, _EXIF_KEY))
    if len(kept[1]) != 25:
        raise ImageError("broken PNG: its head hasn't 13 bytes")
    kept.append(_PNG_END)
    width, height, bits, colours = struct.unpack_from(">IIBB", kept[1], 8)
    return Container(
        format="PNG",
        width=width,
        height=height,
        data=_joined(kept, data) if data.endswith(_PNG_END) else b"".join(kept),
        is_plain=in_order and (bits, colours) in _PLAIN_PNG,
        orientation=_orientation(exif, xmp),
        frames=frames,
        bits=bits,
    )


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """Yields the chunks before the end, with their names; the decoder finds out whether pixels are missing.

    Raises:
      struct.error: the file is cut off in a chunk that the picture needs.
    """
    position = len(_PNG)
    for _ in range(MAX_PARTS):
        if position + 8 > len(data):
            return
        length, name = struct.unpack_from(">I4s", data, position)
        if name == b"IEND":
            return
        chunk = memoryview(data)[position : position + length + 12]
        if len(chunk) < length + 12:
            if name[0] & 0x20:
                return
            raise struct.error
        yield name, chunk
        position += len(chunk)
    raise ImageError(f"broken PNG: more than {MAX_PARTS} chunks")


def _png_text(name: bytes, content: memoryview, key: bytes) -> bytes:
    """Returns the text of a chunk with this key, else b''; at most the first _MAX_TEXT bytes."""
    if content[: len(key) + 1] != key + b"\0":
        return b""
    text = bytes(content[len(key) + 1 :][:_MAX_TEXT])
    compressed = name == b"zTXt" or (name == b"iTXt" and text[:1] == b"\1")
    if name == b"zTXt":
        text = text[1:]
    elif name == b"iTXt":  # Two flags, a language and a translated key come first.
        text = text[2:].split(b"\0", 2)[-1]
    try:
        return zlib.decompressobj().decompress(text, _MAX_TEXT) if compressed else text
    except zlib.error:
        return b""


def _hexadecimal(text: bytes) -> bytes:
    """Returns the bytes that ImageMagick wrote as an empty line, a name, a length and hexadecimal digits."""
    try:
        return bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode())
    except ValueError:
        return b""


def _jpeg(data: bytes) -> Container:
    kept: list[bytes | memoryview] = [data[:2]]
    exif, xmp, width, height, scans, is_whole = b"", b"", 0, 0, 0, False
    for marker, start, end, behind in _jpeg_segments(data):
        content = data[start + 4 : end] if _APP0 <= marker <= _COM or marker in _FRAMES else b""
        if marker in _FRAMES:
            height, width = struct.unpack_from(">HH", content, 1)
        elif marker == _SOS:
            scans += 1
        elif marker == _APP1 and content.startswith(_EXIF):
            exif += content[len(_EXIF) :] if len(exif) < _MAX_TEXT else b""
        elif marker == _APP1 and content.startswith(_JPEG_XMP):
            xmp = content
        is_whole = marker == _EOI
        if not _is_jpeg_metadata(marker, content):
            kept.append(memoryview(data)[start:behind])
        if scans * width * height > MAX_SCANNED_PIXELS:
            raise ImageError(f"a JPEG of {width} x {height} pixels in over {scans - 1} scans; save it again")
    return Container(
        format="JPEG",
        width=width,
        height=height,
        data=_joined(kept, data),
        is_plain=is_whole,
        orientation=_orientation(exif, xmp),
    )


def _is_jpeg_metadata(marker: int, content: bytes) -> bool:
    """Tells whether libjpeg skips a segment; JFIF's and Adobe's heads it reads, as they tell the colours."""
    if marker == _APP0:
        return not content.startswith(b"JFIF\0") or len(content) < 14
    if marker == _APP14:
        return not content.startswith(b"Adobe") or len(content) < 12
    return _APP0 <= marker < 0xF0 or marker == _COM


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Yields (marker, start, end, behind) of the segments up to the end of the picture.

    `behind` is `end`, but for a scan it is where the next segment begins: its data stand between.

    Raises:
      struct.error: the file is cut off in a segment.
    """
    found = _JPEG_MARKER.search(data, 2)
    for _ in range(MAX_PARTS):
        if not found:
            return
        start, marker = found.start(), found[1][0]
        end = start + 2
        if marker not in (_SOI, _EOI, 0x01):
            (length,) = struct.unpack_from(">H", data, end)
            end += length
            if length < 2 or end > len(data):
                raise struct.error
        found = _JPEG_MARKER.search(data, end) if marker != _EOI else None
        behind = end if marker != _SOS else found.start() if found else len(data)
        yield marker, start, end, behind
    raise ImageError(f"broken JPEG: more than {MAX_PARTS} segments")


def _webp(data: bytes) -> Container:
    kept: list[bytes | memoryview] = []
    exif, xmp, frames, size = b"", b"", 0, None
    for name, chunk in _webp_chunks(data):
        content = chunk[8:]
        if name == b"EXIF":
            exif = bytes(content)
        elif name == b"XMP ":
            xmp = bytes(content)
        elif name in _WEBP_PIXELS:
            frames += name == b"ANMF"
            if frames > 1:
                continue
            if size is None:
                size = _webp_size(name, content)
            kept.append(chunk)
    if size is None:
        raise ImageError("broken WEBP: no picture in it")
    body = b"".join([b"WEBP", *kept])
    whole = b"".join([b"RIFF", struct.pack("<I", len(body)), body])
    return Container(
        format="WEBP",
        width=size[0],
        height=size[1],
        data=data if whole == data else whole,
        is_plain=not frames,
        orientation=_orientation(exif, xmp),
        frames=max(frames, 1),
    )


def _webp_chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """Yields the chunks, with their names. Raises struct.error where one with pixels is cut off."""
    position, last = 12, min(len(data), 8 + struct.unpack_from("<I", data, 4)[0])
    for _ in range(MAX_PARTS):
        if position + 8 > last:
            return
        name, size = struct.unpack_from("<4sI", data, position)
        chunk = memoryview(data)[position : position + 8 + size + size % 2]
        if len(chunk) < 8 + size and name in _WEBP_PIXELS:
            raise struct.error
        yield name, chunk
        position += len(chunk)
    raise ImageError(f"broken WEBP: more than {MAX_PARTS} chunks")


def _webp_size(name: bytes, content: memoryview) -> tuple[int, int]:
    """Returns width and height from the first chunk (https://developers.google.com/speed/webp/docs/riff_container)."""
    if name == b"VP8X":
        sides = int.from_bytes(content[4:7], "little"), int.from_bytes(content[7:10], "little")
        return sides[0] + 1, sides[1] + 1
    if name == b"VP8L":
        (bits,) = struct.unpack_from("<I", content, 1)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", content, 6)
    return width & 0x3FFF, height & 0x3FFF


def _gif(data: bytes) -> Container:
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    position = 13 + _palette_bytes(flags)
    kept, frames = [data[:position]], 0
    parts = iter(range(MAX_BLOCKS))
    for _ in parts:
        start, kind = position, data[position : position + 1]
        if kind in (b"", b";"):
            break
        if kind == b"!":
            position = _behind_blocks(data, start + 2, parts)
            # Of the extensions, only the one that tells the transparent colour changes the picture.
            if not frames and data[start + 1] == 0xF9 and data[start + 2] >= 4:
                kept.append(data[start:position])
        elif kind == b",":
            x, y, frame_width, frame_height, flags = struct.unpack_from("<4HB", data, start + 1)
            position = _behind_blocks(data, start + 11 + _palette_bytes(flags), parts)
            if not frames:
                width, height = max(width, x + frame_width), max(height, y + frame_height)
                kept += [data[start:position], b";"]
            frames += 1
        else:
            position += 1
    if not frames:
        raise ImageError("broken GIF: no picture in it")
    return Container("GIF", width, height, b"".join(kept), frames=frames)


def _palette_bytes(flags: int) -> int:
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _behind_blocks(data: bytes, position: int, parts: Iterator[int]) -> int:
    """Returns the position behind blocks that each begin with their length, and end with an empty one."""
    for _ in parts:
        if position >= len(data) or not data[position]:
            return position + 1
        position += data[position] + 1
    raise ImageError(f"broken GIF: more than {MAX_BLOCKS} blocks")


def _bmp(data: bytes) -> Container:
    (header_bytes,) = struct.unpack_from("<I", data, 14)
    compression = 0
    if header_bytes == 12:
        width, height = struct.unpack_from("<HH", data, 18)
    else:
        width, height, compression = struct.unpack_from("<Ii4xI", data, 18)
    height = abs(height)  # It is negative where the first row is the top one.
    if compression in (1, 2) and width * height > MAX_RLE_PIXELS:
        raise ImageError(f"a run-length encoded BMP of {width} x {height} pixels; save it as PNG")
    return Container("BMP", width, height, data)


def _joined(parts: list[bytes | memoryview], data: bytes) -> bytes:
    """Joins parts of `data`; it is `data` itself where nothing is left out."""
    return data if sum(map(len, parts)) == len(data) else b"".join(parts)


def _orientation(exif: bytes, xmp: bytes) -> int:
    """Returns EXIF's number of the orientation, or, if there is none, XMP's, or else UPRIGHT."""
    found = _exif_orientation(exif.removeprefix(_EXIF))
    return orientation(_xmp_orientation(xmp) if found is None else found)


def orientation(value: Any) -> int:
    """Returns EXIF's orientation, 1 to 8, from what stands in its place; UPRIGHT for anything else."""
    return value if type(value) is int and value in range(1, 9) else UPRIGHT


def _exif_orientation(exif: bytes) -> Any:
    """Returns what the first directory of EXIF data has as orientation; None where it isn't found."""
    order = {b"II": "<", b"MM": ">"}.get(exif[:2], "")
    try:
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, start)
        for place in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, numbers = struct.unpack_from(f"{order}HHI", exif, place)
            if tag == _ORIENTATION_TAG:
                if kind not in _NUMBERS or numbers != 1:
                    return ()
                return struct.unpack_from(f"{order}{_NUMBERS[kind]}", exif, place + 8)[0]
    except struct.error:
        pass
    return None


def _xmp_orientation(xmp: bytes) -> int:
    found = _XMP_ORIENTATION.search(xmp)
    return int(found[1]) if found else 0


# What stands at the beginning of files that aren't images of a kind that is read, in small letters.
_OTHERS = {
    b"<!doctype html": "an HTML page",
    b"<html": "an HTML page",
    b"<head": "an HTML page",
    b"version https://git-lfs": "a Git LFS pointer (run `git lfs pull`)",
    b"<svg": "an SVG picture",
    b"%pdf": "a PDF file",
    b"8bps": "a Photoshop file",
    b"ii*\0": "a TIFF picture",
    b"mm\0*": "a TIFF picture",
    b"\xff\n": "a JPEG XL picture",
    b"\0\0\0\x0cjxl ": "a JPEG XL picture",
    b"\0\0\0\x0cjp  ": "a JPEG 2000 picture",
}
_BRANDS = {b"avif": "an AVIF picture", b"avis": "an AVIF picture", b"heic": "a HEIC picture"}


def _why_not_an_image(data: bytes) -> str:
    if not data:
        return "no bytes"
    head = data[:512].lower()
    start = head.lstrip() if head.lstrip().startswith(b"<") else head
    what = next((what for magic, what in _OTHERS.items() if start.startswith(magic)), "")
    if data[4:8] == b"ftyp":
        what = _BRANDS.get(data[8:12], "a HEIC picture or a video")
    if what:
        return (
            f"{what}, not an image that is read; convert it to PNG or JPEG"
            if "pict" in what
            else f"{what}, not an image"
        )
    return f"neither JPEG, PNG, WebP, GIF nor BMP, or its head is broken (begins with {data[:8]!r})"


_MAGIC = {_PNG: "PNG", b"\xff\xd8\xff": "JPEG", b"RIFF": "WEBP", b"GIF8": "GIF", b"BM": "BMP"}
_READERS = {"PNG": _png, "JPEG": _jpeg, "WEBP": _webp, "GIF": _gif, "BMP": _bmp}
