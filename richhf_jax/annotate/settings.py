"""The two text files of a project or a survey: config.json, the settings, and guidelines.md, for raters."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from richhf_jax import errors, writing
from richhf_jax.inputs.record import InputError, parsed_json

CONFIG, GUIDELINES = "config.json", "guidelines.md"
_GUIDELINES_FIELD = "guidelines"
MOST_RATERS = 1000
# Settings of numbers -> type, lowest, highest.
Limits = Mapping[str, tuple[type, float, float]]
_Config = TypeVar("_Config")


class SettingError(ValueError):
    """A setting is wrong; the message names it."""


def write(folder: pathlib.Path, fields: dict[str, Any]) -> None:
    """Writes both files; the field `guidelines` is the text of guidelines.md.

    Raises:
      OSError: they can't be written.
    """
    others = {name: value for name, value in fields.items() if name != _GUIDELINES_FIELD}
    writing.write(folder / GUIDELINES, fields[_GUIDELINES_FIELD])
    writing.write(folder / CONFIG, json.dumps(others, indent=2, ensure_ascii=False) + "\n")


def read(
    folder: pathlib.Path, database: str, missing: str, parse: Callable[[dict[str, Any]], _Config]
) -> _Config:
    """Reads both files.

    Args:
      folder: the project or survey.
      database: the name of its database.
      missing: what the folder is if it lacks a file; "{}" stands for the two names.
      parse: makes the settings of the fields, those of the file and `guidelines`; may raise SettingError.

    Raises:
      errors.UserError: the folder lacks a file, or a setting is wrong; the message names it.
    """
    place = folder / CONFIG
    if not place.is_file() or not (folder / database).is_file():
        raise errors.UserError(f"{folder} is {missing.format(f'{CONFIG} or {database}')}")
    text, guidelines = _text(place), _text(folder / GUIDELINES)
    try:
        fields = parsed_json(text)
        if not isinstance(fields, dict):
            raise SettingError("it must be a JSON object")
        if _GUIDELINES_FIELD in fields:
            raise SettingError(f"`{_GUIDELINES_FIELD}` stand in {GUIDELINES}, not here")
        return parse(fields | {_GUIDELINES_FIELD: guidelines})
    except (InputError, SettingError) as error:
        raise errors.UserError(f"{place}: {error}") from None


def _text(file: pathlib.Path) -> str:
    if not file.is_file():
        raise errors.UserError(f"{file}: no such file: put it back, or make it; it may be empty")
    with writing.explained_disk_errors(file, "Give the right to read it"):
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise errors.UserError(f"{file}: not in UTF-8 ({error.reason}): save it in UTF-8") from None


def check(fields: Mapping[str, Any], config: type, texts: Sequence[str], limits: Limits) -> None:
    """Checks the names of fields, and the values of texts and numbers.

    Args:
      fields: name -> value.
      config: the dataclass that has the names.
      texts, limits: the names of texts; the limits of numbers.

    Raises:
      SettingError: a name is unknown, or a value wrong.
    """
    known = {field.name for field in dataclasses.fields(config)}
    if unknown := sorted(set(fields) - known):
        names = ", ".join(sorted(known - {_GUIDELINES_FIELD}))
        raise SettingError(f"unknown setting `{unknown[0]}`; the settings are {names}")
    for name in texts:
        if not isinstance(fields.get(name, ""), str):
            raise SettingError(f"`{name}` must be text")
    for name, (kind, low, high) in limits.items():
        if name in fields:
            _check_number(name, fields[name], kind, low, high)


def _check_number(name: str, value: Any, kind: type, low: float, high: float) -> None:
    kinds = (int,) if kind is int else (int, float)
    if type(value) not in kinds or not low <= value <= high or not math.isfinite(value):
        whole = "a whole number" if kind is int else "a number"
        raise SettingError(f"`{name}` must be {whole} from {low:g} to {high:g}, got {value!r}")
