"""Trained models and real text. Needs the network once for SmolLM2, and ../shared/data; what is absent is skipped by name."""

import json
import sys
from pathlib import Path

import pytest
import torch
from plans import asked
from real_data import data

import secateurs as sc
from secateurs.model.checkpoint import Checkpoint
from secateurs.prune import permute
from secateurs.quality import texts

ROOT = Path(__file__).parent.parent
# a test may prune a model six times, on cores that others use too
pytestmark = [pytest.mark.real, pytest.mark.timeout(3600)]


@pytest.fixture(scope="session")
def smollm2():
    sys.path.insert(0, str(ROOT / "tools"))
    import subprocess

    import smollm2

    try:
        return smollm2.fetch()
    except (subprocess.CalledProcessError, OSError) as error:
        pytest.skip(f"SmolLM2-135M cannot be fetched: {error}")


@pytest.fixture(scope="session")
def anchor():
    sys.path.insert(0, str(data("anchor_layer.py").parent))
    import anchor_layer

    weight_OI, x_TI, held_out_TI = anchor_layer.make(0)
    return weight_OI, sc.Stats.of(x_TI), sc.Stats.of(held_out_TI)


# method, scope: calibration / held-out error at 50%, 70% and 2:4 of the anchor layer, from an independent script
ANCHOR = {
    ("magnitude", "layer"): (".4520/.4552", ".6366/.6400", ".5259/.5281"),
    ("magnitude+refit", "layer"): (".2638/.2849", ".4063/.4269", ".3083/.3331"),
    ("wanda", "row"): (".1437/.1422", ".2590/.2565", ".2083/.2060"),
    ("wanda", "layer"): (".1306/.1293", ".2393/.2371", None),
    ("ria", "layer"): (".1367/.1354", ".2484/.2459", ".2124/.2101"),
    ("wanda+refit", "row"): (".0881/.0950", ".1723/.1810", ".1261/.1362"),
    ("sparsegpt", "layer"): (".0905/.0947", ".1774/.1828", ".1403/.1474"),
    ("sparsegpt+refit", "layer"): (".0771/.0847", ".1528/.1629", ".1209/.1336"),
    ("alps", "layer"): (".0716/.0810", ".1381/.1526", ".1150/.1294"),
}
# what alps must reach, and with inputs reordered at 2:4
ALPS, REORDERED = (0.0716, 0.1381, 0.1150), 0.1065


@pytest.mark.parametrize(("method", "scope"), ANCHOR)
def test_the_anchor_layer_is_reproduced_within_two_percent(anchor, method, scope, monkeypatch):
    if method == "sparsegpt":
        # the table's mask block; ours is 64 and 1 to 2% better
        monkeypatch.setattr(sc.patterns.Unstructured, "step", 128)
    weight_OI, stats, held_out = anchor
    for (pattern, sparsity), want in zip(
        (("unstructured", 0.5), ("unstructured", 0.7), ("2:4", 0.5)), ANCHOR[method, scope], strict=True
    ):
        chosen = sc.patterns.parse(pattern, scope if pattern == "unstructured" else None)
        new = sc.solvers.find(method).solve(weight_OI, stats, chosen, sparsity, 0.01)
        got = [sc.solvers.relative_error(weight_OI, new, s) for s in (stats, held_out)]
        print(f"{method} {scope} {pattern} {sparsity}: {got[0]:.4f}/{got[1]:.4f}, table {want}")
        if want is not None:
            assert got == pytest.approx([float(text) for text in want.split("/")], rel=0.02)


def test_alps_reaches_the_field_s_best_on_the_anchor_layer(anchor):
    weight_OI, stats, held_out = anchor
    solve = sc.solvers.find("alps").solve
    for pattern, sparsity, want in zip(("unstructured", "unstructured", "2:4"), (0.5, 0.7, 0.5), ALPS, strict=True):
        new = solve(weight_OI, stats, sc.patterns.parse(pattern, "layer"), sparsity, 0.01)
        assert sc.solvers.relative_error(weight_OI, new, stats) <= want
    pattern = sc.patterns.NM(2, 4)
    order = permute.order_of(weight_OI.square() * stats.sqnorm_I, pattern)
    seen, other = stats.reordered(order), held_out.reordered(order)
    new = solve(weight_OI[:, order], seen, pattern, 0.5, 0.01)
    got = [sc.solvers.relative_error(weight_OI[:, order], new, s) for s in (seen, other)]
    print(f"2:4 with inputs reordered: {got[0]:.4f}/{got[1]:.4f}, mark {REORDERED}")
    assert got[0] <= REORDERED


