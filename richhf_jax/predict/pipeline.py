"""Records -> predictions in files, batch by batch: what `predict` does once it is configured."""

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

# Batches that are read ahead, and those that wait to be written: enough for no stage to stand still.
_AHEAD = 3
# Of the images and heatmaps of the batches that are read ahead, and again of those that wait to be written.
_AHEAD_BYTES = 1 << 30
_NICENESS = 10


@dataclasses.dataclass(frozen=True)
class Numbered:
    """A record and its position among all of the inputs; `again`: its id was there before."""

    position: int
    record: inputs.Record
    again: bool


def numbered(records: Iterable[inputs.Record], first: int, last: int) -> Iterator[Numbered]:
    """The records from position `first` to before `last`; those before are looked at for their ids alone."""
    ids: set[str] = set()
    for position, record in enumerate(itertools.islice(records, last)):
        again = record.id in ids
        ids.add(record.id)
        if position >= first:
            yield Numbered(position, record, again)


def score(
    predictor: RahfPredictor, records: Iterator[Numbered], files: PredictionFiles, progress: Any, threads: int
) -> None:
    """Scores records, batch by batch: threads read and decode, the device computes, threads write.

    What is in a batch follows from the records' positions alone, so that a run that continues gives the same.

    Args:
      predictor: the model.
      records: those to do, from `files.progress.position` on.
      files: where the results go.
      progress: has `update(count)`, called with numbers of records done.
      threads: for reading, decoding and writing.
    """
    batches = iter(lambda: list(itertools.islice(records, predictor.batch_size)), [])
    ready: collections.deque = collections.deque()
    written: collections.deque = collections.deque()
    failed, ahead = threading.Event(), _AHEAD

    def write(batch, results, outputs):
        if failed.is_set():  # What comes behind a batch that can't be written must not be written either.
            return
        try:
            files.commit(batch[-1].position + 1, _save(predictor, files, pool, batch, results, outputs))
        except BaseException:
            failed.set()
            raise
        progress.update(len(batch))

    # One writer keeps the order; the pictures' files are the pool's work.
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
    """How many batches may be in memory beside the one at work, if they are like this one."""
    # An image takes 3 bytes a pixel, two heatmaps of its size 8 more.
    size = sum(one.image.nbytes for one in prepared) * 4
    return min(_AHEAD, _AHEAD_BYTES // max(size, 1))


def _step_back() -> None:
    """Lets the CPU's threads that compute go first: each of them waits for the slowest."""
    if sys.platform == "linux":  # Where a priority is a thread's.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


def _prepare(predictor: RahfPredictor, one: Numbered) -> Prepared | Failure:
    name = one.record.id
    if one.again:
        return Failure(name, "the id was there before; ids must differ")
    try:
        return predictor.prepare(*one.record.load())
    except (inputs.InputError, PredictionError) as error:
        return Failure(name, str(error))
    except Exception as error:  # Of a library, at one record of a million: the others shall be scored.
        return Failure(name, f"{type(error).__name__}: {error}")


def _save(
    predictor: RahfPredictor,
    files: PredictionFiles,
    pool: futures.Executor,
    batch: Sequence[Numbered],
    results: Sequence[Prepared | Failure],
    outputs: Any,
) -> list[Scored | Failure]:
    """Waits for a batch's predictions and writes their pictures."""
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
    """As many as there are processors."""
    return os.cpu_count() or 1
