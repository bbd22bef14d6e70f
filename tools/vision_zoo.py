"""Prunes channels of many networks to 0.7x of their parameters, checks what is left, and writes docs/vision.md.

    python tools/vision_zoo.py [--only NAME,NAME] [--peer] [--again] [--seconds 240]

Networks: tools/vision_nets.py, and small ones of transformers, timm and torchvision (tools/vision_zoo_list.py). timm and
torchvision are left out by name where they are not installed: `pip install --no-deps timm torchvision`, and --peer needs
`pip install --no-deps torch-pruning==1.6.1`. A run that was killed goes on where it was: build/vision_zoo.json has a
result for each network of one state of src/secateurs/shrink and of these tools. Each network has a process of its own.
Exits 1 if a result is wrong or a network fails.

Of each network: what is left has at most 0.7x of the parameters; it is the dense network with zeros where channels went
(its numbers put back into the dense network, zeros elsewhere, in float64: 1e-6 of the largest output); it takes a step of
training; its file is loaded bit for bit; as ONNX it gives the same in onnxruntime (1e-3). The peer's column says only that
it runs, with outputs of the same shapes and at most 0.7x of the parameters. It is told which layers make the outputs, and
its zeros are not checked.
"""

import argparse
import contextlib
import copy
import hashlib
import io
import json
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import torch  # noqa: E402
import vision_zoo_list  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import secateurs as sc  # noqa: E402
from secateurs.shrink.outputs import tensors_of  # noqa: E402
from secateurs.shrink.trace import trace  # noqa: E402

RESULTS, PAGE = ROOT / "build" / "vision_zoo.json", ROOT / "docs" / "vision.md"
TABLE = ("<!-- written by tools/vision_zoo.py -->\n", "<!-- end of what is written -->\n")
SHARE = 0.7
_ZEROS, _ONNX = 1e-6, 1e-3


def tried(name: str, peer: bool) -> Iterator[dict[str, Any]]:
    """The result of one network, and then the peer's."""
    began = time.perf_counter()
    make, shape = vision_zoo_list.networks()[name]
    torch.manual_seed(0)
    model = _apart(make().eval())
    x = vision_zoo_list.drawn(8, shape)
    result: dict[str, Any] = {"parameters": _count(model)}
    try:
        batches = [(x[:4],), (x[4:],)]
        small, report = sc.shrink_module(model, batches, f"params={SHARE}x", multiple=2)
        result |= checked(make, model, small, report, x)
        result["groups"] = len(report["groups"])
        result["stays"] = next(iter(report["fixed_parameters"].items()), None)
    except sc.SecateursError as error:
        result |= {"result": "refused", "note": str(error)}
    result["seconds"] = time.perf_counter() - began
    yield result
    if peer:
        yield of_peer(make, model, x)


def _apart(model: nn.Module) -> nn.Module:
    """The same with buffers of norms and parameters moved off ones and zeros, as training does."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.5, 1.5)
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter += 0.02 * torch.rand_like(parameter) * (1 if parameter.dim() < 2 else 0)
    return model


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def checked(
    make: Callable[[], nn.Module], model: nn.Module, small: nn.Module, report: dict[str, Any], x: Tensor
) -> dict[str, Any]:
    """{result: exact or wrong, note, left: share of the parameters}."""
    left = _count(small) / _count(model)
    found: dict[str, Any] = {"left": left}

    def wrong(note: str) -> dict[str, Any]:
        return found | {"result": "wrong", "note": note}

    if not left <= SHARE + 1e-9:
        return wrong(f"{left:.3f}x of the parameters are left")
    back = filled(model, small, report)
    gap = apart(_run(copy.deepcopy(small).double(), x[:3].double()), _run(back.double(), x[:3].double()))
    if not gap <= _ZEROS:
        return wrong(f"not the dense network with zeros: {gap:.2g} of the largest output apart")
    why = _trains(copy.deepcopy(small), x[:4])
    if why and not _trains(copy.deepcopy(model), x[:4]):
        return wrong(f"takes no step of training: {why}")
    with tempfile.TemporaryDirectory() as folder:
        again = sc.load_shrunk(sc.save_shrunk(small, report, Path(folder) / "small.safetensors"), make)
        if apart(_run(again, x[:2]), _run(small, x[:2])) != 0:
            return wrong("its file gives something else")
    note = _onnx(small, x[:2])
    if note and _onnx(model, x[:2]):
        note, found["onnx"] = None, "torch does not export the dense network either"
    return wrong(f"ONNX: {note}") if note else found | {"result": "exact", "note": ""}


def filled(model: nn.Module, small: nn.Module, report: dict[str, Any]) -> nn.Module:
    """The dense network with the numbers of the small one in their places, and zeros in the places that were cut."""
    back = copy.deepcopy(model)
    theirs = dict([*small.named_parameters(), *small.named_buffers()])
    mine = dict([*back.named_parameters(), *back.named_buffers()])
    with torch.no_grad():
        for name, tensor in theirs.items():
            axes = report["cut"]["axes"].get(name, [])
            old = mine.get(name)
            if old is None:
                # an intercept that came where there was no bias, which has places of the layer's outputs
                path = name.rpartition(".")[0]
                weight, cut = mine[f"{path}.weight"], report["cut"]["axes"].get(f"{path}.weight", [])
                of = 1 if isinstance(back.get_submodule(path), nn.modules.conv._ConvTransposeNd) else 0
                axes = [[0, places] for axis, places in cut if axis == of]
                old = nn.Parameter(torch.zeros(weight.shape[of]))
                back.get_submodule(path).register_parameter("bias", old)
            if not axes:
                old.copy_(tensor)
                continue
            whole = tensor
            for axis, places in axes:
                wider = torch.zeros([*whole.shape[:axis], old.shape[axis], *whole.shape[axis + 1 :]], dtype=whole.dtype)
                whole = wider.index_copy(axis, torch.tensor(places), whole)
            old.copy_(whole)
    return back


def _run(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return tensors_of(model(x))


def apart(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest difference over the largest number of b; infinite if the shapes differ."""
    if [x.shape for x in a] != [x.shape for x in b]:
        return float("inf")
    return max(float((x - y).abs().max() / y.abs().max().clamp(min=1e-12)) for x, y in zip(a, b, strict=True))


