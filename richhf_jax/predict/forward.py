"""A system's forward pass for predictions: its features, its outputs and its state.

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
from etils import epath
from flax import traverse_util
from jaxtyping import Int32, Shaped, UInt8

from richhf_jax import (
    checkpoints,
    errors,
    feedback,
    foreign_text,
    keywords,
    model_description,
    sealing,
    train_state,
    weights_file,
    writing,
)

# The inputs of `predict_fn` on the host, and its outputs on the devices, by name.
Features = Mapping[str, Shaped[np.ndarray, "batch ..."]]
Outputs = Mapping[str, Shaped[jax.Array, "batch ..."]]

# Smallest side of an image, in pixels; smaller images show nothing.
MIN_SIDE = 8
NEEDS_PROMPT = "the model reads text: give one image and one prompt, or as many prompts as images"
# A longer text is a file given by mistake; no image generator reads so much.
MAX_PROMPT_WORDS = 1000
MAX_PROMPT_CHARACTERS = 10_000
# An image, or a function that reads it.
Shown = UInt8[np.ndarray, "height width 3"] | Callable[[], UInt8[np.ndarray, "height width 3"]]


class PredictionError(ValueError):
    """An image or a prompt can't be scored; the message says why."""


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """One image and its prompt, ready for the device.

    Attributes:
      picture: the image as given, or a function that reads it.
      size: the image's height and width, in pixels.
      prompt: the prompt as given; "" if there is none.
      square: the image in the model's square, see `pixels.square`.
      box: the image's place in the square: its first row and column, and those after its last.
      inputs: the tokens of each prompt of the image (the augmented-prompt variant has several); None: the
        system reads no text.
      words: the prompt's words, for the decoder; None: the system marks no words.
      words_cut: number of words at the end of the longest prompt that the model has no room for.
    """

    picture: Shown
    size: tuple[int, int]
    prompt: str
    square: UInt8[np.ndarray, "side side 3"]
    box: Int32[np.ndarray, " 4"]
    inputs: Int32[np.ndarray, "prompts length"] | None
    words: keywords.KeywordPieces | None
    words_cut: int

    @property
    def image(self) -> UInt8[np.ndarray, "height width 3"]:
        """The image as given."""
        return shown_image(self.picture)


def shown_image(picture: Shown) -> UInt8[np.ndarray, "height width 3"]:
    """Returns an image, which is read again if it is given as a function."""
    return picture() if callable(picture) else picture


def check_prompt(prompt: str, needed: bool = True) -> None:
    """Checks that a prompt can be scored.

    Args:
      prompt: the prompt.
      needed: whether there must be one: whether the model reads text.

    Raises:
      PredictionError: it is no text, shows nothing though it is needed, or is too long.
    """
    if not isinstance(prompt, str):
        raise PredictionError(f"a prompt must be a str, got {type(prompt).__name__}")
    if needed and foreign_text.is_blank(prompt):
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


def features(
    prepared: Sequence[Prepared], rows: int, description: model_description.ModelDescription
) -> dict[str, Shaped[np.ndarray, "{rows} ..."]]:
    """Makes the features of a batch for `predict_fn`.

    Args:
      prepared: the images, at most `rows`.
      rows: rows of the batch; those behind the last image are padding.
      description: the model's description.
    """
    batch = {"image": _stack([one.square for one in prepared], rows)}
    if description.reads_text:
        inputs = [one.inputs for one in prepared if one.inputs is not None]
        batch["encoder_input_tokens"] = _stack(inputs, rows)
    if description.model.outputs.keywords:
        words = [one.words for one in prepared if one.words is not None]
        length = description.feature_lengths["targets"]
        batch |= keywords.features(words, rows, length, description.encoder.suffix)
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
    """Makes the function that computes all predictions of a system for a batch.

    Returns:
      A pure function of the state (`train_state.InferenceState`) and of these features:
        image                 uint8 [batch, side, side, 3]
        image_box             int32 [batch, 4], only where the model letterboxes images, see `Prepared.box`
        encoder_input_tokens  int32 [batch, prompts, length], of a system that reads text
        keyword_pieces, keyword_words, keyword_suffix   of one that marks words, see `keywords.features`
      Its outputs are those of them that the system predicts:
        scores                float32 [batch, scores], in the order of `BaseModel.outputs.scores`
        score_deviations      float32 [batch, scores], the scores' standard deviations; calibrated if the
                              description has a calibration
        heatmaps              float32 [batch, heatmaps, side, side], in the order of `outputs.heatmaps`
        keyword_probability, keyword_misaligned   float32 and bool [batch, length], by number of the word
    """
    model = description.model
    kinds = model.outputs
    factors = np.array([description.deviation_factors[kind] for kind in kinds.scores], np.float32)

    def predict(
        state: train_state.InferenceState, features: Mapping[str, Shaped[jax.Array, "batch ..."]]
    ) -> Outputs:
        batch = features["image"].shape[0]
        slots = {"heatmap_weights": len(kinds.heatmaps), "score_weights": len(kinds.scores)}
        shapes = {name: jnp.zeros((batch, count)) for name, count in slots.items()}
        if kinds.keywords:
            length = features["keyword_pieces"].shape[-1]
            shapes["decoder_input_tokens"] = jnp.zeros((batch, 1, length), jnp.int32)
        outputs: Any = model.predict_batch(state.params, {**features, **shapes}, **state.mutables())
        found = {name: outputs[name] for name in ("scores", "heatmaps") if getattr(kinds, name)}
        if kinds.keywords:
            words = ("keyword_probability", "keyword_misaligned")
            found |= {name: outputs[name][:, 0] for name in words}
        if "score_deviations" in outputs:
            found["score_deviations"] = outputs["score_deviations"] * factors[None]
        return found

    return predict


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


