"""shrink walks a folder: one block in memory, and the same results as with the whole model there."""

import dataclasses

import pytest
import tiny
import torch
from test_shrink import plan, same_bytes
from torch import nn

from secateurs.base.errors import PlanError
from secateurs.base.files import write_json
from secateurs.model import activations, blocks
from secateurs.model.activations import OnDisk
from secateurs.model.blocks import blocks_of, whole
from secateurs.model.checkpoint import Checkpoint
from secateurs.model.output import Output
from secateurs.shrink import columns, cutting, estimates, latency, losses, shapes, units
from secateurs.shrink.cuts import cuts_of
from secateurs.shrink.latency import Sample, Seconds
from secateurs.shrink.run import shrink
from secateurs.shrink.sizes import consumers_of

IDS = torch.randint(0, 250, (3, 16), generator=torch.Generator().manual_seed(1))
KINDS = {
    "llama": ("mlp", "heads", "layers"),
    "mistral": ("hidden", "mlp"),
    "qwen3_moe": ("experts", "layers"),
}


def loaded(model):
    """How many blocks of a model have weights."""
    blocks = [model.get_submodule(name) for name in blocks_of(model)[0]]
    return sum(any(not p.is_meta for p in block.parameters()) for block in blocks)


@pytest.mark.parametrize("model_type", KINDS)
def test_one_block_is_in_memory_and_two_where_one_takes_over(model_type, tmp_path, words, monkeypatch):
    source = tiny.save(tmp_path / "dense", model_type)
    seen, load = [], Checkpoint.load

    def watched(checkpoint, model, prefix):
        load(checkpoint, model, prefix)
        seen.append(loaded(model))

    monkeypatch.setattr(Checkpoint, "load", watched)
    monkeypatch.setattr(Checkpoint, "load_whole", lambda *_: pytest.fail("the whole model was loaded"))
    report = shrink(plan(source, words, "params=0.7x", units=KINDS[model_type]), tmp_path / "run")
    assert len(seen) > 3 * len(KINDS[model_type])
    assert max(seen) == 1 + any("bridge" in block for block in report["blocks"])


@pytest.mark.parametrize("model_type", KINDS)
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bytes(model_type, tmp_path, words):
    source = tiny.save(tmp_path / "dense", model_type)
    chosen = plan(source, words, "params=0.7x", units=KINDS[model_type], eval_windows=0)
    left = total = 10**6

    def write(file, data):
        nonlocal left
        write_json(file, data)
        left -= 1
        if not left:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        for module in (cutting, estimates, shapes, losses, activations):
            patch.setattr(module, "write_json", write)
        report = shrink(chosen, tmp_path / "whole")
        each, kills = (total - left) // 4, 0
        while kills < 20:
            left = each
            try:
                again = shrink(chosen, tmp_path / "killed")
                break
            except KeyboardInterrupt:
                kills += 1
    assert 3 < kills < 10
    assert same_bytes(tmp_path / "whole" / "model", tmp_path / "killed" / "model")
    assert (again["left"], again["blocks"]) == (report["left"], report["blocks"])


@pytest.mark.parametrize("on_disk", [False, True])
def test_the_loss_without_blocks_is_that_of_the_model_without_them(on_disk, tmp_path):
    """Every set that the search asks for, and the order that it finds from them."""
    model = tiny.random("LlamaForCausalLM", "llama", {**tiny.TINY["llama"][1], "num_hidden_layers": 5}).eval()

    def loss(gone):
        left = tiny.random("LlamaForCausalLM", "llama", {**tiny.TINY["llama"][1], "num_hidden_layers": 5}).eval()
        units.keep_blocks(left, "model.layers", [i for i in range(5) if i not in gone], ("num_hidden_layers",))
        with torch.no_grad():
            logits = left(input_ids=IDS).logits[:, :-1]
        return float(nn.functional.cross_entropy(logits.flatten(0, 1).double(), IDS[:, 1:].flatten()))

    order, wanted, dense = [], [], loss([])
    for _ in range(3):
        costs = {i: loss([*order, i]) for i in range(5) if i not in order}
        order.append(min(costs, key=costs.get))
        wanted.append(costs[order[-1]] - dense)
    ticks = []
    found, after = losses.blocks(model, IDS, 3, lambda: ticks.append(0), folder=tmp_path if on_disk else None)
    assert found == order
    assert after == pytest.approx(wanted, abs=1e-5)
    assert len(ticks) == 5 * losses.walks(5, 3)
    # nothing of the walks is left
    assert not list((tmp_path / "trial").glob("*")) or not on_disk


