"""Paints known damage into pictures, and marks where it shows: free labels for the implausibility heatmap.

    place   a soft or hard ellipse or rounded box, drawn where the picture is busy
    damage  what happens there, one of `DAMAGES`
    mark    the pixels that changed visibly; where hardly any did, the picture stays as it was

Everything happens at the model's size, after `augmentation.show`, so that picture and heatmap agree whatever
window is shown. Random numbers depend on the example's seed alone. gin/flaws/default.gin explains the values.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import gin
import numpy as np
import tensorflow as tf

from richhf_jax import errors, feedback

# Folded into the example's seed; `augmentation` and `preprocessors` have their own numbers.
_FLAW_DRAW = 200
# Along the side: pixels that are looked at for busy places, places to draw from, cells that smooth a heatmap.
_SAMPLES, _PLACES, _HEATMAP_CELLS = 64, 16, 32
# Ranges of a region's height over its width, and of its soft edge's width in radii.
_ASPECTS, _EDGES = (0.7, 1.4), (0.05, 0.5)


class Patch(NamedTuple):
    """A square part of a picture, around a region.

    Attributes:
      pixels: float32 [size, size, 3], grey levels.
      elsewhere: float32 [size, size, 3], another busy place of the picture.
      y, x: float32 [size, size], places relative to the region's middle, in radii of the region.
      inside: float32 [size, size], 1 in the region's middle, 0 on its edge and outside.
      radius: float32 [], in pixels.
      strength: float32 [], 0 to 1.
      seed: int64 [2].
    """

    pixels: tf.Tensor
    elsewhere: tf.Tensor
    y: tf.Tensor
    x: tf.Tensor
    inside: tf.Tensor
    radius: tf.Tensor
    strength: tf.Tensor
    seed: tf.Tensor

    def draws(self, count: int) -> list[tf.Tensor]:
        """Draws numbers from 0 to 1."""
        return tf.unstack(tf.random.stateless_uniform([count], self.seed))

    def moved(self, y: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
        """Takes each pixel from another place of the patch: `y`, `x` in radii, as `self.y`, `self.x`."""
        size = self.pixels.shape[0]
        places = tf.stack([y - self.y[0, 0], x - self.x[0, 0]], -1) * self.radius
        places = tf.clip_by_value(places, 0.0, size - 1.0)
        first = tf.minimum(tf.cast(places, tf.int32), size - 2)
        share = (places - tf.cast(first, tf.float32))[..., None]
        corners = [tf.gather_nd(self.pixels, first + corner) for corner in ([0, 0], [0, 1], [1, 0], [1, 1])]
        above, below = (left + share[:, :, 1] * (right - left) for left, right in (corners[:2], corners[2:]))
        return above + share[:, :, 0] * (below - above)


def swirled(patch: Patch) -> tf.Tensor:
    """Turns the middle, and the rest less and less."""
    (side,) = patch.draws(1)
    angle = tf.where(side < 0.5, -1.0, 1.0) * 1.5 * math.pi * patch.strength * patch.inside
    cos, sin = tf.cos(angle), tf.sin(angle)
    return patch.moved(cos * patch.y - sin * patch.x, sin * patch.y + cos * patch.x)


def sheared(patch: Patch) -> tf.Tensor:
    """Moves rows to the left and right, in waves."""
    waves, phase = patch.draws(2)
    turns = (1 + waves) * patch.y + phase
    wave = tf.sin(2 * math.pi * turns) * tf.minimum(2 * patch.inside, 1)
    return patch.moved(patch.y, patch.x + 0.6 * patch.strength * wave)


def shuffled(patch: Patch) -> tf.Tensor:
    """Lets the blocks of a 4 x 4 grid change places."""
    blocks = 4
    order = tf.random.experimental.stateless_shuffle(tf.range(blocks**2), patch.seed)
    length = tf.maximum(tf.round(2 * patch.radius / blocks), 1) / patch.radius
    row, column = (tf.cast(tf.floor(place / length), tf.int32) + blocks // 2 for place in (patch.y, patch.x))
    is_block = (row >= 0) & (row < blocks) & (column >= 0) & (column < blocks)
    source = tf.gather(order, tf.where(is_block, row * blocks + column, 0))
    down, right = source // blocks - row, source % blocks - column
    y, x = (place + tf.cast(way, tf.float32) * length for place, way in ((patch.y, down), (patch.x, right)))
    return patch.moved(tf.where(is_block, y, patch.y), tf.where(is_block, x, patch.x))


def repeated(patch: Patch) -> tf.Tensor:
    """Shows copies of the middle beside and below one another."""
    period = 1.1 - 0.4 * patch.strength
    y, x = (tf.math.floormod(place + period / 2, period) - period / 2 for place in (patch.y, patch.x))
    return patch.moved(y, x)


def melted(patch: Patch) -> tf.Tensor:
    """Lets what is in the upper half run down in strands of different lengths."""
    first, second = patch.draws(2)
    waves = [tf.sin(2 * math.pi * (rate * patch.x + start)) for rate, start in ((1.1, first), (2.3, second))]
    stretch = 1 + 4 * patch.strength * (1 + 0.5 * tf.add_n(waves))
    top = -0.4
    return patch.moved(tf.where(patch.y > top, top + (patch.y - top) / stretch, patch.y), patch.x)


def static(patch: Patch) -> tf.Tensor:
    """Lays coloured noise over the region."""
    size = patch.pixels.shape[0]
    grain = max(1, size // 32)
    noise = tf.random.stateless_uniform([-(-size // grain)] * 2 + [3], patch.seed, maxval=255)
    noise = tf.repeat(tf.repeat(noise, grain, 0), grain, 1)[:size, :size]
    return patch.pixels + patch.strength * (noise - patch.pixels)


def blurred(patch: Patch) -> tf.Tensor:
    """Takes away all details, by two moving averages."""
    pixels = patch.pixels[None]
    width = max(3, patch.pixels.shape[0] // 4)
    for window in ([width, 1], [1, width]) * 2:
        pixels = tf.nn.avg_pool2d(pixels, window, 1, "SAME")
    return pixels[0]


def pasted(patch: Patch) -> tf.Tensor:
    """Shows another place of the picture."""
    return patch.elsewhere


def compressed(patch: Patch) -> tf.Tensor:
    """Writes and reads a coarse JPEG, whose blocks show."""
    pixels = tf.cast(patch.pixels, tf.uint8)
    quality = tf.cast(1 + 8 * (1 - patch.strength), tf.int32)
    return tf.cast(tf.image.adjust_jpeg_quality(pixels, quality), tf.float32)


DAMAGES: dict[str, Callable[[Patch], tf.Tensor]] = {
    damage.__name__: damage
    for damage in (swirled, sheared, shuffled, repeated, melted, static, blurred, pasted, compressed)
}


@gin.configurable
def paint(
    image: tf.Tensor,
    seed: tf.Tensor,
    box: tf.Tensor | None = None,
    *,
    count_weights: Sequence[float] = (0.5, 0.35, 0.15),
    damages: Sequence[str] = tuple(DAMAGES),
    radii: tuple[float, float] = (0.12, 0.2),
    strengths: tuple[float, float] = (0.5, 1.0),
    least_change: float = 12.0,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Paints flaws into a picture.

    Args:
      image: uint8 [side, side, 3].
      seed: int64 [2].
      box: int32 [4], a letterboxed picture's place in the image; what is beside it stays black.
      count_weights: weights of 0, 1, 2, … flaws; they are divided by their sum.
      damages: names of `DAMAGES`, each as likely as the others.
      radii: range of a region's radius, in shares of the side.
      strengths: range of the damage's strength, 0 to 1.
      least_change: mean change of the region's pixels from which on a flaw counts, and a pixel's change from
        which on it is marked: in grey levels, of the colour that changes most. Weaker flaws are not painted.

    Returns:
      image    uint8 [side, side, 3]
      heatmap  uint8 [side, side], see `clicked`
      count    int32 [], the number of flaws that are seen

    Raises:
      errors.UserError: there is no damage of a name, all weights are 0, or a range or the least change is.
    """
    if not damages or set(damages) - DAMAGES.keys():
        raise errors.UserError(
            f"flaws.paint.damages must be some of {', '.join(DAMAGES)}, got {tuple(damages)!r}"
        )
    if not sum(count_weights):
        raise errors.UserError("flaws.paint.count_weights must not all be 0")
    for name, (low, high) in {"radii": radii, "strengths": strengths}.items():
        if not 0 < low <= high:
            raise errors.UserError(
                f"flaws.paint.{name} must be a range above 0, the least first, got {(low, high)!r}"
            )
    if not least_change > 0:
        raise errors.UserError(f"flaws.paint.least_change must be above 0, got {least_change!r}")
    side = image.shape[0]
    seed = tf.random.experimental.stateless_fold_in(seed, _FLAW_DRAW)
    ends = np.cumsum(count_weights)
    drawn = tf.random.stateless_uniform([], seed, maxval=float(ends[-1]))
    wanted = tf.reduce_sum(tf.cast(drawn >= ends[:-1].astype(np.float32), tf.int32))
    box = tf.constant([0, 0, side, side]) if box is None else box

    def add(number, image, marks, count):
        own_seed = tf.random.experimental.stateless_fold_in(seed, number)
        painted, more = _flaw(image, own_seed, box, damages, radii, strengths, least_change)
        seen = tf.reduce_any(more)
        return number + 1, painted, marks | more, count + tf.cast(seen, tf.int32)

    start = (tf.constant(0), image, tf.zeros([side, side], tf.bool), tf.constant(0))
    _, image, marks, count = tf.while_loop(lambda number, *_: number < wanted, add, start)
    heatmap = tf.cond(count > 0, lambda: clicked(marks, box), lambda: tf.zeros([side, side], tf.uint8))
    return image, tf.ensure_shape(heatmap, [side, side]), count


