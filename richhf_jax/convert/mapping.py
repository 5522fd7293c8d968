"""Maps the arrays of sources to the parameters of a model, and shows it as a table for the user."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import scipy.ndimage

from richhf_jax import errors, foreign_text
from richhf_jax.convert import layers
from richhf_jax.convert.source import ConvertError, Source, Tensor

LOADED, RESAMPLED, INITIALISED, UNUSED = "loaded", "resampled", "initialised", "unused"
_VARIANCE = "/norm/var"  # of batch statistics
_POSITION_TABLE = "position_embedding/embedding"
# The most positions of a table to resample: those of 4096 x 4096 pixels in patches of 16.
_MAX_POSITIONS = 2**16
# A setting that changes a network's outputs by a thousandth or less.
_OF_LITTLE_WEIGHT = "approximate_gelu"
# So is a difference of norms' epsilons up to this one: transformers' ViT has 1e-12, the original 1e-6.
_CLOSE_EPSILONS = 1e-6
# Where gin sets the network's configurations, for messages.
_GIN_NAMES = {
    "t5_config": "t5.T5Config",
    "vit_config": "vit.ViTConfig",
    "resnet_config": "resnet.ResNetConfig",
    "text_config": "clip.TextConfig",
    "vision_config": "clip.VisionConfig",
    "transformer_config": "transformer.TransformerConfig",
    "vqgan_config": "vqgan.VQGANConfig",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """The fate of one array.

    Attributes:
      status: LOADED; RESAMPLED to another grid of positions; INITIALISED: only the model has it, so training
        starts it fresh; UNUSED: only a source has it.
      name: our name; of an unused array without one, the source's name.
      shape: the shape in the model; of an unused array its own, None if it is unknown.
      origin: "[number of the source] its name there".
      source_shape: the shape in the source, where it differs from `shape`.
    """

    status: str
    name: str
    shape: tuple[int, ...] | None
    origin: str = ""
    source_shape: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """The mapping from sources to a model.

    Attributes:
      rows: every parameter of the model, and every unused array of the sources.
      tensors: name in the model -> the array, in the model's shape and type; INITIALISED ones are left out.
    """

    rows: tuple[Row, ...]
    tensors: Mapping[str, Tensor]


def make_plan(
    model: Mapping[str, Any], sources: Sequence[Source], allow_mismatched_shapes: bool = False
) -> Plan:
    """Finds each parameter in the sources. No values are read.

    Args:
      model: name -> the parameter's `ShapeDtypeStruct`; layers are scanned ("encoder/layers/...") or not.
      sources: the opened checkpoints.
      allow_mismatched_shapes: whether a parameter whose shape does not fit counts as initialised.

    Raises:
      ConvertError: two sources have the same parameter, a shape does not fit, or no parameter is found.
    """
    found = _merge(sources)
    rows, tensors, mismatches = [], {}, []
    left = dict(found)
    for name, leaf in sorted(model.items(), key=lambda item: layers.natural_order(item[0])):
        origin, tensor = _take(name, leaf.shape, left)
        if tensor is None:
            rows.append(Row(INITIALISED, name, leaf.shape))
        elif tensor.shape == leaf.shape:
            rows.append(Row(LOADED, name, leaf.shape, origin))
            tensors[name] = tensor.astype(leaf.dtype)
        elif name.endswith(_POSITION_TABLE) and _can_be_resampled(tensor.shape, leaf.shape):
            rows.append(Row(RESAMPLED, name, leaf.shape, origin, tensor.shape))
            tensors[name] = _resampled(tensor, leaf.shape).astype(leaf.dtype)
        else:
            rows.append(Row(INITIALISED, name, leaf.shape, f"{origin} does not fit", tensor.shape))
            mismatches.append(f"  {name}: {leaf.shape} in the model, {tensor.shape} in {origin}")
    if mismatches and not allow_mismatched_shapes:
        raise ConvertError(
            "\n".join(["these shapes do not fit the model:", *mismatches])
            + "\nGive the gin files of the right size, or --allow_mismatched_shapes to leave these out"
        )
    if not tensors:
        given = ", ".join(f"{s.path} ({s.description})" for s in sources)
        raise ConvertError(
            f"{given}: no parameter in common with the model. Name the model of these weights with --gin_file"
        )
    rows += [Row(UNUSED, name, t.shape, _origin(number, t)) for name, (number, t) in left.items()]
    rows += [
        Row(UNUSED, name, shape, f"[{number}]")
        for number, source in enumerate(sources, 1)
        for name, shape in source.unused.items()
    ]
    rows += [
        Row(UNUSED, name, copy.shape, f"[{number}], a copy of {used.origin}")
        for number, source in enumerate(sources, 1)
        for name, (copy, used) in source.copies.items()
    ]
    return Plan(tuple(rows), tensors)


def _merge(sources: Sequence[Source]) -> dict[str, tuple[int, Tensor]]:
    """Returns name -> (number of the source, tensor), for all sources."""
    found: dict[str, tuple[int, Tensor]] = {}
    for number, source in enumerate(sources, 1):
        for name, tensor in source.tensors.items():
            if name in found:
                first = sources[found[name][0] - 1].path
                raise ConvertError(f"{name} is in both {first} and {source.path}: give one of them")
            found[name] = number, _checked(tensor, source.path, name.endswith(_VARIANCE))
    return found


def _checked(tensor: Tensor, path: str, is_variance: bool = False) -> Tensor:
    """Returns a tensor whose `read` raises ConvertError for everything but finite floating-point numbers.

    Of a variance, negative numbers are refused, too: a square root makes them NaN.
    """

    def read() -> np.ndarray:
        try:
            array = tensor.read()
        except errors.UserError:
            raise
        except Exception as error:  # A damaged file may lead to any error.
            raise ConvertError(
                f"{path}: {tensor.origin} can't be read ({type(error).__name__}: {error})"
            ) from error
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ConvertError(
                f"{path}: {tensor.origin} is of type {array.dtype}; quantised weights aren't understood: give"
                " those in floating point"
            )
        with np.errstate(over="ignore"):
            bad = array.size - np.count_nonzero(np.isfinite(array.astype(np.float32, copy=False)))
        if bad:
            raise ConvertError(
                f"{path}: {bad} of the {array.size} numbers of {tensor.origin} are NaN or infinite:"
                " the file is damaged, or its training has failed"
            )
        if is_variance and (negative := np.count_nonzero(array < 0)):
            raise ConvertError(
                f"{path}: {negative} of the {array.size} numbers of {tensor.origin} are negative, which no"
                " variance can be: the file is damaged; get it anew"
            )
        return array

    return dataclasses.replace(tensor, read=read)


def check_copies(sources: Sequence[Source]) -> None:
    """Checks that arrays which are stored twice are equal, as T5's table of tokens under several names.

    Raises:
      ConvertError: they differ, so the model has no place for one of them.
    """
    for source in sources:
        for name, (copy, used) in source.copies.items():
            copy, used = (_checked(tensor, source.path) for tensor in (copy, used))
            if copy.shape != used.shape or not np.array_equal(copy.read(), used.read()):
                raise ConvertError(
                    f"{source.path}: {name} {copy.shape} has other values than {used.origin} {used.shape}."
                    " Our model has one array for both: it can't hold two that were trained apart"
                )


def _origin(number: int, tensor: Tensor) -> str:
    return f"[{number}] {tensor.origin}"


def _take(
    name: str, shape: tuple[int, ...], left: dict[str, tuple[int, Tensor]]
) -> tuple[str, Tensor | None]:
    """Takes a parameter out of `left`; a scanned parameter is stacked. Returns its origin and tensor."""
    names = layers.layer_names(name, shape[0] if shape else 0) or [name]
    parts = [left.pop(n) for n in names if n in left]
    if not parts:
        return "", None
    if names == [name]:
        return _origin(*parts[0]), parts[0][1]
    first = parts[0][1]
    alike = all(part.shape == first.shape for _, part in parts)
    # Layers of different shapes make no array; their shape is then (number of layers,), which fits nothing.
    stacked = Tensor(
        origin=f"{first.origin} ... {parts[-1][1].origin}",
        shape=(len(parts), *(first.shape if alike else ())),
        dtype=first.dtype,
        read=lambda: np.stack([part.read() for _, part in parts]),
    )
    return _origin(parts[0][0], stacked), stacked


def _can_be_resampled(theirs: tuple[int, ...], ours: tuple[int, ...]) -> bool:
    # A text's table has one axis of positions, and is never resampled.
    return (
        len(theirs) == len(ours) == 3 and theirs[2] == ours[2] and 0 < math.prod(theirs[:2]) <= _MAX_POSITIONS
    )


def _resampled(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    return tensor.mapped(shape, lambda table: resample_positions(table, (shape[0], shape[1])))


def resample_positions(table: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Resamples position embeddings for another grid of patches, bilinearly, with corners on corners.

    vision_transformer and big_vision do the same when they train on at another resolution.

    Args:
      table: [rows, columns, embed].
      grid: numbers of rows and columns wanted.

    Returns:
      float32 [*grid, embed].
    """
    zoom = (grid[0] / table.shape[0], grid[1] / table.shape[1], 1)
    return np.asarray(scipy.ndimage.zoom(table.astype(np.float32), zoom, order=1))


