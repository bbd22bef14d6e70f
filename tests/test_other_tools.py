"""What other people's tools make of our folders and hooks, one small run each; a package that is absent is named.

trl and sentence-transformers are in no extra of ours: `pip install --no-deps --target FOLDER trl sentence-transformers`, and FOLDER on
PYTHONPATH.
"""

import json
import os
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import gridded
import pytest
import torch
from plans import asked
from real_data import data
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import secateurs as sc
from secateurs.pack.folder import pack
from secateurs.train.matrices import prunable

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.real, pytest.mark.timeout(3600)]


def needs(module, package):
    """The module; skips with the package's name."""
    found = pytest.importorskip(module, reason=f"no {package}: pip install --no-deps --target FOLDER {package}")
    print(f"{package} {version(package)}")
    return found


def halved(model):
    """The model with the smaller half of every linear layer's weights at zero, the head left."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            size = module.weight.detach().abs().float()
            module.weight.data.masked_fill_(size <= size.flatten().kthvalue(size.numel() // 2)[0], 0)
    return model


def stories():
    """A trained language model of 260,000 parameters."""
    return data("stories260K")


def zeros_of(model):
    return {name: p.detach() == 0 for name, p in prunable(model)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{name: folder}: plain, its packed one; on a grid, packed; shrunk, packed. All made of one trained model, in fp32."""
    source, root = stories(), tmp_path_factory.mktemp("folders")
    tokenizer = AutoTokenizer.from_pretrained(source)
    for name in ("plain", "grid"):
        halved(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    gridded.on_grid(root / "grid", "int8/32")
    plan = asked(
        sc.ShrinkPlan, str(source), "params=0.8x", ("mlp", "heads", "layers"), calibration=str(data("tinystories_30KB.txt")), multiple=4,
        samples=16, seqlen=64, eval_text=str(data("tinystories_30KB.txt")), eval_windows=2, eval_seqlen=64,
    )  # fmt: skip
    sc.shrink(plan, root / "run")
    (root / "run" / "model").rename(root / "shrunk")
    for name in ("plain", "grid", "shrunk"):
        pack(root / name, root / f"{name}-packed")
    return {folder.name: folder for folder in root.iterdir()}


# ------------------------------------------------------------------------------------------------- lm-evaluation-harness


@pytest.fixture(scope="module")
def scores(folders, tmp_path_factory):
    """{folder: (accuracy, log-likelihoods of all choices)} as lm-eval's command line says: the command, with our import before."""
    needs("lm_eval", "lm_eval")
    place = tmp_path_factory.mktemp("tasks")
    rows = data("raw_piqa.jsonl").read_text().splitlines()[:100]
    (place / "piqa.jsonl").write_text("\n".join(rows))
    (place / "piqa_here.yaml").write_text(
        "task: piqa_here\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: "
        f"{place}/piqa.jsonl\ntest_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{query}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: gold\nmetric_list:\n  - metric: acc\n'
    )
    found = {}
    for name in ("plain", "plain-packed", "grid", "grid-packed", "shrunk", "shrunk-packed"):
        done = subprocess.run(
            [
                sys.executable, "-c", "import secateurs; from lm_eval.__main__ import cli_evaluate; cli_evaluate()", "run",
                "--model", "hf", "--model_args", f"pretrained={folders[name]},dtype=float32", "--tasks", "piqa_here", "--include_path",
                str(place), "--device", "cpu", "--batch_size", "8", "--output_path", str(place / name), "--log_samples",
            ],
            env={**os.environ, "HF_DATASETS_CACHE": str(place / "cache")}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        (results,) = (place / name).rglob("results_*.json")
        (samples,) = (place / name).rglob("samples_*.jsonl")
        answers = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda a: a["doc_id"])
        logs = torch.tensor([[float(choice[0]) for choice in a["filtered_resps"]] for a in answers])
        found[name] = json.loads(results.read_text())["results"]["piqa_here"]["acc,none"], logs
        print(name, found[name][0], float(logs.mean()))
    return found


@pytest.mark.parametrize(("name", "off"), [("plain", 1e-4), ("shrunk", 1e-4), ("grid", 0.02)])
def test_lm_eval_scores_a_packed_folder_as_the_plain_one(name, off, scores):
    """off: of a question's log-likelihood. Packed integers round activations to 8 bits."""
    (accuracy, logs), (packed_accuracy, packed_logs) = scores[name], scores[f"{name}-packed"]
    assert logs.shape == (100, 2)
    relative = ((packed_logs - logs).abs() / logs.abs()).max()
    print(f"{name}: {accuracy} and packed {packed_accuracy}; log-likelihoods off by {float(relative):.1e} at most")
    assert relative <= off
    margin = (logs[:, 0] - logs[:, 1]).abs()
    # a question may turn only where its choices are as near as the rounding
    turned = (logs.argmax(1) != packed_logs.argmax(1)) & (margin > 2 * off * logs.abs().amax(1))
    assert not bool(turned.any())
    assert off > 1e-3 or accuracy == packed_accuracy


# --------------------------------------------------------------------------------------------- PEFT, TRL, accelerate, FSDP2


def test_peft_trains_a_pruned_model_and_merges_without_losing_a_zero(tmp_path):
    peft = needs("peft", "peft")
    base = halved(AutoModelForCausalLM.from_pretrained(stories(), dtype=torch.float32))
    zeros = zeros_of(base)
    ids = AutoTokenizer.from_pretrained(stories())(
        data("tinystories_30KB.txt").read_text()[:6000], return_tensors="pt"
    ).input_ids[0]
    batches = ids[: len(ids) // 64 * 64].view(-1, 64)
    model = peft.get_peft_model(base, peft.LoraConfig(r=8, target_modules="all-linear", lora_dropout=0.05))
    sc.train.mask_peft(model)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 5e-3)
    losses = []
    for step in range(60):
        batch = batches[step * 4 % len(batches) :][:4]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}")
    assert losses[-1] < 0.85 * losses[0]
    with torch.no_grad():
        want = model.eval()(input_ids=batches[:2]).logits
    merged = model.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=batches[:2]).logits, want, rtol=1e-3, atol=1e-3)
    for name, zero in zeros_of(merged).items():
        assert torch.equal(zero, zeros[name]), name
    merged.save_pretrained(tmp_path / "merged")
    assert pack(tmp_path / "merged", tmp_path / "packed")["layers"]


