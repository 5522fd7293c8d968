"""Recognises a picture's background: a muted colour, plain or in a pattern."""

import dataclasses
import functools
import math

import numpy as np
from scipy import ndimage

from richhf_jax.datasets import drawing

# Pixels along a side at which the oracle looks; finer pictures are reduced.
SIDE = 64
# What is drawn is drawn this many times finer.
OVERSAMPLING = 3
# What may be background, by HSV and the distance from objects' colours: wider than the world's backgrounds.
_MAX_SATURATION, _VALUES, _FAR = 0.5, (0.36, 0.9), 40
# Largest difference from the background's own hue and saturation, of parts of the brightest channel.
_SAME_COLOUR = 0.05
# Grey levels between a background's pixel and its fit.
_FIT = 22
# A pattern follows the pixels' brightness this closely, and its two colours are this far apart. A gradient's
# brightness changes by this much over a side.
_MIN_CORRELATION, _MIN_CONTRAST, _MIN_SLOPE = 0.8, 0.05, 0.035


@dataclasses.dataclass(frozen=True)
class Background:
    """A background.

    Attributes:
      kind: "plain", "gradient", "stripes" or "checks".
      saturation: of HSV, 0 to 1.
      image: float32 [SIDE, SIDE, 3], grey levels of 255: the background alone.
    """

    kind: str
    saturation: float
    image: np.ndarray


@functools.cache
def _patterns() -> np.ndarray:
    """Makes stripes at each angle, then checks; float [n, SIDE, SIDE], 0 to 1. They repeat as `drawing`'s."""
    side = SIDE * OVERSAMPLING
    axis = np.arange(side) / side - 0.5
    masks = [
        (axis * math.cos(angle) + axis[:, None] * math.sin(angle)) * drawing.STRIPES % 1 < 0.5
        for angle in np.arange(0, 2 * math.pi, math.pi / 90)
    ]
    odd = np.floor(axis * drawing.STRIPES) % 2 == 1
    masks.append(odd ^ odd[:, None])
    return reduced(np.array(masks, np.float32))


def reduced(masks: np.ndarray) -> np.ndarray:
    """Reduces masks that are drawn finer: [..., n * SIDE, n * SIDE] to [..., SIDE, SIDE]."""
    fine = masks.shape[-1] // SIDE
    return masks.reshape(*masks.shape[:-2], SIDE, fine, SIDE, fine).mean((-3, -1))


def recognise(image: np.ndarray) -> Background:
    """Fits the world's backgrounds to a picture, float32 [SIDE, SIDE, 3] of grey levels."""
    value = image.max(-1) / 255
    saturation = 1 - (image.min(-1) / 255) / np.maximum(value, 1e-6)
    colour = image / 255 / np.maximum(value, 1e-6)[..., None]
    likely = _likely(image, value, saturation, colour)
    used = likely
    for _ in range(3):
        kind, brightness = _fit(value, used)
        fit = brightness[..., None] * np.median(colour[used], axis=0) * 255
        near = likely & (np.abs(image - fit).max(-1) < _FIT)
        used = near if near.sum() > SIDE else likely
    return Background(kind, float(np.median(saturation[used])), fit.astype(np.float32))


def _likely(image: np.ndarray, value: np.ndarray, saturation: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Chooses pixels, bool [SIDE, SIDE], that are most likely background: of one hue, away from objects."""
    fills = np.array(list(drawing.RGB.values()))
    distance = np.linalg.norm(image[:, :, None] - fills, axis=-1).min(-1)
    low, high = _VALUES
    chosen = (saturation < _MAX_SATURATION) & (value > low) & (value < high) & (distance > _FAR)
    if not chosen.any():
        return np.ones_like(chosen)
    for _ in range(3):
        near = chosen & (np.abs(colour - np.median(colour[chosen], axis=0)).max(-1) < _SAME_COLOUR)
        chosen = near if near.any() else chosen
    # Grey outlines are as muted as backgrounds, but thin.
    inner = ndimage.binary_erosion(chosen)
    return inner if inner.sum() > SIDE else chosen


def _fit(value: np.ndarray, used: np.ndarray) -> tuple[str, np.ndarray]:
    """Returns the kind of background, and its brightness [SIDE, SIDE], by the pixels that are `used`."""
    given = value[used]
    axis = (np.arange(SIDE) + 0.5) / SIDE - 0.5
    plane = np.stack([np.ones((SIDE, SIDE)), *np.meshgrid(axis, axis)])
    slopes = np.linalg.lstsq(plane[:, used].T, given, rcond=None)[0]
    gradient = np.tensordot(slopes, plane, 1)
    is_gradient = math.hypot(*slopes[1:]) > _MIN_SLOPE
    patterns = _patterns()
    seen = patterns[:, used]
    seen = seen - seen.mean(1, keepdims=True)
    centred = given - given.mean()
    products, squares = seen @ centred, (seen**2).sum(1) + 1e-9
    correlations = np.abs(products) / np.sqrt(squares * (centred**2).sum() + 1e-9)
    best = int(correlations.argmax())
    contrast = products[best] / squares[best]
    as_gradient = np.corrcoef(gradient[used], given)[0, 1] if is_gradient else 0
    if correlations[best] > max(_MIN_CORRELATION, as_gradient) and abs(contrast) > _MIN_CONTRAST:
        pattern = given.mean() + contrast * (patterns[best] - patterns[best][used].mean())
        return "checks" if best == len(patterns) - 1 else "stripes", pattern
    if is_gradient:
        return "gradient", gradient
    return "plain", np.full((SIDE, SIDE), np.median(given))
