"""Packed folders whose layers lie on grids: format version 2."""

import io
import json
from dataclasses import replace

import pytest
import tiny
import torch
from gridded import on_grid
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from secateurs.base.errors import CheckpointError, PackError, PlanError, VerifyError
from secateurs.kernels import formats
from secateurs.kernels.packed_linear import PackedLinear
from secateurs.matrix.grids import Scales, tensors_of
from secateurs.model.checkpoint import Checkpoint
from secateurs.model.scales import SCALES_FILE, read_scales, write_scales
from secateurs.pack import folder as stage
from secateurs.pack import matrices
from secateurs.prune.verify import _check_packed
from secateurs.report.run_tables import print_packed

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture
def made(tmp_path):
    """Makes a tiny model on a grid, packed."""

    def make(text, model_type="llama", dtype=torch.bfloat16, **more):
        plain = on_grid(tiny.save(tmp_path / "plain", model_type, dtype), text, **more)
        return plain, stage.pack(plain, tmp_path / "packed"), tmp_path / "packed"

    return make


def bits(folder):
    """The bits of all weights of a folder, and its scales."""
    checkpoint = Checkpoint(folder)
    tensors = checkpoint.read(checkpoint.file_of)
    scales, grids = tensors_of(read_scales(folder / SCALES_FILE))
    return {name: t.contiguous().view(torch.uint8) for name, t in (tensors | scales).items()}, grids


def same(one, other):
    (tensors, grids), (others, more) = one, other
    assert grids == more
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)


