"""RAHF in JAX: rich human feedback for text-to-image generation. Importing this loads nothing heavy."""

import importlib
import sys
from typing import Any

__version__ = "0.1.0"
__all__ = ["RahfPredictor", "RichFeedback"]

# Names that are imported at their first use.
_MODULES = {"RahfPredictor": "richhf_jax.predict.predictor", "RichFeedback": "richhf_jax.feedback"}


def _say_interrupted(kind: type[BaseException], *rest: Any) -> None:
    """Replaces the traceback of Ctrl-C, which no one has handled, by a line."""
    if kind is KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
    else:
        sys.__excepthook__(kind, *rest)


# While `python -m` looks for a module, its name isn't known yet. Of this package's commands, the imports take
# seconds, before any code of theirs could handle an exception.
if sys.argv[:1] == ["-m"]:
    sys.excepthook = _say_interrupted


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
