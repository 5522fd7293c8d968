"""Consolidates the raw ratings of several raters into one RichHF-18K record per image.

The rules are those of "Rich Human Feedback for Text-to-Image Generation", section 3:
  scores    mean of the raters' standardised ratings, (rating - 1) / 4;
  heatmaps  a rater's heatmap is the union of disks around the marked points, with a radius of 1/20 of the
            image's height; the record's is the mean over the raters, quantised to 8 bits;
  keywords  majority vote on each token; a tie of an even number of raters counts as aligned.
"""

import argparse
import collections
import dataclasses
import errno
import functools
import io
import math
import pathlib
import sys
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from PIL import Image

from richhf_jax import errors, feedback, reading, writing
from richhf_jax.datasets import ratings, tfrecord
from richhf_jax.inputs.record import bounded_lines

EPILOG = f"""\
Schema of RAW.jsonl

{ratings.__doc__}

OUT.tfrecord holds one tf.train.Example per image, in the order in which the images first appear, with
RichHF-18K's eight fields: {feedback.FILENAME_FIELD}; {", ".join(feedback.SCORE_FIELDS.values())} (float,
0 to 1); {", ".join(feedback.HEATMAP_FIELDS.values())} (8-bit greyscale PNG of the image's size);
{feedback.KEYWORDS_FIELD} ("1 0 1").
"""


def point_heatmap(points: Sequence[ratings.Point], height: int, width: int, radius: float) -> np.ndarray:
    """Draws the union of disks around points: all pixels (column, row) at most `radius` from a point.

    A point (x, y) with whole numbers is the middle of the pixel in column x and row y.

    Args:
      points: (x, y) in pixels, x to the right, y down.
      height, width: the image's size, in pixels.
      radius: the disks' radius, in pixels.

    Returns:
      bool [height, width].
    """
    heatmap = np.zeros((height, width), bool)
    if not points:
        return heatmap
    # Squared distances along each axis, [points, columns] and [points, rows].
    across, down = (
        (np.arange(size) - middles[:, None]) ** 2
        for size, middles in zip((width, height), np.array(points, float).T, strict=True)
    )
    for (x, y), columns, rows in zip(points, across, down, strict=True):
        top, bottom = max(0, math.ceil(y - radius)), math.floor(y + radius) + 1
        left, right = max(0, math.ceil(x - radius)), math.floor(x + radius) + 1
        window = heatmap[top:bottom, left:right]
        window |= rows[top:bottom, None] + columns[left:right] <= radius**2
    return heatmap


def mean_heatmap(heatmaps: Iterable[np.ndarray]) -> np.ndarray:
    """Averages raters' heatmaps, bool [height, width], to uint8 [height, width]; 255 = marked by all."""
    count, total = 0, np.zeros((), np.uint32)
    for heatmap in heatmaps:  # They may be large: one by one.
        count, total = count + 1, total + heatmap
    return np.rint(total / count * 255).astype(np.uint8)


def consolidated_heatmap(
    points: Iterable[Sequence[ratings.Point]], height: int, width: int, radius: float
) -> np.ndarray:
    """Averages the heatmaps of raters' points; see `point_heatmap` and `mean_heatmap`.

    Args:
      points: each rater's points.
      height, width, radius: as for `point_heatmap`.

    Returns:
      uint8 [height, width].
    """
    return mean_heatmap(point_heatmap(given, height, width, radius) for given in points)


def majority_labels(labels: Sequence[Sequence[int]]) -> list[int]:
    """Takes a majority vote of the raters on each token; a tie is aligned.

    >>> majority_labels([[1, 0, 1], [1, 0, 0]])
    [1, 0, 1]
    """
    return [
        feedback.ALIGNED if 2 * sum(votes) >= len(votes) else feedback.MISALIGNED
        for votes in zip(*labels, strict=True)
    ]


