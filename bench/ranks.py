"""Several processes against one: speed, and what a kill leaves.

    .venv/bin/python bench/ranks.py --speed 3 [--model FOLDER] [--methods sparsegpt,balanced]
    .venv/bin/python bench/ranks.py --kills 50 [--command shrink]
    .venv/bin/python bench/ranks.py --machines        # as root: it makes network namespaces

Speed: one process with one thread, two with one thread each, and one with two threads, in turn. Where cores are shared, wall time
says little, so beside it stands the time that the run would take on cores of its own: between two messages every rank works alone,
so it is the sum over those steps of the CPU time of the slowest rank's main thread. Those steps are kept in results/ranks.json,
from which bench/scale.py simulates more ranks.

Kills: a random one of two processes is killed at a random moment; the time until the other has ended, and whether a second run of
the same command ends with the bytes of an undisturbed one. shrink removes neurons, heads and blocks.

Machines: two processes in network namespaces of their own, with a cable between them and one folder, against one process; then the
cable is cut, and the time until both have ended.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import process  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "ranks.json"
WAYS = {"1 process, 1 thread": (1, 1), "2 processes, 1 thread each": (2, 1), "1 process, 2 threads": (1, 2)}


def prune(plan, out, threads, log) -> None:
    """Prune, and note the CPU seconds of the main thread between messages: [what the message was, its bytes, seconds]."""
    import torch

    from secateurs.prune.run import Run

    torch.set_num_threads(threads)
    steps: list[tuple[str, int, float]] = []
    since = time.thread_time()

    def noted(name: str, call):
        def wrapped(*given, **named):
            nonlocal since
            nbytes = next((x.numel() * x.element_size() for x in given if isinstance(x, torch.Tensor)), 0)
            steps.append((name, nbytes, time.thread_time() - since))
            try:
                return call(*given, **named)
            finally:
                since = time.thread_time()

        return wrapped

    for name in ("all_reduce", "reduce", "broadcast", "barrier", "all_gather_object", "broadcast_object_list"):
        setattr(torch.distributed, name, noted(name, getattr(torch.distributed, name)))
    began, user = time.perf_counter(), time.thread_time()
    report = Run(plan, out).complete()
    steps.append(("end", 0, time.thread_time() - since))
    found = {
        "wall": time.perf_counter() - began,
        "main": time.thread_time() - user,
        "steps": steps,
        "seconds": report.seconds,
    }
    log.with_name(f"{log.name}-{os.environ['RANK']}").write_text(json.dumps(found))


def plan_of(model, text, method, samples, seqlen, windows):
    from plans import asked

    from secateurs.prune.plan import Plan

    how = {"effort": method} if method in ("fast", "balanced", "best") else {"method": method}
    return asked(
        Plan, str(model), calibration=str(text), eval_text=str(text), samples=samples, seqlen=seqlen, eval_seqlen=seqlen,
        eval_windows=windows, **how,
    )  # fmt: skip


def critical(logs) -> float:
    """Seconds on cores of its own: of every step the slowest rank's."""
    steps = [log["steps"] for log in logs]
    assert len({len(s) for s in steps}) == 1
    return sum(max(step[2] for step in at) for at in zip(*steps, strict=True))


