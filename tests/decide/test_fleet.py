"""Queues against their closed form, fleets against what can be worked out by hand."""

import json
import math
import re

import numpy as np
import pytest

from secateurs.base.errors import OutputError, PlanError
from secateurs.decide.fleet import (
    Service,
    fleet,
    random_requests,
    read_lengths,
    read_price,
    read_trace,
    service_of,
    size,
)
from secateurs.decide.queueing import Lengths, Requests, erlang_wait, full_moments, poisson, simulate
from secateurs.decide.speed import Speed, read_speeds


def speed(name="dense", decode=100.0, spread=0.0, **more):
    """Whose steps do not depend on what is held: its memory is read in no time."""
    three = (decode, decode * (1 - spread), decode * (1 + spread))
    batches = {(b, 0.0): tuple(v * b**0.5 for v in three) for b in (1, 4, 16)}
    given = {"weights_bytes": 10**9, "kv_bytes_per_token": 10**5, "memory_bytes": 24 * 10**9, "bytes_per_second": 1e18}
    return Speed(name, {100: (1000.0, 1000.0, 1000.0)}, batches, **{**given, **more})


def service(**more):
    return Service(**{"rate": 10.0, "peak": 10.0, "first_seconds": 2.0, "pace_seconds": 0.1, "percentile": 95.0, "price": 2.0,
                      "currency": "USD", **more})  # fmt: skip


def requests(rate=10.0, n=20_000):
    return poisson(rate, n, Lengths("fixed", (100,)), Lengths("fixed", (50,)), 0)


@pytest.mark.parametrize(("servers", "load"), [(1, 0.5), (1, 0.8), (4, 0.7)])
def test_simulated_waits_are_those_of_the_closed_form(servers, load):
    random = np.random.default_rng(1)
    n, rate = 1_000_000, servers * load
    # the prompt gives the first token
    exponential = Requests(np.cumsum(random.exponential(1 / rate, n)), np.ones(n), 1 + random.exponential(1.0, n))
    found = simulate(exponential, servers, np.zeros(n), [1.0])
    assert found.wait.mean() == pytest.approx(erlang_wait(rate, 1.0, servers), rel=0.02)


def test_the_closed_form_by_hand():
    # M/M/1: rho / (mu - lambda); M/M/2 at load 1: C = 1/3, wait = C / (2 - 1)
    assert erlang_wait(0.5, 1.0, 1) == pytest.approx(1.0)
    assert erlang_wait(1.0, 1.0, 2) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="never ends"):
        erlang_wait(2.0, 1.0, 2)


def test_a_queue_by_hand():
    # one replica of one sequence, half a second for the prompt and the first token and half for the second, arrivals at 0, 0.25, 5
    asked = Requests(np.array([0.0, 0.25, 5.0]), np.ones(3), np.full(3, 2.0))
    found = simulate(asked, 1, np.full(3, 0.5), [0.5], warm=0)
    assert found.wait.tolist() == [0.0, 0.75, 0.0]
    assert found.first.tolist() == [0.5, 1.25, 0.5]
    # two sequences a replica: the second waits for the first one's prompt, and goes on at the pace of two
    found = simulate(asked, 1, np.full(3, 0.5), [0.5, 0.8], warm=0)
    assert found.wait.tolist() == [0.0, 0.25, 0.0]
    assert found.pace.tolist() == [0.5, 0.8, 0.5]


def test_sequences_are_spread_over_replicas():
    asked = Requests(np.array([0.0, 0.1, 0.2]), np.ones(3), np.full(3, 2.0))
    assert simulate(asked, 3, np.zeros(3), [1.0, 2.0], warm=0).pace.tolist() == [1.0, 1.0, 1.0]
    assert simulate(asked, 2, np.zeros(3), [1.0, 2.0], warm=0).pace.tolist() == [1.0, 1.0, 2.0]


def test_a_fleet_by_hand():
    # 16 sequences make 400 tokens a second: 40 ms a token, and the prompt gives the first of 50. A request takes 16 prompts of 0.1 s
    # and 49 * 0.04 = 3.56 s, a replica serves 16 / 3.56 = 4.49 a second, 3.6 with a fifth free: 3 for 10 a second
    found = size(speed(), service(), requests())
    assert found.slots == 16
    assert found.replicas == 3
    assert found.load == pytest.approx(10 / (3 * 16 / 3.56))
    assert found.first_seconds <= 2.0


