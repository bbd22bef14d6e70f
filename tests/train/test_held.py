"""What hold() keeps, and what it refuses."""

import pytest
import torch
from torch import nn

import secateurs as sc
from secateurs.base.errors import PlanError


class Tied(nn.Module):
    """Embeddings (16 words of 8) that are the head too, and a matrix between them."""

    def __init__(self):
        super().__init__()
        self.words, self.body, self.head = nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 16, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x):
        return self.head(self.body(self.words(x)))


def net():
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)


def learn(model, optimizer):
    x = torch.arange(16) if isinstance(model, Tied) else torch.randn(16, 8)
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def test_a_tied_weight_is_held_by_any_of_its_names():
    model = Tied()
    mask = torch.arange(128).reshape(16, 8) % 3 > 0
    held = sc.train.hold(model, sgd(model), {"head.weight": mask, "words.weight": mask})
    assert held.sparsity == 43 / 128
    learn(model, held.optimizer)
    assert torch.equal(model.words.weight != 0, mask)
    with pytest.raises(PlanError, match="head.weight and words.weight are one parameter, and their masks differ"):
        sc.train.hold(model, sgd(model), {"head.weight": mask, "words.weight": ~mask})


def test_a_model_without_zeros_has_nothing_to_hold():
    model = net()
    with pytest.raises(PlanError, match="no zeros that training could change: prune it first, or give masks"):
        sc.train.hold(model, sgd(model))
    assert sc.train.hold(model, sgd(model), {}).sparsity == 0


def test_frozen_zeros_need_no_holding():
    model = net()
    for layer in (model[0], model[2]):
        layer.weight.data[:, ::2] = 0
    model[0].requires_grad_(False)
    assert list(sc.train.hold(model, sgd(model)).masks) == ["2.weight"]
    assert list(sc.train.hold(model, torch.optim.SGD(model.parameters(), 0.1)).masks) == ["0.weight", "2.weight"]
    # masks of frozen matrices are set once, and nothing moves them; of others the optimizer must know
    mask = torch.ones_like(model[0].weight, dtype=torch.bool)
    mask[0] = False
    sc.train.hold(model, sgd(model), {"0.weight": mask})
    assert not model[0].weight[0].any()
    with pytest.raises(PlanError, match="does not own 2.weight"):
        sc.train.hold(model, torch.optim.SGD(model[0].parameters(), 0.1), {"2.weight": model[2].weight != 0})


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
def test_a_weight_that_is_made_of_others_is_refused_by_name(norm):
    model = net()
    model[0].weight.data[:, ::2] = 0
    norm(model[0])
    made = (
        "0.weight is computed in every pass, so training cannot prune it: make it a plain parameter, or put it in skip"
    )
    with pytest.raises(PlanError, match="0.weight has zeros and is computed in every pass"):
        sc.train.hold(model, sgd(model))
    for ask in (
        lambda m, skip: sc.train.gradual(m, sgd(m), sc.train.one_step(0.5, at=1), skip=skip),
        lambda m, skip: sc.train.dynamic(m, sgd(m), 0.5, until=5, every=1, skip=skip),
        lambda m, skip: sc.train.sr_ste(m, skip=skip),
    ):
        with pytest.raises(PlanError, match=made):
            ask(model, ())
        ask(model, ("0.weight",))


@pytest.mark.parametrize("conv", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_a_convolution_s_weight_that_is_made_of_others_is_refused_by_name(conv):
    """Every kind of module that is pruned, not those alone that were once."""
    model = nn.Sequential(conv(2, 4, 3))
    model[0].weight.data[0] = 0
    nn.utils.parametrizations.weight_norm(model[0], dim=1)
    with pytest.raises(PlanError, match="0.weight has zeros and is computed in every pass"):
        sc.train.hold(model, sgd(model))


def test_sparse_gradients_are_refused():
    model = nn.Embedding(8, 4, sparse=True)
    optimizer = sgd(model)
    sc.train.hold(model, optimizer, {"weight": torch.rand(8, 4) > 0.5})
    model(torch.tensor([0, 1])).sum().backward()
    with pytest.raises(PlanError, match="weight has sparse gradients.* sparse=False"):
        optimizer.step()


def test_a_norm_of_gradients_may_leave_removed_weights_out():
    """By hand: 3 and 4 stay of 3 4 12."""
    model = nn.Sequential(nn.Linear(3, 1, bias=False))
    held = sc.train.hold(model, sgd(model), {"0.weight": torch.tensor([[True, True, False]])})
    model[0].weight.grad = torch.tensor([[3.0, 4.0, 12.0]])
    held.clear_gradients()
    assert float(nn.utils.clip_grad_norm_(model.parameters(), 1.0)) == 5


TOOLS = {
    "hold": lambda m: sc.train.hold(m, sgd(m)),
    "gradual": lambda m: sc.train.gradual(m, sgd(m), sc.train.one_step(0.5, at=2), score="taylor"),
    "dynamic": lambda m: sc.train.dynamic(m, sgd(m), 0.5, until=5, every=1),
    "sr_ste": lambda m: sc.train.sr_ste(m),
    "lora": lambda m: sc.train.lora(m, 2),
    "masked": lambda m: m.__setitem__(0, sc.train.MaskedLinear.of(m[0], m[0].weight != 0)),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", TOOLS)
def test_the_mode_that_a_tool_is_called_in_changes_nothing(name, mode):
    found = []
    for context in (torch.enable_grad, mode):
        torch.manual_seed(0)
        model = net()
        model[0].weight.data[:, ::2] = 0
        with context():
            tool = TOOLS[name](model)
        optimizer = tool.held.optimizer if hasattr(tool, "held") else getattr(tool, "optimizer", None) or sgd(model)
        for _ in range(3):
            learn(model, optimizer)
        assert bool((model[0].weight == 0).any()) or name == "masked"
        found.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class Owner(nn.Module):
    """A model with an attribute that wrappers have too."""

    def __init__(self):
        super().__init__()
        self.module, self.head = nn.Linear(4, 4), nn.Linear(4, 4)


class Wrapping(torch.optim.SGD):
    """An optimizer with an attribute that accelerate's wrapper has too."""

    def __init__(self, parameters):
        super().__init__(parameters, 0.1)
        self.optimizer = torch.optim.SGD([torch.zeros(1)], 0.1)


@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel, lambda m: nn.DataParallel(torch.compile(m))])
def test_the_trainer_s_callback_holds_the_whole_model(wrap):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = Owner()
    for layer in (model.module, model.head):
        layer.weight.data[0] = 0
    for optimizer in (Wrapping(model.parameters()), accelerator.prepare_optimizer(sgd(model))):
        callback = sc.train.trainer_callback()
        callback.on_train_begin(None, None, None, model=wrap(model), optimizer=optimizer)
        assert list(callback.held.masks) == ["module.weight", "head.weight"]
        callback.on_train_end(None, None, None)
