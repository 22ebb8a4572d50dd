"""Run the command line in this process, and assertions on its results."""

from typer.testing import CliRunner

from gesso.cli import app


def run_cli(*arguments: object) -> str:
    """Run a command that must succeed; return its output."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def assert_refused(result: tuple[int, str, str], message: str, code: int = 2) -> None:
    """Assert that (exit code, stdout, stderr) is a clear error: the exit code, one to four lines, no traceback."""
    assert result[0] == code, result
    assert message in result[2]
    assert "Traceback" not in result[2] and len(result[2].strip().splitlines()) <= 4
