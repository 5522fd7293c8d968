"""Builds the TFDS data set from input shards, in several processes, resumable at any time.

Everything happens in `1.0.0.incomplete`, which is renamed at the end:

    build.json                                        shards and options; another build doesn't continue it
    web_captions-train.tfrecord-00007-of-01243        the output of input shard 7, complete or absent
    shards/web_captions-train.tfrecord-00007-of-....json    written after it: the shard is finished
    errors.jsonl                                      bad records and shards

So records have the order of the input shards, whatever the number of processes.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing.connection
import os
import pathlib
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import process

import tqdm

from richhf_jax import errors, feedback, writing
from richhf_jax.datasets import records
from richhf_jax.datasets.web_captions import convert, shards

NAME, CONFIG, VERSION = "web_captions", "default", "1.0.0"
DESCRIPTION = "Images with alt-text, one caption each."
BUILD_NAME, ERRORS_NAME = "build.json", "errors.jsonl"
# Earlier defaults of options: a build that began with one goes on with today's.
_EARLIER_DEFAULTS = {"image_fields": ["image", "jpg", "jpeg", "png", "webp", "image/encoded"]}
# Seconds between two looks at the progress.
_SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class Report:
    """Result of a build.

    Attributes:
      folder: folder of the data set and, if anything is bad, errors.jsonl.
      counts: split -> convert.KEPT, convert.BAD or a filter -> number of samples.
    """

    folder: pathlib.Path
    counts: Mapping[str, Mapping[str, int]]

    def __str__(self) -> str:
        total = sum((collections.Counter(counts) for counts in self.counts.values()), collections.Counter())
        kept = ", ".join(f"{counts.get(convert.KEPT, 0)} {split}" for split, counts in self.counts.items())
        left_out = ", ".join(f"{total[name]} {name}" for name in convert.FILTERS)
        bad = f"{total[convert.BAD]} bad" + (f", see {ERRORS_NAME}" if total[convert.BAD] else "")
        return f"{NAME}/{CONFIG}:{VERSION}: {kept}; left out: {left_out}, {bad}; {self.folder}"


def build(
    inputs: Mapping[str, Sequence[shards.Shard]],
    data_dir: pathlib.Path,
    options: convert.Options,
    processes: int,
    skip_bad_shards: bool = False,
) -> Report:
    """Builds the data set, or continues an unfinished build.

    Args:
      inputs: split -> its shards.
      data_dir: TFDS's folder, local.
      options: which samples are kept.
      processes: number of processes that convert shards; the result doesn't depend on it.
      skip_bad_shards: whether shards that can't be read are left out.

    Raises:
      errors.UserError: the folder has a build of other shards or with other options; a shard can't be read
        (the readable ones are finished); no sample is left; the disk is full or can't be written.
    """
    folder = data_dir / NAME / CONFIG / VERSION
    partial = folder.with_name(f"{VERSION}.incomplete")
    plan = {
        "shards": {split: [shard.url for shard in found] for split, found in inputs.items()},
        "options": json.loads(json.dumps(dataclasses.asdict(options))),  # Tuples become lists.
    }
    with writing.explained_disk_errors(folder):
        if folder.exists():
            _check_plan(folder, plan)
            shutil.rmtree(folder / "shards", ignore_errors=True)  # A kill at the very end leaves it there.
            return Report(folder, json.loads((folder / BUILD_NAME).read_text(encoding="utf-8"))["counts"])
        writing.make_folder(partial / "shards")
        if (partial / BUILD_NAME).exists():
            _check_plan(partial, plan)
        else:
            writing.write(partial / BUILD_NAME, json.dumps(plan))
        jobs = {
            split: _jobs(split, found, partial, options, skip_bad_shards) for split, found in inputs.items()
        }
        failed = _convert_all([job for split_jobs in jobs.values() for job in split_jobs], processes)
        _write_errors(partial, jobs, failed)
        if failed:
            raise errors.UserError(_failure(failed, partial))
        return _finish(partial, folder, jobs, plan)


def _check_plan(folder: pathlib.Path, plan: dict) -> None:
    """Raises a UserError if the folder has a build of other shards or with other options."""
    try:
        found = json.loads((folder / BUILD_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {}
    if found.get("shards") != plan["shards"]:
        difference = "of other shards"
    elif names := [name for name in plan["options"] if not _is_same_option(name, found, plan)]:
        difference = f"with another --{', --'.join(names)}"
    else:
        return
    raise errors.UserError(
        f"{folder} is {difference}. Give what was given then, delete that folder, or give another --data_dir."
    )


def _is_same_option(name: str, found: dict, plan: dict) -> bool:
    before, now = found["options"].get(name), plan["options"][name]
    default = list(getattr(convert.Options(), name)) if name in _EARLIER_DEFAULTS else None
    return before == now or (now == default and before == _EARLIER_DEFAULTS[name])


def _jobs(
    split: str, found: Sequence[shards.Shard], folder: pathlib.Path, options: convert.Options, skip_bad: bool
) -> list[convert.Job]:
    names = [f"{NAME}-{split}.tfrecord-{index:05}-of-{len(found):05}" for index in range(len(found))]
    return [
        convert.Job(shard, folder / name, folder / "shards" / f"{name}.json", options, skip_bad)
        for shard, name in zip(found, names, strict=True)
    ]


def _convert_all(jobs: Sequence[convert.Job], processes: int) -> dict[str, str]:
    """Converts the unfinished shards; returns URL -> reason of those that can't be read."""
    todo = [job for job in jobs if convert.read_state(job) is None]
    total, left = (sum(job.shard.size for job in part) for part in (jobs, todo))
    failed = {}
    # Without a terminal there is no bar (disable=None).
    with (
        tqdm.tqdm(total=total, initial=total - left, unit="B", unit_scale=True, disable=None) as bar,
        contextlib.closing(_results(todo, processes, bar.update)) as results,
    ):
        for job, reason in results:
            if reason:
                failed[job.shard.url] = reason
                bar.write(f"{job.shard.url}: {reason}", file=sys.stderr)
    return failed


