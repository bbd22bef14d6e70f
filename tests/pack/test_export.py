import json
from pathlib import Path

import gguf
import numpy
import onnx
import onnxruntime
import pytest
import tiny
import torch
from command import fails, run
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from gridded import nearest, on_grid, save
from in_llama_cpp import llama_cpp
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig, GgufConfig

from secateurs import cli
from secateurs.base.errors import CheckpointError, OutputError, PackError, PlanError
from secateurs.matrix import grids
from secateurs.matrix.grids import Grid, Scales
from secateurs.model.scales import SCALES_FILE, read_scales
from secateurs.pack import export as stage
from secateurs.pack import folder, to_compressed_tensors, to_gguf
from secateurs.pack.export import export
from secateurs.pack.on_grids import OnGrids


@pytest.fixture
def made(tmp_path):
    """Makes a tiny model on a grid."""

    def make(text, model_type="llama", dtype=torch.float32, **more):
        return on_grid(save(tmp_path / "plain", model_type, dtype), text, **more)

    return make


def logits(model):
    with torch.no_grad():
        return model.eval()(tiny.tokens()).logits


def same(model, wanted):
    """Whether a model has all weights of another, bit for bit."""
    got = model.state_dict()
    return all(torch.equal(got[name], tensor) for name, tensor in wanted.state_dict().items())


# ------------------------------------------------------------------------------------------------- compressed-tensors


@pytest.mark.parametrize("bits", to_compressed_tensors.BITS)
def test_packing_is_that_of_the_library(bits):
    levels = torch.arange(3 * 19).reshape(3, 19) * 7 % (1 << bits)
    assert torch.equal(
        to_compressed_tensors.packed(levels, bits), pack_to_int32((levels - (1 << (bits - 1))).to(torch.int8), bits)
    )


@pytest.mark.parametrize(
    ("text", "dtype"),
    [
        ("int4/32", torch.bfloat16),
        ("int8/row", torch.bfloat16),
        ("int8/32", torch.float32),
        ("q4_0", torch.float16),
        ("int4/row", torch.float16),
    ],
)
def test_transformers_loads_compressed_tensors_bit_for_bit(tmp_path, made, text, dtype):
    plain = made(text, dtype=dtype)
    assert all((scales.scale_OG < 0).any() for scales in read_scales(plain / SCALES_FILE).values())
    result = export(plain, "compressed-tensors", tmp_path / "out")
    assert len(result["layers"]) == 21
    assert not result["left"]
    assert not (tmp_path / "out" / SCALES_FILE).exists()
    assert "model.layers.0.mlp.up_proj.weight" not in load_all(tmp_path / "out")
    wanted, got = (AutoModelForCausalLM.from_pretrained(f) for f in (plain, tmp_path / "out"))
    assert torch.equal(logits(got), logits(wanted))
    assert same(got, wanted)


@pytest.mark.parametrize("text", ["int4/32/asymmetric", "int8/row/asymmetric"])
def test_an_asymmetric_grid_is_dequantized_bit_for_bit_and_a_warning_says_how(tmp_path, made, text):
    plain = made(text, dtype=torch.bfloat16)
    result = export(plain, "compressed-tensors", tmp_path / "out")
    assert "dequantize=True" in result["warnings"][0]
    got = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    assert same(got, AutoModelForCausalLM.from_pretrained(plain))


