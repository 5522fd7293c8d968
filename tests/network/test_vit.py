import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from flax.linen import partitioning

from richhf_jax.network import vit

CONFIG = vit.ViTConfig(patch_size=4, grid=(3, 2), emb_dim=8, num_layers=1, num_heads=2, mlp_dim=12)


@pytest.fixture
def images(rng):
    return rng.standard_normal((2, 12, 8, 3)).astype(np.float32)


@functools.cache
def _jitted(config):
    return jax.jit(functools.partial(vit.ViT(config).apply, deterministic=True))


def test_parameters():
    init = functools.partial(vit.ViT(CONFIG).init, deterministic=True)
    variables = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 12, 8, 3)))
    flat = traverse_util.flatten_dict(variables["params"], sep="/")
    axes = partitioning.get_axis_names(variables["params_axes"]).unfreeze()
    axes = traverse_util.flatten_dict(axes, sep="/")
    expected = {
        "patch_embedding/kernel": ((4, 4, 3, 8), ("height", "width", "image_channels", "embed")),
        "patch_embedding/bias": ((8,), ("embed",)),
        "position_embedding/embedding": ((3, 2, 8), ("height", "width", "embed")),
        "layers_0/attention/out/kernel": ((8, 8), ("joined_kv", "embed")),
        "layers_0/attention/out/bias": ((8,), ("embed",)),
        "layers_0/mlp/wi/kernel": ((8, 12), ("embed", "mlp")),
        "layers_0/mlp/wi/bias": ((12,), ("mlp",)),
        "layers_0/mlp/wo/kernel": ((12, 8), ("mlp", "embed")),
        "layers_0/mlp/wo/bias": ((8,), ("embed",)),
    }
    for name in ("query", "key", "value"):
        expected[f"layers_0/attention/{name}/kernel"] = ((8, 8), ("embed", "joined_kv"))
        expected[f"layers_0/attention/{name}/bias"] = ((8,), ("joined_kv",))
    for name in ("layers_0/pre_attention_layer_norm", "layers_0/pre_mlp_layer_norm", "encoder_norm"):
        expected |= {f"{name}/{part}": ((8,), ("embed",)) for part in ("scale", "bias")}
    assert {name: (value.shape, tuple(axes[name])) for name, value in flat.items()} == expected
    assert {value.dtype for value in flat.values()} == {jnp.dtype("float32")}


def _norm(x, params):
    normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return normal * params["scale"] + params["bias"]


def _dense(x, params):
    return x @ params["kernel"] + params["bias"]


def _vit_by_numpy(params, image):
    """One image through one layer, written out by loops over patches and heads."""
    patches = [image[4 * i : 4 * i + 4, 4 * j : 4 * j + 4].ravel() for i, j in np.ndindex(3, 2)]
    embedding = params["patch_embedding"]
    x = np.stack(patches) @ embedding["kernel"].reshape(48, 8) + embedding["bias"]
    x = x + params["position_embedding"]["embedding"].reshape(6, 8)

    layer = params["layers_0"]
    y = _norm(x, layer["pre_attention_layer_norm"])
    query, key, value = (_dense(y, layer["attention"][name]) for name in ("query", "key", "value"))
    heads = []
    for head in (slice(0, 4), slice(4, 8)):
        weights = np.exp(query[:, head] @ key[:, head].T / 2)
        heads.append(weights / weights.sum(-1, keepdims=True) @ value[:, head])
    x = x + _dense(np.concatenate(heads, axis=-1), layer["attention"]["out"])

    y = _dense(_norm(x, layer["pre_mlp_layer_norm"]), layer["mlp"]["wi"])
    y = y * (1 + np.vectorize(math.erf)(y / math.sqrt(2))) / 2
    return _norm(x + _dense(y, layer["mlp"]["wo"]), params["encoder_norm"])


def test_vit_by_numpy(images, random_params):
    params = random_params(vit.ViT(CONFIG), images, deterministic=True)
    outputs = _jitted(CONFIG)(params, images)
    assert outputs.shape == (2, 6, 8)
    for image, output in zip(images, outputs, strict=True):
        # 1e-4: exact and approximate GELU differ by up to 5e-4.
        np.testing.assert_allclose(output, _vit_by_numpy(params["params"], image), rtol=1e-4, atol=1e-5)


def test_batch_permutation(images, random_params):
    params = random_params(vit.ViT(CONFIG), images, deterministic=True)
    outputs, swapped = _jitted(CONFIG)(params, images), _jitted(CONFIG)(params, images[::-1])
    np.testing.assert_allclose(swapped, outputs[::-1], rtol=1e-5, atol=1e-6)


