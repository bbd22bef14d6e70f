"""Plants small mistakes, one at a time in a copy of the tree, and runs the tests that should notice each.

    python tools/mutants.py [WORD] [--jobs 2]

The mistakes are the rows of mutations.py; WORD runs those that hold it. A row is caught if one of its tests fails, survived if all
pass. It is refused if its line is not in its place exactly once, or if its tests do not pass, or do not run, without it. Exits with
1 if a row is refused or fewer than 95% are caught. The working tree is only read.
"""

import argparse
import importlib.util
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from mutations import ROWS, Row

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = "libsecateurs_kernels.so"
LEAST = 0.95
# a test that takes longer hangs
SECONDS = 600
# what takes seconds to import, for all rows once; nothing of the tree, which is another for every row
PRELOAD = [
    "pytest",
    "torch",
    "transformers",
    "transformers.models.llama.modeling_llama",
    "accelerate",
    "scipy.optimize",
]
_FORKED = multiprocessing.get_context("forkserver")
# an editable install would lead every import back to the working tree
_SITE = "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if 'Scikit' not in type(f).__name__]\n"


class RefusedError(Exception):
    """A row that says nothing."""


def place(root: Path, row: Row) -> tuple[Path, int]:
    """The file and the number of the row's line, which is there once. Raises RefusedError."""
    where = root / row.where
    files = [where] if where.is_file() else sorted(f for f in where.rglob("*") if f.suffix in (".py", ".cc", ".h"))
    found = [
        (file, number)
        for file in files
        for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"))
        if line.strip() == row.line
    ]
    if len(found) != 1:
        raise RefusedError(f"{row.where} has the line {len(found)} times, not once")
    return found[0]


def planted(text: str, number: int, instead: str) -> str:
    """The text with another line of the same indentation there."""
    lines = text.split("\n")
    before = lines[number]
    lines[number] = before[: len(before) - len(before.lstrip())] + instead
    return "\n".join(lines)


class Tree:
    """A copy of what tests need, and the tests run in it."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.folder = folder
        for name in ("src", "csrc", "tests", "tools", "bench", "docs"):
            if (root / name).is_dir():
                shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        for name in ("pyproject.toml", "CMakeLists.txt", "README.md", "mkdocs.yml"):
            if (root / name).is_file():
                shutil.copy(root / name, folder)
        (folder / "site").mkdir()
        (folder / "site" / "sitecustomize.py").write_text(_SITE)
        # a name that no test writes to
        self.build = folder / "compiled"
        if (folder / "csrc").is_dir():
            self._use(_library(root) or self._built())

    def fails(self, row: Row) -> bool:
        """Whether one of the row's tests fails. Raises RefusedError if they cannot be run."""
        if row.where.startswith("csrc") or self.build.is_dir():
            self._use(self._built())
        compiled = [Path(test).stem for test in row.tests if test.startswith("csrc/")]
        python = [f"tests/{test}" for test in row.tests if not test.startswith("csrc/")]
        return any(self._compiled(name) for name in compiled) or (bool(python) and self._pytest(python))

    def _compiled(self, name: str) -> bool:
        try:
            return subprocess.run([self.build / name], capture_output=True, timeout=SECONDS).returncode != 0
        except subprocess.TimeoutExpired:
            return True

    def _pytest(self, tests: Sequence[str]) -> bool:
        out, left = self.folder / "out.txt", self.folder / "code.txt"
        left.unlink(missing_ok=True)
        process = _FORKED.Process(
            target=_pytest, args=(self.folder, out, ["-x", "-q", "-p", "no:cacheprovider", *tests])
        )
        process.start()
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
            return True
        said = out.read_text(errors="replace").strip() or "nothing was said"
        # not process.exitcode: another thread that starts a process polls this one too, and of two readers one is told 255
        code = int(left.read_text()) if left.is_file() else None
        # none where the process was killed; 2 and above: nothing could be collected or found
        if code in (1, None):
            return True
        if code or " passed" not in said.rsplit("\n", 1)[-1]:
            raise RefusedError(f"its tests do not run: {said.rsplit(chr(10), 1)[-1]}")
        return False

    def _built(self) -> Path:
        """The kernels and their tests as csrc now is. Raises RefusedError if it does not compile."""
        if not self.build.is_dir():
            _done(["cmake", "-S", self.folder, "-B", self.build, "-DSECATEURS_TESTS=ON"])
        _done(["cmake", "--build", self.build])
        return self.build / LIBRARY

    def _use(self, library: Path) -> None:
        shutil.copy(library, self.folder / "src" / "secateurs")