def _results(
    jobs: Sequence[convert.Job], processes: int, count: Callable[[int], object]
) -> Generator[tuple[convert.Job, str], None, None]:
    """Yields each finished job and why it failed, or ''."""
    if min(processes, len(jobs)) <= 1:
        yield from ((job, convert.convert(job, count)) for job in jobs)
        return
    # "spawn", since forking a process in which libraries run threads may deadlock.
    context = multiprocessing.get_context("spawn")
    bytes_read = context.Value("q")
    shown = 0
    others = set(multiprocessing.active_children())
    executor = process.ProcessPoolExecutor(min(processes, len(jobs)), context, _start, (bytes_read,))
    try:
        waiting = {executor.submit(_convert_and_count, job): job for job in jobs}
        while waiting:
            done, _ = concurrent.futures.wait(
                waiting, _SECONDS, return_when=concurrent.futures.FIRST_COMPLETED
            )
            by_now = bytes_read.value  # Other processes increase it: read it once.
            count(by_now - shown)
            shown = by_now
            for future in done:
                yield waiting.pop(future), future.result()
        executor.shutdown()
    except process.BrokenProcessPool:
        raise errors.UserError(
            "A process was killed, perhaps for lack of memory. Run the command again with fewer --processes."
        ) from None
    finally:
        # After an error or Ctrl-C, workers may be killed: what they write appears complete or not at all.
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()


def _start(bytes_read) -> None:
    """Prepares a new process: it ignores Ctrl-C and ends with its parent, even if that is killed."""
    global _bytes_read
    _bytes_read = bytes_read
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # A worker runs this.
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _convert_and_count(job: convert.Job) -> str:
    def count(number: int) -> None:
        with _bytes_read.get_lock():
            _bytes_read.value += number

    return convert.convert(job, count)


def _failure(failed: Mapping[str, str], partial: pathlib.Path) -> str:
    first = "\n".join(f"  {url}: {reason}" for url, reason in sorted(failed.items())[:10])
    return (
        f"{len(failed)} shards can't be read:\n{first}\n"
        f"All are listed in {partial / ERRORS_NAME}; the others are finished. Run the command again to try"
        " only these once more, or with --skip_bad_shards to leave them out."
    )


def _state(job: convert.Job) -> convert.State:
    """Reads the state of a finished job."""
    state = convert.read_state(job)
    assert state is not None
    return state


def _write_errors(
    folder: pathlib.Path, jobs: Mapping[str, list[convert.Job]], failed: Mapping[str, str]
) -> None:
    """Lists bad records and shards, in the order of the input."""
    lines = []
    for job in (job for split_jobs in jobs.values() for job in split_jobs):
        if reason := failed.get(job.shard.url):
            lines.append({"file": job.shard.url, "record": "", "reason": reason})
        else:
            lines += _state(job).errors
    writing.write(folder / ERRORS_NAME, "".join(f"{json.dumps(line)}\n" for line in lines))


def _finish(
    partial: pathlib.Path, folder: pathlib.Path, jobs: Mapping[str, list[convert.Job]], plan: dict
) -> Report:
    """Makes a TFDS data set of the finished shards."""
    import tensorflow_datasets as tfds  # It imports TensorFlow, which nothing else here needs.

    states = {split: [_state(job) for job in split_jobs] for split, split_jobs in jobs.items()}
    counts = {
        split: dict(sum((collections.Counter(state.counts) for state in found), collections.Counter()))
        for split, found in states.items()
    }
    report = Report(folder, counts)
    for split, number in counts.items():
        if not number.get(convert.KEPT):
            raise errors.UserError(f"No sample is left for {split}. {report}")
    split_infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[state.counts.get(convert.KEPT, 0) for state in found],
            num_bytes=sum(state.bytes for state in found),
        )
        for split, found in states.items()
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=partial,
        features={
            feedback.FILENAME_FIELD: tfds.features.Text(),
            feedback.IMAGE_FIELD: tfds.features.Image(shape=(None, None, 3)),
            feedback.PROMPT_FIELD: tfds.features.Text(),
        },
        split_infos=split_infos,
        version=VERSION,
        description=DESCRIPTION,
        check_data=False,
    )
    records.write_index(partial)
    # Here TFDS finds the configuration's name if none is given.
    config = folder.parents[1] / ".config"
    writing.make_folder(config)
    writing.write(config / "metadata.json", json.dumps({"default_config_name": CONFIG}))
    writing.write(partial / BUILD_NAME, json.dumps({**plan, "counts": counts}))
    writing.move(partial, folder)
    shutil.rmtree(folder / "shards")
    return report
