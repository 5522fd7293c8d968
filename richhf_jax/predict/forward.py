"""The model's forward pass for predictions: its features, its outputs, its parameters and vocabulary.

The predictor, the exports and the benchmarks share this module.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sentencepiece
from etils import epath
from flax import traverse_util
from jaxtyping import Int32, Shaped, UInt8

from richhf_jax import (
    checkpoints,
    errors,
    feedback,
    keywords,
    model_description,
    models,
    sealing,
    weights_file,
    writing,
)

# The inputs of `predict_fn` on the host, and its outputs on the devices, by name.
Features = Mapping[str, Shaped[np.ndarray, "batch ..."]]
Outputs = Mapping[str, Shaped[jax.Array, "batch ..."]]

# A longer text is a file given by mistake; no image generator reads so much.
MAX_PROMPT_WORDS = 1000
MAX_PROMPT_CHARACTERS = 10_000
# An image, or a function that reads it.
Shown = UInt8[np.ndarray, "height width 3"] | Callable[[], UInt8[np.ndarray, "height width 3"]]
# The characters that TensorFlow's `tf.strings.split`, and so the training, splits at.
_SPACES = re.compile(r"[ \t\n\v\f\r]+")


class PredictionError(ValueError):
    """An image or a prompt can't be scored; the message says why."""


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """One image and its prompt, ready for the device.

    Attributes:
      picture: the image as given, or a function that reads it.
      size: the image's height and width, in pixels.
      prompt: the prompt as given.
      square: the image in the model's square, see `pixels.square`.
      box: the image's place in the square: its first row and column, and those after its last.
      inputs: the tokens of each prompt of the image (the augmented-prompt variant has several).
      words: the prompt's words, for the decoder.
      words_cut: number of words at the end of the longest prompt that the model has no room for.
    """

    picture: Shown
    size: tuple[int, int]
    prompt: str
    square: UInt8[np.ndarray, "side side 3"]
    box: Int32[np.ndarray, " 4"]
    inputs: Int32[np.ndarray, "prompts length"]
    words: keywords.KeywordPieces
    words_cut: int

    @property
    def image(self) -> UInt8[np.ndarray, "height width 3"]:
        """The image as given."""
        return shown_image(self.picture)


def shown_image(picture: Shown) -> UInt8[np.ndarray, "height width 3"]:
    """Returns an image, which is read again if it is given as a function."""
    return picture() if callable(picture) else picture


def check_prompt(prompt: str) -> None:
    """Checks that a prompt can be scored.

    Raises:
      PredictionError: it is no text, is empty, or is too long.
    """
    if not isinstance(prompt, str):
        raise PredictionError(f"a prompt must be a str, got {type(prompt).__name__}")
    if not prompt.strip():
        raise PredictionError("the prompt is empty")
    # Both the words that the model reads (between spaces) and those that it judges.
    if (words := len(" ".join(feedback.tokenize_prompt(prompt)).split())) > MAX_PROMPT_WORDS:
        raise PredictionError(f"the prompt has {words:,} words; at most {MAX_PROMPT_WORDS:,} are taken")
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise PredictionError(
            f"the prompt has {len(prompt):,} characters; at most {MAX_PROMPT_CHARACTERS:,} are taken"
        )
    try:
        prompt.encode()
    except UnicodeError as error:
        raise PredictionError("the prompt isn't valid Unicode: it has half of a surrogate pair") from error


