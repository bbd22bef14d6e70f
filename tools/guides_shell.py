"""Runs the blocks of one page of the guides, in their order, in one folder.

A bash block runs in a bash of its own that ends at the first command that fails. Python blocks of a page share one process, as the
cells of a notebook do. Both are forked from a server that has imported torch and transformers already: `secateurs` in a bash block
is a few lines that ask for a fork, which saves four seconds of import for each command. installed=True runs the installed command
instead, as a user would.
"""

import contextlib
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, NamedTuple

_FORKED = multiprocessing.get_context("forkserver")
# what the tests preload is as good; whoever comes first starts the server
PRELOADED = [
    "secateurs.cli", "secateurs.decide.decide", "secateurs.machine.bench", "secateurs.machine.probe", "secateurs.report.tables",
    "transformers.models.llama.modeling_llama",
]  # fmt: skip
# asks the server for a fork with its own arguments, folder, environment, input and outputs; ends as the fork does
_COMMAND = """#!{python} -SE
import json, os, socket, sys
asked = socket.socket(socket.AF_UNIX)
asked.connect({place!r})
asked.sendall(json.dumps([os.getpid(), os.getcwd(), dict(os.environ), sys.argv[1:]]).encode() + b"\\n")
sys.exit(int(asked.makefile().readline() or 1))
"""


class Ran(NamedTuple):
    """How a block ended. error: its standard error; of Python, the traceback."""

    code: int
    out: str
    error: str


class Shell:
    """A folder, its environment, and what runs in it. seconds: the limit of a block."""

    def __init__(self, folder: Path, environment: dict[str, str], installed: bool = False, seconds: float = 600):
        self.folder, self._seconds = folder, seconds
        self._environment = {**os.environ, **environment}
        self._place = tempfile.TemporaryDirectory(prefix="guides-")
        bin_ = Path(self._place.name) / "bin"
        bin_.mkdir()
        (bin_ / "python").symlink_to(sys.executable)
        self._listening: socket.socket | None = None
        if installed:
            (bin_ / "secateurs").symlink_to(Path(sys.executable).parent / "secateurs")
        else:
            self._listen(bin_ / "secateurs")
        self._environment["PATH"] = f"{bin_}{os.pathsep}{self._environment['PATH']}"
        self._python: Any = None

    def _listen(self, command: Path) -> None:
        place = f"{self._place.name}/asked"
        command.write_text(_COMMAND.format(python=sys.executable, place=place))
        command.chmod(0o755)
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(place)
        self._listening.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        assert self._listening is not None
        while True:
            try:
                asked, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(asked,), daemon=True).start()

    def _answer(self, asked: socket.socket) -> None:
        with asked:
            process = _FORKED.Process(target=_command, args=json.loads(asked.makefile().readline()))
            process.start()
            process.join()
            code = process.exitcode or 0
            # whoever asked may have been killed meanwhile
            with contextlib.suppress(OSError):
                asked.sendall(f"{code if code >= 0 else 128 - code}\n".encode())

    def bash(self, text: str) -> Ran:
        """Run a bash block; the first command that fails ends it."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text], cwd=self.folder, env=self._environment, capture_output=True, text=True,
            stdin=subprocess.DEVNULL, timeout=self._seconds,
        )  # fmt: skip
        return Ran(done.returncode, done.stdout, done.stderr)

    def python(self, text: str, name: str, line: int) -> Ran:
        """Run a Python block after those before it. name, line: where the block stands, for tracebacks."""
        if self._python is None:
            self._python, there = _FORKED.Pipe()
            self._process = _FORKED.Process(target=_session, args=(there, str(self.folder), self._environment))
            self._process.start()
            there.close()
        self._python.send(("\n" * line + text, name))
        if not self._python.poll(self._seconds):
            raise TimeoutError(f"{name}:{line}: the block did not end in {self._seconds:.0f} s")
        try:
            return Ran(*self._python.recv())
        except EOFError:
            self._process.join()
            return Ran(self._process.exitcode or 1, "", f"the Python process ended with {self._process.exitcode}")

    def close(self) -> None:
        if self._python is not None:
            self._python.close()
            self._process.join()
        if self._listening is not None:
            # wakes accept()
            self._listening.shutdown(socket.SHUT_RDWR)
            self._listening.close()
        self._place.cleanup()


def _enter(folder: str, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)


def _command(pid: int, folder: str, environment: dict[str, str], arguments: list[str]) -> None:
    """The command line, in the place of the process that asked for it."""
    from secateurs import cli

    _enter(folder, environment)
    for number in (1, 2):
        os.dup2(os.open(f"/proc/{pid}/fd/{number}", os.O_WRONLY), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    sys.argv = ["secateurs", *arguments]
    cli.main(arguments)


def _session(asked: Any, folder: str, environment: dict[str, str]) -> None:
    """Runs each text that is sent, in one namespace, and sends back how it ended and what it printed."""
    import traceback

    _enter(folder, environment)
    sys.path.insert(0, folder)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    while True:
        try:
            text, name = asked.recv()
        except EOFError:
            return
        with tempfile.TemporaryFile("w+") as out:
            code, error = 0, ""
            os.dup2(out.fileno(), 1)
            sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
            try:
                exec(compile(text, name, "exec"), namespace)
            except BaseException:
                code, error = 1, traceback.format_exc()
            sys.stdout.flush()
            out.seek(0)
            asked.send((code, out.read(), error))
