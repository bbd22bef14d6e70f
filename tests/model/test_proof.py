"""How models of many kinds are walked: found on small instances, proved by equal outputs, and what is refused."""

from collections import OrderedDict

import pytest
import tiny
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import register_pytree_node

import secateurs as sc
from secateurs.base.errors import CheckpointError
from secateurs.model import proof
from secateurs.model.activations import InMemory, OnDisk
from secateurs.model.blocks import AllLoaded, blocks_of, enter_list, leave
from secateurs.model.checkpoint import Checkpoint
from secateurs.model.discover import STEPPED, THROUGH, WHOLE, Form, assume, layout_of
from secateurs.model.miniature import small_instance
from secateurs.model.products import products
from secateurs.model.walk import settle, stream

# type -> (class, how it is walked, its lists of blocks in the order of their calls)
KINDS = {
    # a block returns a tensor, a tuple, a tuple of which a loop takes [0], a pair
    "llama": ("LlamaForCausalLM", THROUGH, ["model.layers"]),
    "gptj": ("GPTJForCausalLM", THROUGH, ["transformer.h"]),
    "bloom": ("BloomForCausalLM", THROUGH, ["transformer.h"]),
    "bamba": ("BambaForCausalLM", THROUGH, ["model.layers"]),
    # encoder and decoder; position biases go from block to block
    "bart": ("BartForConditionalGeneration", THROUGH, ["model.encoder.layers", "model.decoder.layers"]),
    "t5": ("T5ForConditionalGeneration", STEPPED, ["encoder.block", "decoder.block"]),
    # stages of other sizes; images; another hidden state beside the first
    "swinv2": ("Swinv2ForImageClassification", STEPPED, ["swinv2.encoder.layers"]),
    "dinov2": ("Dinov2ForImageClassification", THROUGH, ["dinov2.encoder.layer"]),
    "zaya": ("ZayaForCausalLM", STEPPED, ["model.layers"]),
    # one block for all layers; two lists in turns
    "albert": ("AlbertForMaskedLM", WHOLE, ["albert.encoder.albert_layer_groups"]),
    "xlm": ("XLMWithLMHeadModel", WHOLE, ["transformer.attentions", "transformer.ffns"]),
}  # fmt: skip


WHY = {
    "t5": "encoder.block.1 is called with more of what encoder.block.0 returns than hidden states",
    "zaya": "model.layers.1 is called with more of what model.layers.0 returns than hidden states",
    "albert": "albert.encoder.albert_layer_groups.0 is called 4 times in a pass",
    "xlm": "transformer.attentions.1 is called after blocks that come later",
}


def small(model_type):
    if not hasattr(transformers, KINDS[model_type][0]):
        pytest.skip(f"transformers {transformers.__version__} has no {KINDS[model_type][0]}")
    return small_instance(
        getattr(transformers, KINDS[model_type][0]),
        transformers.AutoConfig.for_model(model_type, **EXTRA.get(model_type, {})),
    )


EXTRA = {"bamba": {"attn_layer_indices": [1, 3], "num_hidden_layers": 4}}


@pytest.mark.parametrize("model_type", KINDS)
def test_a_model_is_walked_in_the_cheapest_way_that_gives_its_outputs(model_type, tmp_path):
    model = small(model_type)
    layout = layout_of(model)
    _, how, lists = KINDS[model_type]
    assert (layout.how, [*layout.lists]) == (how, lists), layout.why
    assert (layout.why is None) == (how == THROUGH)
    assert (layout.why or "").endswith(WHY.get(model_type, ""))
    if how == WHOLE:
        assert blocks_of(model)[0] == [""]
        with pytest.raises(CheckpointError, match="cannot be walked in this way"):
            list(stream(model, proof.inputs(model), keep_last=True))
        return
    count = len(blocks_of(model)[0])
    if model_type == "zaya":
        # a walk uses the eager experts, whose sums are in another order than the fused kernel's
        model.set_experts_implementation("eager")
    torch.manual_seed(1)
    for batch in proof.inputs(model):
        # other inputs than those of the proof
        batch = {n: x + 0.5 * torch.randn_like(x) if x.is_floating_point() else x.flip(1) for n, x in batch.items()}
        with torch.no_grad():
            want = model(**batch, use_cache=False).logits if "input_ids" in batch else model(**batch).logits
        for store in (InMemory(), OnDisk(tmp_path)):
            for _ in stream(model, [batch], AllLoaded(), store, keep_last=True):
                pass
            got = leave(model, AllLoaded(), store.read(count, 0), batch, None, store.more(count, 0)).logits
            assert torch.equal(got, want)


