"""Zeros that stay through training, and schedules that make more of them."""

import copy
import io

import pytest
import tiny
import torch
from torch import nn

import secateurs as sc
from secateurs.base.errors import PlanError
from secateurs.matrix import patterns
from secateurs.train.matrices import prunable

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1),
    "adamw fused": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, fused=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1, initial_accumulator_value=0.1),
    "muon-like": lambda p: torch.optim.NAdam(p, 0.01),
}


def net():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 16), nn.ReLU(), nn.Linear(16, 3)
    )


def data():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(64, 1, 8, 8, generator=generator), torch.randint(0, 3, (64,), generator=generator)


def prune(model, sparsity=0.6):
    masks = {}
    for name, p in model.named_parameters():
        if p.dim() > 1:
            masks[name] = torch.rand(p.shape) > sparsity
            p.data.mul_(masks[name])
    return masks


def step(model, optimizer, part=slice(None), scaler=None):
    x, y = data()
    loss = nn.functional.cross_entropy(model(x[part]), y[part])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def zeros(model):
    return {n: p.detach() == 0 for n, p in model.named_parameters() if p.dim() > 1}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_are_exact_through_any_optimizer(name):
    """And removed weights leave nothing behind in its state; the others move."""
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    # momentum from before the mask
    step(model, optimizer)
    masks = prune(model)
    held = sc.train.hold(model, optimizer)
    assert held.masks.keys() == masks.keys()
    before = copy.deepcopy(model.state_dict())
    for _ in range(5):
        step(model, optimizer)
    for key, p in model.named_parameters():
        if key in masks:
            assert torch.equal(p.detach() != 0, masks[key])
            assert not torch.equal(p.detach(), before[key])
            for value in optimizer.state[p].values():
                if isinstance(value, torch.Tensor) and value.shape == p.shape and name != "adagrad":
                    assert bool((value[~masks[key]] == 0).all())
    held.release()
    step(model, optimizer)


def test_without_it_zeros_are_lost():
    model = net()
    masks = prune(model)
    optimizer = OPTIMIZERS["adam"](model.parameters())
    step(model, optimizer)
    assert not all(torch.equal(~z, masks[n]) for n, z in zeros(model).items())


def test_accumulation_scaler_and_compile():
    model = net()
    masks = prune(model)
    optimizer = OPTIMIZERS["adamw fused"](model.parameters())
    sc.train.hold(model, optimizer)
    scaler = torch.amp.GradScaler("cpu")
    compiled = torch.compile(model, backend="aot_eager")
    x, y = data()
    for _ in range(3):
        for part in (slice(0, 32), slice(32, 64)):
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(compiled(x[part]), y[part])
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert all(torch.equal(~z, masks[n]) for n, z in zeros(model).items())


def test_a_checkpoint_mid_way_goes_on_bit_for_bit():
    def run(stop):
        torch.manual_seed(0)
        model = net()
        optimizer = OPTIMIZERS["adamw fused"](model.parameters())
        pruner = sc.train.gradual(model, optimizer, sc.train.cubic(0.8, 2, 14, every=3), score="taylor")
        for i in range(20):
            if i == stop:
                file = io.BytesIO()
                torch.save([model.state_dict(), optimizer.state_dict(), pruner.state_dict()], file)
                file.seek(0)
                states = torch.load(file, weights_only=True)
                model = net()
                optimizer = OPTIMIZERS["adamw fused"](model.parameters())
                pruner = sc.train.gradual(model, optimizer, sc.train.cubic(0.8, 2, 14, every=3), score="taylor")
                for thing, state in zip((model, optimizer, pruner), states, strict=True):
                    thing.load_state_dict(state)
            step(model, optimizer)
        return model.state_dict()

    whole = run(None)
    for stop in (1, 7, 17):
        assert all(torch.equal(a, b) for a, b in zip(whole.values(), run(stop).values(), strict=True))


