"""vLLM without our plugin gives the greedy tokens of transformers for what needs none: shrunk folders, 2:4 zeros, exported integers.

Needs vLLM, here or in the environment whose Python SECATEURS_VLLM_PYTHON names (docs/serving.md).
"""

import gridded
import pytest
import served
import torch
from plans import asked
from test_vllm import EAGER, pytestmark, random, wanted
from transformers import AutoModelForCausalLM

from secateurs.matrix import patterns
from secateurs.pack.export import export
from secateurs.pack.folder import pack
from secateurs.shrink.plan import ShrinkPlan
from secateurs.shrink.run import shrink

__all__ = ["pytestmark"]
# what goes, of which type of model, until when
SHRUNK = {
    "neurons": ("llama", "mlp", "params=0.8x"),
    "heads": ("llama", "heads", "params=0.9x"),
    "heads of Qwen2": ("qwen2", "heads", "params=0.9x"),
    "query heads": ("qwen3", "queries", "params=0.95x"),
    "layers": ("llama", "layers", "params=0.8x"),
    "width": ("llama", "hidden", "params=0.8x"),
    "experts": ("mixtral", "experts", "params=0.8x"),
    "experts of Qwen3": ("qwen3_moe", "experts", "params=0.8x"),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory, words):
    """{name: (tokens in vLLM or what was raised, those of transformers)}; two processes of vLLM for all."""
    root = tmp_path_factory.mktemp("plain")
    jobs, wants = {}, {}
    for name, (kind, units, budget) in SHRUNK.items():
        source = random(root / f"{name} dense", kind)
        plan = asked(
            ShrinkPlan, str(source), budget, (units,), multiple=4, samples=8, seqlen=32, prompt=16, new=4, calibration=str(words),
            eval_text=str(words), eval_windows=2, eval_seqlen=32,
        )  # fmt: skip
        report = shrink(plan, root / name)
        assert report["left"]["parameters"] < report["dense"]["parameters"]
        jobs[name] = root / name / "model", EAGER
    sparse = random(root / "2:4", "llama")
    model = AutoModelForCausalLM.from_pretrained(sparse)
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data[~patterns.parse("2:4").keep(torch.rand(module.weight.shape), 0.5)] = 0
    model.save_pretrained(sparse)
    jobs["2:4"] = sparse, EAGER
    pack(sparse, root / "2:4 packed")
    export(root / "2:4 packed", "dense", root / "2:4 unpacked")
    jobs["2:4, packed and back"] = root / "2:4 unpacked", EAGER
    for text in ("int4/32", "int4/32/asymmetric", "int8/32"):
        grid = gridded.on_grid(random(root / text.replace("/", " "), "llama"), text)
        place = root / f"{grid.name} exported"
        export(grid, "compressed-tensors", place)
        # vLLM's CPU kernels for integers take 16-bit activations
        jobs[text] = place, {**EAGER, "dtype": "bfloat16"}
        wants[text] = wanted(grid, torch.bfloat16)
    wants |= {name: wanted(folder) for name, (folder, _) in jobs.items() if name not in wants}
    # vLLM makes its groups of experts with the first model of a process, or never
    mixtures = [name for name in jobs if "experts" in name]
    made = {}
    for names in (mixtures, [name for name in jobs if name not in mixtures]):
        made |= zip(names, served.tokens([jobs[name] for name in names], plugin=False), strict=True)
    for name, tokens in made.items():
        print(name, tokens if isinstance(tokens, str) else "equal" if tokens == wants[name] else "unequal")
    return {name: (tokens, wants[name]) for name, tokens in made.items()}


@pytest.mark.parametrize(
    "name", [*(n for n in SHRUNK if "Qwen2" not in n), "2:4", "2:4, packed and back", "int4/32", "int4/32/asymmetric"]
)
def test_tokens_are_those_of_transformers_without_the_plugin(found, name):
    tokens, want = found[name]
    assert tokens == want


def test_vllm_s_cpu_kernels_refuse_8_bits(found):
    """When they know them, docs/serving.md and docs/commands.md have to say so."""
    tokens, _ = found["int8/32"]
    assert "Failed to find a kernel" in tokens


def test_vllm_s_qwen2_has_no_place_for_fewer_heads(found):
    """It takes a head to be as wide as the hidden width over the heads; `shrink` warns of it."""
    tokens, _ = found["heads of Qwen2"]
    assert "exceeds dimension size" in tokens


def test_a_packed_folder_needs_the_plugin(tmp_path):
    pack(random(tmp_path / "llama", "llama"), tmp_path / "packed")
    (said,) = served.tokens([(tmp_path / "packed", EAGER)], plugin=False)
    assert "secateurs" in said
