"""Decodes image files to the picture that a viewer shows, or checks them for TensorFlow.

It takes JPEG, PNG, WebP, GIF and BMP in any colour mode. It doesn't need TensorFlow.
"""

import io
import warnings

import numpy as np
from PIL import ExifTags, Image, ImageOps

# Largest side of an image, in pixels.
MAX_SIDE = 8192

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
# The last bytes of a complete file. Where something follows or is missing, TensorFlow and Pillow differ.
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"\0\0\0\0IEND\xaeB`\x82", "WEBP": b""}
# Bytes 24 and 25 of a PNG: bits a sample and colour type (https://www.w3.org/TR/png-3/#11IHDR).
_PNG_DEPTH_AND_TYPE = slice(24, 26)
_PLAIN_PNG = (b"\x08\x00", b"\x08\x02")  # 8-bit greyscale, 8-bit RGB
_UPRIGHT = 1
_REFUSED = "{}, not a picture of 8 bits a colour; save it as an RGB PNG"


class ImageError(ValueError):
    """There is no usable picture in a file's bytes; the message says why."""


def checked(data: bytes) -> bytes:
    """Returns an image's bytes, changed if need be so that TensorFlow shows what Pillow shows.

    `tf.io.decode_image(checked(data), channels=3, expand_animations=False)` gives the picture upright, over
    white where it is transparent, and the first frame of an animation. An upright greyscale or RGB image of 8
    bits (JPEG, PNG, WebP) stays as it is. Any other is encoded as PNG; it loses only its alpha, its further
    frames and the bits beyond eight.

    All pixels are decoded once, so a file that is cut off is found here. Its size is checked before, so
    MAX_SIDE bounds the memory (0.9 GB at 8192 x 8192 pixels with alpha).

    Raises:
      ImageError: the bytes are no image, or one that is cut off, broken or larger than MAX_SIDE a side.
    """
    image = _open(data)
    try:
        return data if _is_plain(image, data) else _as_png(image)
    except Exception as error:
        raise ImageError(f"broken {image.format}: {error}") from None


def decode(data: bytes, convert: bool = True) -> np.ndarray:
    """Decodes an image to uint8 [height, width, 3], the picture that TensorFlow shows of `checked(data)`.

    Args:
      data: a file's bytes.
      convert: whether to take pictures that have more to show than 8 bits of red, green and blue: pictures of
        16 bits or in inks (CMYK), and animations.

    Raises:
      ImageError: see `checked`; or `convert` is False and the picture would have to be converted.
    """
    image = _open(data)
    if not convert and image.format == "PNG" and data[_PNG_DEPTH_AND_TYPE][0] == 16:
        raise ImageError(_REFUSED.format("an image of 16 bits a colour"))
    return np.asarray(image.convert("RGB")) if _is_plain(image, data) else of_pillow(image, convert)


def count_pixels(data: bytes) -> int:
    """Returns the number of pixels that `decode` will make, by the image's head; 0 if that can't be read."""
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            return image.width * image.height
    except Exception:  # `decode` says why.
        return 0


def of_pillow(image: Image.Image, convert: bool = True) -> np.ndarray:
    """Converts a picture in memory to uint8 [height, width, 3], as `decode` does with a file.

    Args:
      image: the picture; it may be a file that isn't read yet.
      convert: see `decode`.

    Raises:
      ImageError: the file is broken; or `convert` is False and the picture would have to be converted.
    """
    if not convert and (what := _more_than_rgb(image)):
        raise ImageError(_REFUSED.format(what))
    try:
        return np.asarray(_upright(image).convert("RGB"))
    except Exception as error:  # Pillow raises many types, see `_open`.
        raise ImageError(f"broken {image.format or image.mode}: {error}") from None


def _more_than_rgb(image: Image.Image) -> str:
    """Names what a picture loses if converted to 8 bits of red, green and blue; '' if nothing."""
    # MPO is a camera's JPEG with another view behind the picture.
    if (frames := getattr(image, "n_frames", 1)) > 1 and image.format != "MPO":
        return f"an animation of {frames} frames"
    if image.mode.startswith(("I", "F")):
        return "an image of 16 bits or more a colour"
    return f"an image in {image.mode}" if image.mode in ("CMYK", "LAB", "YCbCr", "HSV") else ""


def _open(data: bytes) -> Image.Image:
    """Opens an image and decodes all its pixels. Raises ImageError, see `checked`."""
    if not data:
        raise ImageError("no bytes")
    # Pillow raises many types at broken files (OSError, SyntaxError, ValueError, struct.error, ...), also
    # where text in a PNG would inflate to more than a megabyte.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_SIDE is the limit.
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.UnidentifiedImageError:
        raise ImageError(_why_not_an_image(data)) from None
    except Exception as error:
        raise ImageError(f"broken or too large: {error}") from None
    if max(image.size) > MAX_SIDE:
        width, height = image.size
        raise ImageError(f"{width} x {height} pixels; at most {MAX_SIDE} x {MAX_SIDE} are taken")
    try:
        if image.format == "PNG":  # Loading alone doesn't check all checksums; readers with libpng do.
            Image.open(io.BytesIO(data)).verify()
        image.load()
        return image
    except Exception as error:
        raise ImageError(f"broken {image.format}: {error}") from None


def _why_not_an_image(data: bytes) -> str:
    start = data[:512].lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head")):
        return "an HTML page, not an image"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not an image (run `git lfs pull`)"
    return f"neither JPEG, PNG, WebP, GIF nor BMP, or its head is broken (begins with {data[:8]!r})"


def _is_plain(image: Image.Image, data: bytes) -> bool:
    """Tells whether TensorFlow shows a loaded image as Pillow does."""
    return (
        image.format in _ENDS
        and data.endswith(_ENDS[image.format])
        and image.mode in ("L", "RGB")
        and not image.has_transparency_data
        and (image.format != "PNG" or data[_PNG_DEPTH_AND_TYPE] in _PLAIN_PNG)
        and getattr(image, "n_frames", 1) == 1
        and image.getexif().get(ExifTags.Base.Orientation, _UPRIGHT) == _UPRIGHT
    )


def _as_png(image: Image.Image) -> bytes:
    image = _upright(image)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _upright(image: Image.Image) -> Image.Image:
    """Returns a picture as a viewer shows it, greyscale or RGB of 8 bits."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit greyscale: Pillow's own conversion cuts values off at 255.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        flat = Image.new("RGB", image.size, "white")
        flat.paste(image, mask=image.getchannel("A"))
        image = flat
    elif image.mode != "L":
        image = image.convert("RGB")
    image.info.clear()  # It may hold a colour profile of the picture before conversion.
    return image