def _library(root: Path) -> Path | None:
    """The compiled kernels of the working tree, where it or its installation has them."""
    found = importlib.util.find_spec("secateurs")
    places = [root / "src" / "secateurs", *map(Path, (found and found.submodule_search_locations) or ())]
    return next((p / LIBRARY for p in places if (p / LIBRARY).is_file()), None)


def _done(command: Sequence[str | Path]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RefusedError(f"it does not compile: {(done.stdout + done.stderr).strip()[-300:]}")


def _pytest(folder: Path, out: Path, arguments: Sequence[str]) -> None:
    """In a process of its own: run pytest on a copy and leave with its code."""
    os.chdir(folder)
    first = [str(folder / "site"), str(folder / "src")]
    os.environ["PYTHONPATH"] = os.pathsep.join(first)
    os.environ.pop("PYTHONWARNINGS", None)
    sys.path[:0] = first
    exec(_SITE)
    file = os.open(out, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    import pytest

    code = int(pytest.main(list(arguments)))
    sys.stdout.flush()
    (out.parent / "code.txt").write_text(str(code))
    # nothing that a test left behind may hold the process
    os._exit(code)


def verdict(tree: Tree, row: Row) -> str:
    """'caught', 'survived', or 'refused: ' and why. The copy is as it was afterwards."""
    try:
        file, number = place(tree.folder, row)
        text = file.read_text(encoding="utf-8")
        file.write_text(planted(text, number, row.instead), encoding="utf-8")
        try:
            return "caught" if tree.fails(row) else "survived"
        finally:
            file.write_text(text, encoding="utf-8")
    except RefusedError as error:
        return f"refused: {error}"


def run(root: Path, rows: Sequence[Row], jobs: int) -> int:
    """Run the rows and say what became of each; the exit code."""
    os.environ.update(
        OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", PYTHONDONTWRITEBYTECODE="1",
        # what is loaded beforehand may load triton
        TRITON_INTERPRET="1",
        # tests that are killed leave semaphores to whoever watches over this process's
        PYTHONWARNINGS="ignore:resource_tracker:UserWarning",
    )  # fmt: skip
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        del os.environ[name]
    _FORKED.set_forkserver_preload(PRELOAD)
    # those that compile are the longest, and one copy alone compiles: it takes them from the left, others from the right
    todo = deque(sorted(rows, key=lambda row: not row.where.startswith("csrc")))
    found: list[str] = []
    sound: dict[tuple[str, ...], str] = {}
    lock = threading.Lock()

    def work(number: int, tree: Tree) -> None:
        while True:
            with lock:
                if not todo:
                    return
                row = todo.pop() if number else todo.popleft()
            began = time.monotonic()
            # without the mistake its tests pass
            if row.tests not in sound:
                try:
                    sound[row.tests] = "its tests fail without it" if tree.fails(row) else ""
                except RefusedError as error:
                    sound[row.tests] = str(error)
            said = f"refused: {sound[row.tests]}" if sound[row.tests] else verdict(tree, row)
            with lock:
                found.append(said)
                seconds = time.monotonic() - began
                print(
                    f"{said:<9} {seconds:5.1f} s  {row.where}: {row.line}\n{'':20}{row.instead or '(nothing)'}",
                    flush=True,
                )

    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        trees = [Tree(root, Path(folder) / str(n)) for n in range(max(1, min(jobs, len(rows))))]
        threads = [threading.Thread(target=work, args=pair) for pair in enumerate(trees)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    caught, refused = found.count("caught"), sum(said.startswith("refused") for said in found)
    print(f"{caught} of {len(rows)} caught, {refused} refused, {time.monotonic() - began:.0f} s")
    return int(refused > 0 or len(found) < len(rows) or caught < LEAST * len(rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("word", nargs="?", default="", help="run rows that hold this in their place, lines or tests")
    parser.add_argument("--jobs", type=int, default=2, help="rows at a time, one thread each (default 2)")
    options = parser.parse_args()
    rows = [row for row in ROWS if options.word in "\n".join((row.where, row.line, row.instead, *row.tests))]
    if not rows:
        parser.error(f"no row holds '{options.word}'")
    return run(ROOT, rows, options.jobs)


if __name__ == "__main__":
    sys.exit(main())
