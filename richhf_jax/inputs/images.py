"""Decodes image files to the picture that a viewer shows, or checks them for TensorFlow.

It takes JPEG, PNG, WebP, GIF and BMP in any colour mode. It doesn't need TensorFlow, and changes nothing that
is global, such as Pillow's limits or the filters of warnings: it may run in any thread of any program.

`containers` bounds the costs before anything is decoded: the largest pictures take up to 1.5 GiB of memory,
and some seconds. A program that sets Pillow's LOAD_TRUNCATED_IMAGES gets files that are cut off, too.
"""

import io

import numpy as np
from PIL import ExifTags, Image

from richhf_jax.inputs import containers
from richhf_jax.inputs.containers import MAX_SIDE, ImageError

__all__ = ["MAX_SIDE", "ImageError", "checked", "count_pixels", "decode", "of_pillow"]

_REFUSED = "{}, not a picture of 8 bits a colour; save it as an RGB PNG"
# EXIF's orientation -> what turns the picture upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def checked(data: bytes) -> bytes:
    """Returns an image's bytes, changed if need be so that TensorFlow shows what Pillow shows.

    `tf.io.decode_image(checked(data), channels=3, expand_animations=False)` gives the picture upright, over
    white where it is transparent, and the first frame of an animation. An upright greyscale or RGB image of 8
    bits (JPEG, PNG, WebP) loses only what isn't pixels: text, colour profiles, EXIF, what follows the
    picture. Any other is encoded as PNG, and loses its alpha, its further frames and the bits beyond eight.

    All pixels are decoded once, so a file that is cut off is found here.

    Raises:
      ImageError: the bytes are no image, or one that is cut off, broken, larger than MAX_SIDE a side, or too
        costly to decode.
    """
    container = containers.read(data)
    image = _decoded(container)
    if container.is_plain and container.orientation == containers.UPRIGHT and _is_plain(image):
        return container.data
    buffer = io.BytesIO()
    _upright(image, container.orientation).save(buffer, "PNG")
    return buffer.getvalue()


def decode(data: bytes, convert: bool = True) -> np.ndarray:
    """Decodes an image to uint8 [height, width, 3], the picture that TensorFlow shows of `checked(data)`.

    Args:
      data: a file's bytes.
      convert: whether to take pictures that have more to show than 8 bits of red, green and blue: pictures of
        16 bits or in inks (CMYK), and animations.

    Raises:
      ImageError: see `checked`; or `convert` is False and the picture would have to be converted.
    """
    container = containers.read(data)
    if not convert and container.frames > 1:
        raise ImageError(_REFUSED.format(f"an animation of {container.frames} frames"))
    if not convert and container.bits == 16:
        raise ImageError(_REFUSED.format("an image of 16 bits a colour"))
    image = _decoded(container)
    if not convert and (what := _more_than_rgb(image)):
        raise ImageError(_REFUSED.format(what))
    return _array(_upright(image, container.orientation))


def count_pixels(data: bytes) -> int:
    """Returns the number of pixels that `decode` will make, by the image's head; 0 if that can't be read."""
    try:
        container = containers.read(data)
    except ImageError:  # `decode` says why.
        return 0
    return container.width * container.height


def of_pillow(image: Image.Image, convert: bool = True) -> np.ndarray:
    """Converts a picture in memory to uint8 [height, width, 3], as `decode` does with a file.

    Args:
      image: the picture; it may be a file that isn't read yet.
      convert: see `decode`.

    Raises:
      ImageError: the file is broken; or `convert` is False and the picture would have to be converted.
    """
    # MPO is a camera's JPEG with another view behind the picture.
    if not convert and getattr(image, "is_animated", False) and image.format != "MPO":
        raise ImageError(_REFUSED.format(f"an animation of {image.n_frames} frames"))  # pyright: ignore
    if not convert and (what := _more_than_rgb(image)):
        raise ImageError(_REFUSED.format(what))
    try:
        image.load()
        return _array(_upright(image, _orientation(image)))
    except Exception as error:  # Pillow raises many types, see `_decoded`.
        raise ImageError(f"broken {image.format or image.mode}: {error}") from None


def _more_than_rgb(image: Image.Image) -> str:
    """Names what a picture loses if converted to 8 bits of red, green and blue; '' if nothing."""
    if image.mode.startswith(("I", "F")):
        return "an image of 16 bits or more a colour"
    return f"an image in {image.mode}" if image.mode in ("CMYK", "LAB", "YCbCr", "HSV") else ""


def _decoded(container: containers.Container) -> Image.Image:
    """Decodes all pixels. Raises ImageError, see `checked`."""
    # Pillow raises many types at broken files: OSError, SyntaxError, ValueError, struct.error, ...
    try:
        image = Image.open(io.BytesIO(container.data), formats=[container.format])
        if image.size != (container.width, container.height):
            raise ValueError("it has several sizes")
        image.load()
    except Image.UnidentifiedImageError:
        raise ImageError(f"broken {container.format}: its head can't be read") from None
    except Exception as error:
        raise ImageError(f"broken {container.format}: {error}") from None
    return image


def _array(image: Image.Image) -> np.ndarray:
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _is_plain(image: Image.Image) -> bool:
    """Tells whether a picture has nothing to convert."""
    return image.mode in ("L", "RGB") and not image.has_transparency_data


def _orientation(image: Image.Image) -> int:
    try:
        return containers.orientation(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # Broken EXIF doesn't make pixels bad.
        return containers.UPRIGHT


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    """Returns a loaded picture as a viewer shows it, greyscale or RGB of 8 bits."""
    if orientation in _TURNS:
        image = image.transpose(_TURNS[orientation])
    if image.mode.startswith("I"):  # 16-bit greyscale: Pillow's own conversion cuts values off at 255.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        flat = Image.new("RGB", image.size, "white")
        flat.paste(image, mask=image.getchannel("A"))
        return flat
    return image if image.mode == "L" else image.convert("RGB")
