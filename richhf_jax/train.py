r"""Trains the model that gin files describe. The same command again continues from the last checkpoint.

    python -m richhf_jax.train --gin_file=experiments/quickstart.gin --gin.MODEL_DIR=runs/mine

Ctrl-C or SIGTERM saves a checkpoint and exits with 0.
"""

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import tensorflow as tf
from absl import flags, logging
from clu import asynclib
from etils import epath
from jax.experimental import multihost_utils

from richhf_jax import (
    checkpoints,
    device_memory,
    errors,
    gin_utils,
    input_pipeline,
    locking,
    model_description,
    models,
    multihost,
    partitioning,
    training_log,
    writing,
)
from richhf_jax import trainer as trainer_lib
from richhf_jax.costs import plan

_PROFILE_STEPS = flags.DEFINE_string(
    "profile_steps",
    None,
    "FIRST:LAST writes a trace of these steps, counted from 1 at this run's first, to MODEL_DIR/profile.",
)

_NUM_SUMMARY_IMAGES = 8
# Number of a broken step's examples that a message lists.
_NUM_NAMED_EXAMPLES = 16
# The exceptions of TensorFlow and clu when they can't write.
_LIBRARIES_ERRORS = (
    *(tf.errors.ResourceExhaustedError, tf.errors.PermissionDeniedError, tf.errors.NotFoundError),
    *(tf.errors.FailedPreconditionError, tf.errors.UnknownError, asynclib.AsyncError),
)
_CHECKPOINTS_STAY = (
    "Complete checkpoints stay; make room or give the right to write, then continue by the same command"
)


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
    trainer_cls: Callable[..., trainer_lib.Trainer] = trainer_lib.Trainer,
) -> None:
    """Trains until `total_steps`, from MODEL_DIR's newest checkpoint if there is one.

    Args:
      model: the model to train.
      model_dir: directory of checkpoints, logs and the operative configuration.
      train_dataset_cfg: the training data.
      train_eval_dataset_cfg: the data on which losses are measured now and then; None measures nothing.
      partitioner: splits states and batches over the mesh.
      checkpoint_cfg: when to save, and the source of the first parameters.
      total_steps: number of steps, including those of earlier runs in `model_dir`.
      eval_steps: number of batches in an evaluation.
      eval_period: number of steps between evaluations.
      log_period: number of steps between progress lines, and between scalars.
      random_seed: seed of initial parameters and dropout; the data has its own.
      use_hardware_rng: see `trainer.Trainer`.
      trainer_cls: makes the trainer; gin sets the number of microbatches.

    Raises:
      errors.UserError: the loss is not finite; MODEL_DIR can't be written, disappears, or is another
        process's; a setting doesn't fit another one or the data; or the devices have too little memory.
    """
    if not model_dir:
        raise errors.UserError("MODEL_DIR is empty: name a directory with --gin.MODEL_DIR=DIR")
    if model.optimizer_def is None:
        raise errors.UserError(
            "the model has no optimizer, because it only predicts: give it to eval or infer"
        )
    schedule = _Schedule(total_steps, log_period, eval_period, checkpoint_cfg.save)
    schedule.check(evaluates=train_eval_dataset_cfg is not None)
    input_pipeline.check_vocabulary(train_dataset_cfg, model.vocab_size, model.exact_vocabulary)
    with contextlib.ExitStack() as stack:
        stack.enter_context(device_memory.explained(plan.LESS_MEMORY["train"]))
        stack.enter_context(
            writing.explained_disk_errors(
                model_dir, _CHECKPOINTS_STAY, _LIBRARIES_ERRORS, only=writing.NO_ROOM_OR_RIGHT
            )
        )
        # One lock for all processes. Released last, when nothing is on its way to the disk any more.
        held = locking.held(model_dir, "--gin.MODEL_DIR=DIR") if jax.process_index() == 0 else None
        lock = stack.enter_context(multihost.entered_by_all(held or contextlib.nullcontext()))
        # Closed next to last, also when something fails: a checkpoint may still be on its way to the disk.
        checkpointer = stack.enter_context(checkpoints.Checkpointer(model_dir, checkpoint_cfg.save))
        _check_vocabulary(train_dataset_cfg, model_dir, checkpoint_cfg.restore)
        stream = _stream(model, train_dataset_cfg, partitioner)
        trainer = trainer_cls(
            model,
            partitioner,
            stream.batch_shapes,
            random_seed=random_seed,
            use_hardware_rng=use_hardware_rng,
        )
        state, position = _initial_state(trainer, checkpointer, checkpoint_cfg.restore)
        if jax.process_index() == 0:
            gin_utils.write_operative_config(os.path.join(model_dir, "config.gin"))
            _write_description(
                model, train_dataset_cfg, stream, checkpoint_cfg, model_dir, random_seed, int(state.step)
            )
            _write_model_info(os.path.join(model_dir, "model-info.txt"), state.params)
        evaluation = _Evaluation(trainer, train_eval_dataset_cfg, partitioner, eval_steps, model_dir)
        stack.enter_context(contextlib.closing(evaluation))

        log = _open_log(model_dir, trainer, partitioner, train_dataset_cfg, checkpointer, total_steps, state)
        stack.enter_context(contextlib.closing(log))
        loop = _TrainingLoop(trainer, checkpointer, evaluation, log, schedule, model_dir, lock)
        step = loop.run(state, stream, position)
    if step < total_steps:
        logging.info("stopped at step %d; the same command continues", step)
    else:
        logging.info("done: %d steps, %s", step, model_dir)


