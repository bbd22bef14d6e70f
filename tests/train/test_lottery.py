"""Tickets, rewinding and controls."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from secateurs.base.errors import OutputError, PlanError
from secateurs.train import Rounds, iterative


class Task:
    """Two rings that a small net tells apart; seen keeps what every training began with and where."""

    steps = 30

    def __init__(self, forget=False):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(128, 2, generator=generator)
        self.y = (self.x.norm(dim=1) > 1.1).long()
        self.forget, self.seen = forget, []

    def make(self, seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(2, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 2))

    def train(self, model, hold, start, stop, seed):
        self.seen.append((start, stop, {n: p.detach().clone() for n, p in model.named_parameters()}))
        optimizer = torch.optim.Adam(model.parameters(), 2e-2)
        if not self.forget:
            hold(optimizer)
        for _ in range(start, stop):
            nn.functional.cross_entropy(model(self.x), self.y).backward()
            optimizer.step()
            optimizer.zero_grad()

    def score(self, model):
        with torch.no_grad():
            return float((model(self.x).argmax(1) == self.y).float().mean())


PLAN = Rounds(rounds=2, fraction=0.5, seeds=(1, 2))


def test_rounds_controls_and_files(tmp_path):
    task = Task()
    found = iterative(task, tmp_path / "run", PLAN)
    rows = {(r["seed"], r["round"], r["kind"]): r for r in found["rows"]}
    assert len(rows) == 2 * (1 + 2 * 3)
    weights = 2 * 24 + 24 * 24 + 24 * 2
    for (_, number, _), row in rows.items():
        assert row["sparsity"] == pytest.approx(1 - 0.5**number, abs=1 / weights)
    masks = [load_file(tmp_path / "run" / f"mask-1-{n}.safetensors") for n in (1, 2)]
    # inside each other, and the largest trained weights of the round before
    assert all(bool((masks[1][n] <= masks[0][n]).all()) for n in masks[0])
    dense = load_file(tmp_path / "run" / "trained-1-0.safetensors")
    kept = torch.cat([dense[n].abs()[masks[0][n]] for n in masks[0]])
    gone = torch.cat([dense[n].abs()[~masks[0][n]] for n in masks[0]])
    assert float(kept.min()) >= float(gone.max())
    # every ticket began with the initial weights under its mask
    initial = load_file(tmp_path / "run" / "initial-1.safetensors")
    began = [weights for start, stop, weights in task.seen if (start, stop) == (0, 30)]
    assert all(torch.equal(began[1][n], initial[n] * masks[0][n]) for n in masks[0])
    # the random control: as many of each layer, elsewhere; the other control: the mask, other weights
    assert all(int((began[2][n] != 0).sum()) == int(masks[0][n].sum()) for n in masks[0])
    assert any(not torch.equal(began[2][n] != 0, masks[0][n]) for n in masks[0])
    assert all(torch.equal(began[3][n] != 0, masks[0][n]) for n in masks[0])
    assert not torch.equal(began[3]["2.weight"], began[1]["2.weight"])
    assert "svg" in (tmp_path / "run" / "ticket.svg").read_text()[:200]
    ticket = next(r for r in found["summary"] if (r["round"], r["kind"]) == (2, "ticket"))
    scores = [rows[s, 2, "ticket"]["score"] for s in (1, 2)]
    assert (ticket["mean"], ticket["low"], ticket["high"]) == (sum(scores) / 2, min(scores), max(scores))


@pytest.mark.parametrize("rewind", [10, "rate"])
def test_what_weights_go_back_to(rewind, tmp_path):
    task = Task()
    iterative(task, tmp_path / "run", Rounds(1, 0.5, rewind, seeds=(1,), controls=()))
    mask = load_file(tmp_path / "run" / "mask-1-1.safetensors")
    start, stop, began = task.seen[-1]
    if rewind == 10:
        assert (start, stop) == (10, 30)
        source = load_file(tmp_path / "run" / "rewind-1.safetensors")
        # that is the state after ten steps of the initial weights
        assert task.seen[0][:2] == (0, 10)
        assert not torch.equal(source["2.weight"], task.seen[0][2]["2.weight"])
    else:
        assert (start, stop) == (0, 30)
        source = load_file(tmp_path / "run" / "trained-1-0.safetensors")
    assert all(torch.equal(began[n], source[n] * mask[n]) for n in mask)


def test_a_killed_run_goes_on_to_the_same_rows(tmp_path):
    whole = iterative(Task(), tmp_path / "whole", PLAN)
    for die in (1, 2, 5, 9):
        task = Task()
        real, count = task.score, iter(range(100))

        def score(model, real=real, count=count, die=die):
            if next(count) == die:
                raise KeyboardInterrupt
            return real(model)

        task.score = score
        folder = tmp_path / f"killed-{die}"
        with pytest.raises(KeyboardInterrupt):
            iterative(task, folder, PLAN)
        done = len(json.loads((folder / "results.json").read_text())["rows"])
        assert done == die
        again = Task()
        assert iterative(again, folder, PLAN)["rows"] == whole["rows"]
        assert len(again.seen) == len(whole["rows"]) - done


def test_a_loop_that_forgets_to_hold_is_told(tmp_path):
    with pytest.raises(PlanError, match=r"train\(\) did not call hold"):
        iterative(Task(forget=True), tmp_path / "run", PLAN)


@pytest.mark.parametrize(("make", "words"), [
    (lambda: Rounds(rounds=0), "0 rounds"),
    (lambda: Rounds(fraction=1.0), "a fraction"),
    (lambda: Rounds(rewind="init"), "a step, or rate"),
    (lambda: Rounds(controls=("luck",)), "write some of"),
    (lambda: iterative(Task(), "nowhere", Rounds(rewind=30)), "rewind to step 30 of a training of 30 steps"),
])  # fmt: skip
def test_bad_requests_are_refused_before_a_step(make, words):
    with pytest.raises(PlanError, match=words):
        make()


def test_another_plan_is_refused(tmp_path):
    small = Rounds(1, 0.5, seeds=(1,), controls=())
    iterative(Task(), tmp_path / "run", small)
    with pytest.raises(OutputError, match="a run of another plan"):
        iterative(Task(), tmp_path / "run", PLAN)


class Alike(Task):
    """Every seed has the same net, and so the same tickets."""

    def make(self, seed):
        return super().make(0)


def test_random_controls_differ_by_seed_and_round(tmp_path):
    task = Alike()
    iterative(task, tmp_path / "run", Rounds(2, 0.5, seeds=(1, 2), controls=("random",)))
    # of each seed: the dense net, a ticket and its control, the next ticket and its control
    masks = [{n: w != 0 for n, w in weights.items() if w.dim() > 1} for _, _, weights in task.seen]

    def same(a, b):
        return all(torch.equal(masks[a][n], masks[b][n]) for n in masks[a])

    assert same(1, 6)
    assert same(3, 8)
    assert not same(2, 7)
    assert not same(4, 9)
    # one permutation of tickets inside each other would give controls inside each other
    assert not all(bool((masks[4][n] <= masks[2][n]).all()) for n in masks[2])


def test_other_weights_begin_at_the_beginning(tmp_path):
    """They were never trained to the step that tickets go back to; the random mask has the tickets' own weights."""
    task = Task()
    iterative(task, tmp_path / "run", Rounds(1, 0.5, rewind=10, seeds=(1,)))
    assert [(start, stop) for start, stop, _ in task.seen] == [(0, 10), (10, 30), (10, 30), (10, 30), (0, 30)]
    rewound = load_file(tmp_path / "run" / "rewind-1.safetensors")
    random, other = (weights["2.weight"] for _, _, weights in task.seen[3:])
    assert torch.equal(random, rewound["2.weight"] * (random != 0))
    assert not torch.equal(other, rewound["2.weight"] * (other != 0))


def test_tickets_are_found_in_inference_mode_too(tmp_path):
    few = Rounds(rounds=1, seeds=(1,), controls=())
    task = Task()
    want = iterative(task, tmp_path / "run", few)
    with torch.inference_mode():
        assert iterative(task, tmp_path / "other", few) == want
