"""Scores records batch by batch and writes their predictions: the work of the command `predict`."""

import collections
import dataclasses
import itertools
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent import futures
from typing import Any

import jax

from richhf_jax import inputs
from richhf_jax.predict.files import Failure, PredictionFiles, Scored
from richhf_jax.predict.forward import PredictionError, Prepared
from richhf_jax.predict.predictor import Prediction, RahfPredictor

# Number of batches that are read ahead, and of those that wait to be written. It keeps every stage busy.
_AHEAD = 3
# Most memory for images and heatmaps of the batches read ahead, and as much again of those to be written.
_AHEAD_BYTES = 1 << 30
# Added to the priority number of the threads that read, decode and write.
_NICENESS = 10


@dataclasses.dataclass(frozen=True)
class Numbered:
    """A record with its place among all inputs.

    Attributes:
      position: number of records before it, in all inputs.
      record: the record.
      again: whether an earlier record has the same id.
    """

    position: int
    record: inputs.Record
    again: bool


def numbered(records: Iterable[inputs.Record], first: int, last: int) -> Iterator[Numbered]:
    """Yields the records from position `first` to before `last`; of earlier records it reads only the ids."""
    ids: set[str] = set()
    for position, record in enumerate(itertools.islice(records, last)):
        again = record.id in ids
        ids.add(record.id)
        if position >= first:
            yield Numbered(position, record, again)


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
    failed, ahead = threading.Event(), _AHEAD

    def write(batch, results, outputs):
        if failed.is_set():  # Nothing may be written behind a batch that could not be written.
            return
        try:
            files.commit(batch[-1].position + 1, _save(predictor, files, pool, batch, results, outputs))
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
                ready.append((batch, [pool.submit(_prepare, predictor, one) for one in batch]))
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
    # An image takes 3 bytes a pixel; two float32 heatmaps of its size take 8 more.
    size = sum(one.image.nbytes for one in prepared) * 4
    return min(_AHEAD, _AHEAD_BYTES // max(size, 1))


def _step_back() -> None:
    """Lowers this thread's priority: the threads that compute wait for the slowest of them."""
    if sys.platform == "linux":  # Elsewhere the call would lower the whole process's priority.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


def _prepare(predictor: RahfPredictor, one: Numbered) -> Prepared | Failure:
    name = one.record.id
    if one.again:
        return Failure(name, "the id was there before; ids must differ")
    try:
        return predictor.prepare(*one.record.load())
    except (inputs.InputError, PredictionError) as error:
        return Failure(name, str(error))
    except Exception as error:  # A library's bug at one record must not stop the others.
        return Failure(name, f"{type(error).__name__}: {error}")


def _save(
    predictor: RahfPredictor,
    files: PredictionFiles,
    pool: futures.Executor,
    batch: Sequence[Numbered],
    results: Sequence[Prepared | Failure],
    outputs: Any,
) -> list[Scored | Failure]:
    """Waits for a batch's predictions and writes their pictures. Returns the results in the batch's order."""
    good = [(one, result) for one, result in zip(batch, results, strict=True) if isinstance(result, Prepared)]
    predictions: list[Prediction] = []
    if good:
        prepared = [result for _, result in good]
        predictions = predictor.finish(prepared, outputs, [one.record.id for one, _ in good])
    positions = [one.position for one, _ in good]
    places = pool.map(files.save_pictures, positions, predictions)
    scored = iter([Scored(*item) for item in zip(positions, predictions, places, strict=True)])
    return [result if isinstance(result, Failure) else next(scored) for result in results]


def default_threads() -> int:
    """Returns the number of processors."""
    return os.cpu_count() or 1
