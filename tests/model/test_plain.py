"""Models that are stored in another way are read as what they stand for: quantized, GGUF, adapters; and code of their own."""

import importlib.util
import json
import shutil
import sys

import numpy as np
import pytest
import tiny
import torch
from packaging.version import Version
from plans import asked
from safetensors.torch import load_file, save_file

from secateurs.base.errors import CheckpointError, OutputError
from secateurs.model.checkpoint import Checkpoint
from secateurs.model.plain import _READERS
from secateurs.quality.evaluation import measured
from secateurs.quality.settings import Evaluation

BLOCK = 16


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SECATEURS_CACHE", str(tmp_path / "cache"))


def needs(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


def needs_readers():
    """Skip on a transformers whose readers of quantized folders and GGUF are refused."""
    import transformers

    if Version(transformers.__version__) < Version(_READERS):
        pytest.skip(f"transformers {transformers.__version__} is older than {_READERS}")


def stored(folder):
    """All tensors of a folder by name."""
    checkpoint = Checkpoint(folder)
    return checkpoint.read(checkpoint.ordered_keys())


def rewrite(folder, quantize, settings):
    """Replace tensors of a folder by {name: tensor} that `quantize` makes of each, and state how in config.json."""
    needs_readers()
    tensors = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(shard)
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    out = {}
    for name, tensor in tensors.items():
        out |= quantize(name, tensor)
    save_file(out, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return out


def in_blocks(name, weight_OI):
    """Float8 with a scale for every 16 x 16 weights."""
    if weight_OI.dim() != 2 or "layers" not in name or "norm" in name or name.endswith("gate.weight"):
        return {name: weight_OI}
    rows, columns = (n // BLOCK for n in weight_OI.shape)
    blocks = weight_OI.float().reshape(rows, BLOCK, columns, BLOCK)
    scale = blocks.abs().amax((1, 3)) / 448
    eight = (blocks / scale[:, None, :, None]).reshape(weight_OI.shape).to(torch.float8_e4m3fn)
    return {name: eight, f"{name}_scale_inv": scale}


FP8 = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic", "fmt": "e4m3"}


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_fp8_is_read_as_the_product_of_its_values_and_scales(model_type, tmp_path, monkeypatch):
    folder = tiny.save(tmp_path / "fp8", model_type, torch.bfloat16)
    eight = rewrite(folder, in_blocks, FP8)
    # several groups
    monkeypatch.setattr("secateurs.model.plain._BYTES", 9000)
    found = stored(folder)
    assert set(found) == {name for name in eight if not name.endswith("_scale_inv")}
    scaled = 0
    for name, tensor in found.items():
        scale = eight.get(f"{name}_scale_inv")
        want = eight[name].float()
        if scale is not None:
            scaled += 1
            want = want * scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, want.bfloat16()), name
    assert scaled == {"llama": 3 * 7, "mixtral": 3 * (4 + 4 * 3)}[model_type]


def test_a_quantized_model_is_measured_against_its_dequantized_self_and_says_so(tmp_path, words):
    import transformers

    folder = tiny.save(tmp_path / "fp8", "llama", torch.bfloat16)
    rewrite(folder, in_blocks, FP8)
    checkpoint = Checkpoint(folder)
    assert (
        f"{folder} is quantized (fp8): it was dequantized, and quality is measured against the dequantized"
        in checkpoint.note
    )
    found = measured(checkpoint, None, Evaluation(text=str(words), windows=2, seqlen=32), 0)
    assert found.warnings == [checkpoint.note]
    # the plain copy is a Hugging Face folder that needs nothing of ours
    plain = transformers.AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype="auto")
    assert not hasattr(plain.config, "quantization_config")
    assert transformers.AutoTokenizer.from_pretrained(checkpoint.folder)("a").input_ids
    whole = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=transformers.FineGrainedFP8Config(dequantize=True), dtype="auto"
    )
    want = whole.state_dict()
    assert all(torch.equal(tensor, want[name]) for name, tensor in plain.state_dict().items())


