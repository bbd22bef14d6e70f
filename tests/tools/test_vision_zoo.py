"""A few networks of the zoo of vision, and that its checks notice what is wrong."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import vision_nets
import vision_zoo

import secateurs as sc


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["SE-ResNet", "SSD", "TCN", "Conformer"])
def test_what_is_left_is_the_dense_network_with_zeros(name, monkeypatch):
    # the graph as ONNX is the whole script's
    monkeypatch.setattr(vision_zoo, "_onnx", lambda model, x: None)
    (found,) = vision_zoo.tried(name, False)
    assert found["result"] == "exact", found
    assert found["left"] <= 0.7


@pytest.mark.filterwarnings("ignore")
def test_a_network_that_computes_something_else_is_wrong():
    torch.manual_seed(0)
    make, shape = vision_nets.NETWORKS["TCN"]
    model, x = make().eval(), torch.randn(8, *shape)
    small, report = sc.shrink_module(model, [(x,)], "params=0.7x", multiple=2)
    # an intermediate channel moves past the convolution that reads it
    small.a[0].register_forward_hook(lambda module, given, out: out.flip(1))
    found = vision_zoo.checked(make, model, small, report, x)
    assert found["result"] == "wrong"
    assert "not the dense network with zeros" in found["note"]
