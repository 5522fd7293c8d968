"""Draws a heatmap as a picture: its colours, and the picture laid over an image.

This module needs only numpy and Pillow.
"""

import io

import numpy as np
from PIL import Image

# Default opacity of the hottest places of a heatmap over an image.
OPACITY = 0.85

# Nine colours, evenly spaced, of matplotlib's "inferno" (CC0), whose lightness rises evenly with the value.
COLOURS = np.array(
    [
        (0, 0, 4), (31, 12, 72), (85, 15, 109), (136, 34, 106), (186, 54, 85),
        (227, 89, 51), (249, 140, 10), (249, 201, 50), (252, 255, 164),
    ]
)  # fmt: skip
# From this heat on, the picture is opaque; below, it fades. So one rater of three (1/3) is plainly seen, and
# noise of a few percent is not.
_OPAQUE_HEAT = 0.4
_STRIP_PIXELS = 1 << 18


def resize(heatmap: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes a heatmap [height, width] bilinearly to float32 of `size`, which is (width, height)."""
    if heatmap.shape == (size[1], size[0]):
        return heatmap
    return np.asarray(Image.fromarray(heatmap.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))


def picture(heatmap: np.ndarray) -> Image.Image:
    """Colours a heatmap [height, width] in [0, 1]: RGBA of its size, transparent where there is no heat."""
    stops = np.linspace(0, 1, len(COLOURS))
    pixels = np.empty((*heatmap.shape, 4), np.uint8)
    # A few rows at a time, because float64 takes many times the space of the picture.
    rows = max(_STRIP_PIXELS // heatmap.shape[1], 1)
    for start in range(0, heatmap.shape[0], rows):
        strip, heat = pixels[start : start + rows], heatmap[start : start + rows]
        for channel, colours in enumerate(COLOURS.T):
            strip[..., channel] = np.round(np.interp(heat, stops, colours))
        strip[..., 3] = np.round(255 * np.clip(np.float64(heat) / _OPAQUE_HEAT, 0, 1))
    return Image.fromarray(pixels)


def draw(image: np.ndarray, heatmap: np.ndarray, opacity: float = OPACITY) -> Image.Image:
    """Lays a heatmap over an image.

    Args:
      image: uint8 [height, width, 3].
      heatmap: float32 [height, width] in [0, 1]; a heatmap of another size is stretched over the image.
      opacity: opacity of the hottest places, from 0 (only the image is seen) to 1 (only the heat).

    Returns:
      An RGB picture of the image's size.
    """
    drawn = Image.fromarray(image)
    heat = picture(resize(heatmap, drawn.size))
    drawn.paste(heat, mask=heat.getchannel("A").point([round(alpha * opacity) for alpha in range(256)]))
    return drawn


def grey_png(heatmap: np.ndarray) -> bytes:
    """Encodes a heatmap [height, width] in [0, 1] as RichHF-18K does: an 8-bit greyscale PNG, 255 = 1."""
    levels = np.clip(heatmap, 0, 1)
    levels *= 255
    return png(Image.fromarray(np.round(levels, out=levels).astype(np.uint8)))


def png(picture: Image.Image) -> bytes:
    """Encodes a picture as PNG, fast rather than small."""
    buffer = io.BytesIO()
    # Level 1 takes a third of the time of level 6, and makes files a few percent larger.
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