@pytest.mark.parametrize("kind", ["callback", "peft"])
def test_trl_s_sft_trainer_keeps_zeros(kind, tmp_path):
    trl = needs("trl", "trl")
    datasets, peft = import_module("datasets"), import_module("peft")
    model = halved(AutoModelForCausalLM.from_pretrained(stories(), dtype=torch.float32))
    before = zeros_of(model)
    tokenizer = AutoTokenizer.from_pretrained(stories())
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    text = data("tinystories_30KB.txt").read_text()
    rows = datasets.Dataset.from_dict({"text": [text[i : i + 200] for i in range(0, 16000, 200)]})
    callbacks = [sc.train.trainer_callback()] if kind == "callback" else []
    if kind == "peft":
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        sc.train.mask_peft(model)
    arguments = trl.SFTConfig(
        str(tmp_path), max_steps=20, per_device_train_batch_size=4, learning_rate=2e-3, use_cpu=True, report_to=[], save_strategy="no",
        max_length=64, bf16=False, logging_steps=1, weight_decay=0.1, dataset_num_proc=None,
    )  # fmt: skip
    trainer = trl.SFTTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer, callbacks=callbacks)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    print(f"{kind}: loss {losses[0]} to {losses[-1]}")
    assert sum(losses[-3:]) < sum(losses[:3])
    model = trainer.model.merge_and_unload() if kind == "peft" else trainer.model
    after = zeros_of(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


RANK = """
import sys
sys.path[:0] = {path!r}
import torch
from accelerate import Accelerator
from test_other_tools import halved, stories
from transformers import AutoModelForCausalLM
import secateurs as sc

torch.set_num_threads(1)
accelerator = Accelerator(cpu=True)
model = halved(AutoModelForCausalLM.from_pretrained(stories(), dtype=torch.float32))
before = {{n: p.detach() == 0 for n, p in model.named_parameters()}}
if {fsdp!r}:
    # accelerate's own FSDP2 is for accelerators alone, so the model is sharded as it would do it
    from torch.distributed import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (accelerator.num_processes,))
    for block in (*model.model.layers, model):
        fully_shard(block, mesh=mesh)
    optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.1))
else:
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.1))
sc.train.hold(accelerator.unwrap_model(model), optimizer.optimizer)
ids = torch.randint(0, 512, (8, 32), generator=torch.Generator().manual_seed(0))
part = ids[accelerator.process_index :: accelerator.num_processes]
losses = []
for _ in range(4):
    loss = model(input_ids=part, labels=part).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
inner = accelerator.unwrap_model(model)
whole = {{n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach() for n, p in inner.named_parameters()}}
if accelerator.is_main_process:
    torch.save(({{type(p).__name__ for p in inner.parameters()}}, before, whole, losses), {file!r})
accelerator.wait_for_everyone()
accelerator.end_training()
"""


def accelerated(place, ranks, fsdp):
    """(kinds of parameters, zeros before, weights after, losses) of a run under torchrun."""
    file = place / f"{ranks}-{fsdp}.pt"
    script = place / "rank.py"
    script.write_text(RANK.format(path=[str(ROOT / "tests")], fsdp=fsdp, file=str(file)))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [sys.executable, *launch, script],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(file, weights_only=False)


def test_accelerate_and_fsdp2_on_two_ranks_keep_zeros_and_learn_what_one_does(tmp_path):
    print(f"accelerate {version('accelerate')}")
    stories()
    _, _, alone, _ = accelerated(tmp_path, 1, fsdp=False)
    for fsdp in (False, True):
        kinds, before, after, losses = accelerated(tmp_path, 2, fsdp)
        print(f"{'FSDP2' if fsdp else 'DDP'}: {kinds}, losses {losses}")
        assert ("DTensor" in kinds) == fsdp
        assert losses[-1] < losses[0]
        checked = 0
        for name, zero in before.items():
            now = after[name]
            if zero.dim() > 1 and bool(zero.any()):
                assert torch.equal(now == 0, zero), name
                checked += 1
            # Adam's first steps are as long as a gradient's sign says, so near zero a last bit shows
            assert (now - alone[name]).abs().mean() <= 2e-4, name
        assert checked == 35


# ------------------------------------------------------------------------------------------------------ export and encoders


def test_a_shrunk_language_model_goes_through_torch_export_and_onnx(folders, tmp_path):
    onnxruntime = needs("onnxruntime", "onnxruntime")
    model = AutoModelForCausalLM.from_pretrained(folders["shrunk"]).eval()
    tokens = torch.export.Dim("tokens", min=2, max=100)
    model.config.use_cache = False
    exported = torch.export.export(
        model, (), {"input_ids": torch.arange(12)[None]}, dynamic_shapes={"input_ids": {1: tokens}}, strict=False
    )
    from secateurs.pack.export import export

    export(folders["shrunk"], "onnx", tmp_path / "out")
    session = onnxruntime.InferenceSession(next((tmp_path / "out").rglob("*.onnx")))
    for ids in (torch.arange(20)[None], torch.randint(0, 512, (1, 33))):
        with torch.no_grad():
            want = model(input_ids=ids).logits
            torch.testing.assert_close(exported.module()(input_ids=ids).logits, want, rtol=1e-4, atol=1e-4)
        fed = {
            one.name: (ids if "ids" in one.name and "position" not in one.name else torch.ones_like(ids)).numpy()
            for one in session.get_inputs()
        }
        got = torch.from_numpy(session.run(None, fed)[0])
        print(f"onnxruntime: off by {float((got - want).abs().max()):.1e} of {float(want.abs().max()):.1f}")
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def minilm():
    sys.path.insert(0, str(ROOT / "tools"))
    import minilm

    try:
        return minilm.fetch()
    except (subprocess.CalledProcessError, OSError) as error:
        pytest.skip(f"all-MiniLM-L6-v2 cannot be fetched: {error}")


SENTENCES = [
    "A man is eating food.",
    "A man eats a meal.",
    "The stock market fell sharply today.",
    "Shares dropped a lot on Tuesday.",
]


@pytest.mark.parametrize("kind", ["pruned", "shrunk"])
def test_sentence_transformers_reads_what_is_left_of_an_encoder(kind, minilm, tmp_path):
    library = needs("sentence_transformers", "sentence-transformers")
    text = f"{data('c4_sample.jsonl')}:prefix+gold_completion"
    common = {
        "calibration": text,
        "samples": 32,
        "seqlen": 128,
        "eval_text": text,
        "eval_windows": 20,
        "eval_seqlen": 128,
    }
    if kind == "pruned":
        sc.prune(minilm, asked(sc.Plan, method="sparsegpt", **common), out=tmp_path / "run")
    else:
        sc.shrink(asked(sc.ShrinkPlan, str(minilm), "params=0.9x", ("mlp",), **common), tmp_path / "run")
    dense, left = (library.SentenceTransformer(str(f), device="cpu") for f in (minilm, tmp_path / "run" / "model"))
    want, got = (torch.from_numpy(one.encode(SENTENCES)) for one in (dense, left))
    cosine = torch.nn.functional.cosine_similarity(want, got)
    angles = got @ got.T
    print(f"{kind}: cosines with the dense model's {[round(float(c), 3) for c in cosine]}, paraphrases {float(angles[0, 1]):.2f} "
          f"{float(angles[2, 3]):.2f}, others {float(angles[0, 2]):.2f}")  # fmt: skip
    assert cosine.min() > 0.7
    assert min(angles[0, 1], angles[2, 3]) > max(angles[0, 2], angles[1, 3]) + 0.2
    # by hand: the mean over tokens, of length 1
    model, tokenizer = (
        AutoModel.from_pretrained(tmp_path / "run" / "model").eval(),
        AutoTokenizer.from_pretrained(minilm),
    )
    fed = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**fed).last_hidden_state * fed["attention_mask"][..., None]
    mean = torch.nn.functional.normalize(hidden.sum(1) / fed["attention_mask"].sum(1, keepdim=True))
    torch.testing.assert_close(got, mean, rtol=1e-3, atol=1e-4)
