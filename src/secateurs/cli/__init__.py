"""The command line: one module a group of commands, options that they share, and main().

Parsing, progress and printing; no logic.
"""

from secateurs.cli.commands import app, main

__all__ = ["app", "main"]
