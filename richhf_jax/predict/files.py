"""Writes the files of a prediction run. The run may be killed at any moment and continued.

    OUT/predictions.jsonl   one line for each image, in input order
    OUT/errors.jsonl        one line for each image that could not be scored: {"id", "reason"}
    OUT/heatmaps/ID.KIND.png, or OUT/heatmaps.npz; OUT/overlays/ID.KIND.png; OUT/report.html
    OUT/order.csv           only if the model predicts uncertainties, see `order`
    OUT/run.json            the command's arguments, and how far the run is

Once a second, the lines and pictures of the batches are brought to the disk; then run.json is replaced in one
step. So everything that run.json tells of is there, even after a power cut. A run that continues checks that,
cuts the two .jsonl files to the sizes in run.json, and writes other files again, with the same bytes.
"""

import contextlib
import dataclasses
import io
import itertools
import json
import os
import pathlib
import shutil
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO, cast

import numpy as np
from PIL import Image

from richhf_jax import errors, locking, writing
from richhf_jax.pages import gallery, overlay
from richhf_jax.predict import order
from richhf_jax.predict.names import file_name
from richhf_jax.predict.predictor import Prediction
from richhf_jax.predict.progress import ERRORS, KEPT_SAVES, PREDICTIONS, STATE, UNKNOWN, Progress, whole_saves

HEATMAPS_FILE = "heatmaps.npz"
HEATMAP_FORMATS = ("png", "npz", "none")
# Most cards of a report; more make a page slow. It shows the first.
MAX_CARDS = 5000

# Bringing files to the disk takes some 20 ms, as long as a small batch.
_SAVE_SECONDS = 1
_PARTS, _PICTURES = "heatmaps.parts", "report"
_PNG, _JPEG_END = b"\x89PNG", b"\xff\xd9"
# Least that a disk leaves unwritten, as zeros.
_SECTOR = bytes(512)


@dataclasses.dataclass(frozen=True)
class Scored:
    """A record's line of predictions.jsonl, whose pictures are written."""

    line: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Failure:
    """A record that can't be scored, and the reason."""

    id: str
    reason: str


