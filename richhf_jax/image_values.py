"""The file image_values.npz of an evaluation: for each image what the metrics are made of.

numpy reads it: `np.load(path)`. A value that an image lacks is NaN.

    task, split, step      what was evaluated
    systems                [systems] names: the model first, then the baselines
    ids                    [images]
    target/<name>          [images] float64: `metrics.target_values`
    <i>/<name>             [images] float64: `metrics.image_values` of the system i
"""

import dataclasses
import io
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from richhf_jax import errors, metrics, reading, writing

FILE = "image_values.npz"


@dataclasses.dataclass(frozen=True)
class ImageValues:
    """What the metrics of one or several systems are made of, on the same images.

    Attributes:
      task, split: the data.
      step: the checkpoint's.
      ids: the images' names.
      targets: `metrics.target_values`.
      systems: name -> `metrics.image_values`; the model comes first.
    """

    task: str
    split: str
    step: int
    ids: Sequence[str]
    targets: metrics.Columns
    systems: Mapping[str, metrics.Columns]

    def write(self, directory: epath.PathLike) -> None:
        """Writes the file into the folder of an evaluation.

        Raises:
          OSError: it can't be written.
        """
        arrays: dict[str, Any] = {"task": self.task, "split": self.split, "step": self.step}
        arrays |= {"systems": list(self.systems), "ids": list(self.ids)}
        arrays |= {f"target/{name}": column for name, column in self.targets.items()}
        for i, values in enumerate(self.systems.values()):
            arrays |= {f"{i}/{name}": column for name, column in values.items()}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        writing.write(epath.Path(directory) / FILE, buffer.getvalue())


def read(directory: epath.PathLike) -> ImageValues:
    """Reads the file from the folder of an evaluation.

    Raises:
      errors.UserError: it is missing or damaged.
      OSError: it can't be read.
    """
    path = epath.Path(directory) / FILE
    again = "Evaluate again: python -m richhf_jax.eval"
    if not path.exists():
        raise errors.UserError(f"{directory} has no {FILE}: it is no evaluation, or an older one. {again}")
    reading.check_regular(path)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return _values({name: arrays[name] for name in arrays.files})
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise errors.UserError(f"{path} is damaged: {error}. {again}") from error


def _values(arrays: Mapping[str, np.ndarray]) -> ImageValues:
    """Checks the file's arrays; raises a ValueError, KeyError or TypeError that says what is wrong."""
    ids = arrays["ids"]
    groups: dict[str, dict[str, np.ndarray]] = {"target": {}}
    groups |= {str(i): {} for i in range(len(arrays["systems"]))}
    for name, array in arrays.items():
        group, slash, value = name.partition("/")
        if not slash:
            continue
        if array.shape != ids.shape or array.dtype != np.float64 or np.isinf(array).any():
            raise ValueError(f"{name} is no list of {len(ids)} numbers")
        if group not in groups:
            raise ValueError(f"{name} is of a system that it doesn't name")
        groups[group][value] = array
    targets, *systems = groups.values()
    names = arrays["systems"].tolist()
    if not ids.size or ids.dtype.kind != "U" or not names or len(set(names)) < len(names):
        raise ValueError("it has no images, or no systems")
    return ImageValues(
        str(arrays["task"]),
        str(arrays["split"]),
        int(arrays["step"]),
        ids.tolist(),
        targets,
        dict(zip(names, systems, strict=True)),
    )
