import pytest
import tiny
import torch
import transformers
from tiny import pruned, tokens
from torch import nn
from torch.nn.utils import prune

import secateurs
from secateurs.kernels.packed_embedding import make_dense
from secateurs.kernels.packed_linear import DenseLinear, PackedLinear
from secateurs.model.miniature import small_instance


@pytest.mark.parametrize("model_type", tiny.TINY)
def test_accelerate_changes_the_layers_and_not_the_answers(model_type):
    model = pruned(tiny.make(model_type))
    with torch.no_grad():
        want = model(tokens())[0]
        state = {k: v.clone() for k, v in model.state_dict().items()}
        choices = secateurs.accelerate(model)
        got = model(tokens())[0]
    assert any(isinstance(m, PackedLinear) for m in model.modules())
    assert any(c.format == "bitmask" for c in choices)
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)
    make_dense(model)
    assert not any(isinstance(m, PackedLinear | DenseLinear) for m in model.modules())
    back = model.state_dict()
    assert state.keys() == back.keys()
    assert all(torch.equal(state[k], back[k]) for k in state)


def test_a_dense_layer_stays_dense_and_says_why():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight.data.masked_fill_(torch.rand(64, 64) < 0.7, 0)
    first, second = secateurs.accelerate(model)
    assert (first.format, second.format) == ("dense", "bitmask")
    assert "0.0% zeros: packed it would take" in first.reason
    assert isinstance(model[0], DenseLinear)
    assert second.nbytes < second.dense_nbytes


def test_a_tied_head_is_left_alone():
    model = pruned(tiny.make("llama"))
    model.lm_head.weight = model.model.embed_tokens.weight
    choices = {c.name: c for c in secateurs.accelerate(model)}
    assert choices["lm_head"].format == "dense"
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_tied_head_with_zeros_is_left_alone_too():
    """Packed it would be smaller, but the embeddings need the matrix."""
    model = tiny.make("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    choices = {c.name: c for c in secateurs.accelerate(pruned(model))}
    assert (choices["lm_head"].format, choices["lm_head"].reason) == ("dense", "shared weight")
    assert choices["lm_head"].sparsity > 0.4
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_layers_of_a_fused_encoder_stay_dense():
    torch.manual_seed(0)
    model = pruned(nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 2, 64, batch_first=True), 1), 0.75)
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        want = model(x)
        choices = secateurs.accelerate(model)
        torch.testing.assert_close(model(x), want)
    assert [(c.format, c.reason) for c in choices] == [
        ("dense", "nn.TransformerEncoderLayer multiplies by it in a fused kernel")
    ] * 2
    assert all(c.nbytes == c.dense_nbytes for c in choices)


def test_a_weight_that_is_computed_stays_as_it_is():
    model = nn.Sequential(prune.l1_unstructured(nn.Linear(64, 64), "weight", 0.75))
    x = torch.randn(3, 64)
    want = model(x)
    (choice,) = secateurs.accelerate(model)
    assert (choice.format, choice.reason) == ("dense", "its weight is computed from other parameters")
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), want)


@pytest.mark.parametrize(
    ("architecture", "fields", "layer"),
    [
        ("MambaForCausalLM", {"hidden_size": 64, "state_size": 8, "time_step_rank": 64, "num_hidden_layers": 1}, "dt_proj"),
        ("LongcatFlashForCausalLM", {"num_layers": 1}, "router.classifier"),
    ],
)  # fmt: skip
def test_a_layer_whose_weight_the_code_reads_stays_dense(architecture, fields, layer):
    cls = getattr(transformers, architecture)
    model = pruned(small_instance(cls, cls.config_class(vocab_size=200, **fields)), 0.9)
    with torch.no_grad():
        want = model(tokens(), use_cache=False)[0]
        choices = secateurs.accelerate(model)
        torch.testing.assert_close(model(tokens(), use_cache=False)[0], want, rtol=1e-4, atol=1e-5)
    read = [c for c in choices if c.reason == "the model's code reads its weight itself"]
    assert read
    assert all(c.name.endswith(layer) and c.format == "dense" and c.nbytes == c.dense_nbytes for c in read)
    assert any(c.format == "bitmask" for c in choices)


def test_an_empty_layer_stays_dense():
    choices = secateurs.accelerate(nn.Sequential(nn.Linear(0, 8), nn.Linear(8, 0)))
    assert [(c.format, c.sparsity) for c in choices] == [("dense", 1.0)] * 2
