"""Draws shapes and backgrounds. Lengths are shares of the picture's side; y points down."""

import math

import numpy as np
from PIL import Image, ImageDraw

RGB = {
    "red": (218, 40, 42),
    "orange": (246, 142, 32),
    "green": (44, 160, 66),
    "blue": (40, 88, 216),
    "white": (248, 248, 246),
    "black": (28, 28, 32),
}
# Half as bright as the fill. Black's is brighter: a darker one wouldn't be visible.
OUTLINES = {name: tuple(value // 2 for value in rgb) for name, rgb in RGB.items()} | {
    "black": (128, 128, 132)
}
# The fill's scale inside the outline. A ring's outline is on both sides.
FILL_SCALE = 0.86
RING_HOLE = 0.52
STRIPES = 7  # pairs of stripes across the picture


def _regular(corners: int, inner: float | None = None) -> list[tuple[float, float]]:
    """Makes a regular polygon, first corner up; or a star with every other corner at radius `inner`."""
    radii = [1.0] if inner is None else [1.0, inner]
    points = corners * len(radii)
    angles = [2 * math.pi * i / points - math.pi / 2 for i in range(points)]
    return [
        (radii[i % len(radii)] * math.cos(a), radii[i % len(radii)] * math.sin(a))
        for i, a in enumerate(angles)
    ]


_ARM = 0.33
_CROSS = [
    *[(_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM), (_ARM, 1)],
    *[(-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM), (-_ARM, -1)],
]
# Outlines within the unit circle, or nearly.
POLYGONS = {
    "circle": _regular(40),
    "ring": _regular(40),
    "square": [(-0.84, -0.84), (0.84, -0.84), (0.84, 0.84), (-0.84, 0.84)],
    "triangle": [(0, -1), (1, 0.8), (-1, 0.8)],
    "star": _regular(5, inner=0.45),
    "cross": _CROSS,
}


def shape_masks(shape: str, x: float, y: float, radius: float, angle: float, side: int) -> np.ndarray:
    """Draws the masks of a shape's outline and fill.

    Args:
      shape: a key of POLYGONS.
      x, y, radius: centre and radius, in shares of the side.
      angle: rotation, in radians.
      side: the picture's side, in pixels.

    Returns:
      uint8 [2, side, side], 0 or 255: the whole object, and its part inside the outline.
    """
    cos, sin = math.cos(angle), math.sin(angle)

    def polygon(scale):
        length = radius * scale * side
        return [
            (x * side + length * (px * cos - py * sin), y * side + length * (px * sin + py * cos))
            for px, py in POLYGONS[shape]
        ]

    masks = []
    for scale, hole in ((1.0, RING_HOLE), (FILL_SCALE, RING_HOLE + 1 - FILL_SCALE)):
        mask = Image.new("L", (side, side))
        draw = ImageDraw.Draw(mask)
        draw.polygon(polygon(scale), fill=255)
        if shape == "ring":
            draw.polygon(polygon(hole), fill=0)
        masks.append(np.asarray(mask))
    return np.stack(masks)


def paint(canvas: Image.Image, masks: np.ndarray, colour: str) -> None:
    """Paints an object's outline and fill on the canvas, through uint8 masks [2, side, side]."""
    for layer, rgb in zip(masks, (OUTLINES[colour], RGB[colour]), strict=True):
        mask = Image.fromarray(layer)
        if box := mask.getbbox():
            canvas.paste(rgb, box, mask.crop(box))


def background(kind: str, first: tuple, second: tuple, angle: float, side: int) -> Image.Image:
    """Draws a background of two RGB colours: 'plain' (only the first), 'gradient', 'stripes' or 'checks'.

    `angle` (radians) turns the gradient and the stripes.
    """
    over, under = (
        Image.new("RGB", (side, side), tuple(int(v) for v in colour)) for colour in (second, first)
    )
    if kind == "plain":
        return under
    axis = np.arange(side, dtype=np.float32) / side - 0.5
    along = axis * math.cos(angle) + axis[:, None] * math.sin(angle)
    if kind == "gradient":
        share = along / math.sqrt(2) + 0.5
    elif kind == "stripes":
        share = along * STRIPES % 1 < 0.5
    else:
        odd = np.floor(axis * STRIPES) % 2 == 1
        share = odd ^ odd[:, None]
    return Image.composite(over, under, Image.fromarray((share * np.float32(255)).astype(np.uint8)))