@pytest.mark.parametrize(
    "text", ["int4/32", "int8/row/asymmetric", "int3/32/asymmetric", "int2/64", "int6/row", "q4_0"]
)
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", formats.FORMATS)
def test_there_and_back_bit_for_bit_with_the_scales(tmp_path, made, text, model_type, kind, monkeypatch):
    choose = matrices.choose
    monkeypatch.setattr(matrices, "choose", lambda *given: replace(c, format=kind) if (c := choose(*given)).grid else c)
    plain, result, packed = made(text, model_type, skip="head")
    assert {r["format"] for r in result["layers"] if r["grid"]} == {kind}
    assert result["totals"]["layers_packed"] == len(read_scales(plain / SCALES_FILE))
    assert {r["grid"] for r in result["layers"]} - {None} == {text}
    config = json.loads((packed / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 2
    # all scales are in the packed layers
    assert not (packed / SCALES_FILE).exists()
    stage.unpack(packed, tmp_path / "back")
    same(bits(tmp_path / "back"), bits(plain))


def test_it_loads_generates_and_is_saved_again(tmp_path, made):
    plain, _, packed = made("int4/32")
    ids = tiny.tokens()
    model = AutoModelForCausalLM.from_pretrained(packed).eval()
    wanted = AutoModelForCausalLM.from_pretrained(plain).eval()
    assert isinstance(model.get_submodule(UP), PackedLinear)
    with torch.no_grad():
        # inputs have 8 bits in the kernels: about 1% of the logits
        assert (model(ids).logits - wanted(ids).logits).abs().mean() < 0.03 * wanted(ids).logits.abs().mean()
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    dense = again.dequantize()
    assert all(
        torch.equal(a, b) for a, b in zip(wanted.state_dict().values(), dense.state_dict().values(), strict=True)
    )


def test_a_folder_is_packed_for_speed_or_for_size(tmp_path, made, monkeypatch):
    """40% zeros on int8, which no crossing says to leave out."""
    monkeypatch.setattr("secateurs.kernels.packed_linear.BITMASK_FROM", {})
    plain, fast, _ = made("int8/64")
    assert {r["format"] for r in fast["layers"] if r["grid"]} == {"dense"}
    small = stage.pack(plain, tmp_path / "small", optimize="size")
    assert {r["format"] for r in small["layers"] if r["grid"]} == {"bitmask"}
    assert (fast["optimize"], small["optimize"]) == ("speed", "size")
    layers = len(read_scales(plain / SCALES_FILE))
    assert (fast["totals"]["layers_slower"], small["totals"]["layers_slower"]) == (0, layers)
    assert small["totals"]["nbytes"] == small["totals"]["least_nbytes"] == fast["totals"]["least_nbytes"]
    # of 32 inputs all integers take a word of 64, those that are left what they are
    assert small["totals"]["folder_nbytes"] < fast["totals"]["folder_nbytes"]
    stage.unpack(tmp_path / "small", tmp_path / "back")
    same(bits(tmp_path / "back"), bits(plain))
    # both say what the other would give
    first = next(r["name"] for r in small["layers"] if r["slower"])
    said = printed(small)
    assert f"Slower: {layers} layers take longer for one token than with their zeros, first {first}: int8/64" in said
    assert "--optimize size" not in said
    saved = fast["totals"]["nbytes"] - small["totals"]["nbytes"]
    assert f"{layers} layers keep zeros that would take less left out" in (said := printed(fast))
    assert f"--optimize size saves {saved / 1e6:.1f} MB more." in said
    assert "Slower" not in said
    with pytest.raises(PlanError, match="cannot optimize for 'bytes'; write speed or size"):
        stage.pack(plain, tmp_path / "none", optimize="bytes")


def printed(result):
    text = io.StringIO()
    print_packed(result, "run/packed", Console(file=text, width=10_000))
    return text.getvalue()


def test_layers_of_different_grids_and_without_one(tmp_path, made):
    plain, result, packed = made("int4/32", others={"mlp": "int8/row/asymmetric"}, skip="o_proj")
    config = json.loads((packed / "config.json").read_text())["quantization_config"]["layers"]
    assert {name: layer.get("grid") for name, layer in config.items() if ".1." in name} == {
        **{f"model.layers.1.self_attn.{x}_proj": "int4/32" for x in "qkv"},
        **{f"model.layers.1.mlp.{x}_proj": "int8/row/asymmetric" for x in ("gate", "up", "down")},
    }
    assert result["totals"]["layers_packed"] == len(config) == 19
    stage.unpack(packed, tmp_path / "back")
    same(bits(tmp_path / "back"), bits(plain))


def test_scales_of_layers_that_stay_plain_are_kept_beside_them(tmp_path, monkeypatch):
    plain = on_grid(tiny.save(tmp_path / "plain", "llama", torch.bfloat16), "int4/32")
    monkeypatch.setattr(stage, "read_by_code", lambda _: ({UP}, None))
    result = stage.pack(plain, tmp_path / "packed")
    (record,) = [r for r in result["layers"] if r["name"] == UP]
    assert (record["format"], record["grid"]) == ("dense", None)
    assert list(read_scales(tmp_path / "packed" / SCALES_FILE)) == [UP]
    stage.unpack(tmp_path / "packed", tmp_path / "back")
    same(bits(tmp_path / "back"), bits(plain))


def test_a_weight_that_is_not_on_its_grid_is_named(tmp_path):
    plain = on_grid(tiny.save(tmp_path / "plain", "llama"), "int4/32")
    tensors = load_file(plain / "model.safetensors")
    tensors[f"{UP}.weight"][7, 9] += 1e-3
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PackError, match=rf"{UP}: 1 of 2048 .*row 7, input 9.*{SCALES_FILE} belongs to other weights"):
        stage.pack(plain, tmp_path / "packed")


def test_sizes_are_those_of_the_files_and_nothing_else_is_stored(made):
    """int4/32 dense: half a byte a weight and two for a scale, rows and inputs rounded up to 4 and 64, 64 bytes of padding."""
    _, result, packed = made("int4/32")
    (record,) = [r for r in result["layers"] if r["name"] == "model.layers.0.mlp.down_proj"]
    stored = load_file(next(packed.glob("model*.safetensors")))
    own = {name: t for name, t in stored.items() if name.startswith("model.layers.0.mlp.down_proj.")}
    assert record["nbytes"] == sum(t.nbytes for t in own.values())
    if record["format"] == "dense":
        assert record["nbytes"] == 32 * 64 // 2 + 32 * 2 * 2 + 64


def test_a_folder_of_version_1_loads(tmp_path):
    plain = tiny.save(tmp_path / "plain", "llama", torch.bfloat16)
    tiny.pruned(AutoModelForCausalLM.from_pretrained(plain)).save_pretrained(plain)
    (plain / "model.safetensors.index.json").unlink()
    packed = tmp_path / "packed"
    assert stage.pack(plain, packed)["totals"]["layers_packed"] == 22
    config = json.loads((packed / "config.json").read_text())
    # as version 1 wrote it
    config["quantization_config"]["format_version"] = 1
    assert set(config["quantization_config"]["layers"][UP]) == {"format", "survivors", "transposed"}
    (packed / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(packed)
    assert isinstance(model.get_submodule(UP), PackedLinear)
    stage.unpack(packed, tmp_path / "back")
    same(bits(tmp_path / "back"), bits(plain))


def test_a_loaded_bitmask_of_integers_is_the_model(tmp_path, made, monkeypatch):
    choose = matrices.choose
    monkeypatch.setattr(
        matrices, "choose", lambda *given: replace(c, format="bitmask") if (c := choose(*given)).grid else c
    )
    plain, _, packed = made("int4/32")
    dense = AutoModelForCausalLM.from_pretrained(packed).dequantize()
    wanted = AutoModelForCausalLM.from_pretrained(plain)
    assert all(
        torch.equal(a, b) for a, b in zip(wanted.state_dict().values(), dense.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"grid": "int9/64"}, "unknown grid 'int9/64'"),
        ({"grid": "int8/32"}, "mismatch|bytes"),
        ({"length": None}, "length None"),
        ({"grid": None}, "packed as 'dense'"),
    ],
)
def test_damage_is_one_sentence(made, changes, said):
    _, _, packed = made("int4/32")
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["layers"][UP] |= {"format": "dense", **changes}
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises((CheckpointError, RuntimeError), match=said):
        AutoModelForCausalLM.from_pretrained(packed)


