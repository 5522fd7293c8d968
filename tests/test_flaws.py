import functools
import inspect

import gin
import numpy as np
import pytest
import tensorflow as tf
from scipy import ndimage

from richhf_jax import errors, feedback, flaws, gin_utils, preprocessors
from richhf_jax.datasets import consolidate, raters, scenes

SIDE = 64
WHOLE = [0, 0, SIDE, SIDE]
# The width of a cell and of the moving average's window, in pixels: how far a heatmap reaches beyond a mark.
REACH = 6


def seed(number):
    return tf.constant([0, number], tf.int64)


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


@functools.cache
def painter(**kwargs):
    """Returns a compiled `flaws.paint` of (image, seed number, box) -> numpy arrays."""
    paint = tf.function(functools.partial(flaws.paint, **kwargs))
    return lambda image, number, box=WHOLE: [
        value.numpy() for value in paint(tf.constant(image), seed(number), tf.constant(box))
    ]


def patch(pixels, radius=4.0, strength=1.0, number=0):
    """Makes a patch of uint8 [size, size, 3] around a region in its middle, a disk of a radius in pixels."""
    size = len(pixels)
    lines = (np.arange(size, dtype=np.float32) + 0.5 - size / 2) / np.float32(radius)
    y, x = np.meshgrid(lines, lines, indexing="ij")
    inside = np.maximum(1 - np.hypot(y, x), 0)
    values = [pixels[::-1].astype(np.float32), y, x, inside, np.float32(radius), np.float32(strength)]
    return flaws.Patch(tf.constant(pixels, tf.float32), *map(tf.constant, values), seed(number))


def test_pixels_come_from_where_they_are_said_to():
    pixels = noise(16, 16, 3)
    given = patch(pixels)
    np.testing.assert_allclose(given.moved(given.y, given.x), pixels, atol=1e-3)
    # A quarter of the radius is a pixel: from above, and from between the pixel and its left neighbour.
    above = given.moved(given.y - 0.25, given.x).numpy()
    np.testing.assert_allclose(above[1:], pixels[:-1], atol=1e-3)
    np.testing.assert_allclose(above[0], pixels[0], atol=1e-3)
    between = given.moved(given.y, given.x - 0.125).numpy()
    expected = (np.float32(pixels[:, 1:]) + pixels[:, :-1]) / 2
    np.testing.assert_allclose(between[:, 1:], expected, atol=1e-3)


@pytest.mark.parametrize("name", flaws.DAMAGES)
def test_each_damage_changes_the_middle_and_follows_the_seed(name):
    pixels = noise(24, 24, 3)
    damage = flaws.DAMAGES[name]
    damaged = damage(patch(pixels, radius=8.0)).numpy()
    assert damaged.shape == (24, 24, 3)
    assert np.abs(damaged - pixels)[4:20, 4:20].mean() > 10
    assert -0.01 <= damaged.min() <= damaged.max() <= 255.01
    np.testing.assert_array_equal(damaged, damage(patch(pixels, radius=8.0)))
    is_drawn = name in ("swirled", "sheared", "shuffled", "melted", "static")
    others = [damage(patch(pixels, radius=8.0, number=n)).numpy() for n in range(1, 5)]
    assert any((other != damaged).any() for other in others) == is_drawn


def test_a_warp_fades_out_towards_the_regions_edge():
    pixels = noise(24, 24, 3)
    for damage in (flaws.swirled, flaws.sheared):
        given = patch(pixels, radius=8.0)
        outside = given.inside.numpy() == 0
        np.testing.assert_allclose(damage(given).numpy()[outside], pixels[outside], atol=1e-3)


def test_shuffled_blocks_are_the_same_blocks():
    pixels = noise(8, 8, 3)
    shuffled = flaws.shuffled(patch(pixels)).numpy().round().astype(np.uint8)

    def blocks(image):
        return sorted(image[y : y + 2, x : x + 2].tobytes() for y in range(0, 8, 2) for x in range(0, 8, 2))

    assert blocks(shuffled) == blocks(pixels)
    assert (shuffled != pixels).any()


