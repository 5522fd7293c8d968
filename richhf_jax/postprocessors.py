"""Makes `feedback.RichFeedback`, which metrics compare, of task examples: the tasks' seqio postprocessor."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from richhf_jax import feedback, foreign_text


def rich_feedback(output: Any, example: Mapping[str, Any], is_target: bool) -> feedback.RichFeedback:
    """Returns the target of a task example, or a model's output unchanged (seqio's `postprocess_fn`).

    Args:
      output: the model's RichFeedback on the example; unused for a target.
      example: the task example (numpy), with a slot for each kind of heatmap, or none; the same for scores.
      is_target: whether the target is wanted.

    Returns:
      The feedback. If the labels don't fit the prompt's tokens, it has no tokens, and a warning names the
      record: words and labels are never mis-paired.
    """
    return target(example) if is_target else output


def target(example: Mapping[str, Any]) -> feedback.RichFeedback:
    """Returns the raters' feedback in a task example; see `rich_feedback`."""
    name, prompt, labels = (
        example[field].decode()
        for field in (feedback.FILENAME_FIELD, feedback.PROMPT_FIELD, feedback.KEYWORDS_FIELD)
    )
    try:
        tokens = feedback.label_tokens(prompt, feedback.parse_labels(labels))
    except ValueError as error:
        shown = foreign_text.for_terminal(name)
        logging.warning("%s: %s; its keywords are left out", shown, error)
        tokens = ()
    heatmaps = _by_kind(feedback.HEATMAPS, example["heatmaps"], example["heatmap_weights"])
    scores = _by_kind(feedback.SCORES, example["scores"], example["score_weights"])
    return feedback.RichFeedback(
        id=name,
        prompt=prompt,
        scores={kind: float(score) for kind, score in scores.items()},
        heatmaps={kind: in_box(heat, example).astype(np.float32) / 255 for kind, heat in heatmaps.items()},
        tokens=tokens,
    )


def _by_kind(kinds: Sequence[str], values: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Names the values that have a weight. A task asks for every kind, or (for other systems) for none."""
    if not len(weights):
        return {}
    rows = zip(kinds, values, weights, strict=True)
    return {kind: value for kind, value, weight in rows if weight}


def in_box(pixels: np.ndarray, example: Mapping[str, Any]) -> np.ndarray:
    """Cuts [height, width, ...] of a task example to its letterbox: no metric shall see the padding."""
    if "image_box" not in example:
        return pixels
    top, left, bottom, right = example["image_box"]
    return pixels[top:bottom, left:right]


def prediction(
    example: Mapping[str, Any],
    heatmaps: np.ndarray | Sequence[np.ndarray],
    scores: np.ndarray | Sequence[float],
    tokens: Sequence[feedback.Token] | None,
    deviations: np.ndarray | None = None,
    outputs: feedback.Outputs = feedback.ALL_OUTPUTS,
) -> feedback.RichFeedback:
    """Makes feedback of a model's outputs for a task example.

    Args:
      example: the task example; its name, prompt and letterbox are used.
      heatmaps: float32 [heatmaps, height, width], in the order of `outputs.heatmaps`; () if it has none.
      scores: float32 [scores], in the order of `outputs.scores`; () if it has none.
      tokens: the prompt's tokens with labels, from `keywords.tokens` or `written_tokens`; None without
        `outputs.keywords`.
      deviations: float32 [scores], the scores' standard deviations; None: the model gives none.
      outputs: the kinds that the model predicts.

    Raises:
      errors.NotFiniteError: an output isn't finite.
    """
    feedback.check_finite(scores, heatmaps, deviations)
    return feedback.RichFeedback.from_outputs(
        example[feedback.FILENAME_FIELD].decode(),
        example[feedback.PROMPT_FIELD].decode(),
        scores,
        [in_box(np.asarray(heatmap, np.float32), example) for heatmap in heatmaps],
        tokens,
        deviations,
        outputs,
    )


def written_tokens(prompt: str, text: str) -> tuple[feedback.Token, ...]:
    """Labels the prompt's tokens as a freely written `text` says."""
    labels = feedback.labels_from_text(feedback.tokenize_prompt(prompt), text)
    return feedback.label_tokens(prompt, labels)
