"""The one exception that means "you asked for something that cannot be done": exit code 2, no traceback."""

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_WRONG_USE = 2


class WrongUse(Exception):
    """A mistake of the user's, told in one message: what was asked, why it cannot be, what to write instead."""
