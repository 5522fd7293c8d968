"""Images and prompts -> rich feedback: `RahfPredictor`. Needs neither TensorFlow, seqio nor gin.

from richhf_jax import RahfPredictor

predictor = RahfPredictor.from_checkpoint("runs/quickstart/finetune")
record = predictor("image.png", "a yellow cat")
record.scores["plausibility"], record.heatmaps["implausibility"], record.tokens
record.overlay().save("overlay.png")
"""

import dataclasses
import functools
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
import sentencepiece
from etils import epath
from flax import traverse_util
from PIL import Image

from richhf_jax import (
    checkpoints,
    errors,
    feedback,
    keywords,
    model_description,
    models,
    overlay,
    partitioning,
    pixels,
)
from richhf_jax.datasets import images as image_files

Picture = Image.Image | np.ndarray | bytes | str | os.PathLike
Features = Mapping[str, np.ndarray]
# jax arrays; on the host numpy's.
Outputs = Mapping[str, Any]

WEIGHTS_FILE = "model.safetensors"
# A file in place of a prompt; no image generator reads as much.
MAX_PROMPT_WORDS = 1000
# Fewer pixels a side show nothing.
MIN_SIDE = 8
# Of two shapes of a batch that are compiled.
_SIZE_RATIO = 4
# What TensorFlow's `tf.strings.split` splits at, as the training does.
_SPACES = re.compile(r"[ \t\n\v\f\r]+")


class PredictionError(ValueError):
    """Why an image or a prompt can't be scored."""


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction(feedback.RichFeedback):
    """A model's feedback on an image.

    Attributes:
      image: uint8 [height, width, 3]; the heatmaps are of its size.
      words_cut: of the prompt, at its end: the model has no room for them.
    """

    image: np.ndarray
    words_cut: int

    def overlay(self, kind: str | None = None, opacity: float = 0.85) -> Image.Image:
        """The image with a heatmap laid over it; with None that of each pixel's greatest value."""
        heat = self.heatmaps[kind] if kind else np.max(list(self.heatmaps.values()), axis=0)
        return overlay.draw(self.image, heat, opacity)

    def to_dict(self) -> dict:
        """As `RichFeedback.to_dict`, and "prompt_words_cut" where there are any."""
        cut = {"prompt_words_cut": self.words_cut} if self.words_cut else {}
        return super().to_dict() | cut


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """One image and its prompt, ready for the device.

    Attributes:
      image: uint8 [height, width, 3], as given.
      prompt: as given.
      square: uint8 [side, side, 3].
      box: int32 [4], where in the square the image lies.
      inputs: int32 [prompts, length].
      words: the prompt's, for the decoder.
      words_cut: of the longest prompt, at its end.
    """

    image: np.ndarray
    prompt: str
    square: np.ndarray
    box: np.ndarray
    inputs: np.ndarray
    words: keywords.KeywordPieces
    words_cut: int


def predict_fn(description: model_description.ModelDescription) -> Callable[[Any, Features], Outputs]:
    """All that RAHF says of a batch, as one function of parameters and features.

    Returns:
      A pure function of the parameters and of
        image                 uint8 [batch, side, side, 3]
        image_box             int32 [batch, 4], where images are letterboxed
        encoder_input_tokens  int32 [batch, prompts, length]
        keyword_pieces, keyword_words, keyword_suffix   see `keywords.features`
      to
        scores                float32 [batch, 4], in the order of `feedback.SCORES`
        heatmaps              float32 [batch, 2, side, side], in the order of `feedback.HEATMAPS`
        keyword_probability, keyword_misaligned   float32 and bool [batch, length], by number of the word
    """
    model = _model(description)
    slots = {"heatmap_weights": len(feedback.HEATMAPS), "score_weights": len(feedback.SCORES)}

    def predict(params, features):
        batch, _, length = features["keyword_pieces"].shape
        shapes = {name: jnp.zeros((batch, count)) for name, count in slots.items()}
        shapes["decoder_input_tokens"] = jnp.zeros((batch, 1, length), jnp.int32)
        outputs = model.predict_batch(params, {**features, **shapes})
        words = {name: outputs[name][:, 0] for name in ("keyword_probability", "keyword_misaligned")}
        return {"scores": outputs["scores"], "heatmaps": outputs["heatmaps"], **words}

    return predict


def _model(description: model_description.ModelDescription) -> models.RahfModel:
    return models.RahfModel(
        description.network,
        optimizer_def=None,
        misalignment_threshold=description.misalignment_threshold,
        eos_id=load_vocabulary(description.vocabulary).eos_id(),
    )