def test_damaged_scales_are_noticed_by_both_readers(tmp_path, made):
    _, _, packed = made("int4/32")
    shard = next(packed.glob("model*.safetensors"))
    tensors = load_file(shard)
    # NaN in bf16
    tensors[f"{UP}.weight_scale"].view(-1)[0] = 0x7FC0
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="not finite"):
        AutoModelForCausalLM.from_pretrained(packed)
    with pytest.raises(CheckpointError, match=rf"{UP}.*not finite"):
        stage.unpack(packed, tmp_path / "back")


def test_verify_compares_weights_and_scales(made):
    plain, _, packed = made("int4/32")
    result = Checkpoint(plain)
    _check_packed(packed, result)
    scales = read_scales(plain / SCALES_FILE)
    # the weight of a group of zeros says nothing of its scale
    changed = Scales(scales[UP].grid, scales[UP].scale_OG * 2)
    write_scales(plain / SCALES_FILE, {**scales, UP: changed})
    with pytest.raises(VerifyError, match=f"{UP}.scale in .* is not what"):
        _check_packed(packed, result)
    write_scales(plain / SCALES_FILE, {name: s for name, s in scales.items() if name != UP})
    with pytest.raises(VerifyError, match=f"{UP}.scale"):
        _check_packed(packed, result)


def test_other_versions_are_refused(tmp_path, made):
    _, _, packed = made("int4/32")
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["format_version"] = max(formats.VERSIONS) + 1
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="version 4, this secateurs reads versions 1, 2, 3"):
        AutoModelForCausalLM.from_pretrained(packed)
    with pytest.raises(CheckpointError, match="version 4, this secateurs reads versions 1, 2, 3"):
        stage.unpack(packed, tmp_path / "back")
