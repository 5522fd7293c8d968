"""Makes the model's square of pixels from encoded images and heatmaps, augmented if the example asks for it.

The same window and the same box bring an image and its heatmaps to the square, whatever their sizes:

    window   the part of the picture that is shown, in units of 1 / side of its height and width; all of it
             unless the picture is cropped
    box      the place of the window in the square, in pixels; all of it unless the picture is letterboxed

Everything is uint8. Random numbers depend on the example's seed alone. An augmentation that isn't drawn isn't
computed. The defaults are the paper's (supplement); gin/augmentation/default.gin explains them.
"""

import math
from collections.abc import Sequence

import gin
import tensorflow as tf

from richhf_jax import errors

FITS = ("resize", "letterbox", "centre_crop")
# The longer side of a picture that is cropped, in units of its shorter one; its ends are cut off first.
_LONGEST = 256
# Luma of red, green and blue: ITU-R BT.601.
_LUMA = (0.299, 0.587, 0.114)
# Pixels per row of the matrix product that mixes colours: few enough that the zeros in it cost little.
_PIXELS = 8
# Folded into the example's seed: one draw each for cropping, colours and moves.
_CROP_DRAW, _COLOUR_DRAW, _MOVE_DRAW = range(100, 103)


def decode(data: tf.Tensor, channels: int) -> tf.Tensor:
    """Decodes an image, string [], to uint8 [height, width, channels]: the pixels that Pillow shows."""
    return tf.cond(
        tf.io.is_jpeg(data),
        # `decode_image` uses a coarser cosine transform. This one is libjpeg's default, and as quick.
        lambda: tf.io.decode_jpeg(data, channels, dct_method="INTEGER_ACCURATE"),
        lambda: tf.io.decode_image(data, channels, expand_animations=False),
    )


@gin.configurable
def show(
    image: tf.Tensor,
    heatmaps: Sequence[tf.Tensor],
    side: int,
    seed: tf.Tensor,
    augment: bool,
    may_flip: tf.Tensor | bool = True,
    *,
    fit: str = "resize",
) -> dict[str, tf.Tensor]:
    """Makes the model's view of an image and its heatmaps.

    Args:
      image: string [], encoded.
      heatmaps: string [] each, encoded; their sizes may differ from the image's.
      side: the square's side, in pixels.
      seed: int64 [2].
      augment: whether the image may be cropped, recoloured and moved, as the seed says.
      may_flip: bool [], whether the mirrored picture fits its prompt as well.
      fit: 'resize' squeezes the picture into the square; 'letterbox' keeps its aspect, with black beside it;
        'centre_crop' keeps its aspect and takes the middle, see `centre_crop`.

    Returns:
      image      uint8 [side, side, 3]
      heatmaps   uint8 [heatmaps, side, side]
      image_box  int32 [4], 'letterbox' only: top, left, bottom and right of the picture, where bottom and
                 right are the first row and column behind it.

    Raises:
      errors.UserError: `fit` has another value.
    """
    if fit not in FITS:
        raise errors.UserError(f"augmentation.show.fit must be one of {', '.join(FITS)}, got {fit!r}")

    def read(data, channels):
        decoded = decode(data, channels)
        return centre_crop(decoded, side) if fit == "centre_crop" else decoded

    pixels = read(image, 3)
    window = draw_window(seed, side) if augment else None
    box = letterbox(tf.shape(pixels)[:2], side) if fit == "letterbox" else None
    shown = place(pixels, window, side, box)
    features = {
        "image": recolour(shown, seed, box) if augment else shown,
        "heatmaps": tf.zeros([0, side, side], tf.uint8),
    }
    if heatmaps:
        maps = [place(read(heatmap, 1), window, side, box) for heatmap in heatmaps]
        features["heatmaps"] = tf.stack([tf.squeeze(heatmap, 2) for heatmap in maps])
    if augment:
        features |= move(features["image"], features["heatmaps"], seed, may_flip, box)
    return features if box is None else features | {"image_box": box}


@gin.configurable
def draw_window(
    seed: tf.Tensor,
    side: int,
    *,
    crop_probability: float = 0.5,
    crop_shares: tuple[float, float] = (0.8, 1.0),
) -> tf.Tensor:
    """Draws the part of a picture that is shown.

    Args:
      seed: int64 [2].
      side: the square's side, in pixels.
      crop_probability: probability of showing only a part.
      crop_shares: least and greatest share of the height, and of the width, in a part.

    Returns:
      int32 [4] in units of 1 / side: top, left, bottom, right.
    """
    draws = tf.random.stateless_uniform([5], tf.random.experimental.stateless_fold_in(seed, _CROP_DRAW))
    least, greatest = crop_shares
    sizes = tf.cast(tf.round((least + draws[:2] * (greatest - least)) * side), tf.int32)
    starts = tf.cast(draws[2:4] * tf.cast(side - sizes + 1, tf.float32), tf.int32)
    window = tf.concat([starts, starts + sizes], 0)
    return tf.where(draws[4] < crop_probability, window, [0, 0, side, side])


