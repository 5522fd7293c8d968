r"""Predicts a task's split, on one host or many. The same command again continues where the last one ended.

    python -m richhf_jax.infer --gin_file=experiments/quickstart.gin --gin_file=runs/infer.gin \
        --gin.MODEL_DIR=runs/mine

The results are T5X's files: `<task>-predict.jsonl-00000-of-00002` and so on, one for each process that reads
data of its own. Together they hold each example of the split once; a single file holds them in order. A line
is

    {"inputs": {"filename": "test/1.png", "prompt": "a yellow cat", ...},    the record's own strings
     "prediction": {"id": "test/1.png", "prompt": "a yellow cat", "scores": {kind: 0.71, ...},
                    "tokens": [{"text": "a", "misaligned": false, "probability": 0.02}, ...]}}

A prediction may also have "prompt_words_cut", the number of words that the model has no room for, and
"heatmaps", {kind: path}: 8-bit greyscale PNG files; the paths are relative to the folder of the results.

Every `checkpoint_period` batches the results so far are saved in a folder `tmp-...`.
`<task>-predict.run.json` names the checkpoint, the split and the batches of the results, so that results of
another run don't mix with them.
"""

import concurrent.futures
import contextlib
import itertools
import json
import os
import shutil
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
    errors,
    gin_utils,
    input_pipeline,
    locking,
    models,
    multihost,
    partitioning,
    split_predictions,
    writing,
)
from richhf_jax.pages import overlay

