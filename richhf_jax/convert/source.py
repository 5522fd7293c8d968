"""Opened weights, which every reader gives: our parameters' names, and arrays that are read when needed."""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from richhf_jax import errors, foreign_text, reading

# The most layers of a stack. A larger number in a file is a mistake, and would fill the memory with names.
MAX_LAYERS = 1000
# What trainers put before all names: DistributedDataParallel, torch.compile, Lightning; also nested.
_WRAPPER = re.compile(r"(module|_orig_mod|model)\.")


class ConvertError(errors.UserError):
    """Weights are missing, damaged, of an unknown kind, or do not fit; the message names the file."""

    def __init__(self, message: str):
        # Messages quote names from the files.
        super().__init__("\n".join(map(foreign_text.for_terminal, message.split("\n"))))


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads a small JSON file that holds an object.

    Raises:
      ConvertError: see `reading.read_json`.
    """
    try:
        return reading.read_json(path)
    except errors.UserError as error:
        raise ConvertError(str(error)) from error


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
        """Returns the slices along the first axis. Reading them in order reads the whole array once.

        Raises:
          ConvertError: the axis is longer than any stack of layers.
        """
        if self.shape[0] > MAX_LAYERS:
            raise ConvertError(f"{self.origin} has shape {self.shape}: that is no stack of layers")
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


class State(NamedTuple):
    """A foreign state dict.

    Attributes:
      tensors: name -> the array. Each tensor's `origin` is its whole name in the file.
      note: what the user should know of it, as a sentence; "" if there is nothing.
    """

    tensors: Mapping[str, Tensor]
    note: str = ""

    def unwrapped(self) -> "State":
        """Takes off the prefixes of trainers, if all names begin with them, and says so in the note.

        module._orig_mod.shared.weight -> shared.weight
        """
        prefix = ""
        while found := _WRAPPER.match(next(iter(self.tensors), ""), len(prefix)):
            if not all(name.startswith(prefix + found[0]) for name in self.tensors):
                break
            prefix += found[0]
        if not prefix:
            return self
        note = f"all names begin with {prefix!r}, which is taken off"
        return State(
            {name.removeprefix(prefix): tensor for name, tensor in self.tensors.items()},
            "; ".join(filter(None, (self.note, note))),
        )


@dataclasses.dataclass(frozen=True)
class Source:
    """An opened checkpoint.

    Attributes:
      path: the place where it was found.
      description: its kind, for the printed table: "Hugging Face T5 1.1, 12 + 12 layers".
      tensors: our name of a parameter ("encoder/layers_0/attention/query/kernel", layers never scanned) ->
        the array. It also holds parameters that not every model of ours has (a class token, say).
      unused: name in the foreign checkpoint -> shape, of arrays that have no parameter of ours; None: the
        shape is unknown. Optimizer states that a format is known to hold are left out.
      copies: name in the foreign checkpoint -> (that array, the one that is loaded in its place). They must
        be equal; see `mapping.check_copies`.
      settings: settings of its network that shapes don't show, by our names: {"t5_config.num_heads": 12}.
        They must agree with the model's; see `mapping.check_settings`.
      fit: how pictures become square for this network, see `pixels.square`; None: it isn't known.
      note: another fact that the user should know, as a sentence; "" if there is none.
    """

    path: str
    description: str
    tensors: Mapping[str, Tensor]
    unused: Mapping[str, tuple[int, ...] | None] = dataclasses.field(default_factory=dict)
    copies: Mapping[str, tuple[Tensor, Tensor]] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fit: str | None = None
    note: str = ""