@dataclasses.dataclass(frozen=True)
class _Schedule:
    """The steps at which things happen."""

    total_steps: int
    log_period: int
    eval_period: int
    save: checkpoints.SaveCheckpointConfig | None

    def check(self, evaluates: bool) -> None:
        """Checks the periods, and that each checkpoint is measured if the best ones are to be kept.

        Raises:
          errors.UserError: a period is no number of steps, or a checkpoint isn't measured.
        """
        for macro, period in (("LOG_PERIOD", self.log_period), ("EVAL_PERIOD", self.eval_period)):
            if period < 1:
                raise errors.UserError(f"{macro} must be at least 1 step, got {period}")
        if self.save is None or self.save.keep_best is None:
            return
        if not evaluates:
            raise errors.UserError(
                "SaveCheckpointConfig.keep_best needs validation data, but train_eval_dataset_cfg is None"
            )
        if self.save.period % self.eval_period:
            raise errors.UserError(
                "SaveCheckpointConfig.keep_best needs an evaluation at each checkpoint:"
                f" CHECKPOINT_PERIOD, {self.save.period} steps, must be a multiple of"
                f" EVAL_PERIOD, {self.eval_period} steps"
            )

    def saves(self, step: int, last: bool) -> bool:
        return self.save is not None and (last or step % self.save.period == 0)

    def evaluates(self, step: int) -> bool:
        return step == self.total_steps or step % self.eval_period == 0


@dataclasses.dataclass(frozen=True)
class _TrainingLoop:
    """The training loop with its parts."""

    trainer: trainer_lib.Trainer
    checkpointer: checkpoints.Checkpointer
    evaluation: "_Evaluation"
    log: training_log.TrainingLog
    schedule: _Schedule
    model_dir: str
    lock: locking.Lock | None

    def run(
        self, state: trainer_lib.TrainState, stream: input_pipeline.TrainStream, position: Mapping[str, int]
    ) -> int:
        """Trains from a position of the data until the end or a signal; returns the last step."""
        step, total_steps = int(state.step), self.schedule.total_steps
        # Tests call `train` without a command line, so flags aren't parsed.
        profile_steps = _PROFILE_STEPS.value if flags.FLAGS.is_parsed() else None
        profiler = training_log.Profiler(self.model_dir, profile_steps, step, total_steps)
        batches = stream.batches(position)
        last = step >= total_steps
        with contextlib.closing(profiler), _stop_signal() as stop_signal:
            while not last:
                profiler.before(step + 1)
                asked = time.monotonic()
                batch = next(batches)
                ready = time.monotonic()
                # Only the batch, moved explicitly, may go to the device, and nothing may come back.
                with jax.transfer_guard("disallow"):
                    state, metrics = self.trainer.train_step(state, batch)
                step += 1
                self.log.add(metrics, asked, ready)
                profiler.after(step, metrics)
                last = step == total_steps
                if name := stop_signal(step):
                    logging.info("%s: saving a checkpoint, then exiting", name)
                    last = True
                save_now = self.schedule.saves(step, last)
                # Also before every save, because a state that is not finite must not become a checkpoint.
                if last or save_now or step % self.schedule.log_period == 0:
                    self.log.write(step)
                    self._check_lock()
                    self.checkpointer.check()
                scalars = None
                if self.schedule.evaluates(step):
                    scalars = self.evaluation.run(state, step)
                if save_now:
                    self.checkpointer.save(state, stream.position(step), step, scalars)
            try:
                self.checkpointer.wait()  # Inside `_stop_signal`, so that another signal doesn't end it.
            finally:
                self._check_lock()
        return step

    def _check_lock(self) -> None:
        """Checks that MODEL_DIR is still there and this process's own; process 0 has the lock."""
        try:
            if self.lock:
                self.lock.check()
        except errors.UserError as error:
            with contextlib.suppress(checkpoints.CheckpointError):
                self.checkpointer.wait()
            names = sorted(os.listdir(self.model_dir)) if os.path.isdir(self.model_dir) else []
            # Orbax makes the directory anew for a checkpoint that it is writing.
            if names and all(name.startswith("checkpoint_") for name in names):
                raise errors.UserError(
                    f"{error}. There is a new {self.model_dir} with what was being written"
                    f" ({', '.join(names)}): delete that before you bring the directory back"
                ) from error
            raise


