"""Runs an entry point whose arguments come from gin files and flags, as in T5X.

    python -m richhf_jax.train --gin_file=experiments/quickstart.gin --gin.MODEL_DIR=/tmp/run

A user's mistake (a missing file, an unknown name, a REQUIRED macro without a value) ends with one message on
stderr and exit code 1; a traceback means a bug. The log shows this package's messages and the warnings of
others; --verbosity=0 shows everything.
"""

import ast
import contextlib
import difflib
import inspect
import logging
import os
import pathlib
import re
import shlex
import sys
import tokenize
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gin
from absl import app, flags
from absl import logging as absl_logging
from etils import epath
from gin import config as gin_config

from richhf_jax import allowed_values, errors, foreign_text, gin_values, writing

_ROOT = pathlib.Path(__file__).resolve().parents[1]
# Searched after the working directory and --gin_search_paths.
DEFAULT_SEARCH_PATHS = (str(_ROOT), str(_ROOT / "gin"))

_GIN_FILE = flags.DEFINE_multi_string(
    "gin_file", [], "A gin file. Give the flag again for more files; later ones override earlier ones."
)
_GIN_BINDINGS = flags.DEFINE_multi_string(
    "gin_bindings", [], "A binding that overrides the files; --gin.NAME=value is short for it."
)
_GIN_SEARCH_PATHS = flags.DEFINE_list(
    "gin_search_paths", [], "Comma-separated folders in which gin files are found before the project's gin/."
)
_TFDS_DATA_DIR = flags.DEFINE_string(
    "tfds_data_dir", None, "Folder of the TFDS data sets; overrides the `tfds_data_dir` of every task."
)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the resolved configuration and stop.")
# Several processes (T5X's flags); see `multihost.session`.
_COORDINATOR_ADDRESS = flags.DEFINE_string(
    "coordinator_address", None, "host:port of process 0, if jax doesn't find it by itself."
)
_PROCESS_COUNT = flags.DEFINE_integer("process_count", None, "Number of processes.", lower_bound=1)
_PROCESS_INDEX = flags.DEFINE_integer("process_index", None, "Index of this process, from 0.", lower_bound=0)
_MULTIPROCESS_GPU = flags.DEFINE_bool(
    "multiprocess_gpu",
    None,
    "Whether this is one process of several (also on a CPU or TPU). Default: yes with"
    " --coordinator_address, and if the environment says so (TPU pods, SLURM, Open MPI).",
)
_INITIALIZATION_TIMEOUT = flags.DEFINE_integer(
    "initialization_timeout", 300, "Seconds that the processes wait for each other at the start."
)
_HEARTBEAT_TIMEOUT = flags.DEFINE_integer(
    "heartbeat_timeout_seconds", 100, "Seconds without a sign of life after which a process counts as lost."
)
_COMPILATION_CACHE = flags.DEFINE_bool(
    "compilation_cache",
    True,
    "Keep compiled programs for the next run: in $JAX_COMPILATION_CACHE_DIR if it is set, else, for a single"
    " process, in richhf_jax/compiled in $XDG_CACHE_HOME or ~/.cache.",
)
# The flags that describe the model.
MODEL_FLAGS = (_GIN_FILE, _GIN_BINDINGS, _GIN_SEARCH_PATHS)
_PROCESS_FLAGS = (
    *(_COORDINATOR_ADDRESS, _PROCESS_COUNT, _PROCESS_INDEX),
    *(_MULTIPROCESS_GPU, _INITIALIZATION_TIMEOUT, _HEARTBEAT_TIMEOUT),
)
_FLAGS = (*MODEL_FLAGS, _TFDS_DATA_DIR, _DRY_RUN, *_PROCESS_FLAGS)

# First characters of values that are gin's own: references, macros, brackets, quotes.
_EXPRESSION = tuple("@%([{'\"")
_GIN_ERRORS = (ValueError, SyntaxError, NameError, AttributeError, OSError, ModuleNotFoundError)
# Text that gin appends to an exception that passes through a configured function.
_GIN_CALL_NOTE = "\n  In call to configurable"
_MACRO_BINDING = re.compile(r"\s*(\w+)\s*=")

