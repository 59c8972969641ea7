"""The one exception type for mistakes a user can correct."""


class UserError(Exception):
    """A mistake in what the user asked for: configuration, data, files or layout.

    The message is one sentence that says what is wrong, where, and what to do. The command line prints it
    without a traceback and exits with code 2.
    """
