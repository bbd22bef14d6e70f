import copy

import pytest
import torch
from torch import nn

from secateurs.prune.tune_block import reconstruct
from secateurs.prune.tuning import Moving, loss_scale, movable, tune, unscaled


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)
        self.router = nn.Linear(16, 4)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())


@pytest.fixture
def problem():
    """A block with half its weights gone, its inputs [40 windows], and what the dense block made of them."""
    torch.manual_seed(0)
    dense, block = Block(), Block()
    block.load_state_dict(dense.state_dict())
    x = torch.randn(40, 6, 16)
    with torch.no_grad():
        target = dense(x)
        for layer in (block.up, block.down):
            layer.weight[torch.rand(layer.weight.shape) < 0.5] = 0
    return block, x, target


def moving(block):
    return movable(block, [(layer.weight, layer.weight.detach() != 0) for layer in (block.up, block.down)])


def run(block, x, target, **options):
    options = {"steps": 60, "rate": 5e-2, **options}
    return reconstruct(
        moving(block),
        lambda i, part: block(x[i * 8 : i * 8 + 8][part]), lambda i, part: target[i * 8 : i * 8 + 8][part], [8] * 5, **options,
    )  # fmt: skip


def test_the_error_falls_and_zeros_stay_zero(problem):
    block, x, target = problem
    before = {name: p.detach().clone() for name, p in block.named_parameters()}
    ticks = []
    found = run(block, x, target, tick=lambda: ticks.append(1))
    assert found.accepted
    assert found.after < 0.7 * found.before
    assert len(ticks) == found.steps
    for name in ("up.weight", "down.weight"):
        after = dict(block.named_parameters())[name]
        assert torch.equal(after == 0, before[name] == 0)
        assert not torch.equal(after, before[name])
    assert not torch.equal(block.norm.weight, before["norm.weight"])
    # not pruned, no vector: left alone
    assert torch.equal(block.router.weight, before["router.weight"])
    assert all(p.requires_grad and p.grad is None for p in block.parameters())


def test_the_held_out_loss_is_what_is_reported(problem):
    """before and after are relative errors of windows that the tuning never saw."""
    block, x, target = problem
    seen = set()

    def forward(i, part):
        if torch.is_grad_enabled():
            seen.update(range(i * 8 + part.start, i * 8 + part.stop))
        return block(x[i * 8 : i * 8 + 8][part])

    found = reconstruct(
        moving(block), forward, lambda i, part: target[i * 8 : i * 8 + 8][part], [8] * 5, 60, 1e-2
    )  # fmt: skip
    held = [i for i in range(40) if i not in seen]
    assert len(held) == 4
    with torch.no_grad():
        error = (block(x[held]) - target[held]).square().mean(-1) / target[held].square().mean(-1)
    assert float(error.mean()) == pytest.approx(found.after, rel=1e-4)


def test_worse_is_never_accepted(problem):
    block, x, target = problem
    before = {name: p.detach().clone() for name, p in block.named_parameters()}
    found = run(block, x, target, rate=50.0)
    assert not found.accepted
    assert found.after == found.before
    assert all(torch.equal(p, before[name]) for name, p in block.named_parameters())


@pytest.mark.parametrize(("losses", "steps", "after"), [
    # above where it began while the rate is high, below it in the end
    ([1.0, 1.5, 1.2, 0.9, 0.8], 120, 0.8),
    # a look that is no lower than an earlier one, twice
    ([1.0, 1.5, 1.6, 1.7, 0.1], 90, 1.0),
    ([1.0, 0.5, 0.6, 0.7, 0.1], 90, 0.5),
    ([1.0, float("nan"), float("nan"), 0.1, 0.1], 60, 1.0),
])  # fmt: skip
def test_when_tuning_stops(losses, steps, after):
    p = torch.nn.Parameter(torch.ones(3, 3))
    # 20 places, 2 of them held out: two calls a look
    calls = iter(value for value in losses for _ in range(2))
    found = tune([Moving.of(p)], lambda place: next(calls), lambda place: [torch.ones(3, 3)], range(20), 120, 1e-2)
    assert (found.before, found.after, found.steps) == (1.0, after, steps)


def test_large_tokens_count_no_more_than_others(problem):
    """Tokens a thousand times as large, which language models have, must not be all that is looked at."""
    block, x, target = problem

    def small_error():
        with torch.no_grad():
            return float((block(x) - target)[:, 1:].square().mean())

    huge = target.clone()
    huge[:, 0] *= 1000
    before = small_error()
    run(block, x, huge)
    assert small_error() < 0.9 * before


def test_the_same_seed_gives_the_same_bits(problem):
    block, x, target = problem
    other = Block()
    other.load_state_dict(block.state_dict())
    run(block, x, target, seed=5)
    run(other, x, target, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(block.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("terms", [1, 1000, 2_000_000])
def test_gradients_of_an_fp16_loss_come_back_in_their_own_size(terms):
    """Adam divides by their size, so that losses alone cannot tell."""
    scale = loss_scale(torch.float16, terms)
    weight = torch.tensor(3.0, dtype=torch.float16, requires_grad=True)
    by_weight = torch.autograd.grad(weight.float() * (5 / terms) * scale, [weight])
    found = unscaled([*by_weight, None], scale)
    assert found[1] is None
    torch.testing.assert_close(found[0].float(), torch.tensor(5 / terms), rtol=1e-3, atol=0)


def test_a_block_in_fp16_is_tuned_as_well_as_one_in_fp32(problem):
    """The gradient by one number of a block's output is below what fp16 can hold."""
    block, x, target = problem
    # large outputs, and a mean over many: what an error of one of them is worth has no number in fp16
    with torch.no_grad():
        block.down.weight.mul_(10_000)
        block.down.bias.mul_(10_000)
    target = x + 10_000 * (target - x)
    many, wanted = (t.repeat(1, 600, 1) for t in (x, target))
    found = {}
    for dtype in (torch.float16, torch.float32):
        found[dtype] = run(copy.deepcopy(block).to(dtype), many.to(dtype), wanted.to(dtype))
    assert found[torch.float32].after < 0.8 * found[torch.float32].before
    assert found[torch.float16].after < 1.05 * found[torch.float32].after


def test_too_few_windows_or_no_steps_change_nothing(problem):
    block, x, target = problem
    before = block.up.weight.clone()
    assert run(block, x, target, steps=0).steps == 0
    one = reconstruct(
        moving(block), lambda i, part: block(x[:1][part]), lambda i, part: target[:1][part], [1], 10, 1e-2
    )
    assert one.steps == 0
    assert torch.equal(block.up.weight, before)
