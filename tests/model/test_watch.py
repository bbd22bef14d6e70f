import weakref

import pytest
import tiny
import torch
from torch import nn
from torch.nn.functional import linear

from secateurs.model.walk import stream


def observed(module, *batches, **names):
    """The Stats of all layers of a module that is one block."""
    step = next(iter(stream(module, [{"x": x} for x in batches])))
    return step.observe(step.layers, gram=True)


def gram(*inputs):
    x_TI = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs]).double()
    return (x_TI.T @ x_TI).float()


def same(stats, *inputs):
    assert stats.tokens == sum(x.shape[:-1].numel() for x in inputs)
    torch.testing.assert_close(stats.gram_II, gram(*inputs), rtol=1e-4, atol=1e-3)


class Net(nn.Module):
    """Two layers of one shape, called as `code` says."""

    def __init__(self, code):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.code = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), code

    def forward(self, x):
        return self.code(self.a, self.b, x)


X = [torch.randn(64, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)]


def test_every_call_of_a_layer_counts_in_every_batch():
    net = Net(lambda a, b, x: b(a(a(x).relu())))
    found = observed(net, *X)
    with torch.no_grad():
        again = [net.a(x).relu() for x in X]
        same(found["a"], *X, *again)
        same(found["b"], *(net.a(x) for x in again))
    assert found["a"].tokens == 512


def test_an_input_may_be_given_by_its_name():
    same(observed(Net(lambda a, b, x: a(input=x) + b(x)), X[0])["a"], X[0])


def test_a_layer_may_be_called_as_often_as_the_tokens_say():
    net = Net(lambda a, b, x: sum(a(b(x)) for _ in range(1 if x[0, 0] > 0 else 3)))
    up, down = X[0].clone(), X[1].clone()
    up[0, 0], down[0, 0] = 1.0, -1.0
    same(observed(net, up, down)["b"], up, down, down, down)


def test_a_weight_of_two_names_counts_what_both_are_given():
    net = Net(lambda a, b, x: b(a(x).relu()))
    net.b.weight = net.a.weight
    step = next(iter(stream(net, [{"x": x} for x in X[:2]])))
    (layer,) = step.layers
    assert (layer.name, layer.also) == ("a", ("b",))
    with torch.no_grad():
        same(step.observe(step.layers, gram=True)["a"], *X[:2], *(net.a(x).relu() for x in X[:2]))


def test_an_input_that_was_changed_in_place_is_another_one():
    def forward(a, b, x):
        h = x.clone()
        h += a(h)
        return b(h)

    net = Net(forward)
    found = observed(net, X[0])
    with torch.no_grad():
        same(found["a"], X[0])
        same(found["b"], X[0] + net.a(X[0]))


@pytest.mark.parametrize("differs", ["in each batch", "from the second batch on", "by one call more"])
def test_layers_that_share_some_inputs_only_have_stats_of_their_own(differs):
    def forward(a, b, x):
        if differs == "by one call more":
            return a(x) + b(x) + (a(2 * x) if x[0, 0] > 0 else 0)
        out = a(x) + b(x)
        return out + b(2 * x) if differs == "in each batch" or x[0, 0] < 0 else out

    first, second = X[0].clone(), X[1].clone()
    first[0, 0], second[0, 0] = 1.0, -1.0
    found = observed(Net(forward), first, second)
    more = {"in each batch": [first, second], "from the second batch on": [second], "by one call more": [first]}
    a, b = ("b", "a") if differs == "by one call more" else ("a", "b")
    same(found[a], first, second)
    same(found[b], first, second, *(2 * x for x in more[differs]))


def test_layers_on_one_input_still_share_where_one_of_them_is_called_twice():
    net = Net(lambda a, b, x: a(x) + b(x) + a(2 * x) * 0 + b(2 * x))
    # equal numbers in another tensor
    assert observed(net, *X)["a"] is not observed(net, *X)["b"]

    def forward(a, b, x):
        twice = 2 * x
        return a(x) + b(x) + a(twice) + b(twice)

    found = observed(Net(forward), *X)
    assert found["a"] is found["b"]
    same(found["a"], *X, *(2 * x for x in X))


def test_a_loop_does_not_hold_what_it_was_given():
    alive = []

    def forward(a, b, x):
        seen = []
        for _ in range(5):
            x = a(b(x))
            seen.append(weakref.ref(x))
        alive.append(sum(ref() is not None for ref in seen))
        return x

    observed(Net(forward), X[0], X[1])
    # what leaves the loop
    assert alive == [1, 1]


def test_a_convolution_and_a_layer_on_one_tensor_do_not_share():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear = nn.Conv1d(5, 3, 1), nn.Linear(8, 3)

        def forward(self, x):
            return self.conv(x).mean() + self.linear(x).mean()

    x = torch.randn(2, 5, 8)
    found = observed(Both(), x)
    same(found["conv"], x.transpose(1, 2))
    same(found["linear"], x)


