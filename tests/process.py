"""Processes of their own, forked from a server that has imported what takes seconds to import and runs no threads.

A fork has what a fresh interpreter has: its own memory, environment, output and exit code, and it can be killed.
"""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(
    [
        "secateurs.cli", "secateurs.decide.decide", "secateurs.decide.fleet", "secateurs.machine.bench", "secateurs.machine.probe",
        "secateurs.prune.verify", "secateurs.report.page", "secateurs.report.run_tables", "secateurs.report.tables",
        "lm_eval",
        "transformers.models.llama.modeling_llama", "tiny",
    ]
)  # fmt: skip


class Done(NamedTuple):
    code: int
    out: str
    error: str


def run(function, *arguments, **environment):
    """Call a function of a module in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out, error = Path(folder, "out"), Path(folder, "error")
        process = _start(function, arguments, out, error, environment)
        process.join()
        return Done(process.exitcode, out.read_text(), error.read_text())


def execute(code, *arguments, **environment):
    """run() of a program text, with its arguments in sys.argv."""
    return run(_execute, code, arguments, **environment)


class Job:
    """A function in several processes, as torchrun would start them. Each has one thread."""

    def __init__(self, count, function, *arguments, **environment):
        self._folder = tempfile.TemporaryDirectory()
        with socket.create_server(("127.0.0.1", 0)) as free:
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
        self._files = [
            [Path(self._folder.name, f"{what}-{rank}") for what in ("out", "error")] for rank in range(count)
        ]
        self.processes = [
            _start(_alone, (function, arguments), *self._files[rank],
                   {**meeting, "RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, **environment})
            for rank in range(count)
        ]  # fmt: skip

    def join(self, seconds=120):
        """How each process ended, in the order of ranks; those that are not done by then are killed, and have no code."""
        until = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()
        return [
            Done(code, *(file.read_text() for file in files)) for code, files in zip(codes, self._files, strict=True)
        ]


def _alone(function, arguments):
    import torch

    torch.set_num_threads(1)
    function(*arguments)


class Running:
    """A program text under way. lines(): what it prints, as it prints it."""

    def __init__(self, code, *arguments, **environment):
        self._folder = tempfile.TemporaryDirectory()
        pipe = Path(self._folder.name, "pipe")
        os.mkfifo(pipe)
        self.process = _start(_execute, (code, arguments), pipe, pipe, environment)
        self._pipe = pipe.open()

    def lines(self):
        with self._pipe:
            for line in self._pipe:
                yield line.strip()

    def all(self):
        found = list(self.lines())
        self.process.join()
        return found

    def kill(self):
        """SIGKILL, and wait for the end."""
        self.process.kill()
        self.process.join()


def _start(function, arguments, out, error, environment):
    everything = {**os.environ, **{k: str(v) for k, v in environment.items()}}
    process = _FORKED.Process(target=_enter, args=(function, arguments, str(out), str(error), everything))
    process.start()
    return process


def _enter(function, arguments, out, error, environment):
    os.environ.clear()
    os.environ.update(environment)
    for number, file in ((1, out), (2, error)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    function(*arguments)


def _execute(code, arguments):
    sys.argv = ["-c", *map(str, arguments)]
    exec(compile(code, "<test>", "exec"), {"__name__": "__main__"})


_RELOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM
for folder in sys.stdin:
    model, info = AutoModelForCausalLM.from_pretrained(folder.rstrip("\\n"), output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    ids = model.generate(torch.arange(8)[None], max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    assert "secateurs" not in sys.modules
    shapes = [sum(p.numel() for p in model.parameters()), list(ids.shape), len(cache.layers), cache.layers[0].keys.shape[1]]
    print("found", json.dumps(shapes), flush=True)
"""


class Elsewhere:
    """A process that knows transformers and not secateurs."""

    def __init__(self):
        self._process = None

    def reload(self, folder):
        """Load a folder and generate: number of parameters, shape of the generated tokens, blocks, KV heads."""
        if self._process is None or self._process.poll() is not None:
            command = [sys.executable, "-c", _RELOAD]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._process.stdin.write(f"{folder}\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("found "):
                return json.loads(line.removeprefix("found "))
        raise AssertionError(f"{folder} does not load without secateurs: the process ended with {self._process.wait()}")

    def close(self):
        if self._process is not None:
            self._process.communicate()
