"""Zeros beside dense integers: which are chosen, what is said of the others, what would have to change; by hand."""

import pytest

from secateurs.decide.beside_dense import compare, pays
from secateurs.decide.realize import Candidate


def row(name, seconds, nbytes, kl=0.1, passed=True, status="measured", high=None):
    gate = [{"gate": "kl<=0.2", "passed": passed, "missed": None if passed else "gate missed: KL is 0.5"}]
    return {
        "candidate": name, "status": status, "reason": None if passed else gate[0]["missed"], "gate": gate, "passed": passed,
        "seconds_ratio": {"value": seconds, "low": seconds, "high": high or seconds}, "bytes_ratio": nbytes,
        "quality": {"kl": {"value": kl}},
    }  # fmt: skip


def compared(*rows, estimated=None):
    texts = {r["candidate"]: Candidate.parse(r["candidate"]) for r in rows}
    best, sentence = compare(list(rows), texts, estimated or (lambda c: row("0.5", 1, 1)))
    return best and best["candidate"], sentence


def test_zeros_that_are_no_faster_than_dense_integers_are_not_shipped():
    sparse = row("0.5+int8", 0.59, 0.35, kl=0.14)
    best, sentence = compared(row("int4", 0.5, 0.3, kl=0.04), row("int8", 0.60, 0.55, kl=0.01), sparse)
    assert best == "int4"
    assert sparse["beside"]["same_bits"] == {
        "candidate": "int8", "seconds": pytest.approx(0.59 / 0.6), "bytes": pytest.approx(0.35 / 0.55), "kl": pytest.approx(0.13),
    }  # fmt: skip
    assert sparse["beside"]["best_dense"]["candidate"] == "int4"
    assert sparse["reason"] == (
        "does not pay beside dense int4, which holds the floor too: 1.18x its seconds and 1.17x its bytes"
    )
    assert sentence.startswith("Zeros do not pay here.")


def test_zeros_that_are_faster_are_shipped_and_said_beside_the_best_dense():
    best, sentence = compared(row("int4", 0.5, 0.3), row("0.7+int4", 0.4, 0.2))
    assert best == "0.7+int4"
    assert (
        sentence
        == "It takes 0.80x the seconds and 0.67x the bytes of dense int4, the best of those that have fewer bits alone."
    )


def test_dense_integers_that_miss_the_floor_stand_in_nobody_s_way():
    assert compared(row("int4", 0.3, 0.3, passed=False), row("0.5", 0.7, 0.6))[0] == "0.5"
    assert compared(row("int4", 0.3, 0.3, passed=False))[0] is None


def test_what_is_faster_by_noise_pays_only_by_its_bytes():
    dense = row("int4", 0.5, 0.3)
    assert not pays(row("2:4+int4", 0.49, 0.29), dense)
    assert pays(row("2:4+int4", 0.51, 0.2), dense)
    # smaller, but slower
    assert not pays(row("2:4+int4", 0.6, 0.2), dense)
    # faster at its median, not at its high end
    assert not pays(row("2:4+int4", 0.4, 0.3, high=0.52), dense)


def test_what_misses_the_floor_alone_is_named_with_what_it_lacks():
    _, sentence = compared(row("int8", 0.6, 0.5), row("0.9+int8", 0.4, 0.2, kl=0.5, passed=False))
    assert sentence == (
        "Zeros do not pay here. 0.9+int8 would, with 0.67x the seconds and 0.40x the bytes of int8, if it held the floor: gate "
        "missed: KL is 0.5."
    )


def test_the_sparsity_from_which_zeros_would_pay_is_the_estimate_s():
    def estimated(candidate):
        # a weight on int4 takes 0.5, of which zeros above a third save their share; in 16 bits nothing is saved
        left = 1 - max(0.0, candidate.sparsity - 1 / 3)
        return row("0.5", 0.5 * left if candidate.grid else 1.0, 0.3 if candidate.grid else 1.0)

    _, sentence = compared(row("int4", 0.5, 0.3), row("0.5+int4", 0.5, 0.3), row("0.5", 0.9, 0.6), estimated=estimated)
    # below 1 / 1.05 of it: 1 - 0.0477 at 0.381
    assert "they would pay beside int4 from 39% on int4/64, not below 95% in 16 bits, if so many held" in sentence
