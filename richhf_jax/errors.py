"""The one exception that means: the user can mend this."""


class UserError(Exception):
    """A mistake in what the user gave. Entry points print its message, without a traceback, and exit 1.

    The message names the file, record or setting at fault, and the fix.
    """
