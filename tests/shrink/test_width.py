"""Channels of the residual stream."""

import json
import re
from dataclasses import replace

import pytest
import tiny
import torch
from test_shrink import plan

from secateurs import Stats
from secateurs.model.batches import batched
from secateurs.shrink import width
from secateurs.shrink.cuts import cuts_of
from secateurs.shrink.run import shrink

MODELS = ["llama", "mistral", "qwen2", "qwen3", "phi3"]
WINDOWS = torch.randint(0, 250, (6, 24), generator=torch.Generator().manual_seed(1))


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=WINDOWS).logits


@pytest.mark.parametrize("model_type", MODELS)
def test_channels_that_nobody_writes_can_go(model_type):
    """Norms divide by another mean and are scaled for it; the config alone makes the smaller model."""
    import transformers

    model = tiny.make(model_type).eval()
    cuts = cuts_of(model)
    stream = cuts.stream
    # tiny hidden states are not far from it
    model.config.rms_norm_eps = 1e-9
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1e-9
    gone = torch.tensor([1, 7, 20, 31])
    with torch.no_grad():
        model.get_input_embeddings().weight[:, gone] = 0
        for block in model.model.layers:
            for norm in (block.input_layernorm, block.post_attention_layernorm):
                norm.weight.uniform_(0.5, 2)
            for writer in (block.self_attn.o_proj, block.mlp.down_proj):
                for parameter in writer.parameters():
                    parameter[gone] = 0
    expected = logits(model)
    before = cuts.shape
    count = sum(p.numel() for p in model.parameters())
    found = width.readers(model, stream, batched(WINDOWS), {}, lambda: None)
    # they go first, because nothing is lost
    order, losses = width.removal(found, 4, 1e-4)
    assert set(order.tolist()) == set(gone.tolist())
    assert float(losses[3]) < 1e-3 * float(width.removal(found, 8, 1e-4)[1][7])
    width.cut(model, found, gone, 1e-4, refit=False)
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-4)
    stated = cuts.stated(model.config.to_dict(), replace(before, hidden=28), range(before.layers))
    fresh = getattr(transformers, tiny.TINY[model_type][0])(type(model.config)(**stated))
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(fresh), expected, rtol=1e-3, atol=1e-4)
    assert sum(p.numel() for p in fresh.parameters()) < count


def test_refit_brings_the_readers_nearer():
    dense = tiny.make("llama")
    stream = cuts_of(dense).stream
    expected = logits(dense).log_softmax(-1)
    found = {}
    for refit in (True, False):
        model = tiny.make("llama").eval()
        reading = width.readers(model, stream, batched(WINDOWS), {}, lambda: None)
        removed, _ = width.removal(reading, 6, 1e-3)
        width.cut(model, reading, removed, 1e-3, refit)
        got = logits(model).log_softmax(-1)
        found[refit] = float((expected.exp() * (expected - got)).sum(-1).mean())
    assert found[True] < found[False]


@pytest.mark.parametrize("units_of", [("hidden",), ("hidden", "mlp", "heads", "layers")])
def test_a_narrow_model_reloads(units_of, tmp_path, llama, words, elsewhere):
    report = shrink(plan(llama, words, "params=0.8x", units=units_of), tmp_path / "run")
    left = report["left"]
    if units_of == ("hidden",):
        assert left["hidden"] < report["dense"]["hidden"]
    assert elsewhere.reload(tmp_path / "run" / "model")[0] == left["parameters"] <= 0.8 * report["dense"]["parameters"]
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["hidden_size"] == left["hidden"]


def test_what_cannot_be_narrowed_is_refused():
    for name in ("gpt2", "gemma2", "opt", "mixtral"):
        why = cuts_of(tiny.make(name)).refuses("hidden")
        assert re.search("norms? with weights alone|experts read the residual stream", why), name


def test_a_norm_is_rescaled_by_the_share_that_stays():
    # mean squares of x / rms(x) of 1, 2, 3 and 2, ten tokens, seen after weights of 1, 2, 1 and 1
    stats = Stats(10, torch.tensor([10.0, 80.0, 30.0, 20.0]))
    # 5 of 8 stay, on 2 of 4 channels
    found = width.rescaled(torch.tensor([1.0, 2.0, 1.0, 1.0]), stats, torch.tensor([1, 2]))
    torch.testing.assert_close(found, torch.tensor([2.0, 1.0]) * (4 * 5 / 8 / 2) ** 0.5)