def test_a_quantized_model_is_pruned_verified_timed_and_trained_as_its_plain_copy(tmp_path, words):
    import secateurs as sc
    from secateurs.base.run_directory import models_of
    from secateurs.machine.bench import dense_variants
    from secateurs.train import RecoverPlan, recover

    folder = tiny.save(tmp_path / "fp8", "llama", torch.bfloat16)
    rewrite(folder, in_blocks, FP8)
    small = {"eval_text": str(words), "eval_windows": 1, "eval_seqlen": 32}
    report = sc.prune(folder, asked(sc.Plan, method="magnitude", **small), out=tmp_path / "run")
    plain = Checkpoint(folder)
    assert report.warnings[0] == plain.note
    assert report.plan["model"] == str(folder)
    assert sc.verify(tmp_path / "run").warnings == report.warnings
    assert report.totals["sparsity"] == 0.5
    dense, left = models_of(tmp_path / "run")
    assert {v.folder for v in dense_variants(dense)} == {str(plain.folder)}
    assert Checkpoint(left).note is None
    plan = asked(
        RecoverPlan, str(tmp_path / "run"), calibration=str(words), samples=4, seqlen=32, steps=1, batch=1, **small
    )
    assert plain.note in recover(plan, tmp_path / "recovered")["warnings"]


def test_a_plain_copy_is_made_once_and_again_when_the_model_changes(tmp_path):
    folder = tiny.save(tmp_path / "fp8", "llama", torch.bfloat16)
    rewrite(folder, in_blocks, FP8)
    first = Checkpoint(folder)
    file = first.folder / "config.json"
    made, was = file.stat().st_mtime_ns, first.fingerprint()
    again = Checkpoint(folder)
    assert (again.folder, file.stat().st_mtime_ns) == (first.folder, made)
    # the model is the same when its copy is made anew
    shutil.rmtree(first.folder)
    assert Checkpoint(folder).fingerprint() == was
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert Checkpoint(folder).folder != first.folder
    assert Checkpoint(folder).fingerprint() != was


def test_a_copy_that_is_cut_off_is_no_model(tmp_path, monkeypatch):
    folder = tiny.save(tmp_path / "fp8", "llama", torch.bfloat16)
    rewrite(folder, in_blocks, FP8)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("secateurs.model.plain.write_index", full)
        with pytest.raises(
            OutputError, match=r"cannot write .*cache/plain/.*: No space left on device; .* free space and rerun"
        ):
            Checkpoint(folder)
    assert set(stored(folder)) == set(stored(tiny.save(tmp_path / "dense")))


