import json
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from secateurs.base.errors import CheckpointError
from secateurs.model.checkpoint import Checkpoint, resolve
from secateurs.model.discover import layout_of
from secateurs.model.miniature import small_instance


@pytest.fixture
def folder(llama, tmp_path):
    """A copy to break."""
    return shutil.copytree(llama, tmp_path / "model")


def first_shard(folder):
    return sorted(folder.glob("*.safetensors"))[0]


@pytest.mark.parametrize("model_type", tiny.TINY)
def test_loading_by_blocks_gives_what_from_pretrained_gives(model_type, tmp_path):
    import transformers

    tiny.save(tmp_path, model_type)
    checkpoint = Checkpoint(tmp_path)
    model = checkpoint.skeleton()
    assert all(p.device.type == "meta" for p in model.parameters())
    want = getattr(transformers, tiny.TINY[model_type][0]).from_pretrained(tmp_path).state_dict()
    checked = set()
    for name in checkpoint.block_names(model):
        checkpoint.load(model, name)
        for key, tensor in model.state_dict().items():
            if key.startswith(name + "."):
                assert torch.equal(tensor, want[key]), key
                checked.add(key)
        checkpoint.release(model)
    checkpoint.load_outside(model)
    for key, tensor in model.state_dict().items():
        if key not in checked:
            assert torch.equal(tensor, want[key]), key
            checked.add(key)
    assert checked == set(want)
    checkpoint.release(model)
    assert all(p.device.type == "meta" for p in model.parameters())


@pytest.mark.parametrize("model_type", tiny.TINY)
def test_a_model_in_16_bits_has_the_buffers_that_from_pretrained_gives(model_type, tmp_path):
    """Rotary frequencies stay in fp32, though no file has them."""
    import transformers

    tiny.save(tmp_path, model_type, torch.bfloat16)
    checkpoint = Checkpoint(tmp_path)
    model = checkpoint.skeleton()
    checkpoint.load_whole(model)
    want = getattr(transformers, tiny.TINY[model_type][0]).from_pretrained(tmp_path, dtype="auto").eval()
    buffers = dict(want.named_buffers())
    assert set(dict(model.named_buffers())) == set(buffers)
    for name, buffer in model.named_buffers():
        assert buffer.dtype == buffers[name].dtype, name
        assert torch.equal(buffer, buffers[name]), name
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_what_lies_outside_the_blocks_is_written_in_pieces(llama, monkeypatch):
    checkpoint = Checkpoint(llama)
    model = checkpoint.skeleton()
    whole = sorted(checkpoint.outside_keys(model))
    assert [sorted(group) for group in checkpoint.outside_groups(model)] == [whole]
    monkeypatch.setattr("secateurs.model.checkpoint._SHARD_WEIGHTS", 100)
    pieces = checkpoint.outside_groups(model)
    assert len(pieces) == 3
    assert (
        sorted(key for piece in pieces for key in piece)
        == whole
        == ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]
    )


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gpt2"])
def test_edited_tensors_go_back_under_their_stored_names(model_type, tmp_path):
    tiny.save(tmp_path, model_type)
    checkpoint = Checkpoint(tmp_path)
    model = checkpoint.skeleton()
    name = checkpoint.block_names(model)[1]
    checkpoint.load(model, name)
    edited = {k for k, p in model.named_parameters() if k.startswith(name + ".") and p.dim() > 1}
    before = checkpoint.read(checkpoint.keys_under(name))
    same = checkpoint.edited(model, name, edited)
    assert set(same) == set(before)
    assert all(torch.equal(same[k], before[k]) and same[k].dtype == before[k].dtype for k in before)
    with torch.no_grad():
        for key in edited:
            model.get_parameter(key).zero_()
    zeroed = checkpoint.edited(model, name, edited)
    assert all(not zeroed[k].any() for k in before if before[k].dim() > 1 and "gate.weight" not in k)
    assert all(torch.equal(zeroed[k], before[k]) for k in before if before[k].dim() == 1)


