import copy
import pickle
import threading

import pytest
import tiny
import torch
from tiny import pruned, tokens
from torch import nn

import secateurs
from secateurs.base.errors import PackError
from secateurs.kernels.formats import pack
from secateurs.kernels.packed_linear import DenseLinear, PackedLinear, SharedInput, choose
from secateurs.machine.profile import DeviceProfile


def test_a_profile_can_advise_against():
    weight = torch.randn(64, 64).masked_fill(torch.rand(64, 64) < 0.5, 0)
    rows = [{"dtype": "fp32", "sparsity": 0.5, "tokens": 1, "kernel": "bitmask_x", "speedup": 0.8}]
    slow = DeviceProfile("a slow machine", {}, 1.0, {}, rows, {})
    assert choose("layer", weight).format == "bitmask"
    choice = choose("layer", weight, slow)
    assert choice.format == "dense"
    assert "0.80x as fast as dense on a slow machine" in choice.reason
    # whoever wants bytes gets them
    small = choose("layer", weight, slow, optimize="size")
    assert (small.format, small.slower, small.nbytes) == ("bitmask", True, choice.least_nbytes)
    assert small.nbytes == pack(weight).nbytes < choice.nbytes
    assert small.reason.endswith("x the bytes, 0.80x as fast for one token on a slow machine")


def siblings():
    layers = [PackedLinear.of(pack(torch.randn(o, 64).masked_fill(torch.rand(o, 64) < 0.5, 0))) for o in (32, 16, 16)]
    alone = [copy.deepcopy(layer) for layer in layers]
    return layers, alone, SharedInput(layers)


def test_siblings_share_one_call(monkeypatch):
    layers, alone, _ = siblings()
    x = torch.randn(5, 64)
    want = [layer(x) for layer in alone]
    calls = []
    multiply = PackedLinear._multiply
    monkeypatch.setattr(PackedLinear, "_multiply", staticmethod(lambda ls, x: calls.append(len(ls)) or multiply(ls, x)))
    got = [layer(x) for layer in layers]
    assert calls == [3]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_changed_or_another_input_is_multiplied_again():
    layers, alone, group = siblings()
    x = torch.randn(5, 64)
    layers[0](x)
    x.mul_(2)
    assert torch.equal(layers[1](x), alone[1](x))
    y = torch.randn(5, 64)
    assert torch.equal(layers[2](y), alone[2](y))
    # the same layer twice on one input
    assert torch.equal(layers[2](y), alone[2](y))
    for layer in layers:
        layer(x)
    with torch.inference_mode():
        z = torch.randn(1, 64)
        layers[0](z)
        z.mul_(3)
        assert torch.equal(layers[1](z), alone[1](z))
    assert len(group.waiting) <= 1


def test_threads_do_not_take_each_other_s_results():
    layers, alone, _ = siblings()
    wrong = []

    def work(seed):
        for i in range(50):
            x = torch.randn(2, 64, generator=torch.Generator().manual_seed(seed * 1000 + i))
            for a, b in zip(layers, alone, strict=True):
                if not torch.equal(a(x), b(x)):
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_a_model_can_be_copied_and_pickled():
    model = pruned(tiny.make("llama"))
    secateurs.accelerate(model)
    with torch.no_grad():
        want = model(tokens())[0]
        twin = copy.deepcopy(model)
        again = pickle.loads(pickle.dumps(model))
        assert torch.equal(twin(tokens())[0], want)
        assert torch.equal(again(tokens())[0], want)
    layer, other = model.model.layers[0].self_attn.q_proj, twin.model.layers[0].self_attn.q_proj
    assert layer.group is not None
    assert other.group is not layer.group
    assert other.group.layers[0] is other


def test_a_cast_model_runs_in_the_new_dtype():
    model = pruned(tiny.make("llama"))
    secateurs.accelerate(model)
    model.to(torch.bfloat16)
    with torch.no_grad():
        assert model(tokens()).logits.dtype == torch.bfloat16


def test_compile_traces_through():
    model = nn.Sequential(PackedLinear.of(pack(torch.eye(64))), nn.ReLU(), PackedLinear.of(pack(torch.eye(64))))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 64)
    assert torch.equal(compiled(x), model(x))
    x.requires_grad_(True)
    compiled(x).sum().backward()
    assert torch.equal(x.grad, (x > 0).float())


def test_only_the_cpu():
    model = nn.Sequential(nn.Linear(64, 64, device="meta"))
    with pytest.raises(PackError, match="0 is on meta; the kernels run on the CPU"):
        secateurs.accelerate(model)


@pytest.mark.parametrize("loaded", ["before", "under inference mode"])
def test_a_model_that_was_packed_under_inference_mode_runs_outside_it(loaded):
    def made():
        torch.manual_seed(0)
        return pruned(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), 0.75)

    x = torch.randn(3, 64)
    with torch.inference_mode(loaded != "before"):
        model = made()
        want = model(x)
    with torch.inference_mode():
        secateurs.accelerate(model)
        torch.testing.assert_close(model(x), want)
    assert isinstance(model[0], PackedLinear)
    # a change of it would be noticed
    assert not model[0].weight_mask.is_inference()
    for context in (torch.no_grad, torch.enable_grad):
        with context():
            torch.testing.assert_close(model(x), want)
    # what was made under inference mode has no version to go by
    with torch.inference_mode():
        layer = PackedLinear.of(pack(torch.eye(64)))
    torch.testing.assert_close(layer(x), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_by_the_input_is_that_of_the_dense_layers(dtype):
    model = pruned(tiny.make("llama", dtype)).model.layers[0].mlp
    packed = copy.deepcopy(model)
    secateurs.accelerate(packed)
    assert packed.gate_proj.group is not None
    x = torch.randn(2, 5, 32).to(dtype)
    wanted = torch.randn(2, 5, 32).to(dtype)
    found = []
    for module in (model, packed):
        given = x.clone().requires_grad_(True)
        module(given).backward(wanted)
        found.append(given.grad)
    assert found[1].abs().sum() > 0
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(found[1], found[0], **close)


def test_one_of_the_layers_on_an_input_is_run_back_without_the_others():
    model = pruned(nn.ModuleDict({"gate_proj": nn.Linear(64, 8), "up_proj": nn.Linear(64, 8)}), 0.75)
    weights = [model[name].weight.detach().clone() for name in ("gate_proj", "up_proj")]
    secateurs.accelerate(model)
    x = torch.randn(3, 64, requires_grad=True)
    for name, weight in zip(("gate_proj", "up_proj"), weights, strict=True):
        (gradient,) = torch.autograd.grad(model[name](x).sum(), x)
        torch.testing.assert_close(gradient, weight.sum(0).expand(3, 64))


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_what_cannot_be_trained_says_so_in_the_backward_pass(name):
    model = pruned(nn.Sequential(nn.Linear(64, 64)), 0.75)
    secateurs.accelerate(model)
    model[0].get_parameter(name).requires_grad_(True)
    y = model(torch.randn(3, 64))
    with pytest.raises(PackError, match=r"weights and biases of a packed layer cannot be trained.*make_dense"):
        y.sum().backward()


def test_a_dense_layer_s_bias_gets_its_gradient():
    model = nn.Sequential(nn.Linear(64, 8))
    secateurs.accelerate(model)
    assert isinstance(model[0], DenseLinear)
    model[0].weight.requires_grad_(False)
    model(torch.randn(3, 64)).sum().backward()
    assert model[0].bias.grad.tolist() == [3.0] * 8