def load_vocabulary(model: bytes) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece model.

    Raises:
      errors.UserError: it is none.
    """
    vocabulary = sentencepiece.SentencePieceProcessor()
    try:
        vocabulary.LoadFromSerializedProto(model)
    except RuntimeError as error:
        raise errors.UserError(f"{model_description.VOCABULARY_FILE} is no SentencePiece model") from error
    return vocabulary


def task_prompts(variant: str, prompt: str) -> list[str]:
    """The prompts of an image, in the order of the model's slots: one, or one a kind of output."""
    if variant == "multi_head":
        return [prompt]
    tasks = (*feedback.HEATMAP_TASK_STRINGS.values(), *feedback.SCORE_TASK_STRINGS.values())
    return [f"{task} {prompt}" for task in (*tasks, feedback.KEYWORDS_TASK_STRING)]


class RahfPredictor:
    """Scores images. Thread-safe; all local devices share each batch.

    Attributes:
      description: what the checkpoint's directory says of the model.
      params: its parameters, on every device.
      batch_size: images in the largest batch.
    """

    def __init__(
        self,
        description: model_description.ModelDescription,
        params: Any,
        batch_size: int = 16,
        convert: bool = False,
    ):
        """Args: as `from_checkpoint`, which is the way to make one."""
        self.description = description
        self._partitioner = partitioning.PjitPartitioner(devices=jax.local_devices())
        self.params = jax.device_put(params, self._partitioner.replicated)
        self._convert = convert
        self._sizes = _batch_sizes(batch_size, self._partitioner.num_data_shards)
        self.batch_size = self._sizes[-1]
        self._vocabulary = load_vocabulary(description.vocabulary)
        pieces, rows = self._vocabulary.vocab_size(), description.network.t5_config.vocab_size
        if pieces > rows:
            raise errors.UserError(
                f"{model_description.VOCABULARY_FILE} has {pieces} pieces, the model {rows}:"
                " it is another model's"
            )
        self._suffix = keywords.suffix_pieces(self._encode)
        everywhere, batch = self._partitioner.replicated, self._partitioner.batch_sharding
        self._predict = self._partitioner.partition(predict_fn(description), (everywhere, batch), batch)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike,
        *,
        batch_size: int = 16,
        dtype: str | None = None,
        convert: bool = False,
    ) -> "RahfPredictor":
        """Loads a model.

        Args:
          path: a MODEL_DIR, whose newest checkpoint is meant; a `checkpoint_<step>` in it; or an export.
          batch_size: images in the largest batch; rounded up to a multiple of the devices.
          dtype: 'float32' or 'bfloat16' activations, in place of the training's. Parameters are float32.
          convert: whether images are taken that have more to show than 8 bits of red, green and blue (see
            `datasets.images.decode`).

        Raises:
          errors.UserError: there is no checkpoint, it doesn't fit, or its directory doesn't say of what.
        """
        if dtype not in (None, "float32", "bfloat16"):
            raise errors.UserError(f"dtype must be 'float32' or 'bfloat16', got {dtype!r}")
        if batch_size < 1:
            raise errors.UserError(f"batch_size must be at least 1, got {batch_size}")
        place = checkpoint_path(os.fspath(path))
        description = model_description.read(os.path.dirname(place), dtype)
        wanted = abstract_params(description)
        if os.path.basename(place) == WEIGHTS_FILE:
            params = _read_safetensors(epath.Path(place), wanted)
        else:
            params = checkpoints.restore_params(place, wanted)
        return cls(description, params, batch_size, convert)

    def __call__(
        self,
        images: Picture | Sequence[Picture],
        prompts: str | Sequence[str],
        ids: str | Sequence[str] | None = None,
    ) -> Prediction | list[Prediction]:
        """Scores one image, or many.

        Args:
          images: PIL images; uint8 [height, width, 3] or [height, width]; paths; or files' bytes. Many may be
            one array, [images, height, width, 3].
          prompts: as many.
          ids: their names in the records; by default the paths, or numbers from 0.

        Returns:
          A record for one image; a list, in the images' order, for a sequence.

        Raises:
          PredictionError: an image or a prompt can't be scored; the message says which one.
        """
        one = isinstance(images, Picture) and not (isinstance(images, np.ndarray) and images.ndim == 4)
        if one != isinstance(prompts, str):
            raise PredictionError("give one image and one prompt, or as many prompts as images")
        pictures, texts = ([images], [prompts]) if one else (list(images), list(prompts))
        if ids is None:
            names = [str(p if isinstance(p, str | os.PathLike) else i) for i, p in enumerate(pictures)]
        else:
            names = [ids] if isinstance(ids, str) else list(ids)
        if not len(pictures) == len(texts) == len(names):
            raise PredictionError(f"{len(pictures)} images, {len(texts)} prompts and {len(names)} ids")
        records: list[Prediction] = []
        waiting = None
        for start in range(0, len(pictures), self.batch_size):
            batch = slice(start, start + self.batch_size)
            prepared = self._prepare_all(names[batch], pictures[batch], texts[batch])
            # The device computes a batch while the next is prepared.
            started = prepared, self.dispatch(prepared), names[batch]
            if waiting:
                records += self.finish(*waiting)
            waiting = started
        if waiting:
            records += self.finish(*waiting)
        return records[0] if one else records

    def _prepare_all(
        self, names: Sequence[str], pictures: Sequence[Picture], prompts: Sequence[str]
    ) -> list[Prepared]:
        prepared = []
        for name, picture, prompt in zip(names, pictures, prompts, strict=True):
            try:
                prepared.append(self.prepare(picture, prompt))
            except PredictionError as error:
                raise PredictionError(f"{name}: {error}") from error
        return prepared

    # The three parts of a prediction. A program that has much to score runs them side by side.

    def prepare(self, picture: Picture, prompt: str) -> Prepared:
        """Brings an image and a prompt to the model's shapes.

        Raises:
          PredictionError: one of them can't be scored.
        """
        if not isinstance(prompt, str):
            raise PredictionError(f"a prompt must be a str, got {type(prompt).__name__}")
        image = self._read(picture)
        if min(image.shape[:2]) < MIN_SIDE:
            height, width = image.shape[:2]
            raise PredictionError(f"an image of {width} x {height} pixels; {MIN_SIDE} a side are the least")
        if (words := len(prompt.split())) > MAX_PROMPT_WORDS:
            raise PredictionError(f"a prompt of {words:,} words; at most {MAX_PROMPT_WORDS:,} are taken")
        lengths = self.description.feature_lengths
        square, box = pixels.square(image, lengths["image"], self.description.fit)
        inputs, cut = self.encode(task_prompts(self.description.network.variant, prompt))
        words = keywords.keyword_pieces(prompt, self._encode, lengths["targets"])
        return Prepared(image, prompt, square, box, inputs, words, cut)

    def features(self, prepared: Sequence[Prepared], rows: int) -> dict[str, np.ndarray]:
        """A batch of `rows` images, those behind the last being padding; see `predict_fn`."""
        features = {
            "image": _stack([one.square for one in prepared], rows),
            "encoder_input_tokens": _stack([one.inputs for one in prepared], rows),
            **keywords.features(
                [one.words for one in prepared],
                rows,
                self.description.feature_lengths["targets"],
                self._suffix,
            ),
        }
        if self.description.fit == "letterbox":
            features["image_box"] = _stack([one.box for one in prepared], rows)
        return features

    def dispatch(self, prepared: Sequence[Prepared], rows: int | None = None) -> Outputs:
        """Starts to predict a batch, and doesn't wait for it.

        Args:
          prepared: at most `batch_size`.
          rows: of the batch; by default the next of a few sizes, each of which is compiled once.

        Returns:
          See `predict_fn`; of `rows` images.
        """
        rows = rows or next(size for size in self._sizes if size >= len(prepared))
        return self.run(self.features(prepared, rows))

    def run(self, features: Features) -> Outputs:
        """The compiled call alone, see `predict_fn`. Doesn't wait for it."""
        return self._predict(self.params, self._partitioner.shard_batch(features))

    def finish(self, prepared: Sequence[Prepared], outputs: Outputs, ids: Sequence[str]) -> list[Prediction]:
        """Waits for a batch and makes records of it."""
        fetched = jax.device_get(outputs)
        return [
            self._record(name, one, {key: value[row] for key, value in fetched.items()})
            for row, (one, name) in enumerate(zip(prepared, ids, strict=True))
        ]

    def _record(self, name: str, one: Prepared, outputs: Outputs) -> Prediction:
        decisions = outputs["keyword_probability"], outputs["keyword_misaligned"]
        return Prediction(
            id=name,
            prompt=one.prompt,
            scores=dict(zip(feedback.SCORES, map(float, outputs["scores"]), strict=True)),
            heatmaps={
                kind: _own_size(heatmap, one)
                for kind, heatmap in zip(feedback.HEATMAPS, outputs["heatmaps"], strict=True)
            },
            tokens=keywords.tokens(one.prompt, one.words.numbers, *decisions),
            image=one.image,
            words_cut=one.words_cut,
        )

    # Guidance and rewards.

    def score_fn(self, kind: str) -> Callable[..., jax.Array]:
        """A score as a pure, differentiable function of the image, for guidance and rewards.

            gradient = jax.grad(predictor.score_fn("aesthetics"))(image, "a yellow cat")

        Args:
          kind: one of `feedback.SCORES`.

        Returns:
          `score(images, prompts)`: of float [batch, height, width, 3] in [0, 1] and as many prompts float32
          [batch]; of one image and one prompt float32 []. Images of any size are resized as in training (up
          to rounding to 8 bits). Within `jax.jit` give prompts as `encode_for(kind, prompts)`, whose values
          may change without another compilation. It is a `jax.tree_util.Partial`: handed to a jitted function
          as an argument, the parameters are no constants of the program.

        Raises:
          errors.UserError: there is no such kind.
        """
        if kind not in feedback.SCORES:
            raise errors.UserError(f"there is no score {kind!r}, only {', '.join(feedback.SCORES)}")
        network, fit = self.description.network, self.description.fit
        side = self.description.feature_lengths["image"]

        @jax.jit
        def of_batch(params, images, tokens):
            shown, box = _shown(images.astype(jnp.float32) * 255, side, fit)
            apply = functools.partial(network.apply, {"params": params})
            encoded = apply(shown, tokens[:, None], box, method="encode")
            return apply(encoded, kind, method="score")

        def score(params, images, prompts):
            tokens = self.encode_for(kind, prompts) if isinstance(prompts, str | Sequence) else prompts
            if not jnp.issubdtype(images.dtype, jnp.floating) or images.shape[-1] != 3:
                raise PredictionError(
                    "images must be float [..., height, width, 3] in [0, 1], got"
                    f" {images.dtype} {images.shape}"
                )
            # [height, width, 3] and [length], or a batch of both
            if images.shape[:-3] != tokens.shape[:-1] or images.ndim not in (3, 4):
                raise PredictionError(
                    f"images of shape {images.shape} and prompts of shape {tokens.shape[:-1]}: give one image"
                    " and one prompt, or as many prompts as images"
                )
            if images.ndim == 3:
                return of_batch(params, images[None], tokens[None])[0]
            return of_batch(params, images, tokens)

        return jax.tree_util.Partial(score, self.params)

    def encode_for(self, kind: str, prompts: str | Sequence[str]) -> np.ndarray:
        """Prompts for `score_fn(kind)`: int32 [length] of one, [batch, length] of several."""
        if isinstance(prompts, str):
            return self.encode_for(kind, [prompts])[0]
        if self.description.network.variant != "multi_head":
            prompts = [f"{feedback.SCORE_TASK_STRINGS[kind]} {prompt}" for prompt in prompts]
        return self.encode(prompts)[0]

    # Reading.

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, int]:
        """`preprocessors.encode` without TensorFlow: int32 [texts, length], and the most words cut of one."""
        length = self.description.feature_lengths["inputs"]
        result = np.zeros((len(texts), length), np.int32)
        most = 0
        for row, text in enumerate(texts):
            pieces, cut = self._encode(text), 0
            if len(pieces) > length - 1:
                text, cut = self._cut_at_word(text, length - 1)
                pieces = self._encode(text)[: length - 1]
            result[row, : len(pieces) + 1] = [*pieces, self._vocabulary.eos_id()]
            most = max(most, cut)
        return result, most

    def _cut_at_word(self, text: str, room: int) -> tuple[str, int]:
        """The words that fit into `room` pieces (at least one), and the number of the others."""
        words = [word for word in _SPACES.split(text) if word]
        ends = np.cumsum([len(pieces) for pieces in self._vocabulary.encode(words)])
        kept = max(int(np.sum(ends <= room)), 1)
        return " ".join(words[:kept]), len(words) - kept

    def _encode(self, text: str) -> list[int]:
        return self._vocabulary.encode(text)

    def _read(self, picture: Picture) -> np.ndarray:
        """uint8 [height, width, 3]."""
        if isinstance(picture, np.ndarray):
            return _checked_array(picture)
        try:
            if isinstance(picture, Image.Image):
                return image_files.of_pillow(picture, self._convert)
            data = picture if isinstance(picture, bytes) else pathlib.Path(picture).read_bytes()
            return image_files.decode(data, self._convert)
        except OSError as error:
            raise PredictionError(f"{picture}: {error.strerror}") from error
        except image_files.ImageError as error:
            raise PredictionError(str(error)) from error


