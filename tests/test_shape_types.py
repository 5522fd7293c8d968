"""Shape types are checked in tests, and only in tests."""

import subprocess
import sys

import jax.numpy as jnp
import jaxtyping
import pytest

from richhf_jax import losses


def test_shapes_that_do_not_fit_are_an_error_in_tests():
    with pytest.raises(jaxtyping.TypeCheckError, match="targets"):
        losses.weighted_squared_error(jnp.zeros((2, 3)), jnp.zeros((2, 1)), jnp.zeros((2, 3)))


def test_nothing_is_checked_outside_tests():
    program = (
        "import sys\n"
        "import jax.numpy as jnp\n"
        "from richhf_jax import losses\n"
        "loss = losses.weighted_squared_error(jnp.zeros((2, 3)), jnp.ones((2, 1)), jnp.ones((2, 3)))\n"
        "print(loss, 'beartype' in sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.stdout == "6.0 False\n", result.stderr