def test_blocks_by_influence_are_those_whose_outputs_are_nearest_to_their_inputs():
    model = tiny.make("llama").eval()
    hidden = []
    hooks = [b.register_forward_hook(lambda _, args, out: hidden.append((args[0], out))) for b in model.model.layers]
    with torch.no_grad():
        model(input_ids=IDS)
    for hook in hooks:
        hook.remove()
    cosines = [float(nn.functional.cosine_similarity(a, b, -1).mean()) for a, b in hidden]
    order, _ = losses.blocks(model, IDS, 2, lambda: None, influence=True)
    assert order == sorted(range(3), key=lambda i: -cosines[i])[:2]


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_gradients_through_one_block_at_a_time_are_those_of_the_whole_model(model_type, tmp_path, monkeypatch):
    # logits in pieces of five positions, and one of the last, which predicts nothing
    monkeypatch.setattr(blocks, "LOGITS", 5 * tiny.VOCABULARY)
    model = tiny.make(model_type).eval()
    cuts = cuts_of(model)
    found = losses.taylor(
        model, IDS, lambda step: consumers_of(step, cuts, ("mlp",)), lambda: None, store=OnDisk(tmp_path)
    )
    assert len(found) == 3
    for name, products_NI in found.items():
        layer = model.get_submodule(name)
        layer.weight.requires_grad_(True)
        for n, ids in enumerate(IDS):
            logits = model(input_ids=ids[None]).logits[0, :-1]
            loss = nn.functional.cross_entropy(logits, ids[1:])
            (gradient,) = torch.autograd.grad(loss, layer.weight)
            product = layer.weight.detach() * gradient
            wanted = product.sum(1 if model_type == "gpt2" else 0)
            torch.testing.assert_close(products_NI[n], wanted, rtol=1e-3, atol=1e-6)
        layer.weight.requires_grad_(False)


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "qwen3_moe", "gpt2", "opt", "bert"])
def test_what_is_written_block_by_block_is_what_save_pretrained_writes(model_type, tmp_path):
    """The names and tensors, experts apart as in the files of their kind; tied heads once."""
    source = Checkpoint(tiny.save(tmp_path / "dense", model_type))
    model = source.skeleton()
    source.load_whole(model)
    model.save_pretrained(tmp_path / "wanted")
    cuts = cuts_of(model)
    output = Output(tmp_path / "got", cuts.skeleton(cuts.shape, range(3)), cuts.path, 3)
    for i, name in enumerate(cuts.names):
        output.write_block(i, model.get_submodule(name), model)
    output.finish(model)
    model.config.save_pretrained(tmp_path / "got")
    got, wanted = (Checkpoint(tmp_path / name) for name in ("got", "wanted"))
    assert got.file_of.keys() == wanted.file_of.keys()
    found = got.read(got.ordered_keys())
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.read(wanted.ordered_keys()).items())
    # a shard for each block
    assert len({*got.file_of.values()}) == len(output.outside) + 3
    with torch.no_grad():
        assert torch.equal(whole(model, {"input_ids": IDS})[0], whole(reload(got), {"input_ids": IDS})[0])


def reload(source):
    model = source.skeleton()
    source.load_whole(model)
    return model


def test_obs_on_disk_is_obs_in_memory(layer, tmp_path):
    weight_OI, stats, _ = layer
    groups_GC = torch.arange(32).reshape(16, 2)
    sides = [columns.Side(weight_OI, stats, groups_GC), columns.Side(weight_OI * 2, stats, groups_GC)]
    order, lost = columns.removal(sides, 10, 0.01, at_once=2)
    # the second side is made when it is asked for
    again, lost_again = columns.removal(iter(sides), 10, 0.01, at_once=2, folder=tmp_path / "surgeons")
    assert torch.equal(order, again)
    assert torch.equal(lost, lost_again)
    assert sum(f.stat().st_size for f in (tmp_path / "surgeons").iterdir()) == 2 * 8 * (32 * 32 + 24 * 32)


