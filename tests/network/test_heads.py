import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from flax.linen import partitioning

from richhf_jax.network import heads

LAYERS = (("conv", 6, 3), ("deconv", 5, 3), ("conv", 4, 1))


def _normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def _norm_relu(x, params):
    normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return np.maximum(normal * params["scale"] + params["bias"], 0)


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_heatmap_head_parameters(rng):
    init = heads.HeatmapHead(LAYERS).init
    variables = jax.eval_shape(init, jax.random.key(0), _normal(rng, 1, 4, 4, 8))
    axes = partitioning.get_axis_names(variables["params_axes"]).unfreeze()
    axes = traverse_util.flatten_dict(axes, sep="/")
    flat = traverse_util.flatten_dict(variables["params"], sep="/")
    expected = {
        "conv_0/kernel": ((3, 3, 8, 6), ("height", "width", "embed", "mlp")),
        "deconv_1/kernel": ((3, 3, 6, 5), ("height", "width", "embed", "mlp")),
        "conv_2/kernel": ((1, 1, 5, 4), ("height", "width", "embed", "mlp")),
        "output/kernel": ((3, 3, 4, 1), ("height", "width", "embed", None)),
        "output/bias": ((1,), (None,)),
    }
    for i, (kind, filters, _) in enumerate(LAYERS):
        expected[f"{kind}_{i}/bias"] = ((filters,), ("mlp",))
        expected |= {f"norm_{i}/{part}": ((filters,), ("embed",)) for part in ("scale", "bias")}
    assert {name: (value.shape, tuple(axes[name])) for name, value in flat.items()} == expected


def test_heatmap_head_by_numpy(rng, random_params):
    # 1x1 kernels are matrix products.
    features = _normal(rng, 2, 3, 4, 8)
    head = heads.HeatmapHead((("conv", 6, 1), ("conv", 5, 1)), output_layer=("conv", 1))
    variables = random_params(head, features)
    params, x = variables["params"], features
    for i in range(2):
        conv = params[f"conv_{i}"]
        x = _norm_relu(x @ conv["kernel"][0, 0] + conv["bias"], params[f"norm_{i}"])
    expected = _sigmoid(x @ params["output"]["kernel"][0, 0] + params["output"]["bias"])[..., 0]
    np.testing.assert_allclose(jax.jit(head.apply)(variables, features), expected, rtol=1e-4, atol=1e-5)


def test_what_follows_a_layer_by_numpy(rng, random_params):
    features = _normal(rng, 2, 3, 4, 6)
    residual = ("residual", (("conv", 5, 1), ("conv", 6, 1, ("norm",))), ("relu",))
    layers = (("conv", 6, 1, ("relu", "norm")), residual, ("conv", 4, 1, ()))
    head = heads.HeatmapHead(layers, heads.Style(norm="rms", norm_epsilon=0.1), output_layer=("conv", 1))
    variables = random_params(head, features)
    params = variables["params"]

    def conv(x, part):
        return x @ part["kernel"][0, 0] + part["bias"]

    def norm(x, part):
        (scale,) = part.values()
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 0.1) * scale

    x = norm(np.maximum(conv(features, params["conv_0"]), 0), params["norm_0"])
    nested = params["residual_1"]
    y = np.maximum(norm(conv(x, nested["conv_0"]), nested["norm_0"]), 0)
    x = np.maximum(x + norm(conv(y, nested["conv_1"]), nested["norm_1"]), 0)
    expected = _sigmoid(conv(conv(x, params["conv_2"]), params["output"]))[..., 0]
    assert set(params) == {"conv_0", "norm_0", "residual_1", "conv_2", "output"}
    np.testing.assert_allclose(jax.jit(head.apply)(variables, features), expected, rtol=1e-4, atol=1e-5)


def test_an_unknown_norm_is_refused():
    head = heads.ScoreHead(((4, 2),), (6,), heads.Style(norm="batch"))
    with pytest.raises(ValueError, match="norm must be one of .'layer', 'rms'., got 'batch'"):
        jax.eval_shape(head.init, jax.random.key(0), jnp.zeros((1, 4, 4, 8)))


def test_heatmap_head_doubles_the_map_at_each_deconv(rng, random_params):
    features = _normal(rng, 2, 4, 3, 8)
    head = heads.HeatmapHead((*LAYERS, ("deconv", 4, 3)))
    heatmaps = jax.jit(head.apply)(random_params(head, features), features)
    assert heatmaps.shape == (2, 16, 12)
    assert ((heatmaps > 0) & (heatmaps < 1)).all()


@pytest.mark.parametrize(("kind", "side"), [("conv", 4), ("deconv", 8)])
def test_heatmap_head_starts_at_its_output_bias(kind, side):
    head = heads.HeatmapHead((), output_layer=(kind, 3), output_bias_init=-3.0)
    heatmaps, _ = head.init_with_output(jax.random.key(0), jnp.zeros((1, 4, 4, 8)))
    np.testing.assert_allclose(heatmaps, np.full((1, side, side), _sigmoid(-3)), rtol=1e-5)


