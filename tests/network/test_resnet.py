"""The ResNets' heads, their statistics, and the parameters of their presets.

The features' parity with torch is in tests/convert/test_resnet.py. Golden files are written anew as
test_rahf.py says.
"""

import functools
import math

import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from richhf_jax import feedback, gin_utils
from richhf_jax.network import resnet

CONFIG = resnet.ResNetConfig(depths=(1, 1), widths=(8, 16), stem_width=4)
HEADS = resnet.ResNetHeadsConfig(
    score_kinds=feedback.SCORES[1:],
    heatmap_kinds=feedback.HEATMAPS,
    score_dense_layers=(6,),
    heatmap_layers=(("deconv", 4, 3), ("deconv", 4, 3)),
    heatmap_output_layer=("deconv", 3),
)
PIXELS = 16


def network(heads=HEADS, **config):
    return resnet.ResNetFeedback(CONFIG.replace(**config), heads)


@pytest.fixture
def images(rng):
    return rng.integers(0, 256, (4, PIXELS, PIXELS, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def variables(random_values):
    init = functools.partial(network().init, image=np.zeros((1, PIXELS, PIXELS, 3), np.uint8))
    shapes = jax.eval_shape(init, jax.random.key(0))
    statistics = jax.tree.map(lambda leaf: 0.5 + np.abs(leaf), random_values(shapes["batch_stats"]))
    return {"params": random_values(shapes["params"]), "batch_stats": statistics}


@functools.cache
def applied(train=False, **config):
    options = {"train": True, "mutable": ["batch_stats"]} if train else {}
    return jax.jit(functools.partial(network(**config).apply, **options))


def test_outputs(variables, images):
    outputs = applied()(variables, images)
    assert {name: (value.shape, value.dtype) for name, value in outputs.items()} == {
        "scores": ((4, 3), np.float32),
        "heatmaps": ((4, 2, PIXELS, PIXELS), np.float32),
    }
    for value in outputs.values():
        assert ((value > 0) & (value < 1)).all()


def test_scores_are_dense_layers_of_the_mean_feature(variables, images):
    params, statistics = variables["params"], variables["batch_stats"]
    mean, deviation = (np.array(values) for values in (resnet.PIXEL_MEAN, resnet.PIXEL_DEVIATION))
    pixels = ((images / 255 - mean) / deviation).astype(np.float32)
    of_resnet = {"params": params["resnet"], "batch_stats": statistics["resnet"]}
    features = np.asarray(jax.jit(resnet.ResNet(CONFIG).apply)(of_resnet, pixels)).mean(axis=(1, 2))
    head = params["scores_head"]
    hidden = np.maximum(features @ head["dense_0"]["kernel"] + head["dense_0"]["bias"], 0)
    logits = hidden @ head["output"]["kernel"] + head["output"]["bias"]
    np.testing.assert_allclose(
        applied()(variables, images)["scores"], 1 / (1 + np.exp(-logits)), rtol=0, atol=1e-5
    )


def test_every_kind_of_heatmap_has_its_own_head(variables, images):
    before = applied()(variables, images)["heatmaps"]
    for slot, kind in enumerate(feedback.HEATMAPS):
        head = f"heatmap_head_{kind}"
        changed = {**variables["params"], head: jax.tree.map(lambda x: 1.5 * x, variables["params"][head])}
        after = applied()({**variables, "params": changed}, images)["heatmaps"]
        assert [bool((before[:, i] != after[:, i]).any()) for i in range(2)] == [i == slot for i in range(2)]


def test_other_images_count_in_training_alone(variables, images):
    others = np.concatenate([images[:1], images[1:][::-1] // 2])
    for train in (False, True):
        first, second = (applied(train)(variables, batch) for batch in (images, others))
        if train:
            first, second = first[0], second[0]
        equal = np.array_equal(first["scores"][0], second["scores"][0])
        assert equal != train


def test_evaluation_uses_the_running_statistics(variables, images):
    statistics = jax.tree.map(lambda x: x + 1, variables["batch_stats"])
    for train in (False, True):
        first, second = (
            applied(train)({**variables, "batch_stats": given}, images)
            for given in (variables["batch_stats"], statistics)
        )
        if train:
            moves = jax.tree.map(lambda after, before: after - before, second[1], first[1])
            for move in jax.tree.leaves(moves):
                np.testing.assert_allclose(move, 0.9, rtol=1e-5)
            first, second = first[0], second[0]
        assert np.array_equal(first["scores"], second["scores"]) == train


def test_bfloat16_computes_about_the_same(variables, images):
    (outputs, statistics), (expected, of_float) = (
        of_type(variables, images) for of_type in (applied(True, dtype="bfloat16"), applied(True))
    )
    for found, value in zip(*map(jax.tree.leaves, (statistics, of_float)), strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, value, rtol=0.02, atol=0.02)
    for name, value in expected.items():
        assert outputs[name].dtype == jnp.float32
        assert 0 < np.abs(outputs[name] - value).max() < 0.1


@pytest.mark.parametrize(
    ("changed", "pixels", "message"),
    [
        (
            {"heatmap_layers": (("deconv", 4, 3),)},
            16,
            "images have 16x16 pixels, heatmaps 8x8.* multiple of 8",
        ),
        ({}, 20, "images have 20x20 pixels, heatmaps 24x24"),
        ({"score_kinds": feedback.SCORES[::-1]}, 16, r"the kinds \('overall', .* must be some of"),
        ({"heatmap_kinds": ("heat",)}, 16, r"the kinds \('heat',\) must be some of"),
    ],
)
def test_settings_that_do_not_fit(changed, pixels, message):
    module = network(HEADS.replace(**changed))
    image = np.zeros((1, pixels, pixels, 3), np.uint8)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(module.init, jax.random.key(0), image)


@pytest.mark.parametrize("config", [{"widths": (8,)}, {"widths": (8, 15)}])
def test_stages_without_a_width(config):
    with pytest.raises(ValueError, match="each of the stages"):
        jax.eval_shape(network(**config).init, jax.random.key(0), np.zeros((1, 16, 16, 3), np.uint8))


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("resnet_tiny_scores", None),
        ("resnet_tiny_heatmaps", None),
        # ResNet-50 as published, without its classifier of 1,000 classes.
        ("resnet50_scores", 25_557_032 - 2049 * 1000),
        ("resnet50_heatmaps", 25_557_032 - 2049 * 1000),
    ],
)
def test_golden_parameters_of_the_presets(check_golden, preset, expected):
    gin.clear_config()
    gin_utils.parse_gin_flags(gin_utils.DEFAULT_SEARCH_PATHS, [f"models/{preset}.gin"], [])
    model, side = gin_utils.macro("MODEL"), gin_utils.macro("IMAGE_SIDE")
    shapes = {"image": (1, side, side, 3)}
    variables = jax.eval_shape(lambda: model.get_initial_variables(jax.random.key(0), shapes))
    check_golden(preset, variables)
    if expected:
        leaves = jax.tree.leaves(variables["params"]["resnet"])
        assert sum(math.prod(leaf.shape) for leaf in leaves) == expected
