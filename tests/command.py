"""The command line as tests call it."""

import process
import pytest

from secateurs import cli

FAST = ["--samples", "4", "--seqlen", "32", "--eval-windows", "2", "--eval-seqlen", "32"]


def run(*arguments, code=0):
    """The command line in a process of its own: (stdout, stderr)."""
    done = process.run(cli.main, [str(a) for a in arguments], COLUMNS=200)
    assert done.code == code, done.error + done.out
    return done.out, done.error


def fails(capsys, code, *arguments):
    """One sentence on standard error, no traceback, the exit code."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(a) for a in arguments])
    error = capsys.readouterr().err
    assert stopped.value.code == code, error
    assert "Traceback" not in error
    return " ".join(error.split())
