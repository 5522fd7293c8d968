r"""Trains a model as gin says, and continues where it was when the same command is given again.

    python -m richhf_jax.train --gin_file=experiments/quickstart.gin --gin.MODEL_DIR=runs/mine

Ctrl-C or SIGTERM saves a checkpoint and exits with 0.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from clu import metric_writers

from richhf_jax import (
    checkpoints,
    errors,
    gin_utils,
    input_pipeline,
    models,
    partitioning,
    trainer,
)

_NUM_SUMMARY_IMAGES = 8


def train(
    *,
    model: models.BaseModel,
    model_dir: str,
    train_dataset_cfg: input_pipeline.DatasetConfig,
    train_eval_dataset_cfg: input_pipeline.DatasetConfig | None,
    partitioner: partitioning.PjitPartitioner,
    checkpoint_cfg: checkpoints.CheckpointConfig,
    total_steps: int,
    eval_steps: int = 20,
    eval_period: int = 1000,
    log_period: int = 50,
    random_seed: int = 0,
    use_hardware_rng: bool = False,
    trainer_cls: Callable[..., trainer.Trainer] = trainer.Trainer,
) -> None:
    """Trains until `total_steps`, from MODEL_DIR's newest checkpoint where there is one.

    Args:
      model: what to train.
      model_dir: where checkpoints, logs and the operative configuration go.
      train_dataset_cfg: the training data.
      train_eval_dataset_cfg: what to measure the losses on now and then; None measures nothing.
      partitioner: the mesh.
      checkpoint_cfg: when to save, and from where the first parameters come.
      total_steps: steps in all, those of earlier runs in `model_dir` included.
      eval_steps: batches an evaluation takes.
      eval_period: steps between evaluations.
      log_period: steps between progress lines and scalars.
      random_seed: of initial parameters and dropout; the data has its own.
      use_hardware_rng: see `trainer.Trainer`.

    Raises:
      errors.UserError: the loss stopped being finite, or the configuration doesn't work out.
    """
    save = checkpoint_cfg.save
    checkpointer = checkpoints.Checkpointer(model_dir, keep=save.keep if save else None)
    input_pipeline.check_vocabulary(train_dataset_cfg, model.vocab_size)
    stream = input_pipeline.TrainStream(train_dataset_cfg, partitioner.get_data_layout)
    loop = trainer_cls(
        model,
        partitioner,
        stream.batch_shapes,
        random_seed=random_seed,
        use_hardware_rng=use_hardware_rng,
    )
    state, position = _initial_state(loop, checkpointer, checkpoint_cfg.restore)
    step = int(state.step)
    if jax.process_index() == 0:
        gin_utils.write_operative_config(os.path.join(model_dir, "config.gin"))
        _write_model_info(os.path.join(model_dir, "model-info.txt"), state.params)
    evaluation = _Evaluation(loop, train_eval_dataset_cfg, partitioner, eval_steps, model_dir)
    log = _TrainingLog(model_dir, total_steps, step)
    batches = stream.batches(position)
    # Also when something fails: a checkpoint may still be on its way to the disk.
    with (
        contextlib.closing(checkpointer),
        contextlib.closing(log),
        contextlib.closing(evaluation),
        _stop_signal() as stop_signal,
    ):
        last = step >= total_steps
        while not last:
            state, metrics = loop.train_step(state, next(batches))
            step += 1
            log.add(metrics)
            last = step == total_steps
            if name := stop_signal():
                logging.info("%s: saving a checkpoint, then exiting", name)
                last = True
            save_now = save is not None and (last or step % save.period == 0)
            # Before every save too: a state that is not finite must not become a checkpoint.
            if last or save_now or step % log_period == 0:
                log.write(step)
            if step == total_steps or step % eval_period == 0:
                evaluation.run(state.params, step)
            if save_now:
                checkpointer.save(state, stream.position(step), step)
    if step < total_steps:
        logging.info("stopped at step %d; the same command continues", step)
    else:
        logging.info("done: %d steps, %s", step, model_dir)


def _initial_state(
    loop: trainer.Trainer,
    checkpointer: checkpoints.Checkpointer,
    restore: checkpoints.RestoreCheckpointConfig | None,
) -> tuple[Any, dict[str, Any]]:
    """The newest checkpoint of this run; else fresh, with parameters from elsewhere where asked."""
    latest = checkpointer.latest_step()
    if latest is not None:
        logging.info("continuing from step %d", latest)
        return checkpointer.restore(loop.abstract_state, latest)
    given = {}
    if restore and restore.path:
        given = checkpoints.restore_matching(restore.path, loop.abstract_state.params)
    return loop.init_state(given), {}


@contextlib.contextmanager
def _stop_signal() -> Iterator[Callable[[], str | None]]:
    """Inside, SIGTERM and Ctrl-C ask for a stop after the current step; a second one stops at once.

    Yields a function that names the signal received, if any. (The handler must not log: it may interrupt
    a log call.)
    """
    received = []

    def ask(signum, frame):
        del frame
        if received:
            raise KeyboardInterrupt
        received.append(signal.Signals(signum).name)

    previous = {signum: signal.signal(signum, ask) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: received[0] if received else None
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


class _TrainingLog:
    """Progress lines, and TensorBoard scalars under MODEL_DIR/train."""

    def __init__(self, model_dir: str, total_steps: int, first_step: int):
        self._writer = metric_writers.create_default_writer(
            os.path.join(model_dir, "train"), just_logging=jax.process_index() > 0
        )
        self._total_steps = total_steps
        self._metrics: list[trainer.Metrics] = []
        self._since = time.monotonic(), first_step

    def add(self, metrics: trainer.Metrics) -> None:
        self._metrics.append(metrics)  # Still on the device.

    def write(self, step: int) -> None:
        """Fetches what was added since the last time.

        Raises:
          errors.UserError: something is not finite: the loss, or the gradient, and so the state.
        """
        scalars = trainer.summarize(self._metrics)
        if broken := [name for name, value in scalars.items() if not np.isfinite(value)]:
            raise errors.UserError(
                f"{' and '.join(broken)} not finite between step {self._since[1]} and {step}: lower the "
                "learning rate, and start again from the last checkpoint by the same command"
            )
        now, (then, since_step) = time.monotonic(), self._since
        rate = (step - since_step) / (now - then)
        remaining = round((self._total_steps - step) / rate)
        # Of the data's metrics, shares of texts that were cut, those that say something.
        shown = {name: value for name, value in scalars.items() if value or not name.startswith("data/")}
        losses = "  ".join(f"{k.removeprefix('loss/')} {v:.4f}" for k, v in sorted(shown.items()))
        logging.info(
            "step %d/%d  %.2f steps/s  ETA %d:%02d  %s",
            step, self._total_steps, rate, *divmod(remaining, 60), losses,
        )  # fmt: skip
        self._writer.write_scalars(step, scalars | {"steps_per_second": rate})
        self._metrics, self._since = [], (now, step)

    def close(self) -> None:
        self._writer.close()


class _Evaluation:
    """Losses on held-out data and heatmaps as pictures, to TensorBoard under MODEL_DIR/training_eval."""

    def __init__(
        self,
        loop: trainer.Trainer,
        cfg: input_pipeline.DatasetConfig | None,
        partitioner: partitioning.PjitPartitioner,
        num_batches: int,
        model_dir: str,
    ):
        self._loop = loop
        self._stream = input_pipeline.TrainStream(cfg, partitioner.get_data_layout) if cfg else None
        self._num_batches = num_batches
        if self._stream:
            directory = os.path.join(model_dir, "training_eval", cfg.mixture_or_task_name)
            self._writer = metric_writers.create_default_writer(
                directory, just_logging=jax.process_index() > 0
            )

    def run(self, params: Any, step: int) -> None:
        """Always the same batches, so that curves compare."""
        if not self._stream:
            return
        batches = self._stream.batches({})
        first = next(batches)
        rest = (next(batches) for _ in range(self._num_batches - 1))
        scalars = self._loop.evaluate(params, [first, *rest])
        logging.info("eval at %d  %s", step, "  ".join(f"{k} {v:.4f}" for k, v in sorted(scalars.items())))
        self._writer.write_scalars(step, scalars)
        if first["heatmap_weights"].size:
            self._writer.write_images(step, {"image_truth_prediction": self._pictures(params, first)})

    def _pictures(self, params: Any, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        """[n, height, 3 * width, 3] uint8: image, true and predicted first heatmap, side by side."""
        predicted = np.asarray(self._loop.predict(params, batch)["heatmaps"][:_NUM_SUMMARY_IMAGES, 0])
        true = batch["heatmap_targets"][:_NUM_SUMMARY_IMAGES, 0] / 255.0
        image = batch["image"][:_NUM_SUMMARY_IMAGES]
        maps = [np.repeat((255 * heat).astype(np.uint8)[..., None], 3, axis=-1) for heat in (true, predicted)]
        return np.concatenate([image, *maps], axis=2)

    def close(self) -> None:
        if self._stream:
            self._writer.close()


def _write_model_info(path: str, params: Any) -> None:
    """One line a parameter, and their number (T5X's file)."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    lines = [
        f"{jax.tree_util.keystr(p, simple=True, separator='/')} {leaf.dtype} {leaf.shape}"
        for p, leaf in leaves
    ]
    total = sum(leaf.size for _, leaf in leaves)
    with open(path, "w") as file:
        file.write("\n".join([*lines, f"total number of parameters: {total}", ""]))
    logging.info("%d parameters", total)


if __name__ == "__main__":
    gin_utils.run(train)
