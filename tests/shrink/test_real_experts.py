"""On the mixture that tools/tiny_moe.py trains: experts that have specialised, and ours beside REAP. Skipped where it is not trained."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.real, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def bench():
    """bench/experts.py, and the trained mixture."""
    sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tools")]
    import experts
    import tiny_moe

    if not (tiny_moe.root() / "recipe.json").is_file():
        pytest.skip(f"{tiny_moe.root()} is not there; python tools/tiny_moe.py trains it")
    yield experts
    for name in ("bench", "tools"):
        sys.path.remove(str(ROOT / name))


def test_experts_have_specialised(bench):
    import tiny_moe

    recipe = json.loads((tiny_moe.root() / "recipe.json").read_text())
    assert max(recipe["bits_of_domain"]) > 0.2
    # and each of them is in use
    for shares in zip(*recipe["shares"].values(), strict=True):
        assert all(sum(of_domains) > 0.01 for of_domains in zip(*shares, strict=True))


@pytest.mark.parametrize(("gone", "limit"), [(4, 0.8), (8, 0.7)])
def test_the_excess_loss_is_below_that_of_reap_as_published(bench, gone, limit):
    import tiny_moe

    folder = tiny_moe.root() / "model"
    windows = bench.windows_of(folder, "train", bench.DOMAINS, 256)
    held_out = {name: bench.windows_of(folder, "held_out", (name,), 100) for name in bench.DOMAINS}
    dense = {name: bench.losses.nll((bench.load(folder), bench.AllLoaded()), found) for name, found in held_out.items()}
    ours, published = (
        bench.excess(bench.cut(folder, windows, gone, way)[0], dense, held_out)["mean"]
        for way in (bench.WAYS[-1], bench.WAYS[0])
    )
    assert published > 0
    assert ours < limit * published
