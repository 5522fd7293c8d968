"""Suggestions: a model's answers from predict's predictions.jsonl, for raters to see after their own.

A suggestion has those fields of an answer that the model predicts; see `answers`. Of its outputs

    scores    become steps of the scale: 1 + 4 score, the inverse of `feedback.standardise_rating`, rounded;
    tokens    become token_labels, unless words at the prompt's end were cut: nothing is known of those;
    heatmaps  become points, see `points`.
"""

import contextlib
import math
import pathlib
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import numpy as np
import tqdm
from PIL import Image
from scipy import ndimage

from richhf_jax import errors, feedback, reading, writing
from richhf_jax.annotate.answers import Suggestion
from richhf_jax.annotate.project import Config
from richhf_jax.annotate.records import Item
from richhf_jax.foreign_text import excerpt, for_terminal
from richhf_jax.inputs import images
from richhf_jax.inputs.record import InputError, bounded_lines, parsed_json, read_bytes

# A heatmap's value is the share of the raters who would mark the place: from here on, at least half of them.
THRESHOLD = 0.5
# Most points of a kind in a suggestion.
MAX_POINTS = 10
# Squares of a reduced heatmap in a disk's radius: a point is right to a tenth of it.
_SQUARES = 10
_ARCHIVE = "heatmaps.npz"


def read(path: str) -> dict[str, dict[str, Any]]:
    """Reads a file predictions.jsonl. Returns image's id -> its line.

    Raises:
      errors.UserError: a line is no prediction, or an image has two.
    """
    found: dict[str, dict[str, Any]] = {}
    with (
        writing.explained_disk_errors(pathlib.Path(path).absolute(), "Name a file that can be read"),
        open(path, "rb", opener=reading.regular) as file,
    ):
        for number, text in enumerate(bounded_lines(file), start=1):
            try:
                line = parsed_json(text)
            except InputError as error:
                raise errors.UserError(f"{path}:{number}: {error}") from None
            if not isinstance(line, dict) or not {"id", "prompt", "image_size"} <= line.keys():
                raise errors.UserError(
                    f"{path}:{number}: no prediction; give the predictions.jsonl that predict wrote"
                )
            if not isinstance(line["id"], str) or line["id"] in found:
                raise errors.UserError(
                    f"{path}:{number}: `id` {line['id']!r} is no text, or was there before"
                )
            found[line["id"]] = line
    if not found:
        raise errors.UserError(f"{path}: no prediction in it")
    return found


def added(
    items: Iterable[Item],
    path: str,
    lines: Mapping[str, Mapping[str, Any]],
    radius: float,
    failures: list[str],
) -> Iterator[tuple[Item, Suggestion]]:
    """Yields those items of which there are predictions, with their suggestions.

    Args:
      items: the project's.
      path: the file of predictions; files of heatmaps are named from its folder.
      lines: what `read` gave of it.
      radius: radius of a point's disk, as a share of the image's height.
      failures: gets a line for each prediction that can't be taken, and why.

    Raises:
      errors.UserError: the file of all heatmaps is damaged.
    """
    known = {item.id: item for item in items}
    failures += [f"{for_terminal(name)}: a prediction, but no image" for name in lines if name not in known]
    folder = pathlib.Path(path).parent
    with _archive(folder / _ARCHIVE) as arrays:
        wanted = [line for name, line in lines.items() if name in known]
        for line in tqdm.tqdm(wanted, "suggestions", disable=None, unit=""):
            item = known[line["id"]]
            try:
                yield item, _suggestion(item, line, folder, arrays, radius)
            except (InputError, images.ImageError) as error:
                failures.append(f"{for_terminal(item.id)}: {for_terminal(str(error))}")


def _archive(path: pathlib.Path) -> contextlib.AbstractContextManager[Mapping[str, np.ndarray]]:
    """Opens the file of all heatmaps, which may be missing."""
    if not path.is_file():
        return contextlib.nullcontext({})
    try:
        arrays = np.load(path, allow_pickle=False)
        if isinstance(arrays, np.ndarray):
            raise ValueError("it is a single array")
        return arrays
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise errors.UserError(f"{path} is damaged: {error}. Run predict again") from None


def _suggestion(
    item: Item,
    line: Mapping[str, Any],
    folder: pathlib.Path,
    arrays: Mapping[str, np.ndarray],
    radius: float,
) -> Suggestion:
    if line["prompt"] != item.prompt:
        raise InputError("its prediction is for another prompt")
    if line["image_size"] != [item.width, item.height]:
        raise InputError("its prediction is for an image of another size")
    found: Suggestion = {}
    for kind, place in _object(line, "heatmaps").items():
        if kind in feedback.HEATMAPS:
            heatmap = _heatmap(folder, place, arrays)
            if heatmap.shape != (item.height, item.width):
                raise InputError(f"{place}: a heatmap of another size than the image")
            found[f"{kind}_points"] = points(heatmap, radius)
    if "tokens" in line and not line.get("prompt_words_cut"):
        found["token_labels"] = _labels(line["tokens"], item.prompt)
    if scores := {kind: s for kind, s in _object(line, "scores").items() if kind in feedback.SCORES}:
        found["ratings"] = {kind: _rating(kind, score) for kind, score in scores.items()}
    if not found:
        raise InputError("its prediction has no outputs; heatmaps need predict's --heatmaps=png or npz")
    return found