def test_answers_of_one_token_wait_for_prompts_only():
    # one prompt of 0.1 s at a time: 10 a second, however many sequences a replica may hold
    asked = poisson(10.0, 20_000, Lengths("fixed", (100,)), Lengths("fixed", (1,)), 0)
    found = size(speed(), service(), asked)
    assert found.replicas == 2
    assert found.load == pytest.approx(10 / (2 * 10))


def test_a_tight_objective_takes_more_replicas_than_the_load_does():
    asked, busy = requests(100.0), {"rate": 100.0, "peak": 100.0, "headroom": 0.0}
    loose = size(speed(), service(first_seconds=10.0, **busy), asked)
    tight = size(speed(), service(first_seconds=0.2, **busy), asked)
    assert tight.replicas > loose.replicas == 23
    assert tight.first_seconds <= 0.2
    # one fewer misses it
    steps = [speed().pace().base(b) + (b - 1) * 0.1 / 49 for b in range(1, 17)]
    fewer = simulate(asked, tight.replicas - 1, np.full(len(asked), 0.1), steps)
    assert np.percentile(fewer.first, 95) > 0.2


def test_what_ends_a_replica_s_batch_is_said():
    assert size(speed(), service(), requests()).slots_end == "the largest batch that was measured"
    # 5 sequences of 150 tokens at 100 kB take 75 MB beside 1 GB of weights
    small = size(speed(), service(memory_bytes=1_075_000_000), requests())
    assert (small.slots, small.slots_end) == (5, "memory for the cache")
    # alone 10 ms; with 4 at once 20 and 6 ms of prompts
    paced = size(speed(), service(pace_seconds=0.0265), requests())
    assert (paced.slots, paced.slots_end) == (4, "the pace that is asked")
    # a larger batch that was measured to be quicker does not make up for a smaller one that is too slow
    odd = Speed(
        "odd", {100: (1e9,) * 3}, {(b, 0.0): (b / s,) * 3 for b, s in ((1, 0.050), (4, 0.040), (16, 0.053))}, 10**9, 10**5, 24 * 10**9,
        1e18,
    )  # fmt: skip
    with pytest.raises(PlanError, match="the pace that is asked leaves no sequence"):
        size(odd, service(pace_seconds=0.045), requests())


def test_tokens_after_the_first_wait_for_the_others_prompts():
    # with 4 at once 20 ms and three prompts of 0.1 s over 49 tokens: 26.12 ms
    assert size(speed(), service(pace_seconds=0.0262), requests()).slots == 4
    assert size(speed(), service(pace_seconds=0.0261), requests()).slots == 3


def test_loads_at_the_peak_and_on_average():
    found = size(speed(), service(rate=4.0, peak=10.0), requests())
    # 3 replicas that serve 16 / 3.56 a second each
    assert found.load == pytest.approx(10 / (3 * 16 / 3.56))
    assert found.mean_load == pytest.approx(4 / (3 * 16 / 3.56))


def test_memory_is_asked_for_in_gigabytes():
    asked = service_of(None, 1.0, None, 1.0, 0.1, 95.0, "2 USD", 0.2, 1.5)
    assert asked.memory_bytes == 1_500_000_000
    assert service_of(None, 1.0, None, 1.0, 0.1, 95.0, "2 USD", 0.2, None).memory_bytes is None


def test_fewer_bytes_hold_more_sequences():
    memory = {"memory_bytes": 1_075_000_000}
    fat = size(speed(), service(**memory), requests())
    thin = size(speed(weights_bytes=900_000_000), service(**memory), requests())
    assert thin.slots > fat.slots
    assert thin.replicas <= fat.replicas


def test_savings_have_the_interval_of_the_speeds():
    found = fleet(
        [speed(spread=0.1), speed("half", 200.0, spread=0.1)], service(rate=100.0, peak=200.0), requests(200.0)
    )
    dense, half = found["variants"]
    assert dense["replicas_low"] <= dense["replicas"] <= dense["replicas_high"]
    assert half["replicas_saved"] == dense["replicas"] - half["replicas"] > 0
    assert half["saved_a_year"] == half["replicas_saved"] * 2.0 * 8760
    # a fast dense model against a slow candidate, and the other way round
    assert half["saved_a_year_low"] == (dense["replicas_low"] - half["replicas_high"]) * 2.0 * 8760
    assert half["saved_a_year_high"] == (dense["replicas_high"] - half["replicas_low"]) * 2.0 * 8760
    assert half["saved_a_year_low"] < half["saved_a_year"] < half["saved_a_year_high"]
    # tokens an hour at the mean rate: 100 * 3600 * 150
    assert half["cost_per_million_tokens"] == pytest.approx(half["replicas"] * 2.0 / 54.0)