def loaded_alike(cls, folder):
    """A skeleton that is loaded, once it is what from_pretrained gives."""
    checkpoint = Checkpoint(folder)
    model = checkpoint.skeleton()
    checkpoint.load_whole(model)
    want = cls.from_pretrained(folder).state_dict()
    assert want.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, want[key]) for key, tensor in model.state_dict().items())
    return checkpoint, model


def test_positions_that_are_computed_need_not_be_stored(tmp_path):
    import transformers

    cls = transformers.MarianMTModel
    small_instance(cls, transformers.MarianConfig()).save_pretrained(tmp_path)
    checkpoint, model = loaded_alike(cls, tmp_path)
    assert "model.encoder.embed_positions.weight" not in checkpoint.file_of
    # sin(1) and cos(1) of the second position
    row = model.model.encoder.embed_positions.weight[1]
    torch.testing.assert_close(row[[0, 16]], torch.tensor([0.841470985, 0.540302306]))


def test_blocks_whose_weights_are_tied_are_one_and_stay_so(tmp_path):
    import transformers

    cls = transformers.ZambaForCausalLM
    small = small_instance(cls, cls.config_class(vocab_size=200))
    small.save_pretrained(tmp_path)
    checkpoint, model = loaded_alike(cls, tmp_path)
    assert (layout_of(model).how, layout_of(model).why) == ("whole", "ZambaForCausalLM's blocks share weights")
    hybrid = [block.shared_transf for block in model.model.layers if hasattr(block, "shared_transf")]
    for _ in range(2):
        assert hybrid[0].self_attn.q_proj.weight is hybrid[1].self_attn.q_proj.weight
        checkpoint.release(model)
        assert hybrid[0].self_attn.q_proj.weight.is_meta


@pytest.fixture
def tied(tmp_path):
    """A folder whose config ties the head to the embeddings, which alone are stored."""
    import transformers

    arguments = {**tiny.TINY["llama"][1], "tie_word_embeddings": True}
    tiny.random("LlamaForCausalLM", "llama", arguments).save_pretrained(tmp_path)
    return transformers.LlamaForCausalLM, tmp_path


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_what_is_tied_is_edited_by_any_of_its_names_under_all_that_are_stored(tied, name):
    cls, folder = tied
    checkpoint, model = loaded_alike(cls, folder)
    model.get_parameter(name)[0] = 0
    for both in (False, True):
        found = checkpoint.edited_keys(model, checkpoint.outside_keys(model), {name})
        assert {key for key, x in found.items() if not x[0].any()} == (
            {"model.embed_tokens.weight", "lm_head.weight"} if both else {"model.embed_tokens.weight"}
        )
        rewrite(
            folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
        )
        checkpoint, model = loaded_alike(cls, folder)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        model.get_parameter(name)[0] = 0


