"""The progress of a prediction run, and how much of it the files still hold.

run.json counts the lines of predictions.jsonl and errors.jsonl and keeps their checksums, of the last save
and of a few saves before it. A run continues from the last of them whose lines and newest pictures are as
they were written. A power cut may damage later ones, if the disk didn't keep what it had taken.
"""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import google_crc32c

from richhf_jax import errors

PREDICTIONS, ERRORS, STATE = "predictions.jsonl", "errors.jsonl", "run.json"
# Number of saves that run.json keeps.
KEPT_SAVES = 8
# A checksum isn't negative.
UNKNOWN = -1
_CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True)
class Progress:
    """The progress of a run.

    Attributes:
      position: number of the first record that isn't done, counted over all inputs.
      predictions, errors: numbers of lines written so far.
      predictions_bytes, errors_bytes: sizes of the two files.
      predictions_crc32c, errors_crc32c: their checksums; `UNKNOWN` in what an older version wrote.
      done: whether everything is written, the report included.
    """

    position: int
    predictions: int = 0
    errors: int = 0
    predictions_bytes: int = 0
    errors_bytes: int = 0
    predictions_crc32c: int = 0
    errors_crc32c: int = 0
    done: bool = False

    @classmethod
    def of_json(cls, save: Mapping[str, Any]) -> "Progress":
        """Makes the progress that run.json tells of. Raises TypeError where that has other fields."""
        return cls(**{"predictions_crc32c": UNKNOWN, "errors_crc32c": UNKNOWN, **save})

    def after(
        self, position: int, predictions: Sequence[Mapping[str, Any]], failures: Sequence[Mapping[str, Any]]
    ) -> tuple["Progress", bytes, bytes]:
        """Adds the results of the records before `position`. Returns the progress, and the lines to write."""
        new_predictions, new_errors = (
            "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines).encode()
            for lines in (predictions, failures)
        )
        progress = Progress(
            position,
            self.predictions + len(predictions),
            self.errors + len(failures),
            self.predictions_bytes + len(new_predictions),
            self.errors_bytes + len(new_errors),
            google_crc32c.extend(self.predictions_crc32c, new_predictions),
            google_crc32c.extend(self.errors_crc32c, new_errors),
        )
        return progress, new_predictions, new_errors


def whole_saves(
    directory: pathlib.Path,
    saves: Sequence[Progress],
    has_pictures: Callable[[int, Mapping[str, Any]], bool],
) -> list[Progress]:
    """Returns the saves up to the last one that the directory's files still hold, all with checksums.

    Args:
      directory: the folder of the two files.
      saves: progress at consecutive saves.
      has_pictures: tells of a line of predictions.jsonl, given with its number, whether its pictures are
        whole. It is asked for the lines since the first of these saves; older pictures came to the disk long
        ago.

    Raises:
      errors.UserError: a file holds none of them.
    """
    held = list(saves)
    for path, size, checksum in (
        (directory / PREDICTIONS, "predictions_bytes", "predictions_crc32c"),
        (directory / ERRORS, "errors_bytes", "errors_crc32c"),
    ):
        found = _checksums(path, [getattr(save, size) for save in held])
        held = [
            dataclasses.replace(save, **{checksum: found[getattr(save, size)]})
            for save in held
            if getattr(save, checksum) in (found.get(getattr(save, size)), UNKNOWN)
            and getattr(save, size) in found
        ]
        if not held:
            raise errors.UserError(
                f"{path} has lost lines that {STATE} knows of, or was changed: name a new --out"
            )
    first, last = held[0].predictions, held[-1].predictions
    with (directory / PREDICTIONS).open("rb") as file:
        for number, line in enumerate(itertools.islice(file, first, last), first):
            if not has_pictures(number, json.loads(line)):
                return [save for save in held if save.predictions <= number]
    return held


def _checksums(path: pathlib.Path, sizes: Sequence[int]) -> dict[int, int]:
    """Returns the checksum of the first bytes of a file, for each of these sizes that it has."""
    found, position, checksum = {}, 0, 0
    with path.open("rb") as file:
        for size in sorted(set(sizes)):
            while position < size and (chunk := file.read(min(_CHUNK, size - position))):
                position, checksum = position + len(chunk), google_crc32c.extend(checksum, chunk)
            if position == size:
                found[size] = checksum
    return found