def speed(arguments) -> None:
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for method in arguments.methods.split(","):
        plan = plan_of(
            arguments.model,
            arguments.shared / "data" / "tinyshakespeare.txt",
            method,
            arguments.samples,
            arguments.seqlen,
            arguments.windows,
        )
        rows, same = {name: [] for name in WAYS}, {}
        for _ in range(arguments.speed):
            for name, (size, threads) in list(WAYS.items())[: arguments.ways]:
                with tempfile.TemporaryDirectory() as folder:
                    out = Path(folder)
                    cache = {"SECATEURS_CACHE": str(out / "cache"), "HOME": str(Path.home())}
                    for done in process.Job(size, prune, plan, out / "run", threads, out / "log", **cache).join(3000):
                        assert done.code == 0, done.error[-2000:]
                    logs = [json.loads((out / f"log-{rank}").read_text()) for rank in range(size)]
                    shards = json.loads((out / "run" / "report.json").read_text())["shards"]
                    same.setdefault(name, shards)
                    assert same[name] == shards, "a second run has other bytes"
                rows[name].append(
                    {
                        "wall": max(log["wall"] for log in logs),
                        "own": critical(logs),
                        "steps": [log["steps"] for log in logs],
                    }
                )
                print(
                    method,
                    name,
                    f"wall {rows[name][-1]['wall']:.1f} s, on cores of its own {rows[name][-1]['own']:.2f} s",
                    flush=True,
                )
        one, two, threaded = (rows[name] for name in WAYS)
        ratios = {
            f"{what}, {kind}": statistics.median(a[kind] / b[kind] for a, b in zip(base, two, strict=True))
            for what, base in (("over one thread", one), ("over two threads", threaded)) if base for kind in ("wall", "own")
        }  # fmt: skip
        print(method, {name: round(value, 2) for name, value in ratios.items()}, flush=True)
        assert same["1 process, 1 thread"] == same["2 processes, 1 thread each"], (
            "two processes have other bytes than one"
        )
        best = min(rows["2 processes, 1 thread each"], key=lambda row: row["own"])
        found[f"{Path(arguments.model).parent.name}, {method}"] = {
            "windows": arguments.samples, "seqlen": arguments.seqlen, "eval_windows": arguments.windows, "ratios": ratios,
            "seconds": {name: [{kind: r[kind] for kind in ("wall", "own")} for r in rows[name]] for name in WAYS},
            "steps": best["steps"],
        }  # fmt: skip
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


def of_prune(arguments):
    data = arguments.shared / "data"
    plan = plan_of(data / "stories260K", data / "tinystories_30KB.txt", "balanced", 32, 128, 4)
    return lambda run: process.Job(2, prune, plan, run, 1, run.with_name("log"))


def shrink(plan, out) -> None:
    from secateurs.model import batches
    from secateurs.shrink.run import shrink

    # as many batches of the text that corrects the estimates as processes
    batches.TOKENS_PER_BATCH = 512
    shrink(plan, out)


def of_shrink(arguments):
    from plans import asked

    from secateurs.shrink.plan import ShrinkPlan

    data = arguments.shared / "data"
    text = str(data / "tinystories_30KB.txt")
    plan = asked(
        ShrinkPlan, str(data / "stories260K"), "params=0.7x", units=("mlp", "heads", "layers"), multiple=4, prompt=32, new=4,
        calibration=text, eval_text=text, samples=32, seqlen=128, eval_windows=4, eval_seqlen=128,
    )  # fmt: skip
    return lambda run: process.Job(2, shrink, plan, run)


COMMANDS = {"prune": of_prune, "shrink": of_shrink}


