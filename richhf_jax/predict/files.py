"""The files of a prediction run, such that it may be killed at any moment and continued.

    OUT/predictions.jsonl   a line an image, in input order
    OUT/errors.jsonl        a line an image that could not be scored: {"id", "reason"}
    OUT/heatmaps/ID.KIND.png, or OUT/heatmaps.npz; OUT/overlays/ID.KIND.png; OUT/report.html
    OUT/run.json            what was asked for, and how far the run is

Once a second, what the batches gave is brought to the disk, pictures too; then run.json is replaced in one
step. So all that run.json tells of is there, also after a power cut. A run that continues cuts the two .jsonl
files to the sizes in run.json; other files it writes again, with the same bytes.
"""

import contextlib
import dataclasses
import fcntl
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

from richhf_jax import errors, writing
from richhf_jax.pages import gallery, overlay
from richhf_jax.predict.predictor import Prediction

PREDICTIONS, ERRORS, STATE = "predictions.jsonl", "errors.jsonl", "run.json"
HEATMAPS_FILE = "heatmaps.npz"
HEATMAP_FORMATS = ("png", "npz", "none")
# More cards than these make a page slow: it shows the first.
MAX_CARDS = 5000

# Of a file name; most file systems take 255 bytes.
_MAX_NAME = 200
_MAX_PATH = 1000
# Bringing files to the disk takes some 20 ms, as long as a small batch.
_SAVE_SECONDS = 1
_PARTS, _PICTURES = "heatmaps.parts", "report"
_PNG = b"\x89PNG"


@dataclasses.dataclass
class Progress:
    """How far a run is.

    Attributes:
      position: the first record that isn't done, among all of the inputs.
      predictions, errors: lines so far.
      predictions_bytes, errors_bytes: sizes of the two files.
      done: whether all is written, the report included.
    """

    position: int
    predictions: int = 0
    errors: int = 0
    predictions_bytes: int = 0
    errors_bytes: int = 0
    done: bool = False


@dataclasses.dataclass(frozen=True)
class Scored:
    """A record's prediction, its position, and where `save_pictures` put its heatmaps."""

    position: int
    prediction: Prediction
    places: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Failure:
    """A record that can't be scored, and why."""

    id: str
    reason: str


class PredictionFiles:
    """The files of one run, a context that closes them. Not thread-safe but for `save_pictures`."""

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
          out: the directory; made where it isn't there.
          arguments: what the predictions depend on; a run continues with the same only.
          first: the position of the first record.
          heatmaps: one of `HEATMAP_FORMATS`.
          overlays: whether to write the images with heatmaps laid over.
          with_report: whether to write a page.

        Raises:
          errors.UserError: the directory holds something else, or a run with other arguments.
          OSError: it can't be written.
        """
        self._out = pathlib.Path(out)
        self._arguments = dict(arguments) | {
            "heatmaps": heatmaps,
            "overlay": overlays,
            "report": with_report,
        }
        self._heatmaps, self._overlays, self._with_report = heatmaps, overlays, with_report
        with contextlib.ExitStack() as stack:
            self._out.mkdir(parents=True, exist_ok=True)
            stack.callback(os.close, _locked(self._out))
            self.progress = self._read_state() or Progress(first)
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
            if entries := sorted({entry.name for entry in self._out.iterdir()} - {f".{STATE}.new"}):
                raise errors.UserError(
                    f"{self._out} holds {entries[0]!r}, but no run to continue: name a new --out"
                )
            return None
        try:
            state = json.loads(path.read_text())
            arguments, progress = state["arguments"], Progress(**state["progress"])
        except (ValueError, TypeError, KeyError) as error:
            raise errors.UserError(f"{path} is damaged ({error}): name a new --out") from error
        if not progress.predictions:  # Nothing to lose: it begins anew, maybe with other arguments.
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
        """Writes an image's pictures. Returns kind -> where its heatmap is, relative to the directory."""
        name, places = file_name(prediction.id), {}
        for kind, heatmap in prediction.heatmaps.items():
            if self._heatmaps == "png":
                places[kind] = f"heatmaps/{name}.{kind}.png"
                self._save(places[kind], overlay.grey_png(heatmap))
            elif self._heatmaps == "npz":
                places[kind] = f"{HEATMAPS_FILE}#{name}/{kind}"
            if self._overlays:
                self._save(f"overlays/{name}.{kind}.png", overlay.png(prediction.overlay(kind)))
        # A page shows no more; the number is the same whenever a batch is written.
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
        """Appends what the records up to a position gave, in their order; the position is the next one's."""
        scored = [result for result in results if isinstance(result, Scored)]
        failures = [result for result in results if isinstance(result, Failure)]
        lines = {
            PREDICTIONS: [_line(result) for result in scored],
            ERRORS: [dataclasses.asdict(result) for result in failures],
        }
        if self._heatmaps == "npz" and scored:
            arrays = {
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
        os.sync()  # The pictures and their folders: one call is cheaper than thousands of fsync.
        for file in self._files.values():
            os.fsync(file.fileno())  # This one, unlike sync, tells of errors.
        self._write_state()

    def finish(self, title: str) -> None:
        """Writes what is of all images: heatmaps.npz, report.html."""
        if not self.progress.done:
            if self._heatmaps == "npz":
                self._join_parts()
            if self._with_report:
                self._write_report(title)
            self.progress.done = True
            self._save_progress()
        # Only now: a run that was killed above does it again.
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
        """The first lines of errors.jsonl."""
        with (self._out / ERRORS).open("rb") as file:
            return [json.loads(line) for line in itertools.islice(file, count)]

    def _card(self, line: Mapping[str, Any], embed: bool) -> gallery.Card:
        def uri(*names: str) -> str | None:
            """Of the one that is there, if any is."""
            name = next((name for name in names if (self._out / _PICTURES / name).exists()), None)
            if name is None or not embed:
                return name and f"{_PICTURES}/{name}"
            return gallery.data_uri((self._out / _PICTURES / name).read_bytes())

        number = line["position"]
        heatmaps = {kind: (peak, uri(f"{number}.{kind}.png")) for kind, peak in line["heatmap_peaks"].items()}
        image = uri(f"{number}.png", f"{number}.jpg")
        return gallery.Card(line, tuple(line["image_size"]), image, heatmaps)


def _locked(directory: pathlib.Path) -> int:
    """Takes the directory for this process: as long as the descriptor is open, or the process lives."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise errors.UserError(f"another process writes to {directory}") from error
    return descriptor


def file_name(name: str) -> str:
    """An id -> a relative path of its own: what isn't plain is percent-encoded, and "%" ends a folder's name
    that could be a picture's.

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
    """A line of predictions.jsonl."""
    prediction = result.prediction
    height, width = prediction.image.shape[:2]
    return {
        **prediction.to_dict(),
        "heatmaps": dict(result.places),
        "heatmap_peaks": {kind: float(heatmap.max()) for kind, heatmap in prediction.heatmaps.items()},
        "image_size": [width, height],
        "position": result.position,
    }
