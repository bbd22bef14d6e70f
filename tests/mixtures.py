"""Tiny random mixtures of the families that differ in how they route."""

import tiny

_MOE = {**tiny._LLAMA, "num_hidden_layers": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_SHARED = {**_MOE, "n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1}
_LATENT = {
    **_SHARED, "n_group": 2, "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8, "num_key_value_heads": 4,
}  # fmt: skip

# model_type, and a word if there are two of it -> (architecture, config arguments); each has 8 experts, of which a token is sent to
# 2; of two blocks the second has a mixture
FAMILIES = {
    # softmax, choice, normalised
    "mixtral": ("MixtralForCausalLM", {**_MOE, "num_local_experts": 8}),
    # a shared expert behind a gate; weights are not normalised
    "qwen2_moe": ("Qwen2MoeForCausalLM", {**_MOE, "num_experts": 8, "shared_expert_intermediate_size": 24}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**_MOE, "head_dim": 8, "num_experts": 8, "norm_topk_prob": True}),
    "olmoe": ("OlmoeForCausalLM", {**_MOE, "num_experts": 8}),
    # sigmoid, a bias for the choice alone, groups; the first block has no mixture
    "deepseek_v3": ("DeepseekV3ForCausalLM", _LATENT),
    # softmax, groups by their best expert
    "deepseek_v2": ("DeepseekV2ForCausalLM", {**_LATENT, "topk_method": "group_limited_greedy", "head_dim": 4}),
    "glm4_moe": ("Glm4MoeForCausalLM", {**_SHARED, "head_dim": 8, "n_group": 1, "topk_group": 1}),
    # choice, then softmax; a bias of the router and of every matrix; matrices [E, I, O], gate and up interleaved
    "gpt_oss": ("GptOssForCausalLM", {**_MOE, "intermediate_size": 16, "head_dim": 8, "num_local_experts": 8, "sliding_window": 16}),
    # every other block has a mixture
    "qwen2_moe sparse": (
        "Qwen2MoeForCausalLM", {**_MOE, "num_experts": 8, "shared_expert_intermediate_size": 24, "decoder_sparse_step": 2},
    ),
    "ernie4_5_moe": (
        "Ernie4_5_MoeForCausalLM",
        {**_MOE, "moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1, "moe_layer_interval": 1},
    ),
    # the router's matrix is in a layer of its own, the bias that experts are chosen by in the mixture
    "afmoe": (
        "AfmoeForCausalLM",
        {**_MOE, "head_dim": 8, "num_experts": 8, "num_shared_experts": 1, "num_dense_layers": 1, "sliding_window": 16},
    ),
    "hunyuan_v1_moe": ("HunYuanMoEV1ForCausalLM", {**_MOE, "head_dim": 8, "num_experts": 8, "moe_topk": 2}),
}  # fmt: skip


def make(model_type):
    """A model of that family; biases that its experts are chosen by are not 0."""
    architecture, arguments = FAMILIES[model_type]
    model = tiny.random(architecture, model_type.split()[0], arguments).eval()
    model.set_experts_implementation("eager")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("bias"):
            tensor.detach().normal_(std=0.3)
    return model
