"""Visible flaws of generated pictures, put into a known region.

An object's artifact maps its masks (uint8 [2, side, side]) to new ones; static is painted on the
canvas. `strength` is 1 for a plain flaw and smaller for a subtle one.
"""

import math

import numpy as np
from PIL import Image, ImageDraw

# Of static, along the picture's side.
GRAINS = 64


def _shift(masks: np.ndarray, dx: int, dy: int) -> np.ndarray:
    """Moves the content right and down; zeros come in."""
    out = np.zeros_like(masks)
    height, width = masks.shape[-2:]
    out[..., max(dy, 0) : height + min(dy, 0), max(dx, 0) : width + min(dx, 0)] = masks[
        ..., max(-dy, 0) : height - max(dy, 0), max(-dx, 0) : width - max(dx, 0)
    ]
    return out


def torn(masks: np.ndarray, thing, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Cut along a jagged line; the halves slide apart, with a gap between them."""
    side = masks.shape[-1]
    upright = rng.random() < 0.5
    if upright:
        masks = masks.transpose(0, 2, 1)
    centre, radius = (thing.x if upright else thing.y) * side, thing.radius * side
    teeth = rng.uniform(-0.3, 0.3, side // max(1, round(radius / 4)) + 2) * radius
    line = centre + np.interp(np.arange(side), np.arange(len(teeth)) * max(1, round(radius / 4)), teeth)
    slide = round(rng.choice((-1, 1)) * 0.5 * strength * radius)
    gap = max(1, round(0.22 * strength * radius))
    above = np.arange(side)[:, None] < line
    out = np.maximum(_shift(masks * above, slide, -gap), _shift(masks * ~above, -slide, gap))
    return out.transpose(0, 2, 1) if upright else out


def scrambled(masks: np.ndarray, thing, strength: float, rng: np.random.Generator) -> np.ndarray:
    """The object's box is cut into blocks, and the blocks change places."""
    side = masks.shape[-1]
    blocks = 3
    length = max(1, round(2 * thing.radius * side / blocks))
    left = int(np.clip(round(thing.x * side - length * blocks / 2), 0, side - length * blocks))
    top = int(np.clip(round(thing.y * side - length * blocks / 2), 0, side - length * blocks))
    moved = rng.permutation(blocks * blocks)[: max(3, round(strength * blocks * blocks))]
    out = masks.copy()
    for source, target in zip(moved, np.roll(moved, 1), strict=True):
        (si, sj), (ti, tj) = divmod(source, blocks), divmod(target, blocks)
        out[:, top + ti * length : top + (ti + 1) * length, left + tj * length : left + (tj + 1) * length] = (
            masks[
                :, top + si * length : top + (si + 1) * length, left + sj * length : left + (sj + 1) * length
            ]
        )
    return out


def melted(masks: np.ndarray, thing, strength: float, rng: np.random.Generator) -> np.ndarray:
    """The lower half runs down in drips of different lengths."""
    side = masks.shape[-1]
    centre, radius = thing.y * side, thing.radius * side
    turns = np.arange(side) / radius * math.pi
    wave = np.sin(2.1 * turns + rng.uniform(0, 6.3)) + 0.5 * np.sin(3.7 * turns + rng.uniform(0, 6.3))
    stretch = 1 + strength * (0.45 + 0.55 * wave / 1.5).clip(0)
    rows = np.arange(side)[:, None]
    source = np.where(rows > centre, centre + (rows - centre) / stretch, rows)
    return np.take_along_axis(masks, np.rint(source).astype(int)[None], axis=1)


def duplicated(masks: np.ndarray, thing, strength: float, rng: np.random.Generator) -> np.ndarray:
    """A ghost of the object sticks out of it, towards the picture's middle."""
    side = masks.shape[-1]
    angle = math.atan2(0.5 - thing.y, 0.5 - thing.x) + rng.uniform(-0.8, 0.8)
    length = (0.35 + 0.65 * strength) * thing.radius * side
    ghost = _shift(masks, round(length * math.cos(angle)), round(length * math.sin(angle)))
    return np.maximum(masks, (ghost * 0.6).astype(np.uint8))


OBJECT_ARTIFACTS = {"torn": torn, "scrambled": scrambled, "melted": melted, "duplicated": duplicated}
STATIC = "static"
KINDS = (*OBJECT_ARTIFACTS, STATIC)


def region(kind: str, thing, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Where an object's artifact shows.

    Args:
      kind: a key of OBJECT_ARTIFACTS.
      thing: the object; its `y` is a share of the side.
      before, after: bool [height, width], the object as it should be and as it is.

    Returns:
      bool [height, width]: the part that sticks out of a duplicated object, the lower half of a
      melted one, the whole of the others with their gaps.
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
    """Paints an ellipse of coloured noise, `strength` opaque, on the canvas; returns its mask (mode L)."""
    squeeze = rng.uniform(0.75, 1)
    mask = Image.new("L", canvas.size)
    box = [x - radius, y - radius * squeeze, x + radius, y + radius * squeeze]
    ImageDraw.Draw(mask).ellipse([v * canvas.width for v in box], fill=255)
    grains = rng.integers(0, 256, (GRAINS, GRAINS, 3), dtype=np.uint8)
    noise = Image.fromarray(grains).resize(canvas.size, Image.Resampling.NEAREST)
    canvas.paste(noise, mask=mask.point(lambda value: round(value * strength)))
    return mask
