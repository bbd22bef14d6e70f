"""What can be cut is found out by trying: which rows go, which fields state it, and what is refused."""

import copy
from dataclasses import replace

import pytest
import tiny
import torch

from secateurs.base.errors import PlanError
from secateurs.model.discover import layout_of
from secateurs.shrink import config as stating
from secateurs.shrink.cuts import Cuts, cuts_of
from secateurs.shrink.units import Heads, Neurons, No, Shape

GATED = Neurons("mlp.down_proj", (("mlp.gate_proj", "stacked"), ("mlp.up_proj", "stacked")))
QKVO = Heads(
    "self_attn.o_proj", {"self_attn.q_proj": (True,), "self_attn.k_proj": (False,), "self_attn.v_proj": (False,)}
)

# by hand: where the neurons are and the field of their number, where heads are that can go, and the field of the number of blocks
BY_HAND = {
    "llama": (GATED, "intermediate_size", QKVO, "num_hidden_layers"),
    "qwen3": (GATED, "intermediate_size", QKVO, "num_hidden_layers"),
    "gemma2": (GATED, "intermediate_size", QKVO, "num_hidden_layers"),
    "phi3": (
        Neurons("mlp.down_proj", (("mlp.gate_up_proj", "stacked"),)), "intermediate_size",
        Heads("self_attn.o_proj", {"self_attn.qkv_proj": (True, False, False)}), "num_hidden_layers",
    ),
    "opt": (Neurons("fc2", (("fc1", "stacked"),)), "ffn_dim", None, "num_hidden_layers"),
    "gpt2": (Neurons("mlp.c_proj", (("mlp.c_fc", "stacked"),)), "n_inner", None, "n_layer"),
    "gpt_neox": (
        Neurons("mlp.dense_4h_to_h", (("mlp.dense_h_to_4h", "stacked"),)), "intermediate_size", None, "num_hidden_layers",
    ),
    "bert": (Neurons("output.dense", (("intermediate.dense", "stacked"),)), "intermediate_size", None, "num_hidden_layers"),
    "mixtral": (None, None, QKVO, "num_hidden_layers"),
}  # fmt: skip


@pytest.mark.parametrize("model_type", BY_HAND)
def test_units_and_the_fields_that_state_them(model_type):
    neurons, width, heads, depth = BY_HAND[model_type]
    cuts = cuts_of(tiny.make(model_type))
    for kind, rule in (("mlp", neurons), ("heads", heads)):
        assert (cuts.refuses(kind) is None) == (rule is not None), cuts.refuses(kind)
        if rule:
            assert cuts._way(kind).rule == rule
    if width:
        assert cuts._way("mlp").fields == {"mlp": (width,)}
    if heads:
        fields = {name for names in cuts._way("heads").fields.values() for name in names}
        assert fields == {"num_attention_heads", "num_key_value_heads", "head_dim"}
    assert list(cuts.depth) == [depth]


def test_what_cannot_go_is_refused_in_a_sentence():
    opt, mixtral = cuts_of(tiny.make("opt")), cuts_of(tiny.make("mixtral"))
    assert opt.refuses("heads").startswith("this opt's config cannot state fewer heads of the same width")
    assert opt.refuses("queries") == "every KV head of this opt has one query head"
    assert opt.refuses("experts") == "this opt has no experts in fused parameters"
    assert mixtral.refuses("mlp") == "the MLPs of this mixtral's blocks are experts, whose neurons are not cut"
    assert mixtral.refuses("experts") is None
    with pytest.raises(PlanError, match="units heads: this opt's config"):
        opt.units("heads", None, "", opt.shape)


def made(model_type, **arguments):
    import transformers

    config = transformers.AutoConfig.for_model(
        model_type, vocab_size=tiny.VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **arguments
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config)


def test_heads_whose_place_counts_are_not_cut():
    """Bloom's slopes go by the place of a head, and its MLPs are four times as wide as its hidden states."""
    cuts = cuts_of(made("bloom"))
    assert cuts.refuses("heads").startswith("this bloom's config cannot state fewer heads")
    assert cuts.refuses("mlp") == "this bloom's config cannot state the width of its MLPs"
    assert cuts.refuses("layers") is None


def test_a_norm_over_all_heads_keeps_them():
    cuts = cuts_of(made("olmo2", intermediate_size=64, num_key_value_heads=2))
    assert "heads" in cuts.refuses("heads")
    assert cuts.refuses("mlp") is None


