"""Resizing of pictures to the model's square, without TensorFlow.

The pixels equal those of `augmentation.show` in training without augmentation; in 'centre_crop' to one level.
"""

import numpy as np
from jaxtyping import Int, Int32, UInt8
from PIL import Image

FITS = ("resize", "letterbox", "centre_crop")
# The longer side of a picture that is cropped, in units of its shorter one.
_LONGEST = 256


def square(
    image: UInt8[np.ndarray, "height width 3"], side: int, fit: str
) -> tuple[UInt8[np.ndarray, "{side} {side} 3"], Int32[np.ndarray, " 4"]]:
    """Brings a picture to the model's square.

    Args:
      image: the picture.
      side: side of the square, in pixels.
      fit: 'resize' squeezes the picture into the square; 'letterbox' keeps its aspect and pads with black;
        'centre_crop' keeps its aspect and cuts off what is beside the middle, as CLIP's does.

    Returns:
      The square, and the picture's place in it: its first row and column, and those after its last.
    """
    if fit == "centre_crop":
        return centre_crop(image, side), np.array([0, 0, side, side], np.int32)
    size = np.array(image.shape[:2])
    box = np.array([0, 0, side, side], np.int32) if fit == "resize" else letterbox(size, side)
    top, left, bottom, right = box.tolist()
    shown = resample(image, (bottom - top, right - left))
    if fit == "resize":
        return shown, box
    return np.pad(shown, ((top, side - bottom), (left, side - right), (0, 0))), box


def centre_crop(
    image: UInt8[np.ndarray, "height width 3"], side: int
) -> UInt8[np.ndarray, "{side} {side} 3"]:
    """Resizes a picture's shorter side to `side`, by Pillow's cubic filter, and takes the middle.

    So do CLIP's image processors.
    """
    if image.shape[:2] == (side, side):
        return image
    # Resizing all of a long strip would fill the memory. Its ends are out of the filter's reach.
    for axis in (0, 1):
        extra = image.shape[axis] - _LONGEST * min(image.shape[:2])
        if extra > 0:
            image = image.swapaxes(0, axis)[extra // 2 : image.shape[axis] - extra // 2].swapaxes(0, axis)
    (height, width), (top, left) = cropped(image.shape[:2], side)
    shown = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(shown)[top : top + side, left : left + side]


def cropped(size: tuple[int, ...], side: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns a picture's height and width before it is cropped, and the first row and column of the square.

    >>> cropped((100, 250), 64)
    ((64, 160), (0, 48))
    """
    height, width = (int(side * length / min(size)) for length in size)
    return (height, width), ((height - side) // 2, (width - side) // 2)


def letterbox(size: Int[np.ndarray, " 2"], side: int) -> Int32[np.ndarray, " 4"]:
    """Places a picture of this height and width, with its aspect, in the middle of the square.

    The result is its first row and column, and those after its last.

    >>> letterbox(np.array([100, 200]), 64).tolist()
    [16, 0, 48, 64]
    """
    sizes = np.maximum(np.round(size * side / size.max()).astype(np.int32), 1)
    starts = (side - sizes) // 2
    return np.concatenate([starts, starts + sizes])


def resample(
    image: UInt8[np.ndarray, "height width channels"], size: tuple[int, int]
) -> UInt8[np.ndarray, "{size[0]} {size[1]} channels"]:
    """Resizes a picture linearly, and averages where it shrinks.

    The arithmetic is that of TensorFlow's `ScaleAndTranslate` with a triangle kernel, in the same order and
    in float32, so that sums between two levels are rounded alike.
    """
    if image.shape[:2] == tuple(size):
        return image
    pixels = _weighted_rows(image, size[0])
    pixels = _weighted_rows(pixels.swapaxes(0, 1), size[1]).swapaxes(0, 1)
    return (pixels + np.float32(0.5)).astype(np.uint8)


def _weighted_rows(image: np.ndarray, count: int) -> np.ndarray:
    """Resizes the rows: [rows, columns, channels] -> float32 [count, columns, channels]."""
    starts, weights = _spans(image.shape[0], count)
    total = np.zeros((count, *image.shape[1:]), np.float32)
    for i, of_each in enumerate(weights):
        rows = np.minimum(starts + i, image.shape[0] - 1)  # Rows beyond the last have weight 0.
        total += of_each[:, None, None] * image[rows].astype(np.float32, copy=False)
    return total


def _spans(rows: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Finds the first source row of each new row, int [count], and its weights, float32 [span, count]."""
    one = np.float32(1)
    scale = np.float32(count) / np.float32(rows)
    width = max(one / scale, one)  # The kernel is wider where the picture shrinks.
    centres = (np.arange(count, dtype=np.float32) + np.float32(0.5)) * (one / scale)
    half = np.float32(0.5)
    first = np.clip(np.ceil(centres - width - half), 0, rows - 1).astype(np.int64)
    last = np.clip(np.floor(centres + width - half), 0, rows - 1).astype(np.int64)
    sources = first[None] + np.arange((last - first).max() + 1)[:, None]
    distance = np.abs((sources.astype(np.float32) + half - centres) * (one / width))
    weights = np.where(sources <= last, np.maximum(one - distance, 0), 0).astype(np.float32)
    total = np.zeros(count, np.float32)
    for row in weights:
        total += row
    return first, weights * (one / total)