def test_a_deep_model_is_timed_at_two_depths_and_a_small_one_as_a_whole(monkeypatch):
    monkeypatch.setattr(latency, "_TIMED", 1000)
    assert latency.depths(10, 100, 2000, lambda: None) == (10,)
    assert latency.depths(11, 100, 2000, lambda: None) == (5, 10)
    # more than one block, however large they are
    assert latency.depths(7, 10**6, 10**7, lambda: None) == (1, 2)
    assert latency.depths(11, 100, 2000, lambda: "its blocks are not alike") == (11,)
    with pytest.raises(PlanError, match="not on some of its blocks either: its blocks are not alike"):
        latency.depths(11, 100, 10**18, lambda: "its blocks are not alike")
    # 1 outside, 0.5 a block; 2 outside, 0.25 a block
    sample = Sample(12, {2: None, 4: None})
    assert sample.of([Seconds(2.0, 2.5), Seconds(3.0, 3.0)]) == Seconds(7.0, 5.0)
    # more blocks take no less time
    assert sample.of([Seconds(2.0, 2.5), Seconds(1.9, 3.0)]) == Seconds(2.0, 5.0)
    assert Sample(12, {12: None}).of([Seconds(7.0, 5.0)]) == Seconds(7.0, 5.0)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text"])
def test_a_shallower_model_is_one_of_the_first_blocks_and_shares_them(model_type):
    model, alone = tiny.make(model_type), tiny.make(model_type)
    cuts = cuts_of(model)
    config = cuts.config_of(dataclasses.replace(cuts.shape, layers=2), range(2))
    found = latency.shallower(model, cuts.path, 2, config)
    units.keep_blocks(alone, cuts.path, range(2), cuts.depth)
    with torch.no_grad():
        assert torch.equal(found(input_ids=IDS).logits, alone(input_ids=IDS).logits)
        # the cache has as many layers
        assert len(found(input_ids=IDS, use_cache=True).past_key_values.layers) == 2
        assert len(model(input_ids=IDS, use_cache=True).past_key_values.layers) == 3
    assert {id(p) for p in found.parameters()} < {id(p) for p in model.parameters()}


def test_models_that_are_timed_in_part_are_in_order(tmp_path, llama, words, monkeypatch):
    """Of the dense and of the cut model's folder so many blocks are read, and the report says so."""
    monkeypatch.setattr(latency, "_TIMED", 0)
    seen = []

    def measure(models, prompt, new, rounds=5):
        seen.append([(m.config.num_hidden_layers, m.config.intermediate_size) for m in models])
        assert all(p.isfinite().all() for m in models for p in m.parameters())
        # a block takes less if it is narrower
        return [Seconds(1.0 + m.config.num_hidden_layers * m.config.intermediate_size / 64, 2.0) for m in models]

    monkeypatch.setattr(latency, "measure", measure)
    report = shrink(plan(llama, words, "params=0.9x", units=("mlp",), eval_windows=0), tmp_path / "run")
    left = report["left"]["mlp"]
    assert left < 64
    assert seen == [[(1, 64), (2, 64), (1, left), (2, left)]]
    assert report["latency"]["dense"]["prefill"] == 4.0
    assert report["latency"]["left"]["prefill"] == pytest.approx(1.0 + 3 * left / 64)
    assert any(line.startswith("time was measured on 1 and 2 of 3") for line in report["warnings"])


def test_what_cannot_be_timed_in_part_is_said_and_the_rest_is_done(tmp_path, llama, words, monkeypatch):
    from secateurs.report.page import write

    def refused(*_):
        raise PlanError("its blocks are not alike")

    monkeypatch.setattr(latency, "depths", refused)
    report = shrink(plan(llama, words, "params=0.9x", units=("mlp",)), tmp_path / "run")
    assert "no time was measured: its blocks are not alike" in report["warnings"]
    assert report["latency"]["ratio"] == {}
    assert "Seconds a token" not in write([tmp_path / "run"]).read_text()
    with pytest.raises(PlanError, match="not alike"):
        shrink(plan(llama, words, "latency=0.9x", units=("mlp",)), tmp_path / "timed")
    assert not (tmp_path / "timed").exists()
