"""Pictures in the model's square equal those of training, to the pixel, without TensorFlow."""

import doctest

import numpy as np
import pytest
import tensorflow as tf

from richhf_jax import augmentation, pixels


@pytest.mark.parametrize("fit", pixels.FITS)
@pytest.mark.parametrize(
    ("size", "side"),
    [
        *(((64, 64), 64), ((128, 128), 64), ((192, 192), 64), ((96, 200), 64), ((100, 101), 64)),
        *(((40, 30), 64), ((7, 64), 64), ((1000, 9), 64), ((1, 1), 64), ((333, 517), 512), ((768, 512), 512)),
    ],
)
def test_it_is_the_trainings_square(rng, size, side, fit):
    # Noise has sums close to every border between two levels; blocks have flat places.
    noise = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
    blocks = np.kron(noise[::8, ::8], np.ones((8, 8, 1), np.uint8))[: size[0], : size[1]]
    for image in (noise, blocks):
        box = augmentation.letterbox(tf.constant(size), side) if fit == "letterbox" else None
        expected = augmentation.place(tf.constant(image), None, side, box)
        found, found_box = pixels.square(image, side, fit)
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(found_box, [0, 0, side, side] if box is None else box)


def test_a_picture_of_the_squares_size_is_untouched(rng):
    image = rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)
    assert pixels.resample(image, (16, 16)) is image


def test_docstring_examples():
    assert doctest.testmod(pixels) == (0, 1)
