import clu.metrics
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
import torch

from richhf_jax import losses


@pytest.fixture
def logits(rng):
    return jnp.asarray(rng.normal(size=(3, 5, 7)), jnp.float32)


@pytest.fixture
def targets(rng):
    return jnp.asarray(rng.integers(7, size=(3, 5)))


def test_cross_entropy_equals_optax(logits, targets):
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    total, auxiliary, weight = losses.compute_weighted_cross_entropy(logits, targets)
    np.testing.assert_allclose(total, expected.sum(), rtol=1e-6)
    assert auxiliary == 0
    assert weight == 15


def test_weights_take_positions_out(logits, targets):
    weights = jnp.zeros((3, 5)).at[1, 2].set(1.0)
    total, _, weight = losses.compute_weighted_cross_entropy(logits, targets, weights)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits[1, 2], targets[1, 2])
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert weight == 1


def test_gradient_equals_that_of_the_plain_formula(logits, targets):
    one_hot = jax.nn.one_hot(targets, 7)

    def plain(logits):
        log_z = jax.nn.logsumexp(logits, axis=-1)
        return jnp.sum(log_z - jnp.sum(one_hot * logits, axis=-1) + 0.3 * log_z**2)

    own = jax.grad(lambda logits: losses.cross_entropy_with_logits(logits, one_hot, 0.3)[0].sum())(logits)
    np.testing.assert_allclose(own, jax.grad(plain)(logits), rtol=1e-5, atol=1e-6)


def test_smoothed_loss_of_a_perfect_prediction_is_zero():
    # The prediction equals the smoothed target: 0.9 on the target, 0.05 on each of the two others.
    logits = jnp.log(jnp.array([[0.9, 0.05, 0.05]]))
    total, _, _ = losses.compute_weighted_cross_entropy(logits, jnp.array([0]), label_smoothing=0.1)
    np.testing.assert_allclose(total, 0, atol=1e-6)


def test_normalizing_factor_divides(logits, targets):
    whole, _, _ = losses.compute_weighted_cross_entropy(logits, targets)
    part, _, _ = losses.compute_weighted_cross_entropy(logits, targets, loss_normalizing_factor=4.0)
    np.testing.assert_allclose(part, whole / 4, rtol=1e-6)


@pytest.mark.usefixtures("no_shape_checks")
def test_ranks_must_fit(logits):
    with pytest.raises(ValueError, match="don't fit"):
        losses.compute_weighted_cross_entropy(logits, jnp.zeros(3, int))


def test_weighted_squared_error():
    predictions = jnp.array([[[[0.0, 1.0]], [[1.0, 1.0]]]])  # [batch 1, slots 2, height 1, width 2]
    targets = jnp.array([[[[0.0, 0.0]], [[0.0, 0.0]]]])
    # Means over the pixels are 1/2 and 1.
    assert losses.weighted_squared_error(predictions, targets, jnp.array([[1.0, 0.0]])) == 0.5
    assert losses.weighted_squared_error(predictions, targets, jnp.array([[1.0, 1.0]])) == 1.5


def test_pixels_outside_a_letterboxed_image_take_no_part(rng):
    predictions, targets = rng.random((2, 3, 2, 5, 6), np.float32)
    weights = np.float32([[1, 0.5], [0, 1], [1, 1]])
    boxes = np.int32([[1, 2, 4, 5], [0, 0, 5, 6], [0, 3, 2, 6]])  # top, left, bottom, right
    expected = 0
    for example, (top, left, bottom, right) in enumerate(boxes):
        error = (predictions - targets)[example, :, top:bottom, left:right] ** 2
        expected += (weights[example] * error.mean(axis=(1, 2))).sum()
    loss = losses.weighted_squared_error(predictions, targets, weights, boxes)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)  # sums of 12 float32 products
    targets[0, :, 0], targets[0, :, :, 5] = 7, 7
    np.testing.assert_allclose(losses.weighted_squared_error(predictions, targets, weights, boxes), loss)


def test_weighted_means_merge_exactly():
    # Mean of 1 over one item, and of 4 over three: 13 / 4, not the mean of means.
    merged = losses.WeightedMean(1.0, 1.0).merge(losses.WeightedMean(12.0, 3.0))
    assert merged.compute() == 3.25


def test_t5xs_trainer_can_merge_and_write_a_weighted_mean():
    """T5X finds metrics in a tree by clu's class, and writes their `compute_value`."""
    mean = losses.WeightedMean(jnp.array(12.0), jnp.array(3.0))
    assert jax.tree.leaves({"loss": mean}, is_leaf=lambda x: isinstance(x, clu.metrics.Metric)) == [mean]
    assert mean.compute_value().value == 4.0


