"""Checks the values of a gin configuration before anything runs: types, ranges and choices.

The type is the annotation of the parameter that gets the value, the range is that of `allowed_values`.
Messages name the macro if there is one:

    DROPOUT_RATE must be a number from 0 to below 1, got 7
"""

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

import gin
from gin import config as gin_config

from richhf_jax import allowed_values, errors

# Parameters of other packages aren't checked, because their annotations may be loose.
_PACKAGES = ("richhf_jax", "tasks")


def check(config: Mapping[tuple[str, str], Mapping[str, Any]]) -> dict[str, int]:
    """Checks all values of a configuration. Values that a function will compute (`@name()`) aren't known yet.

    Args:
      config: gin's own: (scope, selector) -> {parameter: value}, as its finalize hooks get it.

    Returns:
      Binding -> new value, for gin to set: whole numbers that were written as floats, such as 1e3.

    Raises:
      errors.UserError: values are of another type or out of range; the message has a line for each.
    """
    macros = {
        scope: params["value"] for (scope, selector), params in config.items() if selector == "gin.macro"
    }
    faults: dict[str, str] = {}
    whole: dict[str, int] = {}
    for (scope, selector), params in config.items():
        if selector.split(".")[0] not in _PACKAGES:
            continue
        hints = _hints(gin.get_configurable(selector))
        for name, value in params.items():
            where = f"{selector.rpartition('.')[2]}.{name}"
            where = f"{scope}/{where}" if scope else where
            place, hint = _Place(where, name, macros), hints.get(name, Any)
            source, number = place.resolved(value)
            if int in allowed_values.options_of(hint) and isinstance(number, float) and number.is_integer():
                is_macro = source.where in macros
                binding = f"{source.where}/gin.macro.value" if is_macro else f"{scope}/{selector}.{name}"
                place, value = source, int(number)
                whole[binding] = value
            for culprit, message in allowed_values.faults(place, value, hint):
                faults.setdefault(culprit, message)  # Several parameters may get the same macro.
    if faults:
        raise errors.UserError("\n".join(faults.values()))
    _check_microbatches(config, macros)
    return whole


@dataclasses.dataclass(frozen=True)
class _Place(allowed_values.Place):
    """The place of a value in a configuration of gin: the macro or binding that holds it.

    Attributes:
      macros: name -> value of all macros.
    """

    macros: Mapping[str, Any]

    def resolved(self, value: Any) -> tuple["_Place", Any]:
        """Follows macros. Returns the place of the value itself, and the value."""
        place = self
        for _ in self.macros:  # A circle of macros has no end.
            name = _macro_name(value)
            if name is None or name not in self.macros:
                break
            value, place = self.macros[name], dataclasses.replace(place, where=name)
        return place, value

    def is_known(self, value: Any) -> bool:
        """Returns False for what a function will compute."""
        return not isinstance(value, gin_config.ConfigurableReference)


def _macro_name(value: Any) -> str | None:
    is_macro = isinstance(value, gin_config.ConfigurableReference) and repr(value).startswith("%")
    return repr(value)[1:] if is_macro else None


def _hints(configurable: Callable[..., Any]) -> dict[str, Any]:
    """Returns the annotations of a function's parameters, or of those of a class."""
    is_plain = inspect.isclass(configurable) and not dataclasses.is_dataclass(configurable)
    return typing.get_type_hints(configurable.__init__ if is_plain else configurable)


def _check_microbatches(
    config: Mapping[tuple[str, str], Mapping[str, Any]], macros: Mapping[str, Any]
) -> None:
    """Checks that the number of microbatches divides the batch."""
    found = {}
    for (scope, selector), params in config.items():
        for name in ("num_microbatches", "batch_size") if scope in ("", "train") else ():
            if name in params:
                found[name] = _Place(f"{selector.rpartition('.')[2]}.{name}", name, macros).resolved(
                    params[name]
                )
    if len(found) < 2:
        return
    (parts, number), (batch, size) = found["num_microbatches"], found["batch_size"]
    if isinstance(number, int | float) and isinstance(size, int | float) and size % (number or 1):
        raise errors.UserError(f"{parts.where}, {number}, must divide {batch.where}, {size}")
