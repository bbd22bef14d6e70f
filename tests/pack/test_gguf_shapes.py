"""Shapes that nobody trains but `shrink` leaves: llama.cpp gives the logits of transformers, or the export is refused in a sentence."""

import gguf
import pytest
import tiny
import torch
from gridded import on_grid, save
from in_llama_cpp import llama_cpp, needed
from plans import asked
from transformers import AutoModelForCausalLM

from secateurs.pack.export import export
from secateurs.shrink.plan import ShrinkPlan
from secateurs.shrink.run import shrink

PROMPTS = [[1, 5, 200, 33, 7], list(range(14))]
# hidden, neurons, heads, heads of keys and values, width of a head
SHAPES = {
    "neurons": (32, 60, 4, 2, 8),
    "an odd number of neurons": (32, 61, 4, 2, 8),
    "fewer heads than the width is of": (32, 64, 2, 1, 8),
    "three heads": (32, 64, 3, 3, 8),
    "queries": (32, 64, 6, 2, 8),
    "hidden": (40, 64, 4, 2, 8),
    "hidden, an odd multiple of 32": (96, 64, 4, 2, 24),
    "an odd hidden": (37, 64, 4, 2, 8),
    "width of a head": (32, 64, 4, 2, 10),
    "everything": (35, 51, 3, 1, 6),
    "larger than 256, no multiple": (264, 300, 4, 2, 66),
}


def same(folder, file, off):
    got = llama_cpp(file, PROMPTS, tiny.VOCABULARY)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        want = torch.stack([model(torch.tensor([ids])).logits[0, -1].log_softmax(-1) for ids in PROMPTS])
    assert (got - want).abs().mean() <= off


def made(place, shape, model_type="llama", **more):
    hidden, neurons, heads, groups, width = shape
    return save(
        place, model_type, hidden_size=hidden, intermediate_size=neurons, num_attention_heads=heads, num_key_value_heads=groups,
        head_dim=width, **more,
    )  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("text", "off"), [(None, 3e-3), ("q8_0", 0.04)])
def test_llama_cpp_gives_the_same_for_any_width(tmp_path, name, text, off):
    """Matrices whose inputs are no whole blocks keep their numbers, beside quantized ones. Llama's own config refuses some of these."""
    folder = made(tmp_path / "plain", SHAPES[name], "mistral")
    if text:
        on_grid(folder, text)
    report = export(folder, "gguf", tmp_path / "out.gguf")
    hidden, neurons, heads, _, width = SHAPES[name]
    cut = [n for n, inputs in (("o_proj", heads * width), ("up_proj", hidden), ("down_proj", neurons)) if inputs % 32]
    if text:
        for part in ("o_proj", "up_proj", "down_proj"):
            said = [line for line in report["left"] if f".{part}" in line]
            assert len(said) == (3 if part in cut else 0)
            assert all("blocks of 32 do not divide its" in line for line in said)
    same(folder, tmp_path / "out.gguf", off)


@pytest.mark.parametrize("shape", ["everything", "fewer heads than the width is of", "hidden"])
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_other_types_of_unusual_widths(tmp_path, model_type, shape):
    folder = made(tmp_path / "plain", SHAPES[shape], model_type)
    if model_type == "qwen2":
        # its biases are zeros as it is made
        model = AutoModelForCausalLM.from_pretrained(folder)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.normal_()
        model.save_pretrained(folder)
    export(folder, "gguf", tmp_path / "out.gguf")
    same(folder, tmp_path / "out.gguf", 3e-3)


def test_qwen2_of_fewer_heads_is_written_as_llama_whose_file_has_room_for_them(tmp_path):
    """llama.cpp's qwen2 wants as many queries as the hidden width; its llama turns neighbours, so rows 0 8 1 9 of a head of 16."""
    folder = made(tmp_path / "plain", (32, 64, 1, 1, 16), "qwen2")
    model = AutoModelForCausalLM.from_pretrained(folder)
    bias = model.model.layers[0].self_attn.q_proj.bias.data.normal_().clone()
    model.save_pretrained(folder)
    export(folder, "gguf", tmp_path / "out.gguf")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    assert reader.fields["general.architecture"].contents() == "llama"
    stored = {tensor.name: tensor.data for tensor in reader.tensors}
    neighbours = [0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15]
    assert stored["blk.0.attn_q.bias"].tolist() == bias[neighbours].tolist()
    # as wide as it should be, it is a qwen2
    export(made(tmp_path / "whole", (32, 64, 2, 1, 16), "qwen2"), "gguf", tmp_path / "whole.gguf")
    assert gguf.GGUFReader(tmp_path / "whole.gguf").fields["general.architecture"].contents() == "qwen2"


def test_16_bits_of_odd_widths(tmp_path):
    """llama.cpp rounds what it multiplies to bf16, too."""
    folder = made(tmp_path / "plain", SHAPES["everything"], "mistral", dtype=torch.bfloat16)
    export(folder, "gguf", tmp_path / "out.gguf")
    same(folder, tmp_path / "out.gguf", 0.04)


@pytest.mark.parametrize("units", ["mlp", "heads", "queries", "layers", "hidden"])
def test_what_shrink_leaves_gives_the_same_in_llama_cpp(tmp_path, units, words):
    needed()
    source = save(tmp_path / "dense")
    plan = asked(
        ShrinkPlan, str(source), "params=0.95x", (units,), multiple=1, samples=8, seqlen=32, prompt=16, new=4, calibration=str(words),
        eval_text=str(words), eval_windows=2, eval_seqlen=32,
    )  # fmt: skip
    left = shrink(plan, tmp_path / "run")["left"]
    assert left["parameters"] < AutoModelForCausalLM.from_pretrained(source).num_parameters()
    export(tmp_path / "run" / "model", "gguf", tmp_path / "out.gguf")
    same(tmp_path / "run" / "model", tmp_path / "out.gguf", 3e-3)
