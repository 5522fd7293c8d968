import copy
import functools
import inspect
import io

import gin
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from richhf_jax import augmentation, errors, gin_utils
from richhf_jax.datasets import consolidate

SIDE = 64
WHOLE = (0, 0, SIDE, SIDE)
PART = (6, 3, 62, 55)


def seed(number):
    return tf.constant([0, number], tf.int64)


def disk(height, width, y, x):
    """Draws a white disk on black, centred at a place in shares of the sides: uint8 [height, width]."""
    rows, columns = (np.arange(height) + 0.5) / height - y, (np.arange(width) + 0.5) / width - x
    return np.uint8(255 * (rows[:, None] ** 2 + columns**2 < 0.1**2))


def centre(pixels):
    """Computes the centroid (row, column) in pixels; 0.5 is the middle of the first pixel."""
    weights = np.float64(pixels) / np.float64(pixels).sum()
    rows, columns = np.indices(pixels.shape) + 0.5
    return np.array([(rows * weights).sum(), (columns * weights).sum()])


def picture(height, width, *place):
    return np.repeat(disk(height, width, *place)[..., None], 3, axis=2)


def show(image, heatmaps, window, monkeypatch, fit="resize"):
    """Calls `augmentation.show` with a given window in place of a random one."""
    monkeypatch.setattr(augmentation, "draw_window", lambda *args: tf.constant(window))
    monkeypatch.setattr(augmentation, "recolour", lambda image, *args: image)
    encoded = [tf.constant(consolidate.encode_png(pixels)) for pixels in (image, *heatmaps)]
    shown = augmentation.show(encoded[0], encoded[1:], SIDE, seed(0), True, fit=fit)
    return {name: value.numpy() for name, value in shown.items()}


SIZES = {
    "as it is": ((64, 64), (64, 64)),
    "enlarged": ((40, 40), (50, 50)),
    "shrunk": ((256, 256), (100, 100)),
    "wide": ((48, 96), (48, 96)),
    "tall, of the square's height": ((64, 32), (64, 32)),
    "heatmaps larger": ((64, 64), (128, 128)),
    "heatmaps smaller": ((128, 200), (64, 100)),
}


