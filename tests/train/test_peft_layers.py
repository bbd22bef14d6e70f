"""LoRA layers of PEFT keep zeros: what is trained is what is merged, and both are W + mask * (up @ down) * scaling."""

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import secateurs as sc
from secateurs.base.errors import PlanError
from secateurs.train.matrices import prunable

IDS = torch.arange(40)[None]


def adapted(model_type="llama", **options):
    """A pruned model with an adapter whose product is not zero."""
    model = get_peft_model(
        tiny.pruned(tiny.make(model_type)),
        LoraConfig(
            r=2, target_modules="all-linear", **({"fan_in_fan_out": True} if model_type == "gpt2" else {}), **options
        ),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.5)
    return model


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.5}, {"use_rslora": True}])
def test_what_was_trained_is_what_is_merged(model_type, options):
    model = adapted(model_type, **options)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "lora" not in n}
    names = sc.train.mask_peft(model)
    model.eval()
    with torch.no_grad():
        want = model(input_ids=IDS).logits
    layers = {name: model.get_submodule(name) for name in names}
    # by hand, of one layer: rank 2, alpha 8
    name, layer = next(iter(layers.items()))
    scaling = 8 / 2**0.5 if "use_rslora" in options else 8 / 2
    delta = layer.lora_B["default"].weight.detach() @ layer.lora_A["default"].weight.detach() * scaling
    base = before[f"{name}.base_layer.weight"]
    expected = base + (base != 0) * (delta.T if model_type == "gpt2" else delta)
    merged = model.merge_and_unload()
    weights = dict(merged.named_parameters())
    torch.testing.assert_close(weights[f"{name.removeprefix('base_model.model.')}.weight"].detach(), expected)
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=IDS).logits, want, rtol=1e-4, atol=1e-4)
    for name in names:
        now = weights[f"{name.removeprefix('base_model.model.')}.weight"]
        assert torch.equal(now == 0, before[f"{name}.base_layer.weight"] == 0)


def test_a_plain_merge_loses_them():
    """Why there is something to do at all."""
    merged = adapted().merge_and_unload()
    assert not any(bool((m.weight == 0).any()) for m in merged.model.layers.modules() if isinstance(m, nn.Linear))


def test_an_adapter_is_trained_under_its_mask_saved_and_loaded_again(tmp_path):
    dense = tiny.pruned(tiny.make("llama"))
    dense.save_pretrained(tmp_path / "base")
    model = get_peft_model(dense, LoraConfig(r=2, target_modules="all-linear"))
    zeros = {n: p.detach() == 0 for n, p in prunable(model.get_base_model()) if "lora" not in n}
    names = sc.train.mask_peft(model)
    assert sc.train.mask_peft(model) == names
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 0.05)
    losses = []
    for _ in range(8):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        want = model.eval()(input_ids=IDS).logits
    from transformers import AutoModelForCausalLM

    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    sc.train.mask_peft(again)
    again.merge_adapter()
    again.unmerge_adapter()
    merged = again.merge_and_unload().eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=IDS).logits, want, rtol=1e-4, atol=1e-4)
    for name, parameter in prunable(merged):
        assert torch.equal(
            parameter.detach() == 0, zeros.get(name, zeros.get(name.replace(".weight", ".base_layer.weight")))
        )


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: tiny.pruned(tiny.make("llama")), "it has no LoRA layers of PEFT; prune the model first"),
        (
            lambda: get_peft_model(tiny.make("llama"), LoraConfig(r=2, target_modules="all-linear")),
            "none of its 21 LoRA layers is on a weight with zeros",
        ),
        (lambda: adapted(use_dora=True), "q_proj: zeros under a variant of LoRA, such as DoRA, cannot be kept"),
        (lambda: adapted(target_parameters=["embed_tokens.weight"]), "layer.ParamWrapper cannot be kept"),
    ],
)
def test_what_cannot_be_masked_is_refused_by_name(make, said):
    model = make()
    if hasattr(model, "peft_config") and getattr(model.peft_config["default"], "target_parameters", None):
        model.get_base_model().model.embed_tokens.base_layer.weight.data[3] = 0
    with pytest.raises(PlanError, match=said):
        sc.train.mask_peft(model)


def test_a_merged_adapter_and_mixed_batches_are_refused():
    model = adapted()
    model.merge_adapter()
    # what is merged has no zeros; one that has is refused by name
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    layer.base_layer.weight.data[0, 0] = 0
    with pytest.raises(PlanError, match=r"layers\.0\.mlp\.up_proj: its adapter is merged already"):
        sc.train.mask_peft(model)
    model = adapted()
    sc.train.mask_peft(model)
    with pytest.raises(PlanError, match="for whole batches"):
        model.base_model.model.model.layers[0].mlp.up_proj(torch.zeros(1, 1, 32), adapter_names=["default"])