def test_what_is_stored_twice_and_differs_is_not_tied(tied):
    cls, folder = tied
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}))
    _, model = loaded_alike(cls, folder)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_what_is_tied_may_be_stored_under_the_other_name(tied):
    cls, folder = tied
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
    _, model = loaded_alike(cls, folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("prefix", ["gte.", "new.", ""])
def test_a_tensor_that_holds_several_parameters_is_written_as_it_is_stored(tmp_path, prefix):
    import transformers

    cls = transformers.GteForMaskedLM
    small_instance(cls, cls.config_class()).save_pretrained(tmp_path)

    def rename(tensors):
        named = {prefix + key.removeprefix("gte.") if key.startswith("gte.") else key: x for key, x in tensors.items()}
        tensors.clear()
        tensors.update(named)

    rewrite(tmp_path, rename)
    checkpoint, model = loaded_alike(cls, tmp_path)
    names = "gte.layers.1.self_attn.k_proj.weight", "gte.layers.1.mlp.gate_proj.weight"
    before = checkpoint.read(checkpoint.keys_under("gte.layers.1"))
    same = checkpoint.edited(model, "gte.layers.1", set(names))
    assert same.keys() == before.keys()
    assert all(torch.equal(same[key], before[key]) for key in before)
    for name in names:
        model.get_parameter(name).zero_()
    found = checkpoint.edited(model, "gte.layers.1", set(names))
    # keys are the second third, gates the second half
    for key, rows in ("attention.qkv_proj", slice(32, 64)), ("mlp.up_gate_proj", slice(64, 128)):
        key = f"{prefix}encoder.layer.1.{key}.weight"
        before[key][rows] = 0
    assert all(torch.equal(found[key], before[key]) for key in before)


def broken(folder, match):
    with pytest.raises(CheckpointError, match=match):
        checkpoint = Checkpoint(folder)
        model = checkpoint.skeleton()
        for name in checkpoint.block_names(model):
            checkpoint.load(model, name)
        checkpoint.load_outside(model)


def rewrite(folder, edit):
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        edit(tensors)
        save_file(tensors, shard, metadata={"format": "pt"})


def test_a_truncated_shard(folder):
    shard = first_shard(folder)
    shard.write_bytes(shard.read_bytes()[:-10])
    broken(folder, rf"{shard.name} is truncated or corrupt")


def test_a_shard_of_noise(folder):
    first_shard(folder).write_bytes(b"\xff" * 1000)
    broken(folder, "is truncated or corrupt")


def test_a_missing_shard(folder):
    first_shard(folder).unlink()
    broken(folder, "is missing, though model.safetensors.index.json lists it")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(folder, value):
    def edit(tensors):
        for name, tensor in tensors.items():
            if name.endswith("layers.1.mlp.up_proj.weight"):
                tensor[3, 4] = value

    rewrite(folder, edit)
    broken(folder, r"1 of 2048 weights of model\.layers\.1\.mlp\.up_proj\.weight are NaN or infinite")


def test_a_missing_tensor(folder):
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        tensors.pop("model.layers.2.self_attn.o_proj.weight", None)
        save_file(tensors, shard, metadata={"format": "pt"})
    broken(folder, r"lists model\.layers\.2\.self_attn\.o_proj\.weight and no shard holds it")
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"].pop("model.layers.2.self_attn.o_proj.weight")
    index.write_text(json.dumps(data))
    broken(folder, r"has no tensor for model\.layers\.2\.self_attn\.o_proj\.weight")


def test_a_misshapen_tensor(folder):
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] = 60
    (folder / "config.json").write_text(json.dumps(config))
    broken(folder, r"has shape \[\d+, \d+\], config.json asks for")


def test_an_unknown_model_type_and_a_broken_config(folder):
    config = folder / "config.json"
    data = json.loads(config.read_text())
    config.write_text(json.dumps({**data, "model_type": "nonesuch"}))
    broken(folder, "nonesuch")
    config.write_text(json.dumps({**data, "architectures": ["Nonesuch"]}))
    broken(folder, "transformers has no such class")
    config.write_text(json.dumps({**data, "quantization_config": {}}))
    broken(folder, "already quantized")
    config.write_text("{")
    broken(folder, "is not JSON")
    config.unlink()
    broken(folder, "has no config.json")


def test_pickles_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    broken(tmp_path, r"has no model\.safetensors, and pytorch_model\.bin is pickled, .*; convert it: python -c")


def test_the_command_that_converts_pickles_makes_a_folder_that_is_read(tmp_path):
    import shlex
    import subprocess
    import sys

    folder = tmp_path / "two words"
    model = tiny.make("llama")
    tiny.save(folder)
    for shard in folder.glob("*.safetensors*"):
        shard.unlink()
    state = model.state_dict()
    halves = {"pytorch_model-00001-of-00002.bin": list(state)[:9], "pytorch_model-00002-of-00002.bin": list(state)[9:]}
    for name, keys in halves.items():
        torch.save({key: state[key] for key in keys}, folder / name)
    where = {key: name for name, keys in halves.items() for key in keys}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    with pytest.raises(CheckpointError, match=r"pytorch_model-00001-of-00002\.bin is pickled") as refusal:
        Checkpoint(folder)
    command = shlex.split(str(refusal.value).split("convert it: ")[1])
    subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True)
    found = Checkpoint(f"{folder}-safetensors")
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.read(found.file_of).items())
    assert found.tokenizer()("a").input_ids == [64]


