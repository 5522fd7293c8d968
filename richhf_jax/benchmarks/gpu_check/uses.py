"""Jobs that use the model as people do: prediction of image files, an export, and a training."""

import pathlib
import tempfile

import jax
import jax.export
import numpy as np

from richhf_jax import errors, feedback, keywords, model_description, partitioning
from richhf_jax.benchmarks import predict, steps
from richhf_jax.benchmarks.gpu_check import model
from richhf_jax.benchmarks.gpu_check.context import Context
from richhf_jax.datasets import raters, scenes
from richhf_jax.export import stablehlo
from richhf_jax.predict import forward

_VOCABULARY = "VOCABULARY = None"
# Training steps whose losses are told as one mean.
_STEPS_TOLD = 25
# Pictures of the training; each is seen several times.
_PICTURES = 64
# One program for any batch size and one for a fixed size sum in other orders.
_EXPORT_TOLERANCE = 1e-5


def command(check: Context, images: int) -> None:
    """Measures the work of `richhf_jax.predict` on image files against the bare compiled call."""
    turn, batch_size = check.turn, check.size.prediction[1]
    bindings = [*check.bindings, _VOCABULARY]
    description = predict.random_description(check.size.preset, bindings, steps.PROMPT_LENGTH)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        with turn.span("draw the images"):
            predict.write_images(folder / "images", images, description.feature_lengths["image"])
        with check.compilation():
            _compile_prediction(check, description, batch_size)
        with turn.device():
            with turn.span("make the predictor, and read the images"):
                case = predict.Case(description, batch_size, folder)
            with check.compilation("the first time through, the program from the cache"):
                case.bare()
            with turn.quiet():
                bare = case.bare()
                turn.figure("bare call", bare, "images/s")
                for heatmaps in ("none", "png"):
                    rate = case.command(heatmaps)
                    turn.figure(f"command, heatmaps: {heatmaps}", rate, "images/s")
                    turn.figure(f"command, heatmaps: {heatmaps}, of the bare call", rate / bare)


def _compile_prediction(
    check: Context, description: model_description.ModelDescription, batch_size: int
) -> None:
    """Puts the predictor's program into JAX's compilation cache, and takes no memory of the device."""
    partitioner = partitioning.PjitPartitioner(devices=[check.device])
    everywhere, split = partitioner.replicated, partitioner.batch_sharding
    run = partitioner.partition(forward.predict_fn(description), (everywhere, split), split)
    lengths, suffix = description.feature_lengths, description.encoder.suffix
    prompts = len(feedback.task_prompts(description.model.variant, ""))
    features = {
        "image": np.zeros((batch_size, lengths["image"], lengths["image"], 3), np.uint8),
        "encoder_input_tokens": np.zeros((batch_size, prompts, lengths["inputs"]), np.int32),
        **keywords.features([], batch_size, lengths["targets"], suffix),
    }
    arguments = forward.abstract_state(description), features
    run.lower(*jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), arguments)).compile()


def export(check: Context) -> None:
    """Runs the tiny model's StableHLO export, and compares its outputs with the predictor's."""
    description = predict.random_description("models/rahf_tiny.gin", [])
    params = forward.flatten(steps.random_params(forward.abstract_state(description)))
    with check.turn.device(), tempfile.TemporaryDirectory() as name, jax.default_matmul_precision("highest"):
        folder = pathlib.Path(name)
        with check.turn.span("export"):
            stablehlo.write(folder, description, params)
        predict.write_images(folder / "images", 4, description.feature_lengths["image"])
        case = predict.Case(description, 4, folder)
        expected = jax.device_get(case.predictor.run(case.batches[0]))
        exported = jax.export.deserialize(bytearray((folder / stablehlo.FILE).read_bytes()))
        features = case.batches[0]
        inputs = {
            "image": features["image"],
            "encoder_input_tokens": features["encoder_input_tokens"],
            "word_pieces": features["keyword_pieces"][:, 0],
            "word_numbers": features["keyword_words"][:, 0],
        }
        with check.compilation("compile and run the exported program"):
            found = jax.device_get(jax.jit(exported.call)(params, inputs))
    names = {"scores": "scores", "heatmaps": "heatmaps", "misaligned_probability": "keyword_probability"}
    for output, own in names.items():
        # Words that aren't there have NaN in both.
        np.testing.assert_array_equal(np.isnan(found[output]), np.isnan(expected[own]))
        difference = float(np.nanmax(np.abs(found[output] - expected[own])))
        check.turn.figure(f"largest difference of {output}", difference)
        if not difference <= _EXPORT_TOLERANCE:
            raise errors.UserError(f"the export's {output} differ from the predictor's by {difference}")


