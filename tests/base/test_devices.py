"""Live modules on another device than the CPU: no tensors of two devices meet, and what needs the CPU says so."""

import copy

import pytest
import tiny
import torch
from plans import asked
from second_device import second_device
from torch import nn

import secateurs as sc
from secateurs import cli
from secateurs.base import device, errors
from secateurs.base.errors import PlanError
from secateurs.model.blocks import AllLoaded
from secateurs.quality import compare
from secateurs.train.matrices import prunable

IDS = torch.arange(3 * 24).reshape(3, 24) % 200


def language_model(model_type="llama"):
    model = tiny.make(model_type)
    # the card has no fused attention
    model.set_attn_implementation("eager")
    return model


def net():
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 16), nn.ReLU(), nn.Linear(16, 4))


def train(card, model, optimizer, steps=8):
    x, y = card(torch.randn(16, 1, 8, 8)), card(torch.randint(0, 4, (16,)))
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def test_the_second_device_refuses_what_cuda_refuses():
    with second_device() as card:
        here, there = torch.ones(3, 4), card(torch.ones(3, 4))
        for mixed in (
            lambda: there + here,
            lambda: there @ here.T,
            lambda: torch.where(here > 0, there, 0),
            lambda: there.masked_fill(here > 0, 0),
            lambda: here[there[0].long()],
            lambda: torch.randn(3, generator=torch.Generator(), device=there.device),
        ):
            with pytest.raises(RuntimeError, match="card"):
                mixed()
        # single numbers, indices and copies may come from the CPU
        there[here[0].long()] += torch.tensor(1.0)
        there.copy_(here)
        assert there.cpu().device.type == "cpu"
        assert torch.zeros(2, device=there.device).device == torch.zeros_like(there).device == there.device


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral"])
@pytest.mark.parametrize("plan", [
    {"method": "random", "allocation": "erk"}, {"method": "magnitude", "allocation": "alpha"}, {"method": "wanda"},
    {"method": "ria", "allocation": "owl"}, {"method": "sparsegpt", "pattern": "4x4"}, {"method": "alps+swaps", "pattern": "2:4"},
], ids=lambda plan: " ".join(plan.values()))  # fmt: skip
def test_masks_are_those_of_the_cpu(model_type, plan):
    here, there = language_model(model_type), language_model(model_type)
    sc.prune(here, asked(sc.Plan, **plan), calibration=IDS)
    with second_device() as card:
        report = sc.prune(card(there), asked(sc.Plan, **plan), calibration=IDS)
    assert report.machine["device"] == "card:0"
    for (name, a), (_, b) in zip(prunable(here), prunable(there), strict=True):
        assert torch.equal(a != 0, b.inside != 0), name