def letterbox(size: tf.Tensor, side: int) -> tf.Tensor:
    """Fits a picture's height and width into the square, in the middle and with its aspect: int32 [4], a box.

    [100, 200] in 64 -> [16, 0, 48, 64]
    """
    sizes = tf.maximum(tf.cast(tf.round(size * side / tf.reduce_max(size)), tf.int32), 1)
    starts = (side - sizes) // 2
    return tf.concat([starts, starts + sizes], 0)


def centre_crop(image: tf.Tensor, side: int) -> tf.Tensor:
    """Resizes a picture's shorter side to `side`, cubically, and takes the middle, as `pixels.centre_crop`.

    Args:
      image: uint8 [height, width, channels].
      side: the square's side, in pixels.

    Returns:
      uint8 [side, side, channels]; the pixels are untouched if the picture has this size already.
    """
    size = tf.shape(image)[:2]
    ends = tf.maximum(size - _LONGEST * tf.reduce_min(size), 0) // 2
    image = image[ends[0] : size[0] - ends[0], ends[1] : size[1] - ends[1]]
    size = tf.cast(size - 2 * ends, tf.float64)
    resized = tf.floor(side * size / tf.reduce_min(size))
    scale = tf.cast(resized / size, tf.float32)
    start = tf.cast((resized - side) // 2, tf.float32)

    def crop():
        pixels = image
        # As Pillow, which rounds after the columns and after the rows.
        for axis in (1, 0):
            along = tf.one_hot(axis, 2)
            shape = tf.tensor_scatter_nd_update(tf.shape(pixels)[:2], [[axis]], [side])
            resized = tf.raw_ops.ScaleAndTranslate(
                images=pixels[None],
                size=shape,
                scale=tf.where(along > 0, scale, 1.0),
                translation=-start * along,
                kernel_type="keyscubic",
            )
            pixels = tf.cast(tf.clip_by_value(tf.round(resized[0]), 0, 255), tf.uint8)
        return pixels

    fits = tf.reduce_all(tf.shape(image)[:2] == side)
    return tf.ensure_shape(tf.cond(fits, lambda: image, crop), [side, side, image.shape[2]])


def place(image: tf.Tensor, window: tf.Tensor | None, side: int, box: tf.Tensor | None = None) -> tf.Tensor:
    """Brings the window of a picture to its box in the square, with black beside it.

    Args:
      image: uint8 [height, width, channels].
      window: int32 [4] in units of 1 / side; None: all of the picture.
      side: the square's side, in pixels.
      box: int32 [4] in pixels; None: all of the square.

    Returns:
      uint8 [side, side, channels]; the pixels are untouched if the picture has this size already.
    """
    size = tf.constant([side, side]) if box is None else box[2:] - box[:2]
    channels = image.shape[2]
    fits = tf.reduce_all(tf.shape(image)[:2] == size)
    if window is None:
        everything = tf.constant([0, 0, side, side])
        image = tf.cond(fits, lambda: image, lambda: _resample(image, everything, side, size))
    else:
        # One pixel of the picture is one unit of the window.
        enlarged = tf.reduce_all(tf.shape(image)[:2] == side)
        image = tf.cond(
            fits & tf.reduce_all(window[2:] - window[:2] == side),
            lambda: image,
            lambda: tf.cond(
                fits & enlarged,
                lambda: _enlarge(image, window, side),
                lambda: _resample(image, window, side, size),
            ),
        )
    if box is not None:
        image = _pad(image, box, side)
    return tf.ensure_shape(image, [side, side, channels])


def _pad(image: tf.Tensor, box: tf.Tensor, side: int) -> tf.Tensor:
    paddings = tf.stack([box[:2], side - box[2:]], 1)
    return tf.pad(image, tf.pad(paddings, [[0, 1], [0, 0]]))


def _enlarge(image: tf.Tensor, window: tf.Tensor, side: int) -> tf.Tensor:
    """Enlarges a window of a picture of the square's size: the common case, for which there are faster ways.

    Images are interpolated. A heatmap's pixel is copied from the nearest one: this keeps the values, which
    are shares of the raters, and takes a quarter of the time.
    """
    top, left, bottom, right = tf.unstack(window)
    if image.shape[2] == 1:
        middles = 2 * tf.range(side) + 1
        rows, columns = (
            first + middles * (end - first) // (2 * side) for first, end in ((top, bottom), (left, right))
        )
        # Copying whole rows is quick, so the columns are transposed to rows first.
        shown = tf.transpose(tf.gather(tf.squeeze(image, 2), rows))
        return tf.transpose(tf.gather(shown, columns))[..., None]
    pixels = tf.cast(image[None, top:bottom, left:right], tf.float32)
    pixels = tf.raw_ops.ResizeBilinear(images=pixels, size=[side, side], half_pixel_centers=True)
    return tf.cast(pixels[0] + 0.5, tf.uint8)


def _resample(image: tf.Tensor, window: tf.Tensor, side: int, size: tf.Tensor) -> tf.Tensor:
    """Resizes any window to any size; averages where it shrinks."""
    # A row y of the picture, in pixels, goes to row y * scale + translation.
    enlargement = tf.cast(size, tf.float32) / tf.cast(window[2:] - window[:2], tf.float32)
    scale = enlargement * side / tf.cast(tf.shape(image)[:2], tf.float32)
    translation = -enlargement * tf.cast(window[:2], tf.float32)
    pixels = tf.raw_ops.ScaleAndTranslate(
        images=image[None], size=size, scale=scale, translation=translation, kernel_type="triangle"
    )
    return tf.cast(pixels[0] + 0.5, tf.uint8)


@gin.configurable
def move(
    image: tf.Tensor,
    heatmaps: tf.Tensor,
    seed: tf.Tensor,
    may_flip: tf.Tensor | bool = True,
    box: tf.Tensor | None = None,
    *,
    flip_probability: float = 0.0,
    shift: float = 0.0,
) -> dict[str, tf.Tensor]:
    """Mirrors a picture and shifts it, with its heatmaps. A letterboxed picture moves within its box.

    A row of an image, [1, 2, 3, 4], mirrored and then shifted by 1 to the right -> [4, 4, 3, 2]
    The same row of a heatmap                                                    -> [0, 4, 3, 2]

    Args:
      image: uint8 [side, side, 3].
      heatmaps: uint8 [heatmaps, side, side].
      seed: int64 [2].
      may_flip: bool [], False for pictures that must not be mirrored.
      box: int32 [4], the picture's place in the image; None: all of it.
      flip_probability: probability of exchanging left and right.
      shift: largest way up, down, left and right, as a share of the picture's height or width. The picture's
        edge is repeated; there, heatmaps are 0.

    Returns:
      image and heatmaps, of the same shapes.
    """
    moved = {"image": image, "heatmaps": heatmaps}
    if not flip_probability and not shift:
        return moved
    draws = tf.random.stateless_uniform([3], tf.random.experimental.stateless_fold_in(seed, _MOVE_DRAW))
    side = image.shape[0]
    top, left, bottom, right = (0, 0, side, side) if box is None else tf.unstack(box)
    sizes = tf.cast(tf.stack([bottom - top, right - left]), tf.float32)
    ways = tf.cast(tf.round((2 * draws[:2] - 1) * shift * sizes), tf.int32)
    flips = (draws[2] < flip_probability) & may_flip
    rows, row_shows = _sources(side, top, bottom, ways[0], tf.constant(False))
    columns, column_shows = _sources(side, left, right, ways[1], flips)
    shows = tf.cast(row_shows[:, None] & column_shows, tf.uint8)
    moved["image"] = tf.gather(tf.gather(image, rows), columns, axis=1)
    moved["heatmaps"] = shows * tf.gather(tf.gather(heatmaps, rows, axis=1), columns, axis=2)
    return moved


def _sources(
    side: int, first: tf.Tensor | int, end: tf.Tensor | int, way: tf.Tensor, flips: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns where each row or column of a moved picture comes from.

    4, first 0, end 4, way 1, no flip -> [0, 0, 1, 2], [False, True, True, True]
    4, first 0, end 3, way 0, a flip  -> [2, 1, 0, 3], [True, True, True, True]

    Args:
      side: number of rows.
      first, end: int32 [], the picture's first row, and the first one behind it. The others stay.
      way: int32 [], what it is shifted by.
      flips: bool [], whether it is mirrored, before the shift.

    Returns:
      int32 [side]; and bool [side], False where the edge is repeated.
    """
    places = tf.range(side)
    is_picture = (places >= first) & (places < end)
    shifted = tf.where(is_picture, places - way, places)
    sources = tf.where(is_picture, tf.clip_by_value(shifted, first, end - 1), places)
    mirrored = tf.where(is_picture & flips, first + end - 1 - sources, sources)
    return mirrored, sources == shifted


@gin.configurable
def recolour(
    image: tf.Tensor,
    seed: tf.Tensor,
    box: tf.Tensor | None = None,
    *,
    jitter_probability: float = 0.1,
    brightness: float = 0.05,
    contrast: tuple[float, float] = (0.8, 1.0),
    hue: float = 0.025,
    saturation: tuple[float, float] = (0.8, 1.0),
    grey_probability: float = 0.1,
    jpeg_probability: float = 0.1,
    jpeg_quality: tuple[int, int] = (70, 100),
) -> tf.Tensor:
    """Changes an image's colours, removes them, and compresses it: each with its own probability.

    Args:
      image: uint8 [side, side, 3].
      seed: int64 [2].
      box: int32 [4], the picture's place in the image; what is beside it stays black.
      jitter_probability: probability of changing brightness, contrast, hue and saturation.
      brightness: largest amount that is added, as a share of white.
      contrast: range of the factor of the differences from each colour's mean.
      hue: largest rotation of the colours around the grey axis, in turns.
      saturation: range of the factor of the differences from grey.
      grey_probability: probability of showing the luma alone.
      jpeg_probability: probability of writing and reading a JPEG.
      jpeg_quality: range of the JPEG's quality, of 100.

    Returns:
      uint8 [side, side, 3].
    """
    draws = tf.random.stateless_uniform([8], tf.random.experimental.stateless_fold_in(seed, _COLOUR_DRAW))
    jitter = draws[0] < jitter_probability
    grey = draws[1] < grey_probability
    jpeg = draws[2] < jpeg_probability

    def between(draw, least, greatest):
        return least + draw * (greatest - least)

    def mixed():
        drawn = [
            between(draws[3], -brightness, brightness),
            between(draws[4], *contrast),
            between(draws[5], -hue, hue),
            between(draws[6], *saturation),
        ]
        values = tf.where(jitter, tf.stack(drawn), [0.0, 1.0, 0.0, 1.0])
        return mix_colours(image, *tf.unstack(values), grey=grey, box=box)

    def compressed():
        least, greatest = jpeg_quality
        return tf.image.adjust_jpeg_quality(image, tf.cast(between(draws[7], least, greatest + 1), tf.int32))

    shape = image.shape
    image = tf.cond(jitter | grey, mixed, lambda: image)
    image = tf.cond(jpeg, compressed, lambda: image)
    if box is not None:  # What is beside the picture becomes black again.
        image = tf.cond(
            jitter | grey | jpeg,
            lambda: _pad(image[box[0] : box[2], box[1] : box[3]], box, shape[0]),
            lambda: image,
        )
    return tf.ensure_shape(image, shape)


def mix_colours(
    image: tf.Tensor,
    brightness: tf.Tensor,
    contrast: tf.Tensor,
    hue: tf.Tensor,
    saturation: tf.Tensor,
    grey: tf.Tensor,
    box: tf.Tensor | None = None,
) -> tf.Tensor:
    """Changes brightness, contrast, hue, saturation and grey, in this order, by one linear map of colours.

    Brightness and contrast are tf.image's. Hue and saturation are linear in the colour (a rotation around the
    grey axis; a blend with the luma). The usual way through HSV would take five times as long.

    Args:
      image: uint8 [height, width, 3].
      brightness: added, as a share of white.
      contrast: factor of the differences from each colour's mean over the picture.
      hue: rotation around the grey axis, in turns.
      saturation: factor of the differences from the luma.
      grey: bool, whether only the luma remains.
      box: int32 [4], the picture's place in the image; beside it the image is black.

    Returns:
      uint8 [height, width, 3].
    """
    height, width, _ = image.shape
    # A row has several pixels: a matrix product with 3 columns would be slow.
    together = math.gcd(height * width, _PIXELS)
    pixels = tf.reshape(tf.cast(image, tf.float32), [-1, 3 * together])
    mean = tf.reduce_mean(tf.reshape(tf.reduce_mean(pixels, 0), [together, 3]), 0)
    if box is not None:
        mean *= height * width / tf.cast(tf.reduce_prod(box[2:] - box[:2]), tf.float32)
    luma = tf.tile([_LUMA], [3, 1])
    matrix = (saturation * tf.eye(3) + (1 - saturation) * luma) @ _rotation(2 * math.pi * hue)
    matrix = tf.where(grey, luma @ matrix, matrix)
    offset = tf.linalg.matvec(matrix, (1 - contrast) * mean + 255 * brightness)
    # Each pixel is multiplied by the matrix: the same block for each of the row's pixels.
    blocks = tf.einsum("pq,ij->pjqi", tf.eye(together), contrast * matrix)
    pixels = pixels @ tf.reshape(blocks, [3 * together] * 2) + tf.tile(offset, [together])
    return tf.reshape(tf.cast(tf.clip_by_value(pixels + 0.5, 0, 255), tf.uint8), image.shape)


def _rotation(angle: tf.Tensor) -> tf.Tensor:
    """Returns the matrix of a rotation around (1, 1, 1), by Rodrigues' formula."""
    cross = tf.constant([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    return tf.cos(angle) * tf.eye(3) + (1 - tf.cos(angle)) / 3 + tf.sin(angle) * cross
