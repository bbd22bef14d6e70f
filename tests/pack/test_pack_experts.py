"""Folders whose fused experts are packed: format version 3."""

import io
import json
import shutil
import subprocess
import sys

import mixtures
import pytest
import tiny
import torch
import transformers
from command import FAST, run
from gridded import nearest
from safetensors.torch import load_file, save_file

import secateurs
from secateurs.base.errors import CheckpointError, PackError, VerifyError
from secateurs.kernels.packed_embedding import make_dense
from secateurs.kernels.packed_experts import PackedExperts
from secateurs.kernels.packed_linear import DenseLinear, PackedLinear
from secateurs.matrix.grids import parse
from secateurs.model.checkpoint import Checkpoint
from secateurs.model.fused import packable_experts
from secateurs.model.scales import SCALES_FILE, read_scales, write_scales
from secateurs.pack import folder as stage
from secateurs.pack import matrices as stage_of_one
from secateurs.prune.verify import _check_packed, verify

_MOE = {**tiny._LLAMA, "num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES = mixtures.FAMILIES | {
    # stored under another name than the class has; a parameter named weight; all experts at once, weights before the experts
    "granitemoe": ("GraniteMoeForCausalLM", _MOE),
    "jetmoe": ("JetMoeForCausalLM", {**_MOE, "kv_channels": 8}),
    "llama4_text": (
        "Llama4ForCausalLM",
        {**_MOE, "head_dim": 8, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1, "intermediate_size_mlp": 64},
    ),
    # one matrix before the activation, no gate
    "nemotron_h": (
        "NemotronHForCausalLM",
        {
            **{k: v for k, v in tiny._LLAMA.items() if k != "num_hidden_layers"}, "layers_block_type": ["attention", "moe"],
            "head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
            "moe_shared_expert_intermediate_size": 16, "n_group": 1, "topk_group": 1,
        },
    ),
}  # fmt: skip


def matrices(model):
    """Every prunable matrix [O, I] of a model but the head, as it lies in it, by its layer's name."""
    found = {
        name: module.weight.data
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    for name, transposed in packable_experts(model)[0].items():
        for i, weight in enumerate(model.get_parameter(name).data):
            found[f"{name}.{i}"] = weight.T if transposed else weight
    return found


def make(folder, model_type="mixtral", grid=None, zeros=0.5, dtype=torch.float32):
    """A tiny mixture with zeros in every matrix, on a grid if there is one, as a folder; returns the folder and the class."""
    architecture, fields = FAMILIES[model_type]
    model = tiny.random(architecture, model_type.split()[0], fields).eval().to(dtype)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("bias"):
            tensor.detach().normal_(std=0.3)
    scales = {}
    for name, weight_OI in matrices(model).items():
        weight_OI.masked_fill_(torch.rand(weight_OI.shape) < zeros, 0)
        if grid:
            scales[name] = nearest(weight_OI, parse(grid))
            weight_OI.copy_(scales[name].rounded(weight_OI))
    model.save_pretrained(folder)
    if scales:
        write_scales(folder / SCALES_FILE, scales)
    return folder, type(model)


def tensors_of(folder):
    return {
        name: t.contiguous().view(torch.uint8)
        for shard in sorted(folder.glob("*.safetensors"))
        for name, t in load_file(shard).items()
    }


def same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def logits(model, ids=None):
    with torch.no_grad():
        return model(tiny.tokens() if ids is None else ids, use_cache=False).logits


def experts_of(model):
    return [module for module in model.modules() if isinstance(module, PackedExperts)]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_answers_as_its_own_code_does_and_comes_back(tmp_path, model_type):
    plain, cls = make(tmp_path / "plain", model_type)
    result = stage.pack(plain, tmp_path / "packed")
    assert not [line for line in result["left_out"] if "expert" in line]
    model = cls.from_pretrained(tmp_path / "packed").eval()
    assert experts_of(model)
    assert all(isinstance(matrix, PackedLinear) for experts in experts_of(model) for matrix in experts)
    dense = cls.from_pretrained(plain, experts_implementation="eager").eval()
    wanted = logits(dense)
    assert torch.allclose(logits(model), wanted, rtol=1e-4, atol=1e-5)
    # it is the experts that are compared
    for name, parameter in dense.named_parameters():
        if parameter.dim() == 3 and name in packable_experts(dense)[0]:
            parameter.data.mul_(1.5)
    assert not torch.allclose(logits(dense), wanted, rtol=1e-2, atol=1e-3)
    stage.unpack(tmp_path / "packed", tmp_path / "back")
    same(tensors_of(plain), tensors_of(tmp_path / "back"))
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (plain / "config.json").read_text()
    )