def test_masks_of_torch_are_taken_over():
    from torch.ao.pruning.sparsifier.utils import FakeSparsity
    from torch.nn.utils import parametrize
    from torch.nn.utils import prune as torch_prune

    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    torch_prune.l1_unstructured(model[0], "weight", 0.5)
    mask = torch.rand(4, 8) > 0.4
    parametrize.register_parametrization(model[2], "weight", FakeSparsity(mask))
    want = model[0].weight.detach() != 0
    x = torch.randn(5, 8)
    expected = model(x).detach()
    taken = sc.train.take_over(model)
    assert set(dict(model.named_parameters())) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    torch.testing.assert_close(model(x).detach(), expected)
    assert torch.equal(taken["0.weight"], want)
    assert torch.equal(taken["2.weight"], mask)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sc.train.hold(model, optimizer, taken)
    model(x).sum().backward()
    optimizer.step()
    assert torch.equal(model[2].weight.detach() != 0, mask)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
def test_language_models_keep_their_zeros(model_type):
    model = tiny.make(model_type)
    for _, p in prunable(model):
        p.data.mul_(torch.rand(p.shape) > 0.5)
    before = {n: p.detach() == 0 for n, p in prunable(model)}
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    sc.train.hold(model, optimizer)
    ids = torch.arange(40)[None]
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert all(torch.equal(p.detach() == 0, before[n]) for n, p in prunable(model))


def test_transformers_trainer_keeps_them(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = tiny.make("llama")
    for _, p in prunable(model):
        p.data.mul_(torch.rand(p.shape) > 0.5)
    before = {n: p.detach().clone() for n, p in prunable(model)}
    rows = [{"input_ids": torch.arange(i, i + 20), "labels": torch.arange(i, i + 20)} for i in range(16)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True, report_to=[], save_strategy="no",
        gradient_accumulation_steps=2, weight_decay=0.1,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows, callbacks=[sc.train.trainer_callback()]).train()
    for name, p in prunable(model):
        assert torch.equal(p.detach() == 0, before[name] == 0)
        assert not torch.equal(p.detach(), before[name])


def test_lightning_keeps_them(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net()

        def training_step(self, batch, index):
            x, y = batch
            return nn.functional.cross_entropy(self.net(x), y)

        def configure_optimizers(self):
            return OPTIMIZERS["adamw fused"](self.parameters())

    module = Module()
    masks = prune(module.net)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), batch_size=16)
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, default_root_dir=tmp_path,
        callbacks=[sc.train.lightning_callback()], enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader)
    assert all(torch.equal(~z, masks[n]) for n, z in zeros(module.net).items())


def test_schedules_by_hand():
    cubic = sc.train.cubic(0.9, begin=100, end=1100, initial=0.1, every=300)
    # 0.9 - 0.8 (1 - p)^3
    assert [cubic.at(s) for s in (0, 99, 100, 600, 1100, 5000)] == pytest.approx([0, 0, 0.1, 0.8, 0.9, 0.9])
    assert [s for s in range(1500) if cubic.due(s)] == [100, 400, 700, 1000, 1100]
    assert sc.train.linear(0.8, 0, 10, every=5).at(5) == pytest.approx(0.4)
    assert sc.train.one_step(0.5, at=3).at(2) == 0.0
    found = sc.train.rounds(0.875, 3, every=10, begin=5)
    assert [found.at(s) for s in (4, 5, 15, 25)] == pytest.approx([0, 0.5, 0.75, 0.875])
    assert [s for s in range(100) if found.due(s)] == [5, 15, 25]