@pytest.mark.parametrize(
    "other", ["backup.safetensors", "consolidated.safetensors", "adapter_model.safetensors", "a.safetensors"]
)
def test_weights_are_read_from_the_file_that_transformers_reads(other, llama, tmp_path):
    want = Checkpoint(llama)
    whole = tiny.save(tmp_path / "whole", shard="1GB")
    for folder in (whole, shutil.copytree(llama, tmp_path / "shards")):
        save_file({name: torch.zeros_like(t) for name, t in want.read(want.file_of).items()}, folder / other)
        found = Checkpoint(folder)
        assert set(found.file_of) == set(want.file_of)
        assert not any(file.name == other for file in found.file_of.values())
        for name, tensor in want.read(want.file_of).items():
            assert torch.equal(found.read([name])[name], tensor), name


def test_where_a_whole_file_lies_beside_shards_the_whole_one_is_read_as_transformers_does(folder):
    import transformers

    halved = {name: t / 2 for name, t in tiny.make("llama").state_dict().items()}
    save_file(halved, folder / "model.safetensors", metadata={"format": "pt"})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    found = Checkpoint(folder)
    for name, tensor in found.read(found.file_of).items():
        assert torch.equal(tensor, halved[name])
        assert torch.equal(tensor, theirs[name])


def test_a_file_that_config_json_names_is_read(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "other.safetensors"}))
    broken(folder, r"transformers reads other\.safetensors")
    save_file(tiny.make("llama").state_dict(), folder / "other.safetensors", metadata={"format": "pt"})
    found = Checkpoint(folder)
    assert {file.name for file in found.file_of.values()} == {"other.safetensors"}
    # the result has other files
    found.copy_small_files(folder / "out")
    assert json.loads((folder / "out" / "config.json").read_text()) == config


@pytest.mark.parametrize("other", ["consolidated.safetensors", "model-00001-of-00002.safetensors"])
def test_a_folder_without_the_file_that_transformers_reads_says_what_is_there(other, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    broken(tmp_path, r"has no model\.safetensors and no model\.safetensors\.index\.json")
    save_file({"a": torch.zeros(1)}, tmp_path / other)
    broken(
        tmp_path, rf"has {other}, and transformers reads model\.safetensors or model\.safetensors\.index\.json; name it"
    )


def test_the_hub_s_folder_of_links_is_read_and_copied_as_files(llama, tmp_path):
    snapshot = tmp_path / "models--owner--tiny" / "snapshots" / "0123abcd"
    blobs = tmp_path / "models--owner--tiny" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sorted(llama.iterdir())):
        shutil.copy(file, blobs / f"blob{i}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob{i}")
    found, want = Checkpoint(snapshot), Checkpoint(llama)
    assert all(torch.equal(t, want.read([name])[name]) for name, t in found.read(found.file_of).items())
    found.copy_small_files(tmp_path / "out")
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())
    assert (tmp_path / "out" / "config.json").read_bytes() == (llama / "config.json").read_bytes()


def test_names_that_are_no_folder():
    with pytest.raises(CheckpointError, match="cannot be a hub id"):
        resolve("./no/such/folder")
    with pytest.raises(CheckpointError, match=r"no folder owner/name here, and the hub did not give it"):
        resolve("owner/name")


def test_the_fingerprint_follows_the_files(folder):
    before = Checkpoint(folder).fingerprint()
    assert Checkpoint(folder).fingerprint() == before
    rewrite(folder, lambda tensors: None)
    assert Checkpoint(folder).fingerprint() != before


def test_names_are_in_the_order_of_their_numbers(folder):
    save_file({f"layers.{i}.weight": torch.zeros(1) for i in (10, 9, 0)}, folder / "model.safetensors")
    (folder / "model.safetensors.index.json").unlink()
    for shard in folder.glob("model-*.safetensors"):
        shard.unlink()
    assert Checkpoint(folder).ordered_keys() == ["layers.0.weight", "layers.9.weight", "layers.10.weight"]
