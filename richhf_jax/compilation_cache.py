"""Keeps compiled programs in the user's cache folder: the same model isn't compiled twice on a machine.

JAX's persistent compilation cache does the work. Its keys hold the program, the compiler's version and
options, and the devices with their features, so machines of several kinds may share a home folder.
"""

import os
import pathlib
import re
import tempfile
import warnings

import jax
from absl import logging

# Beyond that, programs that nobody used for the longest time are deleted.
_MAX_BYTES = 1 << 30
# Programs that compile faster aren't kept. Loading one takes about a hundredth of a second.
_MIN_SECONDS = 0.1
_MIN_SECONDS_SETTING = "jax_persistent_cache_min_compile_time_secs"
_FAILURE = re.compile(r"Error (?:reading|writing) persistent compilation cache entry for '([^']+)'")


def configure(enabled: bool) -> None:
    """Turns the cache on or off for all that this process compiles later.

    A folder that the user gave to JAX (JAX_COMPILATION_CACHE_DIR) is used in place of ours. Processes of one
    program have no cache without such a folder, which they must share: on GPUs they tune their kernels
    together, and would wait for a process that found its program.

    Args:
      enabled: whether compiled programs are kept and found.
    """
    if not enabled:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if jax.config.jax_compilation_cache_dir or jax.distributed.is_initialized():
        return
    try:
        folder = _folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # Can it be written?
            pass
        _delete_oldest(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home.
        logging.warning("compiled programs aren't kept: %s", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if _MIN_SECONDS_SETTING.upper() not in os.environ:
        jax.config.update(_MIN_SECONDS_SETTING, _MIN_SECONDS)
    _delete_damaged(folder)


def _folder() -> pathlib.Path:
    """Returns the place by the XDG Base Directory Specification, which ignores relative paths."""
    base = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))
    base = base if base.is_absolute() else pathlib.Path("~/.cache").expanduser()
    return base / "richhf_jax" / "compiled"


def _delete_oldest(folder: pathlib.Path) -> None:
    """Deletes the programs beyond `_MAX_BYTES`, those that were not read for the longest time first."""
    entries = [(path.stat(), path) for path in folder.glob("*-cache")]
    size = 0
    for status, path in sorted(entries, key=lambda entry: entry[0].st_atime, reverse=True):
        size += status.st_size
        if size > _MAX_BYTES:
            path.unlink(missing_ok=True)


def _delete_damaged(folder: pathlib.Path) -> None:
    """Deletes, from now on, a program's files where JAX warns that it can't read or write one.

    JAX goes on without the file, but it never replaces one, so each later run would compile and warn again. A
    full disk or a killed process leaves such a file.
    """
    show = warnings.showwarning

    def show_others(message, *args, **kwargs):
        if failure := _FAILURE.match(str(message)):
            for path in folder.glob(f"{failure[1]}-*-cache"):
                path.unlink(missing_ok=True)
        else:
            show(message, *args, **kwargs)

    warnings.showwarning = show_others