def test_mxfp4_is_read_as_sixteen_values_times_a_power_of_two(tmp_path):
    import transformers

    config = transformers.GptOssConfig(
        vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, num_local_experts=3, num_experts_per_tok=2, max_position_embeddings=128, pad_token_id=257,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path / "mxfp4"
    transformers.GptOssForCausalLM(config).bfloat16().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def four_bits(name, tensor):
        if not name.endswith(("gate_up_proj", "down_proj")):
            return {name: tensor}
        experts, inputs, outputs = tensor.shape
        blocks = torch.randint(256, (experts, outputs, inputs // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(120, 130, (experts, outputs, inputs // 32), generator=generator, dtype=torch.uint8)
        return {f"{name}_blocks": blocks, f"{name}_scales": scales}

    packed = rewrite(folder, four_bits, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens"]})
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    values += [-v for v in values]
    found = stored(folder)
    name = "model.layers.1.mlp.experts.down_proj"
    blocks, scales = packed[f"{name}_blocks"], packed[f"{name}_scales"]
    experts, outputs, groups, _ = blocks.shape
    assert found[name].shape == (experts, groups * 32, outputs)
    for e, o, i in [(0, 0, 0), (0, 0, 1), (2, 31, 63), (1, 5, 40), (2, 0, 33)]:
        byte = int(blocks[e, o, i // 32, i % 32 // 2])
        want = values[byte >> 4 if i % 2 else byte & 15] * 2.0 ** (int(scales[e, o, i // 32]) - 127)
        assert float(found[name][e, i, o]) == want, (e, o, i)
    assert torch.equal(
        found["model.layers.1.self_attn.q_proj.weight"], packed["model.layers.1.self_attn.q_proj.weight"]
    )


def test_compressed_tensors_of_several_kinds_are_refused(tmp_path):
    """transformers 5.23 dequantizes all layers as the first group says: eight bits read as four are other weights."""
    folder = tiny.save(tmp_path / "mixed")
    groups = {
        f"group_{bits}": {"targets": [part], "weights": {"num_bits": bits, "type": "int", "strategy": "channel"}}
        for bits, part in ((4, "re:.*mlp.*"), (8, "re:.*attn.*"))
    }
    rewrite(
        folder, lambda name, tensor: {name: tensor}, {"quant_method": "compressed-tensors", "config_groups": groups}
    )
    with pytest.raises(CheckpointError, match=r"2 ways \(bits 4, 8\)"):
        Checkpoint(folder)


@needs("compressed_tensors")
def test_compressed_tensors_are_read_as_the_product_of_their_values_and_scales(tmp_path):
    folder = tiny.save(tmp_path / "int8", "llama", torch.bfloat16)

    def eight_bits(name, weight_OI):
        if weight_OI.dim() != 2 or "layers" not in name:
            return {name: weight_OI}
        scale = (weight_OI.float().abs().amax(1, keepdim=True) / 127).bfloat16()
        return {
            name: (weight_OI.float() / scale.float()).round().clamp(-128, 127).to(torch.int8),
            f"{name}_scale": scale,
        }

    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False}
    settings = {
        "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }  # fmt: skip
    packed = rewrite(folder, eight_bits, settings)
    found = stored(folder)
    name = "model.layers.2.mlp.down_proj.weight"
    want = packed[name].float() * packed[f"{name}_scale"].float()
    torch.testing.assert_close(found[name].float(), want, rtol=2**-8, atol=0)
    assert set(found) == {n for n in packed if not n.endswith("_scale")}


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "no such method"])
def test_what_nothing_dequantizes_on_a_cpu_is_refused(method, tmp_path):
    folder = tiny.save(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
    with pytest.raises(
        CheckpointError, match=rf"already quantized \({method}\), .*; prune the model that it was made from"
    ):
        Checkpoint(folder)


@pytest.mark.parametrize("kind", ["quantized", "GGUF"])
def test_readers_of_an_old_transformers_are_refused(kind, tmp_path, monkeypatch):
    folder = tiny.save(tmp_path / "model")
    if kind == "GGUF":
        (folder / "model.safetensors.index.json").unlink()
        (folder / "model.gguf").touch()
    else:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "compressed-tensors"}
        (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("transformers.__version__", "5.9.1")
    with pytest.raises(CheckpointError, match=rf"is {kind}, and .* needs transformers 5\.23 or newer; 5\.9\.1 is"):
        Checkpoint(folder)


def test_a_quantized_folder_of_noise_is_refused(tmp_path):
    folder = tiny.save(tmp_path / "fp8", "llama", torch.bfloat16)
    rewrite(folder, in_blocks, FP8)
    (folder / "model.safetensors").write_bytes(b"\xff" * 99)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or corrupt"):
        Checkpoint(folder)


# ---------------------------------------------------------------------------------------------------------------- GGUF


def as_gguf(file, kind):
    """The tiny Llama as llama.cpp writes it: rows of q and k in another order, tensors under other names."""
    import gguf

    needs_readers()
    model = tiny.make("llama")
    c = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(c.vocab_size)
    vocabulary = tiny.tokenizer().get_vocab()
    words = [*sorted(vocabulary, key=vocabulary.get), "Ġa", "Ġb"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([1] * 256 + [3] * 4)
    writer.add_token_merges(["Ġ a"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    names = {
        "model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm", "model.layers": "blk",
    }  # fmt: skip
    for name, tensor in model.state_dict().items():
        heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}.get(name.split(".")[-2])
        data = tensor.numpy()
        if heads:
            data = data.reshape(heads, 2, data.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(data.shape)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if data.ndim > 1 and kind is not None:
            writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model.state_dict()


@needs("gguf")
@pytest.mark.parametrize("named", ["file", "folder"])
def test_gguf_of_plain_floats_is_read_as_it_was_written(named, tmp_path):
    file = tmp_path / "in" / "tiny.gguf"
    file.parent.mkdir()
    want = as_gguf(file, None)
    given = file if named == "file" else file.parent
    checkpoint = Checkpoint(given)
    assert f"{given} is GGUF: it was dequantized" in checkpoint.note
    assert "put the model's own tokenizer files beside it" in checkpoint.note
    found = checkpoint.read(checkpoint.ordered_keys())
    assert set(found) == set(want)
    assert all(torch.equal(tensor, want[name]) for name, tensor in found.items())
    assert checkpoint.tokenizer()("ab").input_ids == tiny.tokenizer()("ab").input_ids


@needs("gguf")
def test_gguf_blocks_are_read_as_the_values_that_they_hold(tmp_path):
    import gguf

    kind = gguf.GGMLQuantizationType.Q8_0
    want = as_gguf(tmp_path / "tiny.gguf", kind)
    tiny.tokenizer().save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path / "tiny.gguf")
    assert checkpoint.note.endswith(str(checkpoint.folder))
    assert "the tokenizer is the one beside it" in checkpoint.note
    found = checkpoint.read(checkpoint.ordered_keys())
    name = "model.layers.1.mlp.down_proj.weight"
    eight = gguf.quants.dequantize(gguf.quants.quantize(want[name].numpy(), kind), kind)
    assert torch.equal(found[name], torch.from_numpy(eight).bfloat16())


@needs("gguf")
def test_gguf_files_that_cannot_be_told_apart_or_read_are_refused(tmp_path):
    needs_readers()
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF" + b"\0" * 40)
    with pytest.raises(CheckpointError, match=r"holds 2 GGUF files, a\.gguf, b\.gguf; name one"):
        Checkpoint(tmp_path)
    (tmp_path / "a.gguf").write_bytes(b"no such thing at all, and long enough")
    with pytest.raises(CheckpointError, match=r"a\.gguf cannot be read: .*not a GGUF file"):
        Checkpoint(tmp_path / "a.gguf")
    as_gguf(tmp_path / "b.gguf", None)
    whole = (tmp_path / "b.gguf").read_bytes()
    for cut in (20, len(whole) // 2, len(whole) - 100):
        (tmp_path / "b.gguf").write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match=r"b\.gguf (is truncated|cannot be read: )"):
            Checkpoint(tmp_path / "b.gguf")
    # it is not taken for the model of a folder that has one
    shutil.copy(tiny.save(tmp_path / "model") / "config.json", tmp_path)
    assert Checkpoint(tmp_path / "model").note is None


# ------------------------------------------------------------------------------------------------------------- adapters


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A folder with a LoRA of the tiny Llama, and the folder of the model."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    folder = tmp_path_factory.mktemp("adapter")
    base = tiny.save(folder / "base")
    settings = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny.make("llama"), settings)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder / "adapter")
    return folder / "adapter", base


def added(adapter, name):
    """What a LoRA adds to a weight: alpha / rank times up @ down, in float64."""
    lora = load_file(adapter / "adapter_model.safetensors")
    stem = f"base_model.model.{name.removesuffix('.weight')}.lora_"
    if f"{stem}A.weight" not in lora:
        return 0.0
    return 12 / 4 * (lora[f"{stem}B.weight"].double() @ lora[f"{stem}A.weight"].double())


@pytest.mark.parametrize("beside", [False, True])
def test_an_adapter_is_merged_into_its_base(beside, adapted, tmp_path):
    adapter, base = adapted
    if beside:
        folder = shutil.copytree(base, tmp_path / "both")
        for file in adapter.iterdir():
            shutil.copy(file, folder)
    else:
        folder = adapter
    checkpoint = Checkpoint(folder)
    into = "the model beside it (without adapter_config.json that would be read alone)" if beside else str(base)
    assert f"{folder} holds an adapter: it was merged into {into}" in checkpoint.note
    found, plain = checkpoint.read(checkpoint.ordered_keys()), stored(base)
    assert set(found) == set(plain)
    changed = 0
    for name, tensor in plain.items():
        want = tensor.double() + added(adapter, name)
        changed += not torch.equal(want, tensor.double())
        torch.testing.assert_close(found[name].double(), want, rtol=0, atol=1e-6)
    assert changed == 3 * 2
    assert checkpoint.tokenizer()("ab").input_ids == [64, 65]


def test_an_adapter_of_a_quantized_model_is_merged_into_what_that_stands_for(adapted, tmp_path):
    adapter, _ = adapted
    base = tiny.save(tmp_path / "fp8", "llama", torch.bfloat16)
    rewrite(base, in_blocks, FP8)
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    settings = json.loads((folder / "adapter_config.json").read_text())
    # a path in an adapter is one beside it
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "../fp8"}))
    name = "model.layers.0.mlp.down_proj.weight"
    want = stored(base)[name].double() + added(adapter, name)
    before = Checkpoint(folder)
    torch.testing.assert_close(stored(folder)[name].double(), want, rtol=2**-7, atol=2**-9)
    # of another base it is another model
    tensors = load_file(base / "model.safetensors")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert Checkpoint(folder).fingerprint() != before.fingerprint()


def test_an_adapter_without_peft_or_base_is_refused(adapted, tmp_path, monkeypatch):
    adapter, _ = adapted
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": None}))
    with pytest.raises(CheckpointError, match="is an adapter that names no base model"):
        Checkpoint(folder)
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "/no/such/model"}))
    with pytest.raises(CheckpointError, match="no folder /no/such/model here"):
        Checkpoint(folder)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(CheckpointError, match=r"needs the library peft; pip install 'secateurs\[models\]'"):
        Checkpoint(adapter)


# ------------------------------------------------------------------------------------------------------ code of its own

CONFIGURATION = """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own"
"""
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *arguments, **named):
        out = super().forward(*arguments, **named)
        out.logits = 2 * out.logits
        return out
"""


@pytest.fixture
def own(llama, tmp_path, monkeypatch):
    """A folder whose config.json names code that lies beside it."""
    folder = shutil.copytree(llama, tmp_path / "own")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own", "architectures": ["OwnForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_own.py").write_text(CONFIGURATION)
    (folder / "modeling_own.py").write_text(MODELING)
    monkeypatch.delenv("SECATEURS_TRUST_REMOTE_CODE", raising=False)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return folder


def test_code_of_a_model_is_refused_until_it_is_allowed(own, words, monkeypatch):
    import transformers

    from secateurs.model.source import trust_remote_code

    with pytest.raises(CheckpointError, match=r"own needs Python code of its own .*allow it with --trust-remote-code"):
        Checkpoint(own).skeleton()
    # nor is that of a tokenizer
    settings = json.loads((own / "tokenizer_config.json").read_text())
    settings |= {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]},
    }
    spoken = (own / "tokenizer_config.json").read_text()
    (own / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"own needs Python code of its own"):
        Checkpoint(own).tokenizer()
    (own / "tokenizer_config.json").write_text(spoken)
    monkeypatch.setenv("SECATEURS_TRUST_REMOTE_CODE", "0")
    trust_remote_code()
    checkpoint = Checkpoint(own)
    model = checkpoint.skeleton()
    assert type(model).__name__ == "OwnForCausalLM"
    checkpoint.load_whole(model)
    ids = torch.arange(40)[None]
    want = transformers.AutoModelForCausalLM.from_pretrained(own, trust_remote_code=True)(input_ids=ids).logits
    torch.testing.assert_close(model(input_ids=ids).logits, want)
    assert measured(Checkpoint(own), None, Evaluation(text=str(words), windows=1, seqlen=32), 0).quality


def test_the_command_line_allows_code_by_a_flag(own):
    import process

    from secateurs import cli

    refused = process.run(cli.main, ["inspect", str(own)])
    assert (refused.code, "allow it with --trust-remote-code" in refused.error) == (1, True)
    allowed = process.run(cli.main, ["inspect", str(own), "--trust-remote-code"])
    assert "needs Python code" not in allowed.error
    assert allowed.code == 0
