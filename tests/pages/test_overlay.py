"""Heatmaps as pictures: colours that grow lighter with heat, laid over an image."""

import subprocess
import sys

import numpy as np
import pytest

from richhf_jax.pages import overlay


def test_picture_grows_lighter_and_more_opaque_with_heat():
    picture = overlay.picture(np.linspace(0, 1, 256)[None])
    assert picture.mode == "RGBA"
    pixels = np.asarray(picture, float)[0]
    lightness = pixels[:, :3] @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(lightness) >= 0).all()
    assert lightness[0] < 5 < 240 < lightness[-1]
    assert (np.diff(pixels[:, 3]) >= 0).all()
    # The picture is opaque from 0.4 on; below, alpha is in proportion to the heat.
    assert pixels[[0, 51, 102, 255], 3].tolist() == [0, 128, 255, 255]


def test_picture_has_the_colours_of_the_scale_and_clips_to_it():
    stops = np.append(np.linspace(0, 1, len(overlay.COLOURS)), (-1, 2))
    pixels = np.asarray(overlay.picture(stops[:, None]))
    assert pixels.shape == (11, 1, 4)
    np.testing.assert_array_equal(pixels[:9, 0, :3], overlay.COLOURS)
    np.testing.assert_array_equal(pixels[9:], pixels[[0, 8]])


def test_draw_blends_by_heat_and_opacity():
    image = np.full((2, 3, 3), 100, np.uint8)
    heatmap = np.array([[0, 0.2, 1], [0, 0.2, 1]], np.float32)
    before = image.copy()
    drawn = overlay.draw(image, heatmap, opacity=0.5)
    assert (drawn.mode, drawn.size) == ("RGB", (3, 2))
    alpha = np.array([0, 0.25, 0.5])[:, None]
    colours = np.asarray(overlay.picture(heatmap), float)[0, :, :3]
    np.testing.assert_allclose(np.asarray(drawn)[1], 100 * (1 - alpha) + colours * alpha, atol=1)
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize(("opacity", "drawn"), [(0, (7, 8, 9)), (1, (252, 255, 164))])
def test_draw_at_the_ends_of_opacity(opacity, drawn):
    image = np.full((1, 1, 3), (7, 8, 9), np.uint8)
    assert overlay.draw(image, np.ones((1, 1), np.float32), opacity).getpixel((0, 0)) == drawn


def test_draw_stretches_a_heatmap_of_another_size():
    image = np.zeros((4, 8, 3), np.uint8)
    heatmap = np.array([[0, 1]], np.float32)
    row = np.float32([[0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1]])
    np.testing.assert_allclose(overlay.resize(heatmap, (8, 4)), row.repeat(4, 0))
    expected = overlay.draw(image, row.repeat(4, 0))
    assert overlay.draw(image, heatmap).tobytes() == expected.tobytes()


def test_needs_no_jax():
    code = "import sys, richhf_jax.pages.overlay; sys.exit('jax' in sys.modules or 'etils' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
