"""tools/with_transformers.py: the command runs with the version that was asked for, and what is installed stays."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "with_transformers.py"


@pytest.fixture
def script(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("with_transformers", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    return module


def report(*packages):
    return {"install": [{"metadata": {"name": name, "version": version}} for name, version in packages]}


@pytest.fixture
def pip(script, monkeypatch):
    """Stands for pip: answers with a report, and makes the folder that it is told to. What it was asked is in the list."""
    asked, found = [], report(("transformers", "5.9.1"), ("tokenizers", "0.22.2"))

    def run(command, **_):
        assert command[:4] == [sys.executable, "-m", "pip", "install"]
        asked.append(command[6:])
        if "--target" in command:
            package = Path(command[command.index("--target") + 1]) / "transformers"
            package.mkdir(parents=True)
            (package / "__init__.py").write_text("__version__ = '5.9.1'")
        return subprocess.CompletedProcess(command, 0, stdout=json.dumps(found))

    monkeypatch.setattr(script.subprocess, "run", run)
    return asked, found


def test_what_a_version_needs_is_put_into_a_folder_of_its_own_once(script, pip, tmp_path):
    asked, _ = pip
    for _ in range(2):
        assert script.fetched("5.9.1") == tmp_path / "5.9.1"
    assert asked == [
        ["--dry-run", "--report", "-", "transformers==5.9.1"],
        ["--no-deps", "--target", str(tmp_path / "5.9.1.part"), "transformers==5.9.1", "tokenizers==0.22.2"],
    ]


def test_the_version_that_is_installed_is_put_there_too(script, pip):
    asked, found = pip
    found["install"] = []
    script.fetched("5.23.0")
    assert asked[1][-1] == "transformers==5.23.0"


def test_torch_is_never_replaced(script, pip, tmp_path):
    asked, found = pip
    found["install"] += report(("torch", "2.4.0"))["install"]
    with pytest.raises(SystemExit, match=r"needs torch==2\.4\.0, and torch stays"):
        script.fetched("5.9.1")
    assert len(asked) == 1
    assert not (tmp_path / "5.9.1").exists()


def test_the_command_runs_with_that_version_and_its_exit_code(script, pip, monkeypatch):
    ran = {}
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.setattr(
        script.os, "execve", lambda *what: ran.update(zip(("file", "command", "env"), what, strict=True))
    )
    script.main(["5.9.1", "-c", "import transformers, sys; sys.exit(transformers.__version__ == '5.9.1' and 7)"])
    assert ran["env"]["PYTHONPATH"].endswith(f"5.9.1{os.pathsep}/somewhere")
    code = subprocess.Popen(ran["command"], executable=ran["file"], env=ran["env"]).wait()
    assert code == 7
