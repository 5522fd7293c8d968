"""Checkpoints: Orbax, `MODEL_DIR/checkpoint_<step>/`, with the training state and the data position."""

import contextlib
import dataclasses
import itertools
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, cast

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from flax import traverse_util
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy

from richhf_jax import errors, saved_arrays, sealing, writing
from richhf_jax import train_state as train_state_lib

_POSITION, _METRICS = "data_position", "metrics"
_NAME = re.compile(r"checkpoint_(\d+)")
# TensorFlow's file, in the directory that was given or in the export's folder.
_SAVED_MODEL = ("saved_model.pb", "saved_model/saved_model.pb")
# What to do where a checkpoint doesn't fit the model of some gin files.
_SAME_GIN = "give the same gin files and the same --gin. flags as in training"


@dataclasses.dataclass(frozen=True)
class SaveCheckpointConfig:
    """Settings of when to save, and which checkpoints to keep.

    The names are T5X's; `metric_...` are those of its SaveBestCheckpointer.

    Attributes:
      period: number of steps between checkpoints; the last step is always saved.
      keep: number of newest checkpoints to keep; None keeps all. With 1 there is none to fall back to when
        the newest one is damaged.
      keep_best: number of checkpoints to keep besides, those with the best metric; None: none.
      metric_name_to_monitor: name of a metric of the validation data. If it isn't measured at a checkpoint's
        step, the checkpoint counts as the worst.
      metric_mode: 'min' if lower metrics are better, 'max' if higher ones are.

    Raises:
      errors.UserError: a number is below 1, or the mode is unknown.
    """

    period: int
    keep: int | None = 2
    keep_best: int | None = None
    metric_name_to_monitor: str = "loss"
    metric_mode: str = "min"

    def __post_init__(self):
        for name in ("period", "keep", "keep_best"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise errors.UserError(f"SaveCheckpointConfig.{name} must be at least 1, got {value}")
        if self.metric_mode not in ("min", "max"):
            raise errors.UserError(
                f"SaveCheckpointConfig.metric_mode must be 'min' or 'max', got {self.metric_mode!r}"
            )


@dataclasses.dataclass(frozen=True)
class RestoreCheckpointConfig:
    """The source of the first parameters (T5X's name). If MODEL_DIR has a checkpoint, that is used instead.

    Attributes:
      path: a `checkpoint_<step>` directory, or a MODEL_DIR, whose newest checkpoint is read. Parameters
        that it lacks, or whose shape differs, keep their fresh values and are logged; optimizer and
        step begin anew. None: all parameters are fresh.
    """

    path: str | None


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Settings of saving and restoring (T5X's name).

    Attributes:
      save: when to save; None saves nothing.
      restore: the source of the first parameters; None: they are fresh.
    """

    save: SaveCheckpointConfig | None
    restore: RestoreCheckpointConfig | None = None


class CheckpointError(errors.UserError):
    """A checkpoint is absent, doesn't fit, is damaged or can't be written."""


class _Manager(ocp.CheckpointManager):
    """Orbax's manager with two methods changed."""

    def reached_preemption(self, step: int) -> bool:
        """Returns False, because the training loop itself asks whether a signal came.

        Processes agree on the step to stop at by the last step that each has asked about. Orbax would ask
        about an old step, from another thread.
        """
        del step
        return False

    def metrics(self, step: int) -> dict[str, float] | None:
        """Returns the metrics of a checkpoint; None if it has none, or if they are damaged."""
        try:
            sealing.read(epath.Path(self.directory) / f"checkpoint_{step}", _METRICS)
            return super().metrics(step)
        except (ValueError, errors.UserError) as error:
            logging.warning("checkpoint_%d counts as the worst, its metrics are damaged: %s", step, error)
            return None


class Checkpointer:
    """Saves to and restores from one MODEL_DIR. Saving runs beside the training.

    At the end of a `with` block it waits until everything is written.
    """

    def __init__(self, model_dir: str, cfg: SaveCheckpointConfig | None = None):
        """Opens the directory.

        Args:
          model_dir: MODEL_DIR, which is made if it doesn't exist.
          cfg: which checkpoints to keep; None keeps all.

        Raises:
          CheckpointError: the directory can't be made, or Orbax can't write to it.
        """
        self._directory = _to_write(model_dir)
        self._metric = cfg.metric_name_to_monitor if cfg and cfg.keep_best else None
        # Checksums of the arrays of checkpoints that are being saved, by the checkpoint's name.
        self._checksums: dict[str, dict[str, str]] = {}
        options = ocp.CheckpointManagerOptions(
            step_prefix="checkpoint",
            create=True,
            preservation_policy=_preservation_policy(cfg),
            # Orbax saves metrics only if this is given.
            best_fn=_metric_fn(cfg) if cfg and self._metric else None,
            temporary_path_class=sealing.temporary_path_class(self._directory, self._checksums),
        )
        try:
            self._manager = _Manager(
                self._directory, options=options, item_names=(saved_arrays.STATE, _POSITION)
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{model_dir} can't be used as MODEL_DIR: {writing.reason(error)}"
            ) from error

    def save(
        self,
        state: train_state_lib.TrainState,
        data_position: Mapping[str, Any],
        step: int,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Begins to save a checkpoint. It is complete or absent, never half-written.

        A step that is already saved is not written again.

        Args:
          state: the training state.
          data_position: JSON-able position in the training data.
          step: number of the checkpoint.
          metrics: metrics of the validation data; None if they weren't measured at this step.

        Raises:
          CheckpointError: this checkpoint or the one before can't be written (earlier ones stay); or
            `metrics` lacks the metric that says which are best.
        """
        if metrics is not None and self._metric and self._metric not in metrics:
            raise CheckpointError(
                f"SaveCheckpointConfig.metric_name_to_monitor: the validation data have no {self._metric!r},"
                f" only {', '.join(sorted(metrics))}"
            )
        content = state.state_dict()
        items = ocp.args.Composite(
            **{
                saved_arrays.STATE: ocp.args.StandardSave(content),
                _POSITION: ocp.args.JsonSave(dict(data_position)),
            }
        )
        # Now, because the next step overwrites the arrays.
        checksums = sealing.of_arrays(saved_arrays.flat(content))
        if jax.process_index() == 0:
            self._checksums[f"checkpoint_{step}"] = checksums
        with self._explained():
            self._manager.save(step, args=items, metrics=dict(metrics or {}) if self._metric else None)

    def wait(self) -> None:
        """Waits until everything is written.

        Raises:
          CheckpointError: a checkpoint can't be written.
        """
        with self._explained():
            self._manager.wait_until_finished()

    def check(self) -> None:
        """Checks, without waiting, that the checkpoint saved last was written, if saving has ended.

        Raises:
          CheckpointError: it can't be written.
        """
        if not self._manager.is_saving_in_progress():
            self.wait()

    def last_complete(self) -> str:
        """Waits for the checkpoint being written, and returns the newest one's path, or "none yet"."""
        with contextlib.suppress(Exception):  # A checkpoint that failed doesn't count.
            self._manager.wait_until_finished()
        newest = newest_checkpoint(self._directory)
        return str(newest) if newest else "none yet"

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns Orbax's exceptions when it can't write into a CheckpointError."""
        try:
            yield
        # Orbax raises many kinds: OSError for small files, ValueError for arrays, wrapped or not.
        except Exception as error:
            raise CheckpointError(
                f"{self._directory}: a checkpoint can't be written: {writing.reason(error)}\n"
                f"Last complete checkpoint: {self.last_complete()}. Make room or give the right to write,"
                " then continue by the same command"
            ) from error

    def restore_newest(
        self, abstract_state: train_state_lib.TrainState
    ) -> tuple[train_state_lib.TrainState, dict[str, Any]] | None:
        """Reads the newest checkpoint that is whole.

        A damaged checkpoint is skipped with a warning. Once an older one is restored, the damaged one is
        renamed to `damaged_checkpoint_<step>`, so that its step can be saved again.

        Args:
          abstract_state: the state to restore, of `ShapeDtypeStruct`s with shardings.

        Returns:
          (state, data position); None if there is no checkpoint. If the checkpoint lacks the average of the
          parameters that the state has, the average begins at the parameters; if the state has none, the
          checkpoint's is dropped. Either is logged.

        Raises:
          CheckpointError: all checkpoints are damaged; or the newest whole one is of another model, or holds
            parameters alone.
        """
        damaged = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            directory = self._directory / f"checkpoint_{step}"
            restored, reason = _restore_whole(directory, abstract_state)
            if restored:
                self._set_aside(damaged)
                return restored
            # Only the process that found the damage knows the reason.
            logging.warning("skipping %s: %s", directory, reason or "another process can't read it")
            damaged.append(directory)
        if damaged:
            raise CheckpointError(
                f"no checkpoint in {self._directory} is whole: {', '.join(path.name for path in damaged)},"
                " see the warnings above. Bring one back from a copy, or begin anew in another MODEL_DIR;"
                " with SaveCheckpointConfig.keep above 1 there is an older one to fall back to"
            )
        return None

    def _set_aside(self, damaged: list[epath.Path]) -> None:
        if not damaged:
            return
        for path in damaged if jax.process_index() == 0 else ():
            names = (path.parent / f"damaged{number or ''}_{path.name}" for number in itertools.count())
            path.rename(next(name for name in names if not name.exists()))
        multihost_utils.sync_global_devices("damaged checkpoints renamed")
        self._manager.reload()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, exc_type: type | None, *args) -> None:
        try:
            self.close()
        except CheckpointError as error:
            if exc_type is None:
                raise
            logging.warning("%s", error)  # The first exception ends the program, not this one.

    def close(self) -> None:
        """Waits until everything is written, and closes Orbax's manager."""
        with self._explained():
            self._manager.close()


def _metric_fn(cfg: SaveCheckpointConfig):
    """Makes a function that returns the number by which a checkpoint is ranked, given its metrics."""
    worst = math.inf if cfg.metric_mode == "min" else -math.inf

    def metric(metrics: Mapping[str, float]) -> float:
        value = metrics.get(cfg.metric_name_to_monitor, worst)
        return value if math.isfinite(value) else worst

    return metric


def _preservation_policy(cfg: SaveCheckpointConfig | None) -> preservation_policy.PreservationPolicy:
    newest = preservation_policy.LatestN(cfg.keep if cfg else None)
    if cfg is None or cfg.keep_best is None:
        return newest
    best = preservation_policy.BestN(
        get_metric_fn=_metric_fn(cfg),
        reverse=cfg.metric_mode == "min",  # The best stand last.
        n=cfg.keep_best,
        keep_checkpoints_without_metrics=False,
    )
    return preservation_policy.AnyPreservationPolicy([newest, best])


def _any_process(reason: str | None) -> bool:
    """Returns whether any process has a reason. All processes must call it."""
    return bool(np.any(multihost_utils.process_allgather(np.array(reason is not None))))


def _restore_whole(
    directory: epath.Path, abstract_state: train_state_lib.TrainState
) -> tuple[tuple[train_state_lib.TrainState, dict[str, Any]] | None, str | None]:
    """Reads state and data position of a checkpoint, if it is whole in all processes, which must all call it.

    Returns:
      ((state, data position), None), or (None, the reason if this process knows it).

    Raises:
      CheckpointError: the checkpoint is of another model, or holds parameters alone.
    """
    reason = _damage(directory) if jax.process_index() == 0 else None
    if _any_process(reason):
        return None, reason
    wanted = _wanted(directory, abstract_state)
    restored, reason = _read(directory, wanted)
    if _any_process(reason) or restored is None:
        return None, reason
    parts, position, checksums = restored
    try:  # Here all processes find the same.
        state = train_state_lib.TrainState(**saved_arrays.checked(directory, parts, wanted, checksums))
    except sealing.DamageError as error:
        return None, str(error)
    if abstract_state.ema_params and not state.ema_params:
        logging.warning("%s has no average of the parameters (EMA_DECAY): it begins here", directory)
        state = state.with_average()
    return (state, position), None


def _damage(directory: epath.Path) -> str | None:
    """Says how the files of a training's checkpoint are damaged; None if they are whole."""
    try:
        saved_arrays.check_files(directory)
        if not _is_parameters_alone(directory, saved_arrays.metadata(directory)):
            _read_position(directory)
    # Orbax and TensorStore raise many kinds of exceptions for broken files.
    except Exception as error:
        return saved_arrays.reason(error)
    return None


def _read_position(directory: epath.Path) -> dict[str, Any]:
    """Reads the data position.

    Raises:
      Exception: of many kinds, if its file is damaged or can't be read.
    """
    sealing.read(directory, _POSITION)
    return dict(ocp.JsonCheckpointHandler().restore(directory / _POSITION))


def _is_parameters_alone(directory: epath.Path, saved: Mapping[str, Any]) -> bool:
    """Returns whether `save_params` wrote the checkpoint."""
    return set(saved) <= {"params", "flax_mutables"} and not (directory / _POSITION).exists()


def _wanted(directory: epath.Path, abstract_state: train_state_lib.TrainState) -> dict[str, Any]:
    """Returns the parts to read, of `ShapeDtypeStruct`s, and checks that a checkpoint holds all their arrays.

    A run may begin to keep an average of its parameters, or end to: then it is no part to read.

    Raises:
      CheckpointError: the checkpoint is of another model or optimizer, or holds parameters alone.
    """
    tree = saved_arrays.metadata(directory)
    if _is_parameters_alone(directory, tree):
        raise CheckpointError(
            f"{directory} holds parameters alone, which no training can continue from: "
            "give it as INITIAL_CHECKPOINT_PATH, and another MODEL_DIR"
        )
    parts = abstract_state.state_dict()
    if "ema_params" not in tree:
        parts.pop("ema_params", None)
    elif "ema_params" not in parts:
        logging.warning("%s has an average of the parameters, which is dropped: EMA_DECAY = None", directory)
        tree = {name: part for name, part in tree.items() if name != "ema_params"}
    saved, wanted = saved_arrays.flat(tree), saved_arrays.flat(parts)
    _check_scanned_alike(directory, saved.keys(), wanted.keys())
    # Parameters first, because the message shows only the first three names.
    names = sorted(saved.keys() | wanted.keys(), key=lambda name: (name[0] != "params", name))
    wrong = {
        name: wanted.get(name)
        for name in names
        if name not in saved or name not in wanted or tuple(saved[name].shape) != wanted[name].shape
    }
    if wrong:
        raise misfit(directory, wrong, saved, f"{_SAME_GIN}. For another model, give another MODEL_DIR")
    return parts


def _check_scanned_alike(
    path: epath.PathLike,
    saved: Collection[tuple[str, ...]],
    wanted: Collection[tuple[str, ...]],
    fix: str | None = None,
) -> None:
    """Checks that checkpoint and model agree on SCAN_LAYERS: on one array for all layers of a stack, or many.

    Args:
      path: the checkpoint.
      saved: paths of names in the checkpoint.
      wanted: paths of names in the model.
      fix: what to do if the model isn't that of gin files.

    Raises:
      CheckpointError: they don't agree.
    """
    for in_model, in_checkpoint in (("layers", "layers_0"), ("layers_0", "layers")):
        renamed = {
            tuple(in_checkpoint if part == in_model else part for part in name)
            for name in wanted
            if in_model in name and name not in saved
        }
        if not renamed.isdisjoint(saved):
            theirs = in_checkpoint == "layers"
            problem = (
                f"{path} is of a model with SCAN_LAYERS = {theirs}, but this model has SCAN_LAYERS ="
                f" {not theirs}"
            )
            if fix:
                raise CheckpointError(f"{problem}: {fix}")
            raise CheckpointError(
                f"{problem}: give --gin.SCAN_LAYERS={theirs} behind all gin files. Or let"
                f" python -m richhf_jax.convert --from={path} --to=DIR --gin.SCAN_LAYERS={not theirs}"
                " --gin_file=... write the parameters for this model, for INITIAL_CHECKPOINT_PATH or"
                " CHECKPOINT_PATH"
            )


def misfit(
    path: epath.PathLike,
    wrong: Mapping[tuple[str, ...], Any],
    saved: Mapping[tuple[str, ...], Any],
    fix: str,
    untrained: bool = False,
    flags: str = "--gin_file=...",
) -> CheckpointError:
    """Returns the error for parameters that aren't those of the model.

    Args:
      path: the checkpoint, or file of parameters.
      wrong: path of names -> the model's array, where the checkpoint has another or none; None: the model has
        none.
      saved: path of names -> the array that the checkpoint has.
      fix: what to do.
      untrained: whether the checkpoint may be a conversion, which lacks what only training makes.
      flags: the gin flags for a training from it.
    """
    lines = [_describe(name, leaf, saved) for name, leaf in wrong.items()]
    message = f"{path} doesn't fit this model: {'; '.join(lines[:3])}{' ...' if len(lines) > 3 else ''}\n"
    if not untrained or not saved.keys().isdisjoint(wrong):
        return CheckpointError(message + fix[0].upper() + fix[1:])
    convert, start = "", os.fspath(path)
    if start.endswith(".safetensors"):  # Training reads checkpoints alone.
        convert, start = f"python -m richhf_jax.convert --from={start} --to=DIR {flags}, then ", "DIR"
    return CheckpointError(
        f"{message}It lacks {len(wrong)} arrays and has all others, as a conversion of published weights,"
        " which have no trained heads. Train from it first, with the gin files of the conversion:"
        f" {convert}python -m richhf_jax.train {flags} --gin_file=runs/train.gin"
        f" --gin.INITIAL_CHECKPOINT_PATH={start} --gin.MODEL_DIR=RUN --gin.MIXTURE_OR_TASK_NAME=TASK"
        f" --gin.TRAIN_STEPS=N. Or name a checkpoint that is trained. If this one is trained, {fix}"
    )


def _read(
    directory: epath.Path, wanted: Mapping[str, Any]
) -> tuple[tuple[dict[str, Any], dict[str, Any], dict[str, str] | None] | None, str | None]:
    """Reads parts of the state, data position and checksums, without waiting for other processes.

    Returns:
      ((parts of the state, data position, checksums), None), or (None, the reason why they can't be read).
    """
    try:
        checksums, position = sealing.read(directory, saved_arrays.STATE), _read_position(directory)
        return (saved_arrays.read(directory, wanted), position, checksums), None
    except Exception as error:  # As in `_damage`.
        return None, saved_arrays.reason(error)


def save_params(model_dir: str, params: Any, step: int = 0, flax_mutables: Any = None) -> None:
    """Writes parameters alone, as `checkpoint_<step>`, for `restore_inference_state` and `restore_matching`.

    It takes about 0.4 times the parameters' memory in addition to them.

    Args:
      model_dir: the directory of the checkpoint.
      params: a tree of `jax.Array`, all parameters or a part. Orbax would copy NumPy arrays.
      step: the checkpoint's number.
      flax_mutables: a tree of `jax.Array`, the mutable collections; None: the model has none.

    Raises:
      CheckpointError: Orbax can't write to the directory.
    """
    content = {"params": params} | ({"flax_mutables": flax_mutables} if flax_mutables else {})
    directory = _to_write(model_dir) / f"checkpoint_{step}"
    checksums = {directory.name: sealing.of_arrays(saved_arrays.flat(content))}
    # Orbax keeps the content of a file in memory until the file is full: small files take less.
    arrays = ocp.PyTreeCheckpointHandler(save_concurrent_gb=1)
    handler = ocp.CompositeCheckpointHandler(**cast(dict[str, Any], {saved_arrays.STATE: arrays}))
    paths = sealing.temporary_path_class(directory.parent, checksums)
    with ocp.Checkpointer(handler, temporary_path_class=paths) as checkpointer:
        state = ocp.args.PyTreeSave(content, ocdbt_target_data_file_size=16 * 2**20)
        checkpointer.save(directory, args=ocp.args.Composite(**{saved_arrays.STATE: state}))


def _absolute(path: epath.PathLike) -> epath.Path:
    """Makes a path absolute, because Orbax takes no relative ones; a URL ("gs://...") stays as it is."""
    return epath.Path(path) if "://" in os.fspath(path) else epath.Path(os.path.abspath(path))


def _to_write(path: str) -> epath.Path:
    """Makes the path of a directory for checkpoints absolute.

    Raises:
      CheckpointError: Orbax would take the path for a pattern of others, and write nothing that can be read.
    """
    if "[" in path:
        raise CheckpointError(f"{path} can't hold checkpoints, because Orbax can't write to a path with '['")
    return _absolute(path)


def newest_checkpoint(model_dir: epath.PathLike) -> epath.Path | None:
    """Returns the `checkpoint_<step>` of the highest step in a MODEL_DIR; None if there is none."""
    folder = epath.Path(model_dir)  # Not `glob`: it would take "[1]" in the path for a pattern.
    paths = folder.iterdir() if folder.is_dir() else ()
    steps = {int(m[1]): p for p in paths if (m := _NAME.fullmatch(p.name))}
    return steps[max(steps)] if steps else None


def find_checkpoint(path: str) -> tuple[str, int]:
    """Finds a checkpoint.

    Args:
      path: a checkpoint's directory, or a MODEL_DIR, whose newest checkpoint is taken.

    Returns:
      (the checkpoint's absolute path, its step).

    Raises:
      CheckpointError: there is no checkpoint.
    """
    directory = _absolute(path)
    if not _NAME.fullmatch(directory.name):
        newest = newest_checkpoint(directory)
        if newest is None and any((directory / file).exists() for file in _SAVED_MODEL):
            raise CheckpointError(
                f"{directory} is a SavedModel, which is a program for TensorFlow and no checkpoint: name the"
                " checkpoint that was exported, or another export of it (--to=safetensors)"
            )
        if newest is None:
            raise CheckpointError(
                f"no checkpoint_<step> in {directory}: train first, or name another directory"
            )
        directory = newest
    if not (directory / saved_arrays.STATE).is_dir():
        raise CheckpointError(f"{directory} is not a checkpoint: it holds no {saved_arrays.STATE}/")
    return str(directory), int(directory.name.split("_")[1])


def restore_inference_state(
    path: str,
    abstract_state: train_state_lib.TrainState | train_state_lib.InferenceState,
    fix: str | None = None,
    flags: str = "--gin_file=...",
) -> train_state_lib.InferenceState:
    """Reads the parameters and the mutable collections of a model from a checkpoint.

    Of a checkpoint with an average of the parameters, that is read.

    Args:
      path: as for `find_checkpoint`.
      abstract_state: `ShapeDtypeStruct`s with shardings.
      fix: what to do where the checkpoint doesn't fit; None: the model is that of gin files, and the message
        tells of these.
      flags: see `misfit`.

    Raises:
      CheckpointError: there is no checkpoint, or an array is missing or of another shape.
    """
    found, wrong, saved = _restore_found(path, abstract_state, fix)
    if wrong:
        untrained = bool(found[0]) and not (epath.Path(find_checkpoint(path)[0]) / _POSITION).exists()
        raise misfit(path, wrong, saved, fix or _SAME_GIN, untrained, flags)
    params, mutables = map(traverse_util.unflatten_dict, found)
    return train_state_lib.InferenceState(params, mutables)


def restore_matching(
    path: str, abstract_state: train_state_lib.TrainState | train_state_lib.InferenceState
) -> tuple[dict[tuple[str, ...], jax.Array], dict[tuple[str, ...], jax.Array]]:
    """Reads the arrays that have the same name and shape in the checkpoint, and logs the names of the others.

    Of a checkpoint with an average of the parameters, that is read.

    Args:
      path: as for `find_checkpoint`.
      abstract_state: `ShapeDtypeStruct`s with shardings.

    Returns:
      (parameters, mutable collections), each {path of names in the tree: array}.

    Raises:
      CheckpointError: there is no checkpoint, or it shares no parameter with the model.
    """
    found, wrong, saved = _restore_found(path, abstract_state)
    if not found[0]:
        raise CheckpointError(
            f"{path} shares no parameter with this model: name another checkpoint, or its model's gin files"
        )
    logging.info("initialised %d arrays from %s, %d stay fresh", sum(map(len, found)), path, len(wrong))
    for name, leaf in wrong.items():
        logging.info("fresh: %s", _describe(name, leaf, saved))
    return found


def _restore_found(
    path: str,
    abstract_state: train_state_lib.TrainState | train_state_lib.InferenceState,
    fix: str | None = None,
) -> tuple[tuple[dict, dict], dict[tuple[str, ...], Any], dict[tuple[str, ...], Any]]:
    """Reads the arrays that a checkpoint has in the right shape, and lists those that it lacks.

    Returns:
      (parameters, mutable collections), each {path of names: array}; the model's arrays that it lacks, or has
      in another shape; and what it has.
    """
    directory = epath.Path(find_checkpoint(path)[0])
    checksums = array_checksums(directory)
    with _explained_damage(directory):
        tree = saved_arrays.metadata(directory)
    item, wrong, there = {}, {}, {}
    places = {"params": train_state_lib.inference_part(tree), "flax_mutables": "flax_mutables"}
    if places["params"] != "params":
        logging.info("%s has an average of the parameters, which is read in their place", directory)
    for part, place in places.items():
        saved: dict[tuple, Any] = traverse_util.flatten_dict(tree.get(place, {}))
        wanted: dict[tuple, Any] = traverse_util.flatten_dict(getattr(abstract_state, part))
        _check_scanned_alike(path, saved.keys(), wanted.keys(), fix)
        fits = {n: leaf for n, leaf in wanted.items() if n in saved and tuple(saved[n].shape) == leaf.shape}
        wrong |= {name: leaf for name, leaf in wanted.items() if name not in fits}
        there |= saved
        if fits:  # Orbax can't restore an empty tree.
            item[place] = traverse_util.unflatten_dict(fits)
    restored = {}
    if item:
        with _explained_damage(directory):
            restored = saved_arrays.checked(directory, saved_arrays.read(directory, item), item, checksums)
    params, mutables = (traverse_util.flatten_dict(restored.get(place, {})) for place in places.values())
    return (params, mutables), wrong, there


def array_checksums(directory: epath.PathLike) -> dict[str, str] | None:
    """Checks the files of a checkpoint, and returns the checksums of its arrays, for readers of their own.

    Args:
      directory: a `checkpoint_<step>`.

    Returns:
      Name of an array, such as "params/encoder/relpos_bias/rel_embedding" -> the result of
      `checksums.of_array`; None: the checkpoint has no checksums.

    Raises:
      CheckpointError: a file is damaged or can't be read.
    """
    with _explained_damage(epath.Path(directory)):
        return saved_arrays.check_files(epath.Path(directory))


@contextlib.contextmanager
def _explained_damage(directory: epath.Path) -> Iterator[None]:
    """Turns any exception while reading a checkpoint into a CheckpointError."""
    try:
        yield
    except Exception as error:  # As in `_damage`.
        raise CheckpointError(
            f"{directory} is damaged or can't be read: {saved_arrays.reason(error)}. Bring it back from a"
            " copy, or name another checkpoint"
        ) from error


def _describe(name: tuple[str, ...], leaf: Any | None, saved: Mapping) -> str:
    there = f"{tuple(saved[name].shape)} in the checkpoint" if name in saved else "not in the checkpoint"
    return f"{'/'.join(name)} {tuple(leaf.shape) if leaf is not None else '(not in the model)'}: {there}"
