"""A small Llama trained here on the real text of ../shared/data, as a Hugging Face folder with its tokenizer; prints where it lies.

    python tools/small_lm.py              # trains it (less than an hour on two cores), or continues a run that was ended

Where others use the cores too, set OMP_WAIT_POLICY=passive: threads then wait without taking a core.
SmolLM2 comes out of a 4-bit file; these weights have never been on a grid: fp32 while they were trained, rounded once, to the bf16
that is saved. Beside model/ lie train.txt and held_out.txt, as they were trained on and evaluated on, and recipe.json. The held-out
text chooses when to stop. LAMBADA, PIQA, ARC and GSM8K are trained on and say nothing about the model; WikiText-2 is not.
Cached in $SECATEURS_CACHE, else ~/.cache/secateurs.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import torch.nn.functional as F
import transformers
import wheels
from torch import Tensor, nn

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
END = "<|endoftext|>"
# one in so many C4 documents is held out
HELD_OUT = 20


@dataclass(frozen=True)
class Plan:
    """What decides the model. Training ends after `epochs` or `seconds`, whichever is first, and the learning rate falls with
    the one that is nearer its end. rate: the highest learning rate.
    """

    vocabulary: int = 4096
    width: int = 256
    blocks: int = 6
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 768
    window: int = 256
    batch: int = 8
    epochs: float = 6.0
    seconds: float = 3000.0
    rate: float = 2e-3
    warmup: int = 100
    decay: float = 0.5
    # steps between two evaluations, each with a checkpoint
    every: int = 200
    # compiled and with bf16 products: 5600 tokens/s instead of 3600, on a CPU with AVX-512 BF16
    fast: bool = True
    seed: int = 0


def root() -> Path:
    """Where the model and its texts are, whether or not they are there yet."""
    return wheels.cached("small-lm")


def documents(data: Path) -> tuple[dict[str, list[str]], list[str]]:
    """The training documents by file, and the held-out ones, which are every 20th of C4."""

    def rows(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (data / name).read_text(encoding="utf-8").splitlines() if line.strip()]

    def answered(name: str) -> list[str]:
        return [f"{row['query']} {row['choices'][row['gold']]}" for row in rows(name)]

    c4 = [row["prefix"] + row["gold_completion"] for row in rows("c4_sample.jsonl")]
    train = {
        "c4_sample.jsonl": [d for i, d in enumerate(c4) if i % HELD_OUT],
        "lambada_openai_test.jsonl": [row["text"] for row in rows("lambada_openai_test.jsonl")],
        "gsm8k_test.jsonl": [f"{row['question']}\n{row['answer']}" for row in rows("gsm8k_test.jsonl")],
        "raw_arc_easy.jsonl": answered("raw_arc_easy.jsonl"),
        "raw_piqa.jsonl": answered("raw_piqa.jsonl"),
        **{
            name: [(data / name).read_text(encoding="utf-8")]
            for name in ("tinyshakespeare.txt", "tinystories_30KB.txt")
        },
    }
    return train, c4[::HELD_OUT]


def texts(train: dict[str, list[str]], held_out: list[str], seed: int) -> tuple[str, str]:
    """The training text, documents shuffled, and the held-out text. Raises SystemExit if a held-out document is in the former."""
    every = [d.strip() for group in train.values() for d in group]
    random.Random(seed).shuffle(every)
    text = "\n\n".join(every)
    if seen := [d for d in held_out if d.strip() in text]:
        raise SystemExit(f"{len(seen)} held-out documents are in the training text; the first begins {seen[0][:60]!r}")
    return text, "\n\n".join(d.strip() for d in held_out)


def learn_tokenizer(text: str, vocabulary: int) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE of that many entries, the end of text among them."""
    learned = tokenizers.Tokenizer(tokenizers.models.BPE())
    learned.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    learned.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    learned.train_from_iterator(text.split("\n\n"), trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=learned, eos_token=END, pad_token=END)


def make(plan: Plan) -> nn.Module:
    """The model before its training, in fp32."""
    torch.manual_seed(plan.seed)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=plan.vocabulary, hidden_size=plan.width, intermediate_size=plan.mlp, num_hidden_layers=plan.blocks,
            num_attention_heads=plan.heads, num_key_value_heads=plan.kv_heads, max_position_embeddings=plan.window,
            tie_word_embeddings=True, bos_token_id=None, eos_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip


