"""CLIP's towers and heads. `convert/test_clip.py` compares them with transformers.

The golden files hold every parameter of a preset. To write them anew:
`UPDATE_GOLDEN=1 python -m pytest tests/network/test_clip.py -k golden`.
"""

import functools
import json
import math
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from richhf_jax import gin_utils
from richhf_jax.convert import layers as stacks
from richhf_jax.network import clip, grad_cam

TEXT = clip.TextConfig(emb_dim=16, num_layers=2, num_heads=2, mlp_dim=24, vocab_size=32, max_length=8)
VISION = clip.VisionConfig(emb_dim=24, num_layers=2, num_heads=3, mlp_dim=32, patch_size=4, grid=(3, 3))
NETWORK = clip.Clip(TEXT, VISION, clip.HeadConfig(score_dense_layers=(8,)), projection_dim=12)
END = 31


@pytest.fixture
def inputs(rng):
    tokens = rng.integers(1, END, (4, 8)).astype(np.int32)
    tokens[:, 6] = END
    return rng.integers(0, 256, (4, 12, 12, 3)).astype(np.uint8), tokens


@pytest.fixture
def params(inputs, random_params):
    return functools.partial(random_params, **dict(zip(("image", "tokens"), inputs, strict=True)))


def with_head(head):
    return NETWORK.clone(head_config=NETWORK.head_config.replace(head=head))


@functools.cache
def jitted(network, method="__call__"):
    return jax.jit(functools.partial(network.apply, method=method))


def test_only_the_text_up_to_its_end_counts(inputs, params):
    variables, tokens = params(NETWORK), inputs[1]
    encode = jitted(NETWORK, "encode_text")
    embeddings = encode(variables, tokens)
    # After the end: padding, other words, or the end again, as the published vocabularies pad.
    for id_after in (0, 5, END):
        other = tokens.copy()
        other[:, 7] = id_after
        np.testing.assert_array_equal(encode(variables, other), embeddings)
    changed = tokens.copy()
    changed[:, 5] = tokens[:, 5] % 30 + 1
    assert (np.abs(encode(variables, changed) - embeddings).max(axis=1) > 1e-3).all()


def test_the_end_is_the_first_of_its_id_or_the_highest(inputs, params):
    tokens = inputs[1].copy()
    tokens[:, 3] = 7
    tokens[:, 4:][tokens[:, 4:] == 7] = 8
    tokens[:, :3][tokens[:, :3] == 7] = 8
    early = clip.Clip(TEXT.replace(end_id=7), VISION, projection_dim=12)
    variables = params(NETWORK)
    ended = jitted(early, "encode_text")(variables, tokens)
    assert np.abs(ended - jitted(NETWORK, "encode_text")(variables, tokens)).max() > 1e-3
    cut = np.where(np.arange(8) > 3, 0, tokens)
    np.testing.assert_array_equal(ended, jitted(early, "encode_text")(variables, cut))


def test_longer_texts_than_the_table_are_refused(inputs):
    with pytest.raises(ValueError, match="texts of 9 tokens; the position table has 8"):
        jax.eval_shape(NETWORK.init, jax.random.key(0), inputs[0], jnp.ones((4, 9), jnp.int32))


@pytest.mark.parametrize("config", ["text_config", "vision_config"])
def test_heads_must_divide_the_width(config, inputs):
    broken = getattr(NETWORK, config).replace(num_heads=5)
    with pytest.raises(ValueError, match="5 heads do not divide the width"):
        jax.eval_shape(NETWORK.clone(**{config: broken}).init, jax.random.key(0), *inputs)


def test_batch_size_and_order_change_nothing(inputs, params):
    variables = params(NETWORK)
    cosines = jitted(NETWORK)(variables, *inputs)["scores"]
    reverse = jitted(NETWORK)(variables, inputs[0][::-1], inputs[1][::-1])["scores"]
    np.testing.assert_allclose(reverse[::-1], cosines, atol=1e-6)
    one = jitted(NETWORK)(variables, inputs[0][2:3], inputs[1][2:3])["scores"]
    np.testing.assert_allclose(one, cosines[2:3], atol=1e-6)


def test_heads(inputs, params):
    networks = {head: with_head(head) for head in clip.HEADS}
    variables = params(networks["dense"])
    outputs = {head: jitted(network)(variables, *inputs) for head, network in networks.items()}
    cosine = outputs["cosine"]["scores"]
    assert cosine.shape == (4, 1)
    image, text = (np.asarray(outputs["cosine"][name]) for name in ("image", "text"))
    lengths = np.linalg.norm(image, axis=1) * np.linalg.norm(text, axis=1)
    np.testing.assert_allclose(cosine[:, 0], (image * text).sum(1) / lengths, rtol=1e-5)
    np.testing.assert_array_equal(outputs["preference"]["scores"], np.repeat(cosine, 4, axis=1))
    dense = outputs["dense"]["scores"]
    assert dense.shape == (4, 4)
    assert 0 < dense.min() < dense.max() < 1
    assert np.unique(dense).size == 16
    assert "scores" not in outputs["gradient"]
    with pytest.raises(ValueError, match="head must be one of .* got 'none'"):
        jax.eval_shape(with_head("none").init, jax.random.key(0), *inputs)


