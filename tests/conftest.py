"""Strict mode for every test: two CPU devices, no silent broadcasting, no state left in gin.

Warnings are errors, too: see pyproject.toml.
"""

import os
import pathlib
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


SMALL_SPLITS = {"train": 32, "validation": 8, "test": 8}


@pytest.fixture(scope="session")
def synthetic_data_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A TFDS data directory with both synthetic data sets, of a few examples a split."""
    import tensorflow_datasets as tfds

    from richhf_jax.datasets import synthetic_captions, synthetic_rich_hf

    data_dir = tmp_path_factory.mktemp("tfds")
    for builder_cls in (synthetic_rich_hf.SyntheticRichHf, synthetic_captions.SyntheticCaptions):
        sizes = builder_cls.builder_configs["default"].split_sizes
        with pytest.MonkeyPatch.context() as patch:
            for split in sizes:
                patch.setitem(sizes, split, SMALL_SPLITS[split])
            builder_cls(data_dir=data_dir).download_and_prepare(
                download_config=tfds.download.DownloadConfig(try_download_gcs=False)
            )
    return data_dir