@pytest.mark.parametrize("fit", ["resize", "letterbox"])
@pytest.mark.parametrize("window", [WHOLE, PART], ids=["whole", "part"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_marked_place_is_where_it_must_be_in_image_and_heatmaps(sizes, window, fit, monkeypatch):
    place = np.array([0.4, 0.55])
    image, heatmap = picture(*sizes[0], *place), disk(*sizes[1], *place)
    shown = show(image, [heatmap, heatmap], window, monkeypatch, fit)
    box = np.array(shown.get("image_box", WHOLE))
    top_left, bottom_right = np.array(window[:2]), np.array(window[2:])
    expected = (place * SIDE - top_left) / (bottom_right - top_left) * (box[2:] - box[:2]) + box[:2]
    # 0.3 pixels: where an enlarged heatmap's pixel is its nearest one, a disk's edge moves by up to half a
    # pixel; and the pixels of a small disk aren't quite round in themselves (0.15 for 40 pixels a side).
    for pixels in (shown["image"][..., 0], *shown["heatmaps"]):
        np.testing.assert_allclose(centre(pixels), expected, atol=0.3)
    assert shown["image"].dtype == shown["heatmaps"].dtype == np.uint8
    assert shown["image"].shape == (SIDE, SIDE, 3)
    assert shown["heatmaps"].shape == (2, SIDE, SIDE)


def test_what_fits_is_untouched(rng, monkeypatch):
    image = rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    heatmap = rng.integers(0, 256, (SIDE, SIDE), np.uint8)
    for fit in ("resize", "letterbox"):
        shown = show(image, [heatmap], WHOLE, monkeypatch, fit)
        np.testing.assert_array_equal(shown["image"], image)
        np.testing.assert_array_equal(shown["heatmaps"][0], heatmap)
    wide = show(image[:32], [heatmap[:32]], WHOLE, monkeypatch, "letterbox")
    np.testing.assert_array_equal(wide["image"][16:48], image[:32])
    np.testing.assert_array_equal(wide["heatmaps"][0, 16:48], heatmap[:32])
    assert wide["image_box"].tolist() == [16, 0, 48, 64]
    assert not wide["image"][:16].any()
    assert not wide["image"][48:].any()


@pytest.mark.parametrize("size", [(2 * SIDE, 4 * SIDE), (4 * SIDE, 2 * SIDE)])
def test_the_middle_of_image_and_heatmap_is_cropped(size, monkeypatch):
    image = np.full((*size, 3), 200, np.uint8)
    middle = tuple(slice(length // 2 - SIDE, length // 2 + SIDE) for length in size)
    image[middle] = 90
    shown = show(image, [image[..., 0]], WHOLE, monkeypatch, fit="centre_crop")
    assert shown.keys() == {"image", "heatmaps"}
    # The filter reaches beyond the border by two pixels.
    assert (shown["image"][2:-2, 2:-2] == 90).all()
    assert (shown["heatmaps"][0, 2:-2, 2:-2] == 90).all()
    part = show(image, [image[..., 0]], PART, monkeypatch, fit="centre_crop")
    assert (part["image"] == 90).all()


def test_without_heatmaps_and_with_another_fit(rng, monkeypatch):
    image = rng.integers(0, 256, (8, 8, 3), np.uint8)
    shown = show(image, [], WHOLE, monkeypatch)
    assert shown.keys() == {"image", "heatmaps"}
    assert shown["heatmaps"].shape == (0, SIDE, SIDE)
    with pytest.raises(errors.UserError, match=r"show.fit must be .* got 'stretch'"):
        show(image, [], WHOLE, monkeypatch, fit="stretch")


@pytest.mark.parametrize("size", [(160, 100), (40, 50)])
def test_resize_is_that_of_tensorflow_and_pillow(size, rng):
    image = rng.integers(0, 256, (*size, 3), np.uint8)
    ours = np.int32(augmentation.place(tf.constant(image), tf.constant(WHOLE), SIDE))
    tensorflow = tf.image.resize(image, [SIDE, SIDE], antialias=True).numpy()
    # Half a grey level by rounding, 0.01 by another order of sums.
    np.testing.assert_allclose(ours, tensorflow, atol=0.51)
    pillow = np.int32(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    # Pillow rounds twice, after the columns and after the rows.
    assert np.abs(ours - pillow).max() <= 2


def test_crop_is_that_of_pillow(rng):
    image = rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    ours = np.int32(augmentation.place(tf.constant(image), tf.constant(PART), SIDE))
    top, left, bottom, right = PART
    part = Image.fromarray(image[top:bottom, left:right])
    pillow = np.int32(part.resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    assert np.abs(ours - pillow).max() <= 2


def test_enlarged_heatmaps_keep_their_values(rng):
    heatmap = rng.choice(np.uint8([0, 85, 170, 255]), (SIDE, SIDE, 1))
    shown = augmentation.place(tf.constant(heatmap), tf.constant(PART), SIDE).numpy()
    assert set(np.unique(shown)) == {0, 85, 170, 255}


def test_shrinking_averages():
    stripes = np.zeros((4 * SIDE, 4 * SIDE, 1), np.uint8)
    stripes[::4] = 200
    small = augmentation.place(tf.constant(stripes), tf.constant(WHOLE), SIDE).numpy()
    assert 30 <= small.min() <= small.max() <= 70


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((100, 200), [16, 0, 48, 64]),
        ((200, 100), [0, 16, 64, 48]),
        ((7, 7), WHOLE),
        ((1, 1000), [31, 0, 32, 64]),
    ],
)
def test_letterbox(size, box):
    np.testing.assert_array_equal(augmentation.letterbox(tf.constant(size), SIDE), box)


@functools.cache
def windows(count=400):
    draw = functools.partial(augmentation.draw_window, side=512)
    return np.array([draw(seed(number)) for number in range(count)])


def test_half_of_the_examples_are_cropped_to_shares_and_places_all_over():
    sizes = windows()[:, 2:] - windows()[:, :2]
    cropped = (sizes < 512).any(1)
    assert 0.42 < cropped.mean() < 0.58
    shares, starts = sizes[cropped] / 512, windows()[cropped, :2]
    assert shares.min() >= 0.799  # Rounded to a whole pixel.
    np.testing.assert_allclose(shares.mean(0), 0.9, atol=0.015)
    assert np.abs(np.corrcoef(shares.T)[0, 1]) < 0.2
    assert (starts >= 0).all()
    assert (windows()[:, 2:] <= 512).all()
    room = np.maximum(512 - sizes[cropped], 1)
    np.testing.assert_allclose((starts / room).mean(0), 0.5, atol=0.1)
    again = augmentation.draw_window(seed(7), 512)
    np.testing.assert_array_equal(again, windows()[7])


def colours(count=8, **kwargs):
    """Recolours images of random pixels, with probability 1 for the changes in `kwargs`."""
    image = np.random.default_rng(0).integers(40, 216, (16, 16, 3), np.uint8)
    off = {"jitter_probability": 0.0, "grey_probability": 0.0, "jpeg_probability": 0.0}
    recolour = functools.partial(augmentation.recolour, tf.constant(image), **{**off, **kwargs})
    return image, [recolour(seed(number)).numpy() for number in range(count)]


def test_each_change_of_colours_has_its_own_tenth_of_the_examples():
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)

    @tf.function
    def recolour(number):
        return augmentation.recolour(tf.constant(image), tf.stack([tf.zeros_like(number), number]))

    shown = np.stack([recolour(tf.constant(number, tf.int64)) for number in range(500)])
    changed = (shown != image).any((1, 2, 3))
    assert 0.2 < changed.mean() < 0.34  # 1 - 0.9 ** 3 = 0.27; a standard deviation is 0.02.
    grey = (shown == shown[..., :1]).all((1, 2, 3))
    assert 0.05 < grey.mean() < 0.16


def test_nothing_changes_unless_asked():
    image = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    encoded = tf.constant(consolidate.encode_png(image))
    for number in range(30):
        shown = augmentation.show(encoded, [encoded], SIDE, seed(number), False)
        np.testing.assert_array_equal(shown["image"], image)


def test_the_same_seed_changes_the_same():
    kwargs = {"jitter_probability": 1.0, "jpeg_probability": 1.0}
    first, second = colours(**kwargs)[1], colours(**kwargs)[1]
    np.testing.assert_array_equal(first, second)
    assert len({pixels.tobytes() for pixels in first}) == len(first)


def test_grey_is_the_luma():
    image, (grey,) = colours(1, grey_probability=1.0)
    expected = np.asarray(Image.fromarray(image).convert("L"), np.int32)
    assert np.abs(grey - expected[..., None]).max() <= 1  # Pillow cuts off, we round.


def test_jpeg_noise():
    image, noisy = colours(20, jpeg_probability=1.0)
    for pixels in noisy:
        assert (pixels != image).any()
    qualities = {pixels.tobytes() for pixels in noisy}
    assert len(qualities) > 8
    best, worst = (
        colours(1, jpeg_probability=1.0, jpeg_quality=(quality, quality))[1][0] for quality in (100, 70)
    )
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=70)
    assert np.abs(np.int32(worst) - np.asarray(Image.open(buffer), np.int32)).max() <= 3  # Two libraries.
    assert np.abs(best - np.float32(image)).mean() < np.abs(worst - np.float32(image)).mean()


def mix(image, brightness=0.0, contrast=1.0, hue=0.0, saturation=1.0, grey=False, box=None):
    values = [tf.constant(value, tf.float32) for value in (brightness, contrast, hue, saturation)]
    box = None if box is None else tf.constant(box)
    return np.int32(augmentation.mix_colours(tf.constant(image), *values, tf.constant(grey), box))


def test_brightness_and_contrast_are_those_of_tensorflow(rng):
    image = rng.integers(0, 256, (8, 12, 3), np.uint8)
    assert np.abs(mix(image, brightness=0.05) - tf.image.adjust_brightness(image, 0.05)).max() <= 1
    assert np.abs(mix(image, contrast=0.8) - tf.image.adjust_contrast(image, 0.8)).max() <= 1
    np.testing.assert_array_equal(mix(image), image)


def test_hue_and_saturation_leave_grey_as_it_is(rng):
    image = np.repeat(rng.integers(0, 256, (8, 8, 1), np.uint8), 3, axis=2)
    assert np.abs(mix(image, hue=0.025, saturation=0.8) - image).max() <= 1


def test_a_third_of_a_turn_makes_red_green():
    red = np.zeros((2, 2, 3), np.uint8)
    red[..., 0] = 200
    np.testing.assert_array_equal(mix(red, hue=1 / 3)[0, 0], [0, 200, 0])
    # Grey of red is its luma, 0.299 of it.
    np.testing.assert_array_equal(mix(red, saturation=0.0)[0, 0], [60, 60, 60])
    np.testing.assert_array_equal(mix(red, grey=True), mix(red, saturation=0.0))


def test_the_box_alone_has_colours(rng):
    image = rng.integers(0, 256, (32, 32, 3), np.uint8)
    box = [8, 0, 24, 32]
    padded = np.zeros_like(image)
    padded[8:24] = image[8:24]
    ours = mix(padded, contrast=0.8, box=box)[8:24]
    assert np.abs(ours - tf.image.adjust_contrast(image[8:24], 0.8)).max() <= 1
    recoloured = augmentation.recolour(
        tf.constant(padded),
        seed(0),
        tf.constant(box),
        jitter_probability=1.0,
        jpeg_probability=1.0,
        brightness=0.5,
    ).numpy()
    assert (recoloured[8:24] != padded[8:24]).any()
    assert not recoloured[:8].any()
    assert not recoloured[24:].any()


def test_shipped_values_are_the_defaults():
    files = ["models/rahf_tiny.gin", "augmentation/default.gin"]
    gin_utils.parse_gin_flags(gin_utils.DEFAULT_SEARCH_PATHS, files, [])
    for function in (augmentation.show, augmentation.draw_window, augmentation.recolour, augmentation.move):
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY:
                key = f"richhf_jax.augmentation.{function.__name__}.{name}"
                # The copy of a macro is its value.
                assert copy.deepcopy(gin.query_parameter(key)) == parameter.default, key


@pytest.mark.parametrize(
    ("first", "end", "way", "flips", "sources", "shows"),
    [
        (0, 4, 0, False, [0, 1, 2, 3], [1, 1, 1, 1]),
        (0, 4, 1, False, [0, 0, 1, 2], [0, 1, 1, 1]),
        (0, 4, -1, False, [1, 2, 3, 3], [1, 1, 1, 0]),
        (0, 4, 1, True, [3, 3, 2, 1], [0, 1, 1, 1]),
        (0, 3, 0, True, [2, 1, 0, 3], [1, 1, 1, 1]),
        (1, 3, 1, False, [0, 1, 1, 3], [1, 0, 1, 1]),
        (1, 3, 9, False, [0, 1, 1, 3], [1, 0, 0, 1]),
    ],
)
def test_sources_of_a_moved_row(first, end, way, flips, sources, shows):
    given = augmentation._sources(4, *map(tf.constant, (first, end, way, flips)))
    assert given[0].numpy().tolist() == sources
    assert given[1].numpy().tolist() == [bool(show) for show in shows]


def moves(box=None, count=40, may_flip=True, **kwargs):
    """Moves an image and a heatmap of its first channel, which is nowhere 0, as each seed says."""
    first, last = (slice(box[axis], box[axis + 2]) if box else slice(None) for axis in (0, 1))
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    inside = image[first, last]
    inside[:] = np.random.default_rng(0).integers(1, 256, inside.shape, np.uint8)
    arguments = [tf.constant(image), tf.constant(image[None, ..., 0])]
    box = None if box is None else tf.constant(box)
    move = functools.partial(augmentation.move, may_flip=may_flip, box=box, **kwargs)
    moved = [move(*arguments, seed(number)) for number in range(count)]
    return image, [(pair["image"].numpy(), pair["heatmaps"].numpy()[0]) for pair in moved]


def test_half_of_the_pictures_are_mirrored_with_their_heatmaps():
    image, moved = moves(flip_probability=0.5)
    mirrored = 0
    for shown, heatmap in moved:
        is_mirrored = (shown != image).any()
        np.testing.assert_array_equal(shown, image[:, ::-1] if is_mirrored else image)
        np.testing.assert_array_equal(heatmap, shown[..., 0])
        mirrored += is_mirrored
    assert 10 < mirrored < 30


@pytest.mark.parametrize("box", [None, [15, 0, 48, 64], [0, 7, 64, 20]])
def test_image_and_heatmap_move_alike(box):
    image, moved = moves(box, flip_probability=0.5, shift=0.1)
    top, left, bottom, right = box or WHOLE
    for shown, heatmap in moved:
        beside = np.ones((SIDE, SIDE), bool)
        beside[top:bottom, left:right] = False
        assert not shown[beside].any()
        assert not heatmap[beside].any()
        assert shown[~beside].all()
        seen = heatmap > 0
        np.testing.assert_array_equal(heatmap[seen], shown[..., 0][seen])
        # What is seen is a part of the picture, or of its mirror image.
        rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
        assert seen.sum() == len(rows) * len(columns)
        part = shown[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        picture = image[top:bottom, left:right]
        y, x = (
            (end - begin) - size
            for begin, end, size in ((top, bottom, len(rows)), (left, right, len(columns)))
        )
        places = [(slice(a, a + len(rows)), slice(b, b + len(columns))) for a in (0, y) for b in (0, x)]
        assert any((part == view[at]).all() for view in (picture, picture[:, ::-1]) for at in places)
        # The edge is repeated.
        assert (shown[top] == shown[max(rows[0], top)]).all() if rows[0] > top else True
    ways = {(int((heatmap > 0).any(1).sum()), int((heatmap > 0).any(0).sum())) for _, heatmap in moved}
    assert len(ways) > 5
    least = (round(0.9 * (bottom - top)) - 1, round(0.9 * (right - left)) - 1)
    assert np.min(list(ways), axis=0).tolist() >= list(least)


def test_pictures_that_must_not_be_mirrored():
    image, moved = moves(flip_probability=1.0, may_flip=False, count=10)
    assert all((shown == image).all() for shown, _ in moved)


def test_geometric_augmentation_keeps_colours_and_sizes(monkeypatch):
    files = ["experiments/quickstart.gin", "augmentation/geometric.gin"]
    gin_utils.parse_gin_flags(gin_utils.DEFAULT_SEARCH_PATHS, files, ["MODEL_DIR = 'none'"])
    assert gin_utils.macro("AUGMENT") is True
    image = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    encoded = tf.constant(consolidate.encode_png(image))
    colours_before = {tuple(pixel) for pixel in image.reshape(-1, 3)}
    shown = [augmentation.show(encoded, [], SIDE, seed(number), True)["image"].numpy() for number in range(8)]
    for pixels in shown:
        assert {tuple(pixel) for pixel in pixels.reshape(-1, 3)} <= colours_before
    assert len({pixels.tobytes() for pixels in shown}) == len(shown)