def test_a_wrong_row_or_a_wrong_field_is_noticed():
    small = cuts_of(tiny.make("llama")).small
    number = small.layers(0)["mlp.down_proj"].shape[1]
    gone = torch.arange(number // 2)
    expected, smaller = small.without("mlp", GATED, Shape(0, number, 1), gone)
    small.check({"intermediate_size": number // 2}, smaller, expected)
    with pytest.raises(No, match=r"gate_proj.weight is not"):
        small.check({"intermediate_size": number // 4}, smaller, expected)
    # the rows of gate are not those of up
    wrong = copy.deepcopy(smaller)
    gate = wrong.model.layers[1].mlp.gate_proj.weight
    gate.data = gate.data.roll(1, 0)
    with pytest.raises(No, match="what is left gives other outputs"):
        small.check({"intermediate_size": number // 2}, wrong, expected)
    # without one of the two, shapes do not fit
    _, odd = small.without("mlp", replace(GATED, producers=GATED.producers[1:]), Shape(0, number, 1), gone)
    with pytest.raises(No, match=r"gate_proj.weight is not"):
        small.check({"intermediate_size": number // 2}, odd, expected)


def test_rows_are_found_at_the_real_size():
    """Heads are 16 wide; those of the small instance are not."""
    model = made("llama", intermediate_size=80, num_key_value_heads=2, head_dim=16)
    cuts, name = Cuts(model), "model.layers.0"
    heads = cuts.units("heads", model.get_submodule(name), name, cuts.shape)
    assert (cuts.shape, cuts.head) == (Shape(2, 80, 2, 2, 0, 32), 16)
    rows = {layer.name.rpartition(".")[2]: rows.tolist() for layer, rows in heads.rows}
    assert rows["q_proj"] == [list(range(32)), list(range(32, 64))]
    assert rows["k_proj"] == rows["v_proj"] == [list(range(16)), list(range(16, 32))]
    assert heads.groups_GC.tolist() == rows["q_proj"]


def test_fields_are_written_as_the_file_has_them():
    """num_local_experts is what transformers reads from num_experts, and the number of blocks shortens lists."""
    moe = cuts_of(tiny.make("qwen3_moe"))
    fewer = moe.stated({"num_experts": 4, "other": 1}, replace(moe.shape, experts=3), range(3))
    assert fewer == {"num_experts": 3, "other": 1}
    gemma = cuts_of(tiny.make("gemma3_text"))
    short = gemma.stated(gemma.config.to_dict(), replace(gemma.shape, layers=2), [0, 2])
    assert (short["num_hidden_layers"], short["layer_types"]) == (2, ["sliding_attention", "sliding_attention"])
    config = copy.deepcopy(gemma.config)
    stating.change(config, {"num_hidden_layers": 2}, [1, 2])
    assert (config.num_hidden_layers, config.layer_types) == (2, ["full_attention", "sliding_attention"])


def test_fields_of_parts_have_the_part_s_name():
    import transformers

    config = transformers.AutoConfig.for_model(
        "gemma3", text_config={"intermediate_size": 77, "model_type": "gemma3_text"}
    )
    assert stating.fields_with(config, 77) == ["text_config.intermediate_size"]
    out = stating.changed({"text_config": {"intermediate_size": 77}}, config, {"text_config.intermediate_size": 7})
    assert out == {"text_config": {"intermediate_size": 7}}


def test_a_model_of_several_lists_is_refused():
    import transformers

    config = transformers.T5Config(vocab_size=260, d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4)
    model = transformers.T5ForConditionalGeneration(config).eval()
    assert len(layout_of(model).lists) == 2
    with pytest.raises(PlanError, match="T5ForConditionalGeneration cannot be shrunk"):
        cuts_of(model)


def test_blocks_whose_kinds_the_class_corrects_cannot_stay_alone():
    """Gemma 4's last block attends to all that came before, whatever its config says."""
    import transformers

    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    config = transformers.Gemma4TextConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, global_head_dim=8, layer_types=kinds, hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=tiny.VOCABULARY, num_kv_shared_layers=0,
    )  # fmt: skip
    cuts = cuts_of(transformers.Gemma4ForCausalLM(config).eval())
    assert cuts.refuses("layers") is None
    assert [cuts.may_keep(kept) for kept in ([0, 1], [1, 3], [0, 3], [0, 2], [0, 1, 2])] == [True] * 3 + [False] * 2


def test_fields_are_stated_if_the_config_says_them_when_it_is_made():
    config = tiny.make("gemma3_text").config
    changes = {"num_hidden_layers": 2}
    made = type(config).from_dict(stating.changed(config.to_dict(), config, changes, [0, 2]))
    assert stating.states(made, config, changes, [0, 2])
    assert not stating.states(made, config, changes, [1, 2])
    assert not stating.states(config, config, changes, [0, 2])


def test_sizes_are_tried_in_all_blocks_where_the_class_makes_none_of_one(monkeypatch):
    model = tiny.make("llama")
    kind = type(model.config)
    from_dict = kind.from_dict

    def strict(raw, **options):
        if raw["num_hidden_layers"] < 2:
            raise ValueError("one block is too few")
        return from_dict(raw, **options)

    monkeypatch.setattr(kind, "from_dict", strict)
    cuts = Cuts(model)
    assert cuts.not_loadable(replace(cuts.shape, mlp=32)) is None
    # and in one where it does, a size that the class refuses is
    monkeypatch.undo()
    assert "not a multiple" in Cuts(model).not_loadable(replace(cuts.shape, heads=3, queries=1))


def test_a_number_of_heads_that_the_config_refuses_is_a_sentence():
    cuts = cuts_of(tiny.make("llama"))
    # 32 wide: three query heads of each of two KV heads are six, which does not divide it
    with pytest.raises(
        PlanError, match=r"LlamaConfig cannot be of 2 x 3 heads, .* name other units, e\.g\. --units mlp,layers"
    ):
        cuts.config_of(replace(cuts.shape, heads=2, queries=3), range(cuts.shape.layers))
