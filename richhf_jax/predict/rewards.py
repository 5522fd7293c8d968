"""Scores as pure, differentiable functions of the image, for guidance and rewards."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int32

from richhf_jax import errors, feedback, model_description, pixels, train_state
from richhf_jax.predict import forward
from richhf_jax.shapes import Array


def score_fn(
    description: model_description.ModelDescription, state: train_state.InferenceState, kind: str
) -> Callable[..., jax.Array]:
    """Makes the function of an image that `RahfPredictor.score_fn` returns, and describes.

    Args:
      description: the model's description.
      state: the model's parameters and mutable collections.
      kind: one of the model's scores.

    Raises:
      errors.UserError: the model predicts no such kind.
    """
    model, side = description.model, description.feature_lengths["image"]
    if kind not in model.outputs.scores:
        there = ", ".join(model.outputs.scores) or "none"
        raise errors.UserError(f"there is no score {kind!r}, only {there}")

    @jax.jit
    def score_batch(state, images, tokens):
        shown, box = _shown(images.astype(jnp.float32) * 255, side, description.fit)
        batch = {"image": shown, "encoder_input_tokens": tokens[:, None]}
        if box is not None:
            batch["image_box"] = box
        return model.score_of_kind(state.params, batch, kind, **state.mutables())

    def score(
        state: train_state.InferenceState,
        images: Float[Array, "*batch height width 3"],
        prompts: str | Sequence[str] | Int32[Array, "*batch length"] | None = None,
    ) -> Float32[Array, "*batch"]:
        if prompts is None:
            if description.reads_text:
                raise forward.PredictionError(forward.NEEDS_PROMPT)
            prompts = np.zeros((*images.shape[:-3], 0), np.int32)
        is_text = isinstance(prompts, str | Sequence)
        tokens = encode_for(description, kind, prompts) if is_text else prompts
        if not jnp.issubdtype(images.dtype, jnp.floating) or images.shape[-1] != 3:
            raise forward.PredictionError(
                f"images must be float [..., height, width, 3] in [0, 1], got {images.dtype} {images.shape}"
            )
        # Images and tokens are [height, width, 3] and [length], or a batch of both.
        if images.shape[:-3] != tokens.shape[:-1] or images.ndim not in (3, 4):
            raise forward.PredictionError(
                f"images of shape {images.shape} and prompts of shape {tokens.shape[:-1]}: give one image"
                " and one prompt, or as many prompts as images"
            )
        if images.ndim == 3:
            return score_batch(state, images[None], tokens[None])[0]
        return score_batch(state, images, tokens)

    return jax.tree_util.Partial(score, state)


def encode_for(
    description: model_description.ModelDescription, kind: str, prompts: str | Sequence[str]
) -> Int32[np.ndarray, "*batch length"]:
    """Encodes prompts for a kind of score: one prompt to [length], several to [batch, length]."""
    if isinstance(prompts, str):
        return encode_for(description, kind, [prompts])[0]
    for prompt in prompts:
        forward.check_prompt(prompt, description.reads_text)
    if not description.reads_text:
        return np.zeros((len(prompts), 0), np.int32)
    if description.model.variant == feedback.AUGMENTED_PROMPT:
        prompts = [f"{feedback.SCORE_TASK_STRINGS[kind]} {prompt}" for prompt in prompts]
    return description.encoder.encode(prompts, description.feature_lengths["inputs"])[0]


def _shown(images: jax.Array, side: int, fit: str) -> tuple[jax.Array, jax.Array | None]:
    """Brings images to the model's square as `pixels.square` does, but differentiably.

    Returns:
      [batch, side, side, 3], and the boxes, int [batch, 4]; None where the model takes no boxes.
    """
    batch, height, width, _ = images.shape
    if fit == "centre_crop":
        (rows, columns), start = pixels.cropped((height, width), side)
        scale = jnp.array([rows / height, columns / width])
        shape, offset = (batch, side, side, 3), -jnp.array(start, jnp.float32)
        shown = jax.image.scale_and_translate(images, shape, (1, 2), scale, offset, "cubic")
        return jnp.clip(shown, 0, 255), None
    box = np.array([0, 0, side, side], np.int32)
    if fit == "letterbox":
        box = pixels.letterbox(np.array([height, width]), side)
    top, left, bottom, right = box
    shape = (batch, bottom - top, right - left, 3)
    shown = images if images.shape == shape else jax.image.resize(images, shape, "linear")
    shown = jnp.pad(shown, ((0, 0), (top, side - bottom), (left, side - right), (0, 0)))
    return shown, jnp.tile(box, (batch, 1)) if fit == "letterbox" else None