@pytest.mark.parametrize("score", sc.train.SCORES)
@pytest.mark.parametrize("scope", ["layer", "row", "global"])
def test_gradual_pruning_follows_its_schedule(score, scope):
    model = net()
    optimizer = OPTIMIZERS["adamw fused"](model.parameters())
    schedule = sc.train.cubic(0.75, begin=1, end=9, every=4)
    pruner = sc.train.gradual(model, optimizer, schedule, scope=scope, score=score, skip=("5.weight",))
    gone = {n: torch.zeros_like(z) for n, z in zeros(model).items()}
    for i in range(1, 13):
        step(model, optimizer)
        now = zeros(model)
        assert all(bool((gone[n] <= now[n]).all()) for n in now if n != "5.weight")
        gone = now
        last = max((s for s in (1, 5, 9) if s <= i), default=0)
        assert pruner.held.sparsity == pytest.approx(schedule.at(last), abs=0.05)
    total = sum(int(z.sum()) for n, z in gone.items() if n != "5.weight")
    if scope == "global":
        assert total == patterns.count_zeros(6 * 9 + 16 * 216, 0.75)
    elif scope == "layer":
        assert int(gone["3.weight"].sum()) == patterns.count_zeros(16 * 216, 0.75)
    assert not gone["5.weight"].any()


@pytest.mark.parametrize("score", ["taylor", "fisher"])
def test_steps_that_a_scaler_skips_count_for_nothing(score):
    """A fused optimizer is called with gradients that are infinite, and with scaled ones; it divides them itself."""
    sums = {}
    for scale, broken in ((1.0, False), (1024.0, True)):
        torch.manual_seed(0)
        model = net()
        optimizer = OPTIMIZERS["adamw fused"](model.parameters())
        pruner = sc.train.gradual(model, optimizer, sc.train.one_step(0.5, at=9), score=score)
        for bad in (True, False) if broken else (False,):
            x, y = data()
            (nn.functional.cross_entropy(model(x), y) * scale).backward()
            if bad:
                model[3].weight.grad[0, 0] = torch.inf
            # what GradScaler.step() does for an optimizer that takes scales
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(float(bad))
            optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf
            optimizer.zero_grad()
        sums[scale] = pruner.state_dict()["sums"]["3.weight"]
        assert pruner.step == 1
    torch.testing.assert_close(sums[1024.0], sums[1.0], rtol=1e-4, atol=1e-9)


def test_sparse_training_waits_for_a_step_that_is_taken():
    model = net()
    optimizer = OPTIMIZERS["adamw fused"](model.parameters())
    found = sc.train.dynamic(model, optimizer, 0.8, until=12, every=1)
    before = found.held.masks
    nn.functional.cross_entropy(model(data()[0]), data()[1]).backward()
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    optimizer.step()
    assert found.step == 0
    assert all(torch.equal(mask, before[name]) for name, mask in found.held.masks.items())
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert found.step == 1
    assert not torch.equal(found.held.masks["3.weight"], before["3.weight"])


def test_random_scores_go_by_their_seed_and_not_by_the_rank_s():
    masks = []
    for rank, seed in ((1, 5), (2, 5), (1, 6)):
        torch.manual_seed(0)
        model = net()
        torch.manual_seed(rank)
        optimizer, schedule = OPTIMIZERS["sgd"](model.parameters()), sc.train.one_step(0.5, at=0)
        masks.append(sc.train.gradual(model, optimizer, schedule, score="random", seed=seed).held.masks["3.weight"])
        assert torch.initial_seed() == rank
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_n_of_m_waits_for_its_moment():
    model = net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    schedule = sc.train.Steps({0: 0.0, 3: 0.5})
    sc.train.gradual(model, optimizer, schedule, pattern="2:4", skip=("0.weight", "5.weight"))
    for i in range(1, 5):
        step(model, optimizer)
        assert bool((model[3].weight == 0).any()) == (i >= 3)


def test_two_of_four_while_training():
    model = net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    skip = ("0.weight",)
    sc.train.gradual(model, optimizer, sc.train.one_step(0.5, at=2), pattern="2:4", skip=skip)
    for _ in range(4):
        step(model, optimizer)
    assert patterns.NM(2, 4).violation(model[3].weight.detach() != 0, 0.5) is None


