import json
import shutil

import pytest
from crowd import CROWD
from decisions import module, plan, stated_bench
from typer.testing import CliRunner

from secateurs.decide.decide import decide


@pytest.fixture(scope="session")
def made(tmp_path_factory, llama, words):
    """A decision between packed and smaller models, with a fleet; tests must not write into it."""
    from secateurs.cli import app

    folder = tmp_path_factory.mktemp("page")
    candidates = ("0.5", "0.9", "shrink:params=0.9x")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "bench", stated_bench([]))
        decide(plan(llama, words, folder, candidates=candidates, gate=("agree>=0",)), folder / "run")
    shutil.copy(folder / "run" / "candidates" / "0.5" / "timing.json", folder / "bench.json")
    traffic = ["--rate", "2", "--prompt", "10", "--output", "10", "--tpot", "1", "--requests", "2000", "--quiet"]
    done = CliRunner().invoke(app, ["fleet", str(folder / "bench.json"), "--price", "2 USD", *traffic])
    assert done.exit_code == 0, done.output
    shutil.copy(folder / "fleet.json", folder / "run")
    return folder / "run"


@pytest.fixture
def run(made, tmp_path):
    """A copy; the models it names stay where they are."""
    return shutil.copytree(made, tmp_path / "run")


@pytest.fixture(scope="module")
def crowded(made, tmp_path_factory):
    """A decision like that of a real model: candidates close together, a floor on perplexity, one that was never pruned."""
    run = shutil.copytree(made, tmp_path_factory.mktemp("crowded") / "run")
    file = run / "decide.json"
    decision = json.loads(file.read_text())
    first = decision["rows"][0]
    assert first["status"] == "measured"
    rows = []
    for name, verdict, ppl, (low, high), seconds, (fast, slow), nbytes in CROWD:
        missed = (
            None
            if verdict == "passed"
            else f"gate ppl<=+60% {verdict}: ppl over the dense model's is {ppl}, the limit is 1.6"
        )
        gate = {
            "gate": "ppl<=+60%",
            "metric": "ppl",
            "limit": 1.6,
            "verdict": verdict,
            "passed": not missed,
            "more": None,
            "missed": missed,
        }
        rows.append({
            **first, "candidate": name, "passed": not missed, "reason": missed, "gate": [gate],
            "quality": {**first["quality"], "ppl_ratio": {"value": ppl, "low": low, "high": high, "n": 12}},
            "seconds_ratio": {"value": seconds, "low": fast, "high": slow}, "bytes_ratio": nbytes,
            "bytes": {"dense": 269060552, "pruned": 269060560, "packed": int(269060552 * nbytes)},
        })  # fmt: skip
    rows.append({
        **first, "candidate": "0.95", "status": "dropped", "reason": "would not pay: nothing is faster here", "quality": None, "gate": [],
        "passed": None, "measured": False, "folder": None,
    })  # fmt: skip
    decision |= {"rows": rows, "recommended": "0.5"}
    decision["plan"] |= {"gate": ["ppl<=+60%"]}
    file.write_text(json.dumps(decision))
    return run
