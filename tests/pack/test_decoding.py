"""Blocks that decode a token in one call: equal to the class's own forward, and left to that wherever anything is otherwise."""

import copy
import ctypes
import pickle
import re
from types import SimpleNamespace

import pytest
import tiny
import torch
from gridded import on_grid
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from secateurs.kernels import fused_block
from secateurs.kernels.fused_block import Fused, FusedAttention, FusedBlock, fusible, plain_class, separate, taken
from secateurs.kernels.library import Block
from secateurs.kernels.packed_embedding import make_dense
from secateurs.kernels.packed_linear import PackedLinear
from secateurs.pack import folder as stage
from secateurs.pack.decoding import doubt, fuse_blocks
from secateurs.pack.live import accelerate


def tokens_of(sequences, tokens):
    return torch.randint(3, 250, (sequences, tokens), generator=torch.Generator().manual_seed(1))


def half_packed(model_type="llama", dtype=torch.float32, **arguments):
    """A tiny model, packed, with blocks fused, and the same with its own."""
    architecture, given = {**tiny.TINY, "olmo2": ("Olmo2ForCausalLM", tiny.TINY["llama"][1])}[model_type]
    plain = tiny.random(architecture, model_type, {**given, **arguments}).to(dtype).eval()
    for name, parameter in plain.named_parameters():
        if parameter.dim() == 2 and "proj" in name:
            parameter.data.masked_fill_(torch.rand(parameter.shape) < 0.5, 0)
        elif parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape)
    accelerate(plain)
    fused = copy.deepcopy(plain)
    fuse_blocks(fused)
    return fused, plain


def decoded(model, tokens=14, cache=None, **given):
    """Logits of tokens that are given one by one after a prompt of 5."""
    ids = tokens_of(1, 5 + tokens)
    with torch.no_grad():
        out = model(ids[:, :5], past_key_values=DynamicCache(config=model.config) if cache is None else cache, **given)
        logits = []
        for i in range(5, 5 + tokens):
            out = model(ids[:, i : i + 1], past_key_values=out.past_key_values, **given)
            logits.append(out.logits)
    return torch.cat(logits), out.past_key_values


def all_taken(model):
    return [taken(part) for part in model.modules() if isinstance(part, Fused)]


# norms before and after (Gemma 3), only after and over all heads at once (OLMo 2), q, k and v in one matrix (Phi 3), and mixtures,
# whose attention alone is one call
@pytest.mark.parametrize(
    "model_type", ["llama", "qwen2", "qwen3", "gemma3_text", "olmo2", "phi3", "mixtral", "qwen3_moe"]
)
def test_one_call_gives_what_the_blocks_own_forward_gives(model_type):
    fused, plain = half_packed(model_type)
    assert any(isinstance(m, PackedLinear) for m in fused.modules())
    (found, cache), (wanted, other) = decoded(fused), decoded(plain)
    kinds = {type(part).__bases__[0] for part in fused.modules() if isinstance(part, Fused)}
    assert kinds == {FusedAttention if model_type in ("mixtral", "qwen3_moe") else FusedBlock}
    # two of Gemma 3's blocks have a window
    assert all_taken(fused) == ([10, 14, 10] if model_type == "gemma3_text" else [14] * len(fused.model.layers))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    for mine, its in zip(cache.layers, other.layers, strict=True):
        torch.testing.assert_close(mine.keys, its.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mine.values, its.values, rtol=1e-4, atol=1e-5)


# OLMo 2 turns its heads in fp32
@pytest.mark.parametrize("model_type", ["llama", "olmo2"])
def test_in_bf16_the_difference_is_one_of_rounding(model_type):
    fused, plain = half_packed(model_type, torch.bfloat16)
    (found, _), (wanted, _) = decoded(fused), decoded(plain)
    assert all_taken(fused) == [14] * 3
    exact, _ = decoded(make_dense(copy.deepcopy(plain)).float())
    assert float((found - exact).abs().mean()) <= float((wanted - exact).abs().mean())


def test_a_packed_folder_loads_with_fused_blocks_and_generates_the_same_tokens(tmp_path):
    plain = on_grid(tiny.save(tmp_path / "plain", "llama", torch.float32), "int4/32", {"down": "int8/row"})
    stage.pack(plain, tmp_path / "packed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed").eval()
    ids = tokens_of(1, 6)
    found = model.generate(ids, max_new_tokens=20, min_new_tokens=20, do_sample=False)
    assert all_taken(model) == [19] * 3
    for block in model.model.layers:
        separate(block)
    assert torch.equal(found, model.generate(ids, max_new_tokens=20, min_new_tokens=20, do_sample=False))