def test_patch_embedding_is_a_convolution_with_the_patch_as_stride(images, random_params):
    module = vit.PatchEmbedding(patch_size=4, features=8)
    params = random_params(module, images)
    expected = jax.lax.conv_general_dilated(
        images, params["params"]["kernel"], (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    expected = np.asarray(expected) + params["params"]["bias"]
    np.testing.assert_allclose(module.apply(params, images), expected, rtol=1e-5, atol=1e-5)


def test_patch_embedding_rejects_images_that_do_not_divide():
    with pytest.raises(ValueError, match="12x10 pixels does not divide into 4x4 patches"):
        vit.ViT(CONFIG).init(jax.random.key(0), jnp.zeros((1, 12, 10, 3)), deterministic=True)


def test_vit_rejects_heads_that_do_not_divide_the_width():
    with pytest.raises(ValueError, match="3 heads do not divide the width 8"):
        vit.ViT(CONFIG.replace(num_heads=3)).init(
            jax.random.key(0), jnp.zeros((1, 12, 8, 3)), deterministic=True
        )


def _positions(table, height, width):
    module = vit.PositionEmbedding(grid=table.shape[:2])
    x = jnp.zeros((1, height, width, table.shape[-1]))
    return np.asarray(module.apply({"params": {"embedding": table}}, x))[0]


def test_positions_of_the_tables_own_grid_are_the_table(rng):
    table = rng.standard_normal((3, 2, 4)).astype(np.float32)
    np.testing.assert_array_equal(_positions(table, 3, 2), table)


def test_positions_are_resampled_bilinearly_in_both_directions():
    # Cell centres of 4 cells over 2 lie at 1/4 and 3/4 of a cell; at the border the edge value holds.
    table = np.array([[0, 10], [2, 12]], np.float32)[..., None]
    ramp = np.array([0, 0.25, 0.75, 1])
    expected = 2 * ramp[:, None] + 10 * ramp[None, :]
    np.testing.assert_allclose(_positions(table, 4, 4)[..., 0], expected, rtol=1e-6)


def test_another_image_size_needs_no_other_parameters(images, random_params):
    params = random_params(vit.ViT(CONFIG), images, deterministic=True)
    assert _jitted(CONFIG)(params, jnp.zeros((1, 20, 24, 3))).shape == (1, 30, 8)


def test_bfloat16_is_near_float32(images, random_params):
    params = random_params(vit.ViT(CONFIG), images, deterministic=True)
    exact = _jitted(CONFIG)(params, images)
    rounded = _jitted(CONFIG.replace(dtype=jnp.bfloat16))(params, images)
    assert rounded.dtype == jnp.bfloat16
    assert 0 < np.abs(rounded.astype(jnp.float32) - exact).max() < 0.05 * np.abs(exact).max()


def test_dropout_acts_only_when_not_deterministic(images, random_params):
    model = vit.ViT(CONFIG.replace(dropout_rate=0.5))
    params = random_params(model, images, deterministic=True)

    @jax.jit
    def encode(seed):
        return model.apply(params, images, rngs={"dropout": jax.random.key(seed)})

    assert not np.allclose(encode(0), encode(1))
    np.testing.assert_array_equal(
        jax.jit(functools.partial(model.apply, deterministic=True))(params, images),
        _jitted(CONFIG)(params, images),
    )


def test_a_class_token_stands_before_the_patches(images, random_params):
    model = vit.ViT(CONFIG.replace(class_token=True))
    params = random_params(model, images, deterministic=True)
    assert params["params"]["class_token"].shape == (8,)
    outputs = _jitted(CONFIG.replace(class_token=True))(params, images)
    assert outputs.shape == (2, 7, 8)
    # With every patch masked it sees itself alone, whatever the image.
    alone = np.zeros((2, 6), bool)
    masked = jax.jit(functools.partial(model.apply, deterministic=True))(params, images, alone)
    other = jax.jit(functools.partial(model.apply, deterministic=True))(params, 2 * images, alone)
    np.testing.assert_allclose(masked[:, 0], other[:, 0], rtol=1e-5, atol=1e-5)
    assert not np.allclose(outputs[:, 0], masked[:, 0], atol=1e-3)


def test_masked_patches_reach_no_other(images, random_params):
    model = vit.ViT(CONFIG)
    params = random_params(model, images, deterministic=True)
    apply = jax.jit(functools.partial(model.apply, deterministic=True))
    mask = np.array([[True] * 4 + [False] * 2, [True] * 6])
    other = images.copy()
    other[:, 8:] += 1  # the last row of two patches
    before, after = apply(params, images, mask), apply(params, other, mask)
    np.testing.assert_array_equal(before[0, :4], after[0, :4])
    assert (np.abs(before[1] - after[1]).max(axis=-1) > 1e-3).all()
    np.testing.assert_allclose(apply(params, images, np.ones((2, 6), bool)), apply(params, images), atol=1e-6)


def test_layer_norm_epsilon(images, random_params):
    params = random_params(vit.ViT(CONFIG), images, deterministic=True)
    outputs = [_jitted(CONFIG.replace(layer_norm_epsilon=e))(params, images) for e in (1e-6, 1.0)]
    assert not np.allclose(*outputs, atol=1e-2)
