"""Checkpoints: Orbax, `MODEL_DIR/checkpoint_<step>/`, with the training state and the data position."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging

from richhf_jax import errors
from richhf_jax import train_state as train_state_lib

_STATE, _POSITION = "state", "data_position"


@dataclasses.dataclass(frozen=True)
class SaveCheckpointConfig:
    """When to save (T5X's name).

    Attributes:
      period: steps between checkpoints; the last step is always saved.
      keep: how many of the newest to keep; None keeps all.
    """

    period: int
    keep: int | None = 1


@dataclasses.dataclass(frozen=True)
class RestoreCheckpointConfig:
    """Where the first parameters come from (T5X's name); a checkpoint of MODEL_DIR itself wins over it.

    Attributes:
      path: a `checkpoint_<step>` directory, or a MODEL_DIR whose newest checkpoint is meant. Parameters
        that it lacks, or whose shape differs, keep their fresh values and are listed; optimizer and
        step begin anew.
    """

    path: str


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Attributes:
    save: None saves nothing.
    restore: None begins from fresh parameters.
    """

    save: SaveCheckpointConfig | None
    restore: RestoreCheckpointConfig | None = None


class CheckpointError(errors.UserError):
    """A checkpoint that isn't there, or doesn't fit."""


class Checkpointer:
    """Saves to and restores from one MODEL_DIR. Saving runs beside the training."""

    def __init__(self, model_dir: str, keep: int | None = None):
        options = ocp.CheckpointManagerOptions(step_prefix="checkpoint", max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(
            os.path.abspath(model_dir), options=options, item_names=(_STATE, _POSITION)
        )

    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step."""
        return self._manager.latest_step()

    def save(self, state: train_state_lib.TrainState, data_position: Mapping[str, Any], step: int) -> None:
        """Begins to save; a checkpoint is complete or absent, never half-written.

        Args:
          data_position: JSON-able; where the training data stands.
        """
        if step == self.latest_step():
            return
        items = ocp.args.Composite(
            **{_STATE: ocp.args.StandardSave(state), _POSITION: ocp.args.JsonSave(dict(data_position))}
        )
        self._manager.save(step, args=items)

    def restore(
        self, abstract_state: train_state_lib.TrainState, step: int
    ) -> tuple[train_state_lib.TrainState, dict[str, Any]]:
        """State and data position of a step.

        Args:
          abstract_state: `ShapeDtypeStruct`s with shardings: where the arrays shall go.
        """
        items = ocp.args.Composite(
            **{_STATE: ocp.args.StandardRestore(abstract_state), _POSITION: ocp.args.JsonRestore()}
        )
        restored = self._manager.restore(step, args=items)
        return restored[_STATE], restored[_POSITION]

    def close(self) -> None:
        """Waits until everything is written."""
        self._manager.wait_until_finished()
        self._manager.close()


def find_checkpoint(path: str) -> tuple[str, int]:
    """A checkpoint directory, or the newest in a MODEL_DIR -> (its path, its step).

    Raises:
      CheckpointError: there is none.
    """
    directory = pathlib.Path(os.path.abspath(path))
    if not directory.name.startswith("checkpoint_"):
        steps = [int(p.name.split("_")[1]) for p in directory.glob("checkpoint_*") if p.name[11:].isdigit()]
        if not steps:
            raise CheckpointError(f"no checkpoint_<step> in {directory}: train first, or name another directory")
        directory = directory / f"checkpoint_{max(steps)}"
    if not (directory / _STATE).is_dir():
        raise CheckpointError(f"{directory} is not a checkpoint: it holds no {_STATE}/")
    return str(directory), int(directory.name.split("_")[1])


def restore_params(path: str, abstract_params: Any, strict: bool = True) -> tuple[Any, list[str]]:
    """Parameters of a checkpoint, by name; a whole one or one with parts missing.

    Args:
      path: as for `find_checkpoint`.
      abstract_params: `ShapeDtypeStruct`s with shardings.
      strict: every parameter must be there.

    Returns:
      A flat dict name path -> array of the parameters found, and the names that weren't.

    Raises:
      CheckpointError: there is no checkpoint, or `strict` and a parameter is missing or of another shape.
    """
    directory, _ = find_checkpoint(path)
    state_dir = os.path.join(directory, _STATE)
    reader = ocp.PyTreeCheckpointer()
    saved = _flatten(reader.metadata(state_dir).item_metadata.tree["params"])
    wanted = _flatten(abstract_params)
    found = {
        name: leaf for name, leaf in wanted.items() if name in saved and tuple(saved[name].shape) == leaf.shape
    }
    absent = [_describe(name, wanted[name], saved) for name in wanted if name not in found]
    if strict and absent:
        raise CheckpointError(f"{directory} doesn't fit this model: " + "; ".join(absent[:5]))
    item = {"params": _unflatten(found)}
    restored = reader.restore(
        state_dir,
        args=ocp.args.PyTreeRestore(
            item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
        ),
    )
    return _flatten(restored["params"]), absent


def initialize_from(path: str, params: Any) -> Any:
    """Fresh parameters -> the same tree with what the checkpoint at `path` has of it.

    Raises:
      CheckpointError: there is no checkpoint, or it shares no parameter.
    """
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
    found, absent = restore_params(path, abstract, strict=False)
    if not found:
        raise CheckpointError(f"{path} shares no parameter with this model")
    logging.info("initialised %d arrays from %s, %d stay fresh", len(found), path, len(absent))
    for line in absent:
        logging.info("fresh: %s", line)
    return _unflatten(_flatten(params) | found)


def _describe(name: tuple[str, ...], leaf: Any, saved: Mapping) -> str:
    there = f"{tuple(saved[name].shape)} in the checkpoint" if name in saved else "not in the checkpoint"
    return f"{'/'.join(name)} {tuple(leaf.shape)}: {there}"


def _flatten(tree: Any, prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    return {name: leaf for key, value in tree.items() for name, leaf in _flatten(value, (*prefix, key)).items()}


def _unflatten(flat: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for (*parents, last), leaf in flat.items():
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree
