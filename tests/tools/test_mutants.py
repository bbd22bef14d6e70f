"""tools/mutants.py: its rows hold, and it says what became of each."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / "tools"


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(TOOLS))
    import mutants

    yield mutants
    sys.path.remove(str(TOOLS))


def test_every_row_s_line_is_in_its_place_once_and_changes(tool):
    wrong = []
    for row in tool.ROWS:
        try:
            file, number = tool.place(ROOT, row)
        except tool.RefusedError as error:
            wrong.append(f"{error}: {row.line}")
            continue
        text = file.read_text(encoding="utf-8")
        changed = tool.planted(text, number, row.instead)
        assert row.line != row.instead
        assert len(changed.split("\n")) == len(text.split("\n"))
        if file.suffix == ".py":
            ast.parse(changed)
    assert not wrong
    assert len({(row.where, row.line, row.instead) for row in tool.ROWS}) == len(tool.ROWS) >= 60


def test_every_row_s_tests_exist(tool):
    functions = {
        file: {
            node.name for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)
        }
        for file in (ROOT / "tests").rglob("test_*.py")
    }
    programs = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    for row in tool.ROWS:
        assert row.tests, row.line
        for test in row.tests:
            if test.startswith("csrc/"):
                assert (ROOT / test).is_file()
                assert Path(test).stem in programs
                continue
            file, _, name = test.partition("::")
            assert name.partition("[")[0] in functions[ROOT / "tests" / file], test


def test_every_folder_has_rows(tool):
    folders = {folder.name for folder in (ROOT / "src" / "secateurs").iterdir() if any(folder.glob("*.py"))}
    places = {row.where.split("/")[2] for row in tool.ROWS if row.where.startswith("src/")}
    assert places == folders
    assert any(row.where.startswith("csrc/") for row in tool.ROWS)


SOURCE = "def double(x):\n    return 2 * x\n\n\ndef half(x):\n    y = x / 2\n    return y\n\n\ndef same(x):\n    y = x\n    return y\n"
TESTS = """import toy


def test_double():
    assert toy.double(3) == 6


def test_half():
    assert toy.half(0) == 0


def test_wrong():
    assert toy.same(1) == 2


def test_none(none):
    pass
"""
PROGRAM = """
import sys
from pathlib import Path
import mutants
from mutations import Row

mutants.PRELOAD[:] = ["pytest"]
rows = [
    Row("src", "return 2 * x", "return 3 * x", ("test_toy.py::test_double",)),
    Row("src/toy.py", "y = x / 2", "y = x / 3", ("test_toy.py::test_half",)),
    Row("src", "return y", "return 0", ("test_toy.py::test_half",)),
    Row("src", "y = x", "y = 2 * x", ("test_toy.py::test_wrong",)),
    Row("src", "y = x", "y = 2 * x", ("test_toy.py::test_none",)),
    Row("src", "y = x", "y = 2 * x", ("test_toy.py::test_gone",)),
]
if __name__ == "__main__":
    rows = [rows[int(i)] for i in sys.argv[2:]]
    sys.exit(mutants.run(Path(sys.argv[1]), rows, jobs=2))
"""


@pytest.fixture
def toy(tmp_path):
    for name, text in (
        ("src/toy.py", SOURCE),
        ("tests/test_toy.py", TESTS),
        ("pyproject.toml", "[tool.pytest.ini_options]\n"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def ran(toy, *rows):
    """Exit code, and what was said of each row, in any order."""
    (toy / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(toy / "program.py"), str(toy), *map(str, rows)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(TOOLS)}
    )
    return done.returncode, done.stdout + done.stderr


def test_what_survives_is_said_to_have_survived(toy):
    code, said = ran(toy, 0, 1)
    assert code == 1, said
    lines = said.splitlines()
    assert any(line.startswith("caught") and line.endswith("src: return 2 * x") for line in lines), said
    assert any(line.startswith("survived") and line.endswith("src/toy.py: y = x / 2") for line in lines), said
    assert lines[-1].startswith("1 of 2 caught, 0 refused")
    # planted in a copy
    assert (toy / "src" / "toy.py").read_text() == SOURCE
    code, said = ran(toy, 0)
    assert code == 0, said
    assert said.splitlines()[-1].startswith("1 of 1 caught, 0 refused")


def test_rows_that_say_nothing_are_refused(toy):
    code, said = ran(toy, 0, 2, 3, 4, 5)
    assert code == 1, said
    assert "src has the line 2 times, not once" in said
    assert "refused: its tests fail without it" in said
    assert said.count("refused: its tests do not run") + said.count("refused: its tests fail") == 3
    assert said.splitlines()[-1].startswith("1 of 5 caught, 4 refused")
