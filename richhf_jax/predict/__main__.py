"""Scores images: files, folders, tables and tars, any number of them.

    python -m richhf_jax.predict --checkpoint MODEL_DIR --out OUT image.png --prompt "a yellow cat"
    python -m richhf_jax.predict --checkpoint MODEL_DIR --out OUT FOLDER     # <name>.png and <name>.txt
    python -m richhf_jax.predict --checkpoint MODEL_DIR --out OUT table.csv  # image, prompt[, id]
    python -m richhf_jax.predict --checkpoint MODEL_DIR --out OUT pairs.tar  # <key>.png and <key>.txt

Writes OUT/predictions.jsonl, one line for each image in input order, and the heatmaps. A model that predicts
uncertainties also gives OUT/order.csv: the images that it is unsure of come first. A model that reads no text
needs no prompts; it copies those that are there. An image that can't be
scored (unreadable, without a prompt, with an id that was there before) is listed in OUT/errors.jsonl with the
reason; the others are scored, and the exit code is 3. To continue a run that was stopped or killed, give the
same command again.
"""

import argparse
import itertools
import os
import pathlib
import sys
from collections.abc import Sequence

import tqdm
from absl import logging

from richhf_jax import compilation_cache, device_memory, errors, inputs, writing
from richhf_jax.foreign_text import for_terminal
from richhf_jax.predict import batch_sizes, forward, pipeline
from richhf_jax.predict.files import HEATMAP_FORMATS, PredictionFiles
from richhf_jax.predict.predictor import RahfPredictor
from richhf_jax.predict.progress import ERRORS, PREDICTIONS

SOME_FAILED = 3
_STOPPED = 130  # The exit code that shells give to Ctrl-C.
_SHOWN_FAILURES = 3
_WRITTEN_STAYS = "What is written stays; when that is mended, the same command continues the run"