def test_the_default_solver_beats_sparsegpt_with_refit_on_the_anchor_layer(anchor):
    weight_OI, stats, held_out = anchor
    for pattern, sparsity in (("unstructured", 0.5), ("unstructured", 0.7), ("2:4", 0.5)):
        chosen = sc.patterns.parse(pattern, "layer")
        errors = {}
        for method in ("sparsegpt+refit", "admm", "alps"):
            new = sc.solvers.find(method).solve(weight_OI, stats, chosen, sparsity, 0.01)
            errors[method] = [sc.solvers.relative_error(weight_OI, new, s) for s in (stats, held_out)]
        print(f"{pattern} {sparsity}: {errors}")
        assert errors["admm"][0] < 0.97 * errors["sparsegpt+refit"][0]
        assert errors["admm"][1] < 0.98 * errors["sparsegpt+refit"][1]
        assert errors["admm"][0] < 1.02 * errors["alps"][0]


def test_mask_block_and_refit_follow_the_table(anchor, monkeypatch):
    weight_OI, stats, _ = anchor
    layer = sc.patterns.Unstructured("layer")
    for width, want in ((16, 0.0884), (32, 0.0886), (64, 0.0895), (128, 0.0905), (256, 0.0926), (512, 0.0958)):
        monkeypatch.setattr(sc.patterns.Unstructured, "step", width)
        got = sc.solvers.relative_error(weight_OI, sc.solvers.obs(weight_OI, stats, layer, 0.5), stats)
        assert got == pytest.approx(want, rel=0.005), width


def test_smollm2_speaks(smollm2):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt")
    assert tokenizer.decode(model(**ids).logits[0, -1].argmax()) == " Paris"


def test_smollm2_wikitext_tokens_and_dense_perplexity(smollm2):
    from secateurs.model.checkpoint import Checkpoint
    from secateurs.quality.evaluation import quality

    text = data("wikitext-2-raw.test.txt")
    source = Checkpoint(smollm2)
    assert len(source.tokenizer()(text.read_text(), verbose=False).input_ids) == 303_415
    found, _ = quality(source, None, sc.Evaluation(str(text), 24, 2048))
    print(f"dense perplexity {found.ppl_dense}")
    assert found.ppl_dense.value == pytest.approx(21.08, abs=0.02)


