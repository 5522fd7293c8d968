"""A heatmap as a picture: its colours, and the picture laid over an image.

Needs numpy and Pillow alone.
"""

import io

import numpy as np
from PIL import Image

# How strongly a heatmap covers the image beneath it, unless asked otherwise.
OPACITY = 0.85

# Nine colours, evenly spaced, of matplotlib's "inferno" (CC0), whose lightness rises evenly with the value.
COLOURS = np.array(
    [
        (0, 0, 4), (31, 12, 72), (85, 15, 109), (136, 34, 106), (186, 54, 85),
        (227, 89, 51), (249, 140, 10), (249, 201, 50), (252, 255, 164),
    ]
)  # fmt: skip
# Heat fades in up to this value: one rater of three (1/3) is plainly seen, noise of a few percent is not.
_OPAQUE_HEAT = 0.4


def resize(heatmap: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A heatmap [height, width] -> float32 of `size` (width, height), bilinearly."""
    if heatmap.shape == (size[1], size[0]):
        return heatmap
    return np.asarray(Image.fromarray(heatmap.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))


def picture(heatmap: np.ndarray) -> Image.Image:
    """A heatmap [height, width] in [0, 1] -> RGBA of that size, transparent where there is no heat."""
    stops = np.linspace(0, 1, len(COLOURS))
    channels = [np.interp(heatmap, stops, channel) for channel in COLOURS.T]
    alpha = 255 * np.clip(np.float64(heatmap) / _OPAQUE_HEAT, 0, 1)
    return Image.fromarray(np.round(np.stack([*channels, alpha], axis=-1)).astype(np.uint8))


def draw(image: np.ndarray, heatmap: np.ndarray, opacity: float = OPACITY) -> Image.Image:
    """Lays a heatmap over an image.

    Args:
      image: uint8 [height, width, 3].
      heatmap: float32 [height, width] in [0, 1]; one of another size is stretched over the image.
      opacity: of the hottest places, 0 (only the image is seen) to 1 (only the heat).

    Returns:
      RGB of the image's size.
    """
    drawn = Image.fromarray(image)
    heat = picture(resize(heatmap, drawn.size))
    drawn.paste(heat, mask=heat.getchannel("A").point([round(alpha * opacity) for alpha in range(256)]))
    return drawn


def grey_png(heatmap: np.ndarray) -> bytes:
    """A heatmap [height, width] in [0, 1] -> an 8-bit greyscale PNG, 255 = 1: RichHF-18K's own form."""
    return png(Image.fromarray(np.round(np.clip(heatmap, 0, 1) * 255).astype(np.uint8)))


def png(picture: Image.Image) -> bytes:
    """A picture as a PNG file, quickly rather than small."""
    buffer = io.BytesIO()
    # Level 1 takes a third of the time of 6, for a few percent of size.
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