gin_config.register_finalize_hook(gin_values.check)


def rewrite_gin_args(args: Sequence[str]) -> list[str]:
    """Turns `--gin.NAME=value` into `--gin_bindings=NAME = value`, and keeps other arguments.

    Shells remove quotes. So a value that is no number, no True, False or None, and doesn't begin with a
    quote, a bracket, @ or %, is a text and gets the quotes that gin needs:

    >>> rewrite_gin_args(["train", "--gin.DROPOUT_RATE=.1", "--gin.MODEL_DIR=/tmp/run"])
    ['train', '--gin_bindings=DROPOUT_RATE = .1', "--gin_bindings=MODEL_DIR = '/tmp/run'"]

    Raises:
      errors.UserError: an argument starts with `--gin.` and has no `=`, or nothing behind it.
    """
    return [_rewrite_gin_arg(arg) if arg.startswith("--gin.") else arg for arg in args]


def _rewrite_gin_arg(arg: str) -> str:
    name, equals, value = arg.removeprefix("--gin.").partition("=")
    if not equals:
        raise errors.UserError(f"{arg}: write --gin.NAME=value, with the = and no space around it")
    if not value.strip():
        raise errors.UserError(
            f"{arg}: there is no value behind the =; an empty text is \"''\", with both quotes"
        )
    if _is_literal(value):
        value = value.strip().removeprefix("+")  # Gin knows no such sign.
    elif not value.startswith(_EXPRESSION):
        value = repr(value)
    return f"--gin_bindings={name} = {value}"


def _is_literal(value: str) -> bool:
    """Returns whether Python reads a value as a number, a bool or None."""
    try:
        with warnings.catch_warnings():  # A folder named `1or2` is no reason to warn.
            warnings.simplefilter("ignore")
            literal = ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False
    # Not the tuple `1,2` nor the complex number `1-2j`.
    return literal is None or isinstance(literal, bool | int | float)


def parse_gin_flags(
    gin_search_paths: Sequence[str], gin_files: Sequence[str], gin_bindings: Sequence[str]
) -> None:
    """Parses gin files, then bindings, into gin's global configuration and locks it.

    Args:
      gin_search_paths: folders to find the files in, after the working directory.
      gin_files: the files; later ones override earlier ones.
      gin_bindings: `NAME = value` strings that override the files.

    Raises:
      errors.UserError: a file is missing or has a mistake, a binding names a macro or parameter that
        no file has, a macro marked `%gin.REQUIRED` got no value, or a value is of the wrong type or out of
        range (`gin_values`).
    """
    for path in gin_search_paths:
        gin.add_config_file_search_path(path)
    for file in gin_files:
        with _explained(file):
            gin.parse_config_file(_find(file, gin_search_paths))
    for binding in gin_bindings:
        _check_macro_exists(binding, gin.config_str())
        with _explained(f"--gin.{binding}"):
            gin.parse_config(binding)
    _check_required_macros(gin.config_str())
    with _explained("gin files"):
        gin.finalize()


@contextlib.contextmanager
def _explained(source: str) -> Iterator[None]:
    """Turns gin's exception for a mistake in `source` into a UserError, mostly with gin's own message."""
    try:
        yield
    except tokenize.TokenError as error:
        raise errors.UserError(f"{source}: a quote or bracket is not closed: {error.args[0]}") from error
    except _GIN_ERRORS as error:
        if undefined := re.match(r"No bindings specified for '(\w+)/gin\.macro'", str(error)):
            name = undefined[1]
            raise errors.UserError(
                f"{source}: %{name} is used but has no value; give --gin.{name}=..."
            ) from error
        raise errors.UserError(f"{source}: {error}") from error


def _find(file: str, search_paths: Sequence[str]) -> str:
    """Finds a gin file.

    Gin alone would first look for a Python package named like the path's first folder, and fail if the
    working directory has a folder of that name (`runs/`). For this reason the project's includes begin with
    `gin/`.

    Raises:
      errors.UserError: there is no such file.
    """
    places = [os.path.join(folder, file) for folder in ("", *search_paths)]
    found = next((place for place in places if os.path.isfile(place)), None)
    if found is None:
        folders = ", ".join(["the working directory", *search_paths])
        raise errors.UserError(f"Unable to open file: {file}. There is none of this name in {folders}")
    return found