def test_smollm2_calibration_text_is_documents_shuffled_and_joined(smollm2):
    from random import Random

    from transformers import AutoTokenizer

    file = data("c4_sample.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    documents = [row["prefix"] + row["gold_completion"] for row in rows]
    Random(0).shuffle(documents)
    want = tokenizer("\n\n".join(documents), verbose=False).input_ids[:32_768]
    got = texts.load(f"{file}:prefix+gold_completion", tokenizer, 64, 512, 0)
    assert got.windows.flatten().tolist() == want


# perplexity that a plain script reached; ours may be lower
SCRIPT = {
    ("magnitude", "unstructured"): 702,
    ("wanda", "unstructured"): 47.7,
    ("sparsegpt", "unstructured"): 42.4,
    ("sparsegpt+refit", "unstructured"): 40.3,
    ("sparsegpt", "2:4"): 85.8,
}


def test_smollm2_perplexity_meets_the_script_and_the_field_s_order(smollm2, tmp_path):
    c4, wikitext = data("c4_sample.jsonl"), data("wikitext-2-raw.test.txt")
    got = {}
    for (method, pattern), script in SCRIPT.items():
        plan = asked(sc.Plan,
            method=method, pattern=pattern, calibration=f"{c4}:prefix+gold_completion", samples=64, seqlen=512,
            eval_text=str(wikitext), eval_windows=24, eval_seqlen=2048,
        )  # fmt: skip
        report = sc.prune(smollm2, plan, out=tmp_path / f"{method}-{pattern}".replace(":", "of"))
        got[method, pattern] = report.quality["ppl"]["value"]
        print(f"{method} {pattern}: {got[method, pattern]:.2f}, script {script}, prune {report.seconds['prune']:.0f} s")
        # the order of bf16 sums alone moves Wanda by 0.9% and SparseGPT about as much (docs/log.md)
        assert got[method, pattern] <= script * 1.015
    order = [got[m, "unstructured"] for m in ("magnitude", "wanda", "sparsegpt", "sparsegpt+refit")]
    assert order == sorted(order, reverse=True)


def test_a_trained_model_of_a_second(tmp_path):
    model, text = data("stories260K"), data("tinystories_30KB.txt")
    ppl = {}
    for method in ("random", "magnitude", "wanda", "sparsegpt", "sparsegpt+refit"):
        plan = asked(
            sc.Plan, method=method, calibration=str(text), samples=16, seqlen=512, eval_text=str(text), eval_windows=8
        )
        ppl[method] = sc.prune(model, plan, out=tmp_path / method).quality["ppl"]["value"]
    print(ppl)
    assert ppl["random"] > ppl["magnitude"] > ppl["sparsegpt"] > ppl["sparsegpt+refit"]
    assert ppl["magnitude"] > ppl["wanda"] > ppl["sparsegpt"]


def test_pruned_smollm2_loads_and_generates(smollm2, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plan = asked(sc.Plan, method="wanda", sparsity=0.3, samples=16, seqlen=512, eval_windows=0)
    sc.prune(smollm2, plan, out=tmp_path / "run")
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "run" / "model", dtype="auto", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    out = model.generate(
        **tokenizer("The capital of France is", return_tensors="pt"), max_new_tokens=5, do_sample=False
    )
    assert "Paris" in tokenizer.decode(out[0])
    zeros = [(m.weight == 0).float().mean() for n, m in model.named_modules() if n.endswith("_proj")]
    assert torch.stack(zeros).min() >= 0.299


def test_smollm2_packs_to_nine_bits_a_weight_and_answers_the_same(smollm2, tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    from secateurs.pack import folder

    plain = tmp_path / "plain"
    Checkpoint(smollm2).copy_small_files(plain)
    for file in Path(smollm2).glob("*.safetensors"):
        tensors = load_file(file)
        for name, weight in tensors.items():
            if "_proj" in name:
                keep = sc.patterns.parse("unstructured").keep(sc.scores.magnitude(weight.float(), None), 0.5)
                tensors[name] = weight.masked_fill(~keep, 0)
        save_file(tensors, plain / file.name, metadata={"format": "pt"})
    totals = folder.pack(plain, tmp_path / "packed")["totals"]
    ratio = totals["packed_layers_nbytes"] / totals["packed_layers_dense_nbytes"]
    print(f"packed layers take {ratio:.4f}x the bytes")
    assert totals["layers_packed"] == 210
    assert ratio <= 0.57
    dense = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    ids = torch.randint(0, 40000, (2, 50))
    with torch.no_grad():
        want, got = dense(ids).logits, packed(ids).logits
    assert (got - want).norm() / want.norm() < 1e-5
    assert torch.equal(got.argmax(-1), want.argmax(-1))
    folder.unpack(tmp_path / "packed", tmp_path / "back")
    a = {k: t for f in plain.glob("*.safetensors") for k, t in load_file(f).items()}
    b = {k: t for f in (tmp_path / "back").glob("*.safetensors") for k, t in load_file(f).items()}
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k].view(torch.uint8), b[k].view(torch.uint8)) for k in a)


def test_a_decision_on_a_trained_model(tmp_path):
    """Real quality, real bytes, real times of a model of a second: what is recommended is what the numbers say."""
    from secateurs.decide.decide import decide, front
    from secateurs.decide.plan import DecidePlan

    model, text = data("stories260K"), str(data("tinystories_30KB.txt"))
    plan = asked(DecidePlan,
        str(model), ("ppl<=+400%",), ("0.5", "0.7", "2:4", "shrink:params=0.9x"), calibration=text, samples=16, seqlen=256,
        eval_text=text, eval_windows=8, eval_seqlen=256, prompt=32, new=16, repeats=3, multiple=4,
    )  # fmt: skip
    result = decide(plan, tmp_path / "run")
    rows = {row["candidate"]: row for row in result["rows"]}
    measured = [row for row in rows.values() if row["status"] == "measured"]
    print({name: (row["status"], row["reason"]) for name, row in rows.items()}, result["sentence"])
    assert measured
    for row in measured:
        assert row["quality"]["ppl_ratio"]["value"] > 1
        assert row["bytes_ratio"] < 1
    good = [row for row in measured if row["reason"] is None]
    best = min(good, key=lambda r: (r["seconds_ratio"]["value"], r["bytes_ratio"]), default={"candidate": "dense"})
    assert result["recommended"] == best["candidate"]
    assert {r["candidate"] for r in front(result["rows"])} == set(result["front"]) > set()
    assert decide(plan, tmp_path / "run") == result


def test_prose_and_code_are_told_apart(tmp_path, smollm2):
    import sysconfig

    from transformers import AutoTokenizer

    from secateurs.quality import texts

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    for part in (0, 1):
        modules = [f.read_text(encoding="utf-8", errors="ignore") for f in files[part::2]]
        (tmp_path / f"code-{part}.txt").write_text("\n\n".join(modules))
    sources = {
        "c4": f"{data('c4_sample.jsonl')}:prefix+gold_completion", "wikitext": str(data("wikitext-2-raw.test.txt")),
        "code": str(tmp_path / "code-0.txt"), "other code": str(tmp_path / "code-1.txt"),
    }  # fmt: skip
    windows = {name: texts.load(source, tokenizer, 32, 512, 0).windows for name, source in sources.items()}
    for a, b, alike in (
        ("c4", "wikitext", True), ("code", "other code", True), ("c4", "code", False), ("wikitext", "code", False),
    ):  # fmt: skip
        assert (texts.distance(windows[a], windows[b]).mismatch is None) == alike, (a, b)


