"""Runs a command of this Python with another version of transformers.

    python tools/with_transformers.py 5.24.0 tools/zoo.py --check
    python tools/with_transformers.py 5.24.0 -m pytest tests/model

pip puts that version, and what it needs otherwise than what is installed, into build/transformers/VERSION, which comes first on
PYTHONPATH. What is installed stays as it is. Exits as the command does.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "build" / "transformers"


def needed(report: Mapping[str, Any]) -> list[str]:
    """Names and versions that pip's report would install. Raises SystemExit where torch is one of them."""
    found = [f"{x['metadata']['name']}=={x['metadata']['version']}" for x in report["install"]]
    torch = [x for x in found if x.startswith("torch==")]
    if torch:
        raise SystemExit(f"this version of transformers needs {torch[0]}, and torch stays as it is installed")
    return found


def fetched(version: str) -> Path:
    """A folder with that version, made where it is not there yet."""
    folder = FOLDER / version
    if folder.is_dir():
        return folder
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    wanted = [f"transformers=={version}"]
    asked = [*pip, "--dry-run", "--report", "-", *wanted]
    plan = needed(json.loads(subprocess.run(asked, check=True, stdout=subprocess.PIPE).stdout))
    part = folder.with_name(f"{version}.part")
    shutil.rmtree(part, ignore_errors=True)
    # the version that is installed is in no report
    subprocess.run([*pip, "--no-deps", "--target", str(part), *(plan or wanted)], check=True)
    part.rename(folder)
    return folder


def main(arguments: list[str]) -> None:
    if len(arguments) < 2:
        raise SystemExit(__doc__)
    version, *command = arguments
    path = os.pathsep.join(filter(None, [str(fetched(version)), os.environ.get("PYTHONPATH")]))
    os.execve(sys.executable, [sys.executable, *command], {**os.environ, "PYTHONPATH": path})


if __name__ == "__main__":
    main(sys.argv[1:])
