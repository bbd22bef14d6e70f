"""Several processes shrink as one does; where one ends all do, and the same command goes on."""

import contextlib
import os
import signal
import sys
from pathlib import Path

import mixtures
import process
import pytest
import tiny
from test_shrink import plan, same_bytes

from secateurs.base.errors import SecateursError
from secateurs.base.processes import Ranks
from secateurs.base.run_directory import report_of
from secateurs.model import batches
from secateurs.shrink import cutting, losses
from secateurs.shrink.run import shrink

CASES = {
    # neurons are one process's, heads and then queries another's; blocks are bridged and tuned
    "llama": {"units": ("mlp", "heads", "queries", "layers"), "budget": "params=0.6x"},
    "gpt2": {"units": ("mlp", "layers"), "depth": "influence", "criterion": "taylor"},
    "mistral": {"units": ("hidden", "mlp"), "eval_windows": 0},
    "bert": {"units": ("mlp", "layers")},
}


def _shrink(chosen, out):
    # so that a few windows are batches enough for all
    batches.TOKENS_PER_BATCH = 64
    # with more threads the refit of a mixture and the tuning of a block have other last bits
    Ranks.all_threads = lambda self: contextlib.nullcontext()
    shrink(chosen, out)


def on(size, chosen, out, call=_shrink):
    """The report of so many processes."""
    ended = process.Job(size, call, chosen, out).join()
    assert {each.code for each in ended} == {0}, "\n".join(f"{each.code}: {each.error[-3000:]}" for each in ended)
    return report_of(out)


def same(one, other):
    """True if two runs have the same weights and found the same, but for what a clock says."""
    named = (
        "left",
        "blocks",
        "estimated_loss",
        "truth",
        "tried",
        "calibration",
        "bytes",
        "warnings",
        "quality",
        "distance",
    )
    reports = [report_of(run) for run in (one, other)]
    assert {name: reports[0][name] for name in named} == {name: reports[1][name] for name in named}
    return same_bytes(one / "model", other / "model")


@pytest.mark.parametrize("model_type", CASES)
def test_two_processes_shrink_as_one(model_type, tmp_path, words):
    chosen = plan(tiny.save(tmp_path / "dense", model_type), words, **CASES[model_type])
    one, two = (on(size, chosen, tmp_path / str(size)) for size in (1, 2))
    assert same(tmp_path / "1", tmp_path / "2")
    assert two["machine"] == {**one["machine"], "processes": 2}
    assert not (tmp_path / "2" / "work").exists()


def _mixture(folder, model_type):
    model = mixtures.make(model_type)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("model_type", "criterion"), [("qwen2_moe", "loss"), ("mixtral", "ream"), ("deepseek_v3", "reap")]
)
def test_three_processes_remove_experts_as_one(model_type, criterion, tmp_path, words):
    chosen = plan(_mixture(tmp_path / "dense", model_type), words, "params=0.9x", units=("experts",), experts=criterion)
    for size in (1, 3):
        on(size, chosen, tmp_path / str(size))
    assert same(tmp_path / "1", tmp_path / "3")


def _killed(chosen, out, who, at):
    def dies(ranks):
        if ranks.rank == who:
            os.kill(os.getpid(), signal.SIGKILL)

    if at == "estimates":
        curve = losses.stream

        def stream(*given, **named):
            for step in curve(*given, **named):
                if step.index == 1:
                    dies(step.ranks)
                yield step

        losses.stream = stream
    else:
        cut = cutting._Blocks._cut_units

        def cut_units(self, step):
            if step.index == 1:
                dies(step.ranks)
            return cut(self, step)

        cutting._Blocks._cut_units = cut_units
    _shrink(chosen, out)


@pytest.fixture(scope="module")
def undisturbed(llama, words, tmp_path_factory):
    chosen = plan(llama, words, "params=0.8x", units=("mlp", "heads"), eval_windows=0)
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    on(1, chosen, run)
    return chosen, run


def killed(size, who, at, chosen, out):
    """A run of so many processes of which one is killed."""
    done = process.Job(size, _killed, chosen, out, who, at).join(60)
    assert [each.code for each in done] == [-signal.SIGKILL if rank == who else 1 for rank in range(size)]
    assert "another process of this run ended before the run did" in done[who - 1].error
    assert (out / "work" / "losses.json").is_file() == (at == "cutting")


@pytest.mark.parametrize(("who", "at", "then"), [(0, "estimates", 3), (1, "cutting", 1)])
def test_a_run_whose_process_was_killed_goes_on(who, at, then, undisturbed, tmp_path):
    """With as many processes or others, to the bytes of an undisturbed run."""
    chosen, run = undisturbed
    killed(2, who, at, chosen, tmp_path / "run")
    on(then, chosen, tmp_path / "run")
    assert same(run, tmp_path / "run")


def test_batches_stay_those_that_a_run_began_with(llama, words, tmp_path):
    """Two processes go on with the batches of three, which one or two would not have made so small."""
    chosen = plan(llama, words, "params=0.8x", units=("mlp",), samples=4, eval_windows=0)
    on(3, chosen, tmp_path / "undisturbed")
    killed(3, 2, "cutting", chosen, tmp_path / "run")
    on(2, chosen, tmp_path / "run")
    assert same(tmp_path / "undisturbed", tmp_path / "run")


def _said(chosen, out):
    try:
        _shrink(chosen, Path(out))
    except SecateursError as error:
        sys.exit(f"error: {error}")


def test_more_processes_than_windows_are_refused(llama, words, tmp_path):
    done = process.Job(3, _said, plan(llama, words, samples=2), tmp_path / "run").join(60)
    assert "3 processes cannot share 2 batches of 2 calibration windows; start 2 at most" in done[0].error
    assert {each.code for each in done} == {1}
    assert not (tmp_path / "run").exists()


def test_only_the_first_process_prints(llama, words, tmp_path):
    from secateurs import cli

    command = ["shrink", str(llama), "--budget", "params=0.9x", "--units", "layers", "--calibration", str(words)]
    command += ["--samples", "4", "--seqlen", "32", "--eval-windows", "0", "--prompt", "16", "--new", "4"]
    for more in (["--json"], []):
        done = process.Job(2, cli.main, [*command, *more, "--out", str(tmp_path / f"run{len(more)}")]).join()
        assert [each.code for each in done] == [0, 0], done[0].error
        assert done[0].out
        assert (done[1].out, done[1].error) == ("", "")
