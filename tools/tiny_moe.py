"""A small mixture of experts trained here on three kinds of text, as a Hugging Face folder with its tokenizer; prints where it
lies.

    OMP_NUM_THREADS=1 python tools/tiny_moe.py     # trains it (35 minutes of one core), or continues a run that was ended

Stories are the passages of LAMBADA and TinyStories of ../shared/data, the encyclopedia is WikiText-2's test split from there,
Python code is the standard library of the Python that runs this. Every tenth document of each is held out. Nothing tells the
router which text is which; a small load-balancing loss keeps all experts in use. Beside model/ lie recipe.json, which says among
the rest how the tokens of each domain are shared among the experts of each block, and the texts: train.txt and held_out.txt, and
those of each domain (train-code.txt, held_out-code.txt, ...). The beginnings of the held-out texts choose when to stop. Cached in
$SECATEURS_CACHE, else ~/.cache/secateurs.
"""

import argparse
import hashlib
import json
import random
import re
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import small_lm
import torch
import transformers
import wheels
from torch import Tensor, nn

# one in so many documents of each domain is held out
HELD_OUT = 10
# passages of LAMBADA that make a document; bytes of code that are taken, and of a file of code at most
_PASSAGES, _CODE, _FILE = 40, 1_500_000, 60_000
# held-out tokens of each domain that choose when to stop
_WATCHED = 12_000


@dataclass(frozen=True)
class Plan(small_lm.Plan):
    """What decides the model, as small_lm.Plan. mlp: neurons of an expert. active: experts that a token is sent to. balance: what
    the load-balancing loss is multiplied with.
    """

    vocabulary: int = 2048
    width: int = 128
    blocks: int = 3
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 160
    window: int = 128
    batch: int = 8
    epochs: float = 4.0
    seconds: float = 2100.0
    rate: float = 3e-3
    every: int = 200
    # experts are called one by one, which a compiler breaks at
    fast: bool = False
    experts: int = 16
    active: int = 2
    balance: float = 0.05


def root() -> Path:
    """Where the model and its texts are, whether or not they are there yet."""
    return wheels.cached("tiny-moe")


def documents(data: Path, code: Path, seed: int) -> dict[str, list[str]]:
    """The documents of each domain. code: a folder with Python files, of which so many are taken as make 1.5 MB."""
    lambada = [
        json.loads(line)["text"] for line in (data / "lambada_openai_test.jsonl").read_text("utf-8").splitlines()
    ]
    stories = ["\n\n".join(lambada[i : i + _PASSAGES]) for i in range(0, len(lambada), _PASSAGES)]
    stories += [(data / "tinystories_30KB.txt").read_text("utf-8")]
    wiki = (data / "wikitext-2-raw.test.txt").read_text("utf-8")
    # an article begins with its title between single signs
    articles = [d for d in re.split(r"(?m)^(?= = (?!= ))", wiki) if d.strip()]
    return {"stories": stories, "code": _files(code, seed), "encyclopedia": articles}


def _files(folder: Path, seed: int) -> list[str]:
    """Files of a folder in an order by the seed until there is enough."""
    files = sorted(f for f in folder.glob("*.py") if f.stat().st_size <= _FILE)
    random.Random(seed).shuffle(files)
    found: list[str] = []
    for file in files:
        if sum(map(len, found)) < _CODE:
            found.append(file.read_text("utf-8"))
    return found