def checkpoint_path(path: str) -> str:
    """Where the parameters are: a `checkpoint_<step>`, or an export's model.safetensors.

    Args:
      path: a MODEL_DIR, whose newest checkpoint is meant; a `checkpoint_<step>` in it; an export; or what
        this function returned.

    Raises:
      errors.UserError: there is none.
    """
    if os.path.basename(path) == WEIGHTS_FILE and epath.Path(path).exists():
        return path
    path = path if "://" in path else os.path.abspath(path)
    weights = epath.Path(path) / WEIGHTS_FILE
    if weights.exists() and checkpoints.newest_checkpoint(path) is None:
        return os.fspath(weights)
    return checkpoints.find_checkpoint(path)[0]


def abstract_params(description: model_description.ModelDescription) -> Any:
    """The parameters' shapes, on the first local device."""
    lengths = description.feature_lengths
    side, target_length = lengths["image"], lengths["targets"]
    shapes = {
        "image": (1, side, side, 3),
        "encoder_input_tokens": (1, 1, lengths["inputs"]),
        "decoder_input_tokens": (1, 1, target_length),
    }
    model = _model(description)
    variables = jax.eval_shape(lambda rng: model.get_initial_variables(rng, shapes), jax.random.key(0))
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), variables["params"]
    )


def _read_safetensors(path: epath.Path, wanted: Any) -> Any:
    """The wanted parameters, in their types."""
    try:
        found = safetensors.numpy.load(path.read_bytes())
    except (safetensors.SafetensorError, KeyError) as error:  # KeyError: a type that numpy lacks.
        raise errors.UserError(f"{path} can't be read as float32 parameters: {error}") from error
    flat = traverse_util.flatten_dict(wanted, sep="/")
    for name, leaf in flat.items():
        if name not in found or found[name].shape != leaf.shape:
            there = found[name].shape if name in found else "nothing"
            raise errors.UserError(f"{path}: {name} must be of shape {leaf.shape}, there is {there}")
    params = {name: found[name].astype(leaf.dtype, copy=False) for name, leaf in flat.items()}
    return traverse_util.unflatten_dict(params, sep="/")


