"""The small models that the guides' tests run on: trained here in half a minute each on Python's own documentation.

    python tools/guide_models.py lm | moe      # makes one and prints where it lies

`lm` is a Llama of 340 thousand parameters, `moe` a Qwen3-MoE of 8 experts. Neither knows much, but both have learned: it
matters which weight is removed. They need no network and no file outside the repository. Kept in build/guides/, by the bytes of
this file and the versions that make them.
"""

import fcntl
import hashlib
import platform
import shutil
import sys
from pathlib import Path

import small_lm
import tiny_moe
import torch
import transformers

from secateurs.quality import documents

ROOT = Path(__file__).resolve().parents[1]
# few tokens, so that little training teaches much
LM = small_lm.Plan(
    vocabulary=320, width=96, blocks=3, heads=4, kv_heads=2, mlp=256, window=96, batch=8, epochs=2.0, rate=8e-3,
    warmup=20, decay=0.0, every=10**9, fast=False, seconds=10**9,
)  # fmt: skip
MOE = tiny_moe.Plan(
    vocabulary=320, width=64, blocks=2, heads=4, kv_heads=2, mlp=96, window=96, batch=8, epochs=1.5, rate=8e-3,
    warmup=20, decay=0.0, every=10**9, fast=False, seconds=10**9, experts=8, active=2,
)  # fmt: skip


def fetch(name: str) -> Path:
    """The folder of `lm` or `moe`, trained on the first call; another process that asks meanwhile waits."""
    made_by = hashlib.sha256(Path(__file__).read_bytes())
    made_by.update(f"{platform.python_version()} {torch.__version__} {transformers.__version__}".encode())
    folder = ROOT / "build" / "guides" / f"{name}-{made_by.hexdigest()[:12]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "config.json").is_file():
            part = folder.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            _train(name, part)
            part.rename(folder)
    return folder


def _train(name: str, folder: Path) -> None:
    text, held_out = ("\n\n".join(documents.read("pydoc", part)[0]) for part in ("calibration", "held-out"))
    plan, model_of = (LM, small_lm.make) if name == "lm" else (MOE, tiny_moe.make)
    loss = small_lm.loss_of if name == "lm" else tiny_moe.loss_of
    tokenizer = small_lm.learn_tokenizer(text, plan.vocabulary)
    ids, held_out_ids = (torch.tensor(tokenizer(t, verbose=False).input_ids) for t in (text, held_out))
    state = small_lm.train(plan, ids, held_out_ids, folder / "checkpoint.pt", make=model_of, loss=loss)
    model = model_of(plan)
    model.load_state_dict(state["best"])
    # positions are rotations: longer windows than it was trained on are read, too
    model.config.max_position_embeddings = 512
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "checkpoint.pt").unlink()
    print(f"{name}: held-out losses {state['losses']}, {state['seconds']:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    print(fetch(sys.argv[1]))
