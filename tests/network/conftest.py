import jax
import numpy as np
import pytest


@pytest.fixture(scope="session")
def random_params():
    """Makes parameters that are all random: a zero bias or a scale of one would hide its misuse.

    By numpy, from the shapes alone: compiling a network's own initialisers takes seconds.
    """

    def make(module, *args, **kwargs):
        def init():
            return module.init(jax.random.key(0), *args, **kwargs)["params"]

        leaves, tree = jax.tree.flatten(jax.eval_shape(init))
        rng = np.random.default_rng(2)
        # Standard deviation 1 / sqrt(fan-in), 1 for vectors.
        values = [rng.normal(0, np.prod(leaf.shape[:-1]) ** -0.5, leaf.shape) for leaf in leaves]
        return {"params": jax.tree.unflatten(tree, [value.astype(np.float32) for value in values])}

    return make
