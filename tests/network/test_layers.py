import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from richhf_jax.network import layers


def _normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def _softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def test_dense_general_contracts_several_axes_and_adds_a_bias(rng):
    inputs, kernel, bias = _normal(rng, 2, 3, 4, 5), _normal(rng, 20, 6), _normal(rng, 6)
    dense = layers.DenseGeneral((2, 3), axis=(-2, -1), kernel_axes=("joined_kv", "embed"), use_bias=True)
    outputs = dense.apply({"params": {"kernel": kernel, "bias": bias}}, inputs)
    expected = (inputs.reshape(2, 3, 20) @ kernel + bias).reshape(2, 3, 2, 3)
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)


def test_dense_general_starts_with_variance_one_over_fan_in():
    dense = layers.DenseGeneral(64, axis=(-2, -1), kernel_axes=("joined_kv", "embed"), use_bias=True)
    params = dense.init(jax.random.key(0), jnp.zeros((1, 16, 16)))["params"]
    assert np.std(params["kernel"]) == pytest.approx(1 / 16, rel=0.02)
    assert not params["bias"].any()


@pytest.mark.parametrize("one_hot", [False, True])
def test_embed_looks_up_rows_and_attends_to_all(rng, one_hot):
    table = _normal(rng, 7, 4)
    embed = layers.Embed(7, 4, one_hot=one_hot)
    ids = np.array([[0, 6, 3]], np.int32)
    vectors = embed.apply({"params": {"embedding": table}}, ids)
    np.testing.assert_allclose(vectors, table[ids], rtol=1e-6)
    logits = embed.apply({"params": {"embedding": table}}, vectors, method="attend")
    np.testing.assert_allclose(logits, table[ids] @ table.T, rtol=1e-5, atol=1e-6)


def test_embed_computes_logits_in_attend_dtype(rng):
    embed = layers.Embed(7, 4, dtype=jnp.bfloat16, attend_dtype=jnp.float32)
    params = {"params": {"embedding": _normal(rng, 7, 4)}}
    vectors = embed.apply(params, np.zeros((1, 2), np.int32))
    assert vectors.dtype == jnp.bfloat16
    assert embed.apply(params, vectors, method="attend").dtype == jnp.float32


def test_embed_rejects_ids_that_are_not_integers():
    with pytest.raises(ValueError, match="must be integers, got float32"):
        layers.Embed(7, 4).init(jax.random.key(0), jnp.zeros((1, 2)))


def test_layer_norm_divides_by_the_root_mean_square(rng):
    x, scale = 3 + _normal(rng, 2, 5, 8), _normal(rng, 8)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale
    outputs = layers.LayerNorm().apply({"params": {"scale": scale}}, x)
    np.testing.assert_allclose(outputs, expected, rtol=1e-5)


def test_centered_layer_norm_has_mean_and_bias_and_survives_a_large_offset(rng):
    x, scale, bias = 300 + _normal(rng, 2, 5, 8), _normal(rng, 8), _normal(rng, 8)
    exact = x.astype(np.float64)
    expected = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-6)
    outputs = layers.CenteredLayerNorm().apply({"params": {"scale": scale, "bias": bias}}, x)
    np.testing.assert_allclose(outputs, expected * scale + bias, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("norm", [layers.LayerNorm, layers.CenteredLayerNorm])
def test_norms_compute_in_float32_and_round_once(rng, norm):
    x = jnp.asarray(_normal(rng, 1, 3, 512) + 3, jnp.bfloat16)
    exact = norm().init_with_output(jax.random.key(0), x.astype(jnp.float32))[0]
    rounded = norm(dtype=jnp.bfloat16).init_with_output(jax.random.key(0), x)[0]
    np.testing.assert_array_equal(rounded, exact.astype(jnp.bfloat16))


def test_mlp_block_multiplies_its_branches(rng):
    x = _normal(rng, 2, 3, 4)
    block = layers.MlpBlock(intermediate_dim=6, activations=("relu", "linear"))
    params = {name: {"kernel": _normal(rng, 4, 6)} for name in ("wi_0", "wi_1")}
    params["wo"] = {"kernel": _normal(rng, 6, 4)}
    gate = np.maximum(x @ params["wi_0"]["kernel"], 0)
    expected = (gate * (x @ params["wi_1"]["kernel"])) @ params["wo"]["kernel"]
    outputs = block.apply({"params": params}, x, deterministic=True)
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)


