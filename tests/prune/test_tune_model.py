"""Tuning a whole model against the dense one's predictions."""

import copy

import pytest
import tiny
import torch

from secateurs.model.activations import InMemory, OnDisk
from secateurs.model.blocks import AllLoaded, blocks_of
from secateurs.model.layers import layers_of, survivors
from secateurs.prune.tune_model import cross_entropy, dense_ends, distill, divergence, square_head
from secateurs.prune.tuning import movable


@pytest.fixture
def models():
    """A dense tiny Llama, the same with half its weights gone, and batches."""
    dense = tiny.make("llama")
    pruned = copy.deepcopy(dense)
    for name, p in pruned.named_parameters():
        if "_proj" in name:
            p.data[torch.rand(p.shape) < 0.5] = 0
    generator = torch.Generator().manual_seed(1)
    batches = [{"input_ids": torch.randint(0, 256, (4, 16), generator=generator)} for _ in range(5)]
    return dense, pruned, batches


def run(dense, pruned, batches, **options):
    ends = dense_ends(dense, batches, AllLoaded(), InMemory(), lambda: None)
    options = {"steps": 24, "rate": 2e-2, **options}
    blocks = [(name, pruned.get_submodule(name)) for name in blocks_of(pruned)[0]]
    moving = [m for name, block in blocks for m in movable(block, survivors(layers_of(block, name)))]
    return distill(pruned, moving, (pruned, AllLoaded()), ends, batches, **options)


def apart(dense, pruned, ids):
    with torch.no_grad():
        p, q = (m(input_ids=ids).logits.double().log_softmax(-1) for m in (pruned, dense))
    return float((q.exp() * (q - p)).sum(-1).mean())


class Notes:
    """A memory; `die` after so many writes."""

    def __init__(self, die=None):
        self.state, self.writes, self.die = None, 0, die

    def read(self):
        return self.state

    def due(self):
        return False

    def write(self, state):
        self.state = {name: tensor.clone() for name, tensor in state.items()}
        self.writes += 1
        if self.writes == self.die:
            raise KeyboardInterrupt


def test_predictions_come_nearer_and_zeros_stay(models):
    dense, pruned, batches = models
    before = copy.deepcopy(pruned)
    ids = torch.cat([batch["input_ids"] for batch in batches])
    ticks = []
    outcome = run(dense, pruned, batches, tick=lambda: ticks.append(1))
    assert outcome.accepted
    assert outcome.after < 0.9 * outcome.before
    assert apart(dense, pruned, ids) < 0.9 * apart(dense, before, ids)
    assert len(ticks) == outcome.steps == 24
    after = dict(pruned.named_parameters())
    for name, p in before.named_parameters():
        if "_proj" in name:
            assert torch.equal(p == 0, after[name] == 0), name
        if "layers" in name:
            assert not torch.equal(p, after[name]), name
        else:
            # embeddings, last norm and head make the dense logits as well
            assert torch.equal(p, after[name]), name
    assert all(p.requires_grad and p.grad is None for p in pruned.parameters())


def test_the_losses_are_those_of_windows_it_never_trains_on(models):
    dense, pruned, batches = models
    everything = {tuple(row.tolist()) for batch in batches for row in batch["input_ids"]}
    trained = set()
    forward = pruned.forward

    def watched(*args, **kwargs):
        if torch.is_grad_enabled():
            trained.update(tuple(row.tolist()) for row in kwargs["input_ids"])
        return forward(*args, **kwargs)

    pruned.forward = watched
    outcome = run(dense, pruned, batches, steps=40)
    del pruned.forward
    held_out = torch.tensor(sorted(everything - trained))
    assert len(held_out) == 2
    assert apart(dense, pruned, held_out) == pytest.approx(outcome.after, rel=1e-4)


def test_weights_that_are_no_numbers_are_not_kept(models):
    dense, pruned, batches = models
    before = copy.deepcopy(pruned)
    outcome = run(dense, pruned, batches, rate=float("inf"))
    assert not outcome.accepted
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), pruned.parameters(), strict=True))