def test_scanned_layers_compute_the_same(inputs, params):
    scanned = NETWORK.clone(
        text_config=TEXT.replace(scan_layers=True), vision_config=VISION.replace(scan_layers=True)
    )
    variables = params(NETWORK)
    stacked = {"params": stacks.stack_layers(variables["params"])}
    ours, theirs = jitted(NETWORK)(variables, *inputs), jitted(scanned)(stacked, *inputs)
    for name, value in ours.items():
        np.testing.assert_allclose(theirs[name], value, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="give scan_layers=False"):
        grad_cam.grad_cam(scanned, stacked["params"], *inputs)


def test_bfloat16_is_near_float32(inputs, params):
    variables = params(NETWORK)
    rounded = NETWORK.clone(
        text_config=TEXT.replace(dtype=jnp.bfloat16), vision_config=VISION.replace(dtype=jnp.bfloat16)
    )
    exact, near = jitted(NETWORK)(variables, *inputs), jitted(rounded)(variables, *inputs)
    assert near["image"].dtype == near["text"].dtype == jnp.float32
    difference = np.abs(near["scores"] - exact["scores"]).max()
    assert 0 < difference < 0.02


def test_quick_gelu():
    x = np.linspace(-4, 4, 9, dtype=np.float32)
    np.testing.assert_allclose(clip.quick_gelu(x), x / (1 + np.exp(-1.702 * x)), rtol=1e-6)


def test_the_heatmap_is_hot_where_nothing_agrees():
    maps = np.array([[[0, 1], [0.5, 0]]], np.float32)
    heatmap = np.asarray(grad_cam.disagreement(maps, 4))
    assert heatmap.shape == (1, 4, 4)
    # Corners are beyond the patches' centres, so they have their values.
    np.testing.assert_allclose(heatmap[0, ::3, ::3], [[1, 0], [0.5, 1]], atol=1e-6)
    assert 0 <= heatmap.min() <= heatmap.max() <= 1


def test_each_images_map_is_scaled_on_its_own(inputs, params):
    network = with_head("gradient")
    variables = params(network)
    maps_of = jax.jit(functools.partial(grad_cam.grad_cam, network))
    maps = np.asarray(maps_of(variables["params"], *inputs))
    assert maps.shape == (4, 3, 3)
    np.testing.assert_allclose(maps.min(axis=(1, 2)), 0)
    np.testing.assert_allclose(maps.max(axis=(1, 2)), 1, atol=1e-3)
    one = maps_of(variables["params"], inputs[0][1:2], inputs[1][1:2])
    np.testing.assert_allclose(one[0], maps[1], atol=1e-5)


PRESETS = {
    "clip_score": ("clip_b32", "clip_b16", "clip_l14", "clip_l14_336", "clip_h14", "clip_tiny"),
    "pickscore": ("clip_h14",),
    "clip_finetuned": ("clip_b32", "clip_tiny"),
    "clip_gradient": ("clip_b32",),
}
# Parameters of the published models. There the class token is a parameter beside its position.
PUBLISHED = {
    "clip_b32": 151_277_313,
    "clip_b16": 149_620_737,
    "clip_l14": 427_616_513,
    "clip_l14_336": 427_944_193,
    "clip_h14": 986_109_441,
}


@pytest.mark.parametrize(
    ("preset", "size"), [(preset, size) for preset, sizes in PRESETS.items() for size in sizes]
)
def test_golden_parameters_of_the_presets(preset, size):
    files = [f"models/{preset}.gin", f"sizes/{size}.gin"]
    gin_utils.parse_gin_flags(gin_utils.DEFAULT_SEARCH_PATHS, files, ["SCAN_LAYERS = True"])
    model = gin_utils.macro("MODEL")
    init = functools.partial(model.get_initial_variables, input_shapes=model.input_shapes)
    variables = jax.eval_shape(init, jax.random.key(0))
    axes = traverse_util.flatten_dict(variables["params_axes"], sep="/")
    found = {
        name: f"{leaf.dtype} {leaf.shape} {' '.join(map(str, axes[f'{name}_axes'].names))}"
        for name, leaf in sorted(traverse_util.flatten_dict(variables["params"], sep="/").items())
    }
    file = pathlib.Path(__file__).parent / f"golden/{preset}_{size}.json"
    if os.environ.get("UPDATE_GOLDEN"):
        file.write_text(json.dumps(found, indent=1) + "\n")
    assert found == json.loads(file.read_text())
    if size in PUBLISHED and preset != "clip_finetuned":
        count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))
        assert count + model.module.vision_config.emb_dim == PUBLISHED[size]
    for name, described in found.items():
        named = [axis for axis in described.rpartition(")")[2].split() if axis != "None"]
        assert len(named) == len(set(named)), f"{name}: {described}"
