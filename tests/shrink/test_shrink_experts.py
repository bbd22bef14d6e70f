"""From a folder of a mixture to a smaller one: groups, biases, blocks without a mixture, fewer experts per token."""

import mixtures
import pytest
import tiny
import torch
from plans import asked
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from secateurs.base.errors import PlanError
from secateurs.shrink import cutting
from secateurs.shrink.cuts import cuts_of
from secateurs.shrink.mixture import Mixture, never
from secateurs.shrink.plan import ShrinkPlan
from secateurs.shrink.run import shrink
from secateurs.shrink.sizes import sizes_of


def plan(source, words, budget, **options):
    small = {
        "samples": 8,
        "seqlen": 32,
        "prompt": 16,
        "new": 4,
        "eval_windows": 2,
        "eval_seqlen": 32,
        "units": ("experts",),
    }
    return asked(ShrinkPlan, str(source), budget, calibration=str(words), eval_text=str(words), **{**small, **options})


def saved(folder, model_type):
    mixtures.make(model_type).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def test_experts_go_from_all_groups_alike_and_a_killed_run_keeps_their_biases(tmp_path, words, monkeypatch):
    source = saved(tmp_path / "dense", "deepseek_v3")
    chosen = plan(source, words, "params=0.93x", eval_windows=0)
    written = cutting.write_json

    def dies(file, record):
        written(file, record)
        # its shard is written by then
        if file.name == "block-0001.json":
            raise KeyboardInterrupt

    monkeypatch.setattr(cutting, "write_json", dies)
    with pytest.raises(KeyboardInterrupt):
        shrink(chosen, tmp_path / "run")
    monkeypatch.undo()
    report = shrink(chosen, tmp_path / "run")
    assert (report["dense"]["experts"], report["left"]["experts"]) == (8, 6)
    # the first block has no mixture
    assert report["blocks"][0]["units"] == {}
    removed = report["blocks"][1]["units"]["experts"]["removed"]
    assert [e // 4 for e in removed] == [0, 1]
    dense, left = (AutoModelForCausalLM.from_pretrained(f) for f in (source, tmp_path / "run" / "model"))
    assert report["left"]["parameters"] == sum(p.numel() for p in left.parameters())
    before_E, after_E = (m.model.layers[1].mlp.gate.e_score_correction_bias for m in (dense, left))
    assert torch.equal(after_E, before_E[[e for e in range(8) if e not in removed]])


@pytest.mark.parametrize("model_type", ["deepseek_v2", "glm4_moe", "qwen2_moe sparse", "afmoe"])
def test_models_whose_first_block_is_dense_shrink_load_and_generate(tmp_path, words, model_type):
    source = saved(tmp_path / "dense", model_type)
    told = {}
    report = shrink(
        plan(source, words, "params=0.93x", refit=False),
        tmp_path / "run",
        lambda what, done, total: told.update({what: (done, total)}),
    )
    assert told["cutting"] == (1, 1), "the second block's inputs are made by one batch"
    dense, left = (
        AutoModelForCausalLM.from_pretrained(f, experts_implementation="eager")
        for f in (source, tmp_path / "run" / "model")
    )
    first, second = report["blocks"]
    assert (first["units"], report["dense"]["experts"]) == ({}, 8)
    removed = second["units"]["experts"]["removed"]
    assert len(removed) == 8 - report["left"]["experts"] > 0
    assert report["left"]["parameters"] == sum(p.numel() for p in left.parameters())
    ids = torch.arange(20)[None] + 5
    with torch.no_grad():
        with never([Mixture(dense.model.layers[1], cuts_of(dense).fused)], removed):
            expected = dense(ids).logits
        assert_close(left(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert left.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape == (1, 24)


def test_multiplications_count_the_blocks_without_experts():
    model = mixtures.make("glm4_moe")
    sizes = sizes_of(model, cuts_of(model), ("experts",))
    fused = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    # two of eight; of a head of 8: 2 products of 8 with each pair of tokens
    weights = sum(p.numel() for p in model.model.layers.parameters()) - fused * 6 // 8
    assert sizes.multiplications(sizes.dense, 100) == weights * 100 + 2 * 4 * 2 * 8 * 100**2 + tiny.VOCABULARY * 32
    assert sizes.parameters(sizes.dense) == sum(p.numel() for p in model.parameters())


def test_nothing_removed_changes_nothing_and_fewer_experts_per_token_are_priced(tmp_path, words):
    source = saved(tmp_path / "dense", "qwen3_moe")
    chosen = plan(source, words, "flops=0.99x", experts_per_token=1, refit=False)
    report = shrink(chosen, tmp_path / "run")
    assert (report["dense"]["active"], report["left"]["active"]) == (2, 1)
    assert report["left"]["experts"] == report["dense"]["experts"] == 8
    assert report["loss_of_fewer_experts_per_token"] > 0
    assert report["estimated_loss"] == report["loss_of_fewer_experts_per_token"]
    left, dense = (AutoModelForCausalLM.from_pretrained(f) for f in (tmp_path / "run" / "model", source))
    assert left.config.num_experts_per_tok == 1
    ids = torch.arange(20)[None] + 5
    with torch.no_grad():
        assert not torch.allclose(left(ids).logits, dense(ids).logits, atol=0.1)
        for block in left.model.layers:
            block.mlp.gate.top_k = 2
        assert_close(left(ids).logits, dense(ids).logits)


def test_a_number_per_token_that_is_not_fewer_is_refused(tmp_path, words):
    source = saved(tmp_path / "dense", "qwen3_moe")
    with pytest.raises(PlanError, match="experts-per-token 2 is not fewer: a token is sent to 2 experts"):
        shrink(plan(source, words, "params=0.9x", experts_per_token=2), tmp_path / "run")
    llama = tiny.save(tmp_path / "llama")
    with pytest.raises(PlanError, match="experts-per-token 1 is not fewer: this model has none"):
        shrink(plan(llama, words, "params=0.9x", units=("layers",), experts_per_token=1), tmp_path / "run")
    with pytest.raises(PlanError, match="experts-per-token 0 is too small"):
        plan(source, words, "params=0.9x", experts_per_token=0)
    with pytest.raises(
        PlanError, match="unknown experts 'reep'; write loss, reap, frequency, ream; did you mean 'reap'"
    ):
        plan(source, words, "params=0.9x", experts="reep")