class PromptEncoder:
    """Turns prompts into the model's tokens, as training does, but without TensorFlow.

    Attributes:
      suffix: the suffix of a misaligned word, in the vocabulary's pieces.
    """

    def __init__(self, description: model_description.ModelDescription):
        """Loads the model's vocabulary.

        Raises:
          errors.UserError: the vocabulary is missing or damaged, is another model's, or can't mark keywords.
        """
        self._description = description
        self._vocabulary = load_vocabulary(description.vocabulary)
        pieces, rows = self._vocabulary.vocab_size(), description.network.t5_config.vocab_size
        if pieces > rows:
            raise errors.UserError(
                f"{model_description.VOCABULARY_FILE} has {pieces} pieces, the model {rows}:"
                " it is another model's"
            )
        self.suffix = keywords.suffix_pieces(self._vocabulary.encode)

    def encode(self, texts: Sequence[str]) -> tuple[Int32[np.ndarray, "prompts length"], int]:
        """Encodes prompts as `preprocessors.encode` does, without TensorFlow.

        Returns:
          The tokens, 0 = padding; and of the prompt that lost most, the number of words that are missing,
          wholly or partly.
        """
        length = self._description.feature_lengths["inputs"]
        result = np.zeros((len(texts), length), np.int32)
        most = 0
        for row, text in enumerate(texts):
            pieces, cut = self._vocabulary.encode(text), 0
            if len(pieces) > length - 1:
                text, cut = self._cut_at_word(text, length - 1)
                pieces = self._vocabulary.encode(text)[: length - 1]
            result[row, : len(pieces) + 1] = [*pieces, self._vocabulary.eos_id()]
            most = max(most, cut)
        return result, most

    def _cut_at_word(self, text: str, room: int) -> tuple[str, int]:
        """Returns the words that fit into `room` pieces (at least one), and the number of words cut."""
        words = [word for word in _SPACES.split(text) if word]
        ends = np.cumsum([len(pieces) for pieces in self._vocabulary.encode(words)])
        fitting = int(np.sum(ends <= room))
        kept = max(fitting, 1)
        # A text that is too long loses something, whatever its words alone come to.
        return " ".join(words[:kept]) if kept < len(words) else text, max(len(words) - fitting, 1)

    def keyword_pieces(self, prompt: str) -> keywords.KeywordPieces:
        """Returns a prompt's words for the decoder."""
        length = self._description.feature_lengths["targets"]
        return keywords.keyword_pieces(prompt, self._vocabulary.encode, length)


def features(
    prepared: Sequence[Prepared],
    rows: int,
    description: model_description.ModelDescription,
    suffix: Sequence[int],
) -> dict[str, Shaped[np.ndarray, "{rows} ..."]]:
    """Makes the features of a batch for `predict_fn`.

    Args:
      prepared: the images, at most `rows`.
      rows: rows of the batch; those behind the last image are padding.
      description: the model's description.
      suffix: `PromptEncoder.suffix`.
    """
    batch = {
        "image": _stack([one.square for one in prepared], rows),
        "encoder_input_tokens": _stack([one.inputs for one in prepared], rows),
        **keywords.features(
            [one.words for one in prepared], rows, description.feature_lengths["targets"], suffix
        ),
    }
    if description.fit == "letterbox":
        batch["image_box"] = _stack([one.box for one in prepared], rows)
    return batch


def _stack(rows: Sequence[np.ndarray], count: int) -> np.ndarray:
    """Stacks arrays to [count, ...], with zeros behind the last."""
    result = np.zeros((count, *rows[0].shape), rows[0].dtype)
    for i, row in enumerate(rows):
        result[i] = row
    return result


def predict_fn(description: model_description.ModelDescription) -> Callable[..., Outputs]:
    """Makes the function that computes all of RAHF's predictions for a batch.

    Returns:
      A pure function of the parameters and of these features:
        image                 uint8 [batch, side, side, 3]
        image_box             int32 [batch, 4], only where the model letterboxes images, see `Prepared.box`
        encoder_input_tokens  int32 [batch, prompts, length]
        keyword_pieces, keyword_words, keyword_suffix   see `keywords.features`
      Its outputs are:
        scores                float32 [batch, 4], in the order of `feedback.SCORES`
        score_deviations      float32 [batch, 4], the scores' standard deviations, of a model that predicts
                              them; calibrated if the description has a calibration
        heatmaps              float32 [batch, 2, side, side], in the order of `feedback.HEATMAPS`
        keyword_probability, keyword_misaligned   float32 and bool [batch, length], by number of the word
    """
    model = _rahf_model(description)
    slots = {"heatmap_weights": feedback.ALL_SLOTS.heatmaps, "score_weights": feedback.ALL_SLOTS.scores}
    factors = np.array([description.deviation_factors[kind] for kind in feedback.SCORES], np.float32)

    def predict(params: Any, features: Mapping[str, Shaped[jax.Array, "batch ..."]]) -> Outputs:
        batch, _, length = features["keyword_pieces"].shape
        shapes = {name: jnp.zeros((batch, count)) for name, count in slots.items()}
        shapes["decoder_input_tokens"] = jnp.zeros((batch, 1, length), jnp.int32)
        outputs: Any = model.predict_batch(params, {**features, **shapes})
        found = {name: outputs[name][:, 0] for name in ("keyword_probability", "keyword_misaligned")}
        if "score_deviations" in outputs:
            found["score_deviations"] = outputs["score_deviations"] * factors[None]
        return {"scores": outputs["scores"], "heatmaps": outputs["heatmaps"], **found}

    return predict


def _rahf_model(description: model_description.ModelDescription) -> models.RahfModel:
    return models.RahfModel(
        description.network,
        optimizer_def=optax.identity(),  # It is never used.
        misalignment_threshold=description.misalignment_threshold,
        resample_positions=True,  # Training checked the size.
        eos_id=load_vocabulary(description.vocabulary).eos_id(),
    )


