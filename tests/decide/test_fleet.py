"""Queues against their closed form, fleets against what can be worked out by hand."""

import json

import numpy as np
import pytest

from secateurs.base.errors import OutputError, PlanError
from secateurs.decide.fleet import (
    Service,
    Speed,
    fleet,
    read_lengths,
    read_price,
    read_speeds,
    read_trace,
    service_of,
    size,
)
from secateurs.decide.queueing import Lengths, Requests, erlang_wait, poisson, simulate


def speed(name="dense", decode=100.0, spread=0.0, **more):
    three = (decode, decode * (1 - spread), decode * (1 + spread))
    batches = {b: tuple(v * b**0.5 for v in three) for b in (1, 4, 16)}
    given = {"weights_bytes": 10**9, "kv_bytes_per_token": 10**5, "memory_bytes": 24 * 10**9}
    return Speed(name, (1000.0, 1000.0, 1000.0), batches, **{**given, **more})


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
    found = simulate(exponential, servers, 0.0, [1.0])
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
    found = simulate(asked, 1, 0.5, [0.5], warm=0)
    assert found.wait.tolist() == [0.0, 0.75, 0.0]
    assert found.first.tolist() == [0.5, 1.25, 0.5]
    # two sequences a replica: the second waits for the first one's prompt, and goes on at the pace of two
    found = simulate(asked, 1, 0.5, [0.5, 0.8], warm=0)
    assert found.wait.tolist() == [0.0, 0.25, 0.0]
    assert found.pace.tolist() == [0.5, 0.8, 0.5]


def test_sequences_are_spread_over_replicas():
    asked = Requests(np.array([0.0, 0.1, 0.2]), np.ones(3), np.full(3, 2.0))
    assert simulate(asked, 3, 0.0, [1.0, 2.0], warm=0).pace.tolist() == [1.0, 1.0, 1.0]
    assert simulate(asked, 2, 0.0, [1.0, 2.0], warm=0).pace.tolist() == [1.0, 1.0, 2.0]


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
    fewer = simulate(asked, tight.replicas - 1, 1 / 1000, [speed().step(b) + (b - 1) * 0.1 / 49 for b in range(1, 17)])
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
        "odd", (1e9,) * 3, {b: (b / s,) * 3 for b, s in ((1, 0.050), (4, 0.040), (16, 0.053))}, 10**9, 10**5, 24 * 10**9
    )
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
    found = simulate(asked, 10_000, 1e-3, [speed().step(b) + (b - 1) * 0.1 / 49 for b in range(1, 17)])
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


def test_a_trace_is_read_in_order_of_time(tmp_path):
    file = tmp_path / "trace.jsonl"
    rows = [{"time": 2.0, "prompt": 30, "output": 3}, {"time": 1.0, "prompt": 10, "output": 1}]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    found = read_trace(file)
    assert found.arrival.tolist() == [1.0, 2.0]
    assert found.prompt.tolist() == [10, 30]
    assert found.at(4.0).rate == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["{}", "{}"], "line 1 is no request"),
        (['{"time": 0, "prompt": 1, "output": 1}', "oh"], "line 2 is no request"),
        (['{"time": 0, "prompt": 0, "output": 1}'], "less than one token"),
        (['{"time": 0, "prompt": 1, "output": 1}'] * 2, "two or more, at different times"),
        ([], "0 requests"),
    ],
)
def test_broken_traces_are_refused_by_line(tmp_path, lines, words):
    file = tmp_path / "trace.jsonl"
    file.write_text("\n".join(lines))
    with pytest.raises(PlanError, match=words):
        read_trace(file)


def test_prompts_wait_for_each_other():
    # prompts of a second, one every two seconds, on one replica with room for many: M/D/1 waits rho / (2 mu (1 - rho)) = 0.5 s
    random = np.random.default_rng(0)
    n = 200_000
    asked = Requests(np.cumsum(random.exponential(2.0, n)), np.full(n, 1000.0), np.ones(n))
    assert simulate(asked, 1, 1e-3, [1e-3] * 64).wait.mean() == pytest.approx(0.5, rel=0.03)


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
    ],
)
def test_impossible_services_are_refused(more, words):
    with pytest.raises(PlanError, match=words):
        service(**more)


def test_other_bad_input_is_refused(tmp_path):
    with pytest.raises(PlanError, match="an amount and its currency"):
        read_price("2.50")
    assert read_price("2.50 usd") == (2.5, "USD")
    with pytest.raises(PlanError, match="prompt tokens 'many'"):
        read_lengths("many", "prompt")
    with pytest.raises(PlanError, match="no traffic"):
        service_of(None, None, None, 1.0, 0.1, 95.0, "2 USD", 0.2, None)
    with pytest.raises(PlanError, match="memory of nan GB"):
        service_of(None, 1.0, None, 1.0, 0.1, 95.0, "2 USD", 0.2, float("nan"))
    with pytest.raises(OutputError, match="secateurs bench DIR --batch"):
        read_speeds(tmp_path)
    row = {
        "name": "dense",
        "weights_bytes": 1,
        "kv_bytes_per_token": 1,
        "prefill": {"tokens_per_second": 1, "low": 1, "high": 1},
    }
    zero = {"batch": 1, "decode": {"tokens_per_second": 0, "low": 0, "high": 0}}
    for text in ("{}", "[]", "{", *(json.dumps({"machine": {"memory_bytes": 1}, "variants": v}) for v in (
        [], [row], [{**row, "batches": []}], [{**row, "batches": [zero]}],
    ))):  # fmt: skip
        (tmp_path / "bench.json").write_text(text)
        with pytest.raises(OutputError, match="not a measurement"):
            read_speeds(tmp_path)
