"""SR-STE on weights that several modules share."""

import torch
from torch import nn

import secateurs as sc
from secateurs.matrix import patterns


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(6, 8), nn.Linear(8, 6, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x):
        return self.head(self.words(x))


def test_tied_weights_are_one_matrix_wherever_they_are_used():
    """The gradient is straight through both uses, and removed weights decay once."""
    torch.manual_seed(0)
    model = Tied()
    dense = model.words.weight.detach().clone()
    keep = patterns.NM(2, 4).keep(dense.abs(), 0.5)
    x = torch.arange(6)
    assert sc.train.sr_ste(model, "2:4", decay=0.1) == ["words.weight"]
    pruned = (dense * keep).requires_grad_()
    want = nn.functional.linear(pruned[x], pruned)
    torch.testing.assert_close(model(x), want)
    (straight,) = torch.autograd.grad(want.square().sum(), pruned)
    model(x).square().sum().backward()
    (parameter,) = model.parameters()
    torch.testing.assert_close(parameter.grad, straight + 0.1 * dense * ~keep)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.step()
    expected = model(x).detach()
    sc.train.finish(model)
    assert model.words.weight is model.head.weight
    assert list(dict(model.named_parameters())) == ["words.weight"]
    torch.testing.assert_close(model(x).detach(), expected, rtol=0, atol=0)
    assert patterns.NM(2, 4).violation(model.head.weight.detach() != 0, 0.5) is None