@pytest.mark.parametrize(("grid", "zeros"), [("int4/32", 0.75), ("int8/row/asymmetric", 0.0), ("q4_0", 0.75)])
def test_experts_on_grids_are_integers_and_keep_their_scales(tmp_path, grid, zeros):
    plain, cls = make(tmp_path / "plain", "gpt_oss", grid, zeros, torch.bfloat16)
    result = stage.pack(plain, tmp_path / "packed", optimize="size" if zeros else "speed")
    records = {r["name"]: r for r in result["layers"]}
    format = "bitmask" if zeros else "dense"
    expert = records["model.layers.0.mlp.experts.down_proj.3"]
    assert (expert["grid"], expert["format"], expert["shape"]) == (grid, format, [32, 16])
    # words of 64 inputs are half empty here
    assert not zeros or expert["nbytes"] < 0.6 * expert["dense_nbytes"]
    _check_packed(tmp_path / "packed", Checkpoint(plain))
    stage.unpack(tmp_path / "packed", tmp_path / "back")
    same(tensors_of(plain), tensors_of(tmp_path / "back"))
    assert read_scales(tmp_path / "back" / SCALES_FILE).keys() == read_scales(plain / SCALES_FILE).keys()
    packed, dense = (cls.from_pretrained(folder, dtype=torch.float32).eval() for folder in (tmp_path / "packed", plain))
    assert (logits(packed) - logits(dense)).norm() < 0.02 * logits(dense).norm()


def test_one_token_at_a_time_gives_what_all_at_once_do(tmp_path):
    plain, cls = make(tmp_path / "plain", "qwen3_moe")
    stage.pack(plain, tmp_path / "packed")
    model, dense = (cls.from_pretrained(folder).eval() for folder in (tmp_path / "packed", plain))
    ids, cache, found = tiny.tokens()[:1], None, []
    with torch.no_grad():
        for token in ids.split(1, 1):
            out = model(token, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits)
    assert torch.allclose(torch.cat(found, 1), logits(dense, ids), rtol=1e-4, atol=1e-5)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(ids, **settings), dense.generate(ids, **settings))


def test_what_is_loaded_is_saved_copied_and_made_dense_again(tmp_path):
    plain, cls = make(tmp_path / "plain")
    stage.pack(plain, tmp_path / "packed")
    model = cls.from_pretrained(tmp_path / "packed").eval()
    wanted, stored = logits(model), io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    assert torch.equal(logits(torch.load(stored, weights_only=False)), wanted)
    model.save_pretrained(tmp_path / "again")
    other = cls.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(logits(other), wanted)
    for matrix in (m for experts in experts_of(other) for m in experts):
        matrix.weight.data.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), wanted)
    # the base model finds its experts under another prefix
    base = transformers.AutoModel.from_pretrained(tmp_path / "packed")
    assert len(experts_of(base)) == 4
    dense = other.dequantize()
    assert not experts_of(dense)
    dense.save_pretrained(tmp_path / "dense")
    same(tensors_of(plain), tensors_of(tmp_path / "dense"))


