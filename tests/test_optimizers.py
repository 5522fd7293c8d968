import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from richhf_jax import errors, optimizers


def schedule(factors, steps, **kwargs):
    rate = optimizers.create_learning_rate_scheduler(factors, **kwargs)
    return [float(rate(jnp.asarray(step))) for step in steps]


def test_the_papers_schedule_peaks_at_the_end_of_the_warmup():
    rates = schedule(
        "constant * linear_warmup * rsqrt_decay",
        [0, 1000, 2000, 8000],
        base_learning_rate=0.015,
        warmup_steps=2000,
    )
    peak = 0.015 / np.sqrt(2000)
    assert peak == pytest.approx(3.354e-4, rel=1e-3)
    # The lower bound of 1e-8 stands in for 0.
    np.testing.assert_allclose(rates, [1e-8, peak / 2, peak, peak / 2], rtol=1e-5)


def test_the_normalized_reading_peaks_at_the_base_rate():
    rates = schedule(
        "constant * linear_warmup * rsqrt_normalized_decay",
        [2000, 8000],
        base_learning_rate=0.015,
        warmup_steps=2000,
    )
    np.testing.assert_allclose(rates, [0.015, 0.0075], rtol=1e-5)


def test_cosine_decay_equals_optax():
    steps = [0, 5, 10, 35, 60, 109]
    rates = schedule(
        "constant * cosine_decay", steps, base_learning_rate=2.0, warmup_steps=10, steps_per_cycle=100
    )
    expected = [2.0 * float(optax.cosine_decay_schedule(1.0, 100)(max(0, step - 10))) for step in steps]
    np.testing.assert_allclose(rates, expected, rtol=1e-5)


def test_decay_every_and_linear_decay():
    assert schedule("constant * decay_every", [0, 9, 10, 25], base_learning_rate=8.0, steps_per_decay=10) == [
        8.0, 8.0, 4.0, 2.0,
    ]  # fmt: skip
    rates = schedule("linear_decay", [5, 10, 12], base_learning_rate=1.0, warmup_steps=10, decay_factor=0.1)
    np.testing.assert_allclose(rates, [0.5, 1.0, 0.8], rtol=1e-6)


def test_step_offset_shifts_the_schedule():
    kwargs = {"base_learning_rate": 1.0, "warmup_steps": 10}
    shifted = schedule("linear_warmup", [103], step_offset=100, **kwargs)
    assert shifted == schedule("linear_warmup", [3], **kwargs)


def test_an_unknown_factor_is_named():
    with pytest.raises(errors.UserError, match="'warmup'.*linear_warmup"):
        optimizers.create_learning_rate_scheduler("constant * warmup")


def test_weight_decay_spares_biases_and_norms():
    optimizer = optimizers.adamw(lambda step: 0.1, weight_decay=0.5)
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.05)
    np.testing.assert_array_equal(updates["bias"], 0)


def test_gradients_are_clipped_by_their_global_norm():
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    optimizer = optimizers.adamw(lambda step: 0.1, max_grad_norm=1.0)
    _, state = optimizer.update(
        {"a": jnp.array([30.0]), "b": jnp.array([40.0])}, optimizer.init(params), params
    )
    first_moment = optax.tree.get(state, "mu")
    # (30, 40) of norm 50 becomes (0.6, 0.8); Adam's first moment takes a tenth of it.
    np.testing.assert_allclose([first_moment["a"][0], first_moment["b"][0]], [0.06, 0.08], rtol=1e-5)


def test_learning_rates_are_multiplied_by_name():
    multipliers = {"relpos_bias": 30.0, "encoder/": 2.0}
    optimizer = optimizers.adamw(lambda step: 0.01, learning_rate_multipliers=multipliers)
    params = {
        "decoder": {"relpos_bias": {"rel_embedding": jnp.zeros(2)}, "norm": jnp.zeros(2)},
        "encoder": {"relpos_bias": {"rel_embedding": jnp.zeros(2)}, "norm": jnp.zeros(2)},
    }
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)
    # Adam's first step is the learning rate; a parameter of two names is multiplied twice.
    expected = {
        "decoder": {"relpos_bias": {"rel_embedding": -0.3}, "norm": -0.01},
        "encoder": {"relpos_bias": {"rel_embedding": -0.6}, "norm": -0.02},
    }
    jax.tree.map(
        lambda update, value: np.testing.assert_allclose(update, value, rtol=1e-5), updates, expected
    )


def orthogonalized(matrix, steps=5):
    """Computes Muon's iteration on a matrix, in float64."""
    x = matrix / np.linalg.norm(matrix)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (2, 2, 3, 5)], ids=str)
def test_muon_steps_along_the_orthogonalized_gradient(rng, shape):
    optimizer = optimizers.muon(lambda step: 0.1)
    params = {"dense": {"kernel": jnp.zeros(shape)}}
    gradient = rng.normal(size=shape)
    grads = {"dense": {"kernel": jnp.asarray(gradient, jnp.float32)}}
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    matrix = gradient.reshape(-1, shape[-1])
    # At the first step the momentum is the gradient.
    expected = -0.1 * 0.2 * np.sqrt(max(matrix.shape)) * orthogonalized(matrix)
    found = np.asarray(updates["dense"]["kernel"]).reshape(matrix.shape)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


ADAMS = ["mlp/bias", "token_embedder/embedding", "decoder/logits_dense/kernel", "score_head/output/kernel"]


@pytest.mark.parametrize("path", ADAMS)
def test_muon_leaves_tables_vectors_and_last_layers_to_adam(rng, path):
    optimizer = optimizers.muon(lambda step: 0.1, adam_beta2=0.98, learning_rate_multipliers={"mlp": 3.0})
    params = traverse_util.unflatten_dict({path: jnp.zeros((4, 6))}, sep="/")
    grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    adam = optax.nadam(0.3 if path.startswith("mlp") else 0.1, b2=0.98)
    expected, _ = adam.update(grads, adam.init(params), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), updates, expected)


@pytest.mark.parametrize("make", [optimizers.adamw, optimizers.muon])
def test_scanned_layers_are_stepped_like_layers_apart(rng, make):
    optimizer = make(lambda step: 0.1, weight_decay=0.5)

    def layer():
        shapes = {"kernel": (4, 6), "scale": (6,)}
        return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}

    def stack(tree):
        return {
            "encoder": {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *tree["encoder"].values())}
        }

    def updates(params, grads):
        return optimizer.update(grads, optimizer.init(params), params)[0]

    params, grads = ({"encoder": {"layers_0": layer(), "layers_1": layer()}} for _ in range(2))
    expected = stack(updates(params, grads))
    found = updates(stack(params), stack(grads))
    assert found["encoder"]["layers"]["kernel"].shape == (2, 4, 6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected)
