import sys

import pytest
import tiny
import torch
from torch.testing import assert_close

from secateurs.model import blocks
from secateurs.model.activations import InMemory
from secateurs.model.blocks import AllLoaded, blocks_of
from secateurs.model.layers import layers_of
from secateurs.model.miniature import small_instance
from secateurs.model.walk import stream
from secateurs.prune.sensitivity import sensitivity

# the module, beside its function of that name
SENSITIVITY = sys.modules["secateurs.prune.sensitivity"]
BATCHES = [{"input_ids": torch.arange(24).reshape(2, 12) * 7}, {"input_ids": torch.arange(12)[None] * 3}]


def by_one_backward(model, seed):
    """The same sums from one backward pass through the whole model, with the same drawn tokens."""
    generator = torch.Generator().manual_seed(seed)
    sums, tokens, handles = {}, {}, []

    def watch(name):
        def hook(module, args, out):
            out = out[0] if isinstance(out, tuple) else out

            def add(gradient):
                rows = gradient.reshape(-1, gradient.shape[-1])
                sums[name] = sums.get(name, 0) + rows.square().sum(0)
                tokens[name] = tokens.get(name, 0) + len(rows)

            out.register_hook(add)

        return hook

    for i, block in enumerate(model.model.layers):
        for layer in layers_of(block, f"model.layers.{i}"):
            handles.append(layer.module.register_forward_hook(watch(layer.name)))
    for batch in BATCHES:
        logits = model(**batch, use_cache=False).logits
        flat = logits.reshape(-1, logits.shape[-1])
        # the first word whose running sum of chances exceeds the number drawn
        uniform = torch.rand(logits.shape[:2], generator=generator).reshape(-1, 1)
        drawn = (flat.detach().double().softmax(-1).cumsum(-1) <= uniform).sum(-1, keepdim=True)
        (-flat.log_softmax(-1).gather(1, drawn).sum()).backward()
    for handle in handles:
        handle.remove()
    return {name: total / tokens[name] for name, total in sums.items()}


@pytest.mark.parametrize("pieces", [1, 1 << 26])
def test_the_walk_back_equals_one_backward_pass(pieces, monkeypatch):
    """However many logits are made at a time."""
    monkeypatch.setattr(blocks, "LOGITS", pieces)
    monkeypatch.setattr(SENSITIVITY, "_LOGITS", pieces)
    model = tiny.make("llama")
    got, norms = sensitivity(model, BATCHES, AllLoaded(), InMemory(), seed=3)
    want = by_one_backward(model, 3)
    assert len(want) == 3 * 7
    # what the MLP gives is added to what leaves the block
    for block in range(3):
        name = f"model.layers.{block}"
        assert_close(got.pop(name), want[f"{name}.mlp.down_proj"], rtol=1e-3, atol=1e-9)
    assert got.keys() == want.keys()
    for name in want:
        assert_close(got[name], want[name], rtol=1e-3, atol=1e-9)
    # norms are what a plain pass sees
    for step in stream(model, BATCHES):
        for name, stats in step.observe(step.layers, gram=False).items():
            assert_close(norms[name].sqnorm_I, stats.sqnorm_I)
            assert norms[name].tokens == stats.tokens