def test_a_candidate_that_cannot_serve_says_why_and_a_dense_model_raises():
    found = fleet([speed(), speed("slow", 5.0)], service(), requests())
    assert "slow cannot serve this on any number of replicas: the pace that is asked" in found["variants"][1]["why_not"]
    with pytest.raises(PlanError, match="cannot serve"):
        fleet([speed("slow", 5.0)], service(), requests())
    with pytest.raises(PlanError, match="the first token takes"):
        fleet([speed()], service(first_seconds=0.05), requests())
    with pytest.raises(PlanError, match="memory for the cache leaves no sequence"):
        fleet([speed()], service(memory_bytes=10**9), requests())


def test_ten_thousand_replicas_and_a_million_requests():
    # 44 400 a second fill them; nothing waits where there is room for all
    asked = requests(20_000.0, 1_000_000)
    steps = [speed().pace().base(b) + (b - 1) * 0.1 / 49 for b in range(1, 17)]
    found = simulate(asked, 10_000, asked.prompt * 1e-3, steps, 1e-9)
    assert len(found.wait) == 900_000
    assert found.wait.max() == 0
    assert 0 < found.held < 16


def test_lengths_have_the_mean_that_was_asked():
    random = np.random.default_rng(0)
    drawn = read_lengths("lognormal:512,0.8", "prompt").draw(200_000, random)
    assert drawn.mean() == pytest.approx(512, rel=0.01)
    assert drawn.std() / drawn.mean() == pytest.approx(0.8, rel=0.02)
    drawn = read_lengths("uniform:16,1024", "prompt").draw(200_000, random)
    assert (drawn.min(), drawn.max()) == (16, 1024)
    assert set(read_lengths("128", "prompt").draw(5, random)) == {128.0}


def test_a_trace_is_read(tmp_path):
    file = tmp_path / "trace.jsonl"
    rows = [{"time": 1.0, "prompt": 10, "output": 1}, {"time": 2, "prompt": 30, "output": 3}]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    found = read_trace(file)
    assert found.arrival.tolist() == [1.0, 2.0]
    assert found.prompt.tolist() == [10, 30]
    assert found.at(4.0).rate == pytest.approx(4.0)


GOOD = '{"time": 3, "prompt": 1, "output": 1}'


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["{}", "{}"], "line 1 is no request (no 'time')"),
        ([GOOD, "oh"], "line 2 is no request"),
        ([GOOD, "[1, 2, 3]"], "line 2 is no request"),
        ([GOOD, "", '{"time": 4, "prompt": 0, "output": 1}'], "line 3 has 0 tokens of prompt; give 1 or more"),
        ([GOOD, '{"time": 4, "prompt": 1, "output": 0.5}'], "line 2 has 0.5 tokens of output; give 1 or more"),
        (['{"time": -1, "prompt": 1, "output": 1}', GOOD], "line 1 has the time -1, which is no number from 0 on"),
        ([GOOD, '{"time": NaN, "prompt": 1, "output": 1}'], "line 2 has the time NaN, which is no number"),
        ([GOOD, '{"time": 4, "prompt": Infinity, "output": 1}'], "line 2 has the prompt Infinity, which is no number"),
        ([GOOD, f'{{"time": {10**400}, "prompt": 1, "output": 1}}'], "line 2 has the time 10000"),
        ([GOOD, '{"time": 4, "prompt": 1, "output": -7}'], "line 2 has the output -7, which is no number from 0 on"),
        ([GOOD, '{"time": "", "prompt": 1, "output": 1}'], 'line 2 has the time "", which is no number'),
        ([GOOD, '{"time": null, "prompt": 1, "output": 1}'], "line 2 has the time null, which is no number"),
        ([GOOD, '{"time": true, "prompt": 1, "output": 1}'], "line 2 has the time true, which is no number"),
        (
            [GOOD, GOOD, '{"time": 2, "prompt": 1, "output": 1}'],
            "line 3 has the time 2 after 3; put the requests in order of time",
        ),
        ([GOOD] * 2, "two or more, at different times"),
        ([], "0 requests"),
    ],
)
def test_broken_traces_are_refused_by_line(tmp_path, lines, words):
    file = tmp_path / "trace.jsonl"
    file.write_text("\n".join(lines))
    with pytest.raises(PlanError, match=re.escape(words)):
        read_trace(file)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (([-100.0, 0.0], [1, 1], [1, 1]), "request 1 has the time -100; give seconds from 0 on"),
        (([0.0, math.nan], [1, 1], [1, 1]), "request 2 has the time nan"),
        (([0.0, 1.0], [1, 0], [1, 1]), "request 2 has the prompt 0; give tokens from 1 on"),
        (([0.0, 1.0], [1, 1], [1, math.inf]), "request 2 has the output inf"),
        (([0.0, 2.0, 1.0], [1, 1, 1], [1, 1, 1]), "request 3 arrives before the one that it follows"),
        (([0.0, 1.0], [1], [1, 1]), "2 times, 1 prompts and 2 answers are no requests"),
        (([], [], []), "0 times, 0 prompts and 0 answers are no requests"),
    ],
)
def test_requests_that_cannot_be_are_refused(columns, words):
    with pytest.raises(PlanError, match=words):
        Requests(*(np.array(column, dtype=float) for column in columns))


