"""Pictures in the model's square equal those of training, to the pixel, without TensorFlow."""

import doctest

import numpy as np
import pytest
import tensorflow as tf
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from richhf_jax import augmentation, pixels

SIZES = pytest.mark.parametrize(
    ("size", "side"),
    [
        *(((64, 64), 64), ((128, 128), 64), ((192, 192), 64), ((96, 200), 64), ((100, 101), 64)),
        *(((40, 30), 64), ((7, 64), 64), ((1000, 9), 64), ((1, 1), 64), ((333, 517), 512), ((768, 512), 512)),
    ],
)


def noise_and_blocks(rng, size):
    """Noise has sums close to every border between two levels; blocks have flat places."""
    noise = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
    return noise, np.kron(noise[::8, ::8], np.ones((8, 8, 1), np.uint8))[: size[0], : size[1]]


@SIZES
def test_the_middle_is_that_of_clips_processor_and_of_training(rng, size, side):
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size=side, do_rescale=False, do_normalize=False
    )
    for image in noise_and_blocks(rng, size):
        found, box = pixels.square(image, side, "centre_crop")
        assert box.tolist() == [0, 0, side, side]
        theirs = processor(image, input_data_format="channels_last")["pixel_values"][0].transpose(1, 2, 0)
        assert np.abs(found - np.int32(theirs)).max() <= 1
        training = augmentation.centre_crop(tf.constant(image), side).numpy()
        assert np.abs(training - np.int32(found)).max() <= 1
        assert np.mean(training != found) < 0.01


def test_a_long_strip_shows_its_middle(rng):
    strip = np.zeros((1, 2**20, 3), np.uint8)
    strip[0, 2**19 - 2 : 2**19 + 2] = rng.integers(0, 256, (4, 3))
    found = pixels.centre_crop(strip, 16)
    np.testing.assert_array_equal(found, pixels.centre_crop(strip[:, 2**19 - 20 : 2**19 + 20], 16))
    assert np.abs(found - np.int32(augmentation.centre_crop(tf.constant(strip), 16))).max() <= 1
    np.testing.assert_array_equal(pixels.centre_crop(strip.swapaxes(0, 1), 16), found.swapaxes(0, 1))
    assert found.any()


@pytest.mark.parametrize("fit", ["resize", "letterbox"])
@SIZES
def test_it_is_the_trainings_square(rng, size, side, fit):
    for image in noise_and_blocks(rng, size):
        box = augmentation.letterbox(tf.constant(size), side) if fit == "letterbox" else None
        expected = augmentation.place(tf.constant(image), None, side, box)
        found, found_box = pixels.square(image, side, fit)
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(found_box, [0, 0, side, side] if box is None else box)


def test_a_picture_of_the_squares_size_is_untouched(rng):
    image = rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)
    assert pixels.resample(image, (16, 16)) is image


def test_docstring_examples():
    assert doctest.testmod(pixels) == (0, 2)
