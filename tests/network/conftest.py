import jax
import pytest


@pytest.fixture(scope="session")
def random_params(random_values):
    """Makes variables of a module whose parameters are all random."""

    def make(module, *args, **kwargs):
        def init():
            return module.init(jax.random.key(0), *args, **kwargs)["params"]

        return {"params": random_values(jax.eval_shape(init))}

    return make