def test_mlp_block_drops_the_same_hidden_features_at_every_position():
    block = layers.MlpBlock(intermediate_dim=64, activations=("linear",), intermediate_dropout_rate=0.5)
    x = jnp.ones((2, 3, 4))
    outputs, _ = block.init_with_output({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x)
    np.testing.assert_allclose(outputs[:, :1].repeat(3, axis=1), outputs, rtol=1e-6)
    assert not np.allclose(outputs[0], outputs[1])


def test_mlp_block_names_an_unknown_activation():
    block = layers.MlpBlock(activations=("gelo",))
    with pytest.raises(ValueError, match="'gelo' is neither 'linear' nor a function of flax.linen"):
        block.init(jax.random.key(0), jnp.zeros((1, 1, 4)), deterministic=True)


def _bucket_by_integers(relative_position, bidirectional, num_buckets, max_distance):
    """Computes in exact arithmetic: far bucket k starts at exact * (max_distance / exact)**(k / far)."""
    offset = 0
    distance = max(-relative_position, 0)
    if bidirectional:
        num_buckets //= 2
        offset = num_buckets if relative_position > 0 else 0
        distance = abs(relative_position)
    exact = num_buckets // 2
    far = num_buckets - exact
    if distance < exact:
        return offset + distance
    k = sum(distance**far * exact**j >= max_distance**j * exact**far for j in range(1, far))
    return offset + exact + k


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (16, 64)])
def test_relative_position_buckets_follow_the_definition(bidirectional, num_buckets, max_distance):
    positions = np.arange(-150, 151)
    buckets = layers.relative_position_bucket(positions, bidirectional, num_buckets, max_distance)
    expected = [_bucket_by_integers(int(p), bidirectional, num_buckets, max_distance) for p in positions]
    np.testing.assert_array_equal(buckets, expected)


def test_relative_position_buckets_of_the_docstring():
    buckets = layers.relative_position_bucket(np.array([-200, -16, -8, -1, 0, 1, 8, 16, 200]))
    np.testing.assert_array_equal(buckets, [15, 10, 8, 1, 0, 17, 24, 26, 31])


def test_relative_position_biases_are_the_tables_rows(rng):
    table = _normal(rng, 2, 8)
    module = layers.RelativePositionBiases(num_buckets=8, max_distance=16, num_heads=2)
    biases = module.apply({"params": {"rel_embedding": table}}, 3, 4, True)
    # key - query = 0: bucket 0; -1, -2: 1, 2; 1, 2, 3: 4 + 1, 4 + 2, 4 + 2
    buckets = np.array([[0, 5, 6, 6], [1, 0, 5, 6], [2, 1, 0, 5]])
    np.testing.assert_allclose(biases, table[:, buckets][None], rtol=1e-6)


def test_dot_product_attention_by_loops(rng):
    query, key, value = _normal(rng, 2, 3, 2, 4), _normal(rng, 2, 5, 2, 4), _normal(rng, 2, 5, 2, 6)
    bias = _normal(rng, 1, 2, 3, 5)
    expected = np.zeros((2, 3, 2, 6), np.float32)
    for b, q, h in np.ndindex(2, 3, 2):
        weights = _softmax(key[b, :, h] @ query[b, q, h] + bias[0, h, q])
        expected[b, q, h] = weights @ value[b, :, h]
    outputs = layers.dot_product_attention(query, key, value, bias)
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)


def test_dot_product_attention_drops_keys_alike_for_all_queries():
    query, key = jnp.zeros((1, 4, 1, 2)), jnp.zeros((1, 200, 1, 2))
    value = jnp.eye(200)[None, :, None]
    weights = layers.dot_product_attention(
        query, key, value, dropout_rng=jax.random.key(0), dropout_rate=0.25
    )
    # Equal logits: each kept weight is 1/200 of the whole, scaled up by the share kept.
    np.testing.assert_allclose(np.unique(weights), [0, 1 / 200 / 0.75], rtol=1e-5)
    assert (weights > 0).mean() == pytest.approx(0.75, abs=0.08)
    np.testing.assert_array_equal(weights[0, 0], weights[0, 3])


def test_float32_logits_tell_close_large_logits_apart():
    # Logits 256 and 257: one bfloat16.
    query = jnp.full((1, 1, 1, 2), 16.0, jnp.bfloat16)
    key = jnp.array([[[[8, 8]], [[8, 8.0625]]]], jnp.bfloat16)
    value = jnp.array([[[[0]], [[1]]]], jnp.bfloat16)
    kept = layers.dot_product_attention(query, key, value, dtype=jnp.bfloat16, float32_logits=True)
    lost = layers.dot_product_attention(query, key, value, dtype=jnp.bfloat16)
    assert float(kept[0, 0, 0, 0]) == pytest.approx(1 / (1 + math.exp(-1)), abs=0.01)
    assert float(lost[0, 0, 0, 0]) == 0.5