def test_prompts_wait_for_each_other():
    # prompts of a second, one every two seconds, on one replica with room for many: M/D/1 waits rho / (2 mu (1 - rho)) = 0.5 s
    random = np.random.default_rng(0)
    n = 200_000
    asked = Requests(np.cumsum(random.exponential(2.0, n)), np.full(n, 1000.0), np.ones(n))
    assert simulate(asked, 1, asked.prompt * 1e-3, [1e-3] * 64).wait.mean() == pytest.approx(0.5, rel=0.03)


def test_an_objective_between_prompts_that_count_and_those_that_do_not_ends():
    """The first tenth is not counted; their long prompts must not make a search that no fleet ends."""
    asked = Requests(np.arange(1000) / 10, np.array([5000.0] * 100 + [100.0] * 900), np.full(1000, 50.0))
    assert size(speed(), service(first_seconds=1.0), asked).first_seconds <= 1.0
    late = Requests(asked.arrival, asked.prompt[::-1].copy(), asked.output)
    with pytest.raises(PlanError, match="the first token takes"):
        size(speed(), service(first_seconds=1.0), late)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"peak": float("inf")}, "no number at or above the mean"),
        ({"rate": 0.0}, "traffic of 0 requests"),
        ({"rate": -1.0}, "traffic of -1 requests"),
        ({"peak": 5.0}, "no number at or above the mean of 10"),
        ({"percentile": 100.0}, "percentile 100 cannot be kept"),
        ({"first_seconds": 0.0}, "ttft 0 is not above 0"),
        ({"headroom": 1.0}, "headroom 1 is not"),
        ({"headroom": math.nan}, "headroom nan is not"),
        ({"fits": 0.0}, "fits 0 is no percentage"),
        ({"fits": 101.0}, "fits 101 is no percentage"),
        ({"memory_bytes": -1}, "memory of -1 bytes holds nothing"),
        ({"pace_seconds": math.inf}, "tpot inf is not above 0"),
    ],
)
def test_impossible_services_are_refused(more, words):
    with pytest.raises(PlanError, match=words):
        service(**more)


def test_other_bad_input_is_refused():
    with pytest.raises(PlanError, match="an amount and its currency"):
        read_price("2.50")
    assert read_price("2.50 usd") == (2.5, "USD")
    with pytest.raises(PlanError, match="prompt tokens 'many'"):
        read_lengths("many", "prompt")
    with pytest.raises(PlanError, match="no traffic"):
        service_of(None, None, None, 1.0, 0.1, 95.0, "2 USD", 0.2, None)
    with pytest.raises(PlanError, match="memory of nan GB"):
        service_of(None, 1.0, None, 1.0, 0.1, 95.0, "2 USD", 0.2, float("nan"))
    with pytest.raises(PlanError, match="prompt tokens '1e9'"):
        read_lengths("1e9", "prompt")
    with pytest.raises(PlanError, match="prompt tokens '9999999999'"):
        read_lengths("9999999999", "prompt")