def encode_png(image: np.ndarray) -> bytes:
    """Encodes uint8 [height, width] or [height, width, 3] as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


@functools.lru_cache(maxsize=8)  # Half of all heatmaps are empty.
def _encode_empty(shape: tuple[int, int]) -> bytes:
    return encode_png(np.zeros(shape, np.uint8))


def consolidate(image_ratings: Sequence[ratings.Rating]) -> dict[str, str | float | bytes]:
    """Makes a record with RichHF-18K's eight fields from all ratings of one image.

    Raises:
      ValueError: there is no rating.
    """
    if not image_ratings:
        raise ValueError("an image needs at least one rating")
    first = image_ratings[0]
    radius = first.point_radius * first.height
    record: dict[str, str | float | bytes] = {feedback.FILENAME_FIELD: first.image_id}
    for kind, field in feedback.SCORE_FIELDS.items():
        record[field] = float(np.mean([feedback.standardise_rating(r.ratings[kind]) for r in image_ratings]))
    for kind, field in feedback.HEATMAP_FIELDS.items():
        points = (r.points[kind] for r in image_ratings)
        mean = consolidated_heatmap(points, first.height, first.width, radius)
        record[field] = encode_png(mean) if mean.any() else _encode_empty(mean.shape)
    labels = majority_labels([r.token_labels for r in image_ratings])
    record[feedback.KEYWORDS_FIELD] = feedback.format_labels(labels)
    return record


def group_by_image(lines: Iterable[ratings.Rating]) -> list[list[ratings.Rating]]:
    """Groups ratings by image, in the order in which the images first appear."""
    groups = collections.defaultdict(list)
    for rating in lines:
        groups[rating.image_id].append(rating)
    return list(groups.values())


def consolidate_lines(lines: Iterable[str | bytes]) -> list[dict[str, str | float | bytes]]:
    """Consolidates lines of raw ratings into records, one per image.

    Raises:
      ratings.RatingError: a line is bad; the message names it by its number.
    """
    good = []
    for number, rating in ratings.read_ratings(lines):
        if isinstance(rating, ratings.RatingError):
            raise ratings.RatingError(f"line {number}: {rating}")
        good.append(rating)
    return [consolidate(group) for group in group_by_image(good)]


@dataclasses.dataclass(frozen=True)
class Summary:
    """Counts of what was consolidated.

    Attributes:
      images: number of raters -> number of images with that many.
      lines: number of good lines.
      skipped: what is wrong with each line that was left out.
    """

    images: collections.Counter[int]
    lines: int
    skipped: list[str]

    def __str__(self) -> str:
        images = ", ".join(f"{n} with {raters} raters" for raters, n in sorted(self.images.items()))
        return f"{self.images.total()} images ({images}) from {self.lines} lines, {len(self.skipped)} skipped"


def write_tfrecord(records: Iterable[Mapping[str, str | float | bytes]], path: pathlib.Path) -> None:
    """Writes records as tf.train.Examples; `path` appears complete or not at all.

    Raises:
      OSError: the folder doesn't exist, or the file can't be written.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder", str(path.parent))
    with writing.atomic(path) as new, new.open("wb") as file:
        for record in records:
            tfrecord.write(file, tfrecord.serialize_example(record))


def consolidate_file(raw: pathlib.Path, out: pathlib.Path, on_error: str = "stop") -> Summary:
    """Consolidates a file of raw ratings into a TFRecord, which appears complete or not at all.

    Args:
      raw: JSON Lines, as `ratings` describes them.
      out: the TFRecord file, overwritten if it exists.
      on_error: what to do at a bad line, "stop" or "skip".

    Raises:
      errors.UserError: a line is bad (unless skipped), no line is good, a file can't be read or written, or
        both are the same file.
    """
    if out.exists() and raw.exists() and out.samefile(raw):
        raise errors.UserError(f"{out} is the file of raw ratings, which would be lost: name another OUT")
    good, skipped = [], []
    with writing.explained_disk_errors(out, f"Nothing written. {writing.FIX}"):
        with open(raw, "rb", opener=reading.regular) as file:
            for number, rating in ratings.read_ratings(bounded_lines(file)):
                if isinstance(rating, ratings.Rating):
                    good.append(rating)
                    continue
                skipped.append(f"{raw}:{number}: {rating}")
                if on_error == "stop":
                    raise errors.UserError(f"{skipped[0]}\nNothing written; see --on-error.")
        if not good:
            raise errors.UserError("\n".join([*skipped, f"{raw}: no good line. Nothing written."]))
        groups = group_by_image(good)
        write_tfrecord(map(consolidate, groups), out)
    return Summary(collections.Counter(map(len, groups)), lines=len(good), skipped=skipped)


@errors.command()
def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m richhf_jax.datasets.consolidate",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("raw", metavar="RAW.jsonl", type=pathlib.Path, help="raw ratings, one per line")
    parser.add_argument("out", metavar="OUT.tfrecord", type=pathlib.Path, help="overwritten if it exists")
    parser.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="at a bad line: stop and write nothing (default), or leave the line out and list it",
    )
    options = parser.parse_args(arguments)
    summary = consolidate_file(options.raw, options.out, options.on_error)
    for line in summary.skipped:
        print(f"skipped {line}", file=sys.stderr)
    print(f"{options.out}: {summary}")


if __name__ == "__main__":
    main()
