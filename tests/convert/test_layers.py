import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from richhf_jax.convert import layers
from richhf_jax.convert.source import ConvertError, Tensor


@pytest.fixture
def tree(rng):
    """Makes a tree of 11 layers, so that their names and their numbers sort differently."""
    names = [*(f"encoder/layers_{i}/mlp/wi/kernel" for i in range(11)), "encoder/encoder_norm/scale"]
    names += [f"vit/layers_{i}/scale" for i in range(2)]
    return traverse_util.unflatten_dict({n: rng.standard_normal((2, 3)) for n in names}, sep="/")


def test_stack_layers(tree):
    stacked = layers.stack_layers(tree)
    assert jax.tree.map(jnp.shape, stacked) == {
        "encoder": {"layers": {"mlp": {"wi": {"kernel": (11, 2, 3)}}}, "encoder_norm": {"scale": (2, 3)}},
        "vit": {"layers": {"scale": (2, 2, 3)}},
    }
    kernels = stacked["encoder"]["layers"]["mlp"]["wi"]["kernel"]
    for i in range(11):
        np.testing.assert_allclose(
            kernels[i], tree["encoder"][f"layers_{i}"]["mlp"]["wi"]["kernel"], rtol=1e-6
        )


def test_unstack_layers_is_the_inverse(tree):
    tree = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
    jax.tree.map(np.testing.assert_array_equal, layers.unstack_layers(layers.stack_layers(tree)), tree)
    stacked = layers.stack_layers(tree)
    again = layers.stack_layers(layers.unstack_layers(stacked))
    jax.tree.map(np.testing.assert_array_equal, again, stacked)


def test_a_stack_at_the_root():
    assert layers.unstack_layers({"layers": {"w": jnp.arange(2)}}) == {
        "layers_0": {"w": 0},
        "layers_1": {"w": 1},
    }


def test_a_layer_that_is_absent_is_named(tree):
    del tree["encoder"]["layers_3"]
    with pytest.raises(
        ValueError, match=r"encoder/layers/mlp/wi/kernel is in the layers \[0, 1, 2, 4, .* of 10"
    ):
        layers.stack_layers(tree)


def test_layer_names():
    assert layers.layer_names("vit/layers/mlp/wi/bias", 2) == [
        "vit/layers_0/mlp/wi/bias",
        "vit/layers_1/mlp/wi/bias",
    ]
    assert layers.layer_names("layers/w", 1) == ["layers_0/w"]
    assert layers.layer_names("vit/layers_0/mlp/wi/bias", 2) == []
    assert layers.layer_names("my_layers/w", 2) == []


def test_natural_order():
    names = [
        "a/layers_2/w",
        "a/layers_10/w",
        "a/b",
        "b/layers_1/w",
        "conv_1/bias",
        "conv_10/bias",
        "conv_2/bias",
    ]
    expected = [
        "a/b",
        "a/layers_2/w",
        "a/layers_10/w",
        "b/layers_1/w",
        "conv_1/bias",
        "conv_2/bias",
        "conv_10/bias",
    ]
    assert sorted(names, key=layers.natural_order) == expected


def test_an_axis_that_is_no_stack_is_not_taken_apart():
    tensor = Tensor("encoder/layers/w", (10**9, 0), np.dtype(np.float32), None)
    with pytest.raises(ConvertError, match="that is no stack of layers"):
        layers.unstack_tensors({"encoder/layers/w": tensor})