def test_biases_of_integers_and_of_floats_are_added(tmp_path):
    architecture, given = tiny.TINY["llama"]
    model = tiny.random(architecture, "llama", {**given, "attention_bias": True, "mlp_bias": True})
    for name, parameter in model.named_parameters():
        if "bias" in name:
            parameter.data.normal_()
    model.to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    stage.pack(on_grid(tmp_path / "plain", "int8/32", skip="k_proj"), tmp_path / "packed")
    fused = AutoModelForCausalLM.from_pretrained(tmp_path / "packed").eval()
    exact, _ = decoded(AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32).eval())
    found, _ = decoded(fused)
    assert all_taken(fused) == [14] * 3
    assert float((found - exact).abs().max()) <= 0.1 * float(exact.abs().max())


def test_a_sliding_window_is_decoded_up_to_its_length():
    fused, plain = half_packed("mistral")
    (found, cache), (wanted, other) = decoded(fused, 30), decoded(plain, 30)
    # 5 tokens of the prompt, and room for 15 in a window of 16
    assert all_taken(fused) == [10] * 3
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert cache.get_seq_length() == other.get_seq_length() == 35


# what the proof finds; ministral3 scales queries from place 16384 on
OTHERS = {
    "helium": r"the logits of a small HeliumForCausalLM change by [\d.e+-]+ of the largest",
    "phi": r"all of PhiForCausalLM's 0 blocks compute something else than the one call does",
    "gemma2": r"4 of Gemma2ForCausalLM's 4 blocks compute something else than the one call does",
    "ministral3": r"the logits of a small Ministral3ForCausalLM change by [\d.e+-]+ of the largest",
}


@pytest.mark.parametrize("model_type", OTHERS)
def test_a_class_that_computes_something_else_is_not_proved(model_type):
    config = AutoConfig.for_model(model_type)
    assert re.fullmatch(OTHERS[model_type], doubt(AutoModelForCausalLM._model_mapping[type(config)], config))


@pytest.mark.parametrize(
    ("model_type", "choices"), [("granite", {"residual_multiplier": 0.22}), ("smollm3", {}), ("gemma", {})]
)
def test_weighted_residuals_no_turns_and_norms_plus_one(model_type, choices, monkeypatch):
    config = AutoConfig.for_model(model_type, **choices)
    cls = AutoModelForCausalLM._model_mapping[type(config)]
    assert doubt(cls, config) is None
    # nor is anything proved by its names
    forward = fused_block.library().secateurs_decode
    monkeypatch.setattr(fused_block, "library", lambda: SimpleNamespace(secateurs_decode=half_of(forward)))
    assert doubt(cls, config) is not None


def test_why_blocks_are_not_fused_is_told():
    _, plain = half_packed()
    assert fuse_blocks(plain) is None
    mixture, _ = half_packed("mixtral")
    assert {type(part).__bases__[0] for part in mixture.modules() if isinstance(part, Fused)} == {FusedAttention}
    make_dense(mixture)
    told = fuse_blocks(mixture)
    assert told.startswith("MixtralForCausalLM has no block of self_attn with q_proj")
    assert told.endswith("; the attention of each is one call")
    other, _ = half_packed("gpt2")
    assert fuse_blocks(other).startswith("GPT2LMHeadModel has no block of self_attn with q_proj")
    # of a class with all modules, what the proof found
    turned = AutoModelForCausalLM.from_config(AutoConfig.for_model("helium", **tiny.TINY["llama"][1], head_dim=8))
    assert fuse_blocks(turned).startswith("the logits of a small HeliumForCausalLM change by")
    assert not any(isinstance(module, Fused) for module in turned.modules())


def test_of_a_block_of_another_form_the_attention_may_be_one_call():
    # OLMo's norms have no weights
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("olmo", **tiny.TINY["llama"][1]))
    assert fuse_blocks(model).endswith("; the attention of each is one call")
    assert len(fusible(model)) == len(fusible(model, whole=False)) == 3
    assert all(isinstance(block.self_attn, FusedAttention) for block in model.model.layers)


def half_of(forward):
    """The same with every block's input halved."""

    def call(parts, x, y, *others):
        width = ctypes.cast(parts, ctypes.POINTER(Block)).contents.width
        given = (ctypes.c_float * width).from_address(x)
        halved = (ctypes.c_float * width)(*(value / 2 for value in given))
        return forward(parts, ctypes.addressof(halved), y, *others)

    return call


