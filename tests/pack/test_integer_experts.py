"""Experts that `prune --bits` puts on grids: packed as integers, run by the kernels, against float64 loops."""

import json

import gridded
import pytest
import tiny
import torch
from command import FAST, run
from safetensors.torch import load_file
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM

from secateurs.kernels.packed_experts import packed_in
from secateurs.kernels.packed_linear import PackedLinear
from secateurs.model.scales import SCALES_FILE, read_scales
from secateurs.prune.verify import verify

EXPERTS = "model.layers.1.mlp.experts"
# inputs of as many as the words of integers have
SIZES = {"hidden_size": 64, "intermediate_size": 64}


@pytest.fixture(
    scope="module",
    params=[("mixtral", "0", SIZES), ("qwen3_moe", "0.75", {**SIZES, "moe_intermediate_size": 64})],
    ids=["integers", "nonzeros"],
)
def made(request, tmp_path_factory, words):
    """A run of prune --bits 8 on a mixture that is packed, and the format that its experts have to have."""
    model_type, sparsity, sizes = request.param
    place = tmp_path_factory.mktemp(model_type)
    source, out = gridded.save(place / "source", model_type, torch.bfloat16, **sizes), place / "run"
    options = ("--bits", 8, "--sparsity", sparsity, "--calibration", words, "--eval-text", words)
    run("prune", source, "--out", out, *options, *FAST)
    run("pack", out, "--optimize", "size")
    return out, "dense" if sparsity == "0" else "bitmask"


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def weights(out):
    """{expert's name: scale * integer in float64} of the plain folder, one number after the other."""
    model, found = loaded(out / "model"), {}
    for name, scales in read_scales(out / "model" / SCALES_FILE).items():
        if ".experts." not in name:
            continue
        path, _, number = name.rpartition(".")
        integers = scales.integers(model.get_parameter(path)[int(number)].detach().bfloat16())
        width = scales.grid.width(integers.shape[1])
        found[name] = torch.tensor(
            [
                [float(scales.scale_OG[o, i // width]) * int(integer) for i, integer in enumerate(row)]
                for o, row in enumerate(integers)
            ],
            dtype=torch.float64,
        )
    return found


def test_every_matrix_is_its_integers_times_its_scales(made):
    out, format = made
    model, wanted = loaded(out / "packed"), weights(out)
    # three blocks of four experts, two matrices each
    assert len(wanted) == 3 * 4 * 2
    torch.manual_seed(3)
    for name, weight_OI in wanted.items():
        path, _, number = name.rpartition(".")
        owner, _, leaf = path.rpartition(".")
        matrix = packed_in(model.get_submodule(owner))[leaf][int(number)]
        assert isinstance(matrix, PackedLinear)
        assert (str(matrix.grid), matrix.format) == ("int8/64", format)
        x = torch.randn(5, weight_OI.shape[1])
        with torch.no_grad():
            y = linear(x, getattr(model.get_submodule(owner), leaf)[int(number)])
        want = x.double() @ weight_OI.T
        # half of one of 127 steps of an input, for each weight, and the sum's own
        spread = x.abs().amax().double() / 254 * weight_OI.norm(dim=1)
        assert ((y - want).abs() <= 4 * spread + 1e-3).all(), name


def test_a_mixture_of_integers_is_a_loop_over_its_tokens(made):
    """Each token's experts, weighed, token after token in float64."""
    out, _ = made
    model, wanted = loaded(out / "packed"), weights(out)
    torch.manual_seed(4)
    x, index, shares = (
        torch.randn(6, 64),
        torch.tensor([[t % 4, (t + 1 + t // 4) % 4] for t in range(6)]),
        torch.rand(6, 2),
    )
    with torch.no_grad():
        found = model.get_submodule(EXPERTS)(x, index, shares)
    loop = torch.zeros(6, 64, dtype=torch.float64)
    for t in range(6):
        for e, share in zip(index[t].tolist(), shares[t].tolist(), strict=True):
            gate, up = (wanted[f"{EXPERTS}.gate_up_proj.{e}"] @ x[t].double()).chunk(2)
            loop[t] += share * (wanted[f"{EXPERTS}.down_proj.{e}"] @ (gate / (1 + (-gate).exp()) * up))
    assert (found - loop).norm() < 0.02 * loop.norm()


def test_it_generates_what_the_plain_folder_finds_likely(made):
    out, _ = made
    plain, packed, ids = loaded(out / "model"), loaded(out / "packed"), tiny.tokens()[:1]
    with torch.no_grad():
        wanted = plain(ids).logits
        # inputs have 8 bits in the kernels
        assert (packed(ids).logits - wanted).abs().mean() < 0.03 * wanted.abs().mean()
        said = packed.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        after = plain(said).logits[0, ids.shape[1] - 1 : -1]
    # tokens that end a text were not allowed
    allowed = after.clone()
    allowed[:, plain.generation_config.eos_token_id or 0] = -torch.inf
    chosen = after.gather(1, said[0, ids.shape[1] :, None])[:, 0]
    assert (allowed.amax(1) - chosen <= 0.1 * after.abs().amax(1)).all()


def test_bytes_are_those_of_the_file_and_verify_finds_the_plain_weights(made):
    out, format = made
    verify(out)
    packed = json.loads((out / "report.json").read_text())["packed"]
    records = {r["name"]: r for r in packed["layers"]}
    (shard,) = (out / "packed").glob("*.safetensors")
    stored = load_file(shard)
    for e in range(4):
        record = records[f"{EXPERTS}.down_proj.{e}"]
        own = [t for name, t in stored.items() if name.startswith(f"{EXPERTS}.packed_down_proj.{e}.")]
        # values and scales, and of those without their zeros the mask
        assert len(own) == (2 if format == "dense" else 3)
        assert record["nbytes"] == sum(t.nbytes for t in own)
    experts = [r for r in packed["layers"] if ".experts." in r["name"]]
    assert len(experts) == 3 * 4 * 2
    share = sum(r["nbytes"] for r in experts) / sum(r["dense_nbytes"] for r in experts)
    # 8 bits of 16 and a scale for 64, with 64 bytes of padding a matrix; or those of a quarter, and a bit for each
    assert 0.5 < share < 0.54 if format == "dense" else 0.19 < share < 0.3


def test_made_dense_it_is_the_plain_model(made):
    out, _ = made
    dense = AutoModelForCausalLM.from_pretrained(out / "packed").dequantize()
    wanted = AutoModelForCausalLM.from_pretrained(out / "model").state_dict()
    found = dense.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