@pytest.mark.parametrize("grow", ["gradient", "random"])
def test_sparse_from_the_first_step(grow):
    model = net()
    optimizer = OPTIMIZERS["adamw fused"](model.parameters())
    found = sc.train.dynamic(model, optimizer, 0.8, until=12, every=4, grow=grow)
    counts = {n: int(m.sum()) for n, m in found.held.masks.items()}
    assert found.held.sparsity == pytest.approx(0.8, abs=1e-3)
    # small layers are denser: Erdos-Renyi
    densities = {n: counts[n] / m.numel() for n, m in found.held.masks.items()}
    assert densities["3.weight"] < densities["5.weight"]
    seen = [copy.deepcopy(found.held.masks)]
    for i in range(1, 15):
        x, y = data()
        nn.functional.cross_entropy(model(x), y).backward()
        gradient = model[3].weight.grad.abs().clone()
        before = model[3].weight.detach().clone()
        optimizer.step()
        optimizer.zero_grad()
        assert {n: int(m.sum()) for n, m in found.held.masks.items()} == counts
        if i in (4, 8):
            old, new = seen[-1]["3.weight"], found.held.masks["3.weight"]
            moved = int((old & ~new).sum())
            assert 0 < moved <= round(0.3 * counts["3.weight"])
            grown = new & ~old
            assert bool((model[3].weight.detach()[grown] == 0).all())
            if grow == "gradient":
                # none of those that were not taken had a larger gradient
                assert float(gradient[grown].min()) >= float(gradient[~old & ~new].max())
            assert before[old & ~new].abs().median() < before[old & new].abs().median()
            seen.append(copy.deepcopy(found.held.masks))
        elif i not in (4, 8):
            assert all(torch.equal(m, seen[-1][n]) for n, m in found.held.masks.items())


@pytest.mark.parametrize("grow", ["gradient", "random"])
def test_sparse_training_goes_on_bit_for_bit(grow):
    def begun():
        torch.manual_seed(0)
        model = net()
        optimizer = OPTIMIZERS["adamw fused"](model.parameters())
        return model, optimizer, sc.train.dynamic(model, optimizer, 0.8, until=12, every=2, grow=grow)

    def run(stop):
        things = begun()
        for i in range(14):
            if i == stop:
                states = copy.deepcopy([thing.state_dict() for thing in things])
                things = begun()
                for thing, state in zip(things, states, strict=True):
                    thing.load_state_dict(state)
            step(*things[:2])
        return things[0].state_dict()

    whole = run(None)
    for stop in (1, 5, 12):
        assert all(torch.equal(a, b) for a, b in zip(whole.values(), run(stop).values(), strict=True))