@pytest.fixture
def distributions(rng):
    """Makes scores, log-variances, targets and weights of 5 x 4; one weight in four is 0."""
    scores, targets = rng.random((2, 5, 4), dtype=np.float32)
    log_variances = rng.uniform(-8, 0, (5, 4)).astype(np.float32)
    return scores, log_variances, targets, np.float32([[1, 0, 2, 0.5]] * 5)


def test_the_likelihood_and_its_gradients_equal_torchs(distributions):
    scores, log_variances, targets, weights = distributions
    given = [torch.tensor(array, requires_grad=True) for array in (scores, log_variances)]
    expected = torch.nn.functional.gaussian_nll_loss(
        given[0], torch.tensor(targets), given[1].exp(), full=True, reduction="none"
    )
    (expected * torch.tensor(weights)).sum().backward()
    np.testing.assert_allclose(
        losses.gaussian_nll(scores, log_variances, targets), expected.detach(), rtol=1e-5, atol=1e-5
    )
    # With beta 0, the loss is the likelihood times 2 x 0.2^2.
    found = jax.grad(losses.weighted_beta_nll, argnums=(0, 1))(*distributions, beta=0.0)
    for mine, tensor in zip(found, given, strict=True):
        np.testing.assert_allclose(mine, 0.08 * tensor.grad, rtol=1e-4, atol=1e-6)


def test_the_likelihood_is_that_of_scipy(distributions):
    scores, log_variances, targets, _ = distributions
    expected = -scipy.stats.norm.logpdf(targets, scores, np.exp(log_variances / 2))
    np.testing.assert_allclose(losses.gaussian_nll(scores, log_variances, targets), expected, rtol=1e-4)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_beta_nll_moves_the_means_as_the_squared_error_does(distributions, beta):
    """At a deviation of 0.2 alike; elsewhere (0.2 / deviation)^(2 - 2 beta) times as much."""
    scores, log_variances, targets, weights = distributions
    squared = jax.grad(losses.weighted_squared_error)(scores, targets, weights)
    found = jax.grad(losses.weighted_beta_nll)(*distributions, beta=beta)
    ratio = (0.2 / np.exp(log_variances / 2)) ** (2 - 2 * beta)
    np.testing.assert_allclose(found, squared * ratio, rtol=1e-4)


def test_beta_nll_moves_a_variance_towards_the_squared_error(distributions):
    scores, log_variances, targets, weights = distributions
    found = jax.grad(losses.weighted_beta_nll, argnums=1)(*distributions)
    too_small = np.exp(log_variances) < (scores - targets) ** 2
    np.testing.assert_array_equal(np.sign(found), np.where(too_small, -1, 1) * (weights > 0))
    right = np.log((scores - targets) ** 2)
    at_rest = jax.grad(losses.weighted_beta_nll, argnums=1)(scores, right, targets, weights)
    np.testing.assert_allclose(at_rest, 0, atol=1e-6)


def test_a_network_learns_where_the_noise_is():
    """On y = sin(6 x) / 3 + 1/2 with noise of 0.02 to 0.22: mean and deviation are both found."""
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 1, (2000, 1)).astype(np.float32)

    def truth(x):
        return np.sin(6 * x) / 3 + 0.5, 0.02 + 0.2 * x

    mean, deviation = truth(x)
    y = (mean + deviation * rng.standard_normal(x.shape)).astype(np.float32)
    sizes = ((1, 32), (32, 32), (32, 2))
    params = [(rng.normal(0, shape[0] ** -0.5, shape).astype(np.float32), np.zeros(shape[1:], np.float32))
              for shape in sizes]  # fmt: skip

    def network(params, x):
        *hidden, (kernel, bias) = params
        for matrix, shift in hidden:
            x = jnp.tanh(2 * x @ matrix + shift[None])
        x = x @ kernel + bias[None]
        return x[:, :1], x[:, 1:] - 3

    optimizer = optax.adam(0.01)

    @jax.jit
    def train(params):
        def step(_, carry):
            params, state = carry
            grads = jax.grad(
                lambda params: losses.weighted_beta_nll(*network(params, x), y, jnp.ones_like(y)) / len(y)
            )(params)
            updates, state = optimizer.update(grads, state)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, 600, step, (params, optimizer.init(params)))[0]

    grid = np.linspace(0.05, 0.95, 50, dtype=np.float32)[:, None]
    found, log_variances = network(train(params), grid)
    mean, deviation = truth(grid)
    # With 2,000 examples and some 30 in a twentieth of the range, a deviation is known to about a tenth.
    assert np.sqrt(np.mean((found - mean) ** 2)) < 0.03
    assert np.abs(np.exp(log_variances / 2) / deviation - 1).mean() < 0.2
