"""vLLM gives the greedy tokens of transformers for packed folders.

Needs vLLM, here or in the environment whose Python SECATEURS_VLLM_PYTHON names (docs/serving.md).
"""

import gridded
import pytest
import served
import tiny
import torch
from transformers import AutoModelForCausalLM

from secateurs.pack.folder import pack

pytestmark = [
    pytest.mark.skipif(
        served.python() is None, reason=f"vLLM is not installed; name the Python that has it in {served.PYTHON}"
    ),
    pytest.mark.timeout(3600),
]
# vLLM's kernels take heads of 32 and more
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
EAGER = {"enforce_eager": True}


def wanted(folder, dtype=torch.float32):
    """The tokens of transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    found = []
    for prompt in served.PROMPTS:
        ids = torch.tensor([prompt])
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=served.TOKENS,
            min_new_tokens=served.TOKENS, pad_token_id=0,
        )  # fmt: skip
        found.append(made[0, len(prompt) :].tolist())
    return found


def random(place, kind, **changes):
    architecture, arguments = tiny.TINY[kind]
    arguments = {**arguments, **SIZES, **({"head_dim": 32} if "head_dim" in arguments else {}), **changes}
    model = tiny.pruned(tiny.random(architecture, kind, arguments).to(torch.bfloat16))
    for parameter in model.parameters():
        if parameter.dim() == 3:
            # of experts
            parameter.data.masked_fill_(torch.rand(parameter.shape) < 0.5, 0)
    model.save_pretrained(place)
    tiny.tokenizer().save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """{name: (tokens in vLLM or what was raised, the folder)}; vLLM is started once, which takes most of a minute."""
    root = tmp_path_factory.mktemp("served")
    folders = {}
    for kind in ("llama", "qwen2", "qwen3"):
        pack(random(root / kind, kind), root / f"{kind}-packed")
        folders[kind] = root / f"{kind}-packed", EAGER
    folders["compiled"] = folders["llama"][0], {}
    # some of q, k and v as integers, others as floats: o_proj's grid is another, down_proj's has zero points
    grids = {"v_proj": "int8/row", "down_proj": "int5/32/asymmetric"}
    gridded.on_grid(random(root / "grid", "llama"), "int4/64", grids)
    pack(root / "grid", root / "grid-packed")
    folders["zeros and bits"] = root / "grid-packed", EAGER
    made = served.tokens(list(folders.values()))
    return {name: (tokens, folder) for (name, (folder, _)), tokens in zip(folders.items(), made, strict=True)}


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "compiled", "zeros and bits"])
def test_tokens_are_those_of_transformers(found, name):
    tokens, folder = found[name]
    assert tokens == wanted(folder)


def test_packed_experts_are_refused_in_a_sentence(tmp_path):
    pack(random(tmp_path / "mixtral", "mixtral"), tmp_path / "packed")
    (said,) = served.tokens([(tmp_path / "packed", EAGER)])
    assert (
        "mlp.experts.gate_up_proj: packed experts are not served by vLLM; serve what `secateurs pack --dense`" in said
    )
