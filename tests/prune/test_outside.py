"""Embedding and head on grids: which matrices they are, how they are solved, what a run writes and verify finds."""

import json
import shutil

import pytest
import tiny
import torch
from plans import asked
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import secateurs as sc
from secateurs.base.errors import PlanError, VerifyError
from secateurs.matrix.grids import Grid, Scales, parse
from secateurs.matrix.patterns import Unstructured
from secateurs.matrix.quantize import fit, joint_polished
from secateurs.matrix.stats import Stats
from secateurs.model.activations import InMemory
from secateurs.model.blocks import AllLoaded
from secateurs.model.scales import SCALES_FILE, read_scales, write_scales
from secateurs.prune import outside
from secateurs.prune import run as prune_run
from secateurs.prune.outside import on_grid_outside, quantize_outside
from secateurs.prune.record import LayerRecord, Report

FAST = {"samples": 4, "seqlen": 32, "eval_windows": 0}
# of tiny models: the names of embedding and head
NAMES = {"llama": ("model.embed_tokens", "lm_head"), "gpt2": ("transformer.wte", "lm_head")}


def copied(scales):
    # a file holds no tensor twice
    return Scales(scales.grid, scales.scale_OG.clone())


def found(model_type, **options):
    return [
        (o.layer.name, o.layer.also, o.role, str(o.grid))
        for o in on_grid_outside(tiny.make(model_type), sc.Plan(**options))
    ]


def test_they_get_the_plan_s_group_and_kind_or_groups_of_64():
    assert sc.Plan(head_bits=8).grid_of(8) == Grid(8, 64)
    assert sc.Plan(bits="4", group="32", grid="asymmetric", head_bits=6).grid_of(6) == Grid(6, 32, symmetric=False)
    assert sc.Plan(group="row", embedding_bits=3).grid_of(3) == parse("int3/row")
    # on llama.cpp's grids the 8 bits that it has
    assert sc.Plan(grid="q4_0", head_bits=8).grid_of(8) == parse("q8_0")
    assert sc.Plan(head_bits=8).layer_grids == []
    plan = sc.Plan(head_bits=8, embedding_bits=4)
    assert sc.Plan.from_dict(plan.as_dict()) == plan


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"head_bits": 7}, "head bits 7 are on no grid that is known here; write one of 8, 6, 5, 4, 3, 2"),
        (
            {"grid": "q4_0", "embedding_bits": 6},
            "embedding bits 6 are on no grid that is known here; write one of 4, 8",
        ),
        ({"head_bits": 8, "group": "48"}, "unknown group '48'"),
    ],
)
def test_bits_of_no_grid_are_refused(options, said):
    with pytest.raises(PlanError, match=said):
        sc.Plan(**options)


def test_the_matrices_are_found_and_one_that_is_both_once():
    embedding, head = NAMES["llama"]
    assert found("llama", head_bits=8) == [(head, (), "head", "int8/64")]
    assert found("llama", embedding_bits=3, head_bits=8) == [
        (embedding, (), "embedding", "int3/64"), (head, (), "head", "int8/64")
    ]  # fmt: skip
    both = [("transformer.wte", ("lm_head",), "embedding and head", "int4/64")]
    assert (
        found("gpt2", head_bits=4)
        == found("gpt2", embedding_bits=4)
        == found("gpt2", head_bits=4, embedding_bits=4)
        == both
    )
    assert found("gpt2", bits="4") == []


@pytest.mark.parametrize(
    ("model_type", "options", "said"),
    [
        ("gpt2", {"head_bits": 4, "embedding_bits": 8}, "are one matrix, and 8 and 4 bits were asked"),
        (
            "bert base",
            {"head_bits": 8},
            r"BertModel has no head to put on a grid: get_output_embeddings\(\) finds none; leave --head-bits",
        ),
        ("llama", {"head_bits": 8, "skip": ("lm_*",)}, r"lm_head was given bits and matches --skip lm_\*"),
    ],
)
def test_what_cannot_be_is_one_sentence(model_type, options, said):
    with pytest.raises(PlanError, match=said):
        found(model_type, **options)