def test_the_middle_is_repeated():
    # Rows and columns with a period of 0.7 * 20 / 2 = 7 pixels: the middle's 7 x 7, beside one another.
    pixels = noise(21, 21, 3)
    repeated = flaws.repeated(patch(pixels, radius=10.0)).numpy()
    np.testing.assert_allclose(repeated, np.tile(pixels[7:14, 7:14], [3, 3, 1]), atol=0.1)


def test_what_is_above_melts_down():
    pixels = np.zeros((24, 24, 3), np.uint8)
    pixels[:12] = 200
    melted = flaws.melted(patch(pixels, radius=8.0)).numpy()[..., 0]
    assert (melted[:12] > 199).all()
    lengths = (melted > 100).sum(0)
    assert lengths.min() >= 12  # Nothing goes up.
    assert np.median(lengths) > 18
    assert len(set(lengths)) > 2  # They are strands.


@functools.cache
def flawed():
    """Paints flaws into procedural scenes: [(scene, image, heatmap, count)]."""
    config = scenes.CAPTIONS_CONFIGS["default"]
    pictures = [scenes.render(config, scenes.filename("train", number))[0] for number in range(80)]
    paint = painter(count_weights=(0.2, 0.5, 0.3))
    return [(picture, *paint(picture, number)) for number, picture in enumerate(pictures)]


def test_heatmaps_show_what_changed():
    assert {int(count) for *_, count in flawed()} == {0, 1, 2}
    for before, after, heatmap, count in flawed():
        change = np.abs(np.int32(after) - before).max(2)
        if not count:
            np.testing.assert_array_equal(after, before)
            assert not heatmap.any()
            continue
        assert heatmap.max() > 128
        # Where a second flaw undoes the first, nothing changed.
        assert (heatmap[change >= 24] > 0).mean() > 0.98
        distance = ndimage.distance_transform_edt(change < 12)
        assert distance[heatmap > 0].max() < REACH
        # What is far from the flaw is untouched.
        assert change[distance > 20].sum() == 0


def test_a_region_ends_where_the_radius_says():
    paint = painter(count_weights=(0, 1), damages=("static",), radii=(0.1, 0.1))
    areas, lengths = [], []
    for number in range(20):
        before = noise(SIDE, SIDE, 3)
        changed = (paint(before, number)[0] != before).any(2)
        areas.append(changed.sum())
        lengths += (np.ptp(np.argwhere(changed), axis=0) + 1).tolist()
    radius = 0.1 * SIDE
    # A rounded box is up to 1.18 times as large as an ellipse. The picture's edge may cut a region off.
    assert np.max(areas) < 1.25 * np.pi * radius**2
    assert np.median(areas) > 0.7 * np.pi * radius**2
    assert np.max(lengths) <= 2 * radius * 1.4


def test_half_of_the_pictures_stay_clean():
    paint = painter(damages=("static",))  # It is always seen.
    counts = np.array([paint(noise(SIDE, SIDE, 3), number)[2] for number in range(400)])
    shares = np.bincount(counts, minlength=3) / len(counts)
    # Three standard deviations are 0.075.
    np.testing.assert_allclose(shares, [0.5, 0.35, 0.15], atol=0.075)


def test_the_seed_alone_decides():
    before = noise(SIDE, SIDE, 3)
    paint = painter(count_weights=(0, 1))
    first, again, other = paint(before, 5), paint(before, 5), paint(before, 6)
    for value, same in zip(first, again, strict=True):
        np.testing.assert_array_equal(value, same)
    assert (first[0] != other[0]).any()


def test_what_does_not_show_is_not_labelled():
    plain = np.full((SIDE, SIDE, 3), 90, np.uint8)
    warp = painter(count_weights=(0, 1), damages=("swirled", "shuffled", "melted", "blurred"))
    for number in range(20):
        after, heatmap, count = warp(plain, number)
        np.testing.assert_array_equal(after, plain)
        assert not heatmap.any()
        assert count == 0
    # Changes of a few grey levels aren't painted either.
    faint = plain + noise(SIDE, SIDE, 3) % 5
    for number in range(20):
        after, heatmap, count = warp(faint, number)
        np.testing.assert_array_equal(after, faint)
        assert count == 0