def stage(rate, **more):
    return {"tokens_per_second": rate, "low": rate, "high": rate, **more}


def measurement(**more):
    """A bench.json of one variant at two lengths: a token 20 ms and 1 us for each that is held, of 1 and of 4 sequences."""

    def cells(prompt):
        return [
            {"batch": b, "prompt": prompt, "prefill": stage(prompt / (1e-3 * prompt + 1e-6 * prompt**2)),
             "decode": stage(b / (0.02 + 1e-6 * b * (prompt + 8)))} for b in (1, 4)
        ]  # fmt: skip

    row = {
        "name": "dense", "weights_bytes": 10**9, "kv_bytes_per_token": 10**4, "positions": 4096, "prefill": cells(64)[0]["prefill"],
        "batches": cells(64), "longer": cells(512),
    }  # fmt: skip
    return {
        "machine": {"memory_bytes": 10**10},
        "bytes_per_second": 1e11,
        "prompt": 64,
        "new": 16,
        "variants": [row | more],
    }


def read(tmp_path, data):
    (tmp_path / "bench.json").write_text(json.dumps(data))
    return read_speeds(tmp_path)[0]


def test_a_step_takes_what_its_tokens_of_cache_take(tmp_path):
    pace = read(tmp_path, measurement()).pace()
    # two lengths, 64 and 512, give the line of all others
    assert pace.step(1, 8192) == pytest.approx(0.02 + 8192e-6)
    assert pace.step(4, 4 * 8192) == pytest.approx(0.02 + 4 * 8192e-6)
    assert pace.step(2, 0) == pytest.approx(0.02)


def test_a_long_prompt_takes_the_square_of_its_length_too(tmp_path):
    pace = read(tmp_path, measurement()).pace()
    assert pace.prompt(np.array([64.0, 8192.0])) == pytest.approx([0.064 + 0.004096, 8.192 + 67.108864])
    # where a call costs something by itself, short prompts cost more a token: 10 ms and 1 ms a token
    costly = {length: (length / (0.01 + 1e-3 * length),) * 3 for length in (64, 512)}
    pace = Speed("dense", costly, {(1, 0.0): (50.0,) * 3}, 10**9, 0, 10**10, 1e11).pace()
    assert pace.prompt(np.array([8192.0])) == pytest.approx([8.202])


def test_one_context_leaves_the_cache_to_the_bandwidth_and_says_so(tmp_path):
    # 10 kB a token at 1 GB/s: 10 us for each token held; measured 20.72 ms with 4 sequences of 72
    speed = read(tmp_path, {**measurement(longer=[]), "bytes_per_second": 1e9})
    pace = speed.pace()
    assert pace.each == pytest.approx(1e-5)
    assert pace.step(1, 72) == pytest.approx(0.02 + 72e-6)
    assert pace.step(1, 8264) == pytest.approx(0.02 + 72e-6 + 8192e-5)
    assert (
        "decoding was measured with 72 tokens a sequence only; each token more is taken to cost the reading of its 10,000 bytes"
        in speed.told
    )
    assert "at the 1 GB/s of memory, which is the least it can; prompts in proportion to 64 tokens" in speed.told
    # where nobody probed, the rate at which one sequence's tokens read the weights
    speed = read(tmp_path, {**measurement(longer=[]), "bytes_per_second": None})
    assert speed.pace().each == pytest.approx(1e4 * (0.02 + 72e-6) / 1e9)
    assert "GB/s of its weights" in speed.told


def test_what_was_measured_is_never_less_than_memory_takes(tmp_path):
    # noise: the longer context was faster
    fast = [{"batch": 1, "prompt": 512, "prefill": stage(1000.0), "decode": stage(60.0)}]
    data = measurement(longer=fast)
    assert read(tmp_path, {**data, "bytes_per_second": 1e9}).pace().each == pytest.approx(1e-5)


