"""Measures the input pipeline against decoding the same images alone.

It makes a data set of procedural scenes in RichHF-18K's format (a JPEG and two heatmaps a record, for the
task rich_hf_18k_multi_head). Then it measures two rates in turn, several times in one run:

  decoding   decodes the same bytes from memory and throws the pixels away
  pipeline   runs input_pipeline.get_dataset as in training: reads, checks, decodes, crops, recolours,
             tokenises and batches

Both use all cores that the process may use (taskset -c 0,1 ... gives it two). Look at the ratio, because
machines differ and their load changes. The rates are medians of the turns.
"""

import argparse
import os
import pathlib
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # Warnings about GPUs don't matter here.

import seqio
import tensorflow as tf
import tensorflow_datasets as tfds
import tqdm

import tasks  # noqa: F401 (registers them)
from richhf_jax import augmentation, errors, feedback, input_pipeline, writing
from richhf_jax.benchmarks import json_file, noisy_scenes
from richhf_jax.datasets.rich_hf_18k import builder

TASK = "rich_hf_18k_multi_head"
# These lengths are those of gin/experiments/rich_hf_18k.gin.
FEATURE_LENGTHS = {"inputs": 64, "targets": 64, "heatmaps": 2, "scores": 4, "texts": 1}
TURNS = 5
# Share of a turn that isn't counted, in which tf.data chooses the number of threads for each step.
WARM_UP = 1 / 3


def decoding(data_dir: pathlib.Path, batch_size: int) -> tf.data.Dataset:
    """Decodes the data set's bytes from memory, endlessly. An element stands for `batch_size` records."""
    fields = (feedback.IMAGE_FIELD, *feedback.HEATMAP_FIELDS.values())
    made: Any = tfds.builder(builder.RichHf18k.name, data_dir=data_dir)
    data = made.as_dataset(split="train", decoders={field: tfds.decode.SkipDecoding() for field in fields})
    encoded = [tuple(record[field] for field in fields) for record in data.as_numpy_iterator()]

    def decode(image, *heatmaps):
        pixels = [augmentation.decode(image, 3), *(augmentation.decode(heatmap, 1) for heatmap in heatmaps)]
        return tf.add_n([tf.size(array) for array in pixels])

    dataset = tf.data.Dataset.from_tensor_slices(tuple(map(list, zip(*encoded, strict=True)))).repeat()
    return dataset.map(decode, num_parallel_calls=tf.data.AUTOTUNE).batch(batch_size).prefetch(2)


def pipeline(
    data_dir: pathlib.Path, image_size: int, batch_size: int, augment: bool = True
) -> tf.data.Dataset:
    """Returns the endless batches of a training."""
    seqio.set_tfds_data_dir_override(str(data_dir))
    lengths = {"image": image_size, **FEATURE_LENGTHS}
    cfg = input_pipeline.DatasetConfig(TASK, lengths, "train", batch_size, augment=augment)
    return input_pipeline.get_dataset(cfg, seqio.ShardInfo(0, 1))


def rates(dataset: tf.data.Dataset, batch_size: int, seconds: float) -> tuple[float, float]:
    """Measures records a second, and records a second of processor time, in a turn of `seconds`.

    Nothing runs in the background afterwards.
    """
    iterator = iter(dataset)
    end = time.perf_counter() + WARM_UP * seconds
    while time.perf_counter() < end:
        next(iterator)
    count, start, cpu_start = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() < start + (1 - WARM_UP) * seconds or not count:
        next(iterator)
        count += batch_size
    return count / (time.perf_counter() - start), count / (time.process_time() - cpu_start)


