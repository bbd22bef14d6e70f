"""The block before removed ones takes over what it can of them: brute-force least squares, and only where it helps."""

import pytest
import tiny
import torch
from plans import asked, changed

from secateurs.model.activations import InMemory
from secateurs.model.blocks import AllLoaded, caller
from secateurs.model.layers import layers_of
from secateurs.model.walk import stream
from secateurs.shrink import cutting
from secateurs.shrink.bridge import bridge
from secateurs.shrink.plan import ShrinkPlan
from secateurs.shrink.run import shrink


@pytest.fixture
def model(llama):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()


def batches(n=64, tokens=64, each=5):
    ids = torch.randint(0, 256, (n, tokens), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": part} for part in torch.split(ids, each)]


def first_step(model, found):
    return next(iter(stream(model, found)))


def removed(model, found):
    """What the blocks after the first make of what leaves it now, for a batch."""
    call, step = caller(model, found), first_step(model, found)

    def wanted(batch):
        out = step.call(step.inputs(batch), batch)
        for i in range(1, len(model.model.layers)):
            out = call(i, out, batch)
        return out

    with torch.no_grad():
        kept = [wanted(batch) for batch in range(len(found))]
    return kept.__getitem__


def down(step):
    return next(x for x in layers_of(step.block, step.name) if x.name.endswith("mlp.down_proj"))


def test_it_is_ridge_regression_by_brute_force(model):
    found = batches()
    step = first_step(model, found)
    layer, gone = down(step), removed(model, found)
    weight = layer.read().clone().double()
    seen, wanted = [], []
    hook = layer.module.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for batch in range(step.batches):
            left = step.call(step.inputs(batch), batch)
            wanted.append(gone(batch) - left)
    hook.remove()
    # every eighth window is held out
    keep = [i for i in range(64) if i % 8 != 7]
    a = torch.cat(seen)[keep].flatten(0, 1).double()
    d = torch.cat(wanted)[keep].flatten(0, 1).double()
    ridge = 0.01 * (a.T @ a).diagonal().mean() * torch.eye(a.shape[1], dtype=torch.float64)
    want = weight + torch.linalg.solve(a.T @ a + ridge, a.T @ d).T
    share = bridge(step, layer, gone, 0.01)
    assert 0 < share < 1
    torch.testing.assert_close(layer.read().double(), want, rtol=1e-3, atol=1e-4)


def test_blocks_that_did_nothing_leave_nothing_to_do(model):
    with torch.no_grad():
        for block in model.model.layers[1:]:
            block.mlp.down_proj.weight.zero_()
            block.self_attn.o_proj.weight.zero_()
    step = first_step(model, batches())
    layer = down(step)
    before = layer.read().clone()
    assert bridge(step, layer, removed(model, batches()), 0.01) is None
    assert torch.equal(layer.read(), before)


def test_blocks_are_called_as_in_the_model_that_they_come_from():
    """Gemma 3 turns queries by 10,000 in some blocks and by 1,000,000 in others, and knows them by their place."""
    model, found = tiny.make("gemma3_text"), batches(4, 24, 2)
    store = InMemory()
    for _ in stream(model, found, AllLoaded(), store, keep_last=True, keep_all=True):
        pass
    call = caller(model, found)
    layers = model.model.layers
    dense = list(layers)
    del layers[1]
    model.config.num_hidden_layers = 2
    model.config.layer_types = ["sliding_attention", "sliding_attention"]
    with torch.no_grad():
        for i in range(3):
            assert torch.equal(call(i, store.read(i, 1), 1), store.read(i + 1, 1))
        # another block in a place takes the place's arguments
        assert torch.equal(call(0, store.read(0, 1), 1, block=dense[2]), call(2, store.read(0, 1), 1))
        assert not torch.equal(call(1, store.read(0, 1), 1, block=dense[2]), call(2, store.read(0, 1), 1))


def test_a_bridged_model_is_nearer_to_the_dense_one(tmp_path, words):
    llama = tiny.save(tmp_path / "dense", shard="10MB")
    plan = asked(ShrinkPlan,
        str(llama), "params=0.7x", units=("layers",), calibration=str(words), samples=32, seqlen=32, eval_text=str(words),
        eval_windows=8, eval_seqlen=32,
    )  # fmt: skip
    found = {refit: shrink(changed(plan, refit=refit), tmp_path / str(refit)) for refit in (True, False)}
    assert found[True]["left"]["kept_layers"] == found[False]["left"]["kept_layers"]
    assert found[True]["quality"]["kl"]["value"] < found[False]["quality"]["kl"]["value"]
    bridges = [b["bridge"] for b in found[True]["blocks"] if "bridge" in b]
    assert bridges
    assert all(b["left"] is None or b["left"] < 1 for b in bridges)
    tuned = [b["reconstruction"] for b in found[True]["blocks"] if "reconstruction" in b]
    assert len(tuned) == len(bridges)
    assert all(0 < t["after"] <= t["before"] for t in tuned), tuned
    assert not any("bridge" in b or "reconstruction" in b for b in found[False]["blocks"])


def test_tuning_is_towards_the_removed_blocks(tmp_path, llama, words, monkeypatch):
    """A block that lost nothing itself is as the dense one: all that it is away from is what went after it."""
    monkeypatch.setattr(cutting, "bridge", lambda *arguments: None)
    plan = asked(
        ShrinkPlan,
        str(llama),
        "params=0.7x",
        units=("layers",),
        calibration=str(words),
        samples=8,
        seqlen=32,
        eval_windows=0,
    )
    tuned = [b["reconstruction"] for b in shrink(plan, tmp_path / "run")["blocks"] if "reconstruction" in b]
    assert tuned
    assert all(t["before"] > 0 for t in tuned), tuned