def test_outputs_are_float32_sigmoids_under_bfloat16(rng, random_params):
    features = _normal(rng, 1, 4, 4, 8).astype(jnp.bfloat16)
    for head in (
        heads.HeatmapHead(LAYERS, heads.Style(dtype=jnp.bfloat16)),
        heads.ScoreHead(((4, 2),), (6,), heads.Style(dtype=jnp.bfloat16)),
    ):
        outputs = jax.jit(head.apply)(random_params(head, features), features)
        assert outputs.dtype == jnp.float32
        # Had the sigmoid been of bfloat16, every value would be one.
        assert (outputs != outputs.astype(jnp.bfloat16).astype(jnp.float32)).any()


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (("pool", 4, 3), "layer 1: expected 'conv', 'deconv' or 'residual', got 'pool'"),
        (("deconv", 4, 5), "a 'deconv' layer has a 3x3 kernel, got 5x5"),
        (("conv", 4, 3, ("norm", "gelu")), "layer 1 is followed by 'norm' or 'relu', not by 'gelu'"),
    ],
)
def test_heatmap_head_names_the_layer_that_is_wrong(layer, message):
    head = heads.HeatmapHead((("conv", 4, 3), layer))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(head.init, jax.random.key(0), jnp.zeros((1, 4, 4, 8)))


def test_score_head_by_numpy(rng, random_params):
    features = _normal(rng, 2, 3, 4, 8)
    head = heads.ScoreHead(conv_layers=((5, 2),), dense_layers=(7, 6))
    variables = random_params(head, features)
    params = variables["params"]
    # A 2x2 kernel with 'SAME' padding: each cell with its right, lower and lower right neighbour.
    padded = np.pad(features, ((0, 0), (0, 1), (0, 1), (0, 0)))
    kernel = params["conv_0"]["kernel"]
    x = sum(padded[:, i : i + 3, j : j + 4] @ kernel[i, j] for i, j in np.ndindex(2, 2))
    x = _norm_relu(x + params["conv_0"]["bias"], params["norm_0"]).reshape(2, 60)
    for name in ("dense_0", "dense_1"):
        x = np.maximum(x @ params[name]["kernel"] + params[name]["bias"], 0)
    expected = _sigmoid(x @ params["output"]["kernel"] + params["output"]["bias"])[:, 0]
    scores = jax.jit(head.apply)(variables, features)
    assert scores.shape == (2,)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-6)


def test_a_score_and_its_log_variance(rng, random_params):
    features = 3 * _normal(rng, 64, 2, 3, 4)
    settings = {"conv_layers": ((4, 2),), "dense_layers": (8,)}
    head, plain = heads.ScoreHead(**settings, variance=True), heads.ScoreHead(**settings)
    variables = random_params(head, features)
    params = dict(variables["params"])
    found = np.asarray(jax.jit(head.apply)(variables, features))
    assert (found.shape, found.dtype) == ((64, 2), np.float32)
    own = params.pop("output_log_variance")
    # The score is that of a head without variance, with the same other parameters.
    np.testing.assert_array_equal(found[:, 0], jax.jit(plain.apply)({"params": params}, features))
    deviations = np.exp(found[:, 1] / 2)
    assert np.ptp(deviations) > 0.01
    assert ((deviations >= 0.01) & (deviations <= 1)).all()
    params["output_log_variance"] = head.init(jax.random.key(0), features)["params"]["output_log_variance"]
    first = head.apply({"params": params}, features)[:, 1]
    np.testing.assert_allclose(np.exp(first / 2), 0.2, rtol=1e-5)
    for end, deviation in ((-1e9, 0.01), (1e9, 1)):
        params["output_log_variance"] = {"kernel": 0 * own["kernel"], "bias": 0 * own["bias"] + end}
        last = head.apply({"params": params}, features)[:, 1]
        np.testing.assert_allclose(np.exp(last / 2), deviation, rtol=1e-5)


def test_heads_treat_examples_apart(rng, random_params):
    features = _normal(rng, 3, 4, 4, 8)
    order = np.array([2, 0, 1])
    for head in (heads.HeatmapHead(LAYERS), heads.ScoreHead(((4, 2),), (6,))):
        variables, apply = random_params(head, features), jax.jit(head.apply)
        outputs, permuted = apply(variables, features), apply(variables, features[order])
        np.testing.assert_allclose(permuted, outputs[order], rtol=1e-5, atol=1e-6)


def test_the_papers_heads_have_the_papers_shapes():
    deconvs = [(kind, f, 3) for f in (768, 384, 384, 192) for kind in ("deconv", "conv", "conv")]
    layers = (("conv", 768, 3), ("conv", 384, 3), *deconvs, ("conv", 192, 3))
    features = jax.ShapeDtypeStruct((1, 32, 32, 768), jnp.float32)
    heatmap, _ = jax.eval_shape(heads.HeatmapHead(layers).init_with_output, jax.random.key(0), features)
    score, variables = jax.eval_shape(heads.ScoreHead().init_with_output, jax.random.key(0), features)
    assert (heatmap.shape, score.shape) == ((1, 512, 512), (1,))
    assert variables["params"]["dense_0"]["kernel"].shape == (32 * 32 * 64, 2048)
