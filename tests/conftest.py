"""Strict mode for every test: two CPU devices, no silent broadcasting, no state left in gin.

Warnings are errors, too: see pyproject.toml.
"""

import os
import sys

import numpy as np
import pytest

# Set before anything imports jax or TensorFlow, and inherited by the programs that tests start.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_NUM_CPU_DEVICES"] = "2"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture
def rng() -> np.random.Generator:
    """The same random numbers in every run."""
    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def clean_gin():
    """Gin's configuration is global; no test sees another's."""
    yield
    if "gin" in sys.modules:
        sys.modules["gin"].clear_config()