@pytest.mark.parametrize("die", [1, 2, 3])
def test_it_goes_on_after_a_kill_bit_for_bit(die, models):
    dense, pruned, batches = models
    whole, fresh = copy.deepcopy(pruned), copy.deepcopy(pruned)
    expected = run(dense, whole, batches, steps=96)
    notes = Notes(die)
    with pytest.raises(KeyboardInterrupt):
        run(dense, pruned, batches, memory=notes, steps=96)
    # what was in memory is lost
    found = run(dense, fresh, batches, memory=notes, steps=96)
    assert found == expected
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), fresh.parameters(), strict=True))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_gradient_by_the_logits_is_that_of_the_loss(temperature):
    generator = torch.Generator().manual_seed(0)
    logits, dense = (torch.randn(1, 300, 11, generator=generator) * 3 for _ in range(2))
    logits.requires_grad_(True)
    p, q = ((x / temperature).log_softmax(-1) for x in (logits, dense))
    loss = temperature**2 * (q.exp() * (q - p)).sum() / 300
    (expected,) = torch.autograd.grad(loss, logits)
    found, gradient = divergence(logits, dense, temperature)
    assert found == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)


def test_cross_entropy_and_its_gradient():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 200, 11, generator=generator).requires_grad_(True)
    ids = torch.randint(0, 11, (2, 200), generator=generator)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 11), ids[:, 1:].reshape(-1))
    (expected,) = torch.autograd.grad(loss, logits)
    found, gradient = cross_entropy(logits, ids)
    assert found == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)


def test_square_head_and_its_gradients():
    generator = torch.Generator().manual_seed(0)
    hidden = [torch.randn(1, 7, 5, generator=generator).requires_grad_(True) for _ in range(3)]
    dense = [torch.randn(1, 7, 5, generator=generator) for _ in range(3)]
    loss = sum(((h - d) ** 2).mean() / (d**2).mean() for h, d in zip(hidden, dense, strict=True)) / 3
    expected = torch.autograd.grad(loss, hidden)
    found, gradients = square_head(hidden, dense)
    assert found == pytest.approx(loss.item(), rel=1e-5)
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_model_without_logits_is_left_alone(models):
    pruned = tiny.make("bert base")
    before = copy.deepcopy(pruned)
    assert run(copy.deepcopy(pruned), pruned, models[2]) is None
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), pruned.parameters(), strict=True))


def test_what_was_tuned_before_a_kill_is_not_tuned_again(models):
    dense, pruned, batches = models
    notes, ticks = Notes(2), []
    with pytest.raises(KeyboardInterrupt):
        run(dense, copy.deepcopy(pruned), batches, memory=notes, steps=96)
    found = run(dense, pruned, batches, memory=notes, steps=96, tick=lambda: ticks.append(1))
    # it died at its second look
    assert len(ticks) == found.steps - 48


def test_a_walk_of_the_dense_model_goes_on_from_its_place(models, tmp_path):
    """What left its last block is the same, and no block is run twice."""
    dense, _, batches = models
    want = dense_ends(dense, batches, AllLoaded(), InMemory(), lambda: None)
    store, place, ran = OnDisk(tmp_path / "ends"), tmp_path / "ends.json", []
    for i, block in enumerate(dense.model.layers):
        # what comes before the blocks is found with blocks that do nothing
        block.mlp.register_forward_hook(lambda *_, i=i: ran.append(i))
    ticks = []

    def tick():
        ticks.append(1)
        # in the second block
        if len(ticks) == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dense_ends(dense, batches, AllLoaded(), store, tick, place)
    assert ran == [0] * 5 + [1] * 2
    got = dense_ends(dense, batches, AllLoaded(), store, lambda: ticks.append(1), place)
    assert ran == [0] * 5 + [1] * 2 + [1] * 5 + [2] * 5
    # all of them are told, though some were run before
    assert len(ticks) == 7 + 15
    assert all(torch.equal(got(i), want(i)) for i in range(5))
    dense_ends(dense, batches, AllLoaded(), store, lambda: ticks.append(1), place)
    assert (len(ran), len(ticks)) == (17, 22)