def check_settings(configs: Mapping[str, Any], sources: Sequence[Source]) -> list[str]:
    """Compares settings that shapes can't show: heads, activations, tied logits, the norms' epsilon.

    Args:
      configs: the model's configurations: {"t5_config": T5Config, "vit_config": ViTConfig}, for instance.
        Settings of others aren't compared.
      sources: the opened checkpoints.

    Returns:
      Notes for the user: a setting that differs but hardly changes the outputs, and the sources' own notes.

    Raises:
      ConvertError: another setting differs, so the weights would compute something else.
    """
    notes, wrong = [], []
    for source in sources:
        for setting, theirs in source.settings.items():
            config, name = setting.split(".")
            if config not in configs:  # No parameter of it is loaded.
                continue
            ours = getattr(configs[config], name)
            if (tuple(ours) if isinstance(theirs, tuple) else ours) == theirs:
                continue
            line = (
                f"{name} is {ours!r} in the model, {theirs!r} in {source.path}: "
                f"give --gin.{_GIN_NAMES[config]}.{name}={theirs!r}"
            )
            is_close = name == "layer_norm_epsilon" and abs(ours - theirs) <= _CLOSE_EPSILONS
            if name == _OF_LITTLE_WEIGHT or is_close:
                notes.append(f"{line} to compute exactly the same")
            else:
                wrong.append(line)
        if source.note:
            notes.append(f"{source.path}: {source.note}")
    if wrong:
        raise ConvertError("\n".join(wrong))
    return notes