def windows_of(ids: Tensor, window: int) -> Tensor:
    """[windows, window + 1]: each begins with the last token of the one before, so that every token but the first is predicted
    once. The tokens after the last whole window are left out.
    """
    return ids.unfold(0, window + 1, window)


def loss_of(model: nn.Module, windows: Tensor, bf16: bool = False) -> Tensor:
    """The mean negative log likelihood of a token, in nats."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: nn.Module, windows: Tensor) -> float:
    """The mean loss over the windows."""
    return math.fsum(float(loss_of(model, part)) * len(part) for part in windows.split(8)) / len(windows)


def batch_of(ids: Tensor, plan: Plan, step: int) -> Tensor:
    """The windows of a step: every epoch has its own order and its own first token."""
    epoch, place = divmod(step, steps_of(ids, plan))
    random_numbers = torch.Generator().manual_seed(plan.seed + 1 + epoch)
    first = int(torch.randint(plan.window, (), generator=random_numbers))
    windows = windows_of(ids[first:], plan.window)
    order = torch.randperm(len(windows), generator=random_numbers)
    return windows[order[place * plan.batch : (place + 1) * plan.batch]]


def steps_of(ids: Tensor, plan: Plan) -> int:
    """The steps of an epoch."""
    # one window less than there are, which the epoch's first token may take
    return ((len(ids) - 1) // plan.window - 1) // plan.batch


def rate_of(plan: Plan, step: int, progress: float) -> float:
    """The learning rate: warm-up, then half a cosine down to a hundredth."""
    return plan.rate * min(1.0, (step + 1) / plan.warmup) * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)


def train(
    plan: Plan, ids: Tensor, held_out: Tensor, checkpoint: Path, clock: Callable[[], float] = time.monotonic,
    make: Callable[[Any], nn.Module] = make, loss: Callable[..., Tensor] = loss_of,
) -> dict[str, Any]:  # fmt: skip
    """The state after training: `best`, the weights with the least held-out loss, `losses` by step, and `seconds`, with evaluations
    and the parts before a kill. Continues from the checkpoint if there is one; raises SystemExit if that is of a plan that differs
    in more than its seconds. make: of the plan, the model. loss: of model, windows and plan.fast, what is trained.
    """
    model = make(plan)
    # embeddings and norms are left out of the decay
    decayed = [p for name, p in model.named_parameters() if p.ndim > 1 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or "embed" in name]
    groups = [{"params": decayed, "weight_decay": plan.decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=plan.rate, betas=(0.9, 0.95), fused=True)
    state: dict[str, Any] = {"plan": asdict(plan), "step": 0, "seconds": 0.0, "losses": {}, "best": None}
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        # a slow machine may be given more time
        if state["plan"] | {"seconds": plan.seconds} != asdict(plan):
            raise SystemExit(f"{checkpoint} is of another plan; remove it to start anew")
        state["plan"]["seconds"] = plan.seconds
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        print(f"continuing after step {state['step']}", file=sys.stderr)
    loss_fn = torch.compile(loss) if plan.fast else loss
    steps, windows = round(plan.epochs * steps_of(ids, plan)), windows_of(held_out, plan.window)
    start = clock() - state["seconds"]
    while (progress := max(state["step"] / steps, (clock() - start) / plan.seconds)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate_of(plan, state["step"], progress)
        found = loss_fn(model, batch_of(ids, plan, state["step"]), plan.fast)
        optimizer.zero_grad()
        found.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        state["step"] += 1
        if state["step"] % plan.every == 0:
            _keep(state, model, optimizer, windows, checkpoint, lambda: clock() - start)
            print(
                f"step {state['step']} of {steps}, {state['seconds']:.0f} s: loss {found:.3f}, held out "
                f"{state['losses'][state['step']]:.4f}", file=sys.stderr, flush=True,
            )  # fmt: skip
    if state["step"] not in state["losses"]:
        _keep(state, model, optimizer, windows, checkpoint, lambda: clock() - start)
    return state


def _keep(
    state: dict[str, Any],
    model: nn.Module,
    optimizer: Any,
    windows: Tensor,
    checkpoint: Path,
    seconds: Callable[[], float],
) -> None:
    """Evaluates, and writes the checkpoint in one go."""
    loss = evaluate(model, windows)
    if not loss >= min(state["losses"].values(), default=math.inf):
        state["best"] = {name: value.clone() for name, value in model.state_dict().items()}
    state["losses"][state["step"]] = loss
    state.update(seconds=seconds(), model=model.state_dict(), optimizer=optimizer.state_dict())
    torch.save(state, checkpoint.with_suffix(".part"))
    checkpoint.with_suffix(".part").replace(checkpoint)


def fetch(plan: Plan | None = None, data: Path = DATA) -> Path:
    """The trained model, made on the first call. Raises SystemExit without the text."""
    plan, done = plan or Plan(), root()
    if not (done / "recipe.json").is_file():
        if not data.is_dir():
            raise SystemExit(f"{data} is absent; it holds the text to train on")
        done.mkdir(parents=True, exist_ok=True)
        _make(plan, data, done)
    return done / "model"


def _make(plan: Plan, data: Path, done: Path) -> None:
    train_documents, held_out_documents = documents(data)
    text, held_out = texts(train_documents, held_out_documents, plan.seed)
    (done / "train.txt").write_text(text, encoding="utf-8")
    (done / "held_out.txt").write_text(held_out, encoding="utf-8")
    tokenizer = learn_tokenizer(text, plan.vocabulary)
    tokenizer.save_pretrained(done / "model")
    ids, held_out_ids = (torch.tensor(tokenizer(t, verbose=False).input_ids) for t in (text, held_out))
    print(f"training on {len(ids)} tokens, {steps_of(ids, plan)} steps an epoch", file=sys.stderr, flush=True)
    state = train(plan, ids, held_out_ids, done / "checkpoint.pt")
    model = make(plan)
    model.load_state_dict(state["best"])
    model.to(torch.bfloat16).save_pretrained(done / "model")
    saved = transformers.AutoModelForCausalLM.from_pretrained(done / "model", dtype=torch.float32)
    loss = evaluate(saved, windows_of(held_out_ids, plan.window))
    recipe = finish(
        done, state, saved,
        {
            "files": {name: hashlib.sha256((data / name).read_bytes()).hexdigest() for name in train_documents},
            "documents": {name: len(d) for name, d in train_documents.items()},
            "held_out": f"every {HELD_OUT}th document of c4_sample.jsonl from the first, {len(held_out_documents)} documents",
            "tokens": {"train": len(ids), "held_out": len(held_out_ids)},
            "epochs": state["step"] / steps_of(ids, plan),
            "held_out_loss": loss,
            "held_out_perplexity": math.exp(loss),
            "held_out_bits_per_byte": loss / math.log(2) * len(held_out_ids) / len(held_out.encode()),
            "held_out_loss_of_unigrams": unigram_loss(ids, held_out_ids),
        },
    )  # fmt: skip
    print(f"held-out loss {loss:.4f}, {recipe['held_out_bits_per_byte']:.3f} bits a byte", file=sys.stderr)


def finish(done: Path, state: dict[str, Any], saved: nn.Module, facts: dict[str, Any]) -> dict[str, Any]:
    """Write recipe.json, with which a model is finished, and drop the checkpoint. Returns the recipe: facts, and what the
    training says.
    """
    recipe = {
        **facts,
        "plan": state["plan"],
        "parameters": sum(p.numel() for p in saved.parameters()),
        "steps": state["step"],
        "seconds": state["seconds"],
        "held_out_losses": state["losses"],
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }  # fmt: skip
    (done / "recipe.part").write_text(json.dumps(recipe, indent=1) + "\n")
    (done / "recipe.part").replace(done / "recipe.json")
    (done / "checkpoint.pt").unlink()
    return recipe


def unigram_loss(train: Tensor, held_out: Tensor) -> float:
    """The held-out loss of the training text's token frequencies, each count one more than it is."""
    counts = Counter(train.tolist())
    total = len(train) + 1 + max(max(counts), int(held_out.max()))
    return sum(math.log(total / (counts[t] + 1)) for t in held_out.tolist()) / len(held_out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=Plan.seconds, help="time limit (default 3000)")
    print(fetch(Plan(seconds=parser.parse_args().seconds)))
