"""Times live modules in the engine that will run them: torch here, or a session of ONNX Runtime or OpenVINO on the CPU."""

import copy
import importlib.util
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.base.errors import PlanError
from secateurs.model.blocks import device_of, evaluating
from secateurs.shrink.export import quiet_export
from secateurs.shrink.outputs import Inputs, only_tensors

Runner = Callable[[], object]

# rounds that are always timed, and at most
_ROUNDS, _MOST = 15, 400


def _in_torch(module: nn.Module, example: Inputs) -> Runner:
    cuda = any(x.is_cuda for x in example)

    def run() -> None:
        with torch.no_grad():
            module(*example)
        if cuda:
            torch.cuda.synchronize()

    return run


def _onnx(module: nn.Module, example: Inputs, file: Path) -> None:
    """Write a module for inputs of exactly this size."""
    # the caller's stays where it is
    module = module if device_of(module).type == "cpu" else copy.deepcopy(module).cpu()
    shown = tuple(x.cpu() for x in example)
    try:
        with evaluating(module), only_tensors(module), torch.no_grad(), quiet_export():
            torch.onnx.export(module, shown, file, dynamo=True, external_data=False, verbose=False)
    except Exception as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PlanError(
            f"{type(module).__name__} cannot be exported to ONNX, so it cannot be timed there: {said}"
        ) from error


def _in_onnxruntime(module: nn.Module, example: Inputs) -> Runner:
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        _onnx(module, example, file)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    given = {named.name: x.cpu().numpy() for named, x in zip(session.get_inputs(), example, strict=True)}
    return lambda: session.run(None, given)


def _in_openvino(module: nn.Module, example: Inputs) -> Runner:
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        _onnx(module, example, file)
        core = openvino.Core()
        compiled = core.compile_model(
            core.read_model(str(file)),
            "CPU",
            {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"},
        )
    given = [x.cpu().numpy() for x in example]
    return lambda: compiled(given)


# name: how a module is made ready to run, and the packages that this needs
ENGINES: dict[str, tuple[Callable[[nn.Module, Inputs], Runner], tuple[str, ...]]] = {
    "torch": (_in_torch, ()),
    "onnxruntime": (_in_onnxruntime, ("onnx", "onnxscript", "onnxruntime")),
    "openvino": (_in_openvino, ("onnx", "onnxscript", "openvino")),
}

# with one thread they compute in the thread that calls them
_IN_THIS_THREAD = ("torch", "onnxruntime")


def check(engine: str) -> None:
    """Raise PlanError for an engine that is unknown or not installed."""
    if engine not in ENGINES:
        raise PlanError(f"unknown engine '{engine}'; write {', '.join(ENGINES)}")
    missing = [name for name in ENGINES[engine][1] if importlib.util.find_spec(name) is None]
    if missing:
        raise PlanError(f"engine {engine} needs {', '.join(missing)}: pip install {' '.join(missing)}")


class Stopwatch:
    """Times modules beside the dense one, on one example."""

    def __init__(self, dense: nn.Module, example: Inputs, engine: str = "torch") -> None:
        self.example, self.make = example, ENGINES[engine][0]
        here = engine in _IN_THIS_THREAD and torch.get_num_threads() == 1 and not any(x.is_cuda for x in example)
        self.clock = time.thread_time if here else time.perf_counter
        self.dense = self.make(dense, example)

    def against(self, left: nn.Module, seconds: float = 0.0) -> tuple[float, float, float]:
        """Median seconds of the dense module and of another, and their median ratio.

        They take turns, after two rounds to warm up, for `seconds` and 15 rounds at least. With one thread the time is that of the
        thread on its CPU, so that other processes count less.
        """
        other = self.make(left, self.example)
        samples: list[tuple[float, float]] = []
        began = time.perf_counter()
        number = 0
        while number < _ROUNDS + 2 or (number < _MOST and time.perf_counter() - began < seconds):
            pair = []
            for run in (self.dense, other):
                begin = self.clock()
                run()
                pair.append(self.clock() - begin)
            if number >= 2:
                samples.append((pair[0], pair[1]))
            number += 1
        return median(a for a, _ in samples), median(b for _, b in samples), median(b / a for a, b in samples)


def measure(
    dense: nn.Module, left: nn.Module, example: tuple[Tensor, ...], engine: str = "torch"
) -> tuple[float, float, float]:
    """Stopwatch.against() once."""
    return Stopwatch(dense, example, engine).against(left)


def facts(engine: str) -> dict[str, Any]:
    """What a time was taken with."""
    return {"engine": engine, "threads": torch.get_num_threads()}