def measure(
    data_dir: pathlib.Path, image_size: int, batch_size: int, seconds: float, augment: bool = True
) -> dict[str, float]:
    """Measures both rates, in turn.

    Args:
      data_dir: the TFDS folder with the data set (`noisy_scenes.write`).
      image_size: side of the images, in pixels.
      batch_size: records in a batch.
      seconds: length of a turn.
      augment: whether the pipeline augments.

    Returns:
      decoding_per_second, pipeline_per_second: records a second, medians of the turns
      decoding_per_cpu_second, pipeline_per_cpu_second: records a second of processor time, medians, too
      ratio, cpu_ratio: the pipeline's rate over decoding's; other programs change `ratio` more
      ratio_min, ratio_max: extremes of the ratios of neighbouring turns
      memory_growth_bytes: the process's peak memory less its memory before
      cores: number of cores that the process may use
      seconds: duration of the measurement
    """
    start, before = time.perf_counter(), _resident_bytes()
    datasets = {
        "decoding": decoding(data_dir, batch_size),
        "pipeline": pipeline(data_dir, image_size, batch_size, augment),
    }
    turns = {name: [] for name in datasets}
    for _ in tqdm.trange(TURNS, desc="turns", disable=not sys.stderr.isatty()):
        for name, dataset in datasets.items():
            turns[name].append(rates(dataset, batch_size, seconds))
    ratios = [whole[0] / alone[0] for alone, whole in zip(turns["decoding"], turns["pipeline"], strict=True)]
    alone, alone_cpu = map(statistics.median, zip(*turns["decoding"], strict=True))
    whole, whole_cpu = map(statistics.median, zip(*turns["pipeline"], strict=True))
    return {
        "decoding_per_second": alone,
        "pipeline_per_second": whole,
        "decoding_per_cpu_second": alone_cpu,
        "pipeline_per_cpu_second": whole_cpu,
        "ratio": whole / alone,
        "cpu_ratio": whole_cpu / alone_cpu,
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "memory_growth_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before,
        "cores": len(os.sched_getaffinity(0)),
        "seconds": time.perf_counter() - start,
    }


def _resident_bytes() -> int:
    pages = pathlib.Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]
    return int(pages) * resource.getpagesize()


@errors.command()
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m richhf_jax.benchmarks.input",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--examples", type=int, default=64, help="distinct records (default 64)")
    parser.add_argument("--image_size", type=int, default=512, help="side in pixels, 64 to 512 (default 512)")
    parser.add_argument("--batch_size", type=int, default=32, help="records a batch (default 32)")
    parser.add_argument(
        "--seconds", type=float, default=6.0, help=f"length of each of the {TURNS} turns (default 6)"
    )
    parser.add_argument(
        "--no_augmentation", action="store_true", help="switch augmentation off, to see its cost"
    )
    json_file.add_flag(parser)
    parser.add_argument(
        "--data_dir",
        type=pathlib.Path,
        help="keep the data set in this folder, and use it again; default: a temporary folder",
    )
    options = parser.parse_args(arguments)
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    json_file.check(parser, options.json)
    if min(options.examples, options.batch_size) < 1 or options.seconds <= 0:
        parser.error("--examples and --batch_size must be at least 1, --seconds above 0")
    if not 64 <= options.image_size <= 512:
        parser.error("--image_size must be 64 to 512")
    with tempfile.TemporaryDirectory() as temporary:
        data_dir = (
            options.data_dir or pathlib.Path(temporary)
        ) / f"{options.examples}_of_{options.image_size}"
        with writing.explained_disk_errors(data_dir):
            noisy_scenes.write(data_dir, options.image_size, options.examples)
        figures = measure(
            data_dir, options.image_size, options.batch_size, options.seconds, not options.no_augmentation
        )
    print(
        f"decoding alone {figures['decoding_per_second']:.0f} records/s, "
        f"whole pipeline {figures['pipeline_per_second']:.0f} records/s: "
        f"ratio {figures['ratio']:.2f} ({figures['ratio_min']:.2f} to {figures['ratio_max']:.2f}), "
        f"{figures['cpu_ratio']:.2f} by processor time\n"
        f"{figures['cores']} cores, {options.image_size} px, batches of {options.batch_size}, "
        f"{figures['seconds']:.0f} s, memory +{figures['memory_growth_bytes'] / 2**20:.0f} MiB at most"
    )
    json_file.write(options.json, figures)


if __name__ == "__main__":
    main()