def test_a_live_module_says_that_it_cannot():
    with pytest.raises(PlanError, match="head and embedding bits are for a folder"):
        sc.prune(tiny.make("llama"), sc.Plan(method="magnitude", head_bits=8))


@pytest.mark.parametrize(("model_type", "bits"), [("llama", 3), ("gpt2", 3), ("llama", 8)])
def test_a_head_is_solved_on_what_reaches_it_and_an_embedding_row_by_row(model_type, bits):
    model, grid = tiny.make(model_type), Grid(bits, 64)
    batches = [
        {"input_ids": ids} for ids in torch.randint(0, 250, (4, 2, 40), generator=torch.Generator().manual_seed(0))
    ]
    plan = sc.Plan(head_bits=bits, embedding_bits=bits, damping=0.05)
    # what the whole model's head is called with
    rows = []
    handle = model.lm_head.register_forward_pre_hook(lambda _, given: rows.append(given[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    stats = Stats.of(torch.cat(rows))
    embedding, head = model.get_input_embeddings().weight.detach().clone(), model.lm_head.weight.detach().clone()
    tied = model_type == "gpt2"
    # both uses of one matrix count alike with the mean of the diagonal as a ridge
    new_head, scales = joint_polished(head, stats, Unstructured(), 0.0, grid, 1.0 if tied else 0.05)
    records, written = quantize_outside(model, plan, AllLoaded(), batches, InMemory())
    assert torch.allclose(model.lm_head.weight, new_head, atol=1e-5)
    name = NAMES[model_type][0 if tied else 1]
    assert (written[name].integers(model.lm_head.weight) == scales.integers(new_head)).float().mean() > 0.99
    record = next(r for r in records if r.name == name)
    error = (rows := torch.cat(rows)) @ (model.lm_head.weight - head).T
    assert record.error == pytest.approx(float(error.norm() / (rows @ head.T).norm()), rel=1e-3)
    assert (record.tokens, record.error_from, record.grid) == (320, "gram", f"int{bits}/64")
    if not tied:
        looked_up = next(r for r in records if r.role == "embedding")
        nearest = fit(embedding, grid).rounded(embedding)
        assert torch.equal(model.get_input_embeddings().weight, nearest)
        assert looked_up.error == pytest.approx(float((nearest - embedding).norm() / embedding.norm()), rel=1e-5)
        assert looked_up.error_from == "weights"


def test_an_encoder_decoder_s_head_is_solved_on_what_its_decoder_gives():
    options = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    model = tiny.random("T5ForConditionalGeneration", "t5", {"vocab_size": 260, **options}).eval()
    batch = {"input_ids": tiny.tokens(), "decoder_input_ids": tiny.tokens()[:, :7]}
    rows = []
    handle = model.lm_head.register_forward_pre_hook(lambda _, given: rows.append(given[0].flatten(0, 1)))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    head = model.lm_head.weight.detach().clone()
    (record,), _ = quantize_outside(model, sc.Plan(head_bits=4), AllLoaded(), [batch], InMemory())
    assert (record.name, record.role, record.tokens) == ("shared", "embedding and head", 14)
    change = rows[0] @ (model.lm_head.weight - head).T
    assert record.error == pytest.approx(float(change.norm() / (rows[0] @ head.T).norm()), rel=1e-4)


def test_rows_are_solved_in_pieces(monkeypatch):
    models = [tiny.make("llama") for _ in range(2)]
    batches = [{"input_ids": tiny.tokens()}]
    plan = sc.Plan(head_bits=3, grid="asymmetric")
    _, whole = quantize_outside(models[0], plan, AllLoaded(), batches, InMemory())
    # 100 rows of 32 inputs: three pieces of 260
    monkeypatch.setattr(outside, "_NUMBERS", 3200)
    records, parts = quantize_outside(models[1], plan, AllLoaded(), batches, InMemory())
    assert torch.allclose(models[0].lm_head.weight, models[1].lm_head.weight, atol=1e-5)
    assert torch.equal(whole["lm_head"].zero_OG, parts["lm_head"].zero_OG)
    assert records[0].kept == int((models[1].lm_head.weight != 0).sum())


def test_without_calibration_a_head_is_rounded():
    model = tiny.make("llama")
    weight = model.lm_head.weight.detach().clone()
    records, _ = quantize_outside(model, sc.Plan(method="magnitude", head_bits=4), AllLoaded(), [], InMemory())
    assert torch.equal(model.lm_head.weight, fit(weight, Grid(4, 64)).rounded(weight))
    assert (records[0].error_from, records[0].note) == ("weights", "no input of the head was seen; rounded to nearest")


def test_bits_of_layers_and_of_the_whole_file_by_hand():
    layers = [
        # 4 bits, and a scale of 16 for 64
        LayerRecord("a", (2, 64), 0.0, 128, grid="int4/64"),
        # a bit a position and 32 of 128 would be less, but rows are looked up: 8 bits and a scale
        LayerRecord("e", (2, 64), 0.0, 32, grid="int8/64", role="embedding"),
    ]
    report = Report({}, {}, layers, bytes={"stored": 300}, parameters=400)
    assert report.totals["bits"] == 4.25
    assert layers[1].stored_bits == 128 * 8.25
    assert (report.totals["weights"], report.totals["layers_pruned"]) == (128, 1)
    assert report.totals["file_bits"] == 6.0


@pytest.fixture(scope="module")
def folders(tmp_path_factory, words):
    """Runs of a model with an embedding and a head, and of one where both are one."""
    made = {}
    for model_type in NAMES:
        where = tmp_path_factory.mktemp(model_type)
        plan = asked(sc.Plan, bits="4", sparsity=0.0, method="sparsegpt", head_bits=8, calibration=str(words), **FAST,
                     embedding_bits=None if model_type == "gpt2" else 3)  # fmt: skip
        sc.prune(tiny.save(where / "dense", model_type, torch.bfloat16), plan, out=where / "run")
        made[model_type] = plan, where
    return made


@pytest.mark.parametrize("model_type", NAMES)
def test_a_run_writes_them_and_their_scales_and_is_verified(folders, model_type):
    _, where = folders[model_type]
    report = sc.verify(where / "run")
    written = {r.name: (r.role, r.grid, r.skipped) for r in report.layers if r.role}
    embedding, head = NAMES[model_type]
    assert written == (
        {embedding: ("embedding and head", "int8/64", None)} if model_type == "gpt2"
        else {embedding: ("embedding", "int3/64", None), head: ("head", "int8/64", None)}
    )  # fmt: skip
    scales = read_scales(where / "run/model" / SCALES_FILE)
    assert scales.keys() == {r.name for r in report.layers if r.grid}
    model = AutoModelForCausalLM.from_pretrained(where / "run/model")
    for name in written:
        assert scales[name].off(model.get_submodule(name).weight) is None
    assert report.parameters == sum(
        t.numel() for f in (where / "run/model").glob("model-*") for t in load_file(f).values()
    )
    plain = sum(2 * r.numel - r.stored_bits / 8 for r in report.layers if r.grid)
    assert report.bytes["stored"] == pytest.approx(report.bytes["pruned"] - plain, abs=1)
    assert report.totals["file_bits"] == report.bytes["stored"] * 8 / report.parameters


@pytest.mark.parametrize("place", ["outside.safetensors", SCALES_FILE])
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(place, folders, tmp_path, monkeypatch):
    plan, where = folders["llama"]
    write = prune_run.write_scales

    def killed(file, scales):
        if file.name == place:
            # embedding and head are written already, and noted after the first of these places
            raise KeyboardInterrupt
        write(file, scales)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prune_run, "write_scales", killed)
        sc.prune(where / "dense", plan, out=tmp_path / "run")
    again = sc.prune(where / "dense", plan, out=tmp_path / "run")
    report = json.loads((where / "run/report.json").read_text())
    assert again.shards == report["shards"]
    assert [r.error for r in again.layers] == [r["error"] for r in report["layers"]]
    name = SCALES_FILE
    assert (tmp_path / "run/model" / name).read_bytes() == (where / "run/model" / name).read_bytes()


@pytest.mark.parametrize("model_type", NAMES)
def test_all_blocks_are_tuned_on_the_embedding_s_grid_towards_the_dense_model(model_type, tmp_path, words, monkeypatch):
    seen, tune = {}, prune_run.distill

    def watched(model, moving, teacher, ends, batches, *args, **kwargs):
        dense, loader = teacher
        seen["tuned"] = {name: model.get_submodule(name).weight.detach().clone() for name in NAMES[model_type]}
        loader.load_outside(dense)
        seen["teacher"] = dense.get_output_embeddings().weight.detach().clone()
        loader.release(dense)
        return tune(model, moving, teacher, ends, batches, *args, **kwargs)

    monkeypatch.setattr(prune_run, "distill", watched)
    plan = asked(sc.Plan, bits="4", sparsity=0.0, method="sparsegpt", embedding_bits=3, head_bits=3, distill=8,
                 calibration=str(words), **FAST)  # fmt: skip
    report = sc.prune(tiny.save(tmp_path / "dense", model_type), plan, out=tmp_path / "run")
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    for name, weight in seen["tuned"].items():
        assert torch.equal(weight, written.get_submodule(name).weight)
    assert torch.equal(seen["teacher"], AutoModelForCausalLM.from_pretrained(tmp_path / "dense").lm_head.weight)
    assert not torch.equal(seen["teacher"], written.lm_head.weight)
    assert report.distillation["after"] <= report.distillation["before"]
    assert sc.verify(tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lm_head", "lm_head: 1 of 8320 weights are not on the grid int8/64; first at row 0, input 3"),
        ("model.layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj: 1 of 2048 weights are not on the grid int4/64"),
    ],
)
def test_verify_finds_a_weight_that_left_its_grid(folders, tmp_path, name, said):
    from safetensors.torch import save_file

    from secateurs.model.shards import checksum

    shutil.copytree(folders["llama"][1] / "run", tmp_path / "run")
    report = json.loads((tmp_path / "run/report.json").read_text())
    for shard in (tmp_path / "run/model").glob("model-*"):
        tensors = load_file(shard)
        if f"{name}.weight" in tensors:
            row = tensors[f"{name}.weight"][0]
            row[3] = row[3] * 1.05 + 1e-3 if row[3] else 0.0
            assert row[3]
            save_file(tensors, shard, metadata={"format": "pt"})
            report["shards"][shard.name] = checksum(shard)
    (tmp_path / "run/report.json").write_text(json.dumps(report))
    with pytest.raises(VerifyError, match=said):
        sc.verify(tmp_path / "run")


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda scales: scales.pop("lm_head"), "lm_head has no scales in grids.safetensors, report.json says int8/64"),
        (
            lambda scales: scales.update({"lm_head": copied(scales["model.embed_tokens"])}),
            "lm_head has scales of int3/64",
        ),
        (
            lambda scales: scales.update({"model.norm": copied(scales["lm_head"])}),
            "model.norm has scales .* and no grid",
        ),
    ],
)
def test_verify_finds_scales_that_the_report_does_not_know(folders, tmp_path, edit, said):
    shutil.copytree(folders["llama"][1] / "run", tmp_path / "run")
    file = tmp_path / "run/model" / SCALES_FILE
    scales = read_scales(file)
    edit(scales)
    write_scales(file, scales)
    with pytest.raises(VerifyError, match=said):
        sc.verify(tmp_path / "run")