# ------------------------------------------------------------------------------------------------- nn.MultiheadAttention


def heads(module, query, key, value):
    """What the last matrix of an attention is multiplied with, in fp64, [N, S, E]; batch first."""
    d = {name: p.detach().double() for name, p in module.named_parameters()}
    packed = "in_proj_weight" in d
    weights = d["in_proj_weight"].chunk(3) if packed else [d[f"{n}_proj_weight"] for n in "qkv"]
    inputs = [t.double() for t in (query, key, value)]
    q, k, v = (linear(x, w, b) for x, w, b in zip(inputs, weights, d["in_proj_bias"].chunk(3), strict=True))
    q, k, v = (t.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    chance = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return (chance @ v).transpose(1, 2).flatten(2).float()


@pytest.mark.parametrize("given", ["x x x", "x y y", "x y z", "apart"])
def test_the_matrices_of_an_attention_see_what_they_multiply(given):
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            apart = {"kdim": 6, "vdim": 4} if given == "apart" else {}
            self.inner = nn.MultiheadAttention(8, 2, batch_first=True, **apart)
            nn.init.normal_(self.inner.in_proj_bias)
            y, z = (6, 4) if apart else (8, 8)
            self.y, self.z = torch.randn(4, 7, y), torch.randn(4, 7, z)

        def of(self, x):
            other = {"x x x": (x, x), "x y y": (self.y, self.y)}
            return (x, *other.get(given, (self.y, self.z)))

        def forward(self, x):
            return self.inner(*self.of(x), need_weights=False)[0]

    net, x = Attends().eval(), torch.randn(4, 5, 8)
    found = observed(net, x)
    names = ["q_proj_weight", "k_proj_weight", "v_proj_weight"] if given == "apart" else [
        f"in_proj_weight.{n}" for n in ("query", "key", "value")
    ]  # fmt: skip
    assert list(found) == [f"inner.{n}" for n in (*names, "out_proj")]
    for name, inputs in zip(names, net.of(x), strict=True):
        same(found[f"inner.{name}"], inputs)
    same(found["inner.out_proj"], heads(net.inner, *net.of(x)))
    assert (found[f"inner.{names[0]}"] is found[f"inner.{names[1]}"]) == (given == "x x x")


def test_a_watched_attention_gives_what_it_gives():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2)
    nn.init.normal_(attention.out_proj.bias)
    x = torch.randn(5, 4, 8)
    want = attention(x, x, x, need_weights=True)

    class Seen(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.gave = attention, None

        def forward(self, x):
            self.gave = self.inner(x, x, x, need_weights=True)
            return self.gave[0]

    net = Seen()
    observed(net, x)
    for got, wanted in zip(net.gave, want, strict=True):
        torch.testing.assert_close(got, wanted)


def test_the_fused_encoder_runs_step_by_step_while_it_is_observed():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.fused = nn.TransformerEncoder(layer, 2), []

        def forward(self, x):
            # hooks alone keep some versions of torch from the fused kernel
            self.fused.append(torch.backends.mha.get_fastpath_enabled())
            return self.inner(x)

    net, x = Encoder().eval(), torch.randn(4, 5, 8)
    found = observed(net, x)
    assert len(found) == 12
    assert all(stats.tokens == 20 for stats in found.values())
    assert net.fused == [False]
    assert torch.backends.mha.get_fastpath_enabled()


# ------------------------------------------------------------------------------------------- blocks that share weights


@pytest.mark.parametrize("shared", ["block", "weight"])
def test_a_weight_of_two_blocks_counts_what_both_are_given(shared):
    model, ids = tiny.make("llama"), torch.randint(0, 250, (4, 16))
    layers = model.model.layers
    if shared == "block":
        layers[1] = layers[0]
    else:
        layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    seen = []
    handles = [
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for module in {layers[0].mlp.up_proj, layers[1].mlp.up_proj}
    ]
    with torch.no_grad():
        # with a cache the two uses of a block would see each other's keys
        model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    (step,) = stream(model, [{"input_ids": ids}])
    name = "model.layers.0.mlp.up_proj"
    same(step.observe(step.layers, gram=True)[name], *seen)
    assert [layer.also for layer in step.layers if layer.name == name] == [("model.layers.1.mlp.up_proj",)]
    assert {layer.name.split(".")[0] for layer in step.layers} == {"model"}


def test_a_weight_that_is_also_outside_the_blocks_is_refused():
    model = tiny.make("llama")
    model.model.layers[1].mlp.up_proj.weight = model.lm_head.weight
    refused = {y.name: y.refused for step in stream(model, []) for y in step.layers if y.refused}
    assert refused == {"model.layers.1.mlp.up_proj": "lm_head.weight, outside the blocks, is the same weight"}