class PredictionFiles:
    """The files of one run; a context manager that closes them. Only `save_pictures` is thread-safe."""

    def __init__(
        self,
        out: str,
        arguments: Mapping[str, Any],
        first: int,
        heatmaps: str = "png",
        overlays: bool = False,
        with_report: bool = False,
    ):
        """Opens a new run, or one to continue.

        Args:
          out: the directory; it is made if it doesn't exist.
          arguments: everything that the predictions depend on; a run continues only with the same arguments.
          first: position of the run's first record, counted over all inputs.
          heatmaps: one of `HEATMAP_FORMATS`.
          overlays: whether to write the images with heatmaps laid over.
          with_report: whether to write report.html.

        Raises:
          errors.UserError: the directory holds something else, or a run with other arguments; another
            process writes to it.
          OSError: the directory can't be written.
        """
        self._out = pathlib.Path(out)
        self._arguments = dict(arguments) | {
            "heatmaps": heatmaps,
            "overlay": overlays,
            "report": with_report,
        }
        self._heatmaps, self._overlays, self._with_report = heatmaps, overlays, with_report
        with contextlib.ExitStack() as stack:
            self._lock = stack.enter_context(locking.held(self._out, "--out"))
            self._saves = self._read_state() or [Progress(first)]
            self.progress = self._saves[-1]
            self._write_state()
            self._predictions = stack.enter_context(self._open(PREDICTIONS, self.progress.predictions_bytes))
            self._errors = stack.enter_context(self._open(ERRORS, self.progress.errors_bytes))
            self._opened = stack.pop_all()

    def __enter__(self) -> "PredictionFiles":
        return self

    def __exit__(self, *args) -> None:
        with self._opened, contextlib.suppress(OSError):
            if not self.progress.done:  # Stopped: what is done needn't be done again.
                self._save_progress()

    def _read_state(self) -> list[Progress]:
        """Returns the progress at the last saves up to the one to continue from; [] for a new run."""
        path = self._out / STATE
        if not path.exists():
            names = {entry.name for entry in self._out.iterdir()} - {f".{STATE}.new", *locking.FILES}
            if entries := sorted(names):
                raise errors.UserError(
                    f"{self._out} holds {entries[0]!r}, but no run to continue: name a new --out"
                )
            return []
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            arguments = state["arguments"]
            saves = [Progress.of_json(save) for save in (*state.get("earlier", ()), state["progress"])]
        except (ValueError, TypeError, KeyError) as error:
            raise errors.UserError(f"{path} is damaged ({error}): name a new --out") from error
        if not saves[-1].predictions:  # There is nothing to lose: begin again, even with other arguments.
            return []
        was = arguments.get("checkpoint")
        again = "the same command" if was == self._arguments["checkpoint"] else f"--checkpoint={was}"
        size = arguments.get("batch_size")
        # The default depends on the free memory.
        sized = f", with --batch-size={size}" if size != self._arguments.get("batch_size") else ""
        fix = f"Give {again} to continue{sized}, or another --out"
        # Older versions recorded the model's path alone, or no calibration beside the checksum.
        known = {name: self._arguments.get(name) for name in ("model", "calibration")} | arguments
        writing.check_same_run(self._out, known, self._arguments, fix)
        if self._heatmaps == "npz" and not saves[-1].done and saves[-1].predictions_crc32c == UNKNOWN:
            raise errors.UserError(
                f"{self._out} holds a run of an older version, which kept its heatmaps otherwise until"
                f" {HEATMAPS_FILE} was made: finish it with that version, or name a new --out"
            )
        return self._whole(saves)

    def _whole(self, saves: list[Progress]) -> list[Progress]:
        """Returns the saves up to the last one that the files hold; see `progress.whole_saves`."""
        for name in (PREDICTIONS, ERRORS):
            (self._out / name).touch()
        whole = whole_saves(self._out, saves, self._has_pictures)
        if lost := saves[-1].position - whole[-1].position:
            print(
                f"{self._out}: the results of the last {lost:,} records are damaged, as a power cut may leave"
                " them; they are made again",
                file=sys.stderr,
            )
        return whole

    def _has_pictures(self, number: int, line: Mapping[str, Any]) -> bool:
        """Tells whether the pictures of a line of predictions.jsonl are as they were written."""
        position, peaks = line["position"], line.get("heatmap_peaks", {})
        heatmaps = {kind: f"heatmaps/{file_name(line['id'])}.{kind}.png" for kind in peaks}
        places = []
        if self._heatmaps == "png":
            heatmaps = line["heatmaps"]
            places += heatmaps.values()
        elif self._heatmaps == "npz":
            places.append(_part(position))
        if self._overlays:
            places += [_overlay(place) for place in heatmaps.values()]
        if self._with_report and number < MAX_CARDS:
            places.append(self._first(f"{_PICTURES}/{position}.png", f"{_PICTURES}/{position}.jpg") or "")
            places += [f"{_PICTURES}/{position}.{kind}.png" for kind, peak in peaks.items() if peak]
        return all(_is_whole(self._out / place) for place in places)

    def _write_state(self) -> None:
        state = {
            "arguments": self._arguments,
            "progress": dataclasses.asdict(self.progress),
            "earlier": [dataclasses.asdict(save) for save in self._saves[:-1] if not self.progress.done],
        }
        writing.write(self._out / STATE, json.dumps(state, indent=2, allow_nan=False) + "\n")
        self._saved_at = time.monotonic()

    def _open(self, name: str, size: int) -> BinaryIO:
        path = self._out / name
        path.touch()
        os.truncate(path, size)
        return path.open("ab")

    def save(self, position: int, name: str, prediction: Prediction) -> Scored:
        """Writes an image's pictures, and makes its line.

        Args:
          position: the record's position in all inputs.
          name: the image's file name, see `names.FileNames`.
          prediction: the prediction.
        """
        # A page shows no more images. A batch is always written at the same number of predictions.
        has_card = self._with_report and self.progress.predictions < MAX_CARDS
        image = prediction.image if has_card or self._overlays else None
        places = {}
        for kind, heatmap in prediction.heatmaps.items():
            place = f"heatmaps/{name}.{kind}.png"
            if self._heatmaps == "png":
                places[kind] = place
                self._save(place, overlay.grey_png(heatmap))
            elif self._heatmaps == "npz":
                places[kind] = f"{HEATMAPS_FILE}#{name}/{kind}"
            if self._overlays and image is not None:
                self._save(_overlay(place), overlay.png(overlay.draw(image, heatmap)))
        if self._heatmaps == "npz":
            halves = {f"{name}/{kind}": np.float16(heat) for kind, heat in prediction.heatmaps.items()}
            np.savez(self._place(_part(position)), **cast(Any, halves))
        if has_card and image is not None:
            card, maps = gallery.card_pictures(image, prediction.heatmaps)
            self._save(f"{_PICTURES}/{position}.{'png' if card.startswith(_PNG) else 'jpg'}", card)
            for kind, picture in maps.items():
                self._save(f"{_PICTURES}/{position}.{kind}.png", picture)
        return Scored(_line(position, prediction, places))

    def _save(self, place: str, content: bytes) -> None:
        self._place(place).write_bytes(content)

    def _place(self, place: str) -> pathlib.Path:
        """Returns the path of a file, whose folder it makes; but never OUT, which may have been deleted."""
        _, *folders = reversed(pathlib.PurePath(place).parents)
        for folder in folders:
            (self._out / folder).mkdir(exist_ok=True)
        return self._out / place

    def commit(self, position: int, results: Sequence[Scored | Failure]) -> None:
        """Appends results to the files and brings them to the disk.

        Args:
          position: the position of the next record, which isn't done.
          results: the results of the records before it that are not written yet, in the records' order.
        """
        scored = [result.line for result in results if isinstance(result, Scored)]
        failed = [dataclasses.asdict(result) for result in results if isinstance(result, Failure)]
        progress, predictions, failures = self.progress.after(position, scored, failed)
        for file, lines in ((self._predictions, predictions), (self._errors, failures)):
            file.write(lines)
            file.flush()
        self.progress = progress
        if time.monotonic() - self._saved_at >= _SAVE_SECONDS:
            self._save_progress()

    def _save_progress(self) -> None:
        """Brings to the disk what is written, then what run.json tells of it.

        Raises:
          errors.UserError: the directory was deleted, moved or emptied.
        """
        self._lock.check()
        os.sync()  # One call for the pictures and their folders is cheaper than thousands of fsync.
        for file in (self._predictions, self._errors):
            os.fsync(file.fileno())  # Unlike sync, fsync tells of errors.
        self._saves = [*self._saves, self.progress][-KEPT_SAVES:]
        self._write_state()

    def finish(self, title: str, score_range: tuple[float, float] = (0, 1)) -> None:
        """Writes the files that hold all images: heatmaps.npz, report.html and order.csv.

        Args:
          title: the headline of report.html.
          score_range: the model's `feedback.Outputs.score_range`.

        Raises:
          errors.UserError: the directory was deleted, moved or emptied.
        """
        self._lock.check()
        if not self.progress.done:
            if self._heatmaps == "npz":
                self._join_parts()
            if self._with_report:
                self._write_report(title, score_range)
            order.write(self._out / order.FILE, self._out / PREDICTIONS, self.progress.predictions)
            self.progress = dataclasses.replace(self.progress, done=True)
            self._save_progress()
        # The parts go last, because a run that is killed above needs them again.
        shutil.rmtree(self._out / _PARTS, ignore_errors=True)
        if self.progress.predictions <= gallery.MAX_EMBEDDED:
            shutil.rmtree(self._out / _PICTURES, ignore_errors=True)

    def _join_parts(self) -> None:
        with writing.atomic(self._out / HEATMAPS_FILE) as new, zipfile.ZipFile(new, "w") as joined:
            for line in self._lines(self.progress.predictions):
                path = self._out / _part(line["position"])
                if not _is_whole(path):
                    raise errors.UserError(f"{path} is missing or damaged: name a new --out")
                with zipfile.ZipFile(path) as part:
                    for info in part.infolist():
                        with part.open(info) as source, joined.open(info, "w", force_zip64=True) as target:
                            shutil.copyfileobj(source, target)

    def _write_report(self, title: str, score_range: tuple[float, float]) -> None:
        count = self.progress.predictions
        shown = min(count, MAX_CARDS)
        embed = count <= gallery.MAX_EMBEDDED
        details = {"images": count if shown == count else f"the first {shown:,} of {count:,}"}
        details |= {"model": self._arguments["checkpoint"]}
        gallery.write_gallery(
            self._out / "report.html",
            title,
            (self._card(line, embed) for line in self._lines(shown)),
            details,
            score_range,
        )

    def _lines(self, count: int) -> Iterator[dict[str, Any]]:
        with (self._out / PREDICTIONS).open("rb") as file:
            yield from map(json.loads, itertools.islice(file, count))

    def failures(self) -> Iterator[dict[str, str]]:
        """Yields the lines of errors.jsonl."""
        with (self._out / ERRORS).open("rb") as file:
            yield from map(json.loads, file)

    def _card(self, line: Mapping[str, Any], embed: bool) -> gallery.Card:
        def uri(*places: str) -> str | None:
            """Returns the URI of the first of these pictures that exists, if one does."""
            place = self._first(*places)
            return gallery.data_uri((self._out / place).read_bytes()) if place and embed else place

        stem = f"{_PICTURES}/{line['position']}"
        peaks = line.get("heatmap_peaks", {})
        heatmaps = {kind: (peak, uri(f"{stem}.{kind}.png")) for kind, peak in peaks.items()}
        image = uri(f"{stem}.png", f"{stem}.jpg") or ""
        return gallery.Card(line, tuple(line["image_size"]), image, heatmaps)

    def _first(self, *places: str) -> str | None:
        """Returns the first of these files that exists, if one does."""
        return next((place for place in places if (self._out / place).exists()), None)


