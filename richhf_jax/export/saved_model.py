"""A TensorFlow SavedModel with two signatures, of TensorFlow's own operations alone.

serving_default   image bytes and prompts in: what training reads them with is part of the graph
arrays            the arrays of `program.input_shapes` in
"""

import pathlib
from collections.abc import Callable
from typing import NamedTuple

import orbax.export as orbax_export
import tensorflow as tf

from richhf_jax import augmentation, feedback, preprocessors
from richhf_jax.export import program, stablehlo, tf_vocabulary
from richhf_jax.model_description import ModelDescription

FOLDER = "saved_model"


def write(directory: pathlib.Path, description: ModelDescription, params: program.Arrays) -> None:
    """Writes the SavedModel into a folder of the directory. Its variables are the parameters."""
    shapes = program.input_shapes(description, None)
    module = orbax_export.JaxModule(
        dict(params),
        program.make(description),
        input_polymorphic_shape=dict.fromkeys(shapes, "batch, ..."),
        jax2tf_kwargs={"native_serialization_platforms": stablehlo.PLATFORMS},
    )
    arrays = {
        name: tf.TensorSpec([None, *shape.shape[1:]], tf.as_dtype(shape.dtype), name=name)
        for name, shape in shapes.items()
    }
    manager = orbax_export.ExportManager(module, [orbax_export.ServingConfig("arrays", [arrays])])
    (predict,) = module.methods.values()
    serve = _of_strings(description, predict)
    manager.save(str(directory / FOLDER), signature_overrides={"serving_default": serve})


def _of_strings(description: ModelDescription, predict: Callable) -> Callable:
    """The function of strings, and its words among the outputs: string and values [batch, words]."""
    reader = _Reader(description)

    @tf.function(
        input_signature=[tf.TensorSpec([None], tf.string, name=n) for n in ("image_bytes", "prompts")]
    )
    def serve(image_bytes, prompts):
        words = reader.words(prompts)
        outputs = dict(predict(reader.inputs(image_bytes, prompts, words)))
        # Of a word without number, or that there was no room for, nothing is known.
        column = tf.clip_by_value(words.numbers - 1, 0, description.feature_lengths["targets"] - 1)
        known = (words.numbers > 0) & (words.numbers <= description.feature_lengths["targets"])
        by_number = outputs.pop("misaligned_probability"), outputs.pop("misaligned")
        probability, misaligned = (tf.gather(values, column, batch_dims=1) for values in by_number)
        return outputs | {
            "words": words.texts,
            "misaligned_probability": tf.where(known, probability, float("nan")),
            "misaligned": known & misaligned,
        }

    return serve


class _Words(NamedTuple):
    """The words of some prompts.

    Attributes:
      texts: string [batch, words], "" behind a prompt's last.
      numbers: int32 [batch, words], 0 for a word that the vocabulary writes as nothing.
      pieces, piece_numbers: ragged int32 [batch, pieces], and the number of each one's word.
    """

    texts: tf.Tensor
    numbers: tf.Tensor
    pieces: tf.RaggedTensor
    piece_numbers: tf.RaggedTensor


class _Reader:
    """Image bytes and prompts -> the program's inputs, as training makes them."""

    def __init__(self, description: ModelDescription):
        self._vocabulary = tf_vocabulary.StockVocabulary(description.vocabulary)
        self._lengths = description.feature_lengths
        self._fit = description.fit
        self._tasks = feedback.task_prompts(description.network.variant, "")

    def inputs(self, image_bytes: tf.Tensor, prompts: tf.Tensor, words: _Words) -> dict[str, tf.Tensor]:
        """string [batch], string [batch] -> see `program.input_shapes`."""
        length, target_length = self._lengths["inputs"], self._lengths["targets"]
        texts = tf.constant(self._tasks)[None] + prompts[:, None]
        tokens, _ = preprocessors.encode(tf.reshape(texts, [-1]), length, self._vocabulary)
        return {
            **self._pictures(image_bytes),
            "encoder_input_tokens": tf.reshape(tokens, [-1, len(self._tasks), length]),
            "word_pieces": words.pieces.to_tensor(shape=[None, target_length]),
            "word_numbers": words.piece_numbers.to_tensor(shape=[None, target_length]),
        }

    def _pictures(self, image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        side = self._lengths["image"]
        names = ("image", "image_box") if self._fit == "letterbox" else ("image",)
        specs = {"image": tf.TensorSpec([side, side, 3], tf.uint8), "image_box": tf.TensorSpec([4], tf.int32)}

        def show(data):
            shown = augmentation.show(data, [], side, seed=None, augment=False, fit=self._fit)
            return {name: shown[name] for name in names}

        return tf.map_fn(show, image_bytes, fn_output_signature={name: specs[name] for name in names})

    def words(self, prompts: tf.Tensor) -> _Words:
        """What `keywords.keyword_pieces` finds in each prompt: string [batch]."""
        words = preprocessors.tokenize_prompt(prompts)
        pieces = words.with_values(self._vocabulary.encode_tf(words.values))
        written = (pieces.row_lengths(axis=2) > 0).to_tensor()
        numbers = tf.cumsum(tf.cast(written, tf.int32), axis=1) * tf.cast(written, tf.int32)
        of_words = tf.RaggedTensor.from_tensor(numbers, lengths=words.row_lengths())
        flat = pieces.merge_dims(1, 2)
        piece_numbers = tf.repeat(of_words.flat_values, pieces.values.row_lengths())
        return _Words(words.to_tensor(), numbers, flat, flat.with_values(piece_numbers))
