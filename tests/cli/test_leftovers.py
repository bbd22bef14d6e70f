"""What a kill leaves behind goes when the same command runs again: nothing of work/ outlives a run."""

import shutil

import pytest
import tiny
from decisions import module, plan, stated_bench
from plans import asked

import secateurs as sc
from secateurs.decide.decide import decide
from secateurs.shrink.plan import ShrinkPlan
from secateurs.shrink.run import shrink
from secateurs.train import RecoverPlan, recover

TEXT = {"samples": 4, "seqlen": 32, "eval_windows": 0}


class KilledError(BaseException):
    pass


@pytest.fixture
def killed(monkeypatch):
    """Make the next removal of a folder of this name the end of the process, before it or after it."""

    def arm(name, before=True):
        real = shutil.rmtree

        def rmtree(path, *arguments, **options):
            at = str(path).endswith(f"/{name}")
            if not (at and before):
                real(path, *arguments, **options)
            if at:
                monkeypatch.setattr(shutil, "rmtree", real)
                raise KilledError

        monkeypatch.setattr(shutil, "rmtree", rmtree)

    return arm


@pytest.fixture(scope="module")
def pruned(llama, words, tmp_path_factory):
    out = tmp_path_factory.mktemp("pruned") / "run"
    sc.prune(llama, asked(sc.Plan, method="magnitude", sparsity=0.6, **TEXT), out=out)
    return out


@pytest.mark.parametrize("command", ["prune", "shrink", "recover"])
def test_a_kill_between_the_report_and_the_removal_of_work(command, llama, pruned, words, tmp_path, killed):
    text = {"calibration": str(words), **TEXT}

    def run():
        if command == "prune":
            return sc.prune(llama, asked(sc.Plan, method="wanda", **text), out=tmp_path / "run").as_dict()
        if command == "recover":
            return recover(asked(RecoverPlan, str(pruned), steps=4, batch=2, **text), tmp_path / "run")
        chosen = asked(ShrinkPlan, str(llama), "params=0.8x", units=("mlp",), multiple=4, prompt=16, new=4, **text)
        return shrink(chosen, tmp_path / "run")

    killed("run/work")
    with pytest.raises(KilledError):
        run()
    assert len(list((tmp_path / "run" / "work").rglob("*"))) > 3
    first = (tmp_path / "run" / "report.json").read_bytes()
    for _ in "again", "and again":
        run()
        assert not (tmp_path / "run" / "work").exists()
    assert (tmp_path / "run" / "report.json").read_bytes() == first


def test_candidates_of_a_decision_leave_nothing_either(llama, words, tmp_path, killed, monkeypatch):
    monkeypatch.setattr(module, "bench", stated_bench([]))
    chosen = plan(llama, words, tmp_path, candidates=("0.5", "shrink:params=0.9x+int8"))
    for name in "candidates/0.5/work", "work/shrink-params=0.9x-int8":
        killed(name)
        with pytest.raises(KilledError):
            decide(chosen, tmp_path / "run")
    decide(chosen, tmp_path / "run")
    assert len(list((tmp_path / "run" / "candidates").iterdir())) == 3
    assert not list((tmp_path / "run" / "candidates").glob("*/work"))
    assert not list((tmp_path / "run" / "work").glob("*.*x-int8"))


@pytest.mark.parametrize("stage", ["gradients", "inputs"])
def test_activations_of_a_stage_that_is_done_go_before_the_next(stage, llama, words, tmp_path, killed):
    how = {"budget": "bytes=0.6", "sensitivity": 128, "calibration": str(words), **TEXT}
    killed(f"work/{stage}")
    with pytest.raises(KilledError):
        sc.prune(llama, asked(sc.Plan, **how), out=tmp_path / "run")
    assert (tmp_path / "run" / "work" / stage).is_dir()
    seen = {}

    def look(label, done, total):
        seen.setdefault(label, (tmp_path / "run" / "work" / stage).exists())

    sc.prune(llama, asked(sc.Plan, **how), out=tmp_path / "run", progress=look)
    assert seen["pruning"] is False
    assert "measuring sensitivity" not in seen
    assert not (tmp_path / "run" / "work").exists()


@pytest.mark.parametrize("stage", ["curves", "mlp-16"])
def test_estimates_of_shrink_keep_no_model_that_was_only_looked_at(stage, llama, words, tmp_path, killed):
    how = {"units": ("mlp", "heads"), "multiple": 4, "prompt": 16, "new": 4, "calibration": str(words), **TEXT}
    chosen = asked(ShrinkPlan, str(llama), "params=0.8x", **how)
    killed(f"work/{stage}")
    with pytest.raises(KilledError):
        shrink(chosen, tmp_path / "run")
    assert (tmp_path / "run" / "work" / stage).is_dir()
    there = []
    shrink(chosen, tmp_path / "run", lambda label, *_: there.append((tmp_path / "run" / "work" / stage).exists()))
    assert not any(there)


def test_a_narrowed_model_goes_on_when_it_was_killed_after_it_was_cut(words, tmp_path, monkeypatch):
    from secateurs.shrink import run as stages

    source = tiny.save(tmp_path / "dense", "llama")
    how = {"units": ("hidden",), "multiple": 4, "prompt": 16, "new": 4, "calibration": str(words), **TEXT}
    chosen = asked(ShrinkPlan, str(source), "params=0.9x", **how)
    whole = shrink(chosen, tmp_path / "whole")

    def killed(*_):
        raise KilledError

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(stages, "_latency", killed)
        shrink(chosen, tmp_path / "killed")
    again = shrink(chosen, tmp_path / "killed")
    assert again["left"] == whole["left"]
    assert again["left"]["hidden"] < again["dense"]["hidden"]
    for file in (tmp_path / "whole" / "model").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "killed" / "model" / file.name).read_bytes()