def test_flaws_are_where_the_picture_is_busy():
    picture = np.full((SIDE, SIDE, 3), 90, np.uint8)
    picture[8:24, 40:56] = noise(16, 16, 3)
    paint = painter(count_weights=(0, 1), damages=("static",))
    centres = [ndimage.center_of_mass(paint(picture, number)[1]) for number in range(20)]
    assert np.abs(np.array(centres) - [16, 48]).max() < 12


def test_letterboxed_pictures_stay_in_their_box():
    box = [16, 0, 48, 64]
    picture = np.zeros((SIDE, SIDE, 3), np.uint8)
    picture[16:48] = noise(32, 64, 3)
    paint = painter(count_weights=(0, 0, 1))
    for number in range(30):
        after, heatmap, count = paint(picture, number, box)
        assert count == 2
        for pixels in (after, heatmap):
            assert pixels[16:48].any()
            assert not pixels[:16].any()
            assert not pixels[48:].any()


def test_clicked_is_wide_and_soft():
    marks = np.zeros((SIDE, SIDE), bool)
    marks[20:32, 20:32] = True
    heatmap = flaws.clicked(tf.constant(marks), tf.constant(WHOLE)).numpy()
    assert heatmap[22:30, 22:30].min() >= 250
    middle = heatmap[25].astype(int)
    assert (np.diff(middle[:26]) >= 0).all()
    assert 0 < middle[19] < 255
    assert not middle[: 20 - REACH].any()
    np.testing.assert_array_equal(heatmap, heatmap.T)
    # A gap of a pixel closes.
    marks[25] = False
    assert flaws.clicked(tf.constant(marks), tf.constant(WHOLE)).numpy()[25, 25] == 255


def test_clicked_is_like_the_raters_heatmaps():
    config = scenes.CONFIGS["default"]
    ours, regions = [], []
    for number in range(60):
        name = scenes.filename("train", number)
        truth = scenes.truth(name, config)
        if not truth.artifact_regions:
            continue
        points = [raters.rate(config, name, truth, rater).points for rater in raters.LEANINGS]
        heatmap = consolidate.mean_heatmap(
            consolidate.point_heatmap(
                given[feedback.IMPLAUSIBILITY], SIDE, SIDE, feedback.POINT_RADIUS * SIDE
            )
            for given in points
        )
        region = np.any(truth.artifact_regions, axis=0)
        clicked = flaws.clicked(tf.constant(region), tf.constant(WHOLE)).numpy()
        ours.append(np.corrcoef(clicked.ravel(), heatmap.ravel())[0, 1])
        regions.append(np.corrcoef(region.ravel(), heatmap.ravel())[0, 1])
    assert np.mean(ours) > 0.9 > np.mean(regions)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"damages": ("static", "burnt")}, r"paint.damages must be some of swirled, .* got .*'burnt'"),
        ({"damages": ()}, "paint.damages must be"),
        ({"count_weights": (0.0, 0.0)}, "count_weights must not all be 0"),
        ({"radii": (0.0, 0.0)}, "paint.radii must be a range above 0"),
        ({"radii": (0.4, 0.1)}, "paint.radii must be a range above 0, the least first"),
        ({"strengths": (1.0, 0.5)}, "paint.strengths must be a range above 0"),
        ({"least_change": 0.0}, "paint.least_change must be above 0"),
    ],
)
def test_settings_that_make_no_sense(setting, message):
    with pytest.raises(errors.UserError, match=message):
        flaws.paint(tf.constant(noise(SIDE, SIDE, 3)), seed(0), **setting)


def test_shipped_values_are_the_defaults():
    gin_utils.parse_gin_flags(gin_utils.DEFAULT_SEARCH_PATHS, ["flaws/default.gin"], [])
    names = [
        (flaws.paint, name) for name in ("count_weights", "damages", "radii", "strengths", "least_change")
    ]
    names += [
        (preprocessors.flawed_captions, name)
        for name in ("plausibility_weight", "clean_plausibility", "flaw_cost")
    ]
    for function, name in names:
        key = f"{function.__module__}.{function.__name__}.{name}"
        assert gin.query_parameter(key) == inspect.signature(function).parameters[name].default, key