def _batch_sizes(largest: int, multiple: int) -> list[int]:
    """A few sizes of a batch, each a multiple of the devices, up to the one asked for (rounded up)."""
    sizes = {multiple}  # A single image shall be quick.
    while largest >= 1:
        sizes.add(-(-largest // multiple) * multiple)
        largest //= _SIZE_RATIO
    return sorted(sizes)


def _stack(rows: Sequence[np.ndarray], count: int) -> np.ndarray:
    """[rows, ...], zeros behind the last up to `count`."""
    result = np.zeros((count, *rows[0].shape), rows[0].dtype)
    for i, row in enumerate(rows):
        result[i] = row
    return result


def _checked_array(array: np.ndarray) -> np.ndarray:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        raise PredictionError(
            f"an array must be uint8 [height, width, 3] or [height, width], got {array.dtype} {array.shape}"
        )
    return np.repeat(array[..., None], 3, axis=2) if array.ndim == 2 else array


def _own_size(heatmap: np.ndarray, one: Prepared) -> np.ndarray:
    """float32 [side, side] -> [height, width] of the image as it was given."""
    top, left, bottom, right = one.box
    height, width = one.image.shape[:2]
    heatmap = np.ascontiguousarray(heatmap[top:bottom, left:right], np.float32)
    return np.clip(overlay.resize(heatmap, (width, height)), 0, 1)


def _shown(images: jax.Array, side: int, fit: str) -> tuple[jax.Array, jax.Array | None]:
    """`pixels.square`, differentiable: [batch, height, width, 3] -> [batch, side, side, 3], and the box."""
    batch, height, width, _ = images.shape
    box = np.array([0, 0, side, side], np.int32)
    if fit == "letterbox":
        box = pixels.letterbox(np.array([height, width]), side)
    top, left, bottom, right = box
    shape = (batch, bottom - top, right - left, 3)
    shown = images if images.shape == shape else jax.image.resize(images, shape, "linear")
    shown = jnp.pad(shown, ((0, 0), (top, side - bottom), (left, side - right), (0, 0)))
    return shown, jnp.tile(box, (batch, 1)) if fit == "letterbox" else None
