import pytest
import torch

from secateurs.model.made_up import inputs
from secateurs.model.miniature import _groups, _kept, miniature, small_instance


def small(architecture, **fields):
    import transformers

    cls = getattr(transformers, architecture)
    return small_instance(cls, cls.config_class(**fields))


def kinds(model, choice):
    return [choice(layer) for layer in model.base_model.layers]


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("LlamaForCausalLM", {"num_key_value_heads": 8}), ("GPT2LMHeadModel", {}), ("OPTForCausalLM", {}),
        ("FalconForCausalLM", {}), ("MambaForCausalLM", {}), ("Mamba2ForCausalLM", {}), ("DeepseekV3ForCausalLM", {}),
        ("Gemma3ForCausalLM", {}), ("BertForMaskedLM", {}), ("T5ForConditionalGeneration", {}), ("ViTForImageClassification", {}),
        ("WhisperForConditionalGeneration", {}),
    ],
)  # fmt: skip
def test_it_runs_is_small_and_gives_numbers(architecture, fields):
    model = small(architecture, **fields)
    assert sum(p.numel() for p in model.parameters()) < 2_000_000
    assert not model.training
    for batch in inputs(model):
        with torch.no_grad():
            assert torch.isfinite(model(**batch)[0]).all()


def test_every_kind_of_block_occurs():
    # dense first, then experts
    deepseek = small("DeepseekV3ForCausalLM", first_k_dense_replace=3)
    assert {"DeepseekV3MLP", "DeepseekV3MoE"} == set(kinds(deepseek, lambda x: type(x.mlp).__name__))
    # by a list
    gemma = small("Gemma3ForCausalLM")
    assert {True, False} == set(kinds(gemma, lambda x: x.self_attn.is_sliding))
    # by a period: attention in block 4, experts in every other one
    jamba = small("JambaForCausalLM")
    assert len(jamba.model.layers) == 5
    assert {"JambaAttentionDecoderLayer", "JambaMambaDecoderLayer"} == set(kinds(jamba, lambda x: type(x).__name__))
    assert {"JambaMLP", "JambaSparseMoeBlock"} == set(kinds(jamba, lambda x: type(x.feed_forward).__name__))


def test_blocks_that_share_keys_and_values_do_so_at_the_end():
    config = small("Gemma3nForCausalLM").config
    assert 0 < config.num_kv_shared_layers < config.num_hidden_layers
    own = config.layer_types[: -config.num_kv_shared_layers]
    assert set(own) == set(config.layer_types)


@pytest.mark.parametrize(
    ("heads", "groups", "left", "want"),
    [(32, 32, 4, 4), (32, 8, 4, 2), (32, 1, 4, 1), (32, 16, 4, 2), (64, 2, 8, 2), (32, 8, 16, 4), (9, 3, 4, 2)],
)
def test_groups_of_heads_stay_what_they_are(heads, groups, left, want):
    assert _groups(heads, groups, left) == want


def test_kept_blocks_are_two_of_each_kind_while_there_is_room():
    assert _kept(list("aaaabbbb")) == [0, 1, 4, 5]
    assert _kept(list("abcdef")) == [0, 1, 2, 3, 4, 5]
    assert _kept(list("aaab")) == [0, 1, 2, 3]
    assert _kept(list("aaaaaaab")) == [0, 1, 2, 7]


def test_fewer_experts_are_active_than_there_are():
    config = small("MixtralForCausalLM", num_local_experts=128, num_experts_per_tok=8).config
    assert (config.num_local_experts, config.num_experts_per_tok) == (4, 2)


def test_what_is_tied_stays_tied():
    model = small("LlamaForCausalLM", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    apart = small("LlamaForCausalLM", tie_word_embeddings=False)
    assert apart.lm_head.weight is not apart.model.embed_tokens.weight


def test_norms_and_biases_differ_and_decays_are_those_of_the_class():
    model = small("MambaForCausalLM")
    block = model.backbone.layers[0]
    assert block.norm.weight.std() > 0.01
    decays = block.mixer.A_log
    want = torch.arange(1.0, decays.shape[1] + 1).log().expand_as(decays)
    assert not torch.equal(decays, want)
    assert (decays - want).abs().max() < 0.6
    bias = small("GPT2LMHeadModel").transformer.h[0].mlp.c_fc.bias
    assert bias.std() > 0.01


def test_special_tokens_stay_apart_and_inside_the_vocabulary():
    import transformers

    text = {"vocab_size": 32064, "num_hidden_layers": 8}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**text, pad_token_id=32001), image_token_index=32000
    )
    found = small_instance(transformers.LlavaForConditionalGeneration, config).config
    assert found.text_config.pad_token_id != found.image_token_id
    assert max(found.text_config.pad_token_id, found.image_token_id) < found.text_config.vocab_size
    assert min(found.text_config.pad_token_id, found.image_token_id) > 200


def test_rotary_sections_are_scaled_with_the_heads():
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [16, 24, 24]}
    sections = small("Qwen2VLForConditionalGeneration", text_config={"rope_parameters": rope}).config.text_config
    heads = sections.hidden_size // sections.num_attention_heads
    assert sum(sections.rope_parameters["mrope_section"]) == heads // 2


def test_two_are_alike_and_the_random_numbers_of_the_caller_are_left_alone():
    torch.manual_seed(3)
    want = torch.rand(1)
    torch.manual_seed(3)
    first = small("LlamaForCausalLM")
    assert torch.equal(torch.rand(1), want)
    second = miniature(first)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


def test_a_class_that_takes_no_such_config_is_refused_with_the_first_reason():
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    config = DeepseekV2Config(num_experts_per_tok=None)
    with pytest.raises(ValueError, match=r"^no small instance of DeepseekV2ForCausalLM runs \(.*topk"):
        small_instance(DeepseekV2ForCausalLM, config)


def test_made_up_text_has_two_lengths_and_padding():
    batches = inputs(small("LlamaForCausalLM"))
    assert [tuple(b["input_ids"].shape) for b in batches] == [(2, 16), (2, 16), (2, 11)]
    assert batches[1]["attention_mask"].sum(1).tolist() == [16, 11]