def test_without_secateurs_packed_experts_do_not_load(tmp_path, monkeypatch):
    plain, cls = make(tmp_path / "plain")
    # nothing else whose shape would keep a loader out
    choose = stage_of_one.choose
    monkeypatch.setattr(
        stage_of_one, "choose", lambda name, *given: choose(name, *given).but(None if "experts" in name else "no")
    )
    assert stage.pack(plain, tmp_path / "packed")["totals"]["layers_packed"] == 32
    model, told = cls.from_pretrained(tmp_path / "packed", output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    _, told = transformers.AutoModel.from_pretrained(tmp_path / "packed", output_loading_info=True)
    assert told["unexpected_keys"] == {"lm_head.weight"}
    code = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(tmp_path / 'packed')!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode
    assert "mlp.experts.down_proj" in done.stderr
    assert "ignore_mismatched_sizes" in done.stderr
    model.save_pretrained(tmp_path / "again")
    stored = tensors_of(tmp_path / "again")
    assert {name for name, t in stored.items() if not t.numel()} == {
        f"model.layers.{i}.mlp.experts.{name}" for i in range(2) for name in ("gate_up_proj", "down_proj")
    }
    stage.unpack(tmp_path / "again", tmp_path / "plain again")
    back = cls.from_pretrained(tmp_path / "plain again").eval()
    assert torch.equal(logits(back), logits(cls.from_pretrained(plain).eval()))


def test_experts_that_stay_fused_beside_packed_ones_are_saved_with_them(tmp_path):
    plain, cls = make(tmp_path / "plain")
    (shard,) = plain.glob("*.safetensors")
    tensors = load_file(shard)
    fused = [key for key in tensors if "layers.1" in key and ".w2." in key]
    save_file(tensors | {key: torch.randn(tensors[key].shape) for key in fused}, shard, {"format": "pt"})
    stage.pack(plain, tmp_path / "packed")
    model = cls.from_pretrained(tmp_path / "packed").eval()
    assert len(experts_of(model)) == 3
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(cls.from_pretrained(tmp_path / "again").eval()), logits(model))


def test_an_expert_without_zeros_lies_dense_beside_packed_ones(tmp_path):
    plain, cls = make(tmp_path / "plain")
    (shard,) = plain.glob("*.safetensors")
    tensors = load_file(shard)
    tensors["model.layers.1.block_sparse_moe.experts.2.w2.weight"].normal_()
    save_file(tensors, shard, {"format": "pt"})
    result = stage.pack(plain, tmp_path / "packed")
    (record,) = [r for r in result["layers"] if r["format"] == "dense" and "experts" in r["name"]]
    assert record["name"] == "model.layers.1.mlp.experts.down_proj.2"
    assert "0.0% zeros: packed it would take" in record["reason"]
    assert result["totals"]["layers_dense"] == sum(r["format"] == "dense" for r in result["layers"])
    model = cls.from_pretrained(tmp_path / "packed").eval()
    matrix = model.model.layers[1].mlp.experts.down_proj.experts[2]
    assert isinstance(matrix, DenseLinear)
    assert torch.equal(matrix.weight, tensors["model.layers.1.block_sparse_moe.experts.2.w2.weight"])
    assert torch.allclose(logits(model), logits(cls.from_pretrained(plain).eval()), rtol=1e-4, atol=1e-5)
    stage.unpack(tmp_path / "packed", tmp_path / "back")
    same(tensors_of(plain), tensors_of(tmp_path / "back"))


def test_experts_without_zeros_stay_as_they_were(tmp_path):
    plain, _ = make(tmp_path / "plain", zeros=0.0)
    result = stage.pack(plain, tmp_path / "packed")
    assert result["totals"]["layers_packed"] == 0
    assert sum("experts" in r["name"] and "packed it would take" in r["reason"] for r in result["layers"]) == 32
    same(tensors_of(plain), tensors_of(tmp_path / "packed"))


