"""Errors that a user can cause; the command line prints them without a traceback."""

import textwrap

DISTRIBUTION = "gesso-diffusion"
"""Name of the package for pip; the package to import is gesso."""


def install_command(extra: str) -> str:
    """Return the command that installs an extra, such as pip install 'gesso-diffusion[vae]'."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"


def error_summary(error: Exception) -> str:
    """Return the message of an error of another library on one line."""
    return textwrap.shorten(str(error), 160, placeholder=" ...") or type(error).__name__


class GessoError(Exception):
    """Base class of errors whose message (one to three lines) says what is wrong, where, and how to fix it."""

    exit_code = 1


class UsageError(GessoError):
    """Invalid request (an unknown recipe, setting, value or path); no work was started."""

    exit_code = 2


class RunError(GessoError):
    """Failure during a valid request (a full disk, an unreadable file, a diverged loss)."""

    exit_code = 1


class DivergenceError(RunError):
    """Loss or gradient that is not finite."""


class NonFiniteSamplesError(RunError):
    """Samples with NaN or infinity, which are neither saved nor evaluated."""


class StoppedError(GessoError):
    """Stop by a signal, after the state was saved.

    The exit code is 128 plus the signal number: 130 for SIGINT, 138 for SIGUSR1, 143 for SIGTERM.
    """

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number


class UnreadableImageError(GessoError):
    """Damaged or rejected image; readers of many images skip it, count it and report its name."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name} ({reason})" if name else reason)
        self.name = name
        self.reason = reason