_WRITTEN_STAYS = (
    "What is written stays; make room or give the right to write, then continue by the same command"
)


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
      dataset_cfg: the data to predict; its feature lengths must ask for every kind.
      partitioner: splits states and batches over the mesh.
      checkpoint_period: number of batches between saves; a run that is killed loses at most so many.
      shard_id, num_shards: index of this job from 0, and number of jobs that share the split.
      constrained_keywords: as for `eval.evaluate`.
      write_heatmaps: True writes heatmaps as PNG files.

    Raises:
      errors.UserError: there is no checkpoint, or it doesn't fit the model; the data isn't built or lacks the
        split; the task is a mixture; `output_dir` has other results of this task, can't be written,
        or another process writes to it.
    """
    _check(mode, checkpoint_period, shard_id, num_shards)
    _check_task(dataset_cfg.mixture_or_task_name)
    checkpoint, step = checkpoints.find_checkpoint(checkpoint_path)
    layout = partitioner.get_data_layout(dataset_cfg.batch_size)
    output = _Output(
        epath.Path(output_dir or epath.Path(checkpoint).parent / "inference" / dataset_cfg.split / str(step)),
        f"{dataset_cfg.mixture_or_task_name}-{mode}",
        shard_id * layout.num_shards + layout.shard_id,
        num_shards * layout.num_shards,
        {
            "checkpoint": checkpoint,
            "split": dataset_cfg.split,
            "task_feature_lengths": dict(dataset_cfg.task_feature_lengths),
            "batch_size": dataset_cfg.batch_size,
            "checkpoint_period": checkpoint_period,
            "constrained_keywords": constrained_keywords,
            "write_heatmaps": write_heatmaps,
        },
    )
    output.check_run()
    writes, chunks = _agree(output, layout.shard_id)
    if chunks is None:
        logging.info("finished before: %s; delete its folder to predict anew", output.path)
        return
    with multihost.entered_by_all(output.locked(chunks) if writes else contextlib.nullcontext()):
        trainer, state, _ = split_predictions.load(model, checkpoint, dataset_cfg, partitioner)
        start = chunks * checkpoint_period
        if start:
            logging.info("continuing from batch %d", start)
        batches = split_predictions.own_part(
            trainer, state, dataset_cfg, partitioner, constrained_keywords, shard_id, num_shards, start
        )
        lines = []
        for number, pairs in enumerate(batches, start):
            if not writes:
                continue
            heatmaps = output.write_heatmaps(number, pairs) if write_heatmaps else [{}] * len(pairs)
            lines += map(_line, pairs, heatmaps)
            if (number + 1) % checkpoint_period == 0:
                output.write_chunk(number // checkpoint_period, lines)
                lines = []
        if writes:
            output.finish(lines)
            logging.info("results in %s", output.path)


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


def _line(pair: split_predictions.Pair, heatmaps: Mapping[str, str]) -> str:
    """Formats a line of the results; see the top of this file."""
    example, prediction = pair
    inputs = {name: value.decode() for name, value in example.items() if isinstance(value, bytes)}
    answer = prediction.to_dict()
    if example["inputs_words_cut"]:
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
        shard = f"{index:05}-of-{count:05}"
        self.path = folder / f"{name}.jsonl-{shard}"
        self._heatmaps = folder / f"{name}.heatmaps-{shard}"
        self._temporary = folder / f"tmp-{name}-{shard}"
        self._run_path = folder / f"{name}.run.json"
        self._run = {**run, "files": count}

    def check_run(self) -> None:
        """Checks that results in the folder, if any, are of the same run.

        Raises:
          errors.UserError: they are of another run.
        """
        if not self._run_path.exists():
            return
        earlier = json.loads(self._run_path.read_text(encoding="utf-8"))
        fix = "Give another INFER_OUTPUT_DIR, or delete this one"
        writing.check_same_run(self.path.parent, earlier, self._run, fix)

    @contextlib.contextmanager
    def locked(self, chunks: int) -> Iterator[None]:
        """Keeps other processes from writing this file.

        Args:
          chunks: number of complete chunks.

        Raises:
          errors.UserError: another process writes the file, or has finished it just now.
        """
        with locking.held(self._temporary, "--gin.INFER_OUTPUT_DIR=DIR") as self._lock:
            if self.count_chunks() < chunks:
                raise errors.UserError(f"{self.path} was finished just now: give the same command again")
            yield

    def count_chunks(self) -> int:
        """Counts the chunks up to the first gap."""
        return next(number for number in itertools.count() if not self._chunk(number).exists())

    def write_chunk(self, number: int, lines: Iterable[str]) -> None:
        """Writes the lines of `checkpoint_period` batches.

        Raises:
          errors.UserError: it can't be written.
        """
        with self._writing():
            self._sync_heatmaps()
            writing.write(self._chunk(number), "".join(lines))

    def finish(self, lines: Iterable[str]) -> None:
        """Writes the complete file: all chunks, then the given lines.

        Raises:
          errors.UserError: it can't be written.
        """
        with self._writing():
            self._sync_heatmaps()
            with writing.atomic(self.path) as new, new.open("wb") as file:
                for number in range(self.count_chunks()):
                    with self._chunk(number).open("rb") as chunk:
                        shutil.copyfileobj(chunk, file)
                file.write("".join(lines).encode())
            self._temporary.rmtree()

    def write_heatmaps(self, batch: int, pairs: Sequence[split_predictions.Pair]) -> list[dict[str, str]]:
        """Writes the heatmaps of a batch as 8-bit greyscale PNG files.

        The files are named by number, because several images may have the same id.

        Returns:
          For each image, kind -> path, relative to the results' folder.

        Raises:
          errors.UserError: they can't be written.
        """
        folder = self._heatmaps / f"{batch:06}"
        paths = [
            {kind: folder / f"{row:04}.{kind}.png" for kind in prediction.heatmaps}
            for row, (_, prediction) in enumerate(pairs)
        ]
        files = [
            (path, prediction.heatmaps[kind])
            for of_image, (_, prediction) in zip(paths, pairs, strict=True)
            for kind, path in of_image.items()
        ]
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

    def _chunk(self, number: int) -> epath.Path:
        return self._temporary / f"{self.path.name}-chunk{number:05}"

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Explains disk errors, and first of all writes the run's arguments to the folder.

        Raises:
          errors.UserError: the folder can't be written, or was deleted, moved or emptied meanwhile.
        """
        with writing.explained_disk_errors(self.path.parent, _WRITTEN_STAYS):
            self._lock.check()
            if not self._run_path.exists():
                # Other processes may write the same file now, so each writes its own and moves it there.
                own = self._temporary / self._run_path.name
                writing.write(own, json.dumps(self._run, indent=2, allow_nan=False) + "\n")
                writing.move(own, self._run_path)
            yield


def _write_png(path: epath.Path, heatmap: np.ndarray) -> None:
    path.write_bytes(overlay.grey_png(heatmap))


if __name__ == "__main__":
    gin_utils.run(infer, compilation_cache=True)
