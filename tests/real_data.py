"""What tests on trained models read: ../shared/data, where it is there."""

from pathlib import Path

import pytest

DATA = Path(__file__).parent.parent.parent / "shared" / "data"


def data(name):
    """A file or folder of it; skips with its name."""
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{path} is absent")
    return path
