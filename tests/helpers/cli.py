"""Assertions on results of the command line."""


def assert_refused(result: tuple[int, str, str], message: str, code: int = 2) -> None:
    """Assert that (exit code, stdout, stderr) is a clear error: the exit code, one to four lines, no traceback."""
    assert result[0] == code, result
    assert message in result[2]
    assert "Traceback" not in result[2] and len(result[2].strip().splitlines()) <= 4