def format_table(plan: Plan, sources: Sequence[Source], notes: Sequence[str] = ()) -> str:
    """Formats the rows as an aligned table, with the number of arrays of each status."""
    shown = foreign_text.for_terminal
    cells = [(row.status, shown(row.name), _shapes(row), shown(row.origin)) for row in plan.rows]
    widths = [max(len(row[i]) for row in cells) for i in range(3)]
    lines = [
        shown(f"[{number}] {source.path}: {source.description}") for number, source in enumerate(sources, 1)
    ]
    lines += ["", *("  ".join(map(str.ljust, row, (*widths, 0))).rstrip() for row in cells), ""]
    for status in (LOADED, RESAMPLED, INITIALISED, UNUSED):
        shapes = [row.shape for row in plan.rows if row.status == status]
        known = sum(math.prod(shape) for shape in shapes if shape is not None)
        lines.append(f"{status:{len(INITIALISED)}} {len(shapes):5} arrays, {known:,} numbers")
    return "\n".join([*lines, *(f"note: {shown(note)}" for note in notes)])


def _shapes(row: Row) -> str:
    if row.shape is None:
        return ""
    if row.source_shape is None:
        return str(row.shape)
    return f"{row.source_shape} {'->' if row.status == RESAMPLED else 'for'} {row.shape}"
