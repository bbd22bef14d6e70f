"""What a run needs, from a config alone: held against published models, and against sums by hand."""

import json

import pytest
import torch

from secateurs.base.errors import CheckpointError
from secateurs.decide import needs
from secateurs.decide.needs import Anatomy, Block, Matrix
from secateurs.decide.rates import Rates
from secateurs.model.on_meta import without_weights
from secateurs.model.source import from_config
from secateurs.prune.plan import Plan
from secateurs.quality.settings import Calibration
from secateurs.shrink.plan import ShrinkPlan

_ROUTED = {"num_experts_per_tok": 8, "norm_topk_prob": True, "n_shared_experts": 1}
PUBLISHED = {
    # as on the hub
    "Llama-3-70B": (70_553_706_496, "LlamaForCausalLM", {
        "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    }),
    "Qwen3-235B-A22B": (235_093_634_560, "Qwen3MoeForCausalLM", {
        "model_type": "qwen3_moe", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 94,
        "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936,
        "max_position_embeddings": 40960, "moe_intermediate_size": 1536, "num_experts": 128, "num_experts_per_tok": 8,
    }),
    "GLM-4.5-Air": (106_852_245_504, "Glm4MoeForCausalLM", {
        "model_type": "glm4_moe", "hidden_size": 4096, "intermediate_size": 10944, "num_hidden_layers": 46,
        "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151552,
        "max_position_embeddings": 131072, "moe_intermediate_size": 1408, "n_routed_experts": 128,
        "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "attention_bias": True, **_ROUTED,
    }),
    # without its part that predicts a second token, which transformers does not build
    "DeepSeek-V3": (671_026_404_352, "DeepseekV3ForCausalLM", {
        "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61,
        "num_attention_heads": 128, "num_key_value_heads": 128, "vocab_size": 129280, "max_position_embeddings": 163840,
        "moe_intermediate_size": 2048, "n_routed_experts": 256, "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4,
        "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}, **_ROUTED,
    }),
}  # fmt: skip
RATES = Rates(1e12, 1e11, 1e9, {})


def folder(tmp_path, name):
    _, architecture, config = PUBLISHED[name]
    config = {"architectures": [architecture], "tie_word_embeddings": False, "torch_dtype": "bfloat16", **config}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


def anatomy(tmp_path, name):
    model, itemsize, _ = from_config(folder(tmp_path, name))
    return Anatomy.of(model, itemsize)


@pytest.fixture
def machine(monkeypatch):
    """Half a GB of libraries, 64 GB, and solvers that take no time."""
    monkeypatch.setattr(needs, "peak_memory", lambda: 500_000_000)
    monkeypatch.setattr(needs, "memory_bytes", lambda: 64_000_000_000)
    monkeypatch.setattr(Rates, "solve", lambda *_: 0.0)
    monkeypatch.setattr(Rates, "obs", lambda *_: 0.0)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_the_parameters_that_are_published(name, tmp_path):
    found = anatomy(tmp_path, name)
    assert found.parameters == PUBLISHED[name][0]
    assert (found.layers, found.hidden) == (PUBLISHED[name][2]["num_hidden_layers"], PUBLISHED[name][2]["hidden_size"])
    routed = [m for block in found.blocks for m in block.matrices if m.expert]
    experts = PUBLISHED[name][2].get("num_experts") or PUBLISHED[name][2].get("n_routed_experts")
    assert {m.number for m in routed} == ({experts} if experts else set())
    assert {m.used for m in routed} == ({8 / experts} if experts else set())


def test_layers_that_share_inputs_are_known_from_the_config(tmp_path):
    (block,) = anatomy(tmp_path, "Llama-3-70B").blocks
    # q leads k and v, o reads what attention gives; gate leads up
    assert {(m.outputs, m.inputs): (m.number, m.seen) for m in block.matrices} == {
        (8192, 8192): (2, 2), (1024, 8192): (2, 0), (28672, 8192): (2, 1), (8192, 28672): (1, 1),
    }  # fmt: skip


def test_pruning_needs_a_block_its_statistics_and_what_factors_the_widest(tmp_path, machine):
    found = anatomy(tmp_path, "Llama-3-70B")
    plan = Plan(method="sparsegpt", calibration=Calibration(samples=64, seqlen=512))
    (step,) = needs.needs(found, plan, 512, 0, RATES)
    block = 2 * found.blocks[0].parameters
    # three Gram matrices of 8192 and one of 28672 with their factors; three more of the widest while it is factored, beside two
    # copies of its weights
    factoring = 12 * 28672**2 + 8 * 8192 * 28672
    assert step.memory == 500_000_000 + 2 * block + 8 * (3 * 8192**2 + 28672**2) + factoring
    assert step.disk == 2 * found.parameters + 2 * 64 * 512 * 8192 * 2
    # two passes over all blocks, sums of Gram matrices, and the weights three times
    products = 2 * 2 * 80 * sum(m.weights for m in found.blocks[0].matrices) * 64 * 512
    grams = 80 * 1.2 * 64 * 512 * (3 * 8192**2 + 28672**2)
    assert step.seconds == pytest.approx(products / 1e12 + grams / 1e11 + 6 * found.parameters / 1e9)


def test_gram_matrices_take_more_while_they_grow(machine):
    # forty of them: what one more takes while it is factored is less than what all take in fp64
    block = Block(1, 0, (Matrix(1, 1000, 40, 40),))
    (step,) = needs.needs(Anatomy(2, 0, 64, 10, (block,), {}), Plan(method="sparsegpt"), 512, 0, RATES)
    # and a batch in the widest layer: 1000 inputs and an output of 2 bytes and as many again, hidden states in fp32
    assert step.memory == 500_000_000 + 8.7 * 40 * 1000**2 + 4096 * (1001 * 4 + 4 * 64)


def test_a_mixture_whose_experts_are_chosen_is_kept_in_part(machine):
    block = Block(1, 0, (Matrix(2, 4, 256, 256, True), Matrix(4, 2, 256, 256, True)))
    plan = ShrinkPlan("m", "params=0.75x", units=("experts",))
    steps = needs.needs(Anatomy(2, 0, 4096, 10, (block,), {}), plan, 512, 0, RATES)
    # 256 numbers of each for 2048 tokens; 16384 inputs of 2 bytes, and three times as many outputs in fp32
    kept = 256 * 256 * 2048 * 4 + 16384 * 4096 * (2 + 12)
    assert {s.step: s.memory for s in steps}["cutting"] == 500_000_000 + kept


def test_gram_matrices_of_experts_take_a_quarter_of_the_memory_and_more_passes(machine):
    block = Block(1, 0, (Matrix(64, 1000, 100, 100, True, 0.1), Matrix(1000, 64, 100, 100, True, 0.1)))
    here = needs._Machine(0, 10**12, RATES)
    each = 8 * (1000**2 + 64**2)
    assert needs._statistics(block, "gram", here) == (100 * each, 1)
    # room for seven of them: 15 groups, after one pass for all else
    assert needs._statistics(block, "gram", needs._Machine(0, 4 * (7 * each + 5), RATES)) == (7 * each + 5, 16)
    assert needs._statistics(block, "norms", here) == (4 * 100 * 1064, 1)


def test_shrink_holds_no_model_either(tmp_path, machine):
    found = anatomy(tmp_path, "Qwen3-235B-A22B")
    steps = needs.needs(found, ShrinkPlan("m", "params=0.75x", units=("experts", "layers")), 512, 0, RATES)
    assert [s.step for s in steps] == [
        "measuring sensitivity", "what units cost", "what blocks cost", "checking the estimates", "cutting", "timing",
    ]  # fmt: skip
    # two blocks of 5 GB of two models are timed
    assert max(s.memory for s in steps[:-1]) < 12e9
    assert 20e9 < steps[-1].memory < 30e9 < 2 * found.parameters
    # the hidden states of every candidate
    assert steps[2].disk == 96 * 1024 * 4096 * 2


def test_a_note_says_that_a_quantized_model_is_copied_first(tmp_path):
    assert "a plain copy in 16 bits" in from_config(folder(tmp_path, "DeepSeek-V3"))[2]
    with pytest.raises(CheckpointError, match=r"no config\.json for nobody/nothing here or on the hub"):
        from_config("nobody/nothing")


def test_large_parameters_are_never_allocated_and_buffers_are_real():
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            # 4 TB
            self.experts = torch.nn.Parameter(torch.empty(1000, 1000, 1_000_000))
            self.sized = torch.nn.Parameter(torch.empty((1000, 1000, 1_000_000), dtype=torch.bfloat16))
            self.register_buffer("angles", torch.arange(8) * 2.0)

    with without_weights():
        made = Module()
    assert made.experts.is_meta
    assert (made.sized.shape, made.sized.dtype) == ((1000, 1000, 1_000_000), torch.bfloat16)
    assert made.angles.tolist() == [2.0 * n for n in range(8)]


def test_rates_are_those_of_this_machine_and_grow_as_products_do():
    rates = Rates.of(torch.float32)
    assert min(rates.product, rates.gram, rates.disk) > 0
    narrow = rates.solve("wanda", 256, 256, "norms")
    assert 0 < narrow < rates.solve("wanda", 1024, 256, "norms")
    # beyond what is timed: rows by rows, products by the square, factors by the cube of inputs
    rates._known.update({("rows by sparsegpt", 1024): 2.0, ("factor", 1024): 3.0})
    assert rates.solve("sparsegpt", 512, 2048, "gram") == 2.0 * 2 * 4 + 3.0 * 8
    rates._known.update({("1 of the inverse", 2048): 1.0, ("32 of the inverse", 2048): 4.1})
    rates._known["inverse", 1024] = 1.5
    # a round moves the inverse for 0.9, and 0.1 for each input; the factor and the inverse come first
    assert rates.obs(4096, 100, 10) == pytest.approx(64 * (3.0 + 1.5) + 4 * (10 * 0.9 + 100 * 0.1))