def test_folders_without_packed_experts_load_in_older_releases(tmp_path):
    tiny.save(tmp_path / "llama")
    assert stage.pack(tmp_path / "llama", tmp_path / "packed")["format_version"] == 2
    plain, _ = make(tmp_path / "plain")
    assert stage.pack(plain, tmp_path / "mixture")["format_version"] == 3
    settings = json.loads((tmp_path / "mixture" / "config.json").read_text())["quantization_config"]
    assert settings["format_version"] == 3
    assert settings["experts"]["model.layers.1.mlp.experts.down_proj"] is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda forward: lambda self, *given: forward(self, *given) + 0 * self.down_proj.sum(),
            "PackError: packed exper",
        ),
        (
            lambda forward: lambda self, *given: forward(self, *given) * (2 if "down_proj" in self.__dict__ else 1),
            "another",
        ),
    ],
)
def test_experts_whose_code_does_something_else_with_them_stay_dense_with_the_reason(
    tmp_path, monkeypatch, change, reason
):
    plain, cls = make(tmp_path / "plain")
    of = transformers.models.mixtral.modeling_mixtral.MixtralExperts
    monkeypatch.setattr(of, "forward", change(of.forward))
    result = stage.pack(plain, tmp_path / "packed")
    assert len(result["left_out"]) == 4
    assert all(line.startswith("model.layers.") and reason in line for line in result["left_out"])
    assert not any("experts" in r["name"] for r in result["layers"])
    assert not experts_of(cls.from_pretrained(tmp_path / "packed"))


def test_experts_that_would_not_come_back_stay_dense_with_the_reason(tmp_path):
    plain, cls = make(tmp_path / "plain", dtype=torch.bfloat16)
    (shard,) = plain.glob("*.safetensors")
    tensors = load_file(shard)
    tensors["model.layers.0.block_sparse_moe.experts.1.w3.weight"] = tensors[
        "model.layers.0.block_sparse_moe.experts.1.w3.weight"
    ].float()
    save_file(tensors, shard, {"format": "pt"})
    result = stage.pack(plain, tmp_path / "packed")
    assert result["left_out"] == [
        "model.layers.0.mlp.experts.gate_up_proj: it is stored in bfloat16 and float32 and loaded in bfloat16"
    ]
    assert len(experts_of(cls.from_pretrained(tmp_path / "packed"))) == 3
    stage.unpack(tmp_path / "packed", tmp_path / "back")
    same(tensors_of(plain), tensors_of(tmp_path / "back"))


def test_damage_is_one_sentence(tmp_path):
    folder, cls = make(tmp_path / "plain")
    plain = Checkpoint(folder)
    stage.pack(folder, tmp_path / "packed")
    name = "model.layers.1.mlp.experts.gate_up_proj"

    def damaged(of_config=None, of_tensors=None):
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(tmp_path / "back", ignore_errors=True)
        shutil.copytree(tmp_path / "packed", folder)
        config = json.loads((folder / "config.json").read_text())
        (shard,) = folder.glob("*.safetensors")
        tensors = load_file(shard)
        if of_config:
            of_config(config["quantization_config"])
        if of_tensors:
            of_tensors(tensors)
        (folder / "config.json").write_text(json.dumps(config))
        save_file(tensors, shard, {"format": "pt"})
        return folder

    def without_index(folder):
        (shard,), (index,) = folder.glob("*.safetensors"), folder.glob("*.index.json")
        index.unlink()
        shard.rename(folder / "model.safetensors")
        return folder

    missing = damaged(of_config=lambda settings: settings["layers"].pop(f"{name}.3"))
    for read in (cls.from_pretrained, lambda folder: stage.unpack(folder, tmp_path / "back")):
        with pytest.raises(CheckpointError, match=r"gate_up_proj\.3.* pack it again"):
            read(missing)
    stem = "model.layers.1.mlp.experts.packed_gate_up_proj.3.weight"
    gone = damaged(of_tensors=lambda tensors: [tensors.pop(key) for key in (stem, f"{stem}_mask")])
    without_index(gone)
    with pytest.raises(CheckpointError, match=r"every file lacks .*gate_up_proj\.3 of experts"):
        stage.unpack(gone, tmp_path / "back")
    flipped = damaged(of_tensors=lambda tensors: tensors[f"{stem}_mask"][0, 0, 0].bitwise_xor_(1))
    for read in (cls.from_pretrained, lambda folder: stage.unpack(folder, tmp_path / "back")):
        with pytest.raises(CheckpointError, match="weights, but"):
            read(flipped)
    changed = damaged(of_tensors=lambda tensors: tensors[stem][:3].add_(1))
    with pytest.raises(VerifyError, match=r"experts\.3\.w[13]\.weight in .* is not what .* has"):
        _check_packed(changed, plain)
    with pytest.raises(VerifyError, match="model.norm.weight is in .* and not in"):
        _check_packed(without_index(damaged(of_tensors=lambda tensors: tensors.pop("model.norm.weight"))), plain)
    nowhere = damaged(of_config=lambda settings: settings["experts"].update({"model.layers.1.mlp.gate": None}))
    with pytest.raises(CheckpointError, match=r"model.layers.1.mlp.gate .*experts"):
        stage.unpack(nowhere, tmp_path / "back")


