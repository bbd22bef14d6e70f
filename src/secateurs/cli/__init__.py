"""The command line: one module a group of commands, options that they share, and main().

Parsing, progress and printing; no logic.
"""

import os

# oneDNN and torch keep what they made for the last 1024 shapes of a product, 2 MB each, and every expert of every block has another
# number of tokens; read when the first product is formed
for _name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_name, "16")

from secateurs.cli.commands import app, main  # noqa: E402

__all__ = ["app", "main"]