def test_of_embeddings_it_is_the_gradient_along_a_drawn_direction():
    model, generator = tiny.make("bert base"), torch.Generator().manual_seed(3)

    def embed(output, batch):
        return torch.nn.functional.normalize(output.last_hidden_state.mean(1), dim=-1)

    got, norms = sensitivity(model, BATCHES, AllLoaded(), InMemory(), seed=3, embed=embed)
    outputs, want, tokens = {}, {}, 0
    for batch in BATCHES:
        layers = {
            n: m for n, m in model.named_modules() if n.startswith("encoder.layer") and isinstance(m, torch.nn.Linear)
        }
        handles = [m.register_forward_hook(lambda _, __, out, n=n: outputs.update({n: out})) for n, m in layers.items()]
        vector = embed(model(**batch), batch)
        direction = torch.randn(vector.shape, generator=generator)
        for name, gradient in zip(
            layers, torch.autograd.grad(vector, [outputs[n] for n in layers], direction), strict=True
        ):
            want[name] = want.get(name, 0) + gradient.reshape(-1, gradient.shape[-1]).square().sum(0)
        tokens += batch["input_ids"].numel()
        for handle in handles:
            handle.remove()
    assert len(want) == 18
    assert set(norms) == set(want)
    for name in want:
        assert_close(got[name], want[name] / tokens, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("name", ["vit", "convnext"])
def test_of_a_classifier_it_is_of_a_drawn_class_of_each_input(name):
    import others

    model = others.make(name)
    batch = {"pixel_values": torch.randn(3, 3, 16, 16)}
    got, _ = sensitivity(model, [batch], AllLoaded(), InMemory(), seed=3)
    convolution = torch.nn.Conv2d
    layers = {n: m for n, m in model.named_modules() if n in got and isinstance(m, torch.nn.Linear | convolution)}
    outputs = {}
    handles = [m.register_forward_hook(lambda _, __, out, n=n: outputs.update({n: out})) for n, m in layers.items()]
    logits = model(**batch).logits
    for handle in handles:
        handle.remove()
    # the numbers are drawn for all positions of what leaves the last block, and the first of an input counts
    left = {"vit": (3, 17), "convnext": (3, 32)}[name]
    uniform = torch.rand(left, generator=torch.Generator().manual_seed(3))[:, :1]
    drawn = (logits.detach().double().softmax(-1).cumsum(-1) <= uniform).sum(-1, keepdim=True)
    loss = -logits.log_softmax(-1).gather(1, drawn).sum()
    assert len(layers) == {"vit": 18, "convnext": 7}[name]
    for (n, m), gradient in zip(layers.items(), torch.autograd.grad(loss, [outputs[n] for n in layers]), strict=True):
        rows = gradient.movedim(1, -1) if isinstance(m, convolution) else gradient
        assert_close(got[n], rows.reshape(-1, rows.shape[-1]).square().mean(0), rtol=1e-3, atol=1e-9)


def test_words_are_drawn_by_their_chances():
    chance = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]).expand(6, -1)
    uniform = torch.tensor([0.0, 0.1, 0.249, 0.25, 0.9, 1 - 2**-24])
    assert SENSITIVITY.draw(chance, uniform).tolist() == [1, 1, 1, 3, 3, 3]
    # chances need not sum to one, and none beyond the last is drawn
    assert SENSITIVITY.draw(chance[:1] * 0.5, uniform[-1:]).tolist() == [3]


def test_it_is_the_curvature_of_the_kl_divergence():
    """An error d in one output raises KL(dense || perturbed) by about E[g^2] d^2 / 2 a token."""
    model = tiny.make("llama")
    generator = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(0, 250, (64, 16), generator=generator)} for _ in range(4)]
    found, _ = sensitivity(model, batches, AllLoaded(), InMemory())
    last = model.model.layers[2].mlp.down_proj
    output, size = 5, 0.02
    with torch.no_grad():
        dense = [model(**b).logits.log_softmax(-1) for b in batches]
        sign = torch.randint(0, 2, (64, 16), generator=generator) * 2.0 - 1
        handle = last.register_forward_hook(
            lambda m, a, out: out + size * sign[..., None] * torch.eye(out.shape[-1])[output]
        )
        perturbed = [model(**b).logits.log_softmax(-1) for b in batches]
        handle.remove()
    kl = torch.stack([(d.exp() * (d - p)).sum(-1).mean() for d, p in zip(dense, perturbed, strict=True)]).mean()
    # after the last attention only a token's own prediction sees the error
    want = float(found["model.layers.2.mlp.down_proj"][output]) * size**2 / 2
    assert float(kl) == pytest.approx(want, rel=0.25)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt2", "opt", "gemma2", "bert"])
def test_every_layer_that_is_used_has_one(model_type):
    model = tiny.make(model_type)
    found, _ = sensitivity(model, BATCHES, AllLoaded(), InMemory())
    names, experts = blocks_of(model)
    wanted = {layer.name for name in names for layer in layers_of(model.get_submodule(name), name, experts)}
    assert set(names) <= set(found) <= wanted | set(names)
    # an expert that no token reached has none
    assert all(".experts." in name for name in wanted - set(found))
    assert len(found) > len(wanted) / 2
    assert all(torch.isfinite(v).all() and bool((v >= 0).all()) for v in found.values())


def test_a_model_without_logits_has_none():
    assert sensitivity(tiny.make("bert base"), BATCHES, AllLoaded(), InMemory()) == ({}, {})


def test_what_the_way_back_has_passed_is_dropped():
    store = InMemory()
    sensitivity(tiny.make("llama"), BATCHES, AllLoaded(), store)
    assert store.read(0, 0).shape == (2, 12, 32)
    for block in (1, 2, 3):
        with pytest.raises(KeyError):
            store.read(block, 0)


def test_a_router_that_gives_more_than_its_products_has_none():
    import transformers

    model = small_instance(transformers.Llama4ForCausalLM, transformers.Llama4TextConfig())
    found, _ = sensitivity(model, BATCHES, AllLoaded(), InMemory())
    routers = [name for name, module in model.named_modules() if type(module).__name__ == "Llama4Router"]
    assert routers
    assert not found.keys() & {*routers}
    assert "model.layers.0.self_attn.q_proj" in found
