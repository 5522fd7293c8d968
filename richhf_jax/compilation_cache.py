"""Keeps compiled programs in the user's cache folder, so that a machine compiles the same model only once.

JAX's persistent compilation cache does the work. Its keys hold the program, the compiler's version and
options, and the devices with their features, so machines of several kinds may share a home folder.
"""

import contextlib
import os
import pathlib
import re
import sys
import tempfile
import warnings
from typing import Any

import jax

# If the programs take more, those that were not used for the longest time are deleted.
_MAX_BYTES = 1 << 30
# Programs that compile faster aren't kept. Loading one takes about a hundredth of a second.
_MIN_SECONDS = 0.1
_MIN_SECONDS_SETTING = "jax_persistent_cache_min_compile_time_secs"
_FAILURE = re.compile(r"Error (?:reading|writing) persistent compilation cache entry for '([^']+)'")


def configure(enabled: bool) -> None:
    """Turns the cache on or off for all that this process compiles later.

    If the user gave JAX a folder (JAX_COMPILATION_CACHE_DIR), it is used in place of ours. A program of
    several processes has a cache only in such a folder, which all must share: on GPUs the processes tune
    their kernels together, and would wait for a process that found its program in a cache of its own.

    Args:
      enabled: True keeps and finds compiled programs.
    """
    if not enabled:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    config: Any = jax.config  # Its attributes are not declared.
    if config.jax_compilation_cache_dir or jax.distributed.is_initialized():
        return
    try:
        folder = _folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # Fails if it can't be written.
            pass
        _delete_oldest(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home.
        # Not by absl, whose warnings some commands hide.
        print(f"warning: compiled programs aren't kept, so each run compiles anew: {error}", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if _MIN_SECONDS_SETTING.upper() not in os.environ:
        jax.config.update(_MIN_SECONDS_SETTING, _MIN_SECONDS)
    _delete_damaged(folder)


def _folder() -> pathlib.Path:
    """Returns the folder by the XDG Base Directory Specification, which ignores relative paths."""
    base = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))
    base = base if base.is_absolute() else pathlib.Path("~/.cache").expanduser()
    return base / "richhf_jax" / "compiled"


def _delete_oldest(folder: pathlib.Path) -> None:
    """Deletes programs beyond `_MAX_BYTES`, first those that were not read for the longest time."""
    entries = [(path.stat(), path) for path in folder.glob("*-cache")]
    size = 0
    for status, path in sorted(entries, key=lambda entry: entry[0].st_atime, reverse=True):
        size += status.st_size
        if size > _MAX_BYTES:
            path.unlink(missing_ok=True)


def _delete_damaged(folder: pathlib.Path) -> None:
    """Deletes a program's files whenever JAX warns, from now on, that it can't read or write them.

    JAX continues without such a file, but never replaces it, so each later run would compile and warn again.
    A full disk or a killed process leaves such files.
    """
    show = warnings.showwarning

    def show_others(message, *args, **kwargs):
        if failure := _FAILURE.match(str(message)):
            for path in folder.glob(f"{failure[1]}-*-cache"):
                with contextlib.suppress(OSError):  # A folder, or another user's file, stays.
                    path.unlink()
        else:
            show(message, *args, **kwargs)

    warnings.showwarning = show_others
