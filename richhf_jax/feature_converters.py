"""Converts task features to model features: `RahfFeatureConverter`."""

from collections.abc import Mapping

import numpy as np
import seqio
import tensorflow as tf

from richhf_jax import preprocessors

FeatureSpec = seqio.FeatureConverter.FeatureSpec


class RahfFeatureConverter(seqio.FeatureConverter):
    """Feature converter of the RAHF models, for both variants.

    A task example with one prompt, one heatmap, two scores and one text
        {"image": ..., "inputs": [[7, 8, 1, 0]], "inputs_words_cut": 0, "heatmaps": [...],
         "heatmap_weights": [1.0], "scores": [0.5, 1.0], "score_weights": [1.0, 1.0],
         "targets": [[3, 9, 1, 0, 0]], "targets_words_cut": 0}
    becomes
        {"image": ..., "encoder_input_tokens": [[7, 8, 1, 0]], "encoder_words_cut": 0,
         "heatmap_targets": [...], "heatmap_weights": [1.0], "score_targets": [0.5, 1.0],
         "score_weights": [1.0, 1.0], "decoder_target_tokens": [[3, 9, 1, 0, 0]],
          "decoder_input_tokens": [[0, 3, 9, 1, 0]],
          "decoder_loss_weights": [[1.0, 1.0, 1.0, 0.0, 0.0]], "decoder_words_cut": 0}

    Images and heatmaps stay uint8: the model normalises them on the device. A text slot without label has
    only padding, so it has no weight. Nothing is packed. Examples of letterboxed images have one more
    feature, `image_box`, which is passed on.
    """

    TASK_FEATURES = {
        "image": FeatureSpec(dtype=tf.uint8, rank=3),
        "inputs": FeatureSpec(dtype=tf.int32, rank=2, sequence_dim=1),
        "targets": FeatureSpec(dtype=tf.int32, rank=2, sequence_dim=1),
        "heatmaps": FeatureSpec(dtype=tf.uint8, rank=3),
        "scores": FeatureSpec(dtype=tf.float32),
        "texts": FeatureSpec(dtype=tf.string),
    }
    MODEL_FEATURES = {
        "image": FeatureSpec(dtype=tf.uint8, rank=3),
        "encoder_input_tokens": FeatureSpec(dtype=tf.int32, rank=2, sequence_dim=1),
        "encoder_words_cut": FeatureSpec(dtype=tf.int32, rank=0),
        "heatmap_targets": FeatureSpec(dtype=tf.uint8, rank=3),
        "heatmap_weights": FeatureSpec(dtype=tf.float32),
        "score_targets": FeatureSpec(dtype=tf.float32),
        "score_weights": FeatureSpec(dtype=tf.float32),
        "decoder_target_tokens": FeatureSpec(dtype=tf.int32, rank=2, sequence_dim=1),
        "decoder_input_tokens": FeatureSpec(dtype=tf.int32, rank=2, sequence_dim=1),
        "decoder_loss_weights": FeatureSpec(dtype=tf.float32, rank=2, sequence_dim=1),
        "decoder_words_cut": FeatureSpec(dtype=tf.int32, rank=0),
    }
    LETTERBOX_FEATURES = {"image_box": FeatureSpec(dtype=tf.int32)}
    PACKING_FEATURE_DTYPES = {}

    def __init__(self, **kwargs):
        super().__init__(**{"pack": False, **kwargs})

    @preprocessors.plain_graph
    def __call__(self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]) -> tf.data.Dataset:
        """Converts a dataset of task examples, and checks it before and after."""
        return super().__call__(ds, task_feature_lengths)

    @preprocessors.plain_graph
    def convert_example(self, features: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Converts one task example to one model example."""
        targets = features["targets"]
        # [texts, target_length] shifted right by one
        shifted = tf.pad(targets[:, :-1], [[0, 0], [1, 0]], constant_values=self.bos_id)
        box = {name: features[name] for name in self.LETTERBOX_FEATURES if name in features}
        return {
            "image": features["image"],
            **box,
            "encoder_input_tokens": features["inputs"],
            "encoder_words_cut": features["inputs_words_cut"],
            "heatmap_targets": features["heatmaps"],
            "heatmap_weights": features["heatmap_weights"],
            "score_targets": features["scores"],
            "score_weights": features["score_weights"],
            "decoder_target_tokens": targets,
            "decoder_input_tokens": shifted,
            "decoder_loss_weights": tf.cast(targets != 0, tf.float32),
            "decoder_words_cut": features["targets_words_cut"],
        }

    def _convert_features(
        self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
    ) -> tf.data.Dataset:
        if self.LETTERBOX_FEATURES.keys() <= ds.element_spec.keys():
            # seqio compares the result with this. The class's own attribute stays as it is.
            self.MODEL_FEATURES = {**self.MODEL_FEATURES, **self.LETTERBOX_FEATURES}
        return ds.map(self.convert_example, num_parallel_calls=tf.data.AUTOTUNE)

    def get_model_feature_lengths(self, task_feature_lengths: Mapping[str, int]) -> Mapping[str, int]:
        """Returns the size of each model feature along its `sequence_dim`."""
        lengths = task_feature_lengths
        return {
            "image": lengths["image"],
            "encoder_input_tokens": lengths["inputs"],
            "heatmap_targets": lengths["heatmaps"],
            "heatmap_weights": lengths["heatmaps"],
            "score_targets": lengths["scores"],
            "score_weights": lengths["scores"],
            "decoder_target_tokens": lengths["targets"],
            "decoder_input_tokens": lengths["targets"],
            "decoder_loss_weights": lengths["targets"],
            **{name: 4 for name in self.LETTERBOX_FEATURES if name in self.MODEL_FEATURES},
            # Scalars: seqio wants a length for each name, and ignores these.
            "encoder_words_cut": 1,
            "decoder_words_cut": 1,
        }


def converted_shapes(
    task_feature_lengths: Mapping[str, int],
    batch_size: int,
    *,
    variant: str,
    letterbox: bool = False,
) -> dict[str, np.ndarray]:
    """Returns what `input_pipeline.data_shapes` finds in a task's data, without any data.

    Args:
      task_feature_lengths: sizes and slot counts; see `preprocessors`.
      batch_size: examples in a batch.
      variant: one of `feedback.VARIANTS`.
      letterbox: whether pictures are letterboxed (`augmentation.show`).

    Returns:
      Name -> shape and dtype of a whole batch, as zeros that take no memory.

    Raises:
      errors.UserError: a length is missing, or a slot count makes no sense for the variant.
    """
    slots = preprocessors.slots_of(task_feature_lengths, variant)
    side, spec = task_feature_lengths["image"], tf.TensorSpec
    example = {
        "image": spec([side, side, 3], tf.uint8),
        "inputs": spec([slots.prompts(variant), task_feature_lengths["inputs"]], tf.int32),
        "inputs_words_cut": spec([], tf.int32),
        "heatmaps": spec([slots.heatmaps, side, side], tf.uint8),
        "heatmap_weights": spec([slots.heatmaps], tf.float32),
        "scores": spec([slots.scores], tf.float32),
        "score_weights": spec([slots.scores], tf.float32),
        "targets": spec([slots.texts, task_feature_lengths["targets"]], tf.int32),
        "targets_words_cut": spec([], tf.int32),
    }
    if letterbox:
        example |= {"image_box": spec([4], tf.int32)}
    convert = tf.function(RahfFeatureConverter().convert_example)
    features = convert.get_concrete_function(example).structured_outputs
    return {
        name: np.broadcast_to(np.zeros([], feature.dtype.as_numpy_dtype), [batch_size, *feature.shape])
        for name, feature in features.items()
    }
