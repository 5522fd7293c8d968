"""Makes the prediction a function of plain arrays, for the executable exports."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import traverse_util

from richhf_jax import feedback, keywords
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
      A function (parameters, inputs) -> outputs. Parameters are named as in `flat`; inputs are those of
      `input_shapes`. Outputs are those of `predict_fn`, but with the words' values called
      "misaligned_probability" and "misaligned" ([batch, length]; column 0 is word 1), and the scores'
      standard deviations, where the model predicts them, "uncertainty" ([batch, scores]).
    """
    # The program runs on other devices than this machine's.
    network = description.network.with_attention_kernel("xla")
    predict = forward.predict_fn(dataclasses.replace(description, network=network))
    suffix = keywords.suffix_pieces(forward.load_vocabulary(description.vocabulary).encode)

    def run(params, inputs):
        batch = inputs["image"].shape[0]
        rows = jnp.zeros((batch, 1), jnp.int32)
        features = {name: inputs[name] for name in ("image", "encoder_input_tokens")}
        if "image_box" in inputs:
            features["image_box"] = inputs["image_box"]
        outputs = predict(
            traverse_util.unflatten_dict(params, sep="/"),
            features
            | {
                "keyword_pieces": inputs["word_pieces"][:, None],
                "keyword_words": inputs["word_numbers"][:, None],
                "keyword_suffix": rows + jnp.array(suffix, jnp.int32)[None],
            },
        )
        return {_OUTPUTS.get(name, name): value for name, value in outputs.items()}

    return run


def input_shapes(description: ModelDescription, batch: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the inputs of `make`'s function; `batch` may be a symbol of `jax.export`."""
    lengths = description.feature_lengths
    prompts = len(feedback.task_prompts(description.network.variant, ""))
    shapes = {
        "image": ((lengths["image"], lengths["image"], 3), jnp.uint8),
        "encoder_input_tokens": ((prompts, lengths["inputs"]), jnp.int32),
        "word_pieces": ((lengths["targets"],), jnp.int32),
        "word_numbers": ((lengths["targets"],), jnp.int32),
    }
    if description.fit == "letterbox":
        shapes["image_box"] = ((4,), jnp.int32)
    return {name: jax.ShapeDtypeStruct((batch, *shape), dtype) for name, (shape, dtype) in shapes.items()}


def flat(params: Any) -> dict[str, jax.Array]:
    """Names the parameters of a tree by their paths, joined by "/"."""
    return cast(dict[str, jax.Array], traverse_util.flatten_dict(params, sep="/"))


def interface(description: ModelDescription) -> dict[str, Any]:
    """Returns, as JSON, everything that a program needs to make the inputs and to read the outputs."""
    vocabulary = forward.load_vocabulary(description.vocabulary)
    # Only where it is, so that other exports stay as they are.
    uncertainty = {"calibrated": description.calibration is not None}
    return {
        "image_side": description.feature_lengths["image"],
        "inputs_length": description.feature_lengths["inputs"],
        "targets_length": description.feature_lengths["targets"],
        "fit": description.fit,
        "prompts": feedback.task_prompts(description.network.variant, "{prompt}"),
        "separators": feedback.SEPARATORS.pattern,
        "eos_id": vocabulary.eos_id(),
        "scores": list(feedback.SCORES),
        "heatmaps": list(feedback.HEATMAPS),
        **({"uncertainty": uncertainty} if description.network.heads_config.score_variance else {}),
    }