def _trains(model: nn.Module, x: Tensor) -> str | None:
    """Why a step of training fails, or None."""
    try:
        model.train()
        loss = sum(y.float().square().mean() for y in tensors_of(model(x)) if y.requires_grad)
        loss.backward()  # type: ignore[union-attr]
        torch.optim.SGD(model.parameters(), 1e-3).step()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _onnx(model: nn.Module, x: Tensor) -> str | None:
    """Why it gives something else as ONNX, or None."""
    import onnxruntime

    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            tempfile.TemporaryDirectory() as folder,
        ):
            warnings.simplefilter("ignore")
            file = Path(folder) / "model.onnx"
            torch.onnx.export(model.eval(), (x,), file, verbose=False)
            session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
            found = [torch.from_numpy(y) for y in session.run(None, {session.get_inputs()[0].name: x.numpy()})]
    except Exception as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    gap = apart(found, _run(model, x))
    return None if gap <= _ONNX else f"{gap:.2g} of the largest output apart"


def of_peer(make: Callable[[], nn.Module], model: nn.Module, x: Tensor) -> dict[str, Any]:
    """Torch-Pruning at the smallest ratio, of some, that leaves 0.7x: {result: runs, fails or never small enough, note}."""
    import torch_pruning

    try:
        fixed = trace(model, (x[:2],)).fixed
        outputs = [path for path, why in fixed.items() if why == "it is the model's output"]
    except sc.SecateursError:
        outputs = []
    try:
        low, high, best = 0.0, 0.9, None
        for _ in range(5):
            ratio = (low + high) / 2
            small = copy.deepcopy(model)
            ignored = [m for path, m in small.named_modules() if path in outputs]
            heads = {
                m: parent.num_heads
                for parent in small.modules() if isinstance(getattr(parent, "num_heads", None), int)
                for path, m in parent.named_children() if path in ("qkv", "query", "key", "value", "q", "k", "v", "kv")
            }  # fmt: skip
            pruner = torch_pruning.pruner.BasePruner(
                small, x[:1], torch_pruning.importance.GroupMagnitudeImportance(), global_pruning=True, pruning_ratio=ratio,
                ignored_layers=ignored, num_heads=heads, round_to=2,
            )  # fmt: skip
            pruner.step()
            if _count(small) <= SHARE * _count(model):
                best, high = small, ratio
            else:
                low = ratio
        if best is None:
            return {"result": "fails", "note": "never at 0.7x"}
        if [y.shape for y in _run(best, x[:3])] != [y.shape for y in _run(model, x[:3])]:
            return {"result": "fails", "note": "outputs of other shapes"}
        return {"result": "runs", "note": f"{_count(best) / _count(model):.2f}x"}
    except Exception as error:
        return {"result": "fails", "note": (str(error).strip().splitlines() or [type(error).__name__])[0]}


# ------------------------------------------------------------------------------------------------------------------ runs


def _child(pipe: Any, name: str, peer: bool) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        for found in tried(name, peer):
            pipe.send(found)
    except Exception as error:
        pipe.send({"result": "failed", "note": f"{type(error).__name__}: {error}"})