def _check_vocabulary(
    cfg: input_pipeline.DatasetConfig, model_dir: str, restore: checkpoints.RestoreCheckpointConfig | None
) -> None:
    """Checks that a run continues with its vocabulary, and warns of one that begins with another model's.

    Raises:
      errors.UserError: MODEL_DIR's checkpoint was trained with another vocabulary.
    """
    vocabulary = input_pipeline.vocabulary_model(cfg)
    if checkpoints.newest_checkpoint(model_dir):
        fix = "Set VOCABULARY to that file, or begin anew in another MODEL_DIR"
        model_description.check_vocabulary(model_dir, vocabulary, fix)
    elif restore and restore.path:
        initial = os.path.dirname(checkpoints.find_checkpoint(restore.path)[0])
        try:
            model_description.check_vocabulary(initial, vocabulary, "If that isn't meant, stop this training")
        except errors.UserError as error:  # The training may teach the new words.
            logging.warning("INITIAL_CHECKPOINT_PATH: %s", error)


def _stream(
    model: models.BaseModel, cfg: input_pipeline.DatasetConfig, partitioner: partitioning.PjitPartitioner
) -> input_pipeline.TrainStream:
    """Opens a stream of the model's batches."""
    converter = {"feature_converter_cls": model.FEATURE_CONVERTER_CLS} if model.FEATURE_CONVERTER_CLS else {}
    return input_pipeline.TrainStream(cfg, partitioner.get_data_layout, **converter)


def _initial_state(
    trainer: trainer_lib.Trainer,
    checkpointer: checkpoints.Checkpointer,
    restore: checkpoints.RestoreCheckpointConfig | None,
) -> tuple[Any, dict[str, Any]]:
    """Restores the newest whole checkpoint, or makes a fresh state, with parts from `restore` if given.

    Returns:
      (state, position in the training data).
    """
    if restored := checkpointer.restore_newest(trainer.abstract_state):
        logging.info("continuing from step %d", int(restored[0].step))
        return restored
    given = ()
    if restore and restore.path:
        given = checkpoints.restore_matching(restore.path, trainer.abstract_state)
    return trainer.init_state(*given), {}


def _write_description(
    model: models.BaseModel,
    cfg: input_pipeline.DatasetConfig,
    stream: input_pipeline.TrainStream,
    checkpoint_cfg: checkpoints.CheckpointConfig,
    model_dir: str,
    random_seed: int,
    step: int,
) -> None:
    """Writes the model's description, which predictions need beside the parameters, if it has one.

    A run that continues keeps the name of the checkpoint that its first parameters came from, and the
    calibration of the checkpoint that it belongs to.
    """
    content = model.describe(cfg.task_feature_lengths, stream.batch_shapes, input_pipeline.fit())
    if content is None:
        return
    model_description.check_fit(model, input_pipeline.fit())
    initial = checkpoint_cfg.restore.path if checkpoint_cfg.restore else None
    training = {
        "task": cfg.mixture_or_task_name,
        "batch_size": cfg.batch_size,
        "random_seed": random_seed,
        "initial_checkpoint": initial,
    }
    earlier = model_description.recorded_training(model_dir) if step else {}
    for name in training.keys() & earlier.keys():
        if training[name] != earlier[name]:
            logging.warning("%s was %r, now it is %r", name, earlier[name], training[name])
    if earlier.get("initial_checkpoint", initial) != initial:
        logging.warning("the run continues from step %d of its own, so initial_checkpoint isn't read", step)
        training["initial_checkpoint"] = earlier["initial_checkpoint"]
    if step and model.has_uncertainty:
        with contextlib.suppress(errors.UserError):  # The file is missing or damaged, and is written anew.
            if calibration := model_description.read(model_dir).calibration:
                content |= {"calibration": dataclasses.asdict(calibration)}
    model_description.write(model_dir, content | {"training": training}, input_pipeline.vocabulary_model(cfg))


def _open_log(
    model_dir: str,
    trainer: trainer_lib.Trainer,
    partitioner: partitioning.PjitPartitioner,
    cfg: input_pipeline.DatasetConfig,
    checkpointer: checkpoints.Checkpointer,
    total_steps: int,
    state: trainer_lib.TrainState,
) -> training_log.TrainingLog:
    """Opens the log of a run that begins at this state."""

    def describe_step(step: int) -> str:
        return _describe_step(cfg, step, model_dir, checkpointer)

    devices = partitioner.mesh.devices.flatten().tolist()
    return training_log.TrainingLog(
        model_dir,
        total_steps,
        int(state.step),
        cfg.batch_size,
        len(devices),
        training_log.step_seconds_at_peak(trainer, devices),
        describe_step,
        trainer.model.progress_metrics,
    )


