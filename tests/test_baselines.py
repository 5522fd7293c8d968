"""The baselines' models: losses by numpy, meshes, and the commands from training to predictions."""

import functools
import json

import gin
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import traverse_util
from PIL import Image
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil

from richhf_jax import (
    RahfPredictor,
    baselines,
    errors,
    feedback,
    gin_utils,
    model_description,
    partitioning,
)
from richhf_jax import trainer as trainer_lib
from richhf_jax.network import resnet

PIXELS, BATCH = 16, 4
CONFIG = resnet.ResNetConfig(depths=(1, 1), widths=(8, 16), stem_width=4)
# Not all kinds, and not the first.
HEADS = resnet.ResNetHeadsConfig(
    score_kinds=feedback.SCORES[1:3],
    heatmap_kinds=feedback.HEATMAPS[1:],
    score_dense_layers=(6,),
    heatmap_layers=(("deconv", 4, 3), ("deconv", 4, 3)),
    heatmap_output_layer=("deconv", 3),
)


def make_model(heads=HEADS, **weights):
    return baselines.ResNetModel(resnet.ResNetFeedback(CONFIG, heads), optax.sgd(0.1), **weights)


@pytest.fixture
def batch(rng):
    sides = (PIXELS, PIXELS)
    return {
        "image": rng.integers(0, 256, (BATCH, *sides, 3), dtype=np.uint8),
        "heatmap_targets": rng.integers(0, 256, (BATCH, 2, *sides), dtype=np.uint8),
        "heatmap_weights": np.array([[1, 1], [1, 0], [0, 1], [0, 0]], np.float32),
        "score_targets": rng.random((BATCH, 4), dtype=np.float32),
        "score_weights": rng.integers(0, 2, (BATCH, 4)).astype(np.float32),
    }


@pytest.fixture(scope="module")
def variables(random_values):
    """Makes random parameters and statistics."""
    shapes = {"image": (BATCH, PIXELS, PIXELS, 3)}
    made = jax.eval_shape(lambda: make_model().get_initial_variables(jax.random.key(0), shapes))
    statistics = jax.tree.map(lambda leaf: 0.5 + np.abs(leaf), random_values(made["batch_stats"]))
    return random_values(made["params"]), {"batch_stats": statistics}


def test_the_loss_by_numpy(batch, variables):
    model = make_model(heatmap_loss_weight=3.0, score_loss_weight=2.0)
    params, mutables = variables
    predictions = jax.jit(model.predict_batch)(params, batch, flax_mutables=mutables)
    squares = {
        "score": (predictions["scores"] - batch["score_targets"][:, 1:3]) ** 2,
        "heatmap": ((predictions["heatmaps"] - batch["heatmap_targets"][:, 1:] / 255) ** 2).mean((2, 3)),
    }
    weights = {"score": batch["score_weights"][:, 1:3], "heatmap": batch["heatmap_weights"][:, 1:]}
    means = {name: float((weights[name] * e).sum() / weights[name].sum()) for name, e in squares.items()}

    @jax.jit
    def evaluate(batch, normalizers):
        return model.loss_fn(params, batch, None, normalizers, flax_mutables=mutables)

    whole = model.loss_weights(batch)
    loss, (metrics, after) = evaluate(batch, whole)
    assert float(loss) == pytest.approx(2 * means["score"] + 3 * means["heatmap"], rel=1e-5)
    for name, mean in means.items():
        assert float(metrics[f"loss/{name}"].compute()) == pytest.approx(mean, rel=1e-5)
    # An evaluation moves no statistics.
    jax.tree.map(np.testing.assert_array_equal, after, mutables)
    # Microbatches' losses add up.
    parts = [evaluate({name: value[i::2] for name, value in batch.items()}, whole)[0] for i in range(2)]
    assert float(sum(parts)) == pytest.approx(float(loss), rel=1e-5)
    # A batch without labels has no loss.
    empty = batch | {name: np.zeros_like(batch[name]) for name in ("heatmap_weights", "score_weights")}
    assert evaluate(empty, model.loss_weights(empty))[0] == 0


@pytest.mark.parametrize("name", ["heatmap", "score"])
def test_a_batch_without_slots_for_the_networks_kinds_is_refused(name, batch):
    less = batch | {f"{name}_{part}": batch[f"{name}_{part}"][:, :0] for part in ("targets", "weights")}
    count = {"heatmap": 2, "score": 4}[name]
    with pytest.raises(errors.UserError, match=f"NUM_{name.upper()}S is 0, but the .* set it to {count}"):
        make_model().loss_weights(less)


def test_images_of_a_size_that_heatmaps_cannot_have_are_refused():
    with pytest.raises(errors.UserError, match="IMAGE_SIDE: images have 20x20 pixels, but .* cells of 8"):
        make_model().get_initial_variables(jax.random.key(0), {"image": (1, 20, 20, 3)})
    make_model(HEADS.replace(heatmap_kinds=())).check_image_size(20, 20)


def description(heads, fit):
    return model_description.ModelDescription(
        resnet.ResNetFeedback(CONFIG, heads), {"image": 64}, fit, None, {}, None, system="resnet50_scores"
    )