def _apart_from(name: str, peer: bool, seconds: float) -> dict[str, Any]:
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_child, args=(theirs, name, peer))
    process.start()
    theirs.close()
    try:
        if not ours.poll(seconds):
            return {"result": "failed", "note": f"not done in {seconds:.0f} s"}
        found: dict[str, Any] = ours.recv()
        if peer and found["result"] != "failed":
            found["peer"] = {"result": "fails", "note": f"not done in {seconds:.0f} s"}
            with contextlib.suppress(EOFError):
                if ours.poll(seconds):
                    found["peer"] = ours.recv()
        return found
    except EOFError:
        return {"result": "failed", "note": "its process ended"}
    finally:
        process.kill()
        process.join()


def state() -> str:
    """What results are of: the code."""
    files = [*sorted((ROOT / "src/secateurs/shrink").glob("*.py")), *sorted((ROOT / "tools").glob("vision_*.py"))]
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:16]


def page(results: dict[str, Any], missing: list[str]) -> str:
    """The table, a row a network, and counts."""
    exact = [n for n, r in results.items() if r["result"] == "exact"]
    peers = [n for n, r in results.items() if r.get("peer", {}).get("result") == "runs"]
    by_kind = {
        kind: sum(r["result"] == kind for r in results.values()) for kind in ("exact", "refused", "failed", "wrong")
    }
    with_peer = sum("peer" in r for r in results.values())
    said = [
        f"{len(results)} networks: "
        + ", ".join(f"{n} {kind}" for kind, n in by_kind.items())
        + f" ({len(exact) / len(results):.0%} exact)."
    ]
    if with_peer:
        both = len(set(exact) & set(peers))
        said.append(
            f"Torch-Pruning 1.6.1 runs at 0.7x on {len(peers)} of {with_peer}, on {both} of which are exact here."
        )
    said += [f"Left out, not installed: {', '.join(missing)}."] if missing else []
    rows = [
        "| network | parameters | left | result | Torch-Pruning | seconds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, r in results.items():
        note = (
            r["result"]
            + (f": {_plain(r['note'])}" if r["note"] else "")
            + (f"; ONNX: {r['onnx']}" if "onnx" in r else "")
        )
        other = r.get("peer")
        theirs = "" if other is None else f"{other['result']}: {_plain(other['note'], 90)}"
        left = f"{r['left']:.3f}x" if "left" in r else ""
        rows.append(f"| {name} | {r.get('parameters', '')} | {left} | {note} | {theirs} | {r.get('seconds', 0):.0f} |")
    return " ".join(said) + "\n\n" + "\n".join(rows) + "\n"


def _plain(text: str, most: int = 400) -> str:
    text = " ".join(text.replace("|", "/").replace("<", "&lt;").split())
    return text if len(text) <= most else text[: most - 1] + "…"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names, separated by commas; writes no page")
    parser.add_argument("--peer", action="store_true", help="the same with Torch-Pruning 1.6.1")
    parser.add_argument("--again", action="store_true", help="forget what is in build/vision_zoo.json")
    parser.add_argument("--seconds", type=float, default=240.0, help="for one network, and for the peer's, default 240")
    given = parser.parse_args()
    names = list(vision_zoo_list.networks())
    if given.only:
        asked = given.only.split(",")
        names = [n for n in names if any(a == n or (a.endswith("*") and n.startswith(a[:-1])) for a in asked)]
        if not names:
            print(
                f"error: no network is called {given.only}; known: {', '.join(vision_zoo_list.networks())}",
                file=sys.stderr,
            )
            return 1
    held: dict[str, Any] = {}
    if RESULTS.exists() and not given.again:
        held = json.loads(RESULTS.read_text())
    held = held if held.get("state") == state() else {"state": state(), "results": {}}
    results = held["results"]
    for number, name in enumerate(names):
        if name not in results or (given.peer and "peer" not in results[name] and results[name]["result"] != "failed"):
            results[name] = _apart_from(name, given.peer, given.seconds)
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.with_suffix(".part").write_text(json.dumps(held))
            os.replace(RESULTS.with_suffix(".part"), RESULTS)
        r = results[name]
        done = f"{number + 1}/{len(names)} {name}: {r['result']} {r.get('left', 0):.3f}x {r['note']}"
        print(f"{done} | {r.get('peer', '')} {r.get('seconds', 0):.0f} s", flush=True)
    if not given.only:
        text = PAGE.read_text() if PAGE.exists() else "# Channels of networks\n\n" + "".join(TABLE)
        before, _, rest = text.partition(TABLE[0])
        PAGE.write_text(
            before
            + TABLE[0]
            + page({n: results[n] for n in names}, vision_zoo_list.missing())
            + TABLE[1]
            + rest.partition(TABLE[1])[2]
        )
    return int(any(results[n]["result"] in ("wrong", "failed") for n in names))


if __name__ == "__main__":
    sys.exit(main())
