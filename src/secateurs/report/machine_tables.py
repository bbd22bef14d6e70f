"""Terminal output of probe, realize, bench and fleet."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape

from secateurs.report.terminal import megabytes, new_table


def print_profile(profile: Any, file: str, console: Console) -> None:
    """Print a machine's memory bandwidth and FLOP/s, then every measured product beside the best dense one."""
    here, gpu = profile.machine, profile.accelerator
    sizes = ", ".join(f"{name} {size >> 10} KiB" for name, size in here["caches"].items())
    console.print(f"[bold]{here['processor']}[/], {here['cores']} cores, {here['threads']} threads; {sizes}")
    flops = ", ".join(f"{dtype} {rate / 1e9:.0f} Gflop/s" for dtype, rate in profile.flops_per_second.items())
    isa = next(iter(here["kernels"])).split("_")[2]
    console.print(f"Reads {profile.bytes_per_second / 1e9:.1f} GB/s from memory; {flops}; kernels: {isa}")
    if gpu["device"]:
        console.print(f"GPU: {gpu['device']}, capability {gpu['compute_capability']}; 2:4: {gpu['why_not'] or 'yes'}")
    else:
        console.print(f"GPU: none ({gpu['why_not']})")
    for shape, dtype in dict.fromkeys((tuple(r["shape"]), r["dtype"]) for r in profile.rows):
        console.print(f"[bold]{shape[0]}x{shape[1]}, {dtype}[/]")
        table = new_table("zeros", "as", "tokens", "kernel", "ms", "best dense", "ms", "bytes", "worth", "same bits")
        for row in profile.rows:
            if (tuple(row["shape"]), row["dtype"]) != (shape, dtype):
                continue
            grid = row.get("grid") or ""
            table.add_row(
                f"{row['sparsity']:.0%}" + (f", {row['pattern']}" if row["pattern"] not in ("dense", "unstructured") else ""),
                grid.partition("/")[0] or dtype, str(row["tokens"]),
                _short(row["kernel"]), f"{row['seconds'] * 1e3:.2f}", _short(row["dense"]), f"{row['dense_seconds'] * 1e3:.2f}",
                f"{row['nbytes'] / row['dense_nbytes']:.2f}x",
                "no gain" if "needs" in row["verdict"] else row["verdict"].partition("; ")[0],
                f"{row['over_integers']:.2f}x" if grid else "",
            )  # fmt: skip
        console.print(table)
    if any(r.get("grid") for r in profile.rows):
        console.print(
            "Worth: speed over the best dense product of the dtype; same bits: over all integers of as many bits."
        )
    for verdict in dict.fromkeys(r["verdict"] for r in profile.rows if "needs" in r["verdict"]):
        rows = [r for r in profile.rows if r["verdict"] == verdict]
        console.print(f"{rows[0]['sparsity']:.0%} {rows[0]['pattern']} stored densely: {escape(verdict)}.")
    console.print(f"Saved to {file}.", soft_wrap=True)


def _short(kernel: str) -> str:
    """bitmask_bf16_avx512_stream -> bitmask stream, oneDNN bfloat16 prepacked -> oneDNN bf16; other names as they are."""
    kernel = (
        kernel.replace("bfloat16", "bf16")
        .replace("float16", "fp16")
        .replace("float32", "fp32")
        .removesuffix(" prepacked")
    )
    parts = kernel.split("_")
    return f"{parts[0]} {parts[-1]}" if len(parts) == 4 else kernel


def print_bench(result: dict[str, Any], console: Console) -> None:
    """Print tokens per second of every variant at every batch size."""
    console.print(
        f"{result['new']} new tokens after each prompt, {result['repeats']} runs in turn, "
        f"{result['machine']['threads']} threads; median, and 10th to 90th percentile, of all prompts together"
    )
    table = new_table("", "prompt", "at once", "prefill tokens/s", "", "decode tokens/s", "", "peak memory", "weights")
    # a name is wrapped, not cut
    table.columns[0].overflow = "fold"
    for row in result["variants"]:
        sizes = [megabytes(row["peak_memory_bytes"]), megabytes(row["weights_bytes"])]
        for number, measured in enumerate([*row["batches"], *row.get("longer", [])]):
            cells = []
            for stage in ("prefill", "decode"):
                found = measured[stage]
                cells += [
                    f"{_speed(found['tokens_per_second'])} [{_speed(found['low'])}, {_speed(found['high'])}]",
                    f"{found['speedup']:.2f}x",
                ]
            name = "" if number else escape(row["name"])
            tokens = str(measured.get("prompt", result["prompt"]))
            table.add_row(name, tokens, str(measured["batch"]), *cells, *(["", ""] if number else sizes))
    console.print(table)
    dense = result["variants"][0]
    console.print(f"1x is {escape(dense['name'])}, the fastest way here to run the dense model's weights as they are.")
    for engine in dict.fromkeys(row["engine"] for row in result["variants"] if row.get("engine")):
        console.print(f"[dim]{escape(engine)}.[/]")
    for row in result["variants"]:
        if row["how"].endswith("compiled"):
            console.print(
                f"[dim]{escape(row['name'])}: its first runs took {row['first_run_seconds']:.0f} s, in which it compiled.[/]"
            )
    for sentence in result.get("left_out", []):
        console.print(f"[yellow]Warning:[/] {escape(sentence)}.")


