"""Greedy tokens of folders in vLLM, in a process of its own: `PYTHON tests/served.py '[[FOLDER, {argument of LLM: value}], ...]'`.

vLLM wants an older transformers than ours, so it mostly lives in an environment of its own, whose Python SECATEURS_VLLM_PYTHON
names. There secateurs is installed, too, without its dependencies.
"""

import importlib.util
import json
import os
import subprocess
import sys

PYTHON = "SECATEURS_VLLM_PYTHON"
PROMPTS = (list(range(3, 8)), list(range(3, 20)))
TOKENS = 16


def python() -> str | None:
    """The Python that has vLLM, or None."""
    if importlib.util.find_spec("vllm"):
        return sys.executable
    return os.environ.get(PYTHON) or None


def tokens(jobs: list, plugin: bool = True) -> list:
    """The new tokens of each of PROMPTS for each (folder, arguments), or what was raised, as a string. plugin: whether vLLM loads ours."""
    # the names of those that are loaded; not set, all are
    plugins = {} if plugin else {"VLLM_PLUGINS": ""}
    found = subprocess.run(
        [python(), __file__, json.dumps([[str(folder), arguments] for folder, arguments in jobs])],
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **plugins},
        capture_output=True, text=True, timeout=3000, check=False,
    )  # fmt: skip
    lines = [line.removeprefix("FOUND ") for line in found.stdout.splitlines() if line.startswith("FOUND ")]
    assert len(lines) == len(jobs), found.stderr[-4000:]
    return [json.loads(line) for line in lines]


def _main() -> None:
    from vllm import LLM, SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    # one that is freed takes what all share with it
    kept = []
    for folder, arguments in json.loads(sys.argv[1]):
        try:
            llm = LLM(model=folder, max_model_len=64, disable_log_stats=True, **{"dtype": "float32", **arguments})
            kept.append(llm)
            made = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], greedy, use_tqdm=False)
            found = [list(each.outputs[0].token_ids) for each in made]
        # the test says what was wanted
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        print("FOUND", json.dumps(found), flush=True)


if __name__ == "__main__":
    _main()