def test_another_way_of_calling_experts_is_refused_with_a_way_out(tmp_path):
    plain, cls = make(tmp_path / "plain")
    stage.pack(plain, tmp_path / "packed")
    # asked for when it is loaded, it is what packed experts need all the same
    model = cls.from_pretrained(tmp_path / "packed", experts_implementation="grouped_mm").eval()
    wanted = logits(model)
    model.set_experts_implementation("grouped_mm")
    with pytest.raises(PackError, match="set_experts_implementation"):
        logits(model)
    make_dense(model)
    assert torch.allclose(logits(model), wanted, rtol=1e-4, atol=1e-5)


def test_a_live_mixture_is_accelerated():
    model = mixtures.make("gpt_oss")
    for weight in matrices(model).values():
        weight.masked_fill_(torch.rand(weight.shape) < 0.5, 0)
    dense_one = model.model.layers[0].mlp.experts.down_proj.data[5].normal_()
    wanted, state = logits(model), {name: t.clone() for name, t in model.state_dict().items()}
    choices = {choice.name: choice for choice in secateurs.accelerate(model)}
    assert choices["model.layers.1.mlp.experts.gate_up_proj.7"].format == "bitmask"
    assert choices["model.layers.0.mlp.experts.down_proj.5"].plain
    assert torch.equal(model.model.layers[0].mlp.experts.down_proj.experts[5].weight, dense_one.T)
    assert len(experts_of(model)) == 4
    assert torch.allclose(logits(model), wanted, rtol=1e-4, atol=1e-5)
    make_dense(model)
    same(
        {k: v.view(torch.uint8) for k, v in model.state_dict().items()},
        {k: v.view(torch.uint8) for k, v in state.items()},
    )


def test_a_mixture_is_pruned_packed_verified_and_measured(tmp_path, words):
    source, out = tiny.save(tmp_path / "source", "qwen3_moe"), tmp_path / "run"
    run("prune", source, "--out", out, "--calibration", words, "--eval-text", words, *FAST)
    text, _ = run("pack", out)
    # q, k, v, o of three blocks, and two matrices of each of four experts
    assert f"{3 * 4 + 3 * 2 * 4} layers packed" in text
    verify(out)
    found = json.loads(run("bench", out, "--prompt", 4, "--new", 3, "--repeats", 1, "--json")[0])
    assert [v["name"] for v in found["variants"]] == ["dense", "packed"]
    run("pack", "--dense", out, "--out", tmp_path / "plain")
    same(tensors_of(out / "model"), tensors_of(tmp_path / "plain"))
