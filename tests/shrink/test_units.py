"""Units of a block: what is cut with what, for every type."""

import copy
import dataclasses

import pytest
import tiny
import torch

from secateurs.model.blocks import blocks_of
from secateurs.shrink import units
from secateurs.shrink.cuts import cuts_of

MODELS = [name for name in tiny.TINY if name != "bert base"]


def logits(model):
    ids = torch.arange(40)[None]
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def blocks(model):
    return [(name, model.get_submodule(name)) for name in blocks_of(model)[0]]


@pytest.mark.parametrize("kind", units.COLUMNS)
@pytest.mark.parametrize("model_type", MODELS)
def test_a_unit_with_no_output_can_go(model_type, kind, tmp_path):
    """Logits stay what they were; the model reloads from its config alone, with as many parameters as are left."""
    import transformers

    model = tiny.make(model_type)
    cuts = cuts_of(model)
    if cuts.refuses(kind):
        pytest.skip(cuts.refuses(kind))
    for module in model.modules():
        bias = module._parameters.get("bias")
        if bias is not None:
            bias.data.normal_()
    before = cuts.shape
    # a query head goes from every KV head
    gone = torch.arange(before.heads) * before.queries if kind == "queries" else torch.tensor([1])
    left = dataclasses.replace(before, **{kind: before.steps(kind) - 1})
    like = cuts.skeleton(left, range(before.layers))
    for name, block in blocks(model):
        found = cuts.units(kind, block, name, before)
        weight_OI = found.consumer.read()
        weight_OI[:, found.groups_GC[gone].flatten()] = 0
        found.consumer.write(weight_OI)
    expected = logits(model)
    for name, block in blocks(model):
        found = cuts.units(kind, block, name, before)
        kept = torch.ones(found.consumer.shape[1], dtype=torch.bool)
        kept[found.groups_GC[gone].flatten()] = False
        count = sum(p.numel() for p in model.parameters())
        units.cut(block, found, gone, found.consumer.read()[:, kept])
        units.tell(block, like.get_submodule(name))
        assert count - sum(p.numel() for p in model.parameters()) == found.parameters_each * len(gone) > 0
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)

    config = cuts.stated(model.config.to_dict(), left, range(before.layers))
    fresh = getattr(transformers, tiny.TINY[model_type][0])(type(model.config)(**config))
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(fresh), expected, rtol=1e-5, atol=1e-5)


def test_two_cuts_are_one():
    one = tiny.make("llama")
    two = copy.deepcopy(one)
    cuts = cuts_of(one)

    def cut(model, gone):
        for name, block in blocks(model):
            found = cuts.units("mlp", block, name, cuts.shape)
            kept = torch.ones(found.consumer.shape[1], dtype=torch.bool)
            kept[gone] = False
            units.cut(block, found, torch.tensor(gone), found.consumer.read()[:, kept])

    cut(one, [3, 10, 40])
    cut(two, [10])
    # what was 40 is 39 now
    cut(two, [3, 39])
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_the_cache_holds_the_heads_that_are_left():
    model = tiny.make("llama").eval()
    cuts = cuts_of(model)
    like = cuts.skeleton(dataclasses.replace(cuts.shape, heads=1), range(3))
    for name, block in blocks(model):
        found = cuts.units("heads", block, name, cuts.shape)
        units.cut(block, found, torch.tensor([0]), found.consumer.read()[:, found.groups_GC[1]])
        units.tell(block, like.get_submodule(name))
    cache = model(input_ids=torch.arange(10)[None], use_cache=True).past_key_values
    assert cache.layers[0].keys.shape == (1, 1, 10, 8)


def test_query_heads_belong_to_their_kv_head():
    model = tiny.make("llama")
    name, block = blocks(model)[0]
    found = cuts_of(model).units("queries", block, name, cuts_of(model).shape)
    # four query heads of 8 channels; the first two read the first KV head
    assert found.parents_G.tolist() == [0, 0, 1, 1]
    assert found.groups_GC.tolist() == [list(range(8 * head, 8 * head + 8)) for head in range(4)]
    assert [(layer.name, rows.tolist()) for layer, rows in found.rows] == [
        (f"{name}.self_attn.q_proj", found.groups_GC.tolist())
    ]