def load_vocabulary(model: bytes | None) -> sentencepiece.SentencePieceProcessor:
    """Loads a SentencePiece model from its bytes (`ModelDescription.vocabulary`).

    Raises:
      errors.UserError: there are no bytes, or they are no SentencePiece model.
    """
    if model is None:
        raise errors.UserError(f"the model has no {model_description.VOCABULARY_FILE}: prediction needs it")
    vocabulary = sentencepiece.SentencePieceProcessor()
    try:
        vocabulary.LoadFromSerializedProto(model)
    except RuntimeError as error:
        raise errors.UserError(
            f"{model_description.VOCABULARY_FILE} beside {model_description.FILE} is damaged, or no"
            " SentencePiece model: copy the one that the training used there"
        ) from error
    return vocabulary


def checkpoint_path(path: str) -> str:
    """Finds the parameters: a `checkpoint_<step>`, or an export's model.safetensors.

    Args:
      path: a MODEL_DIR, whose newest checkpoint is taken; a `checkpoint_<step>` in it; an export; or a path
        that this function returned.

    Raises:
      errors.UserError: there are no parameters.
    """
    if os.path.basename(path) == weights_file.FILE and epath.Path(path).exists():
        return path
    path = path if "://" in path else os.path.abspath(path)
    weights = epath.Path(path) / weights_file.FILE
    if weights.exists() and checkpoints.newest_checkpoint(path) is None:
        return os.fspath(weights)
    return checkpoints.find_checkpoint(path)[0]


def read_description(place: str, dtype: str | None = None) -> model_description.ModelDescription:
    """Reads the description of a model's parameters, without the calibration of another checkpoint.

    Args:
      place: a path that `checkpoint_path` returned.
      dtype: as for `model_description.read`.

    Raises:
      errors.UserError: as `model_description.read`.
    """
    description = model_description.read(os.path.dirname(place), dtype)
    step = re.search(r"checkpoint_(\d+)$", place)
    return description.of_step(int(step[1])) if step else description


def params_checksum(place: str) -> str:
    """Returns a checksum that tells parameters apart that are at the same place, one after the other.

    Args:
      place: a path that `checkpoint_path` returned.
    """
    if os.path.basename(place) == weights_file.FILE:
        return weights_file.of_file(place)
    return sealing.of_checkpoint(epath.Path(place))


def load_params(place: str, description: model_description.ModelDescription) -> Any:
    """Reads a model's parameters, onto the first local device or the host.

    Args:
      place: a path that `checkpoint_path` returned.
      description: the model's description.

    Raises:
      errors.UserError: a parameter is missing or has another shape, the file can't be read, or the network
        can't be built.
    """
    try:
        wanted = abstract_params(description)
    except errors.UserError:
        raise
    except Exception as error:  # Networks raise many kinds for sizes that don't go together.
        path = os.path.join(os.path.dirname(place), model_description.FILE)
        raise errors.UserError(
            f"{path} describes no network that can be built: {writing.reason(error)}"
        ) from error
    if os.path.basename(place) == weights_file.FILE:
        return _read_safetensors(epath.Path(place), wanted)
    return checkpoints.restore_params(place, wanted)


def abstract_params(description: model_description.ModelDescription) -> Any:
    """Returns a `ShapeDtypeStruct` for each parameter, placed on the first local device."""
    lengths = description.feature_lengths
    side, target_length = lengths["image"], lengths["targets"]
    shapes = {
        "image": (1, side, side, 3),
        "encoder_input_tokens": (1, 1, lengths["inputs"]),
        "decoder_input_tokens": (1, 1, target_length),
    }
    model = _rahf_model(description)
    variables = jax.eval_shape(lambda rng: model.get_initial_variables(rng, shapes), jax.random.key(0))
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), variables["params"]
    )


def _read_safetensors(path: epath.Path, wanted: Any) -> Any:
    """Reads the wanted parameters and converts them to the wanted types."""
    flat = cast(dict[str, jax.ShapeDtypeStruct], traverse_util.flatten_dict(wanted, sep="/"))
    found = weights_file.read(path, flat)
    for name, leaf in flat.items():
        if name not in found or found[name].shape != leaf.shape:
            there = found[name].shape if name in found else "nothing"
            raise errors.UserError(f"{path}: {name} must be of shape {leaf.shape}, there is {there}")
    params = {name: found[name].astype(leaf.dtype, copy=False) for name, leaf in flat.items()}
    return traverse_util.unflatten_dict(params, sep="/")