def test_what_others_do_to_a_cache_is_seen():
    fused, plain = half_packed()
    one, other = tokens_of(1, 1), tokens_of(1, 3)
    results = []
    for model in (fused, plain):
        _, cache = decoded(model)
        before = copy.deepcopy(cache)
        results.append([])
        with torch.no_grad():
            results[-1].append(model(one, past_key_values=cache).logits)
            # a copy goes on by itself, from where it was made
            results[-1].append(model(one + 1, past_key_values=before).logits)
            results[-1].append(model(one, past_key_values=cache).logits)
            for layer in cache.layers:
                layer.crop(-4)
                layer.keys = layer.keys * 0.5
            results[-1].append(model(one + 2, past_key_values=cache).logits)
            results[-1].append(model(other, past_key_values=cache).logits)
            cache.reorder_cache(torch.tensor([0]))
            results[-1].append(model(one + 3, past_key_values=cache).logits)
            assert cache.get_seq_length() == 19 + 2 - 4 + 1 + 3 + 1
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert all_taken(fused) == [14 + 5] * 3


def test_a_cache_outgrows_its_room():
    fused, plain = half_packed()
    (found, _), (wanted, _) = decoded(fused, 100), decoded(plain, 100)
    assert all_taken(fused) == [100] * 3
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_padding_sequences_and_a_static_cache_are_for_the_class():
    fused, plain = half_packed()
    ids, mask = tokens_of(2, 6), torch.ones(2, 6, dtype=torch.int64)
    mask[0, :2] = 0
    for given in ({"attention_mask": mask}, {"cache_implementation": "static"}, {"num_beams": 2}):
        options = {"max_new_tokens": 5, "do_sample": False, "disable_compile": True, **given}
        first = mask[:1] if "attention_mask" in given else None
        for ids_here, mask_here in ((ids, given.get("attention_mask")), (ids[:1], first)):
            if mask_here is not None:
                options["attention_mask"] = mask_here
            assert torch.equal(fused.generate(ids_here, **options), plain.generate(ids_here, **options))
        assert all_taken(fused) == [0] * 3


def test_weights_written_to_and_modules_replaced_are_seen():
    fused, plain = half_packed()
    decoded(fused)
    for model in (fused, plain):
        # no version counts what is written by way of .data
        model.model.layers[0].input_layernorm.weight.data.mul_(1.5)
        norm = model.model.layers[1].post_attention_layernorm
        norm.weight = nn.Parameter(norm.weight * 0.5)
        down = next(p for p in model.model.layers[2].mlp.down_proj.parameters() if p.is_floating_point())
        with torch.no_grad():
            down.mul_(0.5)
    torch.testing.assert_close(decoded(fused)[0], decoded(plain)[0], rtol=1e-4, atol=1e-5)
    assert all_taken(fused) == [28, 14, 14]
    for model in (fused, plain):
        q = model.model.layers[1].self_attn.q_proj
        model.model.layers[1].self_attn.q_proj = nn.Sequential(q, nn.Dropout(0))
    torch.testing.assert_close(decoded(fused)[0], decoded(plain)[0], rtol=1e-4, atol=1e-5)
    assert all_taken(fused) == [42, 0, 28]


def test_hooks_and_other_forwards_of_parts_are_called():
    fused, _ = half_packed()
    seen = []
    hook = fused.model.layers[0].mlp.down_proj.register_forward_hook(lambda *given: seen.append(given))
    decoded(fused)
    assert len(seen) == 15
    assert all_taken(fused) == [0, 14, 14]
    hook.remove()
    decoded(fused)
    assert all_taken(fused) == [14, 28, 28]
    part = fused.model.layers[2].mlp
    own = part.forward
    part.forward = lambda x: seen.append(x) or own(x)
    decoded(fused)
    assert len(seen) == 30
    assert all_taken(fused) == [28, 42, 28]


def test_numbers_and_classes_that_change_are_seen(monkeypatch):
    fused, plain = half_packed()
    decoded(fused)
    for model in (fused, plain):
        model.model.layers[0].self_attn.scaling *= 0.1
        model.model.layers[1].mlp.act_fn = nn.PReLU(1)
    torch.testing.assert_close(decoded(fused)[0], decoded(plain)[0], rtol=1e-4, atol=1e-5)
    assert all_taken(fused) == [14, 0, 28]
    cls = type(fused.model.layers[0].mlp)
    own = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, x: 0.5 * own(self, x))
    torch.testing.assert_close(decoded(fused)[0], decoded(plain)[0], rtol=1e-4, atol=1e-5)


