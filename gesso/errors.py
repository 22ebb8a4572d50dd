"""The kinds of error that a user can cause. The command line prints them without a traceback."""


class GessoError(Exception):
    """One to three lines: what was wrong, where, what would be right."""

    exit_code = 1


class UsageError(GessoError):
    """The request itself is wrong (an unknown recipe, key, value or path): nothing was started."""

    exit_code = 2


class RunError(GessoError):
    """The request was right, and something failed on the way (a disk, a file, a diverged loss)."""

    exit_code = 1


class Diverged(RunError):
    """The loss or its gradient was not finite."""


class Stopped(GessoError):
    """A signal asked the run to stop; its state is saved. 128 and its number: 130 for SIGINT, 138 SIGUSR1, 143 SIGTERM."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number


class Unreadable(GessoError):
    """One image of many is damaged or refused. Whoever reads many skips it, counts it, and says which."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name} ({reason})" if name else reason)
        self.name = name
        self.reason = reason
