"""Decoding in vLLM: tokens for a second of CPU time, folders interleaved, at several numbers of requests.

    PYTHON bench/serving.py dense=MODEL packed=runs/half/packed [--requests 1 8 32] [--rounds 5]

PYTHON is the environment's that has vLLM (docs/serving.md). All folders are loaded in this process, on one thread, and others are
compared with the first one. CPU time, because it counts nothing that other programs do to the clock; prompts are left
out by taking the time of one token from that of more.
"""

import argparse
import os
import statistics
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="NAME=FOLDER, the dense model first")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32], help="requests at once")
    parser.add_argument("--tokens", type=int, default=16, help="new tokens of each")
    parser.add_argument("--rounds", type=int, default=5, help="times that each folder is measured")
    given = parser.parse_args()
    folders = dict(each.split("=", 1) for each in given.folders)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    from vllm import LLM, SamplingParams

    models = {}
    for name, folder in folders.items():
        models[name] = LLM(
            model=folder, max_model_len=256, disable_log_stats=True, dtype="bfloat16", enforce_eager=True,
            enable_prefix_caching=False,
        )  # fmt: skip
        torch.set_num_threads(1)

    def seconds(model: LLM, requests: int, tokens: int, seed: int) -> float:
        prompts = [
            {"prompt_token_ids": [(7 * i + 13 * (k + seed)) % 200 + 3 for i in range(16)]} for k in range(requests)
        ]
        began = time.process_time()
        model.generate(
            prompts, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False), use_tqdm=False
        )
        return time.process_time() - began

    first = next(iter(models))
    for requests in given.requests:
        found: dict[str, list[float]] = {name: [] for name in models}
        for number in range(given.rounds):
            for name, model in models.items():
                took = seconds(model, requests, 1 + given.tokens, number) - seconds(model, requests, 1, number)
                found[name].append(requests * given.tokens / took)
        for name, samples in found.items():
            over = [a / b for a, b in zip(samples, found[first], strict=True)]
            print(
                f"{requests} requests, {name}: {statistics.median(samples):.1f} tokens a CPU second "
                f"[{min(samples):.1f}-{max(samples):.1f}], {statistics.median(over):.2f}x {first} "
                f"[{min(over):.2f}-{max(over):.2f}]",
                flush=True,
            )


if __name__ == "__main__":
    main()
