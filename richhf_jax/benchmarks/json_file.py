"""The flag --json of the benchmarks, and the file that it names."""

import argparse
import json
import pathlib
from typing import Any

from richhf_jax import writing


def add_flag(parser: argparse.ArgumentParser, more: str = "") -> None:
    """Adds the flag; `more` ends its help."""
    text = f"also write the figures to FILE{more}"
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help=text)


def check(parser: argparse.ArgumentParser, path: pathlib.Path | None) -> None:
    """Ends the program before long work if the file's folder isn't there."""
    if path and not path.parent.is_dir():
        parser.error(f"--json: there is no folder {path.parent}")


def write(path: pathlib.Path | None, figures: Any) -> None:
    """Writes the figures, if the flag was given."""
    if path:
        writing.write(path, json.dumps(figures, indent=2, allow_nan=False) + "\n")
