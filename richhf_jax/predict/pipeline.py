"""Scores records batch by batch and writes their predictions: the work of the command `predict`."""

import collections
import contextlib
import dataclasses
import functools
import itertools
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import jax
import numpy as np

from richhf_jax import checksums, errors, inputs
from richhf_jax.inputs import images as image_files
from richhf_jax.predict.files import Failure, PredictionFiles, Scored
from richhf_jax.predict.forward import PredictionError, Prepared
from richhf_jax.predict.names import FileNames
from richhf_jax.predict.predictor import RahfPredictor

# Number of batches that are read ahead, and of those that wait to be written. It keeps every stage busy.
_AHEAD = 3
# Most memory for the batches read ahead, and as much again for those that wait to be written.
_AHEAD_BYTES = 1 << 30
# Most memory for a batch's images at their own size; an image beyond its share of it is read twice.
_KEPT_BYTES = 1 << 27
# Most pixels decoded, or written, at the same time: those of one image of the largest size. Decoding takes up
# to 13 bytes a pixel, writing about 25.
_PIXELS = image_files.MAX_SIDE**2
# Added to the priority number of the threads that read, decode and write.
_NICENESS = 10


@dataclasses.dataclass(frozen=True)
class Numbered:
    """A record with its place among all inputs.

    Attributes:
      position: number of records before it, in all inputs.
      record: the record.
      file_name: the name of its files, see `names.FileNames`.
      again: whether an earlier record has the same id.
    """

    position: int
    record: inputs.Record
    file_name: str
    again: bool


class _Room:
    """Lets threads work on so many pixels at a time as there is memory for."""

    def __init__(self, pixels: int):
        self._pixels = self._left = pixels
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def take(self, pixels: int) -> Iterator[None]:
        """Waits until there is room for an image, and keeps it; a larger one waits until it is alone."""
        pixels = min(pixels, self._pixels)
        with self._changed:
            self._changed.wait_for(lambda: self._left >= pixels)
            self._left -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._left += pixels
                self._changed.notify_all()


def numbered(records: Iterable[inputs.Record], first: int, last: int) -> Iterator[Numbered]:
    """Yields the records from position `first` to before `last`; of earlier records it reads only the ids."""
    names = FileNames()
    for position, record in enumerate(itertools.islice(records, last)):
        name, again = names.add(record.id)
        if position >= first:
            yield Numbered(position, record, name, again)


def score(
    predictor: RahfPredictor, records: Iterator[Numbered], files: PredictionFiles, progress: Any, threads: int
) -> None:
    """Scores records batch by batch: threads read and decode, the device computes, threads write.

    A batch's content depends only on the records' positions, so a run that continues gives the same results.

    Args:
      predictor: the model.
      records: the records to score, from `files.progress.position` on.
      files: takes the results.
      progress: a progress bar; its `update(count)` is called with the number of records just done.
      threads: number of threads that read, decode and write.
    """
    batches = iter(lambda: list(itertools.islice(records, predictor.batch_size)), [])
    ready: collections.deque = collections.deque()
    written: collections.deque = collections.deque()
    failed, ahead, room = threading.Event(), _AHEAD, _Room(_PIXELS)

    def write(batch, results, outputs):
        if failed.is_set():  # Nothing may be written behind a batch that could not be written.
            return
        try:
            good = [pair for pair in zip(batch, results, strict=True) if isinstance(pair[1], Prepared)]
            save = functools.partial(_save, predictor, files, room, jax.device_get(outputs))
            saved = pool.map(save, range(len(good)), *zip(*good, strict=True)) if good else iter(())
            results = [result if isinstance(result, Failure) else next(saved) for result in results]
            files.commit(batch[-1].position + 1, results)
        except BaseException:
            failed.set()
            raise
        progress.update(len(batch))

    # One writer thread keeps the order; the pool writes the pictures.
    begin = _step_back if jax.default_backend() == "cpu" else None
    pools = (futures.ThreadPoolExecutor(count, initializer=begin) for count in (threads, 1))
    with next(pools) as pool, next(pools) as writer:
        try:
            for batch in itertools.chain(batches, [[]]):  # The empty one is the end.
                ready.append((batch, [pool.submit(_prepare, predictor, one, room) for one in batch]))
                while ready and (not batch or len(ready) > ahead):
                    next_batch, waiting = ready.popleft()
                    results = [one.result() for one in waiting]
                    prepared = [result for result in results if isinstance(result, Prepared)]
                    ahead = _batches_ahead(prepared)
                    outputs = predictor.dispatch(prepared, predictor.batch_size) if prepared else None
                    if next_batch:
                        written.append(writer.submit(write, next_batch, results, outputs))
                while len(written) > ahead:
                    written.popleft().result()
            for one in written:
                one.result()
        except BaseException:
            for pending in (pool, writer):
                pending.shutdown(wait=False, cancel_futures=True)
            raise


def _batches_ahead(prepared: Sequence[Prepared]) -> int:
    """Returns how many batches like this one may be in memory beside the current one."""
    # A square takes 3 bytes a pixel; two float32 heatmaps of its size take 8 more.
    size = sum(one.square.nbytes * 4 + _kept_bytes(one) for one in prepared)
    return min(_AHEAD, _AHEAD_BYTES // max(size, 1))


def _kept_bytes(one: Prepared) -> int:
    return 0 if callable(one.picture) else one.picture.nbytes


def _step_back() -> None:
    """Lowers this thread's priority: the threads that compute wait for the slowest of them."""
    if sys.platform == "linux":  # Elsewhere the call would lower the whole process's priority.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


def _prepare(predictor: RahfPredictor, one: Numbered, room: _Room) -> Prepared | Failure:
    """Reads and decodes an image. A large one isn't kept: it is read again when it is needed."""
    name = one.record.id
    if one.again:
        return Failure(name, "the id was there before; ids must differ")
    try:
        data, prompt = one.record.load()
        with room.take(image_files.count_pixels(data)):
            prepared = predictor.prepare(data, prompt)
            if _kept_bytes(prepared) * predictor.batch_size <= _KEPT_BYTES:
                return prepared
            again = functools.partial(_read_again, predictor, one.record, checksums.of_bytes(data))
            return dataclasses.replace(prepared, picture=again)
    except (inputs.InputError, PredictionError) as error:
        return Failure(name, str(error))
    except Exception as error:  # A library's bug at one record must not stop the others.
        return Failure(name, f"{type(error).__name__}: {error}")


def _read_again(predictor: RahfPredictor, record: inputs.Record, checksum: str) -> np.ndarray:
    data, _ = record.load()
    if checksums.of_bytes(data) != checksum:
        raise inputs.InputError("the image was changed while it was scored")
    return predictor.read(data)


def _save(
    predictor: RahfPredictor,
    files: PredictionFiles,
    room: _Room,
    outputs: Mapping[str, np.ndarray],
    row: int,
    one: Numbered,
    prepared: Prepared,
) -> Scored | Failure:
    """Makes an image's prediction and writes its pictures."""
    name, (height, width) = one.record.id, prepared.size
    try:
        with room.take(height * width):
            prediction = predictor.record(name, prepared, outputs, row)
            return files.save(one.position, one.file_name, prediction)
    except (errors.NotFiniteError, inputs.InputError, PredictionError) as error:
        return Failure(name, str(error))


def default_threads() -> int:
    """Returns the number of processors."""
    return os.cpu_count() or 1
