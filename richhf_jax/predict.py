"""Scores images: a file, a folder, a table, a tar; any number of them.

    python -m richhf_jax.predict --checkpoint MODEL_DIR --out OUT image.png --prompt "a yellow cat"
    python -m richhf_jax.predict --checkpoint MODEL_DIR --out OUT FOLDER     # <name>.png and <name>.txt
    python -m richhf_jax.predict --checkpoint MODEL_DIR --out OUT table.csv  # image, prompt[, id]
    python -m richhf_jax.predict --checkpoint MODEL_DIR --out OUT pairs.tar  # <key>.png and <key>.txt

Writes OUT/predictions.jsonl, a line an image in input order, and the heatmaps. An image that can't be scored
(unreadable, without prompt, an id that was there before) is listed in OUT/errors.jsonl with the reason; the
others are scored, and the exit code is 3. The same command again continues a run that was stopped or killed.
"""

import argparse
import collections
import dataclasses
import itertools
import os
import pathlib
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import Any

import jax
import tqdm
from absl import logging

from richhf_jax import errors, inputs, prediction_files
from richhf_jax.prediction_files import Failure, PredictionFiles, Scored
from richhf_jax.predictor import Prediction, PredictionError, Prepared, RahfPredictor, checkpoint_path

SOME_FAILED = 3
_STOPPED = 130  # As shells say of Ctrl-C.
# Batches that are read ahead, and those that wait to be written: enough for no stage to stand still.
_AHEAD = 3
_NICENESS = 10


@dataclasses.dataclass(frozen=True)
class Numbered:
    """A record and its position among all of the inputs; `again`: its id was there before."""

    position: int
    record: inputs.Record
    again: bool


def numbered(paths: Sequence[str], prompt: str | None, first: int, last: int) -> Iterator[Numbered]:
    """The records from position `first` to before `last`; those before are looked at for their ids alone."""
    ids: set[str] = set()
    for position, record in enumerate(itertools.islice(inputs.records(paths, prompt), last)):
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
    failed = threading.Event()

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
            for batch in itertools.chain(batches, [None] * _AHEAD):
                if batch:
                    ready.append((batch, [pool.submit(_prepare, predictor, one) for one in batch]))
                if ready and (batch is None or len(ready) > _AHEAD):
                    batch, waiting = ready.popleft()
                    results = [one.result() for one in waiting]
                    prepared = [result for result in results if isinstance(result, Prepared)]
                    outputs = predictor.dispatch(prepared, predictor.batch_size) if prepared else None
                    written.append(writer.submit(write, batch, results, outputs))
                while len(written) > _AHEAD:
                    written.popleft().result()
            for one in written:
                one.result()
        except BaseException:
            for pending in (pool, writer):
                pending.shutdown(wait=False, cancel_futures=True)
            raise


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


def run(options: argparse.Namespace) -> int:
    """The command, its options parsed. Returns the exit code."""
    path = checkpoint_path(options.checkpoint)
    _check_is_elsewhere(options.out, options.inputs)
    total = inputs.count(options.inputs, options.prompt)
    first, last = (total * (options.shard[0] + i) // options.shard[1] for i in (0, 1))
    arguments = {
        "checkpoint": os.path.abspath(path),
        "inputs": [os.path.abspath(place) for place in options.inputs],
        "prompt": options.prompt,
        "records": total,
        "shard": f"{options.shard[0]}/{options.shard[1]}",
        "batch_size": options.batch_size,
        "dtype": options.dtype,
        "convert": options.convert,
    }
    with PredictionFiles(
        options.out, arguments, first, options.heatmaps, options.overlay, options.report
    ) as files:
        if files.progress.position < last:
            predictor = RahfPredictor.from_checkpoint(
                path, batch_size=options.batch_size, dtype=options.dtype, convert=options.convert
            )
            _score_rest(predictor, options, files, first, last)
        files.finish("Rich feedback")
        return _summary(options, files.progress)


def _score_rest(
    predictor: RahfPredictor, options: argparse.Namespace, files: PredictionFiles, first: int, last: int
) -> None:
    begin = files.progress.position
    records = numbered(options.inputs, options.prompt, begin, last)
    shown = {"desc": "scoring", "unit": " images", "mininterval": 1, "smoothing": 0.05}
    with tqdm.tqdm(total=last - first, initial=begin - first, **shown) as bar:
        score(predictor, records, files, bar, options.threads)


def _summary(options: argparse.Namespace, done: prediction_files.Progress) -> int:
    """Tells what there is. Returns the exit code."""
    print(f"{done.predictions:,} images scored: {os.path.join(options.out, prediction_files.PREDICTIONS)}")
    if options.report:
        print(f"page: {os.path.join(options.out, 'report.html')}")
    if not done.errors:
        return 0
    place = os.path.join(options.out, prediction_files.ERRORS)
    print(f"{done.errors:,} could not be scored, see {place}", file=sys.stderr)
    return SOME_FAILED


def _check_is_elsewhere(out: str, places: Sequence[str]) -> None:
    """Raises errors.UserError where the output would be read as input."""
    for place in places:
        if os.path.isdir(place) and pathlib.Path(out).resolve().is_relative_to(pathlib.Path(place).resolve()):
            raise errors.UserError(f"--out={out} lies in {place}, which is an input: name another place")


def _shard(text: str) -> tuple[int, int]:
    """'0/4' -> (0, 4)."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is no INDEX/COUNT with INDEX from 0 to COUNT - 1")
    return int(index), int(count)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return int(text)


def default_threads() -> int:
    """As many as there are processors."""
    return os.cpu_count() or 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m richhf_jax.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="an image, a folder, a .csv, .jsonl or .parquet, a .tar")
    add(
        "--checkpoint", required=True, metavar="DIR", help="a MODEL_DIR, a checkpoint_<step> in it, an export"
    )
    add("--out", required=True, metavar="OUT", help="a new directory, or that of the run to continue")
    add("--prompt", help="of a single image, or of a folder's images that have no .txt")
    add(
        *("--heatmaps",),
        choices=prediction_files.HEATMAP_FORMATS,
        default="png",
        help="as 8-bit PNGs (255 = 1), as float16 in one heatmaps.npz, or not at all; default %(default)s",
    )
    add("--overlay", action="store_true", help="also write the images with each heatmap laid over")
    add("--report", action="store_true", help="also write report.html, a gallery to sort, filter and search")
    add("--shard", type=_shard, default=(0, 1), metavar="I/N", help="only the I-th of N parts, I from 0")
    add("--batch-size", type=_positive, default=16, metavar="N", help="images at once; default %(default)s")
    add("--dtype", choices=("float32", "bfloat16"), help="of activations; default: as in training")
    add(
        "--convert",
        action="store_true",
        help="take images of 16 bits and in CMYK, and the first frame of animations, too",
    )
    add(
        "--threads",
        type=_positive,
        default=default_threads(),
        metavar="N",
        help="that read, decode and write; default %(default)s",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and exits."""
    logging.set_verbosity(logging.ERROR)  # Orbax warns of files that a checkpoint needn't have.
    try:
        sys.exit(run(parse(arguments)))
    except errors.UserError as error:
        sys.exit(f"predict: {error}")
    except OSError as error:
        if error.filename is None and error.strerror is None:
            raise
        sys.exit(
            f"predict: {error.filename or 'the output'}: {error.strerror}; what is written stays, the same"
            " command continues"
        )
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        sys.exit(_STOPPED)


if __name__ == "__main__":
    main()