def test_layers_of_different_bits_are_groups_with_names_and_the_rest_is_ignored(tmp_path, made):
    plain = made("int4/32", others={"mlp": "int8/row"}, skip="o_proj")
    export(plain, "compressed-tensors", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    groups = config["config_groups"].values()
    assert {(g["weights"]["num_bits"], g["weights"]["group_size"], len(g["targets"])) for g in groups} == {
        (4, 32, 10),
        (8, None, 9),
    }
    assert config["ignore"] == [f"model.layers.{i}.self_attn.o_proj" for i in range(3)]
    wanted, got = (AutoModelForCausalLM.from_pretrained(f) for f in (plain, tmp_path / "out"))
    assert torch.equal(logits(got), logits(wanted))
    assert same(got, wanted)


@pytest.mark.parametrize(
    ("text", "dtype", "width", "said"),
    [
        ("int3/row", torch.float32, 64, "4 or 8 bits"),
        ("q4_0", torch.bfloat16, 64, "scales are float16, the model is bfloat16"),
        ("int4/32", torch.float32, 80, "which groups of 32 do not divide"),
    ],
)
def test_what_compressed_tensors_cannot_hold_is_refused_before_anything_is_written(tmp_path, text, dtype, width, said):
    plain = on_grid(save(tmp_path / "plain", dtype=dtype, intermediate_size=width), text)
    with pytest.raises(PackError, match=said):
        export(plain, "compressed-tensors", tmp_path / "out")
    assert [f.name for f in tmp_path.iterdir()] == ["plain"]


def test_a_model_without_linear_layers_is_refused(tmp_path, made):
    with pytest.raises(PackError, match="no layer on a grid is a Linear layer.*--to onnx"):
        export(made("int8/row", "gpt2"), "compressed-tensors", tmp_path / "out")


def load_all(place):
    return {name: t for file in place.glob("model*.safetensors") for name, t in load_file(file).items()}


# --------------------------------------------------------------------------------------------------------------- GGUF


def test_blocks_by_hand():
    """q4_0: weight i is the low half of byte i, weight i + 16 the high half, plus 8; the scale is fp16, here 1/2 and -1/4."""
    integer = torch.arange(64)[None] % 16 - 8
    scales = Scales(Grid(4, 32, half=True), torch.tensor([[0.5, -0.25]], dtype=torch.float16))
    made = to_gguf.blocks(scales, scales.weights(integer))
    half, quarter, levels = [0x00, 0x38], [0x00, 0xB4], [i * 17 for i in range(16)]
    assert made.tolist() == [[*half, *levels, *quarter, *levels]]
    eight = Scales(Grid(8, 32, half=True), torch.tensor([[0.5]], dtype=torch.float16))
    weight = torch.tensor([[-64.0, 63.5, *[0.0] * 29, -0.5]])
    assert to_gguf.blocks(eight, weight).tolist() == [[*half, 128, 127, *[0] * 29, 255]]


@pytest.mark.parametrize("model_type", to_gguf.ARCHITECTURES)
@pytest.mark.parametrize("text", ["q4_0", "q8_0"])
def test_transformers_reads_gguf_back_bit_for_bit(tmp_path, made, model_type, text):
    # transformers reads no width of Qwen3's heads and takes 128
    plain = on_grid(save(tmp_path / "plain", model_type, **({"head_dim": 128} if model_type == "qwen3" else {})), text)
    result = export(plain, "gguf", tmp_path / "out.gguf")
    assert {layer["stored"] for layer in result["layers"]} == {text.upper()}
    got = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="out.gguf", quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    wanted = AutoModelForCausalLM.from_pretrained(plain)
    assert same(got, wanted)
    assert torch.equal(logits(got), logits(wanted))


def test_a_wider_group_is_blocks_of_one_scale_and_bf16_rounds_as_in_the_folder(tmp_path, made):
    plain = made("int4/64", dtype=torch.bfloat16)
    export(plain, "gguf", tmp_path / "out.gguf")
    name, layer = "blk.1.ffn_down.weight", "model.layers.1.mlp.down_proj"
    read = {t.name: t for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert read[name].tensor_type == gguf.GGMLQuantizationType.Q4_0
    got = torch.from_numpy(gguf.dequantize(read[name].data, read[name].tensor_type).copy())
    want = load_all(plain)[f"{layer}.weight"]
    assert torch.equal(got.bfloat16(), want)
    assert torch.equal(got, read_scales(plain / SCALES_FILE)[layer].rounded(want))
    # vectors are fp32, other matrices what they were
    assert read["blk.0.attn_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    assert read["token_embd.weight"].tensor_type == gguf.GGMLQuantizationType.BF16


def test_scales_that_fp16_does_not_hold_are_refused(tmp_path, made):
    plain = made("int8/32", dtype=torch.bfloat16)
    tensors = load_all(plain)
    scales = read_scales(plain / SCALES_FILE)
    name = "model.layers.0.mlp.up_proj"
    # 2^-20 * 1.0078125 has seven bits more than fp16 has there
    small = Scales(scales[name].grid, torch.full_like(scales[name].scale_OG, 1.0078125 * 2**-20))
    tensors[f"{name}.weight"] = small.rounded(tensors[f"{name}.weight"]).bfloat16()
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    stage_scales(plain, {**scales, name: small})
    with pytest.raises(PackError, match=f"{name}.*fp16.*--grid q8_0"):
        export(plain, "gguf", tmp_path / "out.gguf")


def stage_scales(place, scales):
    from secateurs.model.scales import write_scales

    write_scales(place / SCALES_FILE, scales)


def test_an_embedding_and_a_head_on_a_grid_are_quantized_too(tmp_path, made):
    plain = made("q4_0", skip="none")
    tensors, scales = load_all(plain), read_scales(plain / SCALES_FILE)
    assert "lm_head" in scales
    key, name = "model.embed_tokens.weight", "model.embed_tokens"
    scales[name] = nearest(tensors[key], grids.parse("q8_0"))
    tensors[key] = scales[name].rounded(tensors[key])
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    stage_scales(plain, scales)
    export(plain, "gguf", tmp_path / "out.gguf")
    read = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert (read["token_embd.weight"], read["output.weight"]) == ("Q8_0", "Q4_0")
    got = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="out.gguf", quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    assert same(got, AutoModelForCausalLM.from_pretrained(plain))
    # compressed-tensors keeps the embedding plain and says so
    (left,) = export(plain, "compressed-tensors", tmp_path / "out")["left"]
    assert left == f"{name}: it is no Linear layer, and only Linear layers are loaded quantized"
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(got), logits(AutoModelForCausalLM.from_pretrained(plain)))


@pytest.mark.parametrize("name", ["lm_head", "model.embed_tokens"])
def test_a_tied_head_is_one_tensor_under_either_name(tmp_path, name):
    plain = on_grid(save(tmp_path / "plain", tie_word_embeddings=True), "q4_0")
    tensors, scales = load_all(plain), read_scales(plain / SCALES_FILE)
    key = "model.embed_tokens.weight"
    scales[name] = nearest(tensors[key], grids.parse("q8_0"))
    tensors[key] = scales[name].rounded(tensors[key])
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    stage_scales(plain, scales)
    export(plain, "gguf", tmp_path / "out.gguf")
    read = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert read["token_embd.weight"] == "Q8_0"
    assert "output.weight" not in read
    assert export(plain, "compressed-tensors", tmp_path / "out")["left"][0].startswith(f"{name}: it")
    got, wanted = (AutoModelForCausalLM.from_pretrained(f) for f in (tmp_path / "out", plain))
    assert torch.equal(logits(got), logits(wanted))


def test_a_dense_model_is_rounded_as_llama_cpp_rounds_it(tmp_path):
    plain = save(tmp_path / "plain", dtype=torch.bfloat16, intermediate_size=48)
    result = to_gguf.prepare(OnGrids.open(plain), 4)(tmp_path / "model.gguf", lambda *_: None)
    found = {t.name: t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    weights = {
        name: p.detach().float().numpy() for name, p in AutoModelForCausalLM.from_pretrained(plain).named_parameters()
    }
    # in a block of 32 the weight that is farthest from zero is the level 0 of 16, 8 steps below zero
    block = weights["model.layers.0.mlp.up_proj.weight"][3, :32]
    step = numpy.float16(block[numpy.abs(block).argmax()] / -8).astype(numpy.float32)
    levels = numpy.floor(block / (block[numpy.abs(block).argmax()] / -8) + 8.5).clip(0, 15)
    up = found["blk.0.ffn_up.weight"]
    got = gguf.quants.dequantize(up.data, up.tensor_type)[3, :32]
    assert up.tensor_type.name == "Q4_0"
    assert numpy.allclose(got, (levels - 8) * step, rtol=1e-6, atol=0)
    # llama.cpp keeps more bits of these two; rows of 48 are no whole blocks
    assert {found[f"{name}.weight"].tensor_type.name for name in ("token_embd", "output")} == {"Q8_0"}
    assert found["blk.0.ffn_down.weight"].tensor_type.name == "BF16"
    assert found["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    assert "model.layers.0.mlp.down_proj.weight: blocks of 32 do not divide its 48 inputs" in result["left"]


def test_rows_that_are_no_whole_blocks_stay_plain_and_are_named(tmp_path):
    plain = on_grid(save(tmp_path / "plain", intermediate_size=48), "q4_0")
    result = export(plain, "gguf", tmp_path / "out.gguf")
    assert result["left"] == [
        f"model.layers.{i}.mlp.down_proj: blocks of 32 do not divide its 48 inputs" for i in range(3)
    ]


@pytest.mark.parametrize(
    ("model_type", "changed", "said"),
    [
        ("gpt2", {}, "type llama, mistral, qwen2, qwen3"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "type 'dynamic'"),
        ("qwen3", {"attention_bias": True}, "biases of its attention"),
    ],
)
def test_models_that_llama_cpp_would_run_otherwise_are_refused(tmp_path, model_type, changed, said):
    plain = on_grid(save(tmp_path / "plain", model_type, **changed), "q4_0")
    with pytest.raises(CheckpointError, match=said):
        export(plain, "gguf", tmp_path / "out.gguf")


def test_the_context_is_the_window_that_a_model_attends_to(tmp_path, made):
    result = export(made("q4_0", "mistral"), "gguf", tmp_path / "out.gguf")
    assert "last 16 tokens" in result["warnings"][0]
    assert field(tmp_path / "out.gguf", "llama.context_length") == 16


def field(file, name):
    return gguf.GGUFReader(file).fields[name].contents()


def test_the_frequencies_of_llama_3(tmp_path):
    """Of 4 frequencies 1, .1, .01, .001 (theta 1e4, heads of 8) with wavelengths 6.3, 63, 628, 6283: those below 32 / 4 stay, those
    above 32 / 1 are divided by 8."""
    rope = {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    export(on_grid(save(tmp_path / "plain", rope_parameters=rope), "q4_0"), "gguf", tmp_path / "out.gguf")
    read = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert numpy.allclose(read["rope_freqs.weight"], [1, 8, 8, 8])


def pieces(folder, **changes):
    """A tokenizer of pieces with byte fallback, as Llama 2 has it, beside a model of 260 words."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{i:02X}>": 3 + i for i in range(256 - 10)}}
    vocabulary |= {c: len(vocabulary) + i for i, c in enumerate(("▁", "a", "b", "ab", "▁ab"))}
    data = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [
            {"id": i, "content": c, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
            for i, c in enumerate(("<unk>", "<s>", "</s>"))
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None, "post_processor": None, "decoder": None,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": True, "byte_fallback": True, "ignore_merges": False, "vocab": vocabulary,
            "merges": [["a", "b"], ["▁", "ab"]],
        },
        **changes,
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(data))
    return vocabulary


def test_a_tokenizer_of_pieces_has_the_rank_of_a_merge_as_its_score(tmp_path, made):
    plain = made("q4_0")
    vocabulary = pieces(plain)
    export(plain, "gguf", tmp_path / "out.gguf")
    scores, kinds, tokens = (
        field(tmp_path / "out.gguf", f"tokenizer.ggml.{name}") for name in ("scores", "token_type", "tokens")
    )
    assert field(tmp_path / "out.gguf", "tokenizer.ggml.model") == "llama"
    assert (scores[vocabulary["ab"]], scores[vocabulary["▁ab"]]) == (0, -1)
    assert [kinds[i] for i in (0, 1, 3, vocabulary["ab"])] == [2, 3, 6, 1]
    # rows of the embedding without a token
    assert (tokens[258], kinds[258]) == ("[PAD258]", 5)
    assert field(tmp_path / "out.gguf", "tokenizer.ggml.add_space_prefix") is True


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "has a Lowercase"),
        ({"normalizer": None}, "does not write spaces"),
        ({"model": {"type": "WordLevel", "vocab": {}, "unk_token": "a"}}, "WordLevel"),
    ],
)
def test_tokenizers_that_llama_cpp_would_run_otherwise_are_refused(tmp_path, made, changes, said):
    plain = made("q4_0")
    pieces(plain, **changes)
    with pytest.raises(CheckpointError, match=said):
        export(plain, "gguf", tmp_path / "out.gguf")


def test_a_split_that_llama_cpp_does_not_know_is_refused(tmp_path, made):
    plain = made("q4_0")
    data = json.loads((plain / "tokenizer.json").read_text())
    data["pre_tokenizer"] = {"type": "Whitespace"}
    (plain / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="Whitespace.*gpt-2, smollm"):
        export(plain, "gguf", tmp_path / "out.gguf")


@pytest.mark.parametrize(("text", "off"), [(None, 3e-3), ("q4_0", 0.04), ("q8_0", 0.04)])
@pytest.mark.parametrize("model_type", to_gguf.ARCHITECTURES)
def test_llama_cpp_gives_the_same(tmp_path, made, model_type, text, off):
    """Unquantized its cache is in fp16; quantized its activations have 8 bits too."""
    plain = made(text, model_type) if text else save(tmp_path / "plain", model_type)
    export(plain, "gguf", tmp_path / "out.gguf")
    prompts = [[1, 5, 200, 33, 7], list(range(14))]
    got = llama_cpp(tmp_path / "out.gguf", [*prompts, "It's about 12"], tiny.VOCABULARY)
    model = AutoModelForCausalLM.from_pretrained(plain).eval()
    prompts.append(AutoTokenizer.from_pretrained(plain)("It's about 12")["input_ids"])
    with torch.no_grad():
        want = torch.stack([model(torch.tensor([ids])).logits[0, -1].log_softmax(-1) for ids in prompts])
    assert (got - want).abs().mean() <= off


@pytest.mark.real
def test_llama_cpp_reads_the_text_of_a_trained_model_of_pieces_as_transformers_does(tmp_path):
    source = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "stories260K"
    if not source.is_dir():
        pytest.skip(f"{source} is absent")
    export(source, "gguf", tmp_path / "out.gguf")
    texts = ["Once upon a time, there was", "Once upon  a time,\n\tI'm 1234 years — old!", "Ünïcode 猫 🙂 x"]
    got = llama_cpp(tmp_path / "out.gguf", texts, 512)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source).eval(), AutoTokenizer.from_pretrained(source)
    with torch.no_grad():
        want = [model(**tokenizer(text, return_tensors="pt")).logits[0, -1].log_softmax(-1) for text in texts]
    assert (got - torch.stack(want)).abs().max() < 0.03


# --------------------------------------------------------------------------------------------------------------- ONNX


def test_onnxruntime_gives_the_same(tmp_path):
    """On another batch of another length; 1e-5 is the order of fp32 sums. Integers are read back."""
    grids = {"mlp": "int3/32/asymmetric", "v_proj": "int8/row"}
    plain = on_grid(save(tmp_path / "plain", num_hidden_layers=1), "int4/32", grids)
    result = export(plain, "onnx", tmp_path / "out")
    assert [layer["stored"] for layer in result["layers"]].count("int8") == 1
    held = onnx.load(tmp_path / "out" / "model.onnx")
    integers = {t.name.rpartition(".")[0]: t for t in held.graph.initializer if t.name.endswith("level_IO")}
    int8, uint4, int4 = onnx.TensorProto.INT8, onnx.TensorProto.UINT4, onnx.TensorProto.INT4
    assert sorted(t.data_type for t in integers.values()) == sorted([int8, *[uint4] * 3, *[int4] * 3])
    weights = load_all(plain)
    for name, scales in read_scales(plain / SCALES_FILE).items():
        weight_OI = weights[f"{name}.weight"]
        want_OI = scales.integers(weight_OI).int()
        want_OI += 0 if scales.zero_OG is None else scales.grid.spread(scales.zero_OG.int(), weight_OI.shape[1])
        assert onnx.numpy_helper.to_array(integers[f"model.{name}"]).astype(int).T.tolist() == want_OI.tolist()
    settings = onnxruntime.SessionOptions()
    settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", settings)
    ids = torch.arange(21).reshape(3, 7)
    (got,) = session.run(["logits"], {"input_ids": ids.numpy()})
    with torch.no_grad():
        want = AutoModelForCausalLM.from_pretrained(plain).eval()(ids).logits
    assert torch.allclose(torch.from_numpy(got), want, rtol=0, atol=1e-5)


def test_onnx_of_layers_stored_as_inputs_by_outputs(tmp_path):
    """The graph is run against the model in export() itself."""
    plain = on_grid(save(tmp_path / "plain", "gpt2", n_layer=1), "int4/32")
    assert len(export(plain, "onnx", tmp_path / "out")["layers"]) == 4


def test_onnx_of_other_kinds_of_models_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="BertModel; to ONNX go causal"):
        export(tiny.save(tmp_path / "plain", "bert base"), "onnx", tmp_path / "out")


# -------------------------------------------------------------------------------------------------------- all of them


def test_dense_is_the_folder_without_its_scales(tmp_path, made):
    plain = made("int3/row", dtype=torch.bfloat16)
    export(plain, "dense", tmp_path / "out")
    assert not (tmp_path / "out" / SCALES_FILE).exists()
    assert same(*(AutoModelForCausalLM.from_pretrained(f) for f in (tmp_path / "out", plain)))


def test_dense_of_a_packed_folder(tmp_path, made):
    plain = made("int8/row")
    folder.pack(plain, tmp_path / "packed")
    export(tmp_path / "packed", "dense", tmp_path / "out")
    assert same(*(AutoModelForCausalLM.from_pretrained(f) for f in (tmp_path / "out", plain)))


@pytest.mark.parametrize("to", ["compressed-tensors", "gguf"])
def test_scales_of_other_weights_are_noticed_and_nothing_is_left(tmp_path, made, to):
    plain = made("q8_0")
    tensors = load_all(plain)
    tensors["model.layers.2.self_attn.k_proj.weight"][3, 5] += 1e-3
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        PackError, match=r"model.layers.2.self_attn.k_proj: 1 of 512 weights.*row 3, input 5.*other weights"
    ):
        export(plain, to, tmp_path / f"out{stage.TARGETS[to].ending}")
    assert [f.name for f in tmp_path.iterdir()] == ["plain"]


def test_a_fused_layer_is_refused(tmp_path, made):
    plain = made("int8/row", "mixtral", skip="experts")
    scales = read_scales(plain / SCALES_FILE)
    some = next(iter(scales.values()))
    stage_scales(plain, {"model.layers.0.mlp.experts.gate_up_proj.0": some})
    with pytest.raises(PackError, match="experts.gate_up_proj.0 .* larger tensor"):
        export(plain, "compressed-tensors", tmp_path / "out")


def test_a_place_is_not_overwritten_and_a_target_is_known(tmp_path, made):
    plain = made("int8/row")
    for to, out, error in [
        ("dense", plain, OutputError),
        ("gguf", tmp_path / "out", PlanError),
        ("gguff", tmp_path / "out.gguf", PlanError),
    ]:
        with pytest.raises(error):
            export(plain, to, out)
    (tmp_path / "taken.gguf").touch()
    with pytest.raises(OutputError, match="exists"):
        export(plain, "gguf", tmp_path / "taken.gguf")
    # an empty folder is a place
    (tmp_path / "empty").mkdir()
    export(plain, "dense", tmp_path / "empty")


def test_what_a_killed_export_left_is_no_hindrance(tmp_path, made):
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "model-00001-of-00099.safetensors").touch()
    plain = made("int8/row")
    export(plain, "compressed-tensors", tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1
    assert not (tmp_path / "out.part").exists()


def test_a_folder_without_scales_is_not_called_quantized(tmp_path):
    with pytest.raises(CheckpointError, match="no grids.safetensors"):
        export(tiny.save(tmp_path / "plain"), "compressed-tensors", tmp_path / "out")


def test_the_command(tmp_path, made, capsys):
    plain = made("q4_0")
    out, _ = run("export", plain, "--to", "gguf", "--out", tmp_path / "out.gguf")
    assert "21 layers as Q4_0" in out
    with pytest.raises(SystemExit, match="0"):
        cli.main(["export", str(plain), "--to", "dense", "--out", str(tmp_path / "d"), "--json"])
    assert json.loads(capsys.readouterr().out)["to"] == "dense"
    assert "did you mean 'onnx'?" in fails(capsys, 2, "export", plain, "--to", "onx", "--out", tmp_path / "e")
