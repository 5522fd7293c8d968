"""Draws the visible flaws of generated pictures into a known region.

An object's artifact maps the object's masks (uint8 [2, side, side]: see `drawing.shape_masks`) to new ones;
static is painted on the canvas. `strength` is 1 for a plain flaw and smaller for a subtle one. The `thing`
is a `scenes.Thing`.
"""

import math

import numpy as np
from PIL import Image, ImageDraw

# Grains of static along the picture's side.
GRAINS = 64
# Distance between the dark lines of a torn or melted object, in radii of the object.
LINE_SPACING = 0.36
COPIES = 3  # behind a duplicated object


def _shift(masks: np.ndarray, dx: int, dy: int) -> np.ndarray:
    """Moves the content right by `dx` and down by `dy` pixels; zeros fill the gap."""
    out = np.zeros_like(masks)
    height, width = masks.shape[-2:]
    out[..., max(dy, 0) : height + min(dy, 0), max(dx, 0) : width + min(dx, 0)] = masks[
        ..., max(-dy, 0) : height - max(dy, 0), max(-dx, 0) : width - max(dx, 0)
    ]
    return out


def _lines(positions: np.ndarray, radius: float) -> np.ndarray:
    """Tells which positions lie on dark lines: half of them. The lines' spacing follows the radius."""
    return positions % (LINE_SPACING * radius) < LINE_SPACING / 2 * radius


def torn(masks: np.ndarray, thing, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Cuts the object along a jagged line: the halves slide apart, and threads span the gap."""
    side = masks.shape[-1]
    upright = rng.random() < 0.5
    if upright:
        masks = masks.transpose(0, 2, 1)
    centre, radius = (thing.x if upright else thing.y) * side, thing.radius * side
    step = max(1, round(radius / 4))
    teeth = rng.uniform(-0.3, 0.3, side // step + 2) * radius
    line = centre + np.interp(np.arange(side), np.arange(len(teeth)) * step, teeth)
    slide = round(rng.choice((-1, 1)) * 0.4 * strength * radius)
    gap = max(1, round(0.25 * strength * radius))
    rows = np.arange(side)[:, None]
    above = rows < line
    out = np.maximum(_shift(masks * above, slide, -gap), _shift(masks * ~above, -slide, gap))
    threads = (np.abs(rows - line) < gap + LINE_SPACING * radius) & _lines(np.arange(side), radius)
    within = masks[0].max(axis=0) > 0
    out[0] = np.where(threads & within, 255, out[0])
    out[1] = np.where(threads, 0, out[1])
    return out.transpose(0, 2, 1) if upright else out


def scrambled(masks: np.ndarray, thing, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Cuts the object's box into blocks that change places; the cuts show."""
    side = masks.shape[-1]
    blocks = 4
    length = max(1, round(2 * thing.radius * side / blocks))
    left = int(np.clip(round(thing.x * side - length * blocks / 2), 0, side - length * blocks))
    top = int(np.clip(round(thing.y * side - length * blocks / 2), 0, side - length * blocks))
    moved = rng.permutation(blocks * blocks)[: max(3, round(strength * blocks * blocks))]

    def block(index):
        row, column = divmod(index, blocks)
        y, x = top + row * length, left + column * length
        return np.s_[:, y : y + length, x : x + length]

    out = masks.copy()
    for source, target in zip(moved, np.roll(moved, 1), strict=True):
        piece = masks[block(source)].copy()
        cut = max(1, length // 5)
        piece[1, :cut] = piece[1, :, :cut] = 0
        out[block(target)] = piece
    return out


def melted(masks: np.ndarray, thing, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Lets the object's lower half run down in strands of different lengths."""
    side = masks.shape[-1]
    centre, radius = thing.y * side, thing.radius * side
    turns = np.arange(side) / radius * math.pi
    wave = np.sin(2.1 * turns + rng.uniform(0, 6.3)) + 0.5 * np.sin(3.7 * turns + rng.uniform(0, 6.3))
    stretch = 1 + strength * (0.6 + 0.6 * wave / 1.5).clip(0)
    rows = np.arange(side)[:, None]
    source = np.where(rows > centre, centre + (rows - centre) / stretch, rows)
    out = np.take_along_axis(masks, np.rint(source).astype(int)[None], axis=1)
    out[1] = np.where((rows > centre) & _lines(np.arange(side), radius), 0, out[1])
    return out


def duplicated(masks: np.ndarray, thing, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Adds copies that stick out from under the object, behind one another, towards the picture's middle."""
    side = masks.shape[-1]
    angle = math.atan2(0.5 - thing.y, 0.5 - thing.x) + rng.uniform(-0.8, 0.8)
    length = (0.4 + 0.8 * strength) * thing.radius * side
    outer, inner = masks
    for copy in range(1, COPIES + 1):
        shift = [round(length * copy / COPIES * turn(angle)) for turn in (math.cos, math.sin)]
        behind, behind_inner = _shift(masks, *shift)
        inner = np.where(outer > 0, inner, behind_inner)
        outer = np.maximum(outer, behind)
    return np.stack([outer, inner])


OBJECT_ARTIFACTS = {"torn": torn, "scrambled": scrambled, "melted": melted, "duplicated": duplicated}
STATIC = "static"
KINDS = (*OBJECT_ARTIFACTS, STATIC)


def region(kind: str, thing, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Marks where an object's artifact shows.

    Args:
      kind: a key of OBJECT_ARTIFACTS.
      thing: the object; its `y` is a share of the side.
      before, after: bool [height, width], the object as it should be and as it is.

    Returns:
      bool [height, width]: the copies that stick out of a duplicated object; the lower half of a melted one;
      all of any other object, with its gaps.
    """
    if kind == "duplicated":
        return after & ~before
    either = before | after
    if kind == "melted":
        either[: int(thing.y * len(either))] = False
    return either


def paint_static(
    canvas: Image.Image, x: float, y: float, radius: float, strength: float, rng: np.random.Generator
) -> Image.Image:
    """Paints an ellipse of coloured noise on the canvas.

    Args:
      canvas: the picture, painted in place.
      x, y, radius: centre and larger radius, in shares of the side.
      strength: opacity, 0 to 1.
      rng: random numbers.

    Returns:
      The ellipse's mask, in mode L.
    """
    squeeze = rng.uniform(0.75, 1)
    mask = Image.new("L", canvas.size)
    box = [x - radius, y - radius * squeeze, x + radius, y + radius * squeeze]
    ImageDraw.Draw(mask).ellipse([v * canvas.width for v in box], fill=255)
    grains = rng.integers(0, 256, (GRAINS, GRAINS, 3), dtype=np.uint8)
    noise = Image.fromarray(grains).resize(canvas.size, Image.Resampling.NEAREST)
    canvas.paste(noise, mask=mask.point([round(value * strength) for value in range(256)]))
    return mask
