"""Images as people store them -> bytes that TensorFlow decodes to what a viewer shows.

JPEG, PNG, WebP, GIF and BMP are taken, in any colour mode. Free of TensorFlow.
"""

import io
import warnings

import numpy as np
from PIL import ExifTags, Image, ImageOps

# Of each side, in pixels.
MAX_SIDE = 8192

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
# How a complete file ends. Where it doesn't (something follows, or is missing), TensorFlow and Pillow differ.
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"\0\0\0\0IEND\xaeB`\x82", "WEBP": b""}
# Bytes 24 and 25 of a PNG: bits a sample and colour type (https://www.w3.org/TR/png-3/#11IHDR).
_PNG_DEPTH_AND_TYPE = slice(24, 26)
_PLAIN_PNG = (b"\x08\x00", b"\x08\x02")  # 8-bit greyscale, 8-bit RGB
_UPRIGHT = 1
_REFUSED = "{}, not a picture of 8 bits a colour; save it as an RGB PNG"


class ImageError(ValueError):
    """Why there is no picture in these bytes."""


def checked(data: bytes) -> bytes:
    """An image's bytes, such that TensorFlow shows what Pillow shows.

    `tf.io.decode_image(checked(data), channels=3, expand_animations=False)` works, and gives the picture
    upright, over white where it is transparent, and the first frame of an animation. An upright greyscale or
    RGB image of 8 bits stays as it is (JPEG, PNG, WebP); any other is encoded as PNG, without loss beside its
    alpha, its further frames and bits beyond eight.

    All pixels are decoded once, so that a file that is cut off is found here. The size is known before that:
    what memory it takes is bounded by MAX_SIDE (0.9 GB at 8192 x 8192 pixels with alpha).

    Raises:
      ImageError: no image, one that is cut off or broken, or one of more than MAX_SIDE pixels a side.
    """
    image = _open(data)
    try:
        return data if _is_plain(image, data) else _as_png(image)
    except Exception as error:
        raise ImageError(f"broken {image.format}: {error}") from None


def decode(data: bytes, convert: bool = True) -> np.ndarray:
    """An image's bytes -> uint8 [height, width, 3], the picture that TensorFlow shows of `checked(data)`.

    Args:
      data: a file.
      convert: whether pictures are taken that have more to show than 8 bits of red, green and blue: those of
        16 bits, of inks (CMYK), and animations.

    Raises:
      ImageError: as `checked`; or the picture would have to be converted, and must not.
    """
    image = _open(data)
    if not convert and image.format == "PNG" and data[_PNG_DEPTH_AND_TYPE][0] == 16:
        raise ImageError(_REFUSED.format("an image of 16 bits a colour"))
    return np.asarray(image.convert("RGB")) if _is_plain(image, data) else of_pillow(image, convert)


def of_pillow(image: Image.Image, convert: bool = True) -> np.ndarray:
    """A picture in memory -> uint8 [height, width, 3], as `decode` gives its file's."""
    if not convert and (what := _more_than_rgb(image)):
        raise ImageError(_REFUSED.format(what))
    try:
        return np.asarray(_upright(image).convert("RGB"))
    except Exception as error:  # As in `_open`: a picture in memory may be a file that isn't read yet.
        raise ImageError(f"broken {image.format or image.mode}: {error}") from None


def _more_than_rgb(image: Image.Image) -> str:
    """What a picture has that is lost as 8 bits of red, green and blue; '' where nothing is."""
    # MPO: a camera's JPEG with another view behind the picture.
    if (frames := getattr(image, "n_frames", 1)) > 1 and image.format != "MPO":
        return f"an animation of {frames} frames"
    if image.mode.startswith(("I", "F")):
        return "an image of 16 bits or more a colour"
    return f"an image in {image.mode}" if image.mode in ("CMYK", "LAB", "YCbCr", "HSV") else ""


def _open(data: bytes) -> Image.Image:
    """An image, all its pixels decoded; see `checked`."""
    if not data:
        raise ImageError("no bytes")
    # Pillow raises what it likes at broken files (OSError, SyntaxError, ValueError, struct.error, ...), also
    # where text in a PNG would inflate to more than a megabyte.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # Our own limit is below.
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.UnidentifiedImageError:
        raise ImageError(_why_not_an_image(data)) from None
    except Exception as error:
        raise ImageError(f"broken or too large: {error}") from None
    if max(image.size) > MAX_SIDE:
        width, height = image.size
        raise ImageError(f"{width} x {height} pixels; at most {MAX_SIDE} x {MAX_SIDE} are taken")
    try:
        if image.format == "PNG":  # Loading alone does not look at all checksums; libpng's readers do.
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
    """Whether TensorFlow shows a loaded image as Pillow does."""
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
    """A picture as a viewer shows it, greyscale or RGB of 8 bits."""
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
    image.info.clear()  # Among others a profile that belongs to the colours as they were.
    return image