@pytest.mark.parametrize("model_type", ["t5", "swinv2", "albert", "bart"])
def test_a_walk_sees_what_hooks_on_the_whole_model_see(model_type):
    model = small(model_type)
    batches = proof.inputs(model)
    seen = {}
    modules = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    hooks = [
        m.register_forward_pre_hook(lambda _, a, n=n: seen.setdefault(n, []).append(a[0].flatten(0, -2)))
        for n, m in modules.items()
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    checked = 0
    for step in stream(model, batches):
        stats = step.observe(step.layers, gram=True)
        for layer in step.layers:
            if layer.kind == "linear":
                x_TI = torch.cat(seen[layer.name])
                torch.testing.assert_close(stats[layer.name].gram_II, x_TI.T @ x_TI, rtol=1e-4, atol=1e-3)
                checked += 1
    assert checked >= 6


class Halving(transformers.LlamaModel):
    """Halves hidden states after every third block: what a model of two blocks does not show."""

    def forward(self, input_ids, use_cache=None, **kwargs):
        hidden = self.embed_tokens(input_ids)
        places = torch.arange(input_ids.shape[1])[None]
        for i, block in enumerate(self.layers):
            hidden = block(hidden, position_embeddings=self.rotary_emb(hidden, places))
            hidden = hidden / 2 if i % 3 == 2 else hidden
        return transformers.modeling_outputs.BaseModelOutput(self.norm(hidden))


def halving(blocks=5):
    config = transformers.LlamaConfig(**{**tiny._LLAMA, "num_hidden_layers": blocks})
    torch.manual_seed(0)
    return Halving(config).eval()


def test_what_happens_between_blocks_is_seen_by_the_proof():
    layout = layout_of(halving())
    assert layout.how == STEPPED
    assert layout.why == "layers.3 is not called with the first tensor that layers.2 returns"


def test_what_only_many_blocks_show_is_found_on_the_real_model():
    """As if the small instance had been too shallow: the layout says THROUGH, and blocks are not called with what is handed on."""
    model = halving()
    lucky = layout_of(halving(3))
    assert lucky.how == THROUGH
    assume(model, lucky)
    batch = {"input_ids": torch.arange(24).reshape(2, 12)}
    with pytest.raises(CheckpointError, match=r"layers\.3 is not called with what the block before it returns"):
        enter_list(model, lucky, "layers", batch, {})
    assert settle(model, [batch]).how == STEPPED
    assert layout_of(model).how == STEPPED
    # a walk that was not settled before finds it out as well
    assume(model, lucky)
    store = InMemory()
    assert sum(1 for _ in stream(model, [batch], AllLoaded(), store, keep_last=True)) == 5
    with torch.no_grad():
        want = model(**batch).last_hidden_state
    assert torch.equal(
        leave(model, AllLoaded(), store.read(5, 0), batch, None, store.more(5, 0)).last_hidden_state, want
    )


class Forgetful(transformers.LlamaModel):
    """A block's hidden states go to the next one by an attribute, not by what it returns."""

    def forward(self, input_ids, use_cache=None, **kwargs):
        hidden = self.embed_tokens(input_ids)
        places = torch.arange(input_ids.shape[1])[None]
        total = hidden
        for block in self.layers:
            hidden = block(hidden, position_embeddings=self.rotary_emb(hidden, places))
            total = total + hidden
        return transformers.modeling_outputs.BaseModelOutput(self.norm(total))


def test_outputs_that_differ_are_named_and_the_model_is_walked_as_a_whole():
    torch.manual_seed(0)
    model = Forgetful(transformers.LlamaConfig(**tiny._LLAMA)).eval()
    layout = layout_of(model)
    assert layout.how == WHOLE
    assert layout.why == ("Forgetful streamed block by block differs: output ['last_hidden_state'] (input_ids [2, 16])")
    plan = sc.Plan("model", method="wanda", sparsity=0.5, evaluation=sc.Evaluation(windows=0))
    report = sc.prune(model, plan, calibration=torch.randint(0, 250, (8, 32)))
    assert report.warnings[0].startswith("the model is walked as a whole: Forgetful streamed")
    assert {r.name for r in report.layers if r.skipped is None} >= {
        "layers.2.mlp.down_proj",
        "layers.0.self_attn.q_proj",
    }
    assert all(r.kept * 2 == r.shape[0] * r.shape[1] for r in report.layers if r.skipped is None)


class Keyless(OrderedDict):
    """An output as older versions of transformers register it: torch's pytrees know its values and no names."""


register_pytree_node(
    Keyless, lambda x: (list(x.values()), list(x)), lambda values, names: Keyless(zip(names, values, strict=True))
)


@pytest.mark.parametrize("path", ["['logits']", "['parts'][1]['last'][0]", "['parts'][1]['last'][1]"])
def test_outputs_are_compared_wherever_they_lie(path):
    def output(**off):
        at = {place: torch.ones(2) + off.get(place, 0) for place in places}
        first, second, third = at.values()
        return Keyless(logits=first, parts=[None, Keyless(last=(second, third))])

    places = ["['logits']", "['parts'][1]['last'][0]", "['parts'][1]['last'][1]"]
    assert proof.unequal(output(), output()) is None
    assert proof.unequal(output(**{path: 1e-3}), output()) == path


@pytest.mark.parametrize("model_type", ["t5", "albert", "gptj"])
def test_a_skeleton_has_the_layout_of_its_model(model_type, tmp_path):
    small(model_type).save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    found = layout_of(checkpoint.skeleton())
    want = layout_of(small(model_type))
    assert (found.how, found.lists, found.in_pieces) == (want.how, want.lists, want.in_pieces)


def test_a_model_that_changes_its_weights_when_it_runs_is_refused(tmp_path):
    config = transformers.RwkvConfig(
        vocab_size=260,
        hidden_size=32,
        num_hidden_layers=4,
        attention_hidden_size=32,
        rescale_every=2,
        intermediate_size=64,
    )
    transformers.RwkvForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"changes its weights when it runs \(rwkv\.blocks\.\d+\.attention\.output"
    ):
        layout_of(Checkpoint(tmp_path).skeleton())


