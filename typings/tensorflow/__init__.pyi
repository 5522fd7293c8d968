"""TensorFlow for pyright: unchecked, because it brings no annotations and typeshed's are partial."""

from typing import Any

def __getattr__(name: str) -> Any: ...
