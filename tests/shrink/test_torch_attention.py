"""torch's MultiheadAttention with fewer heads: the same module, whose heads need not make up its width."""

import copy
import itertools

import pytest
import torch
from torch import nn

import secateurs as sc
from secateurs.shrink import graph
from secateurs.shrink.attention import Attention, becomes_open, opened
from secateurs.shrink.proof import prove
from secateurs.shrink.trace import trace

KINDS = [
    {},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True},
    {"bias": False},
]


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_with_all_heads_it_is_torchs(apart, first, kind):
    """With every kind of mask, with and without weights, a batch first or second or none."""
    torch.manual_seed(0)
    widths = {"kdim": 6, "vdim": 5} if apart else {}
    theirs = nn.MultiheadAttention(8, 4, batch_first=first, dtype=torch.float64, **widths, **kind).eval()
    for p in theirs.parameters():
        nn.init.normal_(p)
    ours = copy.deepcopy(theirs)
    becomes_open(ours, "")
    assert type(ours) is Attention
    q, k, v = (torch.randn(n, w, s, dtype=torch.float64).transpose(1, 2) for n, w, s in
               ((2, 8, 5), (2, 6 if apart else 8, 7), (2, 5 if apart else 8, 7)))  # fmt: skip
    q, k, v = (x if first else x.transpose(0, 1) for x in (q, k, v))
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 4:] = True
    scores, of_heads = torch.randn(5, 7, dtype=torch.float64), torch.randn(8, 5, 7, dtype=torch.float64)
    later = torch.ones(5, 7, dtype=torch.bool).triu(1)
    masks = [
        {}, {"key_padding_mask": padding}, {"attn_mask": scores}, {"attn_mask": of_heads}, {"attn_mask": later, "is_causal": True},
        {"attn_mask": of_heads, "key_padding_mask": padding.double() * -3},
    ]  # fmt: skip
    calls = [((q, k, v), m) for m in masks] + ([] if apart else [((q, q, q), {})]) + [((q[0], k[0], v[0]), {})]
    for (given, mask), needed, mean in itertools.product(calls, (True, False), (True, False)):
        more = {**mask, "need_weights": needed, "average_attn_weights": mean}
        for a, b in zip(ours(*given, **more), theirs(*given, **more), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_head_by_hand():
    """One head of two channels in a width of four, which is more than its heads have."""
    torch.manual_seed(0)
    model = nn.MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64).eval()
    x = torch.randn(1, 3, 4, dtype=torch.float64)
    found = prove(
        nn.Sequential(_Self(model)), trace(nn.Sequential(_Self(model)), (torch.cat([x, x]),)), (torch.cat([x, x]),)
    )
    (group,) = [g for g in found.groups if g.name == "0.attention"]
    small = nn.Sequential(_Self(copy.deepcopy(model)))
    graph.cut(small, found, [int(group.units[0])])
    here = small[0].attention
    assert (type(here), here.num_heads, here.embed_dim) == (Attention, 1, 4)
    assert (here.in_proj_weight.shape, here.out_proj.weight.shape) == ((6, 4), (4, 2))
    # the second head: rows 2 and 3 of each projection
    q, k, v = (
        x[0] @ w[2:].T + b[2:] for w, b in zip(model.in_proj_weight.chunk(3), model.in_proj_bias.chunk(3), strict=True)
    )
    expected = (q @ k.T / 2**0.5).softmax(-1) @ v @ model.out_proj.weight[:, 2:].T + model.out_proj.bias
    torch.testing.assert_close(small(x)[0], expected)


class _Self(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x):
        return self.attention(x, x, x)[0]


def test_masks_of_other_heads_and_none_for_a_hint_are_refused():
    module = nn.MultiheadAttention(8, 4, batch_first=True)
    becomes_open(module, "")
    x = torch.randn(2, 3, 8)
    with pytest.raises(RuntimeError, match="attn_mask is of 6 heads, and 2 examples with 4 heads each have 8"):
        module(x, x, x, attn_mask=torch.zeros(6, 3, 3))
    with pytest.raises(RuntimeError, match="no attn_mask was given"):
        module(x, x, x, is_causal=True)


class Own(nn.MultiheadAttention):
    def forward(self, query, key, value, **more):
        return super().forward(query, key, value, **more)


def test_a_class_of_its_own_stays_and_torchs_is_given_back():
    model = nn.ModuleList([nn.MultiheadAttention(8, 4), Own(8, 4)])
    with opened(model):
        assert [type(m) for m in model] == [Attention, Own]
    assert [type(m) for m in model] == [nn.MultiheadAttention, Own]
    x = torch.randn(2, 3, 8)
    found = trace(nn.Sequential(_Self(Own(8, 4))), (x,))
    assert "a Own, which wants as many outputs as inputs" in found.fixed["0.attention"]


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 16, dropout=0.1, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def test_an_encoder_loses_heads_runs_trains_and_is_loaded(tmp_path):
    """Where torch would run a fused kernel or nested tensors, which count heads by the width, it does not."""
    model, x = encoder().eval(), torch.randn(64, 5, 16)
    small, report = sc.shrink_module(model, [(x,)], "params=0.6x", multiple=1)
    heads = [layer.self_attn.num_heads for layer in small.layers]
    assert min(heads) < 4
    assert all(g["after"] == n for g in report["groups"] for n, layer in zip(heads, ("layers.0", "layers.1"), strict=True)
               if g["group"] == f"{layer}.self_attn")  # fmt: skip
    assert model.use_nested_tensor
    padding = torch.zeros(64, 5, dtype=torch.bool)
    padding[:, 4:] = True
    with torch.no_grad():
        got = small(x, src_key_padding_mask=padding)
        torch.testing.assert_close(got[:, :4], small(x[:, :4]), rtol=1e-4, atol=1e-5)
    small.train()(x).sum().backward()
    again = sc.load_shrunk(sc.save_shrunk(small, report, tmp_path / "small.safetensors"), encoder)
    with torch.no_grad():
        torch.testing.assert_close(again(x), small.eval()(x), rtol=0, atol=0)
        torch.testing.assert_close(again(x, src_key_padding_mask=padding), got, rtol=0, atol=0)
    exported = torch.export.export(small, (x,)).module()
    torch.testing.assert_close(exported(x), small(x), rtol=1e-4, atol=1e-5)


class Decoder(nn.Module):
    """Attention to something else, packed: its weight is taken apart in each pass."""

    def __init__(self):
        super().__init__()
        self.a, self.attention, self.b = nn.Linear(8, 8), nn.MultiheadAttention(8, 4, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        x = self.a(x)
        return self.b(self.attention(x, x.relu(), x.relu())[0])


def test_packed_attention_to_something_else_stays_with_the_reason():
    found = trace(Decoder().eval(), (torch.randn(2, 5, 8),))
    assert found.fixed["attention"] == "it has a linear with a weight that is computed"
    assert [g.name for g in found.groups] == ["attention.out_proj"]