def kills(arguments) -> None:
    start = COMMANDS[arguments.command](arguments)
    chance = random.Random(arguments.seed)

    def files(run: Path) -> dict[str, bytes]:
        return {
            file.name: file.read_bytes() for file in sorted((run / "model").iterdir()) if file.suffix == ".safetensors"
        }

    def stage(run: Path) -> str:
        """The newest note of what was finished."""
        notes = sorted((run / "work").glob("**/*.json"), key=lambda file: file.stat().st_mtime)
        return str(notes[-1].relative_to(run / "work")) if notes else "the beginning"

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        # the first pays for imports
        for name in ("first", "whole"):
            began = time.monotonic()
            for done in start(out / name).join(900):
                assert done.code == 0, done.error[-2000:]
        usual, want = time.monotonic() - began, files(out / "whole")
        assert files(out / "first") == want
        print(f"{arguments.command}, undisturbed: {usual:.1f} s, {len(want)} files", flush=True)
        ended, killed, late, same = [], 0, 0, 0
        while killed < arguments.kills:
            run = out / f"run-{killed}-{late}"
            job = start(run)
            time.sleep(chance.uniform(0, usual))
            who = chance.randrange(2)
            if not all(p.is_alive() for p in job.processes):
                # it was over before the kill
                late += 1
                job.join(900)
                continue
            job.processes[who].kill()
            began = time.monotonic()
            other = job.join(60)[1 - who]
            ended.append(time.monotonic() - began)
            assert other.code is not None, "the other process did not end"
            after = stage(run)
            for done in start(run).join(900):
                assert done.code == 0, done.error[-2000:]
            killed += 1
            same += files(run) == want
            how = f"the other ended in {ended[-1]:.1f} s with {other.code}"
            print(f"{killed}: rank {who} killed after {after}, {how}, {same} the same", flush=True)
            shutil.rmtree(run)
        seconds = f"{statistics.median(ended):.1f} s, {max(ended):.1f} at most"
        print(f"{killed} kills of {arguments.command}, {same} ends with the same bytes; the other ended in {seconds}")


def machines(arguments) -> None:
    data = arguments.shared / "data"
    names, cables = ("secateurs-0", "secateurs-1"), ("cable-0", "cable-1")

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    def start(rank: int, size: int, out: Path) -> subprocess.Popen:
        command = [
            sys.executable, "-m", "secateurs", "prune", str(data / "stories260K"), "--out", str(out), "--calibration",
            str(data / "tinystories_30KB.txt"), "--samples", "64", "--seqlen", "128", "--eval-windows", "0", "--quiet",
        ]  # fmt: skip
        meeting = {
            "RANK": rank,
            "WORLD_SIZE": size,
            "MASTER_ADDR": "10.77.0.1",
            "MASTER_PORT": 29577,
            "GLOO_SOCKET_IFNAME": cables[rank],
        }
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in meeting.items()}}
        return subprocess.Popen(["ip", "netns", "exec", names[rank], *command], env=environment)

    def files(run: Path) -> dict[str, str]:
        return json.loads((run / "report.json").read_text())["shards"]

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", cables[0], "netns", names[0], "type", "veth", "peer", "name", cables[1], "netns", names[1])
        for i, (name, cable) in enumerate(zip(names, cables, strict=True)):
            ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", cable)
            ip("-n", name, "link", "set", cable, "up")
            ip("-n", name, "link", "set", "lo", "up")
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder)
            assert start(0, 1, out / "one").wait() == 0
            both = [start(rank, 2, out / "two") for rank in range(2)]
            assert [p.wait() for p in both] == [0, 0]
            print(f"two machines, the bytes of one: {files(out / 'one') == files(out / 'two')}", flush=True)
            both = [start(rank, 2, out / "cut") for rank in range(2)]
            while not (out / "cut" / "work" / "state.json").is_file():
                time.sleep(0.1)
            ip("-n", names[1], "link", "set", cables[1], "down")
            began = time.monotonic()
            for process_ in both:
                code = process_.wait(120)
                print(
                    f"the cable was cut: a process ended with {code} after {time.monotonic() - began:.1f} s", flush=True
                )
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speed", type=int, default=0, help="runs of each way")
    parser.add_argument(
        "--ways", type=int, default=3, help="2 leaves out two threads, which wait for each other on busy cores"
    )
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--command", default="prune", choices=COMMANDS)
    parser.add_argument("--machines", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default=str(Path.home() / ".cache" / "secateurs" / "small-lm" / "model"))
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--methods", default="sparsegpt,balanced")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--windows", type=int, default=16)
    arguments = parser.parse_args()
    if arguments.speed:
        speed(arguments)
    if arguments.kills:
        kills(arguments)
    if arguments.machines:
        machines(arguments)


if __name__ == "__main__":
    main()
