"""The one exception for a user's mistake."""


class UserError(ValueError):
    """A mistake in the input, told in one line that names the input and the cure.

    Entry points print the message without a traceback and exit with `exit_status`.
    """

    exit_status = 2
