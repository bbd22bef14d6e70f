"""What is said where a shape can only be far below its budget."""

import pytest
import tiny
from plans import asked

from secateurs.model.checkpoint import Checkpoint
from secateurs.shrink import shapes
from secateurs.shrink.job import Dense, Job
from secateurs.shrink.plan import ShrinkPlan
from secateurs.shrink.run import shrink


def plan(source, words, budget="params=0.8x", **options):
    small = {"samples": 4, "seqlen": 24, "prompt": 16, "new": 4, "eval_windows": 0}
    return asked(ShrinkPlan, str(source), budget, calibration=str(words), **small, **options)


@pytest.fixture(scope="module")
def six_heads(tmp_path_factory):
    """A Llama of width 96 with 6 heads: transformers takes widths that are multiples of 6."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tiny.save(tmp_path_factory.mktemp("six"), "llama")
    config = LlamaConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def job_of(source, words, budget, **options):
    chosen = plan(source, words, budget, **options)
    return Job(chosen, Dense.of(chosen, Checkpoint(str(source)).skeleton()), None, lambda *_: None)


# all weights go with the width, but for those of norms: 48 of 96 is half, 72 three quarters
COARSE = {
    ("params=0.8x", ("hidden",), 16): (
        "hidden can be cut to 0.500x (hidden 48 of 96), and the next larger is 1.000x (the dense model); "
        "--multiple 8 allows 0.750x (hidden 72 of 96)"
    ),
    # 0.75 is within 5% of 0.78
    ("params=0.78x", ("hidden",), 8): None,
    ("params=0.8x", ("hidden",), 1): (
        "hidden can be cut to 0.750x (hidden 72 of 96), and the next larger is 0.812x (hidden 78 of 96); more --units"
    ),
    ("params=0.8x", ("hidden", "mlp"), 16): None,
    ("params=0.8x", ("layers",), 64): (
        "layers can be cut to 0.715x (layers 2 of 3), and the next larger is 1.000x (the dense model); more --units may allow a "
        "finer one (mlp, heads, queries, hidden)"
    ),
    ("latency=0.8x", ("hidden",), 16): None,
}


@pytest.mark.parametrize(("budget", "kinds", "multiple"), COARSE)
def test_a_step_that_is_coarser_than_the_budget_is_said(budget, kinds, multiple, six_heads, words):
    said = shapes.coarse(job_of(six_heads, words, budget, units=kinds, multiple=multiple))
    wanted = COARSE[budget, kinds, multiple]
    assert said is None if wanted is None else said.startswith(f"budget {budget}: {wanted}"), said


def test_a_coarse_step_is_said_before_the_work_and_in_the_report(six_heads, words, tmp_path):
    told = []
    chosen = plan(six_heads, words, units=("hidden",), multiple=16)
    report = shrink(chosen, tmp_path / "run", say=lambda sentence: told.append((sentence, (tmp_path / "run").exists())))
    assert report["left"]["hidden"] == 48
    assert told == [(report["warnings"][0], False)]