def test_a_fleet_of_long_contexts_is_larger(tmp_path):
    speed = read(tmp_path, measurement(positions=None))
    short, long = (
        size(speed, service(rate=1.0, peak=1.0, first_seconds=1e4, pace_seconds=1.0),
             random_requests(1.0, 2000, str(prompt), "16", 0)) for prompt in (64, 8192)
    )  # fmt: skip
    # 20 ms, 4 sequences that hold 8200 tokens each, and three prompts of 75.3 s over 15 tokens would be 15 s: alone it is
    assert (short.slots, long.slots) == (4, 1)
    assert long.pace_seconds == pytest.approx(0.02 + 8200e-6)
    assert long.replicas > 60 * short.replicas


def test_a_bench_without_lengths_is_read(tmp_path):
    data = measurement(longer=[])
    for name in ("prompt", "new", "bytes_per_second"):
        del data[name]
    for cell in data["variants"][0]["batches"]:
        del cell["prompt"]
    del data["variants"][0]["positions"]
    speed = read(tmp_path, data)
    # prompts of 64 tokens and 64 new ones are what `bench` measured
    assert speed.contexts == [96.0]
    assert speed.positions is None


def test_a_decision_s_candidate_is_read_by_its_timing(tmp_path):
    for name, bandwidth in (("0.5", 1e10), ("0.7", 2e10)):
        folder = tmp_path / "candidates" / name
        folder.mkdir(parents=True)
        (folder / "timing.json").write_text(json.dumps({**measurement(), "bytes_per_second": bandwidth}))
    rows = [{"candidate": name, "folder": f"candidates/{name}"} for name in ("0.5", "0.7")]
    (tmp_path / "decide.json").write_text(json.dumps({"recommended": "0.7", "rows": rows}))
    (tmp_path / "plan.json").write_text("{}")
    assert read_speeds(tmp_path)[0].bytes_per_second == 2e10
    assert read_speeds(tmp_path / "candidates" / "0.5")[0].bytes_per_second == 1e10


def test_the_pace_holds_for_long_answers_too():
    """Lengths vary, and a token of 100,000 held ones takes 100 ms more: replicas with fewer sequences keep the pace."""
    slow = {"kv_bytes_per_token": 10**4, "bytes_per_second": 1e10}
    asked = poisson(10.0, 20_000, Lengths("lognormal", (2000, 1.5)), Lengths("lognormal", (50, 0.5)), 0)
    for pace in (0.1, 0.05):
        found = size(speed(**slow), service(pace_seconds=pace, first_seconds=100.0), asked)
        assert found.pace_seconds <= pace
    with pytest.raises(PlanError, match=r"a token takes 0\.0\d+ s alone, at the 95th percentile"):
        size(speed(**slow), service(pace_seconds=0.015, first_seconds=100.0), asked)


def test_full_replicas_hold_their_cache_as_often_as_was_asked():
    asked = poisson(10.0, 20_000, Lengths("lognormal", (512, 0.8)), Lengths("lognormal", (128, 0.8)), 0)
    room = 8 * 640 * 10**5
    found = {
        fits: size(speed(memory_bytes=10**9 + room), service(pace_seconds=1.0, fits=fits), asked).slots
        for fits in (50.0, 95.0, 99.0)
    }
    assert found[50.0] > found[95.0] > found[99.0] >= 1
    for fits, slots in found.items():
        # replicas of that many sequences, each replaced when it ends, looked at now and then
        held = _watched(asked, slots)
        share = np.mean(held * 10**5 <= room)
        assert share >= fits / 100 - 0.02
        # one more would not fit as often
        assert np.mean(_watched(asked, slots + 1) * 10**5 <= room) < fits / 100 + 0.02


def _watched(asked, slots):
    """Tokens held by `slots` sequences at moments far apart: prompts come at 1000 tokens a second, each other token after 25 ms."""
    random = np.random.default_rng(1)
    held = np.zeros(1500)
    for _ in range(slots):
        # one sequence after the other; a moment falls somewhere
        picked = random.integers(0, len(asked), 60_000)
        prompt, output = asked.prompt[picked], asked.output[picked]
        ends = np.cumsum(prompt * 1e-3 + (output - 1) * 0.025)
        at = np.sort(random.random(len(held))) * ends[-1]
        i = np.searchsorted(ends, at, side="right")
        since = at - np.where(i, ends[i - 1], 0.0) - prompt[i] * 1e-3
        held += random.permutation(prompt[i] + np.where(since > 0, np.floor(since / 0.025) + 1, 0))
    return held