def run(options: argparse.Namespace) -> int:
    """Runs the command with parsed options. Returns the exit code."""
    _check_out(options.out, options.inputs)
    path = forward.checkpoint_path(options.checkpoint)
    reads_text = forward.read_description(path).reads_text
    given = inputs.Inputs(options.inputs, options.prompt, reads_text)
    total = len(given)
    first, last = (total * (options.shard[0] + i) // options.shard[1] for i in (0, 1))
    compilation_cache.configure(options.compilation_cache)
    logging.set_verbosity(logging.ERROR)  # Orbax warns of missing files that a checkpoint doesn't need.
    # The model is loaded before files are made: one that doesn't load leaves none.
    predictor = RahfPredictor.from_checkpoint(
        path, batch_size=options.batch_size, dtype=options.dtype, convert=options.convert
    )
    heatmaps = options.heatmaps if predictor.outputs.heatmaps else "none"
    if options.overlay and not predictor.outputs.heatmaps:
        raise errors.UserError(
            f"--overlay: the model of {path} predicts no heatmaps to lay over images; leave it out"
        )
    for note in (predictor.description.not_calibrated, predictor.fit(predictor.batch_size)):
        if note:
            print(f"predict: {note}", file=sys.stderr)
    calibration = predictor.description.calibration
    arguments = {
        "checkpoint": path,
        "calibration": dict(calibration.deviation_factors) if calibration else None,
        "model": f"{forward.params_checksum(path)} {predictor.description.checksum()}",
        "inputs": [os.path.abspath(place) for place in options.inputs],
        "names_and_files": given.fingerprint(),
        "records": total,
        "prompt": options.prompt,
        "shard": f"{options.shard[0]}/{options.shard[1]}",
        "batch_size": predictor.batch_size,
        "dtype": options.dtype,
        "convert": options.convert,
    }
    with PredictionFiles(options.out, arguments, first, heatmaps, options.overlay, options.report) as files:
        if files.progress.position < last:
            _score_rest(predictor, given, options, files, range(first, last))
            given.check_unchanged()
            assert files.progress.position == last, "a run is done only with all its records"
        files.finish("Rich feedback", predictor.outputs.score_range)
        return _summary(options, path, files)


def _score_rest(
    predictor: RahfPredictor,
    given: inputs.Inputs,
    options: argparse.Namespace,
    files: PredictionFiles,
    shard: range,
) -> None:
    """Scores the records of this shard that are not done yet."""
    begin = files.progress.position
    records = pipeline.numbered(given, begin, shard.stop)
    shown = {"desc": "scoring", "unit": " images", "mininterval": 1, "smoothing": 0.05}
    with tqdm.tqdm(total=len(shard), initial=begin - shard.start, **shown) as bar:
        pipeline.score(predictor, records, files, bar, options.threads)


def _summary(options: argparse.Namespace, checkpoint: str, files: PredictionFiles) -> int:
    """Prints what was scored and what failed. Returns the exit code.

    Raises:
      errors.UserError: nothing was scored, and the model is to blame.
    """
    done = files.progress
    print(f"{done.predictions:,} images scored: {os.path.join(options.out, PREDICTIONS)}")
    if options.report:
        print(f"page: {os.path.join(options.out, 'report.html')}")
    if not done.errors:
        return 0
    place = os.path.join(options.out, ERRORS)
    print(f"{done.errors:,} could not be scored, see {place}", file=sys.stderr)
    for line in itertools.islice(files.failures(), _SHOWN_FAILURES):
        print(f"  {for_terminal(line['id'])}: {for_terminal(line['reason'])}", file=sys.stderr)
    if not done.predictions and any(errors.NOT_FINITE in line["reason"] for line in files.failures()):
        raise errors.UserError(f"{checkpoint} scores no image: its outputs {errors.NOT_FINITE}")
    return SOME_FAILED


def _check_out(out: str, places: Sequence[str]) -> None:
    """Raises errors.UserError where nothing can be written, or where the output would be read as input."""
    writing.check_is_local(out, "--out")
    if os.path.exists(out) and not os.path.isdir(out):
        raise errors.UserError(f"--out={out} is no directory: name a new one")
    for place in places:
        if os.path.isdir(place) and pathlib.Path(out).resolve().is_relative_to(pathlib.Path(place).resolve()):
            raise errors.UserError(f"--out={out} lies in {place}, which is an input: name another --out")


def _shard(text: str) -> tuple[int, int]:
    """Parses '0/4' to (0, 4)."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is no INDEX/COUNT with INDEX from 0 to COUNT - 1")
    return int(index), int(count)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line; None: that of the process."""
    parser = argparse.ArgumentParser(
        prog="python -m richhf_jax.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="an image, a folder, or a .csv, .jsonl, .parquet or .tar")
    add("--checkpoint", required=True, metavar="DIR", help="a MODEL_DIR, a checkpoint_<step>, or an export")
    add("--out", required=True, metavar="OUT", help="a new directory, or the one of the run to continue")
    add("--prompt", help="the prompt of a single image, or of a folder's images that have no .txt")
    add(
        *("--heatmaps",),
        choices=HEATMAP_FORMATS,
        default="png",
        help="write heatmaps as 8-bit PNGs (255 = 1), as float16 in one heatmaps.npz, or not at all;"
        " default %(default)s; a model without heatmaps writes none",
    )
    add("--overlay", action="store_true", help="also write each image with each heatmap laid over it")
    add("--report", action="store_true", help="also write report.html, a gallery to sort, filter and search")
    add(
        "--shard",
        type=_shard,
        default=(0, 1),
        metavar="I/N",
        help="score only part I of N equal parts; I counts from 0",
    )
    add(
        "--batch-size",
        type=_positive,
        metavar="N",
        help=f"images scored at once; default {batch_sizes.DEFAULT}, or fewer if the memory is too small",
    )
    add("--dtype", choices=("float32", "bfloat16"), help="type of activations; default: as in training")
    add(
        "--convert",
        action="store_true",
        help="also score images of 16 bits or in CMYK, and the first frame of animations",
    )
    add(
        "--threads",
        type=_positive,
        default=pipeline.default_threads(),
        metavar="N",
        help="threads that read, decode and write; default %(default)s",
    )
    add(
        *("--no-compilation-cache",),
        dest="compilation_cache",
        action="store_false",
        help="compile again, and keep nothing; by default, compiled programs are kept in"
        " $JAX_COMPILATION_CACHE_DIR, or else in richhf_jax/compiled below $XDG_CACHE_HOME or ~/.cache",
    )
    return parser.parse_args(arguments)


@errors.command("predict")
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and exits the process."""
    options = parse(arguments)
    try:
        with (
            writing.explained_disk_errors(options.out, _WRITTEN_STAYS),
            device_memory.explained(batch_sizes.FIX),
        ):
            sys.exit(run(options))
    except KeyboardInterrupt:
        print("stopped; the same command continues the run", file=sys.stderr)
        sys.exit(_STOPPED)


if __name__ == "__main__":
    main()