@pytest.mark.usefixtures("no_shape_checks")
def test_dot_product_attention_rejects_heads_that_differ():
    with pytest.raises(ValueError, match=r"do not fit: \(1, 3, 2, 4\), \(1, 5, 1, 4\)"):
        layers.dot_product_attention(
            jnp.zeros((1, 3, 2, 4)), jnp.zeros((1, 5, 1, 4)), jnp.zeros((1, 5, 1, 4))
        )


def test_attention_by_numpy_and_its_masked_keys_do_not_count(rng):
    x, mask = _normal(rng, 2, 3, 8), np.array([[1, 1, 1], [1, 1, 0]])
    module = layers.MultiHeadDotProductAttention(num_heads=2, head_dim=5)
    params = {name: {"kernel": _normal(rng, 8, 10)} for name in ("query", "key", "value")}
    params["out"] = {"kernel": _normal(rng, 10, 8)}
    outputs = module.apply({"params": params}, x, x, mask[:, None, None, :], deterministic=True)
    for b, visible in ((0, 3), (1, 2)):
        query, key, value = (
            (x[b] @ params[name]["kernel"]).reshape(3, 2, 5) for name in ("query", "key", "value")
        )
        heads = [_softmax(query[:, h] @ key[:visible, h].T) @ value[:visible, h] for h in range(2)]
        expected = np.concatenate(heads, axis=-1) @ params["out"]["kernel"]
        np.testing.assert_allclose(outputs[b], expected, rtol=1e-4, atol=1e-4)


def test_attention_query_starts_scaled_down():
    module = layers.MultiHeadDotProductAttention(num_heads=4, head_dim=16)
    x = jnp.zeros((1, 1, 64))
    params = module.init(jax.random.key(0), x, x, deterministic=True)["params"]
    assert np.std(params["query"]["kernel"]) == pytest.approx(1 / math.sqrt(64 * 16), rel=0.05)
    assert np.std(params["key"]["kernel"]) == pytest.approx(1 / math.sqrt(64), rel=0.05)


def test_attention_mask_of_the_docstring():
    valid = jnp.array([[1, 1, 0]])
    mask = layers.make_attention_mask(valid, valid)
    np.testing.assert_array_equal(mask, [[[[1, 1, 0], [1, 1, 0], [0, 0, 0]]]])
    assert mask.dtype == jnp.float32


def test_attention_mask_of_segments_with_extra_batch_axes():
    mask = layers.make_attention_mask(
        jnp.array([[1, 2]]), jnp.array([[1, 2, 2]]), jnp.equal, extra_batch_dims=1, dtype=jnp.int32
    )
    np.testing.assert_array_equal(mask, [[[[[1, 0, 0], [0, 1, 1]]]]])


def test_causal_mask_of_the_docstring():
    mask = layers.make_causal_mask(jnp.array([[5, 0, 7]]))
    np.testing.assert_array_equal(mask, [[[[1, 0, 0], [1, 1, 0], [1, 1, 1]]]])


def test_combine_masks_of_the_docstring():
    combined = layers.combine_masks(jnp.array([[[[1, 1, 0]]]]), None, jnp.array([[[[0, 1, 1]]]]))
    np.testing.assert_array_equal(combined, [[[[0, 1, 0]]]])
    assert layers.combine_masks(None, None) is None


def test_combine_biases_of_the_docstring():
    combined = layers.combine_biases(jnp.array([[[[0, -1e10]]]]), None, jnp.array([[[[1.0, 2.0]]]]))
    np.testing.assert_allclose(combined, [[[[1, -1e10 + 2]]]])
    assert layers.combine_biases(None) is None


@pytest.mark.parametrize("combine", [layers.combine_masks, layers.combine_biases])
def test_combining_rejects_ranks_that_differ(combine):
    with pytest.raises(ValueError, match="same rank, got shapes"):
        combine(jnp.ones((1, 1, 2, 2)), jnp.ones((2, 2)))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]),
        (
            {"decoder_causal_attention": [[1, 1, 0, 0]]},
            [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]],
        ),
        (
            {"decoder_segment_ids": [[1, 1, 2, 0]]},
            [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]],
        ),
    ],
)
def test_decoder_mask_of_the_docstring(arguments, expected):
    arguments = {name: jnp.array(value) for name, value in arguments.items()}
    mask = layers.make_decoder_mask(jnp.array([[5, 7, 1, 0]]), jnp.float32, **arguments)
    np.testing.assert_array_equal(mask, [[expected]])
