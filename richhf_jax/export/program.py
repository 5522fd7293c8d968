"""Makes the prediction a function of plain arrays, for the executable exports."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from richhf_jax import clip_tokens, feedback
from richhf_jax.model_description import ModelDescription
from richhf_jax.predict import forward

Arrays = Mapping[str, Any]
# Output of `forward.predict_fn` -> its name in the exports, where that is another one.
_OUTPUTS = {
    "keyword_probability": "misaligned_probability",
    "keyword_misaligned": "misaligned",
    "score_deviations": "uncertainty",
}


def make(description: ModelDescription) -> Callable[[Arrays, Arrays], dict[str, jax.Array]]:
    """Makes a function of parameters and inputs from `forward.predict_fn` and the vocabulary's suffix.

    Returns:
      A function (parameters, inputs) -> outputs. Parameters, and the arrays of mutable collections, are named
      as by `forward.flatten`; inputs are those of `input_shapes`. Outputs are those of `predict_fn`, but with
      the words' values called
      "misaligned_probability" and "misaligned" ([batch, length]; column 0 is word 1), and the scores'
      standard deviations, where the model predicts them, "uncertainty" ([batch, scores]).
    """
    # The program runs on other devices than this machine's.
    network = description.network.with_attention_kernel("xla")
    predict = forward.predict_fn(dataclasses.replace(description, network=network))
    suffix = description.encoder.suffix if description.model.outputs.keywords else ()

    def run(params, inputs):
        features = dict(inputs)
        if suffix:
            rows = jnp.zeros((inputs["image"].shape[0], 1), jnp.int32)
            features |= {
                "keyword_pieces": features.pop("word_pieces")[:, None],
                "keyword_words": features.pop("word_numbers")[:, None],
                "keyword_suffix": rows + jnp.array(suffix, jnp.int32)[None],
            }
        outputs = predict(forward.unflatten(params), features)
        return {_OUTPUTS.get(name, name): value for name, value in outputs.items()}

    return run


def input_shapes(description: ModelDescription, batch: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the inputs of `make`'s function; `batch` may be a symbol of `jax.export`."""
    lengths = description.feature_lengths
    shapes: dict[str, Any] = {"image": ((lengths["image"], lengths["image"], 3), jnp.uint8)}
    if description.reads_text:
        prompts = len(feedback.task_prompts(description.model.variant, ""))
        shapes["encoder_input_tokens"] = ((prompts, lengths["inputs"]), jnp.int32)
    if description.model.outputs.keywords:
        shapes |= dict.fromkeys(("word_pieces", "word_numbers"), ((lengths["targets"],), jnp.int32))
    if description.fit == "letterbox":
        shapes["image_box"] = ((4,), jnp.int32)
    return {name: jax.ShapeDtypeStruct((batch, *shape), dtype) for name, (shape, dtype) in shapes.items()}


def reads_clip_tokens(description: ModelDescription) -> bool:
    """Tells whether prompts are encoded by CLIP's vocabulary."""
    return isinstance(description.encoder, clip_tokens.ClipTokens)


def interface(description: ModelDescription) -> dict[str, Any]:
    """Returns, as JSON, everything that a program needs to make the inputs and to read the outputs."""
    lengths, outputs = description.feature_lengths, description.model.outputs
    content: dict[str, Any] = {"image_side": lengths["image"]}
    for name in ("inputs", "targets"):
        if name in lengths:
            content[f"{name}_length"] = lengths[name]
    content |= {"fit": description.fit, "least_side": forward.MIN_SIDE}
    if description.reads_text:
        content["prompts"] = feedback.task_prompts(description.model.variant, "{prompt}")
    if reads_clip_tokens(description):
        ids = {"start_id": description.encoder.start_id, "end_id": description.encoder.end_id}
        content |= {**ids, "padding_id": 0}
    if outputs.keywords:
        content["separators"] = feedback.SEPARATORS.pattern
        content["eos_id"] = description.encoder.eos_id
    content |= {name: list(kinds) for name in ("scores", "heatmaps") if (kinds := getattr(outputs, name))}
    # Only where it is, so that other exports stay as they are.
    if description.model.has_uncertainty:
        content["uncertainty"] = {"calibrated": description.calibration is not None}
    return content
