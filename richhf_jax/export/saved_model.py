"""Writes a TensorFlow SavedModel with two signatures.

serving_default   takes image bytes and prompts; the graph decodes and encodes them as training does. A system
                  that reads no text takes image bytes alone
arrays            takes the arrays of `program.input_shapes`

tensorflow-text's operations encode the prompts, if the system reads any. TensorFlow Serving links them; in
Python such a model loads only after `import tensorflow_text`.
"""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.export
import tensorflow as tf
import tensorflow_text
from jax.extend.mlir import ir, passmanager
from jax.extend.mlir.dialects import stablehlo as jax_stablehlo
from tensorflow.compiler.mlir.stablehlo import stablehlo as tf_stablehlo
from tensorflow.compiler.tf2xla.python import xla

from richhf_jax import augmentation, feedback, preprocessors, writing
from richhf_jax.export import program, stablehlo
from richhf_jax.model_description import ModelDescription

FOLDER = "saved_model"


def requires(description: ModelDescription) -> list[str]:
    """Returns the packages that a program must install and import to load the model."""
    return ["tensorflow", "tensorflow-text"] if description.reads_text else ["tensorflow"]


def write(directory: pathlib.Path, description: ModelDescription, params: program.Arrays) -> None:
    """Writes the SavedModel into a folder of the directory. Its variables are the parameters."""
    reader = PromptReader(description) if description.reads_text else None
    model = tf.Module()
    model.parameters = {
        name: tf.Variable(value, trainable=False, name=name) for name, value in params.items()
    }
    predict = _of_arrays(description, stablehlo.export(description, params), model.parameters)
    if reader:
        model.resources = reader.resources
        serve = _of_strings(description, reader, predict)
    else:
        serve = _of_images(description, predict)
    signatures = {"arrays": predict, "serving_default": serve}
    with writing.explained_disk_errors(directory, also=(tf.errors.OpError,)):
        tf.saved_model.save(model, str(directory / FOLDER), signatures)


def _of_arrays(
    description: ModelDescription, exported: jax.export.Exported, parameters: Mapping[str, tf.Variable]
) -> Callable:
    """Returns a function of the arrays of `program.input_shapes` that runs the exported program."""
    module = _for_tensorflow(exported.mlir_module_serialized)
    arrays = {
        name: tf.TensorSpec([None, *shape.shape[1:]], tf.as_dtype(shape.dtype), name=name)
        for name, shape in program.input_shapes(description, batch=1).items()
    }

    @tf.function(input_signature=[arrays], jit_compile=True, autograph=False)
    def predict(inputs):
        values = {name: variable.read_value() for name, variable in parameters.items()}
        arguments = jax.tree.leaves((values, inputs))
        outputs: Any = xla.call_module(
            [arguments[index] for index in exported.module_kept_var_idx],
            version=exported.calling_convention_version,
            module=module,
            platforms=[platform.upper() for platform in exported.platforms],
            Tout=[tf.as_dtype(output.dtype) for output in exported.out_avals],
            Sout=[[None, *output.shape[1:]] for output in exported.out_avals],
        )
        return jax.tree.unflatten(exported.out_tree, outputs)

    return predict


def _for_tensorflow(serialized: bytes) -> bytes:
    """Writes a program for TensorFlow's StableHLO, which may be older than any that JAX writes programs for.

    Composite operations become calls: TensorFlow can't run them on any number of images.
    """
    with ir.Context() as context:
        jax_stablehlo.register_dialect(context)
        jax_stablehlo.register_stablehlo_passes()
        module = jax_stablehlo.deserialize_portable_artifact(context, serialized)
        passes = "builtin.module(func.func(stablehlo-legalize-composite-to-call))"
        passmanager.PassManager.parse(passes).run(module.operation)
        read = tf_stablehlo.get_current_version()  # pyright: ignore[reportAttributeAccessIssue]
        version = jax_stablehlo.get_smaller_version(jax_stablehlo.get_current_version(), read)
        return jax_stablehlo.serialize_portable_artifact(module, version)


class Words(NamedTuple):
    """The words of some prompts.

    Attributes:
      texts: string [batch, words], "" behind a prompt's last word.
      numbers: int32 [batch, words], from 1; 0 for a word that the vocabulary writes as nothing.
      pieces: int32 [batch, target length], 0 = padding.
      piece_numbers: int32 [batch, target length], the number of each piece's word.
    """

    texts: tf.Tensor
    numbers: tf.Tensor
    pieces: tf.Tensor
    piece_numbers: tf.Tensor


