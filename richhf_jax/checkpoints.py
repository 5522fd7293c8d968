"""Checkpoints: Orbax, `MODEL_DIR/checkpoint_<step>/`, with the training state and the data position."""

import contextlib
import dataclasses
import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from absl import logging
from etils import epath
from flax import traverse_util
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy

from richhf_jax import errors, writing
from richhf_jax import train_state as train_state_lib

_STATE, _POSITION, _METRICS = "state", "data_position", "metrics"
_NAME = re.compile(r"checkpoint_(\d+)")


@dataclasses.dataclass(frozen=True)
class SaveCheckpointConfig:
    """When to save, and what to keep (T5X's name; `metric_...` are its SaveBestCheckpointer's).

    Attributes:
      period: steps between checkpoints; the last step is always saved.
      keep: how many of the newest to keep; None keeps all. With 1 there is nothing to fall back to when the
        newest one is damaged.
      keep_best: how many to keep besides, for their metric; None: none.
      metric_name_to_monitor: one of the metrics of the validation data. A checkpoint of a step at which none
        is measured counts as the worst.
      metric_mode: 'min' or 'max': which is better.

    Raises:
      errors.UserError: a value makes no sense.
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
    """Where the first parameters come from (T5X's name); a checkpoint of MODEL_DIR itself wins over it.

    Attributes:
      path: a `checkpoint_<step>` directory, or a MODEL_DIR whose newest checkpoint is meant. Parameters
        that it lacks, or whose shape differs, keep their fresh values and are listed; optimizer and
        step begin anew. None: nowhere, all are fresh.
    """

    path: str | None


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Attributes:
    save: None saves nothing.
    restore: None begins from fresh parameters.
    """

    save: SaveCheckpointConfig | None
    restore: RestoreCheckpointConfig | None = None


class CheckpointError(errors.UserError):
    """A checkpoint that isn't there, doesn't fit, is damaged or can't be written."""


class _Manager(ocp.CheckpointManager):
    """Orbax's, with two methods of its own."""

    def reached_preemption(self, step: int) -> bool:
        """False: the training loop asks. Processes agree on the step to stop at by the last step that each
        has asked for, and Orbax would ask for an old one, from another thread."""
        del step
        return False

    def metrics(self, step: int) -> dict[str, float] | None:
        """None, too, where they are damaged."""
        try:
            return super().metrics(step)
        except ValueError:
            return None


class Checkpointer:
    """Saves to and restores from one MODEL_DIR. Saving runs beside the training.

    As a context it waits, at the end, until everything is written.
    """

    def __init__(self, model_dir: str, cfg: SaveCheckpointConfig | None = None):
        """Args:
          model_dir: made where it isn't there.
          cfg: what to keep; None keeps all.

        Raises:
          CheckpointError: the directory can't be made.
        """
        self._directory = _absolute(model_dir)
        self._metric = cfg.metric_name_to_monitor if cfg and cfg.keep_best else None
        options = ocp.CheckpointManagerOptions(
            step_prefix="checkpoint",
            create=True,
            preservation_policy=_preservation_policy(cfg),
            # With it, Orbax saves the metrics.
            best_fn=_metric_fn(cfg) if self._metric else None,
        )
        try:
            self._manager = _Manager(self._directory, options=options, item_names=(_STATE, _POSITION))
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
        """Begins to save; a checkpoint is complete or absent, never half-written; a saved step stays.

        Args:
          data_position: JSON-able; where the training data stands.
          metrics: of the validation data, if measured at this step.

        Raises:
          CheckpointError: this one, or the one before, can't be written (the earlier ones stay); or there is
            no metric of the name to keep the best by.
        """
        if metrics is not None and self._metric and self._metric not in metrics:
            raise CheckpointError(
                f"SaveCheckpointConfig.metric_name_to_monitor: the validation data have no {self._metric!r},"
                f" only {', '.join(sorted(metrics))}"
            )
        items = ocp.args.Composite(
            **{
                _STATE: ocp.args.StandardSave(state.state_dict()),
                _POSITION: ocp.args.JsonSave(dict(data_position)),
            }
        )
        with self._explained():
            self._manager.save(step, args=items, metrics=dict(metrics or {}) if self._metric else None)

    def wait(self) -> None:
        """Until everything is written.

        Raises:
          CheckpointError: it can't be.
        """
        with self._explained():
            self._manager.wait_until_finished()

    def check(self) -> None:
        """Doesn't wait.

        Raises:
          CheckpointError: a checkpoint that was on its way to the disk can't be written.
        """
        if not self._manager.is_saving_in_progress():
            self.wait()

    def last_complete(self) -> str:
        """Waits for what is being written, and names the newest checkpoint, or says that there is none."""
        with contextlib.suppress(Exception):  # One that failed is none.
            self._manager.wait_until_finished()
        newest = newest_checkpoint(self._directory)
        return str(newest) if newest else "none yet"

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns what Orbax raises when it can't write into a CheckpointError."""
        try:
            yield
        # Of many kinds: Python's own for small files, ValueError for arrays, wrapped or not.
        except Exception as error:
            raise CheckpointError(
                f"{self._directory}: a checkpoint can't be written: {writing.reason(error)}\n"
                f"Last complete checkpoint: {self.last_complete()}. Make room or give the right to write,"
                " then continue by the same command"
            ) from error

    def restore_newest(
        self, abstract_state: train_state_lib.TrainState
    ) -> tuple[train_state_lib.TrainState, dict[str, Any]] | None:
        """State and data position of the newest checkpoint that is whole; None if there is no checkpoint.

        A damaged one is skipped with a warning; once an older one is restored, it is renamed to
        `damaged_checkpoint_<step>`, so that the step can be saved again.

        Args:
          abstract_state: `ShapeDtypeStruct`s with shardings: where the arrays shall go.

        Raises:
          CheckpointError: all are damaged; or the newest whole one is of another model, or holds parameters
            alone.
        """
        damaged = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            directory = self._directory / f"checkpoint_{step}"
            reason = _damage(directory) if jax.process_index() == 0 else None
            if not _any_process(reason):
                _check_fits(directory, abstract_state)
                restored, reason = _read(directory, abstract_state)
                if not _any_process(reason):
                    self._set_aside(damaged)
                    return restored
            # Only the processes that found something know what.
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
            logging.warning("%s", error)  # What came first is what ends the program.

    def close(self) -> None:
        """Waits as `wait`."""
        with self._explained():
            self._manager.close()


def _metric_fn(cfg: SaveCheckpointConfig):
    """A checkpoint's metrics -> what it is ranked by."""
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
    """Whether any process has a reason. All must call it."""
    return bool(np.any(multihost_utils.process_allgather(np.array(reason is not None))))


def _damage(directory: epath.Path) -> str | None:
    """What is wrong with the files of a checkpoint, if anything. Reads little: each array's last byte."""
    try:
        base = os.fspath(directory / _STATE)
        store = ts.KvStore.open(f"{base if '://' in base else f'file://{base}'}/|ocdbt:").result()
        reads = {key: store.read(key, byte_range=slice(-1, None)) for key in store.list().result()}
        absent = [key.decode() for key, read in reads.items() if read.result().state != "value"]
        if absent or not reads:
            return f"{base} has lost {absent[0] if absent else 'all values'}"
        # Opens all arrays at once: what doesn't open would leave tracebacks behind.
        saved = ocp.StandardCheckpointHandler().metadata(directory / _STATE).tree
        if not _is_parameters_alone(directory, saved):
            ocp.JsonCheckpointHandler().restore(directory / _POSITION)
    # Orbax and TensorStore raise all kinds of exceptions at broken files.
    except Exception as error:
        return writing.reason(error)
    return None


def _is_parameters_alone(directory: epath.Path, saved: Mapping[str, Any]) -> bool:
    """Whether `save_params` wrote it."""
    return set(saved) <= {"params", "flax_mutables"} and not (directory / _POSITION).exists()


def _flat(tree: Any) -> dict[tuple[str, ...], Any]:
    """A tree, of tuples and dataclasses, too, or as Orbax describes a saved one -> path of names -> leaf."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {tuple(jax.tree_util.keystr([key], simple=True) for key in path): leaf for path, leaf in paths}


def _check_fits(directory: epath.Path, abstract_state: train_state_lib.TrainState) -> None:
    """Raises:
    CheckpointError: the checkpoint is of another model or optimizer, or holds parameters alone.
    """
    tree = ocp.StandardCheckpointHandler().metadata(directory / _STATE).tree
    if _is_parameters_alone(directory, tree):
        raise CheckpointError(
            f"{directory} holds parameters alone, which no training can continue from: "
            "give it as INITIAL_CHECKPOINT_PATH, and another MODEL_DIR"
        )
    saved, wanted = _flat(tree), _flat(abstract_state.state_dict())
    # Parameters first: "params" behind "opt_state" would never be shown.
    names = sorted(saved.keys() | wanted.keys(), key=lambda name: (name[0] != "params", name))
    wrong = [
        _describe(name, wanted.get(name), saved)
        for name in names
        if name not in saved or name not in wanted or tuple(saved[name].shape) != wanted[name].shape
    ]
    if wrong:
        raise CheckpointError(_does_not_fit(directory, wrong) + ". For another model, give another MODEL_DIR")


def _does_not_fit(path: epath.PathLike, wrong: list[str]) -> str:
    return (
        f"{path} doesn't fit this model: {'; '.join(wrong[:3])}{' ...' if len(wrong) > 3 else ''}\n"
        "Give the same gin files and the same --gin. flags as in training"
    )


def _read(
    directory: epath.Path, abstract_state: train_state_lib.TrainState
) -> tuple[tuple[train_state_lib.TrainState, dict[str, Any]] | None, str | None]:
    """State and data position, or what is wrong. By Orbax's handlers, which wait for no other process."""
    try:
        parts = ocp.StandardCheckpointHandler().restore(
            directory / _STATE, args=ocp.args.StandardRestore(abstract_state.state_dict())
        )
        position = ocp.JsonCheckpointHandler().restore(directory / _POSITION)
        return (dataclasses.replace(abstract_state, **parts), position), None
    except Exception as error:  # As in `_damage`.
        return None, writing.reason(error)


def save_params(model_dir: str, params: Any, step: int = 0, flax_mutables: Any = None) -> None:
    """Writes parameters alone, as `checkpoint_<step>`, for `restore_params` and `restore_matching`.

    Needs about 0.4 times as much memory again as the parameters take.

    Args:
      model_dir: where the checkpoint goes.
      params: a tree of `jax.Array` (Orbax would copy numpy's first), or a part of one.
      step: the checkpoint's number.
      flax_mutables: mutable collections, likewise, of a model that has any.
    """
    content = {"params": params} | ({"flax_mutables": flax_mutables} if flax_mutables else {})
    directory = _absolute(model_dir) / f"checkpoint_{step}" / _STATE
    # What is to go to one file stays in memory until the file is full.
    handler = ocp.PyTreeCheckpointHandler(save_concurrent_gb=1)
    with ocp.Checkpointer(handler) as checkpointer:
        args = ocp.args.PyTreeSave(content, ocdbt_target_data_file_size=16 * 2**20)
        checkpointer.save(directory, args=args)


def _absolute(path: epath.PathLike) -> epath.Path:
    """Orbax takes no relative paths; a URL ("gs://...") stays as it is."""
    return epath.Path(path) if "://" in os.fspath(path) else epath.Path(os.path.abspath(path))


def newest_checkpoint(model_dir: epath.PathLike) -> epath.Path | None:
    """The `checkpoint_<step>` of the highest step in a MODEL_DIR, if there is one."""
    steps = {int(m[1]): p for p in epath.Path(model_dir).glob("*") if (m := _NAME.fullmatch(p.name))}
    return steps[max(steps)] if steps else None


def find_checkpoint(path: str) -> tuple[str, int]:
    """A checkpoint directory, or the newest in a MODEL_DIR -> (its path, its step).

    Raises:
      CheckpointError: there is none.
    """
    directory = _absolute(path)
    if not _NAME.fullmatch(directory.name):
        newest = newest_checkpoint(directory)
        if newest is None:
            raise CheckpointError(
                f"no checkpoint_<step> in {directory}: train first, or name another directory"
            )
        directory = newest
    if not (directory / _STATE).is_dir():
        raise CheckpointError(f"{directory} is not a checkpoint: it holds no {_STATE}/")
    return str(directory), int(directory.name.split("_")[1])


def restore_params(path: str, abstract_params: Any) -> Any:
    """Reads all parameters of a model from a checkpoint.

    Args:
      path: as for `find_checkpoint`.
      abstract_params: `ShapeDtypeStruct`s with shardings.

    Raises:
      CheckpointError: there is no checkpoint, or a parameter is missing or of another shape.
    """
    return restore_inference_state(path, train_state_lib.InferenceState(abstract_params)).params


def restore_inference_state(
    path: str, abstract_state: train_state_lib.TrainState | train_state_lib.InferenceState
) -> train_state_lib.InferenceState:
    """Reads all that a model predicts with from a checkpoint: parameters and mutable collections.

    Args:
      path: as for `find_checkpoint`.
      abstract_state: `ShapeDtypeStruct`s with shardings.

    Raises:
      CheckpointError: there is no checkpoint, or an array is missing or of another shape.
    """
    found, absent = _restore_found(path, abstract_state)
    if absent:
        raise CheckpointError(_does_not_fit(path, absent))
    return train_state_lib.InferenceState(*map(traverse_util.unflatten_dict, found))


def restore_matching(
    path: str, abstract_state: train_state_lib.TrainState | train_state_lib.InferenceState
) -> tuple[dict[tuple[str, ...], jax.Array], dict[tuple[str, ...], jax.Array]]:
    """Reads what a checkpoint has under the same name and in the same shape; the rest is logged.

    Args:
      path: as for `find_checkpoint`.
      abstract_state: `ShapeDtypeStruct`s with shardings.

    Returns:
      Parameters, and arrays of mutable collections: name, as a path in the tree -> array.

    Raises:
      CheckpointError: there is no checkpoint, or it shares no parameter.
    """
    found, absent = _restore_found(path, abstract_state)
    if not found[0]:
        raise CheckpointError(f"{path} shares no parameter with this model")
    logging.info("initialised %d arrays from %s, %d stay fresh", sum(map(len, found)), path, len(absent))
    for line in absent:
        logging.info("fresh: %s", line)
    return found


def _restore_found(
    path: str, abstract_state: train_state_lib.TrainState | train_state_lib.InferenceState
) -> tuple[tuple[dict, dict], list[str]]:
    """Reads the arrays that a checkpoint has in the right shape, by name, and lists what it lacks.

    Returns:
      (parameters, arrays of mutable collections), and a line for each array that isn't among them.
    """
    directory, _ = find_checkpoint(path)
    state_dir = os.path.join(directory, _STATE)
    reader = ocp.PyTreeCheckpointer()
    metadata = reader.metadata(state_dir).item_metadata
    if metadata is None:
        raise CheckpointError(f"{directory} is damaged: it doesn't say what is in it")
    item, absent = {}, []
    for part in ("params", "flax_mutables"):
        saved = traverse_util.flatten_dict(metadata.tree.get(part, {}))
        wanted = traverse_util.flatten_dict(getattr(abstract_state, part))
        fits = {n: leaf for n, leaf in wanted.items() if n in saved and tuple(saved[n].shape) == leaf.shape}
        absent += [_describe(name, leaf, saved) for name, leaf in wanted.items() if name not in fits]
        if fits:  # Orbax can't restore nothing.
            item[part] = traverse_util.unflatten_dict(fits)
    restored = {}
    if item:
        restored = reader.restore(
            state_dir,
            args=ocp.args.PyTreeRestore(
                item=item,
                restore_args=ocp.checkpoint_utils.construct_restore_args(item),
                partial_restore=True,
            ),
        )
    params, mutables = (
        traverse_util.flatten_dict(restored.get(part, {})) for part in ("params", "flax_mutables")
    )
    return (params, mutables), absent


def _describe(name: tuple[str, ...], leaf: Any | None, saved: Mapping) -> str:
    there = f"{tuple(saved[name].shape)} in the checkpoint" if name in saved else "not in the checkpoint"
    return f"{'/'.join(name)} {tuple(leaf.shape) if leaf else '(not in the model)'}: {there}"