def test_an_output_is_made_around_hidden_states():
    hidden, other = torch.zeros(2, 3, 4), torch.ones(2)
    form = Form.of((None, hidden, other, 7))
    made = form.around(hidden + 1)
    assert made[0] is None
    assert torch.equal(made[1], hidden + 1)
    assert made[2:] == (None, 7)
    assert Form.of(hidden).around(other) is other
    with pytest.raises(ValueError, match="returns no tensor"):
        Form.of((None, 1))


@pytest.mark.parametrize("outputs_first", [True, False])
def test_products_are_told_by_how_their_matrix_lies_in_memory(outputs_first):
    x, stored = torch.randn(5, 3), torch.randn((4, 3) if outputs_first else (3, 4))
    weight_OI = stored if outputs_first else stored.T
    calls = [
        (F.linear, (x, weight_OI), lambda out: out),
        (torch.matmul, (x, weight_OI.T), lambda out: out),
        (torch.Tensor.__matmul__, (weight_OI, x.T), lambda out: out.T),
        (torch.bmm, (x[None], weight_OI.T[None]), lambda out: out[0]),
    ]
    for func, args, of in calls:
        # either side of a product of two matrices may be the weight
        (product,) = (p for p in products(func, args, {}) if p.place == stored.data_ptr())
        assert (product.place, product.shape, product.outputs_first) == (stored.data_ptr(), (4, 3), outputs_first)
        out = func(*args)
        torch.testing.assert_close(product.of(out), product.x_TI @ weight_OI.T)
        torch.testing.assert_close(product.of(out), of(out))
    assert not [*products(torch.add, (x, x), {})]


@pytest.mark.parametrize(
    ("model_type", "kinds"),
    [
        ("mixtral", {"gate_up_proj": "expert", "down_proj": "expert"}),
        ("gpt_oss", {"gate_up_proj": "expert1d", "down_proj": "expert1d"}),
        # a matrix for each head, and vectors, that are no experts
        ("recurrent_gemma", {}),
    ],
)
def test_experts_are_what_is_multiplied_matrix_by_matrix(model_type, kinds):
    classes = {
        "mixtral": "MixtralForCausalLM",
        "gpt_oss": "GptOssForCausalLM",
        "recurrent_gemma": "RecurrentGemmaForCausalLM",
    }
    model = small_instance(getattr(transformers, classes[model_type]), transformers.AutoConfig.for_model(model_type))
    assert layout_of(model).experts == kinds


def test_transposed_experts_are_pruned_by_their_own_inputs():
    """gpt-oss stores experts as [E, I, O]: every output loses half of its inputs, by Wanda's score on the tokens sent there."""
    model = small_instance(transformers.GptOssForCausalLM, transformers.AutoConfig.for_model("gpt_oss"))
    experts = model.model.layers[0].mlp.experts
    dense_EIO, seen = experts.down_proj.detach().clone(), {}
    plain = torch.Tensor.__matmul__

    class Watching(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            for e in range(len(dense_EIO)):
                if (
                    func in (torch.matmul, torch.Tensor.matmul, plain)
                    and args[1].data_ptr() == experts.down_proj[e].data_ptr()
                ):
                    seen.setdefault(e, []).append(args[0].detach().clone())
            return func(*args, **(kwargs or {}))

    batch = {"input_ids": torch.arange(64).reshape(2, 32)}
    model.set_experts_implementation("eager")
    with torch.no_grad(), Watching():
        model(**batch)
    plan = sc.Plan("model", method="wanda", sparsity=0.5, evaluation=sc.Evaluation(windows=0))
    sc.prune(model, plan, calibration=[batch])
    assert len(seen) > 1
    for e, x in seen.items():
        score_OI = dense_EIO[e].T.abs() * torch.cat(x).norm(dim=0)
        kept_OI = experts.down_proj[e].T != 0
        assert int(kept_OI.sum()) * 2 == kept_OI.numel()
        lowest_O = torch.where(kept_OI, score_OI, torch.inf).amin(1)
        highest_O = torch.where(kept_OI, -torch.inf, score_OI).amax(1)
        assert (lowest_O >= highest_O * (1 - 1e-5)).all()
