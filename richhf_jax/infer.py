r"""Predicts a task's split, on one host or many. The same command again continues where the last one ended.

    python -m richhf_jax.infer --gin_file=experiments/quickstart.gin --gin_file=runs/infer.gin \
        --gin.MODEL_DIR=runs/mine

The results are T5X's files: `<task>-predict.jsonl-00000-of-00002` and so on, one for each process that reads
data of its own. Together they hold each example of the split once; a single file holds them in order. A line
is

    {"inputs": {"filename": "test/1.png", "prompt": "a yellow cat", ...},    the record's own strings
     "prediction": {"id": "test/1.png", "prompt": "a yellow cat", "scores": {kind: 0.71, ...},
                    "tokens": [{"text": "a", "misaligned": false, "probability": 0.02}, ...]}}

A prediction has what the model predicts: "scores" and "tokens" may be absent. It may also have "uncertainty",
the scores' standard deviations, if the model predicts them; "prompt_words_cut", the number of words that the
model has no room for; and "heatmaps", {kind: path}: 8-bit greyscale PNG files; the paths are relative to the
folder of the results.

A record whose outputs aren't finite has no line there, but one in `<task>-predict.errors.jsonl-...`:
{"id", "reason"}. Then the command ends with exit code 1 when the other records are written.

Every `checkpoint_period` batches the results so far are saved in a folder `tmp-...`, with a checksum.
`<task>-predict.run.json` tells what the results depend on: the checkpoint, the model, the vocabulary, the
data, the batches. So results of another run don't mix with them.
"""

import concurrent.futures
import contextlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import seqio
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from richhf_jax import (
    checkpoints,
    checksums,
    device_memory,
    errors,
    feedback,
    foreign_text,
    gin_utils,
    input_pipeline,
    locking,
    models,
    multihost,
    partitioning,
    reading,
    sealing,
    split_predictions,
    writing,
)
from richhf_jax.costs import plan
from richhf_jax.pages import overlay

_WRITTEN_STAYS = (
    "What is written stays; make room or give the right to write, then continue by the same command"
)
# The end of a chunk is a checksum of its lines: eight digits and a line break.
_CHECKSUM_BYTES = 9
# A line of a chunk that begins so is of a record without a prediction.
_FAILURE = b'{"id": '


