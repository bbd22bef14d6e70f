"""1x1 convolutions of zeros are sparse products over places, where that pays."""

import copy

import pytest
import torch
from torch import nn

import secateurs
from secateurs.kernels.packed_embedding import make_dense
from secateurs.kernels.sparse_convolution import PAYS_FROM, SparseConvolution


def thinned(conv, zeros=0.95):
    with torch.no_grad():
        conv.weight.mul_(torch.rand(conv.weight.shape) >= zeros)
    return conv


@pytest.mark.parametrize(("kind", "places"), [(nn.Conv1d, (7,)), (nn.Conv2d, (5, 9)), (nn.Conv3d, (2, 3, 4))])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_convolution_in_float64(kind, places, bias):
    """Of one image, of several, without a batch, and of images whose places do not lie in order; and comes back bit for bit."""
    conv = thinned(kind(33, 20, 1, bias=bias))
    exact = copy.deepcopy(conv).double()
    sparse = SparseConvolution(conv)
    x = torch.randn(3, 33, *places)
    with torch.no_grad():
        for given in (x, x[:1], x[0], x.transpose(-1, 1).contiguous().transpose(-1, 1)):
            torch.testing.assert_close(sparse(given), exact(given.double()).float(), rtol=1e-5, atol=1e-5)
        back = sparse.dense()
        assert torch.equal(back.weight, conv.weight)
        assert str(back) == str(conv)
        torch.testing.assert_close(back(x), conv(x))


def test_accelerate_takes_those_that_pay_and_says_why_others_stay():
    torch.manual_seed(0)
    model = nn.Sequential(
        thinned(nn.Conv2d(16, 64, 1)), thinned(nn.Conv2d(64, 64, 1), 0.8), thinned(nn.Conv2d(64, 64, 3, padding=1)),
        thinned(nn.Conv2d(64, 64, 1, groups=2)), thinned(nn.Conv2d(64, 64, 1, 2)), thinned(nn.Conv2d(64, 8, 1, padding=1)),
    )  # fmt: skip
    x = torch.randn(2, 16, 8, 8)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        want = model(x)
        choices = secateurs.accelerate(model)
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
    assert [c.format for c in choices] == ["csr", *["dense"] * 5]
    assert [type(m) for m in model] == [SparseConvolution, *[nn.Conv2d] * 5]
    weight = before["0.weight"]
    assert choices[0].survivors == int((weight != 0).sum())
    stored = model[0].weight.nbytes + model[0].columns.nbytes + model[0].rows.nbytes
    assert choices[0].nbytes == stored < choices[0].dense_nbytes == weight.nbytes
    assert "oneDNN's dense convolution is faster below 87.5%" in choices[1].reason
    assert "a 3x3 convolution of stride 1 and 1 groups" in choices[2].reason
    assert "stride 1 and 2 groups" in choices[3].reason
    assert "stride 2" in choices[4].reason
    assert "padding" in choices[5].reason
    make_dense(model)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_from_seven_eighths_of_zeros_on():
    for kept, form in ((8, "csr"), (9, "dense")):
        conv = nn.Conv2d(8, 8, 1)
        conv.weight.data.zero_().view(-1)[:kept] = 1
        (choice,) = secateurs.accelerate(nn.Sequential(conv))
        assert choice.format == form
    assert PAYS_FROM == 0.875


def test_shared_and_other_dtypes_stay():
    one, other = thinned(nn.Conv2d(16, 16, 1)), nn.Conv2d(16, 16, 1)
    other.weight = one.weight
    half = thinned(nn.Conv2d(16, 16, 1)).bfloat16()
    choices = secateurs.accelerate(nn.ModuleList([one, other, half]))
    assert [c.reason for c in choices] == ["shared weight", "shared weight", "no kernel for bfloat16 convolutions"]
