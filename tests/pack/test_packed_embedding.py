"""Embeddings on grids in packed folders, and heads that are one matrix with one."""

import copy
import json
import pickle

import pytest
import tiny
import torch
from gridded import nearest
from safetensors.torch import load_file, save_file
from test_packed_integers import bits, same
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from secateurs.kernels import packed_embedding
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


# embeddings that their class scales, shared ones, tied heads with a bias
_SMALL = {"vocab_size": 260, "d_model": 32, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 257}
_LAYERS = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
           "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "bos_token_id": 256, "scale_embedding": True}  # fmt: skip
_T5 = {"d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
SHARED = {
    "bart": ("BartForConditionalGeneration", {**_SMALL, **_LAYERS}, "model.shared", {"model.encoder.embed_tokens",
             "model.decoder.embed_tokens", "lm_head"}),
    "bart decoder": ("BartForCausalLM", {**_SMALL, **_LAYERS}, "model.decoder.embed_tokens", {"lm_head"}),
    "t5": ("T5ForConditionalGeneration", {**_SMALL, **_T5}, "shared", {"encoder.embed_tokens", "decoder.embed_tokens",
           "lm_head"}),
    "t5 untied": ("T5ForConditionalGeneration", {**_SMALL, **_T5, "tie_word_embeddings": False}, "shared",
                  {"encoder.embed_tokens", "decoder.embed_tokens"}),
    "gemma2": (*tiny.TINY["gemma2"], "model.embed_tokens", {"lm_head"}),
    "gemma3_text": (*tiny.TINY["gemma3_text"], "model.embed_tokens", {"lm_head"}),
    "bert": (*tiny.TINY["bert"], "bert.embeddings.word_embeddings", {"cls.predictions.decoder"}),
}  # fmt: skip


def of_shared(tmp_path, kind, dtype=torch.bfloat16, text="int4/32/asymmetric"):
    """A tiny model of that kind whose embedding alone is on a grid: its folder and the model."""
    architecture, arguments, name, _ = SHARED[kind]
    model = tiny.random(architecture, kind.split()[0], arguments).to(dtype).eval()
    weight = model.get_submodule(name).weight
    scales = nearest(weight.data, parse(text))
    weight.data = scales.rounded(weight.data).to(dtype)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            # a bias of zeros would hide that it was forgotten
            parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)).to(dtype) * 0.1
    model.save_pretrained(tmp_path / "plain")
    write_scales(tmp_path / "plain" / SCALES_FILE, {name: scales})
    return tmp_path / "plain", model


def answers(model, ids):
    """Logits, and what is generated where the model generates."""
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(1)[:, :5]
    with torch.no_grad():
        made = model.generate(ids, max_new_tokens=5, do_sample=False) if model.can_generate() else None
        return model(**inputs).logits, made