def _object(line: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = line.get(name, {})
    if not isinstance(value, dict):
        raise InputError(f"its prediction's {name} must be an object, got {excerpt(repr(value))}")
    return value


def _rating(kind: str, score: Any) -> int:
    """Returns the step of the scale that is next to a score in [0, 1]; a half goes up."""
    if type(score) not in (int, float) or not 0 <= score <= 1:
        raise InputError(f"its prediction's {kind} must be a number from 0 to 1, got {excerpt(repr(score))}")
    return math.floor(feedback.rating_of_score(score) + 0.5)


def _labels(tokens: Any, prompt: str) -> list[int]:
    texts = feedback.tokenize_prompt(prompt)
    try:
        if [token["text"] for token in tokens] == texts:
            flags = [token["misaligned"] for token in tokens]
            if all(type(flag) is bool for flag in flags):
                return [feedback.MISALIGNED if flag else feedback.ALIGNED for flag in flags]
    except (TypeError, KeyError):
        pass
    raise InputError("its prediction's tokens aren't the prompt's")


def _heatmap(folder: pathlib.Path, place: Any, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Reads a heatmap [height, width] in [0, 1] from its place, as a line of predictions.jsonl names it."""
    name, _, member = place.partition("#") if isinstance(place, str) else ("", "", "")
    parts = pathlib.PurePosixPath(name)
    if not name or parts.is_absolute() or ".." in parts.parts:
        raise InputError(f"{excerpt(repr(place))} is no place of a heatmap")
    if not member:
        fix = "keep predictions.jsonl in the folder that predict wrote"
        return images.decode(read_bytes(str(folder / name), place, fix))[..., 0] / np.float32(255)
    try:
        heatmap = np.float32(arrays[member])
    except (KeyError, TypeError, ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{place}: {error}; keep {_ARCHIVE} beside predictions.jsonl") from None
    if heatmap.ndim != 2 or not ((heatmap >= 0) & (heatmap <= 1)).all():  # NaN is neither.
        raise InputError(f"{place} is no heatmap")
    return heatmap


def points(heatmap: np.ndarray, radius: float) -> list[list[float]]:
    """Returns where a rater would mark what a heatmap shows.

    A heatmap of raters is made of disks, and the mean over the square around a disk is highest in its middle.
    So a point is where that mean is the highest within the square. The heatmap there must be at least
    THRESHOLD. Of these points, the MAX_POINTS of the highest values are taken.

    Args:
      heatmap: float [height, width] in [0, 1].
      radius: radius of a disk, as a share of the height.

    Returns:
      [[x, y], ...] in pixels, the highest value first.
    """
    height, width = heatmap.shape
    # A side of the squares in which the heatmap is searched, in pixels. A large image needs no more of them.
    side = max(1, int(radius * height / _SQUARES))
    small = np.asarray(Image.fromarray(np.float32(heatmap)).reduce(side))
    reach = 2 * max(1, round(radius * height / side)) + 1
    # In steps of 8 bits: a plateau is level, whatever the rounding errors.
    means = np.rint(255 * ndimage.uniform_filter(small.astype(np.float64), reach, mode="nearest"))
    peaks = (means == ndimage.maximum_filter(means, reach)) & (small >= THRESHOLD)
    plateaus, count = cast(tuple[np.ndarray, int], ndimage.label(peaks, np.ones((3, 3))))
    found: list[tuple[float, list[float]]] = []
    for cells in (np.argwhere(plateaus == number) for number in range(1, count + 1)):
        middle = cells.mean(axis=0)
        nearest = cells[np.abs(cells - middle).sum(axis=1).argmin()]
        # A plateau may be a ring, whose middle isn't on it.
        place = middle if np.abs(nearest - middle).max() < 1 else nearest
        found.append((float(small[tuple(nearest)]), ((place + 0.5) * side - 0.5).tolist()))
    found.sort(key=lambda one: -one[0])
    return [
        [round(min(x, width - 1.0), 2), round(min(y, height - 1.0), 2)] for _, (y, x) in found[:MAX_POINTS]
    ]


def for_page(suggestion: Suggestion, config: Config) -> dict[str, Any]:
    """Returns what the page shows of a suggestion: {"lines": what it says in words, "answer": its fields}."""
    absent, lines = [], []
    for kind in config.kinds:
        _tell(kind.name, suggestion.get(f"{kind.name}_points"), "point", lines, absent)
    if config.words:
        labels = suggestion.get("token_labels")
        wrong = None if labels is None else [label for label in labels if label == feedback.MISALIGNED]
        _tell("misaligned words", wrong, "word", lines, absent)
    ratings = suggestion.get("ratings", {})
    absent += [scale.name for scale in config.scales if scale.name not in ratings]
    if absent:
        lines.append(f"It doesn't say: {', '.join(absent)}.")
    answer = {f"{kind}_points": suggestion.get(f"{kind}_points", []) for kind in feedback.HEATMAPS}
    answer |= {"token_labels": suggestion.get("token_labels", []), "ratings": ratings}
    return {"lines": lines, "answer": answer}


def _tell(part: str, marks: list | None, unit: str, lines: list[str], absent: list[str]) -> None:
    """Adds a line on the marks of a part, or its name to those of which the suggestion says nothing."""
    if marks is None:
        absent.append(part)
    else:
        lines.append(f"{part}: {len(marks) or 'no'} {unit}{'s' * (len(marks) > 1)}")
