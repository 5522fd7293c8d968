"""RAHF in JAX: rich human feedback for text-to-image generation. Importing this loads nothing heavy."""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["RahfPredictor", "RichFeedback"]

# Names that are imported at their first use.
_MODULES = {"RahfPredictor": "richhf_jax.predict.predictor", "RichFeedback": "richhf_jax.feedback"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
