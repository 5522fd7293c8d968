"""Writes the files of a prediction run. The run may be killed at any moment and continued.

    OUT/predictions.jsonl   one line for each image, in input order
    OUT/errors.jsonl        one line for each image that could not be scored: {"id", "reason"}
    OUT/heatmaps/ID.KIND.png, or OUT/heatmaps.npz; OUT/overlays/ID.KIND.png; OUT/report.html
    OUT/run.json            the command's arguments, and how far the run is

Once a second, the lines and pictures of the batches are brought to the disk; then run.json is replaced in one
step. So everything that run.json tells of is there, even after a power cut. A run that continues cuts the two
.jsonl files to the sizes in run.json, and writes other files again, with the same bytes.
"""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import os
import pathlib
import shutil
import time
import urllib.parse
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from richhf_jax import errors, locking, writing
from richhf_jax.pages import gallery, overlay
from richhf_jax.predict.predictor import Prediction

PREDICTIONS, ERRORS, STATE = "predictions.jsonl", "errors.jsonl", "run.json"
HEATMAPS_FILE = "heatmaps.npz"
HEATMAP_FORMATS = ("png", "npz", "none")
# Most cards of a report; more make a page slow. It shows the first.
MAX_CARDS = 5000

# Longest file name, and longest relative path, in bytes. Most file systems take names of 255 bytes.
_MAX_NAME = 200
_MAX_PATH = 1000
# Bringing files to the disk takes some 20 ms, as long as a small batch.
_SAVE_SECONDS = 1
_PARTS, _PICTURES = "heatmaps.parts", "report"
_PNG = b"\x89PNG"


@dataclasses.dataclass
class Progress:
    """The progress of a run.

    Attributes:
      position: number of the first record that isn't done, counted over all inputs.
      predictions, errors: numbers of lines written so far.
      predictions_bytes, errors_bytes: sizes of the two files.
      done: whether everything is written, the report included.
    """

    position: int
    predictions: int = 0
    errors: int = 0
    predictions_bytes: int = 0
    errors_bytes: int = 0
    done: bool = False


