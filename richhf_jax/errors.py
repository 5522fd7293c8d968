"""The exception for mistakes that the user can correct, and how commands tell it."""

import contextlib
import io
import sys
from collections.abc import Iterator

from richhf_jax import foreign_text


class UserError(Exception):
    """A mistake in the user's input. Entry points print its message without a traceback and exit with code 1.

    The message names the file, record or setting at fault, and the fix.
    """


NOT_FINITE = "aren't finite numbers: its weights are damaged, or its training diverged"


class NotFiniteError(UserError):
    """A model's outputs aren't finite numbers, so they are no scores; the message names the output."""

    def __init__(self, output: str):
        super().__init__(f"the model's {output} {NOT_FINITE}")


@contextlib.contextmanager
def command(name: str = "") -> Iterator[None]:
    """Wraps a command's main function, as a decorator or in a `with` statement.

    A UserError ends the program with its message on stderr and exit code 1. Control characters in it become
    escapes. So do characters on stdout that its encoding lacks: no locale ends a command in a traceback.
    But Python reads file names by the locale, so one that isn't UTF-8 gets a warning.

    Args:
      name: the program's name, to begin the message with; "" for none.
    """
    if (encoding := sys.getfilesystemencoding()) != "utf-8":
        print(f"file names are read as {encoding}; if they are UTF-8, set PYTHONUTF8=1", file=sys.stderr)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except UserError as error:
        message = f"{name}: {error}" if name else str(error)
        sys.exit(foreign_text.lines_for_terminal(message))
