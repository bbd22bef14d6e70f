"""Embeddings on grids in packed folders, and heads that are one matrix with one."""

import json

import pytest
import tiny
import torch
from gridded import nearest
from test_packed_integers import bits, same
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from secateurs.kernels.formats import pack
from secateurs.kernels.packed_embedding import PackedEmbedding, TiedHead, make_dense, tables
from secateurs.kernels.packed_linear import PackedLinear
from secateurs.matrix.grids import Scales, parse
from secateurs.model.reads import _reads
from secateurs.model.scales import SCALES_FILE, write_scales
from secateurs.pack import folder as stage

GRIDS = ("int8/64", "int6/row", "int5/32/asymmetric", "int4/64/asymmetric", "int3/32", "int2/row/asymmetric", "q4_0")


def embedding(text, rows=10, inputs=70, dtype=torch.bfloat16):
    """A packed embedding, and its weight."""
    weight_OI = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(3)).to(dtype)
    scales = nearest(weight_OI, parse(text))
    weight_OI = scales.rounded(weight_OI).to(dtype)
    return PackedEmbedding.of(pack(weight_OI, "dense", scales)), weight_OI


def test_a_row_by_hand():
    """Codes 5 0 7 3 2 in three bits on a scale of -2, minus a zero of 4."""
    weight_OI = torch.tensor([[0.0, 0, 0, 0, 0], [-2.0, 8, -6, 2, 4]])
    scales = Scales(parse("int3/row"), torch.tensor([[1.0], [-2.0]], dtype=torch.bfloat16))
    made = PackedEmbedding.of(pack(weight_OI, "dense", scales))
    # the second row's run is that of panel 0, word 0, row 1
    assert made.weight[24:26].tolist() == [0b11000101, 0b00100111]
    assert made(torch.tensor([1])).tolist() == [[-2.0, 8.0, -6.0, 2.0, 4.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("text", GRIDS)
def test_rows_are_those_of_the_plain_weight_bit_for_bit(text, dtype):
    made, weight_OI = embedding(text, dtype=dtype)
    ids = torch.tensor([[9, 0, 3, 3], [4, 5, 8, 1]])
    found = made(ids)
    assert found.dtype == dtype
    assert torch.equal(found, weight_OI[ids])
    # no zero has a sign
    assert not (found == 0)[found.signbit()].any()
    assert made(ids[:, :0]).shape == (2, 0, 70)
    assert torch.equal(make_dense(nn.Sequential(made))[0].weight, weight_OI)


@pytest.mark.parametrize("row", [-1, 10, 11])
def test_a_row_that_is_not_there_is_refused(row):
    # 10 rows are three panels of four
    made, _ = embedding("int4/64")
    with pytest.raises(IndexError, match=f"row {row} of an embedding of 10 rows"):
        made(torch.tensor([0, row]))


def test_a_tied_head_multiplies_with_what_its_embedding_stores():
    made, weight_OI = embedding("int4/64/asymmetric")
    head, linear = TiedHead(made), PackedLinear.of(made.packed())
    x = torch.randn(2, 3, 70, dtype=torch.bfloat16)
    assert torch.equal(head(x), linear(x))
    model = nn.ModuleDict({"table": made, "head": head})
    assert list(dict(model.named_parameters())) == ["table.weight"]
    make_dense(model)
    assert model["head"].weight is model["table"].weight
    assert torch.equal(model["head"](x), x @ weight_OI.T)


def saved(
    tmp_path, model_type, dtype=torch.bfloat16, text="int4/32/asymmetric", which=("wte", "embed_tokens", "lm_head")
):
    """A tiny model with its embedding and head alone on a grid."""
    folder = tiny.save(tmp_path / "plain", model_type, dtype)
    model, scales = AutoModelForCausalLM.from_pretrained(folder), {}
    for name, module in model.named_modules():
        known = [name for name in scales if model.get_submodule(name).weight is getattr(module, "weight", None)]
        if name.endswith(which) and not known:
            scales[name] = nearest(module.weight.data, parse(text))
            module.weight.data = scales[name].rounded(module.weight.data).to(dtype)
    for file in folder.glob("model*"):
        file.unlink()
    model.save_pretrained(folder)
    write_scales(folder / SCALES_FILE, scales)
    return folder, model.eval()


@pytest.mark.parametrize(
    ("model_type", "name", "tied"), [("llama", "model.embed_tokens", False), ("gpt2", "transformer.wte", True)]
)
def test_it_loads_looks_up_multiplies_and_comes_back(tmp_path, model_type, name, tied):
    plain, wanted = saved(tmp_path, model_type)
    result = stage.pack(plain, tmp_path / "packed")
    assert {r["name"] for r in result["layers"] if r["grid"]} == ({name} if tied else {name, "lm_head"})
    assert result["left_out"] == []
    assert not (tmp_path / "packed" / SCALES_FILE).exists()
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    table, ids = model.get_submodule(name), tiny.tokens()
    assert isinstance(table, PackedEmbedding)
    assert isinstance(model.lm_head, TiedHead if tied else PackedLinear)
    # one copy in memory
    assert (model.lm_head.weight is table.weight) == tied
    with torch.no_grad():
        assert torch.equal(table(ids), wanted.get_submodule(name)(ids))
        logits = model(ids).logits
        assert (logits - wanted(ids).logits).abs().mean() < 0.03 * wanted(ids).logits.abs().mean()
        assert model.generate(ids[:1], max_new_tokens=3, do_sample=False).shape == (1, 13)
    # a class without the head
    base = AutoModel.from_pretrained(tmp_path / "packed")
    assert torch.equal(base.get_input_embeddings()(ids), wanted.get_input_embeddings()(ids))
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, logits)
    dense = again.dequantize()
    assert (dense.lm_head.weight is dense.get_submodule(name).weight) == tied
    assert all(
        torch.equal(a, b) for a, b in zip(wanted.state_dict().values(), dense.state_dict().values(), strict=True)
    )
    stage.unpack(tmp_path / "packed", tmp_path / "back")
    same(bits(tmp_path / "back"), bits(plain))


def test_rows_that_are_looked_up_are_all_stored(tmp_path, monkeypatch):
    monkeypatch.setattr("secateurs.kernels.packed_linear.BITMASK_FROM", {(f"int{b}", isa): 0.0 for b in (2, 4, 8) for isa in (
        "scalar", "avx2", "avx512", "neon")})  # fmt: skip
    plain, _ = saved(tmp_path, "llama", text="int2/64")
    model = AutoModelForCausalLM.from_pretrained(plain)
    # a seventh of the rows is left
    model.model.embed_tokens.weight.data[37:] = 0
    model.lm_head.weight.data[37:] = 0
    model.save_pretrained(plain)
    records = {r["name"]: r for r in stage.pack(plain, tmp_path / "packed")["layers"] if r["grid"]}
    assert records["lm_head"]["format"] == "bitmask"
    assert records["model.embed_tokens"]["format"] == "dense"
    assert records["model.embed_tokens"]["reason"].endswith("rows are looked up")


def test_an_embedding_that_cannot_be_packed_keeps_its_scales_and_says_why(tmp_path):
    plain, _ = saved(tmp_path, "gemma2")
    result = stage.pack(plain, tmp_path / "packed")
    (why,) = (line for line in result["left_out"] if line.startswith("model.embed_tokens: "))
    assert "does more than look rows up" in why
    assert (tmp_path / "packed" / SCALES_FILE).exists()
    assert "quantization_config" not in json.loads((tmp_path / "packed/config.json").read_text())


class Reading(nn.Module):
    """An embedding and a head that are one matrix, which `outside` multiplies with itself."""

    def __init__(self, outside):
        super().__init__()
        self.table, self.head, self.outside = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False), outside
        self.head.weight = self.table.weight

    def forward(self, ids):
        x = self.table(ids)
        return x @ self.table.weight.T if self.outside else self.head(x)


@pytest.mark.parametrize("outside", [True, False])
def test_a_table_that_code_reads_is_found_under_all_its_names(outside):
    model = Reading(outside)
    with _reads(model) as found:
        model(torch.tensor([1]))
    assert found == ({"table", "head"} if outside else set())


def test_what_an_embedding_is_tied_to_decides():
    model = Reading(False)
    assert [(name, why) for name, _, why in tables(model)] == [("table", None)]
    model.head.bias = nn.Parameter(torch.zeros(5))
    assert "a head that has a bias" in next(tables(model))[2]
    model.more = nn.Embedding(5, 4)
    model.head, model.more.weight = None, model.table.weight
    assert [(name, why) for name, _, why in tables(model)] == [("table", "another Embedding holds its weight too")]
