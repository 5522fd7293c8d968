import clu.metrics
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

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