def _describe_step(
    cfg: input_pipeline.DatasetConfig, step: int, model_dir: str, checkpointer: checkpoints.Checkpointer
) -> str:
    """Describes a step that went wrong. Writes all its examples to a file, as there may be thousands."""
    names = input_pipeline.example_names(cfg, step - 1)
    path = epath.Path(model_dir) / f"examples_of_step_{step}.txt"
    if jax.process_index() == 0:
        writing.write(path, "\n".join([*names, ""]))
    more = " ..." if len(names) > _NUM_NAMED_EXAMPLES else ""
    return (
        f"Its {len(names)} examples, all in {path}: {', '.join(names[:_NUM_NAMED_EXAMPLES])}{more}\n"
        f"Last good checkpoint: {checkpointer.last_complete()}. Lower the learning rate or mend the examples;"
        " the same command starts again from there"
    )


@contextlib.contextmanager
def _stop_signal() -> Iterator[Callable[[int], str | None]]:
    """Makes SIGTERM and Ctrl-C ask for a stop after a step; a second Ctrl-C stops at once.

    Several processes all stop at the same step: the handler for SIGTERM of jax's coordination service makes
    them agree, so it stays in place.

    Yields:
      A function to call after every step. It names the signal that asks for a stop; None: go on. (A handler
      must not log, because it may interrupt a log call.)
    """
    received = []
    several = jax.process_count() > 1

    def ask(signum, frame):
        del frame
        if received and signum == signal.SIGINT:  # A wrapper may send SIGTERM again.
            raise KeyboardInterrupt
        received.append(signal.Signals(signum).name)
        if several:
            os.kill(os.getpid(), signal.SIGTERM)

    def stop(step: int) -> str | None:
        if several:
            notified = multihost_utils.reached_preemption_sync_point(step)
            return "a process was asked to stop" if notified else None
        return received[0] if received else None

    signals = (signal.SIGINT,) if several else (signal.SIGTERM, signal.SIGINT)
    previous = {signum: signal.signal(signum, ask) for signum in signals}
    try:
        yield stop
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


class _Evaluation:
    """Measures losses and draws pictures of validation data, for TensorBoard (MODEL_DIR/training_eval)."""

    def __init__(
        self,
        trainer: trainer_lib.Trainer,
        cfg: input_pipeline.DatasetConfig | None,
        partitioner: partitioning.PjitPartitioner,
        num_batches: int,
        model_dir: str,
    ):
        self._trainer = trainer
        self._stream = _stream(trainer.model, cfg, partitioner) if cfg else None
        self._num_batches = num_batches
        if cfg:
            self._own_rows = partitioner.own_rows(cfg.batch_size)
            self._writer = training_log.create_writer(model_dir, "training_eval", cfg.mixture_or_task_name)

    def run(self, state: trainer_lib.TrainState, step: int) -> dict[str, float] | None:
        """Measures the same batches each time, so that the points of a curve compare."""
        if not self._stream:
            return None
        batches = self._stream.batches({})
        first = next(batches)
        rest = (next(batches) for _ in range(self._num_batches - 1))
        scalars = self._trainer.evaluate(state, [first, *rest])
        if jax.process_index() == 0:
            logging.info("eval at %d  %s", step, training_log.format_metrics(scalars))
        self._writer.write_scalars(step, scalars)
        if images := self._images(state, first):
            self._writer.write_images(step, images)
        return scalars

    def _images(
        self, state: trainer_lib.TrainState, batch: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Draws this process's first examples of a batch."""
        # Every process has the predictions for the examples of all processes.
        rows = self._own_rows[:_NUM_SUMMARY_IMAGES]

        def predict(change: Callable[[models.Images], models.Images] = lambda batch: batch) -> models.Images:
            outputs = self._trainer.predict(state, change(batch))
            return {name: np.asarray(value.addressable_data(0)[rows]) for name, value in outputs.items()}

        shown = {name: value[:_NUM_SUMMARY_IMAGES] for name, value in batch.items()}
        return self._trainer.model.summary_images(shown, predict)

    def close(self) -> None:
        if self._stream:
            self._writer.close()


def _write_model_info(path: str, params: Any) -> None:
    """Writes one line a parameter, and their number (T5X's file)."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    lines = [
        f"{jax.tree_util.keystr(p, simple=True, separator='/')} {leaf.dtype} {leaf.shape}"
        for p, leaf in leaves
    ]
    total = sum(leaf.size for _, leaf in leaves)
    writing.write(path, "\n".join([*lines, f"total number of parameters: {total}", ""]))
    logging.info("%d parameters", total)


if __name__ == "__main__":
    gin_utils.run(train, compilation_cache=True)
