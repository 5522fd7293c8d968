import numpy as np
import pytest
import tensorflow as tf

from richhf_jax import feature_converters

LENGTHS = {"image": 2, "inputs": 4, "targets": 5, "heatmaps": 1, "scores": 2, "texts": 1}


def task_example():
    return {
        "image": np.full((2, 2, 3), 7, np.uint8),
        "inputs": np.int32([[7, 8, 1, 0]]),
        "heatmaps": np.full((1, 2, 2), 9, np.uint8),
        "heatmap_weights": np.float32([1]),
        "scores": np.float32([0.5, 1.0]),
        "score_weights": np.float32([1, 0]),
        "targets": np.int32([[3, 9, 1, 0, 0]]),
        "inputs_words_cut": np.int32(2),
        "targets_words_cut": np.int32(0),
        "texts": np.array(["a b"]),
        "filename": "train/1.png",
    }


def convert(example, lengths=LENGTHS):
    dataset = tf.data.Dataset.from_tensors(example)
    (batch,) = feature_converters.RahfFeatureConverter()(dataset, lengths).as_numpy_iterator()
    return batch


def test_model_features():
    expected = {
        "image": np.full((2, 2, 3), 7, np.uint8),
        "encoder_input_tokens": np.int32([[7, 8, 1, 0]]),
        "encoder_words_cut": np.int32(2),
        "heatmap_targets": np.full((1, 2, 2), 9, np.uint8),
        "heatmap_weights": np.float32([1]),
        "score_targets": np.float32([0.5, 1.0]),
        "score_weights": np.float32([1, 0]),
        "decoder_target_tokens": np.int32([[3, 9, 1, 0, 0]]),
        "decoder_input_tokens": np.int32([[0, 3, 9, 1, 0]]),
        "decoder_loss_weights": np.float32([[1, 1, 1, 0, 0]]),
        "decoder_words_cut": np.int32(0),
    }
    batch = convert(task_example())
    assert batch.keys() == expected.keys()
    for name, value in expected.items():
        assert batch[name].dtype == value.dtype, name
        np.testing.assert_array_equal(batch[name], value, err_msg=name)


def test_the_box_of_a_letterbox_is_passed_on():
    box = np.int32([0, 0, 1, 2])
    np.testing.assert_array_equal(convert({**task_example(), "image_box": box})["image_box"], box)


def test_a_text_without_label_has_no_weight():
    batch = convert({**task_example(), "targets": np.zeros((1, 5), np.int32)})
    assert not batch["decoder_loss_weights"].any()


def test_wrong_length_is_refused():
    with pytest.raises(tf.errors.InvalidArgumentError):
        convert(task_example(), {**LENGTHS, "inputs": 3})


def test_wrong_dtype_is_refused():
    with pytest.raises(ValueError, match="incorrect type for feature 'image'"):
        convert({**task_example(), "image": np.zeros((2, 2, 3), np.float32)})
