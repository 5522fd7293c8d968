"""The exception for mistakes that the user can correct."""


class UserError(Exception):
    """A mistake in the user's input. Entry points print its message without a traceback and exit with code 1.

    The message names the file, record or setting at fault, and the fix.
    """
