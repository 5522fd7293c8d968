import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from richhf_jax import optimizers, train_state

PARAMS = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}}
AXES = {"dense": {"kernel": PartitionSpec("embed", "mlp"), "bias": PartitionSpec("mlp")}}


def test_a_gradient_is_a_step():
    optimizer = optax.sgd(0.5)
    state = train_state.TrainState.create(optimizer, PARAMS)
    assert (int(state.step), state.step.dtype) == (0, jnp.int32)
    grads = {"dense": {"kernel": jnp.full((2, 3), 4.0), "bias": jnp.full(3, 2.0)}}
    state = state.apply_gradient(optimizer, grads)
    assert int(state.step) == 1
    np.testing.assert_array_equal(state.params["dense"]["kernel"], np.full((2, 3), -1))
    np.testing.assert_array_equal(state.params["dense"]["bias"], np.full(3, -1))


@pytest.mark.parametrize("multipliers", [None, {"bias": 2.0}])
def test_moments_lie_as_their_parameters_and_the_rest_everywhere(multipliers):
    optimizer = optimizers.adamw(lambda step: 0.1, max_grad_norm=1.0, learning_rate_multipliers=multipliers)
    state = jax.eval_shape(lambda: train_state.TrainState.create(optimizer, PARAMS))
    axes = train_state.logical_axes(optimizer, AXES, state)
    assert axes.params == AXES
    assert axes.step == PartitionSpec()
    assert optax.tree.get(axes.opt_state, "mu") == optax.tree.get(axes.opt_state, "nu") == AXES
    specs = jax.tree.leaves(axes.opt_state, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
    assert len(specs) == len(jax.tree.leaves(state.opt_state))
    # Adam's and the schedule's counters.
    assert specs.count(PartitionSpec()) == 2


def test_moments_of_an_optimizer_that_acts_on_some_parameters_only():
    optimizer = optimizers.muon(lambda step: 0.1)
    state = jax.eval_shape(lambda: train_state.TrainState.create(optimizer, PARAMS))
    axes = train_state.logical_axes(optimizer, AXES, state)

    def is_spec(leaf):
        return isinstance(leaf, PartitionSpec)

    specs = jax.tree.map(lambda _: 0, axes.opt_state, is_leaf=is_spec)
    assert jax.tree.structure(specs) == jax.tree.structure(state.opt_state)
    found = jax.tree.leaves_with_path(axes.opt_state, is_spec)
    # Muon has one moment, Adam two.
    for name, number in (("kernel", 1), ("bias", 2)):
        moments = [spec for path, spec in found if name in jax.tree_util.keystr(path)]
        assert moments == [AXES["dense"][name]] * number