@pytest.mark.parametrize("kind", SHARED)
def test_scaled_shared_and_biased_ones_answer_as_the_plain_model(tmp_path, kind):
    _, _, name, tied = SHARED[kind]
    plain, wanted = of_shared(tmp_path, kind)
    result = stage.pack(plain, tmp_path / "packed")
    assert [r["name"] for r in result["layers"] if r["grid"]] == [name]
    assert result["left_out"] == []
    model, info = type(wanted).from_pretrained(tmp_path / "packed", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    table, ids = model.get_submodule(name), tiny.tokens()
    assert isinstance(table, PackedEmbedding)
    for place in tied:
        # one copy in memory
        assert model.get_submodule(place).weight is table.weight
    # a row is that of the plain module bit for bit, scaled or not
    for place in {name, *tied}:
        found = model.get_submodule(place)
        if not isinstance(found, TiedHead):
            assert torch.equal(found(ids), wanted.get_submodule(place)(ids))
    # inputs of the head alone have 8 bits
    logits, made = answers(model, ids)
    right, tokens = answers(wanted, ids)
    assert (logits - right).abs().mean() < 0.03 * right.abs().mean()
    assert made is None or torch.equal(made, tokens)
    if kind != "bert":
        # its class looks for what is tied by the beginning of names, and stops at the scales
        model.tie_weights()
    assert torch.equal(answers(model, ids)[0], logits)
    model.save_pretrained(tmp_path / "again")
    again = type(wanted).from_pretrained(tmp_path / "again")
    assert torch.equal(answers(again, ids)[0], logits)
    again.dequantize()
    assert all(type(again.get_submodule(n)) is type(wanted.get_submodule(n)) for n in {name, *tied})
    assert all(
        torch.equal(a, b) for a, b in zip(wanted.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert torch.equal(answers(again, ids)[0], right)
    stage.unpack(tmp_path / "packed", tmp_path / "back")
    same(bits(tmp_path / "back"), bits(plain))


def test_a_scaled_embedding_is_cast_compiled_and_copied_like_the_plain_one(tmp_path):
    plain, wanted = of_shared(tmp_path, "gemma2")
    stage.pack(plain, tmp_path / "packed")
    model, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "packed"), tiny.tokens()
    table = copy.deepcopy(model.model.embed_tokens)
    assert torch.equal(torch.compile(table, fullgraph=True, backend="aot_eager")(ids), wanted.model.embed_tokens(ids))
    assert torch.equal(pickle.loads(pickle.dumps(table))(ids), table(ids))
    # in fp32 a row is its scale times its integers, which bf16 rounds
    torch.testing.assert_close(table.float()(ids), wanted.model.embed_tokens.float()(ids), rtol=2**-7, atol=0)


class Scaled(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 3


class ByPlace(nn.Embedding):
    """The first row counts twice."""

    def forward(self, ids):
        return super().forward(ids) * torch.where(ids == 0, 2, 1)[..., None]


class Offset(nn.Embedding):
    def forward(self, ids):
        return super().forward(torch.arange(ids.shape[1])[None] + 2)


class Normed(nn.Embedding):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.norm = nn.LayerNorm(sizes[1])


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (nn.Embedding, None), (Scaled, None), (ByPlace, "does more than look rows up and change each of them"),
        (Offset, "does more"), (Normed, "has more than a table: norm.weight"),
    ],
)  # fmt: skip
def test_a_class_that_treats_all_rows_alike_is_packed(kind, said):
    (found,) = tables(nn.ModuleDict({"table": kind(7, 16)}))
    assert found[0] == "table"
    assert found[2] is None if said is None else said in found[2]


def test_an_embedding_that_cannot_be_packed_keeps_its_scales_and_says_why(tmp_path, monkeypatch):
    plain, _ = of_shared(tmp_path, "gemma2")
    monkeypatch.setattr(packed_embedding, "_by_row", lambda _: False)
    result = stage.pack(plain, tmp_path / "packed")
    (why,) = (line for line in result["left_out"] if line.startswith("model.embed_tokens: "))
    assert "a Gemma2TextScaledWordEmbedding does more than look rows up" in why
    assert (tmp_path / "packed" / SCALES_FILE).exists()
    assert "quantization_config" not in json.loads((tmp_path / "packed/config.json").read_text())


def test_what_is_stored_under_two_names_is_left_alone(tmp_path):
    """As T5's files on the hub are."""
    plain, wanted = of_shared(tmp_path, "t5")
    tensors = load_file(plain / "model.safetensors")
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    result = stage.pack(plain, tmp_path / "packed")
    assert "shared: it is stored as encoder.embed_tokens.weight and as shared.weight" in result["left_out"]
    model, ids = type(wanted).from_pretrained(tmp_path / "packed"), tiny.tokens()
    assert torch.equal(answers(model, ids)[0], answers(wanted, ids)[0])


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


class Told(nn.Module):
    """An embedding that is told more than which rows."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 4)

    def forward(self, ids):
        return self.table(input=ids)


def test_a_table_that_is_told_more_than_which_rows_counts_as_read():
    model = Told()
    with _reads(model) as found:
        model(torch.tensor([1]))
    assert found == {"table"}


def test_what_an_embedding_is_tied_to_decides():
    model = Reading(False)
    assert [(name, why) for name, _, why in tables(model)] == [("table", None)]
    model.head.bias = nn.Parameter(torch.zeros(5))
    model.more = nn.Embedding(5, 4)
    model.more.weight = model.table.weight
    assert [(name, why) for name, _, why in tables(model)] == [("table", None)]
    # what transformers does not tie it would not load
    model.all_tied_weights_keys = {"head.weight": "table.weight"}
    assert next(tables(model))[2] == "more.weight is its weight too, and the class does not list it as tied"
    model.all_tied_weights_keys["more.weight"] = "table.weight"
    assert next(tables(model))[2] is None
    model.conv = nn.Conv1d(1, 1, 1)
    model.conv.weight = model.table.weight
    assert next(tables(model))[2] == "another Conv1d holds its weight too"
