import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm
from transformers.pytorch_utils import Conv1D

from secateurs.model.layers import Layer, layers_of, others_of


def parts(block, prefix="block"):
    """The names of a block's layers, and {name: why not} of its other parameters."""
    layers = layers_of(block, prefix)
    return [layer.name for layer in layers], {other.name: other.why for other in others_of(block, prefix, layers)}


def test_a_shared_weight_is_one_layer_and_says_its_other_names():
    a = nn.Linear(4, 4)
    block = nn.ModuleDict(
        {"a": a, "b": nn.Linear(4, 4), "again": nn.Linear(4, 4), "table": nn.Embedding(4, 4), "same": a}
    )
    block["again"].weight = block["table"].weight = a.weight
    first, second = layers_of(block, "block")
    assert (first.name, first.also) == ("block.a", ("block.again", "block.table", "block.same"))
    assert first.places == (block["a"], block["again"])
    assert (second.name, second.also) == ("block.b", ())
    assert parts(block)[1] == {}


def test_a_weight_that_is_multiplied_both_ways_is_refused():
    block = nn.ModuleDict({"a": nn.Linear(4, 4), "b": Conv1D(4, 4)})
    block["b"].weight = block["a"].weight
    (layer,) = layers_of(block, "block")
    assert layer.refused == "block.b multiplies the same weight transposed"
    (grouped,) = layers_of(nn.Conv2d(4, 4, 3, groups=2), "conv")
    assert "grouped" in grouped.refused


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix, self.bias = nn.Parameter(torch.zeros(2, 3, 4)), nn.Parameter(torch.zeros(4))


@pytest.mark.parametrize(("module", "names", "why"), [
    (nn.Embedding(3, 4), ["x"], "rows are looked up"),
    (nn.EmbeddingBag(3, 4), ["x"], "rows are looked up"),
    (nn.LayerNorm((3, 4)), ["x", "x.bias"], "a norm"),
    (nn.ConvTranspose1d(3, 4, 2), ["x"], "transposed convolution"),
    (nn.LSTM(3, 4), ["x.weight_ih_l0", "x.weight_hh_l0"], "recurrent"),
    (nn.GRUCell(3, 4), ["x.weight_ih", "x.weight_hh"], "recurrent"),
    (nn.Bilinear(3, 4, 5), ["x"], "two inputs at once"),
    (Own(), ["x.matrix"], "Own uses it in code of its own"),
    (parametrizations.weight_norm(nn.Linear(3, 4)), [f"x.parametrizations.weight.original{i}" for i in (0, 1)], "by WeightNorm"),
    (parametrizations.spectral_norm(nn.Linear(3, 4)), ["x.parametrizations.weight.original"], "by SpectralNorm"),
    (spectral_norm(nn.Linear(3, 4)), ["x.weight_orig"], "by SpectralNorm"),
    (prune.l1_unstructured(nn.Linear(3, 4), "weight", 0.5), ["x.weight_orig"], "prune.remove first"),
])  # fmt: skip
def test_what_is_no_layer_says_why(module, names, why):
    layers, others = parts(nn.ModuleDict({"x": module}), "")
    assert layers == []
    assert list(others) == names
    assert all(why in text for text in others.values())


def test_the_old_weight_norm_says_why():
    with pytest.warns(FutureWarning):
        module = nn.utils.weight_norm(nn.Linear(3, 4))
    layers, others = parts(nn.ModuleDict({"x": module}), "")
    assert layers == []
    assert list(others) == ["x.weight_g", "x.weight_v"]
    assert "remove_weight_norm" in others["x.weight_v"]


def test_the_shape_of_what_is_no_layer():
    (other,) = others_of(Own(), "", [])
    assert other.shape == (2, 12)


def test_the_thirds_of_an_attention_are_layers_of_one_parameter():
    attention = nn.MultiheadAttention(4, 2)
    layers = layers_of(attention, "inner")
    thirds = [layer for layer in layers if layer.kind == "attention"]
    assert [layer.name for layer in thirds] == [f"inner.in_proj_weight.{n}" for n in ("query", "key", "value")]
    assert {layer.tensor_name for layer in thirds} == {"inner.in_proj_weight"}
    for i, layer in enumerate(thirds):
        assert layer.shape == (4, 4)
        layer.write(torch.full((4, 4), float(i)))
    assert attention.in_proj_weight.mean(1).tolist() == [0.0] * 4 + [1.0] * 4 + [2.0] * 4
    apart = layers_of(nn.MultiheadAttention(4, 2, kdim=3, vdim=2), "inner")
    assert [(y.name, y.tensor_name, y.shape) for y in apart] == [
        ("inner.q_proj_weight", "inner.q_proj_weight", (4, 4)),
        ("inner.k_proj_weight", "inner.k_proj_weight", (4, 3)),
        ("inner.v_proj_weight", "inner.v_proj_weight", (4, 2)),
        ("inner.out_proj", "inner.out_proj.weight", (4, 4)),
    ]


def test_layer_names_experts_by_their_parameter():
    module = nn.Module()
    module.down_proj = nn.Parameter(torch.zeros(2, 3, 4))
    layer = Layer("experts.down_proj.1", module, module.down_proj, "expert", 1)
    layer.write(torch.ones(3, 4))
    assert layer.tensor_name == "experts.down_proj"
    assert module.down_proj.sum(dim=(1, 2)).tolist() == [0.0, 12.0]
