"""What a release needs, as far as it costs nothing: one version, a changelog that has it, a library for any Python and old C libraries.

`make wheel` builds the wheels, installs and runs them.
"""

import importlib
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.tags import parse_tag

import secateurs
from secateurs.kernels.library import library

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
wheel = importlib.import_module("wheel")

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_version_is_stated_in_one_place():
    assert re.fullmatch(r"\d+\.\d+\.\d+(rc\d+)?", secateurs.__version__)
    assert importlib.metadata.version("secateurs") == secateurs.__version__
    assert "version" not in PROJECT["project"]
    for file in (ROOT / "CMakeLists.txt", ROOT / "pyproject.toml", *(ROOT / "src").rglob("*.py")):
        stated = [line for line in file.read_text().splitlines() if f'"{secateurs.__version__}"' in line]
        assert stated == ([f'__version__ = "{secateurs.__version__}"'] if file == Path(secateurs.__file__) else []), (
            file
        )


def test_the_changelog_begins_with_this_version():
    headings = re.findall(r"^## \[(.+?)\] - (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    version, date = headings[0]
    assert version == secateurs.__version__
    assert re.fullmatch(r"\d{4}-\d\d-\d\d|not yet released", date)


def test_a_wheel_is_for_any_python():
    stated = importlib.metadata.distribution("secateurs").read_text("WHEEL")
    tags = set().union(*map(parse_tag, re.findall(r"^Tag: (.+)$", stated, re.MULTILINE)))
    assert {(tag.interpreter, tag.abi) for tag in tags} == {("py3", "none")}
    # it may be so because the library calls nothing of Python
    assert not re.search(rb"libpython|\bPy[A-Z_][A-Za-z_]+\b", Path(library()._name).read_bytes())


def test_the_library_calls_nothing_that_the_wheel_s_name_does_not_promise():
    """The symbols' versions, all of which stand in the library as text; `auditwheel` looks at each when the wheel is made."""
    code = Path(library()._name).read_bytes()
    # https://peps.python.org/pep-0599/ and auditwheel's manylinux_2_17
    for name, most in (
        ("GLIBC", wheel.POLICY.removeprefix("manylinux_")),
        ("GLIBCXX", "3_4_19"),
        ("CXXABI", "1_3_7"),
        ("GCC", "4_8"),
    ):
        for found in re.findall(rb"\b%s_([0-9.]+)\b" % name.encode(), code):
            assert [int(n) for n in found.split(b".")] <= [int(n) for n in most.split("_")], f"{name}_{found.decode()}"


def test_a_compiler_that_is_absent_is_named(monkeypatch):
    monkeypatch.setattr(wheel.platform, "machine", lambda: "x86_64")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match=r"no compiler for aarch64: .*\(Debian: g\+\+-aarch64-linux-gnu\)"):
        wheel.compiler_of("aarch64")
    with pytest.raises(SystemExit, match=r"no compiler for x86_64: .*\(Debian: g\+\+\)"):
        wheel.compiler_of("x86_64")