def test_the_tokens_of_a_full_moment_by_hand():
    asked = Requests(np.arange(2.0), np.array([10.0, 10.0]), np.array([1.0, 5.0]))
    # prompts of 1 s, later tokens of 1 s: the first is met for 1 s, the second for 5, in turn with 10, 11, 12, 13 and 14 tokens
    held = full_moments(asked, np.ones(2), 1.0, 2, moments=50_000)
    alone = held[:, 0]
    assert [np.mean(alone == n) for n in (10, 11, 12, 13, 14)] == pytest.approx([2 / 6, *[1 / 6] * 4], abs=0.01)
    assert held[:, 1].mean() == pytest.approx(2 * alone.mean(), rel=0.01)


def test_tokens_that_are_held_slow_a_replica():
    asked = Requests(np.array([0.0, 0.1]), np.array([10.0, 100.0]), np.full(2, 3.0))
    found = simulate(asked, 1, np.zeros(2), [1.0, 2.0], 0.01, warm=0)
    # each holds its prompt and half of its answer; the second is there beside the first
    assert found.pace == pytest.approx([1.0 + 0.115, 2.0 + 0.01 * (11.5 + 101.5)])
    # on a replica of its own it waits for nobody
    assert simulate(asked, 2, np.zeros(2), [1.0, 2.0], 0.01, warm=0).pace == pytest.approx([1.115, 2.015])


@pytest.mark.parametrize(("slots", "third"), [(3, 5.0), (2, 0.2)])
def test_who_has_left_holds_nothing(slots, third):
    """The first has gone when the third comes, or makes room for it where the replica is full; the second is there, with 125 tokens."""
    asked = Requests(np.array([0.0, 0.1, third]), np.array([10.0, 100.0, 10.0]), np.array([2.0, 50.0, 2.0]))
    found = simulate(asked, 1, np.zeros(3), [1.0] * slots, 0.01, warm=0)
    assert found.pace == pytest.approx([1.11, 1.0 + 0.01 * (11 + 125), 1.0 + 0.01 * (11 + 125)])


def test_requests_longer_than_the_model_are_cut_or_refused():
    few = poisson(10.0, 2000, Lengths("fixed", (100,)), Lengths("fixed", (50,)), 0)
    long = few.output.copy()
    long[:3] = 5000
    found = fleet([speed(positions=1000)], service(), Requests(few.arrival, few.prompt, long))
    assert found["requests"]["cut"] == 3
    assert found["requests"]["output_mean"] == pytest.approx((1997 * 50 + 3 * 900) / 2000)
    with pytest.raises(
        PlanError,
        match=r"2,000 of 2,000 requests are longer than the model's 149 positions, the first is request 1 with 100 and 50",
    ):
        fleet([speed(positions=149)], service(), few)


def test_other_files_are_no_measurements(tmp_path):
    with pytest.raises(OutputError, match="secateurs bench DIR --batch"):
        read_speeds(tmp_path)
    row = {"name": "dense", "weights_bytes": 1, "kv_bytes_per_token": 1, "prefill": stage(1)}
    cells = [{"batch": 1, "decode": stage(1)}]
    good = {**row, "batches": cells}
    bad = [
        [], [row], [{**row, "batches": []}], [{**row, "batches": [{"batch": 1, "decode": stage(0)}]}],
        [{**good, "batches": [{"batch": 0, "decode": stage(1)}]}], [{**good, "weights_bytes": -5}],
        [{**good, "kv_bytes_per_token": -1}], [{**good, "kv_bytes_per_token": math.inf}], [{**good, "positions": 0}],
        [{**good, "prefill": {**stage(1), "low": 2}}], [{**good, "prefill": stage(math.nan)}], [{**good, "prefill": stage(-3)}],
    ]  # fmt: skip
    texts = ["{}", "[]", "{", *(json.dumps({"machine": {"memory_bytes": 1}, "variants": v}) for v in bad)]
    for memory in (0, -1, math.nan):
        texts.append(json.dumps({"machine": {"memory_bytes": memory}, "variants": [good]}))
    for text in texts:
        (tmp_path / "bench.json").write_text(text)
        with pytest.raises(OutputError, match="not a measurement"):
            read_speeds(tmp_path)
    (tmp_path / "bench.json").write_text(json.dumps({"machine": {"memory_bytes": 1}, "variants": [good]}))
    assert read_speeds(tmp_path)[0].name == "dense"
