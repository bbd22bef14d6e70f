"""A cut module learns what its teacher gives."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from secateurs import recover_module, shrink_module
from secateurs.base.errors import CheckpointError, PlanError
from secateurs.shrink.outputs import distance


def net(width=24):
    return nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Dropout(0.1), nn.Linear(width, 3))


@pytest.fixture
def data():
    torch.manual_seed(0)
    return torch.randn(256, 6), torch.randn(64, 6)


def loader(x, size=32):
    return DataLoader(TensorDataset(x), size, shuffle=True)


def error(model, teacher, x):
    with torch.no_grad():
        return float(distance(model(x), teacher(x)))


@pytest.mark.filterwarnings("ignore:.* saw little")
def test_a_cut_module_comes_nearer_to_its_teacher(data):
    """On inputs that it was not trained on. The teacher stays as it is, and modes too."""
    x, others = data
    teacher = net().eval()
    before = copy.deepcopy(teacher.state_dict())
    small, _ = shrink_module(teacher, [(x,)], "params=0.4x", "magnitude", refit=False, multiple=1)
    cut = error(small, teacher, others)
    report = recover_module(small, teacher, loader(x), 300, rate=1e-2)
    assert error(small, teacher, others) < 0.2 * cut
    assert report["loss"]["last"] < 0.5 * report["loss"]["first"]
    assert not any(m.training for m in (*small.modules(), *teacher.modules()))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), teacher.state_dict().values(), strict=True))


@pytest.mark.parametrize("ema", [0.0, 0.5, 0.999])
def test_steps_and_their_average_by_a_loop(data, ema):
    """AdamW, a warm-up of one step of 20, a cosine, and the average after each step: written out."""
    x = data[0][:16]
    model, teacher = nn.Linear(6, 3), nn.Linear(6, 3)
    mine = copy.deepcopy(model)
    recover_module(model, teacher, [(x,)], 20, rate=0.1, ema=ema)
    optimizer = torch.optim.AdamW(mine.parameters(), 0.1, weight_decay=1e-2)
    average = None
    for step in range(20):
        rate = 0.1 if step < 1 else 0.1 * (0.5 + 0.5 * torch.cos(torch.tensor(torch.pi * (step - 1) / 19)).item())
        optimizer.param_groups[0]["lr"] = rate
        log_a, log_b = mine(x).log_softmax(1), teacher(x).detach().log_softmax(1)
        optimizer.zero_grad()
        (log_b.exp() * (log_b - log_a)).sum(1).mean().backward()
        optimizer.step()
        now = mine.weight.detach().clone()
        decay = min(ema, (1 + step) / (10 + step)) if ema else 0.0
        average = now if average is None else decay * average + (1 - decay) * now
    torch.testing.assert_close(model.weight.detach(), average, rtol=1e-4, atol=1e-5)


class Killed(Exception):
    pass


def test_a_training_that_was_killed_ends_as_an_undisturbed_one(data, tmp_path):
    """Bit for bit, with dropout, batch norm and a shuffled loader, in the middle of a pass; and random numbers are left alone."""
    x, _ = data
    teacher = net().eval()
    first, second = net(8), None
    second = copy.deepcopy(first)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    whole = recover_module(first, teacher, loader(x), 21, rate=1e-2)
    assert torch.equal(torch.get_rng_state(), state)

    def kill(label, done, count):
        if done == 13:
            raise Killed

    file = tmp_path / "state.pt"
    with pytest.raises(Killed):
        recover_module(second, teacher, loader(x), 21, rate=1e-2, file=file, every=5, progress=kill)
    fresh = net(8)
    rest = recover_module(fresh, teacher, loader(x), 21, rate=1e-2, file=file, every=5)
    assert (whole["begun_at"], rest["begun_at"]) == (0, 10)
    assert whole["loss"] == rest["loss"]
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), fresh.state_dict().values(), strict=True))
    # what is done is not done again
    again = net(8)
    assert recover_module(again, teacher, loader(x), 21, rate=1e-2, file=file)["begun_at"] == 21
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    with pytest.raises(CheckpointError, match="holds a training with steps 21, and this one has 22"):
        recover_module(net(8), teacher, loader(x), 22, rate=1e-2, file=file)
    with pytest.raises(CheckpointError, match="of another module"):
        recover_module(net(9), teacher, loader(x), 21, rate=1e-2, file=file)
    file.write_text("no training")
    with pytest.raises(CheckpointError, match="holds no training of recover_module"):
        recover_module(net(8), teacher, loader(x), 21, rate=1e-2, file=file)


def test_zeros_stay_zero_in_the_average_too(data):
    """Its own zeros, and masks of torch.nn.utils.prune; what is not zero moves."""
    x, _ = data
    teacher, model = net().eval(), net()
    with torch.no_grad():
        model[0].weight[:, ::2] = 0
    prune.l1_unstructured(model[4], "weight", 0.5)
    before = model[0].weight.detach().clone(), model[4].weight.detach().clone()
    report = recover_module(model, teacher, loader(x), 10, rate=1e-2)
    for layer, was in zip((model[0], model[4]), before, strict=True):
        assert torch.equal(layer.weight == 0, was == 0)
        assert not torch.equal(layer.weight, was)
    zeros = sum(int((w == 0).sum()) for w in before)
    assert report["held"] == zeros / sum(w.numel() for w in before)
    assert isinstance(model[4].weight, nn.Parameter)


def test_precision_is_accelerate_s(data):
    x, _ = data
    teacher, model, seen = net().eval(), net(), set()
    model[0].register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    recover_module(model, teacher, [(x,)], 2, mixed_precision="bf16")
    assert seen == {torch.bfloat16}
    recover_module(model, teacher, [(x,)], 2)
    assert seen == {torch.bfloat16, torch.float32}
    assert model[0].weight.dtype is torch.float32


def test_what_a_user_s_own_accelerator_was_told_stays(data):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    x, _ = data
    before = dict(AcceleratorState._shared_state)
    AcceleratorState._shared_state.clear()
    try:
        own = Accelerator(mixed_precision="bf16", cpu=True)
        recover_module(net(), net().eval(), [(x,)], 1)
        assert own.state.mixed_precision == "bf16"
        assert Accelerator().mixed_precision == "bf16"
    finally:
        AcceleratorState._shared_state.clear()
        AcceleratorState._shared_state.update(before)


def test_a_user_s_loss_trains_alone_or_beside_the_teacher(data):
    x, _ = data
    targets = x[:, :3].argmax(1)

    def loss(model, batch):
        return F.cross_entropy(model(batch["x"]), batch["y"])

    model = net(48)
    batches = [{"x": x, "y": targets}]
    report = recover_module(model, None, batches, 150, rate=1e-2, loss=loss)
    assert float((model.eval()(x).argmax(1) == targets).float().mean()) > 0.95
    teacher = net().eval()
    model[3].p = 0.0
    first = [
        recover_module(copy.deepcopy(model).eval(), t, batches, 1, loss=f, inputs=lambda b: (b["x"],))["loss"]["first"]
        for t, f in ((None, loss), (teacher, None), (teacher, loss))
    ]
    assert first[2] == pytest.approx(first[0] + first[1], rel=1e-5)
    assert report["held"] == 0


@pytest.mark.parametrize(("options", "words"), [
    ({"teacher": None}, "nothing to train towards"),
    ({"steps": 0}, "give 1 step or more"),
    ({"ema": 1.0}, r"ema in \[0, 1\)"),
    ({"mixed_precision": "fp8"}, "mixed_precision 'fp8'; write no, bf16, fp16"),
    ({"loader": [torch.randn(4, 6)]}, "a batch is a Tensor, .* say with inputs= which"),
    ({"loader": iter([(torch.randn(4, 6),)])}, "the loader gave no batch in pass 2, and 2 steps are left"),
    ({"loss": lambda model, batch: 1}, "gives a int; it must give a scalar"),
    ({"loss": lambda model, batch: model(*batch).sum() * torch.nan}, "the loss is nan at step 1"),
])  # fmt: skip
def test_what_cannot_be_trained_is_refused_in_a_sentence(options, words):
    given = {"teacher": net(), "loader": [(torch.randn(4, 6),)], "steps": 3, **options}
    with pytest.raises(PlanError, match=words):
        recover_module(net(), given.pop("teacher"), given.pop("loader"), given.pop("steps"), **given)


def test_a_frozen_module_and_its_own_teacher_are_refused(data):
    model = net()
    with pytest.raises(PlanError, match="the teacher is the module itself"):
        recover_module(model, model, [(data[0],)], 1)
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(PlanError, match="no parameter that asks for gradients"):
        recover_module(model, net(), [(data[0],)], 1)