def _flaw(
    image: tf.Tensor,
    seed: tf.Tensor,
    box: tf.Tensor,
    damages: Sequence[str],
    radii: tuple[float, float],
    strengths: tuple[float, float],
    least_change: float,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Paints one flaw; see `paint`. Returns the image, and bool [side, side]: the pixels that show it."""
    side = image.shape[0]
    seeds = tf.unstack(tf.random.experimental.stateless_split(seed, 2))
    patch, start = _cut(image, seeds[0], box, radii, strengths)
    edge, which = tf.unstack(tf.random.stateless_uniform([2], seeds[1]))
    branches = [functools.partial(DAMAGES[name], patch) for name in damages]
    damaged = tf.switch_case(tf.cast(which * len(damages), tf.int32), branches)
    opacity = tf.minimum(patch.inside / _between(edge, _EDGES), 1)[..., None]
    painted = tf.clip_by_value(tf.round(patch.pixels + opacity * (damaged - patch.pixels)), 0, 255)
    change = tf.reduce_max(tf.abs(painted - patch.pixels), 2)
    size_of_region = tf.math.count_nonzero(patch.inside, dtype=tf.float32)
    is_seen = tf.reduce_sum(change) >= least_change * tf.maximum(size_of_region, 1)
    marks = is_seen & (change >= least_change)
    end = start + change.shape
    image = tf.raw_ops.TensorStridedSliceUpdate(
        input=image,
        begin=start,
        end=end,
        strides=[1, 1],
        value=tf.cast(tf.where(is_seen, painted, patch.pixels), tf.uint8),
    )
    marks = tf.pad(marks, tf.stack([start, side - end], 1))
    return tf.ensure_shape(image, [side, side, 3]), tf.ensure_shape(marks, [side, side])


def _cut(
    image: tf.Tensor,
    seed: tf.Tensor,
    box: tf.Tensor,
    radii: tuple[float, float],
    strengths: tuple[float, float],
) -> tuple[Patch, tf.Tensor]:
    """Draws a region and cuts it out; see `paint`.

    Returns the patch, and int32 [2]: its first row and column. Each patch has room for the largest region,
    because the size must be known when the graph is built.
    """
    side = image.shape[0]
    size = min(side, math.ceil(2 * radii[1] * max(_ASPECTS) ** 0.5 * side) + 1)
    seeds = tf.unstack(tf.random.experimental.stateless_split(seed, 3))
    draws = tf.random.stateless_uniform([5], seeds[0])
    places = _busy_places(image, box, seeds[1])
    starts = tf.clip_by_value(tf.cast(places, tf.int32) - size // 2, 0, side - size)
    pixels, elsewhere = (
        tf.cast(tf.slice(image, [start[0], start[1], 0], [size, size, 3]), tf.float32)
        for start in tf.unstack(starts)
    )
    centre, start = places[0], starts[0]
    radius, aspect = _between(draws[0], radii) * side, tf.sqrt(_between(draws[1], _ASPECTS))
    rows, columns = (start[axis] + tf.range(size) for axis in (0, 1))
    y, x = (
        (tf.cast(line, tf.float32) + 0.5 - c) / radius
        for line, c in ((rows, centre[0]), (columns, centre[1]))
    )
    y, x = tf.meshgrid(y, x, indexing="ij")
    cos, sin = tf.cos(math.pi * draws[2]), tf.sin(math.pi * draws[2])
    along, across = tf.square((cos * y + sin * x) / aspect), tf.square((cos * x - sin * y) * aspect)
    # The distance from the middle, between that of an ellipse and that of a rounded box.
    ellipse, box_like = tf.sqrt(along + across), tf.sqrt(tf.sqrt(tf.square(along) + tf.square(across)))
    inside = tf.maximum(1 - _between(draws[3], (ellipse, box_like)), 0)
    in_box = ((rows >= box[0]) & (rows < box[2]))[:, None] & (columns >= box[1]) & (columns < box[3])
    inside *= tf.cast(in_box, tf.float32)
    strength = _between(draws[4], strengths)
    return Patch(pixels, elsewhere, y, x, inside, radius, strength, seeds[2]), start


def _between(draw: tf.Tensor, limits: tuple[Any, Any]) -> tf.Tensor:
    return limits[0] + draw * (limits[1] - limits[0])


def _busy_places(image: tf.Tensor, box: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Draws two places: likelier by the square of how much the picture changes there from pixel to pixel.

    The square, because objects are to be hit, not the pattern behind them.

    Returns:
      float32 [2, 2], row and column in pixels; in the box, on no edge of it.
    """
    side = image.shape[0]
    step = max(1, side // _SAMPLES)
    grey = tf.reduce_sum(tf.cast(image[::step, ::step], tf.float32), 2)
    down, right = tf.abs(grey[1:] - grey[:-1]), tf.abs(grey[:, 1:] - grey[:, :-1])
    steps = tf.pad(down, [[0, 1], [0, 0]]) + tf.pad(right, [[0, 0], [0, 1]])
    places = tf.range(0, side, step)
    rows, columns = ((places >= box[axis]) & (places + step < box[axis + 2]) for axis in (0, 1))
    cell = max(1, grey.shape[0] // _PLACES)
    busy = tf.where(rows[:, None] & columns, steps, 0.0)[None, ..., None]
    busy = tf.nn.avg_pool2d(busy, cell, cell, "SAME")
    # A picture of one colour has no busy place: any will do.
    logits = 2 * tf.math.log(tf.reshape(busy, [1, -1]) + 1e-6)
    drawn = tf.random.stateless_categorical(logits, 2, seed, tf.int32)[0]
    cells = busy.shape[2]
    corners = tf.cast(tf.stack([drawn // cells, drawn % cells], 1), tf.float32)
    places = (corners + tf.random.stateless_uniform([2, 2], seed)) * cell * step
    return tf.clip_by_value(places, tf.cast(box[:2], tf.float32), tf.cast(box[2:] - 1, tf.float32))


def clicked(marks: tf.Tensor, box: tf.Tensor) -> tf.Tensor:
    """Makes a heatmap of marked pixels that looks like the raters'.

    Raters click, and each click is a disk. So a heatmap has soft edges, reaches beyond what is wrong and
    closes small gaps. A moving average as wide as a disk does the same: on the synthetic set, whose damaged
    regions are known, it has a correlation of 0.93 with the raters' heatmaps (the regions alone: 0.85).

    Args:
      marks: bool [side, side].
      box: int32 [4], the picture's place; there is nothing beside it.

    Returns:
      uint8 [side, side]; 255 = marked by all.
    """
    side = marks.shape[0]
    cell = max(1, side // _HEATMAP_CELLS)
    window = 2 * math.floor(feedback.POINT_RADIUS * side / cell) + 1
    pooled = tf.nn.avg_pool2d(tf.cast(marks, tf.float32)[None, ..., None], cell, cell, "SAME")
    near = tf.minimum(1.5 * tf.nn.avg_pool2d(pooled, window, 1, "SAME"), 1)
    heatmap = tf.image.resize(near, [side, side])[0, ..., 0]
    rows, columns = tf.range(side)[:, None], tf.range(side)
    in_box = (rows >= box[0]) & (rows < box[2]) & (columns >= box[1]) & (columns < box[3])
    return tf.cast(tf.where(in_box, 255 * heatmap, 0.0) + 0.5, tf.uint8)
