"""Decisions whose speeds are stated, not measured; what they prune is real."""

import importlib

from plans import asked

from secateurs.base.device import machine
from secateurs.decide.plan import DecidePlan
from secateurs.kernels.dispatch import kernels
from secateurs.machine.profile import DeviceProfile

# the function has the name of its module
module = importlib.import_module("secateurs.decide.decide")

# speedups of decoding and of prefill that the stated bench gives
SPEEDS = {"packed": (1.5, 1.0), "shrunk": (1.2, 1.25)}


def profile(file, here=True, speedup=1.6):
    rows = [
        {"dtype": dtype, "kernel": f"bitmask_{dtype}_x", "tokens": tokens, "sparsity": s, "speedup": value,
         "shape": [8, 8], "pattern": "unstructured", "seconds": 1e-3, "dense": "torch", "dense_seconds": 2e-3, "verdict": "2x"}
        for dtype in ("fp32", "bf16") for s in (0.5, 0.9) for tokens, value in ((1, speedup), (256, 1.0))
    ]  # fmt: skip
    # integers: eight bits are worth leaving zeros out of, four are not
    rows += [
        {**row, "grid": f"int{bits}/64", "kernel": f"{form}_int{bits}_x", "sparsity": s, "speedup": value * over, "over_integers": over,
         "integers": f"dense_int{bits}_x", "integers_seconds": 1e-3}
        for row in rows[::4] for bits, value, left_out in ((8, 2.0, 1.3), (4, 3.0, 0.8))
        for form, s, over in (("dense", 0.0, 1.0), ("bitmask", 0.5, left_out))
    ]  # fmt: skip
    of = {
        **machine(),
        "kernels": [k.name for k in kernels() if not k.lacks],
        **({} if here else {"processor": "another"}),
    }
    DeviceProfile("stated", of, 1e10, {"fp32": 1e11}, rows, {"device": None}).write(file)
    return str(file)


def stated_bench(runs):
    """A bench that states speeds and counts its runs."""

    def bench(variants, prompts, new, repeats, progress, batches=(1,), fit=False):
        # what a long context costs is measured, where the model has room for it
        assert (len(prompts), prompts[1], fit) == (2, 4 * prompts[0], True)
        runs.append(variants[1].folder)
        rows = []
        for variant in variants:
            decoding, prefill = SPEEDS.get(variant.name, (1.0, 1.0))
            stages = {}
            for stage, rate in (("prefill", 100 * prefill), ("decode", 10 * decoding)):
                values = [rate * (1 + 0.01 * i) for i in range(repeats)]
                stages[stage] = {
                    "tokens_per_second": values[0],
                    "low": values[0],
                    "high": values[-1],
                    "samples": values,
                    "speedup": rate / (100 if stage == "prefill" else 10),
                }
            rows.append(
                {
                    "name": variant.name,
                    "folder": variant.folder,
                    "how": variant.how,
                    "rival": variant.rival,
                    "same_weights": variant.runs(variants[0].folder),
                    "engine": None,
                    "weights_bytes": 1000,
                    "peak_memory_bytes": 1,
                    "kv_bytes_per_token": 8,
                    **stages,
                    "batches": [{"batch": 1, **stages}],
                }
            )
        return {
            "machine": machine(),
            "prompt": prompts[0],
            "new": new,
            "repeats": repeats,
            "variants": rows,
            "left_out": [],
        }

    return bench


def plan(llama, words, tmp_path, **more):
    given = {
        "gate": ("ppl<=+900%",), "candidates": ("0.5", "2:4"), "profile": profile(tmp_path / "profile.json"), "effort": "fast",
        "calibration": str(words), "samples": 4, "seqlen": 32, "eval_text": str(words), "eval_windows": 8, "eval_seqlen": 32,
        "prompt": 10, "new": 11, "repeats": 5, "multiple": 8, "integers": False, "rivals": False,
    }  # fmt: skip
    return asked(DecidePlan, str(llama), **{**given, **more})
