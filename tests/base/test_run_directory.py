"""Run directories that are moved, old, foreign, shared or strangely named work, or are refused in a sentence."""

import json
import shutil
import time

import pytest
import tiny
import torch
from plans import asked
from safetensors.torch import load_file

import secateurs as sc
from secateurs.base.errors import OutputError, PlanError
from secateurs.base.run_directory import claim, is_run, locked, model_in, models_of, read_object, report_of, resolved
from secateurs.prune.plan import Plan
from secateurs.train import RecoverPlan, recover

FAST = asked(Plan, method="magnitude", sparsity=0.5, eval_windows=0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, and the folder of its dense model; to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    model = tiny.save(folder / "dense")
    sc.prune(model, FAST, out=folder / "run")
    return folder / "run", model


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "run")


def test_a_run_that_was_moved_is_a_run(run, finished, tmp_path):
    moved = run.rename(tmp_path / "elsewhere")
    assert model_in(moved) == moved / "model"
    assert sc.verify(moved).status == "complete"
    assert sc.prune(finished[1], FAST, out=moved).status == "complete"


def test_a_run_whose_dense_model_was_moved_says_which(tmp_path):
    model = tiny.save(tmp_path / "dense")
    sc.prune(model, FAST, out=tmp_path / "run")
    moved = model.rename(tmp_path / "other")
    with pytest.raises(OutputError, match=rf"another plan \(model is {model} there, {moved} here\)"):
        sc.prune(moved, FAST, out=tmp_path / "run")
    assert f"no folder {model} here" in sc.verify(tmp_path / "run").warnings[-1]


def test_a_run_of_another_version_is_refused(run, finished, tmp_path, words):
    plan = json.loads((run / "plan.json").read_text())
    for other, match in (
        ({**plan, "brand_new": 1}, r"by another command or version of secateurs \('brand_new' is stated only there\)"),
        ({k: v for k, v in plan.items() if k != "damping"}, r"\('damping' is stated only here\)"),
    ):
        (run / "plan.json").write_text(json.dumps(other))
        with pytest.raises(OutputError, match=match):
            sc.prune(finished[1], FAST, out=run)
    (run / "plan.json").write_text(json.dumps(plan))
    report = json.loads((run / "report.json").read_text())
    (run / "report.json").write_text(json.dumps({**report, "format": 99}))
    with pytest.raises(OutputError, match="report format"):
        sc.prune(finished[1], FAST, out=run)
    # shrink and recover read theirs so
    with pytest.raises(
        OutputError, match=r"report\.json is of format 99, this secateurs writes 1; use the version that wrote it"
    ):
        report_of(run)
    assert report_of(tmp_path) is None
    trained = asked(
        RecoverPlan, str(finished[0]), calibration=str(words), samples=4, seqlen=32, steps=1, batch=1, eval_windows=0
    )
    recover(trained, tmp_path / "recovered")
    report = json.loads((tmp_path / "recovered" / "report.json").read_text())
    (tmp_path / "recovered" / "report.json").write_text(json.dumps({**report, "format": 0}))
    with pytest.raises(OutputError, match="is of format 0"):
        recover(trained, tmp_path / "recovered")


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_a_plan_that_is_none_is_refused(text, run, finished, words, tmp_path):
    (run / "plan.json").write_text(text)
    with pytest.raises(OutputError, match=r"plan\.json"):
        sc.prune(finished[1], FAST, out=run)
    with pytest.raises(OutputError, match=r"plan\.json"):
        models_of(run)
    with pytest.raises(OutputError, match=r"plan\.json"):
        recover(asked(RecoverPlan, str(run), calibration=str(words)), tmp_path / "recovered")
    with pytest.raises(OutputError, match=r"plan\.json"):
        read_object(run / "plan.json")


def test_a_decision_of_another_version_is_refused(run):
    for found in ({}, {"rows": [{}], "recommended": "a"}, {"rows": 3, "recommended": "a"}):
        (run / "decide.json").write_text(json.dumps(found))
        with pytest.raises(OutputError, match=r"decide\.json is not a decision of this secateurs"):
            model_in(run)


def test_recover_wants_a_teacher_where_a_plan_names_none(run, words, tmp_path):
    (run / "plan.json").write_text("{}")
    with pytest.raises(PlanError, match="names its dense model: give --teacher"):
        recover(asked(RecoverPlan, str(run), calibration=str(words)), tmp_path / "recovered")