def test_fewer_connections_move_along_a_cosine():
    model = nn.Sequential(nn.Linear(200, 1, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    found = sc.train.dynamic(model, optimizer, 0.5, until=12, every=4, fraction=0.4)
    moved = []
    for _ in range(12):
        old = found.held.masks["0.weight"]
        # nothing that was dropped is wanted back
        model[0].weight.grad = (~old).float()
        optimizer.step()
        moved.append(int((old & ~found.held.masks["0.weight"]).sum()))
    # of 100: 0.4 / 2 (1 + cos(pi / 3)) and 0.4 / 2 (1 + cos(2 pi / 3)), and none at the end
    assert moved == [0, 0, 0, 30, 0, 0, 0, 10, 0, 0, 0, 0]


def test_scores_are_sums_since_the_last_decision():
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    nn.init.ones_(model[0].weight)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    sc.train.gradual(model, optimizer, sc.train.Steps({2: 0.25, 4: 0.5}), score="taylor")
    for gradient in ([4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0], [0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4]):
        model[0].weight.grad = torch.tensor([gradient])
        optimizer.step()
    # the last weight by the first sums, 2 of 8, 6, 4, 2; the first by those after them, 0.2 of 0.2, 0.4, 0.6
    assert model[0].weight.tolist() == [[0.0, 1.0, 1.0, 0.0]]


def test_a_masked_layer_is_exact_forward_and_back():
    linear = nn.Linear(8, 5)
    mask = torch.rand(5, 8) > 0.5
    masked = sc.train.MaskedLinear.of(linear, mask)
    x = torch.randn(3, 8, requires_grad=True)
    want = nn.functional.linear(x, linear.weight * mask, linear.bias)
    torch.testing.assert_close(masked(x), want, rtol=0, atol=0)
    upstream = torch.randn(3, 5)
    (by_x,) = torch.autograd.grad(want, x, upstream)
    got_x, got_w = torch.autograd.grad(masked(x), [x, masked.weight], upstream)
    torch.testing.assert_close(got_x, by_x, rtol=0, atol=0)
    torch.testing.assert_close(got_w, (upstream.T @ x.detach()) * mask)
    assert torch.equal(masked.plain().weight != 0, mask)
    assert torch.equal(masked.state_dict()["mask_OI"], mask)
    with pytest.raises(PlanError, match="must be alike"):
        sc.train.MaskedLinear.of(linear, mask.T)


def test_sr_ste_by_hand_and_finished():
    model = nn.Sequential(nn.Linear(8, 4, bias=False))
    dense = model[0].weight.detach().clone()
    assert sc.train.sr_ste(model, "2:4", decay=0.1) == ["0.weight"]
    keep = patterns.NM(2, 4).keep(dense.abs(), 0.5)
    x = torch.randn(6, 8)
    torch.testing.assert_close(model(x), x @ (dense * keep).T)
    model(x).sum().backward()
    original = model[0].parametrizations.weight.original
    straight = x.sum(0).expand(4, 8)
    torch.testing.assert_close(original.grad, straight + 0.1 * dense * ~keep)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(5):
        optimizer.zero_grad()
        (model(x) - torch.randn(6, 4)).square().mean().backward()
        optimizer.step()
    expected = model(x).detach()
    sc.train.finish(model)
    assert list(dict(model.named_parameters())) == ["0.weight"]
    torch.testing.assert_close(model(x).detach(), expected)
    assert patterns.NM(2, 4).violation(model[0].weight.detach() != 0, 0.5) is None


@pytest.mark.parametrize(("request_", "words"), [
    (lambda m, o: sc.train.cubic(0.5, 10, 10), "must end after it begins"),
    (lambda m, o: sc.train.cubic(0.5, 0, 10, initial=0.6), "initial <= final"),
    (lambda m, o: sc.train.rounds(0.5, 0, 10), "0 rounds"),
    (lambda m, o: sc.train.Steps({3: 0.5, 5: 0.4}), "do not fall"),
    (lambda m, o: sc.train.gradual(m, o, sc.train.one_step(0.5), score="luck"), "unknown score 'luck'"),
    (lambda m, o: sc.train.gradual(m, o, sc.train.one_step(0.5), scope="model"), "unknown scope 'model'"),
    (lambda m, o: sc.train.gradual(m, o, sc.train.one_step(0.5), "2:4", "global"), "scope global shares zeros out over all"),
    (lambda m, o: sc.train.gradual(m, o, sc.train.cubic(0.75, 0, 10), pattern="2:4"), "2:4 is 0.5 zeros and nothing else"),
    (lambda m, o: sc.train.gradual(m, o, sc.train.one_step(0.5), pattern="2:4"), "0.weight cannot take 2:4: 9 inputs"),
    (lambda m, o: sc.train.gradual(net(), o, sc.train.one_step(0.5)), "the optimizer does not own 0.weight"),
    (lambda m, o: sc.train.hold(m, o, {"3.weight": torch.ones(2, 2)}), r"3.weight is \(16, 216\) and its mask \(2, 2\)"),
    (lambda m, o: sc.train.hold(m, o, {"4.weight": torch.ones(2, 2)}), "no parameter 4.weight"),
    (lambda m, o: sc.train.dynamic(m, o, 0.5, until=1), "1 <= every <= until"),
    (lambda m, o: sc.train.sr_ste(m, "unstructured"), "SR-STE trains N:M patterns"),
])  # fmt: skip
def test_bad_requests_are_refused_in_a_sentence(request_, words):
    model = net()
    with pytest.raises(PlanError, match=words):
        request_(model, torch.optim.SGD(model.parameters(), 0.1))
