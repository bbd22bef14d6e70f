"""Candidates as plain commands: run several at a time here, or by whatever runs jobs on a cluster. Their folders are the result."""

import os
import shlex
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateurs.quality.settings import FLAGS
from secateurs.shrink.plan import ShrinkPlan

# seconds between looks at whether a job has ended
_LOOK = 0.1


@dataclass(frozen=True)
class Job:
    """Commands of secateurs, one after the other as long as they succeed, and the candidates that they make."""

    candidates: tuple[str, ...]
    commands: tuple[tuple[str, ...], ...]

    @property
    def line(self) -> str:
        """For a shell."""
        return " && ".join(shlex.join(("secateurs", *command)) for command in self.commands)


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    left: deque[tuple[str, ...]] = field(default_factory=deque)


def run(
    jobs: Sequence[Job],
    at_once: int,
    threads: int,
    log: Path,
    wanted: Callable[[Job], bool],
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Run jobs in order, at most `at_once` at a time, each with its part of `threads`; return when all have ended, as they may.

    wanted: asked before each command. log: a file for what they print. tick: called when a job has ended. If this is interrupted,
    it ends them.
    """
    waiting, running = deque(jobs), list[_Running]()
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, threads // at_once))}

    with log.open("ab") as said:

        def start(command: tuple[str, ...]) -> Any:
            everything = [sys.executable, "-m", "secateurs", *command, "--quiet"]
            return subprocess.Popen(everything, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=environment)

        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    job = waiting.popleft()
                    if wanted(job):
                        first, *rest = job.commands
                        running.append(_Running(job, start(first), deque(rest)))
                    else:
                        tick()
                time.sleep(_LOOK)
                for one in [one for one in running if one.process.poll() is not None]:
                    if one.process.returncode == 0 and one.left and wanted(one.job):
                        one.process = start(one.left.popleft())
                    else:
                        running.remove(one)
                        tick()
        finally:
            for one in running:
                one.process.terminate()
                one.process.wait()


def shrink_command(plan: ShrinkPlan, out: Path) -> tuple[str, ...]:
    """The command of a plan of shrink: what is not its default, as flags."""
    usual = ShrinkPlan(plan.model, plan.budget)
    found = ["shrink", plan.model, "--budget", plan.budget, "--out", str(out)]
    for name in ("units", "criterion", "depth", "refit", "multiple", "prompt", "new", "damping"):
        value = getattr(plan, name)
        if value != getattr(usual, name):
            found += _flag(name, ",".join(value) if name == "units" else value)
    for part, flags in FLAGS.items():
        for name, flag in flags.items():
            value = getattr(getattr(plan, part), name)
            if value != getattr(getattr(usual, part), name):
                # what is a list is given once for each
                for one in value if isinstance(value, tuple) else [value]:
                    found += _flag(flag, one)
    return tuple(found)


def _flag(name: str, value: object) -> list[str]:
    return [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