class _Vocabulary(NamedTuple):
    """The part of a seqio.Vocabulary that `preprocessors.encode` uses."""

    encode_tf: Callable[[tf.Tensor], Any]  # A ragged tensor of ids.
    eos_id: int


class PromptReader:
    """Encodes prompts in the graph, as training does.

    Attributes:
      resources: the tokenizer, which a SavedModel must keep.
    """

    def __init__(self, description: ModelDescription):
        self.resources = tensorflow_text.SentencepieceTokenizer(description.vocabulary)
        self._vocabulary: Any = _Vocabulary(self.resources.tokenize, description.encoder.eos_id)
        self._lengths = description.feature_lengths
        self._tasks = feedback.task_prompts(description.model.variant, "")

    def tokens(self, prompts: tf.Tensor) -> tf.Tensor:
        """Encodes prompts, string [batch], to int32 [batch, prompts, length]."""
        texts = tf.constant(self._tasks)[None] + prompts[:, None]
        tokens, _ = preprocessors.encode(tf.reshape(texts, [-1]), self._lengths["inputs"], self._vocabulary)
        return tf.reshape(tokens, [-1, len(self._tasks), self._lengths["inputs"]])

    def words(self, prompts: tf.Tensor) -> Words:
        """Finds the words of prompts, string [batch], as `keywords.keyword_pieces` does."""
        words = preprocessors.tokenize_prompt(prompts)
        pieces = words.with_values(self._vocabulary.encode_tf(words.values))
        written = tf.cast(pieces.row_lengths(axis=2) > 0, tf.int32).to_tensor()
        numbers = tf.cumsum(written, axis=1) * written
        word_numbers = tf.RaggedTensor.from_tensor(  # pyright: ignore[reportAttributeAccessIssue]
            numbers, lengths=words.row_lengths()
        )
        flat = pieces.merge_dims(1, 2)
        piece_numbers = tf.repeat(word_numbers.flat_values, pieces.values.row_lengths())
        shape = [None, self._lengths["targets"]]
        return Words(
            words.to_tensor(),
            numbers,
            flat.to_tensor(shape=shape),
            flat.with_values(piece_numbers).to_tensor(shape=shape),
        )


def _of_strings(description: ModelDescription, reader: PromptReader, predict: Callable) -> Callable:
    """Returns a function of image bytes and prompts; its outputs have the words and their values."""
    length = description.feature_lengths["targets"]

    @tf.function(
        input_signature=[tf.TensorSpec([None], tf.string, name=n) for n in ("image_bytes", "prompts")]
    )
    def serve(image_bytes, prompts):
        words = reader.words(prompts)
        inputs = {
            **_read_images(image_bytes, description),
            "encoder_input_tokens": reader.tokens(prompts),
            "word_pieces": words.pieces,
            "word_numbers": words.piece_numbers,
        }
        outputs = dict(predict(inputs))
        # Nothing is known of a word without a number, or of one for which there was no room.
        column = tf.clip_by_value(words.numbers - 1, 0, length - 1)
        known = (words.numbers > 0) & (words.numbers <= length)
        by_number = outputs.pop("misaligned_probability"), outputs.pop("misaligned")
        probability, misaligned = (tf.gather(values, column, batch_dims=1) for values in by_number)
        return outputs | {
            "words": words.texts,
            "misaligned_probability": tf.where(known, probability, float("nan")),
            "misaligned": known & misaligned,
        }

    return serve


def _of_images(description: ModelDescription, predict: Callable) -> Callable:
    """Returns a function of image bytes alone, of a system that reads no text."""

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="image_bytes")])
    def serve(image_bytes):
        return dict(predict(_read_images(image_bytes, description)))

    return serve


def _read_images(image_bytes: tf.Tensor, description: ModelDescription) -> dict[str, tf.Tensor]:
    """Decodes images, string [batch], as training does, to the arrays of `program.input_shapes`."""
    side = description.feature_lengths["image"]
    specs = {"image": tf.TensorSpec([side, side, 3], tf.uint8)}
    if description.fit == "letterbox":
        specs["image_box"] = tf.TensorSpec([4], tf.int32)

    def show(data):
        shown = augmentation.show(
            data, [], side, seed=tf.zeros([2], tf.int64), augment=False, fit=description.fit
        )
        return {name: shown[name] for name in specs}

    return tf.map_fn(show, image_bytes, fn_output_signature=specs)
