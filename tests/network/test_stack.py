"""Scanned layers equal unscanned ones; recomputed activations equal kept ones, and really are recomputed."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util
from flax.linen import partitioning

from richhf_jax.convert.layers import stack_layers
from richhf_jax.network import layers, stack, t5, vit

VIT = vit.ViTConfig(patch_size=4, grid=(3, 2), emb_dim=8, num_layers=3, num_heads=2, mlp_dim=12)
T5 = t5.T5Config(
    vocab_size=30,
    emb_dim=8,
    num_heads=2,
    num_encoder_layers=3,
    num_decoder_layers=3,
    head_dim=4,
    mlp_dim=12,
    dropout_rate=0.0,
)


def _vit(config):
    return vit.ViT(VIT.replace(**config)), (np.ones((2, 12, 8, 3), np.float32),)


def _encoder(config):
    return t5.Encoder(T5.replace(**config)), (np.ones((2, 5, 8), np.float32),)


def _decoder(config):
    embedding = layers.Embed(30, 8)
    tokens = np.array([[0, 4, 5], [0, 7, 7]], np.int32)
    return t5.Decoder(T5.replace(**config), embedding), (np.ones((2, 4, 8), np.float32), tokens)


STACKS = {"vit": _vit, "encoder": _encoder, "decoder": _decoder}


def _apply(name, params, inputs, **config):
    module, _ = STACKS[name](config)
    return module.apply({"params": params}, *inputs, deterministic=True)


@pytest.fixture(scope="module")
def made(random_params):
    """Random parameters and inputs of a stack, by name."""

    @functools.cache
    def make(name):
        module, inputs = STACKS[name]({})
        rng = np.random.default_rng(1)
        inputs = [rng.standard_normal(x.shape, np.float32) if x.dtype == np.float32 else x for x in inputs]
        return random_params(module, *inputs, deterministic=True)["params"], inputs

    return make


@pytest.fixture(scope="module")
def reference(made):
    """Outputs and gradients of the plain stack."""
    return functools.cache(lambda name: _outputs_and_gradients(name, *made(name)))


@functools.partial(jax.jit, static_argnames=("name", "scan_layers", "remat_policy"))
def _outputs_and_gradients(name, params, inputs, scan_layers=False, remat_policy="none"):
    config = {"scan_layers": scan_layers, "remat_policy": remat_policy}
    outputs = _apply(name, params, inputs, **config)
    return outputs, jax.grad(lambda p: jnp.sum(_apply(name, p, inputs, **config) ** 2))(params)


def _assert_close(found, expected):
    # The same products and sums; fused in another order, float32 keeps some six digits of the largest. (The
    # gradient of a key's bias is rounding alone.)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    for leaf, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("remat_policy", stack.REMAT_POLICIES)
@pytest.mark.parametrize("name", STACKS)
def test_scanned_equals_unscanned(made, reference, name, remat_policy):
    params, inputs = made(name)
    outputs, gradients = _outputs_and_gradients(name, stack_layers(params), inputs, True, remat_policy)
    expected, expected_gradients = reference(name)
    _assert_close(outputs, expected)
    _assert_close(gradients, stack_layers(expected_gradients))


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("remat_policy", ["minimal", "full"])
def test_recomputed_equals_kept(made, reference, name, remat_policy):
    params, inputs = made(name)
    outputs, gradients = _outputs_and_gradients(name, params, inputs, False, remat_policy)
    expected, expected_gradients = reference(name)
    _assert_close(outputs, expected)
    _assert_close(gradients, expected_gradients)


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("name", STACKS)
def test_recomputation_is_on_where_asked_for_and_off_elsewhere(made, name, scan_layers):
    params, inputs = made(name)
    params = stack_layers(params) if scan_layers else params

    def kept(remat_policy):
        """Bytes that the forward pass leaves for the backward pass, and how often it recomputes."""
        apply = functools.partial(
            _apply, name, inputs=inputs, scan_layers=scan_layers, remat_policy=remat_policy
        )
        _, pullback = jax.eval_shape(lambda p: jax.vjp(apply, p), params)
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pullback))
        return size, str(jax.make_jaxpr(apply)(params)).count("remat2[")

    (most, none), (less, some), (least, same) = (kept(policy) for policy in ("none", "minimal", "full"))
    assert most > less > least
    assert none == 0
    assert some == same == (1 if scan_layers else 3)


@pytest.mark.parametrize("name", STACKS)
def test_scanned_parameters_have_an_axis_of_layers_before_the_others(made, name):
    module, inputs = STACKS[name]({"scan_layers": True})
    variables = jax.eval_shape(functools.partial(module.init, deterministic=True), jax.random.key(0), *inputs)
    axes = partitioning.get_axis_names(variables["params_axes"]).unfreeze()
    flat, axes = (traverse_util.flatten_dict(tree, sep="/") for tree in (variables["params"], axes))
    expected = traverse_util.flatten_dict(stack_layers(made(name)[0]), sep="/")
    assert {key: leaf.shape for key, leaf in flat.items()} == {k: leaf.shape for k, leaf in expected.items()}
    for key, names in axes.items():
        assert (names[0] == "layers") == key.startswith("layers/"), key
        assert len(names) == len(flat[key].shape)


def test_scanned_cached_decoding_equals_uncached(made):
    params, (encoded, tokens) = made("decoder")
    expected = _apply("decoder", params, (encoded, tokens), scan_layers=False)
    mask = layers.make_causal_mask(tokens)
    module, _ = _decoder({"scan_layers": True})
    expected = STACKS["decoder"]({})[0].apply(
        {"params": params}, encoded, tokens, decoder_mask=mask, deterministic=True
    )
    step = functools.partial(
        module.apply, deterministic=True, decode=True, max_decode_length=3, mutable=["cache"]
    )
    scanned = {"params": stack_layers(params)}
    _, variables = step(scanned, encoded, jnp.zeros_like(tokens))
    # Layers first, then the batch: what decoding calls a cache offset of 1.
    assert variables["cache"]["layers"]["self_attention"]["cached_key"].shape == (3, 2, 2, 4, 3)
    for i in range(3):
        logits, variables = step(scanned | {"cache": variables["cache"]}, encoded, tokens[:, i : i + 1])
        _assert_close(logits[:, 0], expected[:, i])


def test_an_unknown_policy_is_refused():
    module, inputs = _encoder({"remat_policy": "all"})
    with pytest.raises(ValueError, match="'none', 'minimal', 'full'.*got 'all'"):
        jax.eval_shape(module.init, jax.random.key(0), *inputs)


EXAMPLES = 20_000
WAYS = [(False, "none"), (False, "minimal"), (True, "none"), (True, "full")]


class _Adds(nn.Module):
    """A layer whose residual branch is one parameter."""

    config: vit.ViTConfig

    @nn.compact
    def __call__(self, x, drop_rate):
        weight = partitioning.param_with_axes("weight", nn.initializers.ones, (1,), axes=("embed",))
        branch = jnp.broadcast_to(weight[None, None], x.shape)
        return x + stack.StochasticDepth()(branch, drop_rate)


class _Stack(nn.Module):
    config: vit.ViTConfig

    @nn.compact
    def __call__(self, x):
        return stack.apply_layers(_Adds, self.config, 3, lambda layer, x, rate: layer(x, rate), x, 0.6)


@pytest.mark.parametrize(("scan_layers", "remat_policy"), WAYS)
def test_a_branch_is_dropped_by_example_more_often_with_depth_and_else_scaled(scan_layers, remat_policy):
    module = _Stack(VIT.replace(scan_layers=scan_layers, remat_policy=remat_policy))
    x, rngs = jnp.zeros((EXAMPLES, 2, 1)), {"dropout": jax.random.key(1)}
    params = module.init({"params": jax.random.key(0), **rngs}, x[:1])["params"]

    def total(params):
        outputs = module.apply({"params": params}, x, rngs=rngs)
        return jnp.sum(outputs), outputs

    (sum_of_all, outputs), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    np.testing.assert_array_equal(outputs[:, 0], outputs[:, 1])
    # The backward pass meets the same draws: all weights are 1, and the sum is linear in them.
    total_gradient = sum(map(jnp.sum, jax.tree.leaves(gradients)))
    np.testing.assert_allclose(total_gradient, sum_of_all, rtol=1e-5)

    # Each set of kept layers has a sum of its own, and the share that independent draws give it.
    rates = np.array([0.2, 0.4, 0.6])
    shares = 0.0
    for kept in itertools.product([False, True], repeat=3):
        kept = np.array(kept)
        share = np.prod(np.where(kept, 1 - rates, rates))
        found = np.isclose(outputs[:, 0, 0], np.sum(kept / (1 - rates)), atol=1e-3).mean()
        np.testing.assert_allclose(found, share, atol=5 * np.sqrt(share * (1 - share) / EXAMPLES))
        shares += found
    assert shares == pytest.approx(1)
    # The expectation is that without stochastic depth; the variance of a branch is rate / (1 - rate).
    error = np.sqrt(np.sum(rates / (1 - rates)) / EXAMPLES)
    np.testing.assert_allclose(outputs.mean(), 3, atol=5 * error)


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("name", ["vit", "encoder"])
def test_stochastic_depth_drops_both_branches_of_a_layer(made, name, scan_layers):
    params, inputs = made(name)
    config = {"num_layers": 1} if name == "vit" else {"num_encoder_layers": 1}
    without_layers, _ = STACKS[name](dict.fromkeys(config, 0))
    expected = jax.jit(functools.partial(without_layers.apply, deterministic=True))(
        {"params": params}, *inputs
    )
    config |= {"scan_layers": scan_layers, "stochastic_depth_rate": 1 - 1e-6}
    if scan_layers:
        params = {n: tree for n, tree in params.items() if not n.startswith(("layers_1", "layers_2"))}
        params = stack_layers(params)
    module, _ = STACKS[name](config)
    rngs = {"dropout": jax.random.key(0)}
    found, all_kept = (
        jax.jit(functools.partial(module.apply, deterministic=value, rngs=rngs))({"params": params}, *inputs)
        for value in (False, True)
    )
    _assert_close(found, expected)
    assert np.abs(all_kept - expected).max() > 0.1


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("name", ["vit", "encoder"])
def test_without_stochastic_depth_the_program_is_the_same(made, name, scan_layers):
    params, inputs = made(name)
    params = stack_layers(params) if scan_layers else params

    def program(deterministic, rate):
        module, _ = STACKS[name]({"scan_layers": scan_layers, "stochastic_depth_rate": rate})

        def apply(params, inputs, key):
            return module.apply(
                {"params": params}, *inputs, deterministic=deterministic, rngs={"dropout": key}
            )

        return jax.jit(apply).lower(params, inputs, jax.random.key(0)).as_text()

    evaluation = program(True, 0.0)
    assert program(True, 0.5) == evaluation == program(False, 0.0)
    assert program(False, 0.5) != evaluation