@pytest.mark.parametrize(
    ("model_type", "effort", "pattern"), [("mixtral", "balanced", "unstructured"), ("llama", "best", "2:4")]
)
def test_every_stage_of_an_effort_stays_on_the_device(model_type, effort, pattern):
    few = {
        "sensitivity": 48,
        "reconstruct": 4,
        "distill": 4,
        "allocation": "measured" if pattern != "2:4" else "uniform",
    }
    model = language_model(model_type)
    with second_device() as card:
        report = sc.prune(card(model), asked(sc.Plan, effort=effort, pattern=pattern, **few), calibration=IDS[:, :16])
    assert report.totals["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert report.distillation["steps"] == 4


@pytest.mark.parametrize(("allocation", "sensitivity"), [("owl", 0), ("global", 16)])
def test_experts_that_no_token_reached(allocation, sensitivity):
    model = language_model("mixtral")
    with second_device() as card:
        # one token reaches two of four
        plan = asked(sc.Plan, method="wanda", allocation=allocation, sensitivity=sensitivity)
        report = sc.prune(card(model), plan, calibration=IDS[:1, :1])
    assert any("no calibration token reached it" in (r.note or "") for r in report.layers)


def test_quality_of_live_models():
    dense, left = language_model(), language_model()
    sc.prune(left, asked(sc.Plan, method="magnitude"))
    want = compare.measure((copy.deepcopy(dense), AllLoaded()), (copy.deepcopy(left), AllLoaded()), IDS)
    with second_device() as card:
        got = compare.measure((card(dense), AllLoaded()), (card(left), AllLoaded()), IDS)
    assert [w.nll for w in got] == pytest.approx([w.nll for w in want], rel=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_zeros_are_held(fused):
    model = net()
    sc.prune(model, asked(sc.Plan, method="magnitude"))
    masks = {n: p.detach() != 0 for n, p in prunable(model)}
    with second_device() as card:
        optimizer = torch.optim.AdamW(card(model).parameters(), fused=fused)
        held = sc.train.hold(model, optimizer)
        train(card, model, optimizer)
        held.load_state_dict(masks)
        train(card, model, optimizer)
    for name, p in prunable(model):
        assert torch.equal(p.inside != 0, masks[name])


@pytest.mark.parametrize("score", sc.train.SCORES)
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_pruning_while_training(score, scope):
    with second_device() as card:
        model = card(net())
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        pruner = sc.train.gradual(model, optimizer, sc.train.cubic(0.75, 1, 7, every=3), scope=scope, score=score)
        train(card, model, optimizer)
        assert pruner.held.sparsity == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize("grow", ["gradient", "random"])
def test_sparse_training(grow):
    with second_device() as card:
        model = card(net())
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        found = sc.train.dynamic(model, optimizer, 0.8, until=12, every=2, grow=grow)
        train(card, model, optimizer)
        found.load_state_dict(found.state_dict())
        assert found.held.sparsity == pytest.approx(0.8, abs=1e-3)


def test_parametrized_layers():
    with second_device() as card:
        x = card(torch.randn(5, 8))
        model = card(nn.Sequential(nn.Linear(8, 4)))
        sc.train.sr_ste(model, "2:4")
        model(x).sum().backward()
        assert model[0].parametrizations.weight.original.grad.device.type == "card"
        sc.train.finish(model)
        assert ((model[0].weight != 0).reshape(-1, 4).sum(1) == 2).all()
        # a mask of a file lies on the CPU
        masked = sc.train.MaskedLinear.of(card(nn.Linear(8, 4)), torch.rand(4, 8) > 0.5)
        masked(x).sum().backward()
        assert next(p.grad.device.type for p in masked.parameters() if p.grad is not None) == "card"
        low = sc.train.lora(model, 2)
        model(x).sum().backward()
        low.merge()
        assert model[0].weight.device.type == "card"


def test_lottery_tickets(tmp_path):
    with second_device() as card:

        class Task:
            steps = 4

            def make(self, seed):
                torch.manual_seed(seed)
                return card(net())

            def train(self, model, hold, start, stop, seed):
                optimizer = torch.optim.SGD(model.parameters(), 0.1)
                hold(optimizer)
                train(card, model, optimizer, stop - start)

            def score(self, model):
                return 0.0

        found = sc.train.iterative(Task(), tmp_path, sc.train.Rounds(2, 0.5, seeds=(0,)))
    assert [r["sparsity"] for r in found["rows"] if r["kind"] == "ticket"] == pytest.approx([0, 0.5, 0.75], abs=1e-3)


@pytest.mark.parametrize("criterion", ["obs", "taylor", "energy", "magnitude"])
@pytest.mark.parametrize("budget", ["params=0.7x", "flops=0.7x"])
def test_fewer_channels(criterion, budget):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip
    batches = [(torch.randn(32, 1, 12, 12),) for _ in range(3)]
    _, want = sc.shrink_module(copy.deepcopy(model), batches, budget, criterion, multiple=4)
    with second_device() as card:
        # inputs go where the module is
        left, got = sc.shrink_module(card(model), batches, budget, criterion, multiple=4)
        assert all(p.device.type == "card" for p in left.parameters())
    assert [g["removed"] for g in got["groups"]] == [g["removed"] for g in want["groups"]]


def test_what_is_for_the_cpu_says_so():
    with second_device() as card, pytest.raises(errors.PackError, match="run on the CPU: model.cpu"):
        sc.accelerate(card(net()))


def test_a_model_that_is_not_loaded_is_refused():
    with torch.device("meta"):
        model = net()
    with pytest.raises(PlanError, match=r"0\.weight is on the meta device"):
        sc.prune(model, asked(sc.Plan, method="magnitude"))


def test_hooks_of_accelerate_survive_the_walk():
    """They are forwards of the instance, as a model spread over several devices has them."""
    model = language_model()
    blocks = list(model.model.layers)
    seen = []

    def hooked(block):
        forward = block.forward

        def run(*args, **kwargs):
            seen.append(block)
            return forward(*args, **kwargs)

        block.forward = run

    for block in blocks:
        hooked(block)
    sc.prune(model, asked(sc.Plan, method="wanda"), calibration=IDS)
    assert set(map(id, seen)) == set(map(id, blocks))
    seen.clear()
    model(IDS)
    assert len(seen) == len(blocks)


def test_random_numbers_of_the_gpu_are_left_alone(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: seeded.append(seed))
    sc.prune(net(), asked(sc.Plan, method="random"))
    assert not seeded


CARD = "NVIDIA H200"


@pytest.fixture
def a_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: CARD)


def test_a_command_says_once_that_it_leaves_the_gpu_alone(a_card, capsys, tmp_path, llama, words):
    out = tmp_path / "run"
    few = ["--samples", "2", "--seqlen", "16", "--eval-windows", "1", "--eval-seqlen", "16"]
    command = ["prune", str(llama), "--out", str(out), "--method", "magnitude", "--eval-text", str(words), *few]
    with pytest.raises(SystemExit) as stopped:
        cli.main(command)
    assert stopped.value.code == 0
    said = " ".join(capsys.readouterr().err.split())
    assert said.count(f"{CARD} is not used: commands work on model folders on the CPU") == 1
    assert sc.Report.read(out / "report.json").machine["device"] == "cpu"
    with pytest.raises(SystemExit):
        cli.main([*command, "--quiet"])
    assert CARD not in capsys.readouterr().err


@pytest.mark.parametrize("command", [
    ["prune", "{none}", "--out", "{out}"], ["shrink", "{none}", "--budget", "params=0.7x", "--out", "{out}"],
    ["recover", "{none}", "--teacher", "none", "--out", "{out}"], ["decide", "{none}", "--gate", "ppl<=+5%", "--out", "{out}"],
    ["eval", "{llama}", "--eval-text", "{none}"],
], ids=lambda command: command[0])  # fmt: skip
def test_every_command_that_computes_says_it(command, a_card, capsys, tmp_path, llama):
    """Before it fails, for want of a model or a text."""
    places = {"none": tmp_path / "none", "out": tmp_path / "out", "llama": llama}
    with pytest.raises(SystemExit):
        cli.main([part.format(**places) for part in command])
    said = " ".join(capsys.readouterr().err.split())
    assert said.count(f"{CARD} is not used") == 1
    assert "error:" in said


def test_without_a_card_nothing_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.cpu_note() is None
    assert device.device_name("cpu") == "cpu"


def test_a_live_module_names_its_card(a_card):
    assert device.machine("cuda:1")["device"] == f"cuda:1 ({CARD})"