def parted(found: dict[str, list[str]]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The documents that are trained on and those that are held out, by domain."""
    train = {name: [d for i, d in enumerate(texts) if i % HELD_OUT] for name, texts in found.items()}
    return train, {name: texts[::HELD_OUT] for name, texts in found.items()}


def make(plan: Plan) -> nn.Module:
    """The model before its training, in fp32."""
    torch.manual_seed(plan.seed)
    return transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            vocab_size=plan.vocabulary, hidden_size=plan.width, moe_intermediate_size=plan.mlp, intermediate_size=plan.mlp,
            num_hidden_layers=plan.blocks, num_attention_heads=plan.heads, num_key_value_heads=plan.kv_heads,
            head_dim=plan.width // plan.heads, num_experts=plan.experts, num_experts_per_tok=plan.active, norm_topk_prob=True,
            max_position_embeddings=plan.window, router_aux_loss_coef=plan.balance, tie_word_embeddings=True,
            bos_token_id=None, eos_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip


def loss_of(model: Any, windows: Tensor, bf16: bool = False) -> Tensor:
    """What is trained: the mean loss of a token and the load-balancing loss of every block, in the mean."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        found = model(input_ids=windows[:, :-1], use_cache=False, output_router_logits=True)
    loss = nn.functional.cross_entropy(found.logits.float().flatten(0, 1), windows[:, 1:].flatten())
    # transformers' own adds the blocks up first, so that experts of one number in all blocks balance each other
    balances = [balance(logits, model.config.num_experts_per_tok) for logits in found.router_logits]
    return loss + model.config.router_aux_loss_coef * torch.stack(balances).mean()


def balance(logits_TE: Tensor, active: int) -> Tensor:
    """E times the sum of an expert's share of the choices and its mean probability: 1 if both are even (Switch Transformer, eq.
    4).
    """
    probability_TE = logits_TE.float().softmax(1)
    chosen_TE = nn.functional.one_hot(probability_TE.topk(active).indices, logits_TE.shape[1]).sum(1)
    return logits_TE.shape[1] * (chosen_TE.float().mean(0) / active * probability_TE.mean(0)).sum()


@torch.no_grad()
def shares(model: Any, windows: Tensor) -> Tensor:
    """[blocks, experts]: the share of the tokens' choices that each expert has."""
    total: Any = 0
    for part in windows[:, :-1].split(8):
        logits = model(input_ids=part, use_cache=False, output_router_logits=True).router_logits
        chosen = torch.stack([x.topk(model.config.num_experts_per_tok).indices for x in logits])
        total = total + nn.functional.one_hot(chosen, model.config.num_experts).sum((1, 2))
    return total / total.sum(1, keepdim=True)


def information(shares_DE: Tensor) -> float:
    """How many bits an expert says of the domain, where all domains are alike frequent. D domains, E experts."""
    joint_DE = shares_DE.double() / len(shares_DE)
    independent_DE = joint_DE.sum(0) / len(shares_DE)
    return float(
        torch.special.xlogy(joint_DE, joint_DE / independent_DE.clamp(min=1e-30)).sum() / torch.tensor(2.0).log()
    )


def fetch(plan: Plan | None = None, data: Path = small_lm.DATA, code: Path | None = None) -> Path:
    """The trained model, made on the first call. Raises SystemExit without the text."""
    plan, done = plan or Plan(), root()
    if not (done / "recipe.json").is_file():
        if not data.is_dir():
            raise SystemExit(f"{data} is absent; it holds the text to train on")
        done.mkdir(parents=True, exist_ok=True)
        _make(plan, data, code or Path(sysconfig.get_paths()["stdlib"]), done)
    return done / "model"


def _make(plan: Plan, data: Path, code: Path, done: Path) -> None:
    train, held_out = parted(documents(data, code, plan.seed))
    every = [d for texts in held_out.values() for d in texts]
    text, held_out_text = small_lm.texts(train, every, plan.seed)
    written = {"train": text, "held_out": held_out_text}
    written |= {f"train-{name}": "\n\n".join(texts) for name, texts in train.items()}
    written |= {f"held_out-{name}": "\n\n".join(texts) for name, texts in held_out.items()}
    for name, content in written.items():
        (done / f"{name}.txt").write_text(content, encoding="utf-8")
    tokenizer = small_lm.learn_tokenizer(text, plan.vocabulary)
    tokenizer.save_pretrained(done / "model")
    ids = {name: torch.tensor(tokenizer(content, verbose=False).input_ids) for name, content in written.items()}
    print(
        f"training on {len(ids['train'])} tokens, {small_lm.steps_of(ids['train'], plan)} steps an epoch",
        file=sys.stderr,
        flush=True,
    )
    # the same from each domain, and not all: it is evaluated often
    some = torch.cat([ids[f"held_out-{name}"][: _WATCHED + 1] for name in train])
    state = small_lm.train(plan, ids["train"], some, done / "checkpoint.pt", make=make, loss=loss_of)
    model = make(plan)
    model.load_state_dict(state["best"])
    model.to(torch.bfloat16).save_pretrained(done / "model")
    saved = transformers.AutoModelForCausalLM.from_pretrained(done / "model", dtype=torch.float32).eval()
    windows = {name: small_lm.windows_of(ids[f"held_out-{name}"], plan.window) for name in train}
    shares_DBE = torch.stack([shares(saved, found) for found in windows.values()])
    sources = {name: (data / name).read_bytes() for name in _SOURCES}
    small_lm.finish(
        done, state, saved,
        {
            "files": {name: hashlib.sha256(found).hexdigest() for name, found in sources.items()},
            "code": f"the standard library of Python {sys.version.split()[0]}, {len(train['code']) + len(held_out['code'])} files",
            "held_out": f"every {HELD_OUT}th document of each domain from the first",
            "documents": {name: {"train": len(train[name]), "held_out": len(held_out[name])} for name in train},
            "tokens": {name: len(found) for name, found in ids.items()},
            "epochs": state["step"] / small_lm.steps_of(ids["train"], plan),
            "held_out_loss": small_lm.evaluate(saved, small_lm.windows_of(ids["held_out"], plan.window)),
            "held_out_loss_by_domain": {name: small_lm.evaluate(saved, found) for name, found in windows.items()},
            "held_out_loss_of_unigrams": small_lm.unigram_loss(ids["train"], ids["held_out"]),
            "shares": {name: shares_DBE[i].tolist() for i, name in enumerate(windows)},
            "bits_of_domain": [information(found) for found in shares_DBE.unbind(1)],
        },
    )  # fmt: skip


_SOURCES = ("lambada_openai_test.jsonl", "tinystories_30KB.txt", "wikitext-2-raw.test.txt")


def shown(recipe: dict[str, Any]) -> str:
    """A table of how the tokens of each domain are shared among experts."""
    lines = []
    for block, bits in enumerate(recipe["bits_of_domain"]):
        lines.append(
            f"block {block}: an expert says {bits:.2f} bits of the domain ({len(recipe['shares'])} domains); % of tokens"
        )
        for name, found in recipe["shares"].items():
            lines.append(f"  {name:<13}" + " ".join(f"{100 * share:4.0f}" for share in found[block]))
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=Plan.seconds, help="time limit (default 2100)")
    folder = fetch(Plan(seconds=parser.parse_args().seconds))
    print(shown(json.loads((folder.parent / "recipe.json").read_text())), file=sys.stderr)
    print(folder)