def learn(check: Context, count: int) -> None:
    """Trains on drawn scenes; fails if a loss isn't finite, or doesn't fall."""
    turn, batch_size = check.turn, check.size.learning[1]
    ours, like = model.compiled(check, "train", batch_size)
    with turn.span("draw the scenes"):
        batches = _drawn_batches(like, batch_size)
    model.check_room(check, ours)
    means: list[float] = []
    with turn.device():
        ours.initialise()
        losses: list[float] = []
        for number in range(1, count + 1):
            losses.append(float(ours.run(batches[number % len(batches)])["loss"].compute()))
            if not np.isfinite(losses[-1]):
                raise errors.UserError(f"the loss of step {number} is {losses[-1]}")
            if number % _STEPS_TOLD == 0 or number == count:
                means.append(float(np.mean(losses)))
                turn.figure(f"mean loss until step {number}", means[-1])
                losses = []
    if means[-1] >= means[0]:
        raise errors.UserError(f"the loss didn't fall: {means[0]} at first, {means[-1]} at last")


def _drawn_batches(like: steps.Batch, batch_size: int) -> list[dict[str, np.ndarray]]:
    """Draws scenes with their labels, as batches of the shapes of `like`."""
    side, words = like["image"].shape[1], predict.vocabulary()
    config = scenes.SceneConfig(image_size=side)
    rows = []
    for index in range(_PICTURES):
        image, truth = scenes.render(config, scenes.filename("train", index))
        description, misalignments = truth.scene.description, truth.scene.misalignments
        areas = [float(region.mean()) for region in truth.artifact_regions]
        points = raters.opinions(truth, areas, list(misalignments))
        tokens = feedback.tokenize_prompt(description.prompt)
        text = feedback.mark_misaligned(tokens, description.labels(misalignments))
        target = _padded([*words.encode(text), words.eos_id()], like["decoder_target_tokens"].shape[-1])
        regions = {
            feedback.IMPLAUSIBILITY: truth.artifact_region,
            feedback.MISALIGNMENT: truth.misaligned_region,
        }
        scores = [feedback.standardise_rating(points[kind]) for kind in feedback.SCORES]
        prompt = _padded(words.encode(description.prompt), like["encoder_input_tokens"].shape[-1])
        rows.append(
            {
                "image": image,
                "encoder_input_tokens": prompt[None],
                "heatmap_targets": np.stack(
                    [255 * regions[kind].astype(np.uint8) for kind in feedback.HEATMAPS]
                ),
                "heatmap_weights": np.ones(len(feedback.HEATMAPS), np.float32),
                "score_targets": np.clip(scores, 0, 1).astype(np.float32),
                "score_weights": np.ones(len(feedback.SCORES), np.float32),
                "decoder_input_tokens": np.pad(target[:-1], (1, 0))[None],
                "decoder_target_tokens": target[None],
                "decoder_loss_weights": (target > 0).astype(np.float32)[None],
            }
        )
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    return [{name: np.stack([row[name] for row in batch]) for name in like} for batch in batches]


def _padded(tokens: list[int], length: int) -> np.ndarray:
    """Cuts or fills tokens with zeros to a length."""
    return np.array((tokens + [0] * length)[:length], np.int32)
