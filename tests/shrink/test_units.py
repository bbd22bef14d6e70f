"""Units of a block: what is cut with what, for every family."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import tiny
import torch

from secateurs.model import families
from secateurs.model.blocks import blocks_of
from secateurs.model.layers import layers_of
from secateurs.shrink import units

MODELS = [name for name in tiny.TINY if name != "bert base"]


def logits(model):
    ids = torch.arange(40)[None]
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def blocks(model):
    names, experts = blocks_of(model)
    return [(name, layers_of(model.get_submodule(name), name, experts)) for name in names]


@pytest.mark.parametrize("kind", units.COLUMNS)
@pytest.mark.parametrize("model_type", MODELS)
def test_a_unit_with_no_output_can_go(model_type, kind, tmp_path):
    """Logits stay what they were; the model reloads from its config alone, with as many parameters as are left."""
    import transformers

    model = tiny.make(model_type)
    family = families.find(model.config.model_type)
    if units.refuses(kind, family, model.config):
        pytest.skip(units.refuses(kind, family, model.config))
    for _, layers in blocks(model):
        for layer in layers:
            bias = getattr(layer.module, "bias", None)
            if bias is not None:
                bias.data.normal_()
    before = units.Shape.of(model.config, family)
    # a query head goes from every KV head
    gone = torch.arange(before.heads) * before.queries if kind == "queries" else torch.tensor([1])
    left = dataclasses.replace(before, **{kind: before.steps(kind) - 1})
    removed = 0
    for name, layers in blocks(model):
        found = units.units_of(kind, name, layers, family, before)
        weight_OI = found.consumer.read()
        weight_OI[:, found.groups_GC[gone].flatten()] = 0
        found.consumer.write(weight_OI)
    expected = logits(model)
    for name, layers in blocks(model):
        found = units.units_of(kind, name, layers, family, before)
        removed += found.parameters_each * len(gone)
        kept = torch.ones(found.consumer.shape[1], dtype=torch.bool)
        kept[found.groups_GC[gone].flatten()] = False
        count = sum(p.numel() for p in model.parameters())
        units.cut(model.get_submodule(name), found, gone, found.consumer.read()[:, kept])
        units.tell(model.get_submodule(name), left)
        assert count - sum(p.numel() for p in model.parameters()) == found.parameters_each * len(gone)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)

    config = units.stated(model.config.to_dict(), model.config, family, left, range(before.layers))
    cls = getattr(transformers, tiny.TINY[model_type][0])
    fresh = cls(type(model.config)(**config))
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(fresh), expected, rtol=1e-5, atol=1e-5)
    assert removed > 0


def test_two_cuts_are_one():
    one = tiny.make("llama")
    two = copy.deepcopy(one)
    family = families.find("llama")

    def cut(model, gone):
        for name, layers in blocks(model):
            found = units.units_of("mlp", name, layers, family, units.Shape.of(model.config, family))
            kept = torch.ones(found.consumer.shape[1], dtype=torch.bool)
            kept[gone] = False
            units.cut(model.get_submodule(name), found, torch.tensor(gone), found.consumer.read()[:, kept])

    cut(one, [3, 10, 40])
    cut(two, [10])
    # what was 40 is 39 now
    cut(two, [3, 39])
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_the_cache_holds_the_heads_that_are_left():
    model = tiny.make("llama").eval()
    family = families.find("llama")
    for name, layers in blocks(model):
        found = units.units_of("heads", name, layers, family, units.Shape.of(model.config, family))
        units.cut(model.get_submodule(name), found, torch.tensor([0]), found.consumer.read()[:, found.groups_GC[1]])
    cache = model(input_ids=torch.arange(10)[None], use_cache=True).past_key_values
    assert cache.layers[0].keys.shape == (1, 1, 10, 8)


def test_what_a_family_cannot_state_is_refused():
    opt, mixtral = families.find("opt"), families.find("mixtral")
    assert "opt's config cannot state fewer heads" in units.refuses("heads", opt, None)
    assert "experts" in units.refuses("mlp", mixtral, None)
    assert units.refuses("heads", mixtral, None) is None
    alone = SimpleNamespace(num_hidden_layers=2, hidden_size=8, num_attention_heads=4, num_key_value_heads=4)
    assert "has one query head" in units.refuses("queries", families.find("llama"), alone)


def test_query_heads_belong_to_their_kv_head():
    model, family = tiny.make("llama"), families.find("llama")
    name, layers = blocks(model)[0]
    found = units.units_of("queries", name, layers, family, units.Shape.of(model.config, family))
    # four query heads of 8 channels; the first two read the first KV head
    assert found.parents_G.tolist() == [0, 0, 1, 1]
    assert found.groups_GC.tolist() == [list(range(8 * head, 8 * head + 8)) for head in range(4)]