def _check_macro_exists(binding: str, config: str) -> None:
    """Checks the name of a macro, because gin accepts any, and would ignore a misspelt one silently."""
    match = _MACRO_BINDING.match(binding)
    known = set(re.findall(r"^(\w+) = ", config, re.MULTILINE)) | set(re.findall(r"%(\w+)", config))
    if match is None or match[1] in known:
        return
    close = difflib.get_close_matches(match[1], known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known macros: {', '.join(sorted(known)) or 'none'}"
    raise errors.UserError(f"--gin.{match[1]}: no gin file uses a macro of this name; {hint}")


def _check_required_macros(config: str) -> None:
    if missing := re.findall(r"^(\w+) = %gin\.REQUIRED$", config, re.MULTILINE):
        given = " ".join(f"--gin.{name}=..." for name in missing)
        raise errors.UserError(f"no value for {', '.join(missing)}; give: {given}")


def write_operative_config(path: epath.PathLike) -> None:
    """Writes every gin value that was used so far to a file that gin can parse."""
    writing.make_folder(epath.Path(path).parent)
    writing.write(path, gin.operative_config_str())


def macro(name: str, parameter: str | None = None, hint: Any = Any) -> Any:
    """Returns the value of a gin macro: `macro("MODEL")` is the model that the gin files describe.

    Args:
      name: the macro's name.
      parameter: the parameter whose range the value must have, where none in use gets the macro.
      hint: the value's type.

    Raises:
      errors.UserError: no gin file or binding gives it a value; or its type or range is wrong.
    """
    if not re.search(rf"^{name} = ", gin.config_str(), re.MULTILINE):
        raise errors.UserError(f"no gin file sets {name}; is it a file of gin/models/?")
    value = gin.get_configurable(f"{name}/gin.macro")()
    place = allowed_values.Place(name, parameter or name)
    for _, message in allowed_values.faults(place, value, hint):
        raise errors.UserError(message)
    return value


def run(main: Callable[..., Any], compilation_cache: bool = False) -> None:
    """Parses the flags and gin files, calls `main` with its arguments from gin, and exits.

    `main` is registered with gin under its module's import path, so that a gin file can say
    `from richhf_jax import train as train_script` and `train_script.train.model_dir = %MODEL_DIR`.

    Args:
      main: a function that isn't registered with gin; gin gives all its arguments.
      compilation_cache: True adds the flag --compilation_cache, which is on by default.
    """
    cache_flags = (_COMPILATION_CACHE,) if compilation_cache else ()
    run_program(lambda: _configure_and_call(main, compilation_cache), (*_FLAGS, *cache_flags))


def run_program(main: Callable[[], Any], gin_flags: Sequence[flags.FlagHolder] = MODEL_FLAGS) -> None:
    """Parses the flags, calls `main` and exits, for a program with flags of its own.

    Args:
      main: a function without arguments.
      gin_flags: the flags of this module that the program takes; `--help` shows them beside its own.
    """
    program = sys.argv[0]
    for flag in gin_flags:
        flags.FLAGS.register_key_flag_for_module(program, flags.FLAGS[flag.name])
    with errors.command(os.path.basename(program.removesuffix("/__main__.py"))):
        try:
            app.run(lambda argv: _call_without_arguments(main, argv), flags_parser=_parse_flags)
        except errors.UserError as error:
            absl_logging.debug("The mistake was found here:", exc_info=True)  # Shown with --verbosity=1.
            # Without the call that gin appends, which helps only people who know the code.
            raise errors.UserError(str(error).split(_GIN_CALL_NOTE)[0]) from error


def _parse_flags(argv: Sequence[str]) -> list[str]:
    rest = app.parse_flags_with_usage(rewrite_gin_args(argv))
    if flags.FLAGS["verbosity"].using_default_value:
        handler = absl_logging.get_absl_handler()
        handler.setFormatter(_Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        handler.addFilter(is_for_the_user)
    return rest


class _Formatter(logging.Formatter):
    """Formats a message; control characters in it become escapes."""

    def format(self, record: logging.LogRecord) -> str:
        return foreign_text.lines_for_terminal(super().format(record))


def is_for_the_user(record: logging.LogRecord) -> bool:
    """Returns whether to show a message: this package's messages and the warnings of others are shown.

    The messages of orbax, TFDS and clu at INFO would hide them. Two kinds of warnings are left out, because
    an exception follows: gin's for each folder without the file that it searches, and those with a traceback
    (of orbax and clu at a full disk).
    """
    ours = pathlib.Path(record.pathname).is_relative_to(_ROOT / "richhf_jax")
    told_otherwise = record.module == "resource_reader" or record.exc_info
    return ours or (record.levelno >= logging.WARNING and not told_otherwise)


def _call_without_arguments(main: Callable[[], Any], argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise errors.UserError(f"unexpected argument {argv[1]!r}: options start with --, see --help")
    main()


def configure(default_files: Sequence[str] = ()) -> Sequence[str]:
    """Parses the gin files and bindings of the command line.

    Args:
      default_files: gin files to take if the command line names none.

    Returns:
      The parsed files.

    Raises:
      errors.UserError: see `parse_gin_flags`; or there is no file at all.
    """
    files = _GIN_FILE.value or default_files
    if not files:
        raise errors.UserError("give a configuration with --gin_file=FILE; the project's own are in gin/")
    parse_gin_flags([*_GIN_SEARCH_PATHS.value, *DEFAULT_SEARCH_PATHS], files, _GIN_BINDINGS.value)
    return files


def given_flags(files: Sequence[str]) -> str:
    """Returns the flags that give this command's gin files and bindings to another, quoted for a shell.

    Args:
      files: the parsed files, see `configure`.
    """
    pairs = (binding.partition("=") for binding in _GIN_BINDINGS.value)
    paths = _GIN_SEARCH_PATHS.value
    return shlex.join(
        [
            *([f"--gin_search_paths={','.join(paths)}"] if paths else []),
            *(f"--gin_file={file}" for file in files),
            *(f"--gin.{name.strip()}={value.strip()}" for name, _, value in pairs),
        ]
    )


def _configure_and_call(main: Callable[..., Any], has_cache: bool) -> None:
    configured = _register(main)
    configure()
    _check_arguments(main)
    if _DRY_RUN.value:
        print(gin.config_str())
        return
    # These imports take seconds, so --help and --dry_run come without them.
    if data_dir := _TFDS_DATA_DIR.value:
        if os.path.isfile(data_dir):
            raise errors.UserError(f"--tfds_data_dir={data_dir} is a file: name the folder of the data sets")
        import seqio

        seqio.set_tfds_data_dir_override(data_dir)
    from richhf_jax import compilation_cache, multihost

    process_settings: list[Any] = [flag.value for flag in _PROCESS_FLAGS]
    with multihost.session(*process_settings):
        if has_cache:
            compilation_cache.configure(_COMPILATION_CACHE.value)
        try:
            configured()
        except RuntimeError as error:
            if not str(error).startswith("Required bindings for"):
                raise
            raise errors.UserError(str(error)) from error


def _register(main: Callable[..., Any]) -> Callable[..., Any]:
    """Registers `main` with gin, and a module that runs as `__main__` under its real name, too.

    Otherwise a gin file that imports the module would load it a second time, and configure a function that
    nobody calls.
    """
    spec = sys.modules[main.__module__].__spec__
    if main.__module__ == "__main__" and spec is not None:
        main.__module__ = spec.name
        sys.modules[spec.name] = sys.modules["__main__"]
    return gin.external_configurable(main)


def _check_arguments(main: Callable[..., Any]) -> None:
    bound = gin.get_bindings(main, resolve_references=False)
    for name, parameter in inspect.signature(main).parameters.items():
        if name not in bound and parameter.default in (parameter.empty, gin.REQUIRED):
            where = f"{main.__name__}.{name}"
            raise errors.UserError(f"no value for {where}; bind it in a gin file or give --gin.{where}=...")
