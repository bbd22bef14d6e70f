"""Several processes prune as one does; where one ends all do, and the same command goes on."""

import contextlib
import dataclasses
import json
import os
import signal
from pathlib import Path

import process
import pytest
import tiny
import torch
from plans import asked
from safetensors.torch import load_file

import secateurs as sc
from secateurs.base.processes import Ranks, is_first
from secateurs.model import batches, walk
from secateurs.prune import run as prune_run
from secateurs.prune.guide import in_passes
from secateurs.prune.run import Run

SMALL = {"samples": 6, "seqlen": 32, "eval_windows": 3, "eval_seqlen": 32}
CASES = {
    "wanda": {"method": "wanda"},
    "balanced 2:4": {"effort": "balanced", "pattern": "2:4"},
    "balanced on a grid": {"effort": "balanced", "bits": "4", "head_bits": 8, "group": "32"},
    "measured": {"method": "sparsegpt", "allocation": "measured", "sensitivity": 64, "propagate": "dense"},
    "best": {"effort": "best", "blend": 0.5, "reconstruct": 4, "distill": 4, "samples": 8},
}


def weights(run):
    found = sorted((run / "model").glob("*.safetensors"))
    return {k: v for file in found for k, v in load_file(file).items()}


def plan_of(model, words, **options):
    return asked(
        sc.Plan, str(model), calibration=str(words), eval_text=str(words), **{"method": "sparsegpt", **SMALL, **options}
        if "effort" not in options else {**SMALL, **options},
    )  # fmt: skip


def _prune(plan, out):
    # so that a few windows are batches enough for all
    batches.TOKENS_PER_BATCH = 64
    Run(plan, out).complete()


def on(size, plan, out, prune=_prune):
    """The run directory of so many processes."""
    ended = process.Job(size, prune, plan, out).join()
    # which one ended first shows in the texts of all
    assert {each.code for each in ended} == {0}, "\n".join(f"{each.code}: {each.error[-3000:]}" for each in ended)
    return out


def differing(one, other):
    """How many bytes of weights differ."""
    pairs = ([x[name].contiguous().view(-1).view(torch.uint8) for x in (one, other)] for name in one)
    return sum(int((a != b).sum()) for a, b in pairs)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_prune_as_one(case, llama, words, tmp_path):
    plan = plan_of(llama, words, **CASES[case])
    one, two = (sc.verify(on(size, plan, tmp_path / str(size))) for size in (1, 2))
    assert differing(weights(tmp_path / "1"), weights(tmp_path / "2")) == 0
    mine, theirs = ([dataclasses.replace(record, seconds=0.0) for record in report.layers] for report in (one, two))
    assert mine == theirs
    for name in (
        "quality",
        "evaluation",
        "calibration",
        "warnings",
        "tuned",
        "reconstruction",
        "distillation",
        "shards",
        "bytes",
    ):
        assert getattr(one, name) == getattr(two, name), name
    assert not (tmp_path / "2" / "work").exists()
    assert two.machine == {**one.machine, "processes": 2}


def test_three_processes_prune_experts_as_one(words, tmp_path):
    plan = plan_of(tiny.save(tmp_path / "dense", "mixtral"), words, effort="balanced")
    one, three = (sc.verify(on(size, plan, tmp_path / str(size))) for size in (1, 3))
    assert differing(weights(tmp_path / "1"), weights(tmp_path / "3")) == 0
    assert (one.quality, one.calibration) == (three.quality, three.calibration)


def _prune_in_groups(plan, out):
    # the first process has no room for Gram matrices of experts, and says so to the others, which have
    walk.memory_bytes = lambda: 0 if is_first() else 1 << 40
    # tuning a mixture has other last bits with two threads
    Ranks.all_threads = lambda self: contextlib.nullcontext()
    _prune(plan, out)


@pytest.mark.parametrize("options", [{"effort": "balanced", "pattern": "2:4", "reconstruct": 4}, CASES["measured"]])
def test_two_processes_look_at_experts_in_the_same_groups(options, words, tmp_path):
    """Of one expert each, to the bytes of one process that looks at all together."""
    plan = plan_of(tiny.save(tmp_path / "dense", "mixtral"), words, **options)
    together = sc.verify(on(1, plan, tmp_path / "together"))
    apart = sc.verify(on(2, plan, tmp_path / "apart", _prune_in_groups))
    assert differing(weights(tmp_path / "together"), weights(tmp_path / "apart")) == 0
    assert apart.warnings == [in_passes(5), *together.warnings]
    kept = [[(r.name, r.kept, r.sparsity, r.tokens, r.note) for r in report.layers] for report in (together, apart)]
    assert kept[0] == kept[1]


def _killed(plan, out, who, block):
    solve = prune_run.prune_block

    def prune_block(step, *given):
        if (step.ranks.rank, step.index) == (who, block):
            os.kill(os.getpid(), signal.SIGKILL)
        return solve(step, *given)

    prune_run.prune_block = prune_block
    _prune(plan, out)


@pytest.fixture(scope="module")
def undisturbed(llama, words, tmp_path_factory):
    plan = plan_of(llama, words, eval_windows=0)
    return plan, weights(on(1, plan, tmp_path_factory.mktemp("undisturbed") / "run"))


@pytest.mark.parametrize(("who", "then"), [(0, 2), (1, 3)])
def test_a_run_whose_process_was_killed_goes_on(who, then, undisturbed, tmp_path):
    """With as many processes or others, to the bytes of an undisturbed run."""
    plan, whole = undisturbed
    done = process.Job(2, _killed, plan, tmp_path / "run", who, 1).join(60)
    assert done[who].code == -signal.SIGKILL
    assert done[1 - who].code == 1
    assert json.loads((tmp_path / "run" / "work" / "state.json").read_text())["next_block"] == 1
    assert differing(whole, weights(on(then, plan, tmp_path / "run"))) == 0


def test_more_processes_than_windows_are_refused(llama, words, tmp_path):
    done = process.Job(3, _said, plan_of(llama, words, samples=2), tmp_path / "run").join(60)
    assert "3 processes cannot share 2 batches of 2 calibration windows; start 2 at most" in done[0].error
    assert {each.code for each in done} == {1}


def _said(plan, out):
    import sys

    from secateurs.base.errors import SecateursError

    try:
        _prune(plan, Path(out))
    except SecateursError as error:
        sys.exit(f"error: {error}")
