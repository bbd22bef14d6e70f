"""Tokens a second by hand: workers that state their seconds in place of processes that take them."""

import importlib

import pytest
import tiny
import torch

from secateurs.machine.bench import Variant

module = importlib.import_module("secateurs.machine.bench")


class Stated:
    """A worker whose prompt takes 2 s and whose other tokens take 3 s; half of both if it is packed. The machine is slower at times."""

    def __init__(self, variant, prompt, new):
        self.share = 0.5 if variant.how == "packed" else 1.0
        # the first run warms up
        self.slower = iter((50.0, 1.0, 2.0, 1.0))
        self.kv_bytes_per_token, self.process = 8, self

    def ready(self):
        pass

    def run(self, batch):
        seconds = self.share * next(self.slower)
        return {"first": 2 * seconds, "all": 5 * seconds}

    def finish(self):
        return 7

    kill = wait = ready


def test_rates_by_hand(llama, monkeypatch):
    monkeypatch.setattr(module, "_Worker", Stated)
    ways = [Variant("dense", str(llama), "dense"), Variant("packed", str(llama), "packed")]
    dense, packed = module.bench(ways, prompt=8, new=4, repeats=3, batches=(3,))["variants"]
    # three prompts of 8 tokens in 2 s; three tokens after the first one of each in 3 s
    assert (dense["prefill"]["tokens_per_second"], dense["decode"]["tokens_per_second"]) == (12, 3)
    assert (packed["prefill"]["tokens_per_second"], packed["decode"]["tokens_per_second"]) == (24, 6)
    assert dense["prefill"]["samples"] == [12, 6, 12]
    # both were slower at the same moment
    for stage in ("prefill", "decode"):
        assert [packed[stage][name] for name in ("speedup", "speedup_low", "speedup_high")] == [2, 2, 2]


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_a_cache_holds_keys_and_values_of_the_kv_heads(dtype, size):
    model = tiny.make("llama", dtype)
    # keys and values of 3 blocks with 2 KV heads of 8 numbers, for 4 query heads
    assert module._kv_bytes_per_token(model) == 2 * 3 * 2 * 8 * size
    # a width that the config states is not that of the hidden states over the heads
    model.config.head_dim = 24
    assert module._kv_bytes_per_token(model) == 2 * 3 * 2 * 24 * size
