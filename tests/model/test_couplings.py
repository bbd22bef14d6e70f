"""Whose outputs are whose inputs: expected by hand from what each class's code does with its projections."""

import pytest
import tiny
import torch

from secateurs.model import couplings
from secateurs.model.blocks import blocks_of, inside
from secateurs.model.discover import layout_of
from secateurs.model.layers import layers_of
from secateurs.model.made_up import inputs

_SIZES = {"vocab_size": 260, "hidden_size": 32, "num_hidden_layers": 2}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
_OTHERS = {
    "bloom": ("BloomForCausalLM", {"vocab_size": 260, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon": ("FalconForCausalLM", {**_SIZES, "num_attention_heads": 4, "multi_query": True}),
    "gpt_oss": (
        "GptOssForCausalLM",
        {**_SIZES, **_HEADS, "head_dim": 8, "intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "bitnet": ("BitNetForCausalLM", {**_SIZES, **_HEADS, "intermediate_size": 64}),
}


def make(model_type):
    if model_type not in _OTHERS:
        return tiny.make(model_type)
    import transformers

    cls, sizes = _OTHERS[model_type]
    config = transformers.AutoConfig.for_model(model_type, **sizes)
    torch.manual_seed(0)
    return getattr(transformers, cls)(config).eval()


# {consumer: {producer: rows of input 5}} of an MLP, and of input 25 of attention: channel 1 of head 3, which with two KV heads
# is channel 1 of the second
EXPECTED = {
    "llama": (
        {"mlp.down_proj": {"mlp.gate_proj": [5], "mlp.up_proj": [5]}},
        {"self_attn.o_proj": {"self_attn.v_proj": [8 + 1]}},
    ),
    # queries 32, keys 32, values 32
    "gpt2": ({"mlp.c_proj": {"mlp.c_fc": [5]}}, {"attn.c_proj": {"attn.c_attn": [64 + 25]}}),
    # for each head query 8, key 8, value 8
    "gpt_neox": (
        {"mlp.dense_4h_to_h": {"mlp.dense_h_to_4h": [5]}},
        {"attention.dense": {"attention.query_key_value": [3 * 24 + 16 + 1]}},
    ),
    "bloom": (
        {"mlp.dense_4h_to_h": {"mlp.dense_h_to_4h": [5]}},
        {"self_attention.dense": {"self_attention.query_key_value": [3 * 24 + 16 + 1]}},
    ),
    # queries 32, keys 16, values 16; gate 64, up 64
    "phi3": (
        {"mlp.down_proj": {"mlp.gate_up_proj": [5, 64 + 5]}},
        {"self_attn.o_proj": {"self_attn.qkv_proj": [48 + 8 + 1]}},
    ),
    # four queries of 8, one key, one value
    "falcon": (
        {"mlp.dense_4h_to_h": {"mlp.dense_h_to_4h": [5]}},
        {"self_attention.dense": {"self_attention.query_key_value": [40 + 1]}},
    ),
    "bert": (
        {"output.dense": {"intermediate.dense": [5]}},
        {"attention.output.dense": {"attention.self.value": [25]}},
    ),
    "opt": ({"fc2": {"fc1": [5]}}, {"self_attn.out_proj": {"self_attn.v_proj": [25]}}),
    "mixtral": (
        {f"mlp.experts.down_proj.{e}": {f"mlp.experts.gate_up_proj.{e}": [5, 64 + 5]} for e in range(4)},
        {"self_attn.o_proj": {"self_attn.v_proj": [8 + 1]}},
    ),
    # gate and up take turns
    "gpt_oss": (
        {f"mlp.experts.down_proj.{e}": {f"mlp.experts.gate_up_proj.{e}": [10, 11]} for e in range(4)},
        {"self_attn.o_proj": {"self_attn.v_proj": [8 + 1]}},
    ),
    # a norm over all neurons, and one over all heads, stand before the consumers
    "bitnet": ({}, {}),
}


def maps(found, prefix, channel):
    def short(layer):
        return layer.name.removeprefix(prefix)

    return {
        short(c.consumer): {short(p): sorted(c.rows(i)[:, channel].tolist()) for i, p in enumerate(c.producers)}
        for c in found
    }


@pytest.mark.parametrize("model_type", EXPECTED)
def test_rows_of_a_block_feed_the_inputs_that_its_code_says(model_type):
    model = make(model_type)
    prefix = f"{blocks_of(model)[0][0]}."
    found = [c for c in tiny.couplings(model) if c.consumer.name.startswith(prefix)]
    mlp, attention = EXPECTED[model_type]
    assert maps([c for c in found if c.width is None], prefix, 5) == mlp
    assert maps([c for c in found if c.width is not None], prefix, 25) == attention
    assert all(c.width in (None, 8) for c in found)


@pytest.mark.parametrize("model_type", ["gpt_oss", "gpt2", "falcon"])
def test_what_is_reordered_gives_what_it_gave_in_the_whole_model(model_type):
    """On the model itself, not on the small instance that the check is done on."""
    model = make(model_type)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
        ids = torch.arange(40).reshape(2, 20) * 5
        before = model(ids)[0]
        for coupling in tiny.couplings(model):
            moved = coupling.reorder(couplings._random_order(coupling))
            assert all(name in dict(model.named_parameters()) for name in moved)
        torch.testing.assert_close(model(ids)[0], before, rtol=1e-4, atol=1e-4)


WRONG = {
    # up alone, without its gate
    "the gate stays": couplings.Rule("mlp.down_proj", (("mlp.up_proj", "stacked"),)),
    # queries move, keys stay
    "queries are no values": couplings.Rule(
        "self_attn.o_proj", (("self_attn.q_proj", "stacked"),), "self_attn:head_dim"
    ),
    # across heads, each of which has weights of its own
    "heads are left": couplings.Rule("self_attn.out_proj", (("self_attn.v_proj", "stacked"),)),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_coupling_is_not_restored_and_so_not_used(name):
    small = make("opt" if name == "heads are left" else "llama")
    layout = layout_of(small)
    blocks = {n: (small.get_submodule(n), layers_of(small.get_submodule(n), n)) for n in inside(small, layout)}
    before = {n: p.clone() for n, p in small.named_parameters()}
    why = couplings._wrong(small, WRONG[name], blocks, inputs(small)[0])
    assert why == "reordered, the model gives another ['logits']"
    assert all(torch.equal(p, before[n]) for n, p in small.named_parameters()), "it is left as it was"


def test_a_coupling_that_no_output_shows_is_not_used():
    small = make("llama")
    for block in small.model.layers:
        block.mlp.down_proj.weight.data.zero_()
    found = couplings.find(small, layout_of(small), inputs(small)[0])
    assert found.refused["mlp.down_proj"] == "no output changes with the order of its inputs"
    assert [rule.consumer for rules in found.rules.values() for rule in rules] == ["self_attn.o_proj"]


def test_sizes_that_do_not_fit_are_left_out():
    """A live module may differ from what its config says; here rows of gate and up were cut by hand, and down's inputs not."""
    model = make("llama")
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(32, 60, bias=False)
    layout, found = layout_of(make("llama")), couplings.couplings_of(make("llama"))
    block = model.get_submodule("model.layers.0")
    left = found.of("model.layers.0", block, layers_of(block, "model.layers.0", layout.experts), model.config)
    assert [c.consumer.name for c in left] == ["model.layers.0.self_attn.o_proj"]


def test_what_is_found_is_kept_and_a_module_without_a_config_has_none(monkeypatch):
    model = make("llama")
    first = couplings.couplings_of(model)
    monkeypatch.setattr(couplings, "miniature", lambda _: pytest.fail("it was made again"))
    assert couplings.couplings_of(model) is first
    assert couplings.couplings_of(torch.nn.Sequential(torch.nn.Linear(4, 4))).rules == {}