def infer(
    *,
    mode: str = "predict",
    model: models.BaseModel,
    checkpoint_path: str,
    output_dir: str | None,
    dataset_cfg: input_pipeline.DatasetConfig,
    partitioner: partitioning.PjitPartitioner,
    checkpoint_period: int = 100,
    shard_id: int = 0,
    num_shards: int = 1,
    constrained_keywords: bool = True,
    write_heatmaps: bool = False,
) -> None:
    """Predicts a whole split and writes the predictions; does nothing if they are complete.

    Args:
      mode: 'predict', the only mode of T5X's that is supported.
      model: the model as it was trained.
      checkpoint_path: a `checkpoint_<step>` directory, or a MODEL_DIR, whose newest checkpoint is taken.
      output_dir: folder of the results, which all processes share; None: `inference/<split>/<step>` beside
        the checkpoint.
      dataset_cfg: the data to predict; its feature lengths must ask for every kind that the model predicts.
      partitioner: splits states and batches over the mesh.
      checkpoint_period: number of batches between saves; a run that is killed loses at most so many.
      shard_id, num_shards: index of this job from 0, and number of jobs that share the split.
      constrained_keywords: as for `eval.evaluate`.
      write_heatmaps: True writes heatmaps as PNG files, if the model predicts any.

    Raises:
      errors.UserError: there is no checkpoint, or it doesn't fit the model; the data isn't built or lacks the
        split; the task is a mixture; `output_dir` has other results of this task, can't be written,
        disappears, or another process writes to it; records have no prediction; the devices have too little
        memory.
    """
    _check(mode, checkpoint_period, shard_id, num_shards)
    _check_task(dataset_cfg.mixture_or_task_name)
    checkpoint, step = checkpoints.find_checkpoint(checkpoint_path)
    factors = split_predictions.deviation_factors(checkpoint) if model.has_uncertainty else {}
    layout = partitioner.get_data_layout(dataset_cfg.batch_size)
    output = _Output(
        epath.Path(output_dir or epath.Path(checkpoint).parent / "inference" / dataset_cfg.split / str(step)),
        f"{dataset_cfg.mixture_or_task_name}-{mode}",
        shard_id * layout.num_shards + layout.shard_id,
        num_shards * layout.num_shards,
        {
            **_sources(model, checkpoint, dataset_cfg),
            "task": dataset_cfg.mixture_or_task_name,
            "split": dataset_cfg.split,
            "task_feature_lengths": dict(dataset_cfg.task_feature_lengths),
            "batch_size": dataset_cfg.batch_size,
            "checkpoint_period": checkpoint_period,
            "constrained_keywords": constrained_keywords,
            "write_heatmaps": write_heatmaps,
            **({"deviation_factors": dict(factors)} if model.has_uncertainty else {}),
        },
    )
    output.check_run()
    writes, chunks = _agree(output, layout.shard_id)
    job = range(shard_id * layout.num_shards, (shard_id + 1) * layout.num_shards)
    if chunks is None:
        logging.info("finished before: %s; delete its folder to predict anew", output.path)
        output.check_failures(job)
        return
    with (
        device_memory.explained(plan.LESS_MEMORY["predict"]),
        multihost.entered_by_all(output.locked() if writes else contextlib.nullcontext()),
    ):
        trainer, state, _ = split_predictions.load(model, checkpoint, dataset_cfg, partitioner)
        start = chunks * checkpoint_period
        if start:
            logging.info("continuing from batch %d", start)
        batches = split_predictions.own_part(
            trainer, state, dataset_cfg, partitioner, constrained_keywords, shard_id, num_shards, start
        )
        number, lines = start - 1, []
        for number, pairs in enumerate(batches, start):
            if not writes:
                continue
            heatmaps = output.write_heatmaps(number, pairs) if write_heatmaps else [{}] * len(pairs)
            lines += (
                _line(*pair, maps, factors, model.vocab_size is not None)
                for pair, maps in zip(pairs, heatmaps, strict=True)
            )
            if (number + 1) % checkpoint_period == 0:
                output.write_chunk(number // checkpoint_period, lines)
                lines = []
        if writes:
            output.finish((number + 1) // checkpoint_period, lines, dataset_cfg.batch_size * num_shards)
            logging.info("results in %s", output.path)
    multihost_utils.sync_global_devices("results written")
    output.check_failures(job)


def _check(mode: str, checkpoint_period: int, shard_id: int, num_shards: int) -> None:
    if mode != "predict":
        raise errors.UserError(f"infer.mode must be 'predict', got {mode!r}: there is no other")
    if checkpoint_period < 1:
        raise errors.UserError(f"infer.checkpoint_period must be at least 1, got {checkpoint_period}")
    if not 0 <= shard_id < num_shards:
        raise errors.UserError(
            f"infer.shard_id={shard_id} of infer.num_shards={num_shards}: they count from 0"
        )


def _check_task(name: str) -> None:
    task = input_pipeline.task_or_mixture(name)
    if isinstance(task, seqio.Mixture):
        names = ", ".join(part.name for part in seqio.get_subtasks(task))
        raise errors.UserError(f"{name} is a mixture: predict its tasks one by one: {names}")


def _sources(model: models.BaseModel, checkpoint: str, cfg: input_pipeline.DatasetConfig) -> dict[str, Any]:
    """Tells the checkpoint, model, vocabulary and data from others that may get the same names."""
    vocabulary = input_pipeline.vocabulary_model(cfg)
    shapes = input_pipeline.data_shapes(cfg)
    description = model.describe(cfg.task_feature_lengths, shapes, input_pipeline.fit())
    return {
        "checkpoint": checkpoint,
        "checkpoint_checksum": sealing.of_checkpoint(epath.Path(checkpoint)),
        "model_checksum": checksums.of_json(description),
        "vocabulary_checksum": None if vocabulary is None else checksums.of_bytes(vocabulary),
        **input_pipeline.data_identity(cfg),
    }


def _agree(output: "_Output", part: int) -> tuple[bool, int | None]:
    """Agrees with all processes on where to continue, as the last run may have stopped each at another point.

    Args:
      output: this process's output.
      part: index of this process's part of each batch; processes that share a model predict the same part.

    Returns:
      (whether this process writes results, number of chunks that all processes have completed). The number
      is None if all results are complete.
    """
    own = np.array([part, output.path.exists(), output.count_chunks()], np.int32)
    every = multihost_utils.process_allgather(own).reshape(-1, len(own))
    _, writers = np.unique(every[:, 0], return_index=True)  # the first process of each part
    _, finished, chunks = every[writers].T
    writes = jax.process_index() in writers and not output.path.exists()
    return writes, None if finished.all() else int(chunks[finished == 0].min())


def _line(
    example: Mapping[str, Any],
    prediction: feedback.RichFeedback | errors.NotFiniteError,
    heatmaps: Mapping[str, str],
    factors: Mapping[str, float],
    reads_text: bool,
) -> str:
    """Formats a line of the results or of the errors; see the top of this file."""
    if isinstance(prediction, errors.NotFiniteError):
        name = example[feedback.FILENAME_FIELD].decode()
        return json.dumps({"id": name, "reason": str(prediction)}, allow_nan=False) + "\n"
    inputs = {name: value.decode() for name, value in example.items() if isinstance(value, bytes)}
    answer = prediction.calibrated(factors).to_dict()
    if reads_text and example["inputs_words_cut"]:
        answer["prompt_words_cut"] = int(example["inputs_words_cut"])
    if heatmaps:
        answer["heatmaps"] = heatmaps
    return json.dumps({"inputs": inputs, "prediction": answer}, allow_nan=False) + "\n"


class _Output:
    """One process's file of results, and its chunks while it is incomplete.

    A file under its final name is complete, because it gets the name as the last step.

    Attributes:
      path: path of the file.
    """

    def __init__(self, folder: epath.Path, name: str, index: int, count: int, run: Mapping[str, Any]):
        """Names the files.

        Args:
          folder: folder for the files of all processes.
          name: name of the results.
          index, count: index of the file from 0, and number of files.
          run: JSON-able arguments on which the results depend.
        """
        self._stem, self._index, self._count = folder / name, index, count
        self.path = self._file("jsonl", index)
        self._heatmaps = self._file("heatmaps", index)
        self._temporary = folder / f"tmp-{name}-{index:05}-of-{count:05}"
        self._run_path = folder / f"{name}.run.json"
        self._run = {**run, "files": count}
        self._lock: locking.Lock | None = None

    def check_run(self) -> None:
        """Checks that results in the folder, if any, are of the same run.

        Raises:
          errors.UserError: they are of another run, or the file that tells this is damaged.
        """
        if not self._run_path.exists():
            return
        fix = "Give another INFER_OUTPUT_DIR, or delete this one"
        try:
            earlier = reading.read_json(self._run_path)
        except errors.UserError as error:
            raise errors.UserError(f"{error}. {fix}") from error
        writing.check_same_run(self.path.parent, earlier, self._run, fix)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from writing this file.

        Raises:
          errors.UserError: another process writes the file, or has finished it just now.
        """
        with locking.held(self._temporary, "--gin.INFER_OUTPUT_DIR=DIR") as self._lock:
            if self.path.exists():
                raise errors.UserError(f"{self.path} was finished just now: give the same command again")
            yield

    def count_chunks(self) -> int:
        """Counts the chunks up to the first one that is missing or damaged."""
        count = next(number for number in itertools.count() if self._read_chunk(number) is None)
        if self._chunk(count).exists():
            logging.warning("%s is damaged: its batches are predicted again", self._chunk(count))
        return count

    def write_chunk(self, number: int, lines: Iterable[str]) -> None:
        """Writes the lines of `checkpoint_period` batches.

        Raises:
          errors.UserError: it can't be written.
        """
        with self._writing():
            self._sync_heatmaps()
            content = "".join(lines).encode()
            writing.write(self._chunk(number), content + _checksum(content))

    def _read_chunk(self, number: int) -> bytes | None:
        """Reads the lines of a chunk. Returns None if it is missing or isn't as it was written."""
        path = self._chunk(number)
        content = path.read_bytes() if path.exists() else b""
        lines, checksum = content[:-_CHECKSUM_BYTES], content[-_CHECKSUM_BYTES:]
        return lines if checksum == _checksum(lines) else None

    def finish(self, chunks: int, lines: Iterable[str], batch_size: int) -> None:
        """Writes the complete file: the lines of the chunks, then the given ones.

        Args:
          chunks: number of chunks.
          lines: the lines behind them.
          batch_size: number of examples in a batch of all files together.

        Raises:
          errors.UserError: it can't be written, a chunk is missing or damaged, or lines are missing.
        """
        with self._writing() as lock:
            self._sync_heatmaps()
            failures, count = [], 0
            with writing.atomic(self.path) as new, new.open("wb") as file:
                for part in (*map(self._read_chunk, range(chunks)), "".join(lines).encode()):
                    for line in (part or b"").splitlines(keepends=True):
                        if line.startswith(_FAILURE):
                            failures.append(line)
                        else:
                            file.write(line)
                        count += 1
                expected = self._num_examples(batch_size)
                if count != expected:
                    raise errors.UserError(
                        f"{self._temporary} has the results of {count} of {expected} examples: files in it"
                        " were deleted or damaged meanwhile. Give the same command again"
                    )
                lock.check()
                if failures:
                    writing.write(self._file("errors.jsonl", self._index), b"".join(failures))
            self._temporary.rmtree()

    def _num_examples(self, batch_size: int) -> int:
        """Returns the number of examples of this file's part; `batch_size` is that of all files together."""
        own = batch_size // self._count
        batches, rest = divmod(self._run["examples"], batch_size)
        return batches * own + min(max(rest - self._index * own, 0), own)

    def check_failures(self, job: Iterable[int]) -> None:
        """Checks that all records have a prediction.

        Args:
          job: indices of this job's files, which are complete.

        Raises:
          errors.UserError: records have none.
        """
        files = [self._file("errors.jsonl", index) for index in job]
        places = [file for file in files if file.exists()]
        failures = [line for place in places for line in place.read_bytes().splitlines()]
        if not failures:
            return
        if not any(self._file("jsonl", index).stat().length for index in job):
            raise errors.UserError(
                f"{self._run['checkpoint']} predicts no record: its outputs {errors.NOT_FINITE}"
            )
        first = {name: foreign_text.for_terminal(text) for name, text in json.loads(failures[0]).items()}
        raise errors.UserError(
            f"{len(failures)} records have no prediction, see {', '.join(map(str, places))}; the first is"
            f" {first['id']}: {first['reason']}. All others have one"
        )

    def write_heatmaps(self, batch: int, pairs: Sequence[split_predictions.Pair]) -> list[dict[str, str]]:
        """Writes the heatmaps of a batch as 8-bit greyscale PNG files.

        The files are named by number, because several images may have the same id.

        Returns:
          For each image, kind -> path, relative to the results' folder; {} for one without a prediction.

        Raises:
          errors.UserError: they can't be written.
        """
        folder = self._heatmaps / f"{batch:06}"
        every = [
            prediction.heatmaps if isinstance(prediction, feedback.RichFeedback) else {}
            for _, prediction in pairs
        ]
        paths = [
            {kind: folder / f"{row:04}.{kind}.png" for kind in heatmaps} for row, heatmaps in enumerate(every)
        ]
        files = [
            (path, heatmaps[kind])
            for of_image, heatmaps in zip(paths, every, strict=True)
            for kind, path in of_image.items()
        ]
        if not files:
            return [{} for _ in pairs]
        with self._writing(), concurrent.futures.ThreadPoolExecutor() as pool:
            writing.make_folder(folder)
            list(pool.map(_write_png, *zip(*files, strict=True)))
        return [
            {kind: f"{self._heatmaps.name}/{folder.name}/{path.name}" for kind, path in of_image.items()}
            for of_image in paths
        ]

    def _sync_heatmaps(self) -> None:
        """Brings the heatmaps that the lines name to the disk, if there are any."""
        if self._heatmaps.exists():
            os.sync()

    def _file(self, kind: str, index: int) -> epath.Path:
        """Returns the path of the process `index`."""
        return self._stem.with_name(f"{self._stem.name}.{kind}-{index:05}-of-{self._count:05}")

    def _chunk(self, number: int) -> epath.Path:
        return self._temporary / f"{self.path.name}-chunk{number:05}"

    @contextlib.contextmanager
    def _writing(self) -> Iterator[locking.Lock]:
        """Checks the lock, explains disk errors, and first writes the run's arguments to the folder."""
        lock = self._lock
        assert lock is not None
        lock.check()  # Nothing is made anew in a folder that disappeared.
        with writing.explained_disk_errors(self.path.parent, _WRITTEN_STAYS):
            if not self._run_path.exists():
                # Other processes may write the same file now, so each writes its own and moves it there.
                own = self._temporary / self._run_path.name
                writing.write(own, json.dumps(self._run, indent=2, allow_nan=False) + "\n")
                writing.move(own, self._run_path)
            yield lock


def _checksum(lines: bytes) -> bytes:
    return f"{checksums.of_bytes(lines)}\n".encode()


def _write_png(path: epath.Path, heatmap: np.ndarray) -> None:
    path.write_bytes(overlay.grey_png(heatmap))


if __name__ == "__main__":
    gin_utils.run(infer, compilation_cache=True)
