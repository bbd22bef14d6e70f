"""What llama.cpp makes of a GGUF file, in a process of its own: the package xllamacpp, here or in the Python of XLLAMACPP_PYTHON."""

import functools
import json
import os
import subprocess
import sys

import pytest
import torch

LLAMA_CPP = """
import json, sys
import xllamacpp
asked = json.load(sys.stdin)
settings = xllamacpp.CommonParams()
settings.model.path, settings.n_ctx, settings.n_parallel, settings.warmup = asked["file"], 64, 1, False
settings.cpuparams.n_threads = 1
server = xllamacpp.Server(settings)
rows = []
for prompt in asked["prompts"]:
    # half a character would come without probabilities, which are those before the bias; 258 is "ab"
    request = {"prompt": prompt, "n_predict": 1, "n_probs": asked["words"], "cache_prompt": False, "logit_bias": [[258, 1e3]]}
    answer = server.handle_completions(request)
    answer = json.loads(answer) if isinstance(answer, str) else answer
    found = {one["id"]: one["logprob"] for one in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}
    rows.append([found[i] for i in range(asked["words"])])
json.dump(rows, sys.stdout)
"""


@functools.cache
def _installed(python):
    return subprocess.run([python, "-c", "import xllamacpp"], capture_output=True).returncode == 0


def needed():
    """The Python that has llama.cpp; skips where there is none."""
    python = os.environ.get("XLLAMACPP_PYTHON", sys.executable)
    if not _installed(python):
        pytest.skip("no xllamacpp: pip install it in a venv of its own and give that Python as XLLAMACPP_PYTHON")
    return python


def llama_cpp(file, prompts, words):
    """Log-probabilities of the next token after each prompt, by llama.cpp, [prompts, words]. Skips where it is not installed."""
    python = needed()
    asked = json.dumps({"file": str(file), "prompts": prompts, "words": words})
    done = subprocess.run([python, "-c", LLAMA_CPP], input=asked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.tensor(json.loads(done.stdout))
