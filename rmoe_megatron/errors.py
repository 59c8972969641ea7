"""What can end a command early: a mistake that its user can correct, a request to stop, or a run that cannot go on."""


class UserError(Exception):
    """A mistake in what the user asked for: configuration, data, files or layout.

    The message is one sentence that says what is wrong, where, and what to do. The command line prints it
    without a traceback and exits with code 2. Characters of files and arguments that would break the line, or
    control a terminal, are written as escapes.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(each if each.isprintable() else repr(each)[1:-1] for each in message))


class Interrupted(Exception):  # noqa: N818  # nothing is wrong
    """A command that was asked to stop, has kept what it had done, and can go on from there.

    The message is one sentence that says why, where, and how to go on. The command line prints it and exits with
    ``code``: 75 (EX_TEMPFAIL of sysexits.h: try again), at which the jobs of ``slurm/`` start anew, or what shells say of Ctrl-C.
    """

    def __init__(self, message: str, code: int = 75) -> None:
        super().__init__(message)
        self.code = code


class RunError(Exception):
    """A run that cannot go on though nothing it was asked for is wrong: its weights or losses are no longer finite.

    The message is one sentence that says what happened, at which step, and where more is written. The command line
    prints it without a traceback and exits with code 1.
    """


def exit_code(error: BaseException) -> int:
    """Return the exit code of a command that ends with ``error``.

    It is 2 where its user can do something about it: a mistake, or a file that the system refuses to write or read. Else it is 1.
    """
    is_of_system = isinstance(error, OSError) and error.errno is not None
    return 2 if isinstance(error, UserError) or is_of_system else 1
