"""Predicts feedback on images and prompts: `RahfPredictor`. Needs neither TensorFlow, seqio nor gin.

from richhf_jax import RahfPredictor

predictor = RahfPredictor.from_checkpoint("runs/quickstart/finetune")
record = predictor("image.png", "a yellow cat")
record.scores["plausibility"], record.heatmaps["implausibility"], record.tokens
record.overlay().save("overlay.png")
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
from absl import logging
from jaxtyping import Float32, Int32, Shaped, UInt8
from PIL import Image

from richhf_jax import (
    device_memory,
    errors,
    feedback,
    keywords,
    model_description,
    partitioning,
    pixels,
    train_state,
)
from richhf_jax.costs import plan
from richhf_jax.inputs import images as image_files
from richhf_jax.inputs import record as record_files
from richhf_jax.pages import overlay
from richhf_jax.predict import batch_sizes, forward, rewards
from richhf_jax.predict.forward import Features, Outputs, PredictionError, Prepared

Picture = Image.Image | np.ndarray | jax.Array | bytes | bytearray | memoryview | str | os.PathLike
# Part of the free memory that a batch of the default size may take. Batches whose outputs wait for the host,
# and gaps between arrays, take some, too.
_SHARE = 0.9


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction(feedback.RichFeedback):
    """A model's feedback on an image.

    Attributes:
      heatmaps: kind -> a heatmap of the image's size, in [0, 1].
      picture: the image as given, or a function that reads it.
      size: the image's height and width, in pixels.
      words_cut: number of words at the prompt's end that the model has no room for.
    """

    heatmaps: Mapping[str, Float32[np.ndarray, "height width"]]
    picture: forward.Shown
    size: tuple[int, int]
    words_cut: int

    @property
    def image(self) -> UInt8[np.ndarray, "height width 3"]:
        """The image as given."""
        return forward.shown_image(self.picture)

    def overlay(self, kind: str | None = None, opacity: float = 0.85) -> Image.Image:
        """Draws the image with a heatmap laid over it.

        Args:
          kind: one of `feedback.HEATMAPS`; None: each pixel's greatest value of all heatmaps.
          opacity: see `pages.overlay.draw`.

        Raises:
          errors.UserError: the model predicts no such heatmap.
        """
        if not self.heatmaps or (kind and kind not in self.heatmaps):
            there = ", ".join(self.heatmaps) or "none"
            raise errors.UserError(f"there is no heatmap {kind or 'to draw'}; the model predicts: {there}")
        heat = self.heatmaps[kind] if kind else np.max(list(self.heatmaps.values()), axis=0)
        return overlay.draw(self.image, heat, opacity)

    def to_dict(self) -> dict:
        """Returns `RichFeedback.to_dict`, with "prompt_words_cut" added where words were cut."""
        cut = {"prompt_words_cut": self.words_cut} if self.words_cut else {}
        return super().to_dict() | cut


class RahfPredictor:
    """Scores images, by RAHF or another system. It is thread-safe, and all local devices share each batch.

    A record has what the system predicts (`outputs`), and nothing in the place of the rest.

    Attributes:
      description: the model's description, from the checkpoint's directory.
      outputs: the kinds that the model predicts.
      state: the model's parameters and mutable collections, on every device.
    """

    def __init__(
        self,
        description: model_description.ModelDescription,
        params: Any,
        batch_size: int | None = None,
        convert: bool = False,
        flax_mutables: Any = None,
    ):
        """Makes a predictor of parameters in memory; `from_checkpoint` is the usual way.

        Args:
          description: the model's description.
          params: the model's parameters.
          batch_size, convert: see `from_checkpoint`.
          flax_mutables: the model's mutable collections, such as batch statistics; None: it has none.

        Raises:
          errors.UserError: the vocabulary doesn't fit the model.
        """
        self.description = description
        self.outputs, self._encoder = description.model.outputs, description.encoder
        self._partitioner = partitioning.PjitPartitioner(devices=jax.local_devices())
        with device_memory.explained(batch_sizes.FIX):
            state = train_state.InferenceState(params, flax_mutables or {})
            self.state = jax.device_put(state, self._partitioner.replicated)
        self._convert = convert
        self._sizes = batch_sizes.BatchSizes(batch_size, self._partitioner.num_data_shards)
        everywhere, batch = self._partitioner.replicated, self._partitioner.batch_sharding
        self._predict = self._partitioner.partition(
            forward.predict_fn(description), (everywhere, batch), batch
        )

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike,
        *,
        batch_size: int | None = None,
        dtype: str | None = None,
        convert: bool = False,
    ) -> "RahfPredictor":
        """Loads a model.

        Args:
          path: a MODEL_DIR, whose newest checkpoint is taken; a `checkpoint_<step>` in it; or an export.
          batch_size: number of images in the largest batch; rounded up to a multiple of the devices. None:
            16, or fewer if the memory is too small.
          dtype: type of activations, 'float32' or 'bfloat16'; None: as in training. Parameters are float32.
          convert: whether to take images that have more to show than 8 bits of red, green and blue (see
            `inputs.images.decode`).

        Raises:
          errors.UserError: there is no checkpoint, it doesn't fit its description, or it has none.
        """
        if dtype not in (None, "float32", "bfloat16"):
            raise errors.UserError(f"dtype must be 'float32' or 'bfloat16', got {dtype!r}")
        if batch_size is not None and batch_size < 1:
            raise errors.UserError(f"batch_size must be at least 1, got {batch_size}")
        place = forward.checkpoint_path(os.fspath(path))
        description = forward.read_description(place, dtype)
        if description.not_calibrated:
            logging.warning("%s: %s", place, description.not_calibrated)
        state = forward.load_state(place, description)
        return cls(description, state.params, batch_size, convert, state.flax_mutables)

    @property
    def params(self) -> Any:
        """The model's parameters, on every device."""
        return self.state.params

    @property
    def batch_size(self) -> int:
        """Number of images in the largest batch."""
        return self._sizes.largest

    def __call__(
        self,
        images: Picture | Sequence[Picture],
        prompts: str | Sequence[str] | None = None,
        ids: str | Iterable[str] | None = None,
    ) -> Prediction | list[Prediction]:
        """Scores one image, or many.

        Args:
          images: one image or a sequence of them. An image is a PIL image; an array of NumPy or JAX, uint8
            [height, width, 3] or [height, width]; a path; or a file's bytes. A sequence may be one array,
            uint8 [images, height, width, 3].
          prompts: one prompt for one image; for a sequence, as many prompts as images. A model that reads no
            text takes prompts or None: they become the records' captions.
          ids: the images' names in the records; default: the paths, or numbers from 0.

        Returns:
          A record for one image; a list, in the images' order, for a sequence.

        Raises:
          PredictionError: an image or a prompt can't be scored, or the model's outputs for it aren't finite;
            the message says which one.
          errors.UserError: a batch needs more memory than the devices have.
        """
        is_stack = isinstance(images, np.ndarray | jax.Array) and images.ndim == 4
        # An open file is an iterable of lines; `read` tells what is taken instead of it.
        one = (isinstance(images, Picture) and not is_stack) or hasattr(images, "read")
        one = one or not isinstance(images, Iterable)
        pictures: list[Any] = [images] if one else list(cast(Iterable, images))
        if prompts is None:
            if self.description.reads_text:
                raise PredictionError(forward.NEEDS_PROMPT)
            prompts = "" if one else [""] * len(pictures)
        if one != isinstance(prompts, str) or not isinstance(prompts, Iterable):
            raise PredictionError(
                "give one image and one prompt, or as many prompts as images; got"
                f" {type(images).__name__} and {type(prompts).__name__}"
            )
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if ids is None:
            names = [str(p if isinstance(p, str | os.PathLike) else i) for i, p in enumerate(pictures)]
        else:
            names = [ids] if isinstance(ids, str) else list(ids)
        if not len(pictures) == len(texts) == len(names):
            raise PredictionError(
                f"{len(pictures)} images, {len(texts)} prompts and {len(names)} ids: give as many of each"
            )
        if self._sizes.is_default and (smaller := self.fit(len(pictures))):
            logging.warning("%s", smaller)
        records: list[Prediction] = []
        waiting, size = None, self.batch_size
        for start in range(0, len(pictures), size):
            batch = slice(start, start + size)
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

    def fit(self, images: int) -> str:
        """Checks the batches for so many images against the devices' free memory, before the first one runs.

        Where they don't fit, batches of the default size become smaller; each size that is tried is compiled.

        Returns:
          A sentence about the smaller size and its reason; "" if nothing changed.

        Raises:
          errors.UserError: a batch of the chosen size, or of the smallest one, doesn't fit.
        """
        devices = self._partitioner.mesh.local_devices
        if self._sizes.fits(images) or (there := device_memory.limit(devices)) is None:
            return ""
        jax.block_until_ready(self.state)
        free = there - device_memory.in_use(devices)
        room = int(_SHARE * free) if self._sizes.is_default else free
        side = self.description.feature_lengths["image"]
        blank = self.prepare(np.zeros((side, side, 3), np.uint8), "a")

        def check(rows: int) -> None:
            features = self._partitioner.shard_batch(self.features([blank], rows))
            compiled = self._predict.lower(self.state, features).compile()
            device_memory.check(compiled, devices[0], room, held=plan.bytes_per_chip(self.state))

        with device_memory.explained(batch_sizes.FIX):
            return self._sizes.fit(images, room, check)

    # A prediction has three parts: `prepare`, `dispatch` and `finish`. `pipeline` runs them side by side.

    def prepare(self, picture: Picture, prompt: str) -> Prepared:
        """Brings an image and a prompt to the model's shapes; see `__call__` for their forms.

        The prompt may be "" if the model reads no text.

        Raises:
          PredictionError: the image or the prompt can't be scored.
        """
        forward.check_prompt(prompt, self.description.reads_text)
        image = self.read(picture)
        if min(image.shape[:2]) < (least := forward.MIN_SIDE):
            height, width = image.shape[:2]
            raise PredictionError(f"the image has {width} x {height} pixels; {least} x {least} are the least")
        square, box = pixels.square(image, self.description.feature_lengths["image"], self.description.fit)
        inputs, cut, words = None, 0, None
        if self.description.reads_text:
            inputs, cut = self.encode(feedback.task_prompts(self.description.model.variant, prompt))
        if self.outputs.keywords:
            length = self.description.feature_lengths["targets"]
            words = self._encoder.keyword_pieces(prompt, length)
        return Prepared(image, image.shape[:2], prompt, square, box, inputs, words, cut)

    def dispatch(self, prepared: Sequence[Prepared], rows: int | None = None) -> Outputs:
        """Starts to predict a batch, and doesn't wait for it.

        Args:
          prepared: the images, at most `batch_size`.
          rows: rows of the batch; default: the next of a few sizes, each of which is compiled once.

        Returns:
          The outputs of `forward.predict_fn`, for `rows` images.
        """
        return self.run(self.features(prepared, rows or self._sizes.rows(len(prepared))))

    def run(self, features: Features) -> Outputs:
        """Calls the compiled `forward.predict_fn`, and doesn't wait for it."""
        with device_memory.explained(batch_sizes.FIX):
            return self._predict(self.state, self._partitioner.shard_batch(features))

    def finish(self, prepared: Sequence[Prepared], outputs: Outputs, ids: Sequence[str]) -> list[Prediction]:
        """Waits for a batch's outputs and makes a record of each image.

        Args:
          prepared: the images that were given to `dispatch`.
          outputs: what `dispatch` returned.
          ids: a name for each image.

        Raises:
          PredictionError: the outputs for an image aren't finite.
        """
        fetched = jax.device_get(outputs)
        records = []
        for row, (one, name) in enumerate(zip(prepared, ids, strict=True)):
            try:
                records.append(self.record(name, one, fetched, row))
            except errors.NotFiniteError as error:
                raise PredictionError(f"{name}: {error}") from error
        return records

    def record(
        self, name: str, one: Prepared, outputs: Mapping[str, Shaped[np.ndarray, "batch ..."]], row: int
    ) -> Prediction:
        """Makes the record of one image of a batch.

        Args:
          name: the image's name.
          one: the image, as it was given to `dispatch`.
          outputs: what `dispatch` returned, on the host.
          row: the image's row of the outputs.

        Raises:
          errors.NotFiniteError: the outputs aren't finite.
        """
        of_image = {key: value[row] for key, value in outputs.items()}
        scores, heatmaps = (of_image.get(kind, ()) for kind in ("scores", "heatmaps"))
        deviations = of_image.get("score_deviations")
        feedback.check_finite(scores, heatmaps, deviations)
        tokens = None
        if one.words is not None:
            decisions = of_image["keyword_probability"], of_image["keyword_misaligned"]
            tokens = keywords.tokens(one.prompt, one.words, *decisions)
        return Prediction.from_outputs(
            name,
            one.prompt,
            scores,
            [_own_size(heatmap, one) for heatmap in heatmaps],
            tokens,
            deviations,
            self.outputs,
            picture=one.picture,
            size=one.size,
            words_cut=one.words_cut,
        )

    def features(
        self, prepared: Sequence[Prepared], rows: int
    ) -> dict[str, Shaped[np.ndarray, "{rows} ..."]]:
        """Makes the features of a batch, see `forward.features`."""
        return forward.features(prepared, rows, self.description)

    def score_fn(self, kind: str) -> Callable[..., jax.Array]:
        """Returns a score as a pure, differentiable function of the image, for guidance and rewards.

            gradient = jax.grad(predictor.score_fn("aesthetics"))(image, "a yellow cat")

        Args:
          kind: one of `outputs.scores`.

        Returns:
          `score(images, prompts)`. It takes images, float [batch, height, width, 3] in [0, 1], with as many
          prompts, and returns float32 [batch]; or one image, float [height, width, 3], with one prompt, and
          returns float32 []. A model that reads no text needs no prompts: `score(images)`. Images of any size
          are resized as in training (but not rounded to 8 bits).
          Within `jax.jit` give prompts as `encode_for(kind, prompts)`: their values may change without
          another compilation. The function is a `jax.tree_util.Partial`: give it to a jitted function as an
          argument, and the parameters don't become constants of the program.

        Raises:
          errors.UserError: the model predicts no such kind.
        """
        return rewards.score_fn(self.description, self.state, kind)

    def encode_for(self, kind: str, prompts: str | Sequence[str]) -> Int32[np.ndarray, "*batch length"]:
        """Encodes prompts for `score_fn(kind)`: one prompt to [length], several to [batch, length].

        The length is 0 of a system that reads no text.
        """
        return rewards.encode_for(self.description, kind, prompts)

    def encode(self, texts: Sequence[str]) -> tuple[Int32[np.ndarray, "prompts length"], int]:
        """Encodes prompts.

        Returns:
          The tokens, see `prompt_encoders.PromptEncoder.encode`; and of the prompt that lost most, the number
          of words that are missing, wholly or partly.

        Raises:
          errors.UserError: the system reads no text.
        """
        if self._encoder is None:
            raise errors.UserError(f"{self.description.system} reads no text: there is nothing to encode")
        tokens, words_cut = self._encoder.encode(texts, self.description.feature_lengths["inputs"])
        return tokens, int(words_cut.max(initial=0))

    def read(self, picture: Picture) -> UInt8[np.ndarray, "height width 3"]:
        """Reads an image; see `__call__` for its forms.

        Raises:
          PredictionError: it can't be read.
        """
        if not isinstance(picture, Picture):
            raise PredictionError(
                "an image must be a PIL image, an array of NumPy or JAX, a path or a file's bytes, got"
                f" {type(picture).__name__}"
            )
        if isinstance(picture, np.ndarray | jax.Array):
            return _checked_array(np.asarray(picture))
        try:
            if isinstance(picture, Image.Image):
                return image_files.of_pillow(picture, self._convert)
            if isinstance(picture, str | os.PathLike):
                path = os.fspath(picture)
                picture = record_files.read_bytes(path, path)
            return image_files.decode(bytes(picture), self._convert)
        except (record_files.InputError, image_files.ImageError) as error:
            raise PredictionError(str(error)) from error


def _checked_array(array: np.ndarray) -> np.ndarray:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        raise PredictionError(
            f"an array must be uint8 [height, width, 3] or [height, width], got {array.dtype} {array.shape}"
        )
    return np.repeat(array[..., None], 3, axis=2) if array.ndim == 2 else array


def _own_size(heatmap: np.ndarray, one: Prepared) -> np.ndarray:
    """Resizes a heatmap [side, side] to the image's own size: float32 [height, width]."""
    top, left, bottom, right = one.box
    height, width = one.size
    heatmap = np.ascontiguousarray(heatmap[top:bottom, left:right], np.float32)
    return np.clip(overlay.resize(heatmap, (width, height)), 0, 1)