def load_state(place: str, description: model_description.ModelDescription) -> train_state.InferenceState:
    """Reads a model's parameters and mutable collections, onto the first local device or the host.

    Args:
      place: a path that `checkpoint_path` returned.
      description: the model's description.

    Raises:
      errors.UserError: an array is missing or has another shape, the file can't be read, or the network
        can't be built.
    """
    path = os.path.join(os.path.dirname(place), model_description.FILE)
    try:
        wanted = abstract_state(description)
    except errors.UserError:
        raise
    except Exception as error:  # Networks raise many kinds for sizes that don't go together.
        raise errors.UserError(
            f"{path} describes no network that can be built: {writing.reason(error)}"
        ) from error
    fix = f"bring {path} back as it was written for these parameters, because it describes other ones"
    flags = model_description.training_flags(os.path.dirname(place))
    if os.path.basename(place) == weights_file.FILE:
        return unflatten(_read_safetensors(epath.Path(place), flatten(wanted), fix, flags))
    return checkpoints.restore_inference_state(place, wanted, fix, flags)


def abstract_state(description: model_description.ModelDescription) -> train_state.InferenceState:
    """Returns a `ShapeDtypeStruct` for each array of the state, placed on the first local device."""
    lengths = description.feature_lengths
    side = lengths["image"]
    shapes: dict[str, tuple[int, ...]] = {"image": (1, side, side, 3)}
    texts = {"encoder_input_tokens": "inputs", "decoder_input_tokens": "targets"}
    shapes |= {name: (1, 1, lengths[length]) for name, length in texts.items() if length in lengths}
    variables = jax.eval_shape(
        lambda rng: description.model.get_initial_variables(rng, shapes), jax.random.key(0)
    )
    state = train_state.InferenceState(variables["params"], train_state.mutable_collections(variables))
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state)


def flatten(state: train_state.InferenceState) -> dict[str, Any]:
    """Names the arrays of a state by their paths, joined by "/"; mutable ones are below "flax_mutables"."""
    return cast(dict[str, Any], traverse_util.flatten_dict(state.params | state.mutables(), sep="/"))


def unflatten(arrays: Mapping[str, Any]) -> train_state.InferenceState:
    """Makes a state of the arrays that `flatten` names."""
    params = traverse_util.unflatten_dict(dict(arrays), sep="/")
    mutables = params.pop(train_state.MUTABLES, {})
    return train_state.InferenceState(params, mutables)


def _read_safetensors(
    path: epath.Path, wanted: Mapping[str, jax.ShapeDtypeStruct], fix: str, flags: str
) -> dict[str, np.ndarray]:
    """Reads the wanted arrays and converts them to the wanted types; for `fix` and `flags` see `misfit`."""
    found = weights_file.read(path, wanted)
    fits = {name for name, leaf in wanted.items() if name in found and found[name].shape == leaf.shape}
    if wrong := {(name,): leaf for name, leaf in wanted.items() if name not in fits}:
        saved = {(name,): array for name, array in found.items()}
        raise checkpoints.misfit(path, wrong, saved, fix, bool(fits), flags)
    return {name: found[name].astype(leaf.dtype, copy=False) for name, leaf in wanted.items()}
