"""Images and prompts -> rich feedback: `RahfPredictor`. Needs neither TensorFlow, seqio nor gin.

from richhf_jax import RahfPredictor

predictor = RahfPredictor.from_checkpoint("runs/quickstart/finetune")
record = predictor("image.png", "a yellow cat")
record.scores["plausibility"], record.heatmaps["implausibility"], record.tokens
record.overlay().save("overlay.png")
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from richhf_jax import errors, feedback, keywords, model_description, partitioning, pixels
from richhf_jax.inputs import images as image_files
from richhf_jax.pages import overlay
from richhf_jax.predict import forward, rewards
from richhf_jax.predict.forward import Features, Outputs, PredictionError, Prepared

Picture = Image.Image | np.ndarray | bytes | str | os.PathLike
# A file in place of a prompt; no image generator reads as much.
MAX_PROMPT_WORDS = 1000
# Fewer pixels a side show nothing.
MIN_SIDE = 8
# Of two shapes of a batch that are compiled.
_SIZE_RATIO = 4


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
        self._encoder = forward.PromptEncoder(description)
        everywhere, batch = self._partitioner.replicated, self._partitioner.batch_sharding
        self._predict = self._partitioner.partition(
            forward.predict_fn(description), (everywhere, batch), batch
        )

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
            `inputs.images.decode`).

        Raises:
          errors.UserError: there is no checkpoint, it doesn't fit, or its directory doesn't say of what.
        """
        if dtype not in (None, "float32", "bfloat16"):
            raise errors.UserError(f"dtype must be 'float32' or 'bfloat16', got {dtype!r}")
        if batch_size < 1:
            raise errors.UserError(f"batch_size must be at least 1, got {batch_size}")
        place = forward.checkpoint_path(os.fspath(path))
        description = model_description.read(os.path.dirname(place), dtype)
        return cls(description, forward.load_params(place, description), batch_size, convert)

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
        square, box = pixels.square(image, self.description.feature_lengths["image"], self.description.fit)
        inputs, cut = self._encoder.encode(feedback.task_prompts(self.description.network.variant, prompt))
        words = self._encoder.keyword_pieces(prompt)
        return Prepared(image, prompt, square, box, inputs, words, cut)

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
        """The compiled call alone, see `forward.predict_fn`. Doesn't wait for it."""
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
        return Prediction.from_outputs(
            name,
            one.prompt,
            outputs["scores"],
            [_own_size(heatmap, one) for heatmap in outputs["heatmaps"]],
            keywords.tokens(one.prompt, one.words.numbers, *decisions),
            image=one.image,
            words_cut=one.words_cut,
        )

    def features(self, prepared: Sequence[Prepared], rows: int) -> dict[str, np.ndarray]:
        """Makes a batch of `rows` images, the last of which may be padding; see `forward.predict_fn`."""
        return forward.features(prepared, rows, self.description, self._encoder.suffix)

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
        return rewards.score_fn(self.description, self.params, self._encoder, kind)

    def encode_for(self, kind: str, prompts: str | Sequence[str]) -> np.ndarray:
        """Prompts for `score_fn(kind)`: int32 [length] of one, [batch, length] of several."""
        return rewards.encode_for(self._encoder, self.description.network.variant, kind, prompts)

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, int]:
        """`preprocessors.encode` without TensorFlow: int32 [texts, length], and the most words cut of one."""
        return self._encoder.encode(texts)

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


def _batch_sizes(largest: int, multiple: int) -> list[int]:
    """A few sizes of a batch, each a multiple of the devices, up to the one asked for (rounded up)."""
    sizes = {multiple}  # A single image shall be quick.
    while largest >= 1:
        sizes.add(-(-largest // multiple) * multiple)
        largest //= _SIZE_RATIO
    return sorted(sizes)


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
