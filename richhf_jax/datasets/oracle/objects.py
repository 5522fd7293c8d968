"""Recognises the objects in a picture, and where it is damaged.

Pixels of an object's fill are told by their colour. Templates of all shapes, sizes and tilts are laid over
those of each colour; the best ones are fitted to the pixels, and the picture is painted again with what was
found. Damage is where the picture differs from that, and coloured noise.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage, spatial

from richhf_jax.datasets import drawing, scenes
from richhf_jax.datasets.oracle import backgrounds
from richhf_jax.datasets.oracle.backgrounds import OVERSAMPLING, SIDE, Background

_COLOURS = tuple(drawing.RGB)
# Between the largest small object and the smallest large one.
_SIZE_LIMIT = (scenes.RADII["small"][1] + scenes.RADII["large"][0]) / 2
# Templates: radii as shares of the side, and tilts in radians, a little beyond the world's.
_RADII, _TILTS = np.linspace(0.112, 0.222, 12), np.linspace(-0.2, 0.2, 5)
_ROUND = ("circle", "ring")
_RADIUS_LIMITS, _MAX_TILT = (0.08, 0.24), 0.25
# Objects of one colour that are looked for; what each further one must add to the fit.
_MAX_COUNT, _COST_OF_ONE_MORE = 4, 0.06
# Pixels of a colour that are an object at least, and of a fragment of it.
_MIN_PIXELS, _MIN_FRAGMENT = 16, 5
# A template lies where at least this share of it is covered; the next one this many radii away.
_MIN_COVERED, _APART = 0.15, 1.7
# First steps of the fit: x, y and radius as shares of the side, tilt in radians. Each round halves them.
_STEPS, _ROUNDS = (0.008, 0.008, 0.006, 0.06), 4
# Grey levels between the picture and what was painted again: where they are damage, and the most that counts.
_DAMAGED, _MAX_DIFFERENCE = 60, 60
# Pixels of damage from which an object isn't whole; and other damage is a region.
MIN_DAMAGE, _MIN_REGION = 8, 12
# Pieces of damage are one if this many pixels join them from each side.
_JOINED = 2
# Reach of an object's damage, in radii from its centre.
_REACH = 2.6
# What the prompt says of a damaged object is believed unless something else fits better by this much.
_BENEFIT_OF_DOUBT = 0.27
# Damaged objects: hypotheses that fit worse than this, or aren't among the best few, aren't looked at; the
# worth of the undamaged share.
_CLOSE, _LOOKED_AT, _WORTH_OF_INTACT = 0.3, 4, 0.5
# Objects whose order is looked for, one order after the other.
_MOST_ORDERED = 4
# Coloured noise: grey levels of colour between a pixel and its neighbours, and the share of such pixels.
_NOISE, _NOISY = 45, 0.45


@dataclasses.dataclass(frozen=True)
class Thing:
    """An object that was recognised.

    Attributes:
      colour, shape: as in `drawing`.
      x, y, radius: shares of the side.
      angle: radians.
      wholeness: intersection over union of its template and the pixels of its colour around it, 0 to 1.
      damage: bool [SIDE, SIDE], its damaged pixels; fewer than MIN_DAMAGE are none.
    """

    colour: str
    shape: str
    x: float
    y: float
    radius: float
    angle: float
    wholeness: float = 0.0
    damage: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((SIDE, SIDE), bool))

    @property
    def size(self) -> str:
        """Returns "small" or "large"."""
        return "small" if self.radius < _SIZE_LIMIT else "large"


@dataclasses.dataclass(frozen=True)
class Reading:
    """What is in a picture.

    Attributes:
      background: its background.
      things: its objects.
      regions: bool [SIDE, SIDE] of each damage: those of objects, of noise, and others.
    """

    background: Background
    things: tuple[Thing, ...]
    regions: tuple[np.ndarray, ...]

    @property
    def damage(self) -> np.ndarray:
        """Union of all damage, bool [SIDE, SIDE]."""
        return functools.reduce(np.logical_or, self.regions, np.zeros((SIDE, SIDE), bool))


@dataclasses.dataclass(frozen=True)
class _Templates:
    """Fills of shapes in the middle of the picture.

    Attributes:
      things: the objects, without a colour.
      groups: (shape, radius) -> numbers of the templates, one a tilt.
      areas: float [n], pixels.
      spectra: complex [n, ...], for correlations.
    """

    things: list[Thing]
    groups: dict[tuple[str, float], list[int]]
    areas: np.ndarray
    spectra: np.ndarray


# Correlations must not wrap around.
_PADDED = SIDE + SIDE // 2


@functools.cache
def _templates() -> _Templates:
    things = [
        Thing("", shape, 0.5, 0.5, float(radius), float(tilt))
        for shape, radius in itertools.product(drawing.POLYGONS, _RADII)
        for tilt in ([0.0] if shape in _ROUND else _TILTS)
    ]
    groups: dict[tuple[str, float], list[int]] = {}
    for number, thing in enumerate(things):
        groups.setdefault((thing.shape, thing.radius), []).append(number)
    fills = np.array([_masks(thing)[1] for thing in things], np.float32)
    spectra = np.conj(np.fft.rfft2(fills, (_PADDED, _PADDED)))
    return _Templates(things, groups, fills.sum((1, 2)), spectra)


def _masks(thing: Thing) -> np.ndarray:
    """Draws how much of each pixel is the object, and its fill: float [2, SIDE, SIDE], 0 to 1."""
    fine = drawing.shape_masks(thing.shape, thing.x, thing.y, thing.radius, thing.angle, SIDE * OVERSAMPLING)
    return backgrounds.reduced(fine.astype(np.float32)) / 255


def _painted(image: np.ndarray, thing: Thing) -> np.ndarray:
    """Paints an object onto a picture, float [SIDE, SIDE, 3]."""
    whole, fill = _masks(thing)[..., None]
    outline = (whole - fill).clip(0)
    colours = np.array(drawing.OUTLINES[thing.colour]), np.array(drawing.RGB[thing.colour])
    return image * (1 - outline - fill) + outline * colours[0] + fill * colours[1]


# What objects of a colour are meant to be: shape, count, and size, None where any will do.
Meant = tuple[str, int, str | None]


def read(image: np.ndarray, expected: Sequence[tuple[str, Meant]]) -> Reading:
    """Recognises what is in a picture.

    Args:
      image: float32 [SIDE, SIDE, 3], grey levels of 255.
      expected: (colour, what is meant) of what the prompt names; it decides what a damaged object was meant
        to be, and nothing else.
    """
    background = backgrounds.recognise(image)
    noise = _noise(image)
    fills = _fills(image, background, ndimage.binary_dilation(noise, iterations=2))
    things: list[Thing] = []
    for colour, mask in fills.items():
        others = functools.reduce(np.logical_or, (m for c, m in fills.items() if c != colour), noise)
        doubts = [meant for c, meant in expected if c == colour]
        doubts = doubts or [meant for c, meant in expected if c not in fills]
        things += _of_one_colour(image, background.image, colour, mask, others, doubts)
    things = _in_order(image, background.image, things)
    again = functools.reduce(_painted, things, background.image)
    # Noise has a rim that isn't noisy.
    noise = np.asarray(ndimage.binary_dilation(noise, iterations=2), bool)
    damaged = _damaged(image, again) & ~noise
    noise &= _difference(image, again)
    noise = ndimage.binary_closing(noise)
    return _with_damage(background, things, fills, damaged, noise)


def _in_order(image: np.ndarray, background: np.ndarray, things: list[Thing]) -> list[Thing]:
    """Finds which objects cover which: the order, the front one last, that is most like the picture."""
    layers = np.zeros((SIDE, SIDE))
    for thing in things:
        layers += _masks(thing)[0] > 0.5
    if len(things) > _MOST_ORDERED or layers.max() < 2:
        return things

    def differing(order: Sequence[Thing]) -> int:
        return int(_difference(image, functools.reduce(_painted, order, background)).sum())

    return list(min(itertools.permutations(things), key=differing))


def _difference(image: np.ndarray, again: np.ndarray) -> np.ndarray:
    return np.abs(image - again).max(-1) > _DAMAGED


def _damaged(image: np.ndarray, again: np.ndarray) -> np.ndarray:
    """Marks what differs, bool [SIDE, SIDE], without lines of one pixel, which edges have."""
    return np.asarray(ndimage.binary_opening(_difference(image, again), np.ones((2, 2))), bool)


def _noise(image: np.ndarray) -> np.ndarray:
    """Finds coloured noise, bool [SIDE, SIDE]: pixels whose neighbours have other colours."""
    colour = image - image.mean(-1, keepdims=True)
    differs = np.abs(colour - ndimage.median_filter(colour, (3, 3, 1))).max(-1) > _NOISE
    return ndimage.binary_opening(ndimage.uniform_filter(differs.astype(float), 5) > _NOISY, np.ones((3, 3)))


def _fills(image: np.ndarray, background: Background, left_out: np.ndarray) -> dict[str, np.ndarray]:
    """Finds the pixels, bool [SIDE, SIDE], of the fills of each colour that is there."""
    palette = np.array([*drawing.RGB.values(), *drawing.OUTLINES.values()], np.float32)
    distances = np.linalg.norm(image[:, :, None] - palette, axis=-1)
    apart = np.linalg.norm(image - background.image, axis=-1)
    nearest = np.concatenate([distances, apart[..., None]], axis=-1).argmin(-1)
    found = {}
    for number, colour in enumerate(_COLOURS):
        fragments, count = _labelled((nearest == number) & ~left_out)
        sizes = np.bincount(fragments.ravel(), minlength=count + 1)
        sizes[0] = 0
        mask = (sizes >= _MIN_FRAGMENT)[fragments]
        if mask.sum() >= _MIN_PIXELS:
            found[colour] = mask
    return found


def _of_one_colour(
    image: np.ndarray,
    background: np.ndarray,
    colour: str,
    mask: np.ndarray,
    others: np.ndarray,
    doubts: Sequence[Meant],
) -> list[Thing]:
    """Recognises the objects of a colour, which have one shape and size.

    Args:
      image, background: the picture, and its background alone; float32 [SIDE, SIDE, 3].
      colour: the colour.
      mask: bool [SIDE, SIDE], the pixels of its fills.
      others: bool [SIDE, SIDE], pixels of something else.
      doubts: what the objects may be if they are damaged.
    """
    found = _hypotheses(mask)
    if not found:
        return []

    def fit(name: tuple[str, int, str]) -> list[Thing]:
        things = (dataclasses.replace(thing, colour=colour) for thing in found[name][1])
        return [_fitted(image, background, thing) for thing in things]

    def value(name: tuple[str, int, str]) -> float:
        return found[name][0] - _COST_OF_ONE_MORE * (name[1] - 1)

    best = max(found, key=value)
    things = fit(best)
    again = functools.reduce(_painted, things, background)
    near = mask | (again != background).any(-1)
    damaged = _damaged(image, again)
    if (damaged & ndimage.binary_dilation(near) & ~others).sum() < MIN_DAMAGE:
        return things

    def sharp(name: tuple[str, int, str]) -> float:
        """Adds the share of the objects that is as it should be."""
        painted = functools.reduce(_painted, fit(name), background)
        inside = (painted != background).any(-1)
        return value(name) + _WORTH_OF_INTACT * float(
            (inside & ~_difference(image, painted)).sum() / inside.sum()
        )

    close = [name for name in found if value(name) >= value(best) - _CLOSE]
    likely = [
        name
        for name in close
        for shape, count, size in doubts
        if name[:2] == (shape, count) and size in (None, name[2])
    ]
    best_few = sorted(close, key=value)[-_LOOKED_AT:]
    values = {name: sharp(name) for name in {*best_few, *likely}}
    best = max(best_few, key=values.__getitem__)
    meant = max(likely, key=values.__getitem__, default=best)
    return fit(meant if values[meant] >= values[best] - _BENEFIT_OF_DOUBT else best)


def _hypotheses(mask: np.ndarray) -> dict[tuple[str, int, str], tuple[float, list[Thing]]]:
    """Lays templates over a mask.

    Returns:
      (shape, count, size) -> the best intersection over union of templates and mask, and the templates'
      objects.
    """
    templates, total = _templates(), mask.sum()
    spectrum = np.fft.rfft2(mask.astype(np.float32), (_PADDED, _PADDED))
    covered = np.fft.irfft2(spectrum * templates.spectra, (_PADDED, _PADDED))
    # Score of a template whose middle is at each pixel.
    covered = np.roll(covered, (SIDE // 2, SIDE // 2), (1, 2))[:, :SIDE, :SIDE]
    rows, columns = np.mgrid[:SIDE, :SIDE]
    found: dict[tuple[str, int, str], tuple[float, list[Thing]]] = {}
    for (shape, radius), numbers in templates.groups.items():
        area, left = templates.areas[numbers].mean(), covered[numbers]
        things: list[Thing] = []
        inside = 0.0
        for count in range(1, _MAX_COUNT + 1):
            tilt, row, column = np.unravel_index(left.argmax(), left.shape)
            if left[tilt, row, column] < _MIN_COVERED * area:
                break
            inside += left[tilt, row, column]
            middle = {"x": float(column / SIDE), "y": float(row / SIDE)}
            things = [*things, dataclasses.replace(templates.things[numbers[tilt]], **middle)]
            union = float(inside / (total + count * area - inside))
            name = shape, count, things[0].size
            if union > found.get(name, (0.0,))[0]:
                found[name] = union, things
            left[:, (rows - row) ** 2 + (columns - column) ** 2 < (_APART * radius * SIDE) ** 2] = -1
    return found


def _fitted(image: np.ndarray, background: np.ndarray, thing: Thing) -> Thing:
    """Moves, resizes and turns an object until it is most like the picture; one parameter after the other."""
    rows, columns = np.mgrid[:SIDE, :SIDE] + 0.5
    near = np.hypot(columns - thing.x * SIDE, rows - thing.y * SIDE) < 1.35 * thing.radius * SIDE
    target = image[near]

    def difference(one: Thing) -> float:
        distance = np.abs(_painted(background, one)[near] - target).mean(-1)
        return float(distance.clip(0, _MAX_DIFFERENCE).mean())

    best = difference(thing)
    names = ("x", "y", "radius") if thing.shape in _ROUND else ("x", "y", "radius", "angle")
    for round_number in range(_ROUNDS):
        for (name, step), sign in itertools.product(zip(names, _STEPS, strict=False), (1, -1)):
            while True:
                value = getattr(thing, name) + sign * step / 2**round_number
                other = dataclasses.replace(thing, **{name: value})
                is_possible = (
                    abs(other.angle) <= _MAX_TILT and _RADIUS_LIMITS[0] <= other.radius <= _RADIUS_LIMITS[1]
                )
                if not is_possible or (worse := difference(other)) >= best:
                    break
                thing, best = other, worse
    return thing


def _with_damage(
    background: Background,
    things: list[Thing],
    fills: dict[str, np.ndarray],
    damaged: np.ndarray,
    noise: np.ndarray,
) -> Reading:
    """Gives each piece of damage to the object that it belongs to, and makes regions of all."""
    rows, columns = np.mgrid[:SIDE, :SIDE] + 0.5
    distances = np.array(
        [np.hypot(columns - t.x * SIDE, rows - t.y * SIDE) / (t.radius * SIDE) for t in things]
    ).reshape(-1, SIDE, SIDE)
    pieces, count = _labelled(ndimage.binary_closing(damaged, iterations=_JOINED))
    owners: list[np.ndarray] = [np.zeros((SIDE, SIDE), bool) for _ in things]
    regions = _parts(noise)
    for piece in (pieces == i for i in range(1, count + 1)):
        piece = piece & damaged
        if not piece.any():
            continue
        # An object's pixels near the damage have the object's colour.
        near = ndimage.binary_dilation(piece, iterations=2)
        claims = [
            (near & fills[t.colour] & (d < _REACH)).sum() / max(d[piece].mean(), 0.5)
            for t, d in zip(things, distances, strict=True)
        ]
        if claims and max(claims) > 0:
            owners[int(np.argmax(claims))] |= piece
        elif piece.sum() >= _MIN_REGION:
            regions.append(piece)
    result = []
    nearest = distances.argmin(0) if things else rows
    for number, (thing, own) in enumerate(zip(things, owners, strict=True)):
        template = _masks(thing)[1] >= 0.5
        seen = fills[thing.colour] & (nearest == number) & (distances[number] < _REACH)
        union = (template | seen).sum()
        wholeness = float((template & seen).sum() / union) if union else 0.0
        if own.sum() >= MIN_DAMAGE:
            regions.append(_hull(own))
        else:
            own = np.zeros_like(own)
        result.append(dataclasses.replace(thing, wholeness=wholeness, damage=own))
    return Reading(background, tuple(result), tuple(regions))


def _parts(mask: np.ndarray) -> list[np.ndarray]:
    """Splits a mask into its connected parts, without tiny ones."""
    parts, count = _labelled(mask)
    return [parts == i for i in range(1, count + 1) if (parts == i).sum() >= _MIN_REGION]


def _labelled(mask: Any) -> tuple[np.ndarray, int]:
    """Returns a mask with its connected parts numbered from 1, and their number."""
    found: Any = ndimage.label(mask, np.ones((3, 3)))
    return found[0], int(found[1])


def _hull(mask: np.ndarray) -> np.ndarray:
    """Fills the convex hull of a mask's pixels, bool [SIDE, SIDE]."""
    rows, columns = np.nonzero(mask)
    points = np.stack([columns, rows], axis=-1)
    if np.linalg.matrix_rank(points - points[0]) < 2:
        return mask
    corners = points[spatial.ConvexHull(points).vertices]
    image = Image.new("1", (SIDE, SIDE))
    ImageDraw.Draw(image).polygon([tuple(corner) for corner in corners.tolist()], fill=1)
    return np.asarray(image) | mask