def _speed(tokens_per_second: float) -> str:
    """'24.1', '282', '1,121'."""
    return f"{tokens_per_second:.1f}" if tokens_per_second < 100 else f"{tokens_per_second:,.0f}"


def print_worth(rows: Sequence[Any], name: str, sources: dict[str, str], console: Console) -> None:
    """Print nominal and realizable fractions of the dense model's cost, the smallest first."""
    console.print(
        f"[bold]{escape(name)}[/]"
        + (": published figures, not measured" if sources else ", measured")
        + "; fractions of the dense model: nominal (zeros are free) and real (what this machine executes)"
    )
    table = new_table("candidate", "nominal FLOPs", "bytes", "real FLOPs", "bytes", "prefill s", "decode s", "by")
    for w in rows:
        numbers = (w.nominal_flops, w.nominal_bytes, w.flops, w.nbytes, w.prefill, w.decode)
        table.add_row(w.candidate, *(f"{n:.2f}x" for n in numbers), w.kernel)
    console.print(table)
    for w in rows:
        if w.why:
            console.print(f"{w.candidate}: {escape(w.why)}.", highlight=False)
    for figure, source in sources.items():
        console.print(f"[dim]{figure}: {escape(source)}.[/]")


def print_fleet(result: dict[str, Any], console: Console) -> None:
    """Print replicas, their load and latency, cost and savings."""
    service, requests = result["service"], result["requests"]
    money = service["currency"]
    console.print(
        f"{service['rate']:g} requests/s, peak {service['peak']:g}; prompts of {requests['prompt_mean']:.0f} tokens, answers of "
        f"{requests['output_mean']:.0f}, on average; {service['percentile']:g}% within {service['first_seconds']:g} s to the first "
        f"token and {service['pace_seconds']:g} s a token; {service['headroom']:.0%} free at the peak; "
        f"{service['price']:g} {money} a node-hour; {requests['simulated']:,} requests simulated"
    )
    table = new_table(
        "", "replicas", "load", "first token s", "s a token", f"{money}/M tokens", f"saved {money} a year"
    )
    for row in result["variants"]:
        if row["why_not"]:
            table.add_row(escape(row["name"]), "none")
            continue
        saved = ""
        if "saved_a_year" in row:
            saved = f"{row['saved_a_year']:,.0f} [{row['saved_a_year_low']:,.0f}, {row['saved_a_year_high']:,.0f}]"
        table.add_row(
            escape(row["name"]), f"{row['replicas']:,} [{row['replicas_low']:,}, {row['replicas_high']:,}]",
            f"{row['load']:.0%}", f"{row['first_seconds']:.3g}", f"{row['pace_seconds']:.3g}",
            f"{row['cost_per_million_tokens']:.4g}", saved,
        )  # fmt: skip
    console.print(table)
    for row in result["variants"]:
        if row["why_not"]:
            console.print(f"[yellow]{escape(row['why_not'])}[/]")
    ends = {row["name"]: f"{row['slots']}, {row['slots_end']}" for row in result["variants"] if not row["why_not"]}
    console.print("Sequences a replica: " + "; ".join(f"{escape(n)} {e}" for n, e in ends.items()) + ".")
    for told in dict.fromkeys(row["speed"] for row in result["variants"]):
        names = ", ".join(escape(row["name"]) for row in result["variants"] if row["speed"] == told)
        console.print(
            f"Speed of {names}: {escape(told)}; {requests['held_high']:,.0f} tokens a sequence at the percentile."
        )
    if requests["cut"]:
        console.print(f"[yellow]Warning:[/] {requests['cut']:,} requests were cut to the model's positions.")