def test_nothing_is_written_where_the_model_is(tmp_path):
    model = tiny.save(tmp_path / "dense")
    before = {file.name: (file.stat().st_mtime_ns, file.stat().st_size) for file in model.rglob("*")}
    for file in model.iterdir():
        file.chmod(0o444)
    model.chmod(0o555)
    sc.prune(model, FAST, out=tmp_path / "run")
    sc.verify(tmp_path / "run")
    assert {file.name: (file.stat().st_mtime_ns, file.stat().st_size) for file in model.rglob("*")} == before
    # what is made of it may be changed and deleted
    assert all(file.stat().st_mode & 0o200 for file in (tmp_path / "run").rglob("*"))
    model.chmod(0o755)


def test_a_model_in_the_hub_s_cache_of_links_is_pruned(finished, tmp_path):
    snapshot = tmp_path / "models--owner--tiny" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    blobs = shutil.copytree(finished[1], tmp_path / "models--owner--tiny" / "blobs")
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    sc.prune(snapshot, FAST, out=tmp_path / "run")
    assert not any(file.is_symlink() for file in (tmp_path / "run").rglob("*"))
    for file in (finished[0] / "model").glob("*.safetensors"):
        want, got = load_file(file), load_file(tmp_path / "run" / "model" / file.name)
        assert all(torch.equal(tensor, got[name]) for name, tensor in want.items())


def test_names_with_spaces_umlauts_and_quotes_are_names(tmp_path, words):
    where = tmp_path / "Über 'uns' [2:4] 模型"
    model = tiny.save(where / "dense model")
    text = shutil.copy(words, where / "text ä.txt")
    plan = asked(
        Plan,
        method="wanda",
        calibration=str(text),
        samples=2,
        seqlen=32,
        eval_text=str(text),
        eval_windows=1,
        eval_seqlen=32,
    )
    report = sc.prune(model, plan, out=where / "a run")
    assert report.status == "complete"
    assert sc.verify(where / "a run").warnings == report.warnings
    link = tmp_path / "link"
    link.symlink_to(where, target_is_directory=True)
    assert resolved(str(link / "dense model")) == str(model)
    assert sc.prune(link / "dense model", plan, out=link / "a run").as_dict() == report.as_dict()


def test_of_two_plans_that_claim_a_folder_at_once_one_has_it(tmp_path, monkeypatch):
    """Both look before either writes, as far as the lock lets them."""
    from concurrent.futures import ThreadPoolExecutor

    from secateurs.base import run_directory

    real = run_directory.write_json

    def slow(file, data):
        time.sleep(0.1)
        real(file, data)

    monkeypatch.setattr(run_directory, "write_json", slow)

    def begin(plan):
        try:
            claim(tmp_path / "run", plan)
        except OutputError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(begin, [{"model": "a"}, {"model": "b"}]))
    assert found.count(None) == 1
    won = "ab"[found.index(None)]
    assert json.loads((tmp_path / "run" / "plan.json").read_text()) == {"model": won}
    assert "another plan (model is" in next(text for text in found if text)


def test_two_processes_are_not_at_work_in_one_folder(tmp_path):
    import process

    claim(tmp_path / "run", {"model": "a"})
    code = (
        "import sys; from pathlib import Path; from secateurs.base.run_directory import locked\n"
        "try:\n    with locked(Path(sys.argv[1])): pass\nexcept Exception as error: print(error)"
    )
    with locked(tmp_path / "run"):
        assert "another secateurs is at work in" in process.execute(code, tmp_path / "run").out
    assert process.execute(code, tmp_path / "run").out == ""
    assert is_run(tmp_path / "run")


def test_what_a_killed_run_left_half_written_goes_when_it_goes_on(run, finished, tmp_path):
    halves = [run / "plan.json.01.part", run / "model" / "m.safetensors.02.part", run / "work" / "deep" / "x.03.part"]
    for half in halves:
        half.parent.mkdir(parents=True, exist_ok=True)
        half.write_text("half")
    sc.prune(finished[1], FAST, out=run)
    assert not list(run.rglob("*.part"))
    # a folder with the half of somebody else's file is not ours
    (tmp_path / "film").mkdir()
    (tmp_path / "film" / "film.mp4.part").write_text("half")
    with pytest.raises(OutputError, match="is not empty and holds no"):
        sc.prune(finished[1], FAST, out=tmp_path / "film")


def test_a_clock_that_goes_back_changes_nothing(tmp_path, finished, monkeypatch):
    now = iter(range(2_000_000_000, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    report = sc.prune(finished[1], FAST, out=tmp_path / "run")
    assert all(seconds >= 0 for seconds in report.seconds.values())
    assert report.shards == sc.verify(finished[0]).shards