def _part(position: int) -> str:
    """Returns the place of the heatmaps of one image, until all are in one file."""
    return f"{_PARTS}/{position:012}.npz"


def _overlay(heatmap: str) -> str:
    """Returns the place of the overlay that belongs to a heatmap's place."""
    return heatmap.replace("heatmaps/", "overlays/", 1)


def _is_whole(path: pathlib.Path) -> bool:
    """Tells whether a picture or a part is as it was written; a power cut may leave zeros, or nothing."""
    try:
        if path.suffix == ".npz":
            with zipfile.ZipFile(path) as part:
                return part.testzip() is None
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as picture:
            picture.verify()  # A PNG has checksums; a JPEG has no longer rows of zeros.
            return picture.format == "PNG" or (data.endswith(_JPEG_END) and _SECTOR not in data)
    except Exception:  # Pillow raises many types.
        return False


def _line(position: int, prediction: Prediction, places: Mapping[str, str]) -> dict[str, Any]:
    """Returns a line of predictions.jsonl."""
    height, width = prediction.size
    line = prediction.to_dict()
    if prediction.heatmaps:
        peaks = {kind: float(heatmap.max()) for kind, heatmap in prediction.heatmaps.items()}
        line |= {"heatmaps": dict(places), "heatmap_peaks": peaks}
    return {**line, "image_size": [width, height], "position": position}