@pytest.mark.parametrize("size", [(64, 64), (96, 200), (200, 101), (40, 30), (333, 517)])
def test_a_picture_reaches_the_network_as_from_hugging_faces_processor(rng, variables, size):
    """The processor of microsoft/resnet-50, told to crop no more than the ends of the longer side."""
    processor = ConvNextImageProcessorPil(
        size={"shortest_edge": 64},
        crop_pct=1.0,
        resample=Image.Resampling.BICUBIC,
        image_mean=resnet.PIXEL_MEAN,
        image_std=resnet.PIXEL_DEVIATION,
    )
    params, mutables = variables
    predictor = RahfPredictor(description(HEADS.replace(heatmap_kinds=()), "centre_crop"), params, 1)
    image = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
    features = predictor.features([predictor.prepare(image, "")], 1)
    seen = []

    def watch(call, args, kwargs, context):
        if isinstance(context.module, resnet.ResNet):
            seen.append(args[0])
        return call(*args, **kwargs)

    with nn.intercept_methods(watch):
        predictor.description.network.apply({"params": params, **mutables}, features["image"])
    theirs = processor(Image.fromarray(image), return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
    levels = np.abs(np.asarray(seen[0]) - theirs) * 255 * np.array(resnet.PIXEL_DEVIATION)
    assert levels.shape == (1, 64, 64, 3)
    assert levels.max() <= 1.001  # One level, and the rounding of float32.


def test_heatmaps_of_cropped_pictures_are_refused():
    with pytest.raises(errors.UserError, match="predicts heatmaps, but crops pictures .*FIT=\"'resize'\""):
        _ = description(HEADS, "centre_crop").model


def test_the_summary_shows_the_networks_first_kind(batch):
    heat = np.full((BATCH, 1, PIXELS, PIXELS), 0.5, np.float32)
    (picture,) = make_model().summary_images(batch, lambda: {"heatmaps": heat}).values()
    image, truth, predicted = np.split(picture, 3, axis=2)
    np.testing.assert_array_equal(image, batch["image"])
    np.testing.assert_array_equal(truth[..., 0], batch["heatmap_targets"][:, 1])
    assert (predicted == 127).all()
    assert make_model(HEADS.replace(heatmap_kinds=())).summary_images(batch, pytest.fail) == {}


def test_every_mesh_trains_alike(batch, variables):
    """Statistics are those of the whole batch, wherever its examples lie."""
    given = [
        {name: jnp.asarray(array) for name, array in traverse_util.flatten_dict(tree).items()}
        for tree in variables
    ]
    states = []
    for devices in (1, 2):
        partitioner = partitioning.PjitPartitioner(devices=jax.devices()[:devices])
        trainer = trainer_lib.Trainer(make_model(), partitioner, batch)
        state, metrics = trainer.train_step(trainer.init_state(*given), batch)
        states.append(jax.device_get((state.params, state.flax_mutables, metrics["loss"].compute())))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), *states)
    assert not np.array_equal(
        states[0][1]["batch_stats"]["resnet"]["stem"]["norm"]["mean"],
        variables[1]["batch_stats"]["resnet"]["stem"]["norm"]["mean"],
    )


def test_tensor_parallelism_splits_channels_with_their_statistics(batch):
    state = trainer_lib.Trainer(make_model(), partitioning.PjitPartitioner(2), batch).abstract_state
    kernel = state.params["resnet"]["stage_0_block_0"]["conv_1"]["kernel"]
    mean = state.flax_mutables["batch_stats"]["resnet"]["stage_0_block_0"]["conv_1"]["norm"]["mean"]
    assert kernel.sharding.spec[-1] == mean.sharding.spec[0] == "model"


# What the shipped files of the tiny ResNets become, so that XLA compiles for seconds.
SMALLER = (
    "resnet.ResNetConfig.depths = (1, 1)",
    "resnet.ResNetConfig.widths = (8, 16)",
    "resnet.ResNetConfig.stem_width = 4",
    "resnet.ResNetHeadsConfig.score_dense_layers = (8,)",
    "resnet.ResNetHeadsConfig.heatmap_layers = (('deconv', 8, 3), ('deconv', 4, 3))",
)


def configure(kind, *bindings):
    gin.clear_config()
    files = [f"models/resnet_tiny_{kind}.gin", "runs/train.gin", "runs/eval.gin"]
    given = {
        "MIXTURE_OR_TASK_NAME": "synthetic_rich_hf_multi_head",
        "TRAIN_STEPS": 6,
        "BATCH_SIZE": 4,
        "EVAL_BATCH_SIZE": 4,
        "EVAL_PERIOD": 6,
        "EVAL_STEPS": 1,
    }
    given = [f"{name} = {value!r}" for name, value in given.items()]
    gin_utils.parse_gin_flags(gin_utils.DEFAULT_SEARCH_PATHS, files, [*given, *SMALLER, *bindings])


@pytest.mark.parametrize("kind", ["heatmaps"])  # Scores take the same way, and as many seconds.
def test_from_training_to_predictions(kind, synthetic_data_dir, tmp_path, capsys):
    import seqio

    from richhf_jax import eval as eval_script
    from richhf_jax import train

    seqio.set_tfds_data_dir_override(str(synthetic_data_dir))
    configure(kind, f"MODEL_DIR = '{tmp_path}/run'")
    gin.get_configurable(train.train)()
    metrics = gin.get_configurable(eval_script.evaluate)()
    assert "ResNet-50" in capsys.readouterr().out
    kinds = {"scores": feedback.SCORES, "heatmaps": feedback.HEATMAPS}
    # Heatmaps are compared with the scenes, too.
    kinds_measured = {name.split("/")[0] for name in metrics if "/" in name}
    assert kinds_measured - {"synthetic"} == {kind.removesuffix("s")}
    description = model_description.read(tmp_path / "run")
    assert description.system == f"resnet50_{kind}"
    assert description.feature_lengths == {"image": 64}

    predictor = RahfPredictor.from_checkpoint(str(tmp_path / "run"))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    (feedback_,) = predictor([image], ["a cat"])
    assert feedback_.tokens is None
    for name, all_kinds in kinds.items():
        assert tuple(getattr(feedback_, name)) == (all_kinds if name == kind else ())
    assert "scores" in json.dumps(feedback_.to_dict()) or kind == "heatmaps"