@pytest.mark.parametrize("ending", [".csv.gz", ".tsv", ".parquet", ".json", ".jsonl.zst"])
def test_real_text_is_the_same_in_every_format(ending, tmp_path):
    """C4 holds quotes, commas and line ends."""
    import gzip

    import pandas
    import pyarrow

    from secateurs.quality import documents

    source = data("c4_sample.jsonl")
    rows = pandas.read_json(source, lines=True)[["prefix", "gold_completion"]]
    file = tmp_path / f"c4{ending}"
    if ending == ".parquet":
        rows.to_parquet(file)
    elif ending == ".json":
        rows.to_json(file, orient="records")
    elif ending == ".jsonl.zst":
        file.write_bytes(
            pyarrow.compress(rows.to_json(orient="records", lines=True).encode(), codec="zstd", asbytes=True)
        )
    else:
        text = rows.to_csv(index=False, sep="\t" if ending == ".tsv" else ",").encode()
        file.write_bytes(gzip.compress(text) if ending.endswith(".gz") else text)
    found, _ = documents.read(f"{file}:prefix+gold_completion")
    want, _ = documents.read(f"{source}:prefix+gold_completion")
    assert found == want
    assert len(found) == 1480


@pytest.fixture(scope="session")
def minilm():
    sys.path.insert(0, str(ROOT / "tools"))
    import subprocess

    import minilm

    try:
        return minilm.fetch()
    except (subprocess.CalledProcessError, OSError) as error:
        pytest.skip(f"all-MiniLM-L6-v2 cannot be fetched: {error}")


@pytest.mark.parametrize(
    ("options", "least"),
    [
        # uniform, every layer alike
        ({"method": "sparsegpt"}, 0.88),
        ({"method": "sparsegpt", "pattern": "2:4"}, 0.80),
        # zeros where the embedding takes them, by its own sensitivities
        ({}, 0.92),
    ],
)
def test_a_sentence_embedder_keeps_its_angles(options, least, minilm, tmp_path):
    plan = asked(
        sc.Plan, calibration=f"{data('c4_sample.jsonl')}:prefix+gold_completion", samples=256, seqlen=128,
        eval_text=str(data("wikitext-2-raw.test.txt")), eval_windows=200, eval_seqlen=128, gate=(f"cosine>={least}",), **options,
    )  # fmt: skip
    report = sc.prune(minilm, plan, out=tmp_path / "run")
    print({name: report.quality[name] for name in ("cosine", "neighbours")})
    assert report.totals["sparsity"] == 0.5
    assert report.gate[0]["passed"]
    assert (tmp_path / "run" / "model" / "1_Pooling" / "config.json").is_file()


def test_a_pruned_image_classifier_is_as_accurate_as_its_agreement_says(tmp_path):
    sys.path.insert(0, str(ROOT / "tools"))
    import vit

    try:
        place = vit.fetch()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    dense = vit.accuracy(place / "model")
    found = {}
    for name, options in {"sparsegpt": {"method": "sparsegpt"}, "balanced": {}, "2:4": {"pattern": "2:4"}}.items():
        plan = asked(
            sc.Plan, calibration=str(place / "train"), samples=256, eval_text=str(place / "test"), eval_windows=600,
            gate=("agree>=95%",), **options,
        )  # fmt: skip
        report = sc.prune(place / "model", plan, out=tmp_path / name)
        kl, agree = (report.quality[key]["value"] for key in ("kl", "agree"))
        found[name] = kl, agree, vit.accuracy(tmp_path / name / "model")
        assert report.gate[0]["passed"]
        # who gives another class may lose an answer, and no more
        assert abs(found[name][2] - dense) <= 1.5 * (1 - report.quality["agree"]["low"])
    print(f"dense {dense:.4f}; KL, agreement, accuracy: {found}")
    # sensitivities of a drawn class tell the layers apart
    assert found["balanced"][0] < 0.2 * found["sparsegpt"][0]


@pytest.mark.timeout(4 * 3600)
def test_no_type_of_transformers_is_silently_wrong():
    """All of tools/zoo.py; goes on where an earlier run was stopped, and writes docs/models.md."""
    import subprocess

    done = subprocess.run([sys.executable, str(ROOT / "tools" / "zoo.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