@dataclasses.dataclass(frozen=True)
class Scored:
    """A record's prediction.

    Attributes:
      position: the record's position in all inputs.
      prediction: the prediction.
      places: kind -> path of the heatmap, as `save_pictures` returns it.
    """

    position: int
    prediction: Prediction
    places: Mapping[str, str]


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
          errors.UserError: the directory holds something else, or a run with other arguments.
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
            stack.enter_context(locking.held(self._out, "--out"))
            progress = self._read_state()
            if progress is None:  # What a run left that was killed in its first batch is of no account.
                shutil.rmtree(self._out / _PARTS, ignore_errors=True)
            self.progress = progress or Progress(first)
            self._write_state()
            self._files = {
                PREDICTIONS: stack.enter_context(self._open(PREDICTIONS, self.progress.predictions_bytes)),
                ERRORS: stack.enter_context(self._open(ERRORS, self.progress.errors_bytes)),
            }
            self._opened = stack.pop_all()

    def __enter__(self) -> "PredictionFiles":
        return self

    def __exit__(self, *args) -> None:
        with self._opened, contextlib.suppress(OSError):
            if not self.progress.done:  # Stopped: what is done needn't be done again.
                self._save_progress()

    def _read_state(self) -> Progress | None:
        path = self._out / STATE
        if not path.exists():
            names = {entry.name for entry in self._out.iterdir()} - {f".{STATE}.new", *locking.FILES}
            if entries := sorted(names):
                raise errors.UserError(
                    f"{self._out} holds {entries[0]!r}, but no run to continue: name a new --out"
                )
            return None
        try:
            state = json.loads(path.read_text())
            arguments, progress = state["arguments"], Progress(**state["progress"])
        except (ValueError, TypeError, KeyError) as error:
            raise errors.UserError(f"{path} is damaged ({error}): name a new --out") from error
        if not progress.predictions:  # There is nothing to lose: begin again, even with other arguments.
            return None
        was = arguments.get("checkpoint")
        again = "the same command" if was == self._arguments["checkpoint"] else f"--checkpoint={was}"
        fix = f"Give {again} to continue, or another --out"
        writing.check_same_run(self._out, arguments, self._arguments, fix)
        return progress

    def _write_state(self) -> None:
        state = {"arguments": self._arguments, "progress": dataclasses.asdict(self.progress)}
        writing.write(self._out / STATE, json.dumps(state, indent=2) + "\n")
        self._saved_at = time.monotonic()

    def _open(self, name: str, size: int) -> BinaryIO:
        path = self._out / name
        path.touch()
        if path.stat().st_size < size:
            raise errors.UserError(f"{path} has lost lines that {STATE} knows of: name a new --out")
        os.truncate(path, size)
        return path.open("ab")

    def save_pictures(self, position: int, prediction: Prediction) -> dict[str, str]:
        """Writes an image's pictures. Returns kind -> path of its heatmap, relative to the directory."""
        name, places = file_name(prediction.id), {}
        for kind, heatmap in prediction.heatmaps.items():
            if self._heatmaps == "png":
                places[kind] = f"heatmaps/{name}.{kind}.png"
                self._save(places[kind], overlay.grey_png(heatmap))
            elif self._heatmaps == "npz":
                places[kind] = f"{HEATMAPS_FILE}#{name}/{kind}"
            if self._overlays:
                self._save(f"overlays/{name}.{kind}.png", overlay.png(prediction.overlay(kind)))
        # A page shows no more images. A batch is always written at the same number of predictions.
        if self._with_report and self.progress.predictions < MAX_CARDS:
            image, maps = gallery.card_pictures(prediction.image, prediction.heatmaps)
            self._save(f"{_PICTURES}/{position}.{'png' if image.startswith(_PNG) else 'jpg'}", image)
            for kind, picture in maps.items():
                self._save(f"{_PICTURES}/{position}.{kind}.png", picture)
        return places

    def _save(self, place: str, content: bytes) -> None:
        path = self._out / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def commit(self, position: int, results: Sequence[Scored | Failure]) -> None:
        """Appends results to the files and brings them to the disk.

        Args:
          position: the position of the next record, which isn't done.
          results: the results of the records before it that are not written yet, in the records' order.
        """
        scored = [result for result in results if isinstance(result, Scored)]
        failures = [result for result in results if isinstance(result, Failure)]
        lines = {
            PREDICTIONS: [_line(result) for result in scored],
            ERRORS: [dataclasses.asdict(result) for result in failures],
        }
        if self._heatmaps == "npz" and scored:
            arrays: dict[str, Any] = {
                f"{file_name(result.prediction.id)}/{kind}": np.float16(heatmap)
                for result in scored
                for kind, heatmap in result.prediction.heatmaps.items()
            }
            buffer = io.BytesIO()
            np.savez(buffer, **arrays)
            self._save(f"{_PARTS}/{self.progress.position:012}.npz", buffer.getvalue())
        for name, entries in lines.items():
            file = self._files[name]
            file.write("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries).encode())
            file.flush()
        self.progress = dataclasses.replace(
            self.progress,
            position=position,
            predictions=self.progress.predictions + len(scored),
            errors=self.progress.errors + len(failures),
            predictions_bytes=self._files[PREDICTIONS].tell(),
            errors_bytes=self._files[ERRORS].tell(),
        )
        if time.monotonic() - self._saved_at >= _SAVE_SECONDS:
            self._save_progress()

    def _save_progress(self) -> None:
        """Brings to the disk what is written, then what run.json tells of it."""
        os.sync()  # One call for the pictures and their folders is cheaper than thousands of fsync.
        for file in self._files.values():
            os.fsync(file.fileno())  # Unlike sync, fsync tells of errors.
        self._write_state()

    def finish(self, title: str) -> None:
        """Writes the files that hold all images: heatmaps.npz and report.html."""
        if not self.progress.done:
            if self._heatmaps == "npz":
                self._join_parts()
            if self._with_report:
                self._write_report(title)
            self.progress.done = True
            self._save_progress()
        # The parts go last, because a run that is killed above needs them again.
        shutil.rmtree(self._out / _PARTS, ignore_errors=True)
        if self.progress.predictions <= gallery.MAX_EMBEDDED:
            shutil.rmtree(self._out / _PICTURES, ignore_errors=True)

    def _join_parts(self) -> None:
        with writing.atomic(self._out / HEATMAPS_FILE) as new, zipfile.ZipFile(new, "w") as joined:
            for path in sorted((self._out / _PARTS).glob("*.npz")):
                with zipfile.ZipFile(path) as part:
                    for info in part.infolist():
                        with part.open(info) as source, joined.open(info, "w", force_zip64=True) as target:
                            shutil.copyfileobj(source, target)

    def _write_report(self, title: str) -> None:
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
        )

    def _lines(self, count: int) -> Iterator[dict[str, Any]]:
        with (self._out / PREDICTIONS).open("rb") as file:
            yield from map(json.loads, itertools.islice(file, count))

    def failures(self, count: int) -> list[dict[str, str]]:
        """Returns the first `count` lines of errors.jsonl."""
        with (self._out / ERRORS).open("rb") as file:
            return [json.loads(line) for line in itertools.islice(file, count)]

    def _card(self, line: Mapping[str, Any], embed: bool) -> gallery.Card:
        def uri(*names: str) -> str | None:
            """Returns the URI of the first of these pictures that exists, if one does."""
            name = next((name for name in names if (self._out / _PICTURES / name).exists()), None)
            if name is None or not embed:
                return name and f"{_PICTURES}/{name}"
            return gallery.data_uri((self._out / _PICTURES / name).read_bytes())

        number = line["position"]
        heatmaps = {kind: (peak, uri(f"{number}.{kind}.png")) for kind, peak in line["heatmap_peaks"].items()}
        image = uri(f"{number}.png", f"{number}.jpg") or ""
        return gallery.Card(line, tuple(line["image_size"]), image, heatmaps)


def file_name(name: str) -> str:
    """Returns a relative path for an id; different ids have different paths.

    Special characters are percent-encoded. "%" is put behind a folder's name that could be a picture's.

    >>> file_name("cats/1.png"), file_name("../a b?.png"), file_name("a.png/b")
    ('cats/1.png', '%2E%2E/a b%3F.png', 'a.png%/b')
    """
    quoted = [urllib.parse.quote(part, safe=" ,()[]+=@~") for part in name.split("/")]
    *folders, last = [part.replace(".", "%2E") if set(part) <= {"."} else part for part in quoted]
    folders = [f"{part}%" if not part or part.endswith(".png") else part for part in folders]
    path = "/".join(map(_short, [*folders, last or "%"]))
    return path if len(path) <= _MAX_PATH else _short(path.replace("/", "%2F"))


def _short(part: str) -> str:
    if len(part) <= _MAX_NAME:
        return part
    return f"{part[:100]}%{hashlib.sha256(part.encode()).hexdigest()[:32]}"


def _line(result: Scored) -> dict[str, Any]:
    """Returns a line of predictions.jsonl."""
    prediction = result.prediction
    height, width = prediction.image.shape[:2]
    return {
        **prediction.to_dict(),
        "heatmaps": dict(result.places),
        "heatmap_peaks": {kind: float(heatmap.max()) for kind, heatmap in prediction.heatmaps.items()},
        "image_size": [width, height],
        "position": result.position,
    }
