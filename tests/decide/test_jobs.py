"""Candidates made by commands of their own: the same decision, whoever runs them and however many at once."""

import dataclasses
import importlib
import shlex
import subprocess
import sys
from pathlib import Path

import process
import pytest
from decisions import module, plan, stated_bench

from secateurs import cli
from secateurs.base.errors import PlanError
from secateurs.decide import jobs
from secateurs.decide.decide import commands, decide
from secateurs.decide.jobs import Job, shrink_command
from secateurs.shrink.plan import ShrinkPlan

CANDIDATES = ("0.5", "shrink:params=0.9x", "shrink:params=0.9x+int8")


@pytest.fixture
def stated(monkeypatch):
    runs = []
    monkeypatch.setattr(module, "bench", stated_bench(runs))
    return runs


def found(result):
    """What a decision found of each candidate, without its times."""
    kept = ("candidate", "status", "reason", "quality", "gate", "passed", "bytes", "bytes_ratio", "bits", "through")
    return [{name: row.get(name) for name in kept} for row in result["rows"]]


def test_the_commands_of_a_plan_make_what_the_decision_makes(tmp_path, llama, words, stated):
    chosen = plan(llama, words, tmp_path, candidates=(*CANDIDATES, "shrink:latency=0.9x"))
    whole = decide(plan(llama, words, tmp_path, candidates=CANDIDATES), tmp_path / "whole")
    lines, left = commands(chosen, tmp_path / "run")
    assert [line.count("secateurs") for line in lines if "shrink" in line] == [2]
    assert left == [
        "shrink:latency=0.9x is left to `secateurs decide` itself: its budget is a time, measured where nothing else runs"
    ]
    # asked again it says the same
    assert commands(chosen, tmp_path / "run") == (lines, left)
    for line in lines:
        for command in line.split(" && "):
            done = process.run(cli.main, [*shlex.split(command)[1:], "--quiet"])
            assert done.code in (0, 3), done.error
    result = decide(chosen, tmp_path / "run", collect=True)
    rows = found(result)
    assert rows[-1]["reason"] == "it is not finished, and only those that are were collected"
    assert rows[:-1] == found(whole)
    assert result["recommended"] == whole["recommended"]


def test_nothing_finished_is_no_decision(tmp_path, llama, words, stated):
    with pytest.raises(PlanError, match="none of the candidates is finished"):
        decide(plan(llama, words, tmp_path), tmp_path / "run", collect=True)


def test_candidates_that_are_made_at_once_decide_the_same(tmp_path, llama, words, stated):
    chosen = plan(llama, words, tmp_path, candidates=("0.5", "2:4"))
    assert found(decide(chosen, tmp_path / "two", jobs=2)) == found(decide(chosen, tmp_path / "one"))
    assert (tmp_path / "two" / "work" / "jobs.log").read_text() == ""


class Fake:
    """A process that ends after two looks with the code that its command says."""

    running, most, begun, codes = 0, 0, [], {}

    def __init__(self, command, stdin, stdout, stderr, env):
        self.looks, self.name = 0, command[3]
        assert command[:3] == [sys.executable, "-m", "secateurs"]
        Fake.running += 1
        Fake.most = max(Fake.most, Fake.running)
        Fake.begun.append((self.name, env["OMP_NUM_THREADS"]))
        self.ended = False

    def poll(self):
        self.looks += 1
        if self.looks < 2:
            return None
        if not self.ended:
            Fake.running, self.ended = Fake.running - 1, True
        self.returncode = Fake.codes.get(self.name, 0)
        return self.returncode

    def terminate(self):
        Fake.begun.append(("ended", self.name))

    def wait(self):
        pass


@pytest.fixture
def fakes(monkeypatch):
    Fake.running, Fake.most, Fake.begun, Fake.codes = 0, 0, [], {}
    monkeypatch.setattr(subprocess, "Popen", Fake)
    monkeypatch.setattr(jobs, "_LOOK", 0.0)
    return Fake


def test_so_many_at_once_and_a_job_ends_at_its_first_failure(fakes, tmp_path):
    todo = [Job((name,), ((f"{name}1",), (f"{name}2",))) for name in "abcd"]
    fakes.codes = {"b1": 3}
    ticks = []
    jobs.run(todo, 2, 8, tmp_path / "log", lambda job: job.candidates != ("c",), lambda: ticks.append(1))
    assert fakes.most == 2
    assert sorted(fakes.begun) == [(name, "4") for name in ("a1", "a2", "b1", "d1", "d2")]
    assert len(ticks) == 4


def test_jobs_end_with_the_decision(fakes, tmp_path):
    def wanted(job):
        if job.candidates == ("b",):
            raise KeyboardInterrupt
        return True

    with pytest.raises(KeyboardInterrupt):
        jobs.run([Job((name,), ((name,),)) for name in "ab"], 2, 1, tmp_path / "log", wanted)
    assert fakes.begun == [("a", "1"), ("ended", "a")]


def test_a_shrink_command_is_its_plan(monkeypatch, tmp_path):
    plan = ShrinkPlan(
        "a model", "params=0.7x", ("mlp", "heads"), "taylor", refit=False, multiple=8, prompt=9, new=4, damping=0.02
    )
    plan = dataclasses.replace(
        plan,
        calibration=dataclasses.replace(plan.calibration, source="text.txt", samples=3, seed=5),
        evaluation=dataclasses.replace(plan.evaluation, windows=2, gates=("ppl<=+5%", "kl<=0.1")),
    )
    asked = []
    monkeypatch.setattr(
        importlib.import_module("secateurs.shrink.run"), "shrink", lambda *given, say: asked.append(given[:2]) or 1 / 0
    )
    line = shlex.split(Job(("x",), (shrink_command(plan, tmp_path / "it"),)).line)
    with pytest.raises(ZeroDivisionError):
        cli.main([*line[1:], "--quiet"])
    assert asked == [(plan, Path(tmp_path / "it"))]
