"""What is said of experts that went, by hand."""

from secateurs.report.gone_experts import gone, sentences


def of(blocks, **plan):
    return {"plan": {"experts": "loss", **plan}, "dense": {"experts": 4}, "blocks": blocks}


def block(name, removed, tokens, **more):
    return {"block": name, "units": {"experts": {"removed": removed, "tokens": tokens, **more}}}


FIRST = {"block": "layers.0", "units": {}}
TWO = [
    FIRST,
    block("layers.1", [0, 3], [10, 50, 20, 20], refit={"router": 0.9, "all": 0.2, "tokens": 50}),
    block("layers.2", [1, 2], [40, 10, 0, 50], refit={"router": 0.9, "all": 0.4, "tokens": 50}),
]


def test_each_block_with_a_mixture_says_what_went_and_what_is_left():
    first, second = gone(of(TWO))
    assert (first.block, first.number, first.removed, first.total, first.share, first.left) == (
        "layers.1", 1, [0, 3], 4, 0.3, 0.2,
    )  # fmt: skip
    assert (second.number, second.share, second.left) == (2, 0.1, 0.4)
    assert gone({"plan": {}}) == []


def test_all_blocks_in_three_sentences():
    assert sentences(of(TWO)) == [
        "By loss 2 of 4 experts went from each of 2 blocks; on calibration text 20% of the tokens' choices had been theirs",
        "All blocks keep equally many: config.json states one number",
        "The refit left 30% (20% to 40%) of their mixtures' error",
    ]
    one = block("layers.1", [2], [], merged={"0": [2]}, refit="left out: its experts are none")
    assert sentences(of([FIRST, one], experts="ream")) == [
        "By ream 1 of 4 experts went from 1 block, merged into those that stay"
    ]
    # fewer experts of a token, and none removed
    assert sentences(of([block("layers.1", [], [5, 5, 5, 5], refit={"all": 0.5})])) == [
        "The refit left 50% of their mixtures' error"
    ]
    assert sentences(of([FIRST])) == []
