"""The exception for mistakes that the user can correct."""


class UserError(Exception):
    """A mistake in the user's input. Entry points print its message without a traceback and exit with code 1.

    The message names the file, record or setting at fault, and the fix.
    """


NOT_FINITE = "aren't finite numbers: its weights are damaged, or its training diverged"


class NotFiniteError(UserError):
    """A model's outputs aren't finite numbers, so they are no scores; the message names the output."""

    def __init__(self, output: str):
        super().__init__(f"the model's {output} {NOT_FINITE}")
