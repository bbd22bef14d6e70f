"""What belongs to the caller's process stays as it was: the public functions are called, and the state before and after compared."""

import csv
import gc
import locale
import logging
import os
import random
import signal
import sys
import types
import warnings
from functools import partial

import numpy as np
import pytest
import tiny
import torch
from torch import nn

import secateurs as sc
from secateurs.quality import documents, tasks
from secateurs.shrink.export import export
from secateurs.train.lottery import draw

# imported first: what a library does to the process when it is imported is not ours
matplotlib = pytest.importorskip("matplotlib")
transformers = pytest.importorskip("transformers")
LOGGERS = ("", "torch", "torch.onnx", "transformers", "secateurs", "lm_eval", "matplotlib")
IDS = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))


def state():
    """Name -> what it is now."""
    flags = torch.backends.mkldnn.matmul
    return {
        "Python's random numbers": random.getstate(),
        "NumPy's random numbers": repr(np.random.get_state()),
        "torch's random numbers": torch.get_rng_state().tolist(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "default dtype and device": (torch.get_default_dtype(), torch.get_default_device()),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "determinism": torch.are_deterministic_algorithms_enabled(),
        "precision of products": (flags.fp32_precision, torch.get_float32_matmul_precision()),
        "NumPy's errors": np.geterr(),
        "warnings": list(warnings.filters),
        "loggers": [(n, logging.getLogger(n).level, list(logging.getLogger(n).handlers)) for n in LOGGERS],
        "logging": (logging.root.manager.disable, logging.getLoggerClass()),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "cells of csv": csv.field_size_limit(),
        "locale": locale.setlocale(locale.LC_ALL),
        "path": list(sys.path),
        "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)],
        "hooks": (sys.excepthook, sys.getrecursionlimit(), gc.isenabled(), gc.get_threshold()),
        # to ask matplotlib for its backend would choose one
        "drawings": {name: dict.__getitem__(matplotlib.rcParams, name) for name in matplotlib.rcParams},
        "pyplot": "matplotlib.pyplot" in sys.modules,
        "bars of transformers": transformers.utils.logging.is_progress_bar_enabled(),
        "words of transformers": transformers.utils.logging.get_verbosity(),
    }


def net():
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def step(model, optimizer):
    model(torch.ones(4, 16)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.1)


def plan(llama, words):
    return sc.Plan(
        str(llama), method="sparsegpt", sparsity=0.5,
        calibration=sc.Calibration(str(words), 2, 16), evaluation=sc.Evaluation(str(words), 2, 16),
    )  # fmt: skip


class Task:
    """Seeds and draws as it likes."""

    steps = 2

    def make(self, seed):
        torch.manual_seed(seed)
        return net()

    def train(self, model, hold, start, stop, seed):
        np.random.seed(seed)
        random.seed(seed)
        optimizer = sgd(model)
        hold(optimizer)
        for _ in range(start, stop):
            step(model, optimizer)

    def score(self, model):
        return float(torch.rand(()))


SUMMARY = [
    {"round": n, "kind": "ticket", "sparsity": n / 2, "mean": 0.9, "low": 0.8, "high": 1.0, "seeds": 2} for n in (0, 1)
]


# Each makes what it needs and returns what is called. given: layer, llama, words, tmp_path
def accelerate(given):
    return partial(sc.accelerate, tiny.make("llama", torch.bfloat16))


def table(given):
    file = given["tmp_path"] / "text.csv"
    file.write_text("text\none\ntwo\n")
    return partial(documents.read, str(file))


def formats(given):
    return lambda: sc.formats.unpack(sc.formats.pack(given["layer"][0], "bitmask"))


def kernels(given):
    return sc.kernels.dispatch.kernels


def prune(given):
    return partial(sc.prune, tiny.make("llama"), sc.Plan(method="sparsegpt", sparsity=0.5), calibration=IDS)


def run_of(given):
    run = given["tmp_path"] / "run"
    return lambda: sc.prune(str(given["llama"]), plan(given["llama"], given["words"]), out=run) and run


def pack_run(given):
    return partial(sc.pack_run, run_of(given)())


def verify(given):
    return partial(sc.verify, run_of(given)())


def scores(given):
    # `random` says that it draws from torch's shared generator
    return lambda: [score(*given["layer"][:2]) for name, score in sc.scores.SCORES.items() if name != "random"]


def solvers(given):
    pattern = sc.patterns.parse("2:4")
    weight_OI, stats, _ = given["layer"]
    wanted = [solver for name, solver in sc.solvers.SOLVERS.items() if name != "random"]
    return lambda: [solver.solve(weight_OI, stats, pattern, 0.5, 0.01) for solver in wanted]


def shrink(given):
    text = str(given["words"])
    asked = {"calibration": sc.Calibration(text, 4, 16), "evaluation": sc.Evaluation(text, 2, 16)}
    wanted = sc.ShrinkPlan(str(given["llama"]), "params=0.9x", units=("mlp",), multiple=8, **asked)
    return partial(sc.shrink, wanted, given["tmp_path"] / "small")


def shrink_module(given):
    return partial(sc.shrink_module, net(), [(torch.randn(64, 16),)], "flops=0.7x", multiple=4)


def save_shrunk(given):
    small, report = shrink_module(given)()
    return partial(sc.save_shrunk, small, report, given["tmp_path"] / "small.safetensors")


def load_shrunk(given):
    return partial(sc.load_shrunk, save_shrunk(given)(), net)


def recover_module(given):
    return partial(sc.recover_module, net(), net(), [(torch.randn(8, 16),)], 2, mixed_precision="bf16")


def exported(given):
    return partial(export, net(), (torch.ones(2, 16),), given["tmp_path"] / "exported")


def iterative(given):
    return partial(sc.train.iterative, Task(), given["tmp_path"] / "tickets", sc.train.Rounds(1, seeds=(0,)))


def drawn(given):
    return partial(draw, {"summary": SUMMARY}, given["tmp_path"] / "ticket.svg")


def held(given):
    model = net()
    optimizer = sgd(model)

    def call():
        sc.train.hold(model, optimizer, {"0.weight": torch.ones(32, 16, dtype=torch.bool)})
        step(model, optimizer)

    return call


def lora(given):
    model = net()
    model[0].weight.data[0] = 0
    return partial(sc.train.lora, model, 2, 0)


CALLS = (
    accelerate, table, formats, kernels, prune, run_of, pack_run, verify, scores, solvers, shrink, shrink_module, save_shrunk, load_shrunk, recover_module, exported,
    iterative, drawn, held, lora,
)  # fmt: skip


@pytest.mark.parametrize("make", CALLS, ids=lambda make: make.__name__)
def test_the_caller_s_process_is_left_as_it_was(make, layer, llama, words, tmp_path):
    call = make({"layer": layer, "llama": llama, "words": words, "tmp_path": tmp_path})
    before = state()
    call()
    after = state()
    assert [what for what in before if before[what] != after[what]] == []


def test_no_bars_of_transformers_are_shown(llama, words, tmp_path, capfd):
    run_of({"llama": llama, "words": words, "tmp_path": tmp_path})()
    assert "Loading weights" not in capfd.readouterr().err


def test_every_public_function_is_called():
    functions = {n for n in sc.__all__ if isinstance(getattr(sc, n), types.FunctionType)}
    # a decision is made of calls of the others, with processes of its own
    assert functions - {"decide"} <= {make.__name__ for make in CALLS}


def test_a_task_leaves_random_numbers_alone(monkeypatch, llama, tmp_path):
    """lm-eval seeds all generators; a stand-in does as it does."""

    def simple_evaluate(**given):
        random.seed(0)
        np.random.seed(1234)
        torch.manual_seed(1234)
        return {"results": {"sums": {"acc,none": 1.0}}, "samples": {}}

    library, models = types.ModuleType("lm_eval"), types.ModuleType("lm_eval.models.huggingface")
    library.simple_evaluate, models.HFLM = simple_evaluate, lambda **given: None
    monkeypatch.setitem(sys.modules, "lm_eval", library)
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", models)
    monkeypatch.setattr(tasks, "check", lambda names, folder: None)
    before = state()
    assert tasks.run_tasks(llama, ["sums"], None)["sums"]["acc"] == 1.0
    after = state()
    assert [what for what in before if before[what] != after[what]] == []


def test_a_module_that_trains_still_trains_after_its_export(tmp_path):
    model = nn.Sequential(net(), nn.Dropout(0.5)).train()
    model[0].eval()
    export(model, (torch.ones(2, 16),), tmp_path / "exported")
    assert model.training
    assert model[1].training
    assert not model[0].training


def test_a_drawing_has_the_same_bytes_each_time(tmp_path):
    for name in "ab":
        draw({"summary": SUMMARY}, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
