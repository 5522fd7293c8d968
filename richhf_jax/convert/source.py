"""Opened weights, which every reader gives: our parameters' names, and arrays that are read when needed."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from richhf_jax import errors


class ConvertError(errors.UserError):
    """Weights are missing, damaged, of an unknown kind, or do not fit; the message names the file."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One parameter, in our layout.

    Attributes:
      origin: its name in the foreign checkpoint; several names are joined by " + ".
      shape, dtype: shape and type of the result of `read`; known without reading the values.
      read: reads the values, again at each call, so that only those in use are in memory. They are float32,
        or another floating-point type if they are stored so.
    """

    origin: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    def reshaped(self, *shape: int) -> "Tensor":
        """Returns the same values in another shape."""
        return self.mapped(shape, lambda array: array.reshape(shape))

    def astype(self, dtype: Any) -> "Tensor":
        """Returns the same values as another type."""
        return dataclasses.replace(
            self, dtype=np.dtype(dtype), read=lambda: self.read().astype(dtype, copy=False)
        )

    def unstacked(self) -> list["Tensor"]:
        """Returns the slices along the first axis. Reading them in order reads the whole array once."""
        return [
            dataclasses.replace(
                self, origin=f"{self.origin}[{i}]", shape=self.shape[1:], read=lambda i=i: _read(self)[i]
            )
            for i in range(self.shape[0])
        ]

    def mapped(self, shape: tuple[int, ...], fn: Callable[[np.ndarray], np.ndarray]) -> "Tensor":
        """Returns `fn` of the values; `shape` is the shape of its result."""
        return dataclasses.replace(self, shape=tuple(shape), read=lambda: fn(self.read()))


@functools.lru_cache(maxsize=1)
def _read(stacked: Tensor) -> np.ndarray:
    return stacked.read()


@dataclasses.dataclass(frozen=True)
class Source:
    """An opened checkpoint.

    Attributes:
      path: the place where it was found.
      description: its kind, for the printed table: "Hugging Face T5 1.1, 12 + 12 layers".
      tensors: our name of a parameter ("encoder/layers_0/attention/query/kernel", layers never scanned) ->
        the array. It also holds parameters that not every model of ours has (a class token, say).
      unused: names in the foreign checkpoint that have no parameter of ours (optimizer states that a format
        is known to hold are left out).
      settings: settings of its network that shapes don't show, by our names: {"t5_config.num_heads": 12}.
        They must agree with the model's; see `mapping.check_settings`.
      note: another fact that the user should know, as a sentence; "" if there is none.
    """

    path: str
    description: str
    tensors: Mapping[str, Tensor]
    unused: tuple[str, ...] = ()
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    note: str = ""