def test_weights_apart_or_computed_are_for_the_class():
    fused, plain = half_packed()
    for model in (fused, plain):
        first, second, _ = model.model.layers
        first.input_layernorm.weight = nn.Parameter(torch.rand(32, 2)[:, 0] * 0 + first.input_layernorm.weight)
        first.input_layernorm.weight.data = torch.stack([first.input_layernorm.weight.data] * 2, 1)[:, 0]
        nn.utils.parametrize.register_parametrization(second.input_layernorm, "weight", nn.Tanh())
    torch.testing.assert_close(decoded(fused)[0], decoded(plain)[0], rtol=1e-4, atol=1e-5)
    assert all_taken(fused) == [0, 0, 14]


def test_other_attention_and_other_caches_are_the_users():
    class Halved(DynamicCache):
        def update(self, keys, values, *others, **given):
            return super().update(keys / 2, values, *others, **given)

    fused, plain = half_packed()
    found, wanted = (decoded(m, cache=Halved(config=m.config))[0] for m in (fused, plain))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    called = []

    def mine(module, query, *others, **given):
        called.append(module)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, *others, **given)

    AttentionInterface.register("mine", mine)
    fused.set_attn_implementation("mine")
    decoded(fused)
    assert len(called) == 15 * 3
    assert all_taken(fused) == [0] * 3


def test_a_room_goes_when_the_class_itself_writes_to_the_cache():
    fused, _ = half_packed()
    _, cache = decoded(fused)
    assert all(layer in fused_block._rooms for layer in cache.layers)
    with torch.no_grad():
        fused(tokens_of(1, 3), past_key_values=cache)
    assert not any(layer in fused_block._rooms for layer in cache.layers)


def test_gradients_of_weights_go_through_the_class_itself():
    fused, plain = half_packed()
    got = []
    for model in (fused, plain):
        _, cache = decoded(model)
        model.get_input_embeddings().requires_grad_(False)
        model(tokens_of(1, 1), past_key_values=cache).logits.sum().backward()
        got.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert got[0].keys() == got[1].keys()
    assert len(got[0]) >= 7
    for name, grad in got[0].items():
        torch.testing.assert_close(grad, got[1][name], rtol=1e-3, atol=1e-4)


def test_gradients_go_through_the_class_itself():
    fused, plain = half_packed()
    got = []
    for model in (fused, plain):
        _, cache = decoded(model)
        x = torch.full((1, 1, 32), 0.1, requires_grad=True)
        model(inputs_embeds=x, past_key_values=cache).logits.sum().backward()
        got.append(x.grad)
    torch.testing.assert_close(*got, rtol=1e-3, atol=1e-4)
    assert all_taken(fused) == [14] * 3


def test_hidden_states_are_recorded_by_hooks_which_the_class_itself_calls():
    fused, plain = half_packed()
    ids = tokens_of(1, 6)
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_hidden_states": True}
    found, wanted = (m.generate(ids, **options).hidden_states for m in (fused, plain))
    assert all_taken(fused) == [0] * 3
    for mine, its in zip(found[-1], wanted[-1], strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)
    # the hooks stay; what was found of a block is not found anew for every token
    decoded(fused)
    kept = [block.parts for block in fused.model.layers]
    torch.testing.assert_close(decoded(fused)[0], decoded(plain)[0], rtol=1e-4, atol=1e-5)
    assert [block.parts for block in fused.model.layers] == kept


def test_a_compiler_sees_the_classs_own_code():
    fused, plain = half_packed()
    decoded(fused)
    x, turns = torch.randn(1, 1, 32), (torch.ones(1, 1, 8), torch.zeros(1, 1, 8))
    with torch.no_grad():
        compiled = torch.compile(fused.model.layers[0], backend="eager", fullgraph=True)
        found = compiled(x, position_embeddings=turns)
        torch.testing.assert_close(found, plain.model.layers[0](x, position_embeddings=turns))
    assert all_taken(fused) == [14] * 3


def test_models_are_copied_pickled_and_made_dense_as_before():
    fused, plain = half_packed()
    wanted, _ = decoded(fused)
    block = fused.model.layers[0]
    assert type(block).__name__ == "LlamaDecoderLayer"
    assert plain_class(block) is type(plain.model.layers[0])
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert isinstance(other.model.layers[0], FusedBlock)
        assert torch.equal(decoded(other)[0], wanted)
        assert all_taken(other) == [14] * 3
    assert fused.state_dict().keys() == plain.state_dict().keys()
    make_dense(fused)
    assert not any(isinstance(m, Fused) for m in fused.modules())
    assert type(block) is type(plain.model.layers[0])
