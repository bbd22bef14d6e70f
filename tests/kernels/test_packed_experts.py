"""Experts of one 3-D parameter as packed matrices: what the code of a class gets in its place."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from torch.testing import assert_close

from secateurs.base.errors import PackError
from secateurs.kernels.formats import pack
from secateurs.kernels.packed_experts import Fused, PackedExperts, dense_again, packed_name, put_experts
from secateurs.kernels.packed_linear import DenseLinear, PackedLinear

# two experts of 3 outputs and 2 inputs
EXPERTS = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]], [[0.0, -1.0], [5.0, 0.0], [0.0, 6.0]]])


def dense(weight_OI):
    layer = DenseLinear(2, 3, bias=False)
    layer.weight = nn.Parameter(weight_OI, requires_grad=False)
    return layer


def module(transposed=False):
    """A module with the experts, of which the second is packed; transposed: it holds [E, I, O]."""
    owner = nn.Module()
    owner.weight = nn.Parameter(EXPERTS.transpose(1, 2) if transposed else EXPERTS)
    put_experts(owner, "weight", PackedExperts([dense(EXPERTS[0]), PackedLinear.of(pack(EXPERTS[1]))], transposed))
    return owner


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def test_an_expert_multiplies_by_hand():
    x, bias = torch.tensor([[1.0, 10.0], [2.0, 0.0]]), torch.tensor([0.5, 0.0, 0.0])
    owner, turned = module(), module(transposed=True)
    first, second = [[1.0, 20.0, 43.0], [2.0, 0.0, 6.0]], [[-10.0, 5.0, 60.0], [0.0, 10.0, 0.0]]
    for e, want in enumerate((first, second)):
        assert linear(x, owner.weight[e]).tolist() == want
        assert linear(x, owner.weight[torch.tensor(e)], bias=bias).tolist() == [[a + 0.5, b, c] for a, b, c in want]
        for y in (x @ turned.weight[e], torch.matmul(x, turned.weight[e]), torch.mm(x, turned.weight[e])):
            assert y.tolist() == want
    # every expert on tokens of its own
    assert torch.bmm(torch.stack([x, x]), turned.weight).tolist() == [first, second]


@pytest.mark.parametrize("transposed", [False, True])
def test_it_looks_like_the_parameter_and_becomes_it_again(transposed):
    owner = module(transposed)
    parameter = EXPERTS.transpose(1, 2) if transposed else EXPERTS
    found = owner.weight
    assert (found.shape, found.dtype, found.device, found.dim(), len(found)) == (
        tuple(parameter.shape), torch.float32, torch.device("cpu"), 3, 2,
    )  # fmt: skip
    assert (found.size(1), found[1].shape, found[-1].dim()) == (parameter.shape[1], tuple(parameter.shape[1:]), 2)
    assert "weight" not in dict(owner.named_parameters())
    dense_again(owner)
    assert [name for name, _ in owner.named_parameters()] == ["weight"]
    assert torch.equal(owner.weight, parameter)


@pytest.mark.parametrize(
    "ask",
    [
        lambda owner, turned, x: owner.weight[torch.tensor([0, 1])],
        lambda owner, turned, x: owner.weight.transpose(1, 2),
        lambda owner, turned, x: torch.stack([owner.weight[0], owner.weight[1]]),
        lambda owner, turned, x: torch.bmm(torch.stack([x, x]), owner.weight),
        lambda owner, turned, x: torch.bmm(x[None], turned.weight),
        lambda owner, turned, x: x @ owner.weight[0],
        lambda owner, turned, x: linear(x, turned.weight[0]),
        lambda owner, turned, x: turned.weight[0] @ x,
    ],
)
def test_what_the_kernels_do_not_do_is_refused_with_a_way_out(ask):
    with pytest.raises(PackError, match=r"one after the other, and .*set_experts_implementation\('eager'\) first"):
        ask(module(), module(transposed=True), torch.ones(1, 2))


def test_an_expert_that_is_not_there_is_an_index_error():
    # what a loop over a parameter ends by
    with pytest.raises(IndexError):
        module().weight[2]
    assert len(list(module().weight)) == 2


def test_copies_and_pickles_multiply_by_their_own_matrices():
    owner, x, stored = module(), torch.tensor([[1.0, 10.0]]), io.BytesIO()
    torch.save(owner, stored)
    stored.seek(0)
    for other in (copy.deepcopy(owner), torch.load(stored, weights_only=False)):
        assert isinstance(other.weight, Fused)
        assert_close(linear(x, other.weight[1]), linear(x, owner.weight[1]))
        other.packed_weight[1].weight.data.zero_()
        assert linear(x, other.weight[1]).abs().sum() == 0
    assert linear(x, owner.weight[1]).abs().sum() > 0


def test_its_tensors_have_names_that_no_conversion_of_the_parameter_matches():
    assert (
        packed_name("model.layers.0.mlp.experts.down_proj", 3) == "model.layers.0.mlp.experts.packed_down_proj.3.weight"
    )
    assert packed_name("weight", 0) == "packed_weight.0.weight"
    assert packed_name("weight", 1) in module().state_dict()
