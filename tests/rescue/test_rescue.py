"""Files of old versions (tools/old_formats.py made those in data/) and of torch, read without the packages that wrote them."""

import json
import shutil
import sys
from pathlib import Path

import formula
import pytest
import tiny
import torch
from command import fails, run
from safetensors.torch import load_file, save_file
from torch.nn.utils import prune
from transformers import AutoModelForCausalLM

from secateurs.base.errors import CheckpointError, OutputError
from secateurs.model.scales import SCALES_FILE, read_scales
from secateurs.pack import folder as stage
from secateurs.rescue import marlin
from secateurs.rescue.folder import KNOWN, rescue
from secateurs.rescue.quantized import bits_of

DATA = Path(__file__).parent / "data"
sys.path.insert(0, str(DATA.parent.parent.parent / "tools"))
import old_formats  # noqa: E402

# name -> (the formats that are found, the grid of every layer)
FOUND = {
    "bitmask-0.8.1": (["sparse-bitmask"], None),
    "bitmask-0.10.2": (["sparse-bitmask"], None),
    "bitmask24-0.9.4": (["sparse-24-bitmask"], None),
    "bitmask-int8-0.10.2": (["sparse-bitmask", "int-quantized"], "int8/row"),
    "bitmask24-int8-0.9.4": (["sparse-24-bitmask", "int-quantized"], "int8/row"),
    "bitmask24-fp8-0.10.2": (["sparse-24-bitmask", "float-quantized"], None),
    "packed-int4-0.10.2": (["pack-quantized"], "int4/32"),
    "packed-int4-zero-0.9.4": (["pack-quantized"], "int4/32/asymmetric"),
    "marlin-int4-0.9.4": (["marlin-24"], "int4/128/fp16"),
    "marlin-int8-0.10.2": (["marlin-24"], "int8/row/fp16"),
}


def tensors(place):
    return {name: t for file in place.glob("model*.safetensors") for name, t in load_file(file).items()}


def wanted(name):
    """All tensors of the model that the old package was given."""
    _, _, zeros, weights, _ = old_formats.FILES[name]
    shape, dtype = old_formats.shape_and_dtype(name)
    found = shape.others(dtype)
    for layer, (rows, inputs) in shape.layers().items():
        found[f"{layer}.weight"] = formula.weight(layer, rows, inputs, zeros, weights, dtype)
    return found


def same_bits(got, want):
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


@pytest.mark.parametrize("name", old_formats.FILES)
def test_old_files_are_read_bit_for_bit(name, tmp_path):
    result = rescue(DATA / name, tmp_path / "out")
    formats, grid = FOUND[name]
    assert result["formats"] == formats
    assert not result["warnings"]
    same_bits(tensors(tmp_path / "out"), wanted(name))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == old_formats.shape_and_dtype(name)[0].config(old_formats.shape_and_dtype(name)[1])
    layers = old_formats.shape_and_dtype(name)[0].layers()
    scales = read_scales(tmp_path / "out" / SCALES_FILE)
    # where one group is the whole row, its grid is that of a row
    rows = {grid, "/".join(["int4", "row", *grid.split("/")[2:]])} if grid and grid.startswith("int4") else {grid}
    assert {str(s.grid) for s in scales.values()} == (rows if grid else set())
    assert scales.keys() == (layers.keys() if grid else set())
    # the zeros are those that were pruned, and the few integers that are 0 besides
    for record in result["layers"]:
        if record["name"] in layers:
            kept = formula.kept(record["name"], *layers[record["name"]], old_formats.FILES[name][2])
            assert 1 - kept.double().mean() <= record["sparsity"] <= 1 - kept.double().mean() + 0.12


@pytest.mark.parametrize(
    "name", ["bitmask-0.10.2", "packed-int4-zero-0.9.4", "marlin-int4-0.9.4", "marlin-int8-0.10.2"]
)
def test_what_was_rescued_is_packed_and_loads(name, tmp_path):
    rescue(DATA / name, tmp_path / "out")
    record = stage.pack(tmp_path / "out", tmp_path / "packed", optimize="size")
    grid = FOUND[name][1]
    assert grid in {layer.get("grid") for layer in record["layers"] if "layers." in layer["name"]}
    plain, packed = (AutoModelForCausalLM.from_pretrained(tmp_path / place) for place in ("out", "packed"))
    tokens = torch.arange(12).view(1, 12) % 16
    with torch.no_grad():
        got, near = (model(tokens).logits.float() for model in (packed, plain))
        want = plain.float()(tokens).logits
    # both form products of 16-bit numbers; with integers the inputs of a layer are rounded to int8
    assert (got - want).norm() <= (0.05 * want.norm() if grid else 2 * (near - want).norm())
    stage.unpack(tmp_path / "packed", tmp_path / "dense")
    same_bits(tensors(tmp_path / "dense"), tensors(tmp_path / "out"))


def test_tensors_of_a_layer_may_lie_in_several_files(tmp_path):
    made = tmp_path / "sharded"
    shutil.copytree(DATA / "bitmask24-int8-0.9.4", made)
    held = load_file(made / "model.safetensors")
    (made / "model.safetensors").unlink()
    names = sorted(held)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, keys in halves.items():
        save_file({key: held[key] for key in keys}, made / file)
    index = {"weight_map": {key: file for file, keys in halves.items() for key in keys}}
    (made / "model.safetensors.index.json").write_text(json.dumps(index))
    rescue(made, tmp_path / "out")
    same_bits(tensors(tmp_path / "out"), wanted("bitmask24-int8-0.9.4"))
    (made / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="00002.*is missing, though.*lists it"):
        rescue(made, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_many_weights_are_written_in_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr("secateurs.rescue.folder._SHARD_WEIGHTS", 3000)
    rescue(DATA / "bitmask-0.8.1", tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3
    same_bits(tensors(tmp_path / "out"), wanted("bitmask-0.8.1"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == formula.VOCABULARY


# ---------------------------------------------------------------------------------------------- torch.nn.utils.prune


def pruned(tmp_path):
    """A tiny Llama whose Linear layers torch prunes, one of them twice, and the weights that it computes with."""
    model = tiny.make("llama")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            prune.l1_unstructured(module, "weight", amount=0.5)
    prune.random_unstructured(model.model.layers[0].mlp.up_proj, "weight", amount=0.3)
    want = {name: model.get_submodule(name.removesuffix(".weight")).weight.detach() for name in layers_of(model)}
    return model, want


def layers_of(model):
    return [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name
    ]


@pytest.mark.parametrize("kind", ["safetensors", "pytorch_model.bin", "checkpoint.pth"])
def test_masks_of_torch_are_applied(kind, tmp_path):
    model, want = pruned(tmp_path)
    made = tmp_path / "made"
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(made)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if kind == "safetensors":
        save_file(state, made / "model.safetensors", metadata={"format": "pt"})
    elif kind == "pytorch_model.bin":
        torch.save(state, made / kind)
        torch.save({"lr": 1.0}, made / "training_args.bin")
    else:
        # as SparseML's trainer and DistributedDataParallel leave it
        torch.save(
            {"epoch": 3, "recipe": "pruners: 50%", "state_dict": {f"module.{k}": t for k, t in state.items()}},
            made / kind,
        )
    result = rescue(made / kind if kind == "checkpoint.pth" else made, tmp_path / "out")
    assert result["formats"][-1] == "torch.nn.utils.prune"
    found = tensors(tmp_path / "out")
    for name, tensor in want.items():
        assert torch.equal(found[name], tensor)
        # zeros, none of them negative
        assert not torch.signbit(found[name][found[name] == 0]).any()
    assert {layer["name"] for layer in result["layers"]} == {name.removesuffix(".weight") for name in want}
    assert next(x["sparsity"] for x in result["layers"] if x["name"].endswith("0.mlp.up_proj")) > 0.6
    if kind == "checkpoint.pth":
        assert (tmp_path / "out" / "recipe.yaml").read_text() == "pruners: 50%"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(tiny.tokens()).logits, model(tiny.tokens()).logits)


def test_what_was_pruned_away_may_be_anything(tmp_path):
    state = {
        "a.weight_orig": torch.tensor([[float("inf"), -2.0, 3.0]]),
        "a.weight_mask": torch.tensor([[0.0, 0.0, 1.0]]),
    }
    torch.save(state, tmp_path / "a.pth")
    result = rescue(tmp_path / "a.pth", tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")["a.weight"].tolist() == [[0.0, 0.0, 3.0]]
    assert "no config.json" in result["warnings"][0]


# --------------------------------------------------------------------------------------------------------- by hand


def test_bits_are_those_of_the_nearest_target():
    groups = {
        "a": {"targets": ["Linear"], "weights": {"num_bits": 8}},
        "b": {"targets": ["re:.*mlp.*"], "weights": {"num_bits": 4}},
        "c": {"targets": ["x.mlp.down"], "weights": {"num_bits": 2}},
        "d": {"targets": ["Embedding"], "weights": None},
    }
    found = [bits_of(name, {"config_groups": groups}) for name in ("x.attn.q", "x.mlp.up", "x.mlp.down")]
    assert found == [8, 4, 2]
    assert bits_of("x", {"config_groups": {"d": groups["d"]}}) is None


def test_places_of_meta_are_each_taken_once():
    places = marlin._meta_places(64, 4).flatten()
    assert sorted(places.tolist()) == list(range(256))


# ------------------------------------------------------------------------------------------------------- bad inputs


def broken(tmp_path, change, name="bitmask-int8-0.10.2", config=None):
    """A folder of data/ with changed tensors."""
    made = tmp_path / "broken"
    shutil.copytree(DATA / name, made)
    held = load_file(made / "model.safetensors")
    change(held)
    save_file(held, made / "model.safetensors")
    if config:
        data = json.loads((made / "config.json").read_text())
        config(data)
        (made / "config.json").write_text(json.dumps(data))
    return made


Q = "model.layers.0.self_attn.q_proj"
BROKEN = {
    "values": (
        lambda t: t.update({f"{Q}.compressed": t[f"{Q}.compressed"][1:]}),
        r"bitmask has \d+ ones, and \d+ values are stored",
    ),
    "shape": (
        lambda t: t.update({f"{Q}.shape": torch.tensor([32, 40])}),
        r"shape is \[32, 40\], and its bitmask \[32, 4\]",
    ),
    "offsets": (lambda t: t.update({f"{Q}.row_offsets": t[f"{Q}.row_offsets"] + 1}), "row_offsets are not those"),
    "no values": (lambda t: t.pop(f"{Q}.compressed"), f"{Q}.compressed is not"),
    "scales": (
        lambda t: t.update({f"{Q}.weight_scale": torch.ones(31, 1)}),
        r"weight is 32 x 32, its scales are \[31, 1\]",
    ),
    "no norm": (lambda t: t.pop("model.norm.weight"), "no tensor for model.norm.weight of LlamaForCausalLM"),
    "nvfp4": (lambda t: t.update({f"{Q}.weight_global_scale": torch.ones(1)}), "nvfp4"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_parts_that_do_not_fit_together_are_refused(what, tmp_path):
    change, said = BROKEN[what]
    with pytest.raises(CheckpointError, match=said):
        rescue(broken(tmp_path, change), tmp_path / "out")
    assert [f.name for f in tmp_path.iterdir()] == ["broken"]


def test_marlin_that_does_not_fit_together_is_refused(tmp_path):
    cut = broken(tmp_path, lambda t: t.update({f"{Q}.meta": t[f"{Q}.meta"][1:]}), "marlin-int4-0.9.4")
    with pytest.raises(CheckpointError, match="meta of 4 bits do not fit together"):
        rescue(cut, tmp_path / "out")
    shutil.rmtree(cut)
    zero = broken(tmp_path, lambda t: t[f"{Q}.meta"].zero_(), "marlin-int4-0.9.4")
    with pytest.raises(CheckpointError, match="does not name two places of each four"):
        rescue(zero, tmp_path / "out")


def test_other_methods_and_plain_folders_are_refused_with_what_is_known(tmp_path, llama):
    with pytest.raises(
        CheckpointError, match="stored in none of these ways.*sparse-24-bitmask.*plain folders are read"
    ):
        rescue(llama, tmp_path / "out")
    gptq = broken(tmp_path, lambda t: None, config=lambda c: c["quantization_config"].update(quant_method="gptq"))
    with pytest.raises(CheckpointError, match=f"'gptq'; import reads {KNOWN[0]}"):
        rescue(gptq, tmp_path / "out")
    with pytest.raises(CheckpointError, match="is not there"):
        rescue(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(OutputError, match="exists; give an empty place"):
        rescue(DATA / "bitmask-0.8.1", llama)


def test_files_that_are_cut_off_are_refused(tmp_path):
    for name, whole in {"model.safetensors": DATA / "bitmask-0.8.1" / "model.safetensors"}.items():
        made = tmp_path / "cut"
        shutil.copytree(whole.parent, made)
        (made / name).write_bytes(whole.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match="truncated or corrupt"):
            rescue(made, tmp_path / "out")
    torch.save({"a.weight": torch.ones(1000)}, tmp_path / "a.pth")
    (tmp_path / "a.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        rescue(tmp_path / "a.pth", tmp_path / "out")


class Whole(torch.nn.Module):
    pass


def test_pickled_code_is_not_run(tmp_path):
    torch.save(Whole(), tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match="would run code when it is read.*Whole"):
        rescue(tmp_path / "model.pth", tmp_path / "out")
    torch.save({"step": 3, "why": ["no", "weights"]}, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match="holds no state_dict: its entries are step, why"):
        rescue(tmp_path / "model.pth", tmp_path / "out")
    torch.save({"a_orig": torch.ones(2)}, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match="a_orig has no a_mask beside it"):
        rescue(tmp_path / "model.pth", tmp_path / "out")
    torch.save({"a_orig": torch.ones(2), "a_mask": torch.tensor([0.5, 1])}, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match="other numbers than 0 and 1"):
        rescue(tmp_path / "model.pth", tmp_path / "out")


# ----------------------------------------------------------------------------------------------------------- command


def test_the_command_says_what_it_read(tmp_path, capsys):
    out, _ = run("import", DATA / "marlin-int4-0.9.4", "--out", tmp_path / "out")
    assert "from marlin-24" in out
    assert "1 layer on the grid int4/128/fp16, which `secateurs pack` stores as integers" in out
    out, _ = run("import", DATA / "bitmask24-fp8-0.10.2", "--out", tmp_path / "fp8", "--json")
    result = json.loads(out)
    assert result["formats"] == ["sparse-24-bitmask", "float-quantized"]
    assert {layer["off_grid"] for layer in result["layers"]} == {"fp8"}
    error = fails(capsys, 1, "import", tmp_path / "out", "--out", tmp_path / "again")
    assert "nothing to rescue" in error
