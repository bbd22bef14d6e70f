"""Which rank solves which layer, what their statistics add up to, whose files are whose."""

import process
import torch
from torch import nn

from secateurs.base.processes import ALONE, Ranks, joined
from secateurs.matrix.stats import Stats
from secateurs.model.activations import OnDisk
from secateurs.model.layers import Layer
from secateurs.model.sharing import dealt, summed


def layer(name, outputs, inputs):
    module = nn.Linear(inputs, outputs, bias=False)
    return Layer(name, module, module.weight, "linear")


def test_the_costliest_group_goes_first_to_whoever_has_least_to_do():
    # O I^2 for each layer and I^3 for the group: 2 * 16 + 64, 8 + 8, 3 * 9 + 27, 5 * 16 + 64
    qk, small, middle, down = (
        [layer("q", 1, 4), layer("k", 1, 4)], [layer("small", 2, 2)], [layer("middle", 3, 3)], [layer("down", 5, 4)],
    )  # fmt: skip
    # down 144 to the first, q and k 96 to the second, middle 54 to the second (150), small 16 to the first
    want = {"down": 0, "q": 1, "k": 1, "middle": 1, "small": 0}
    assert dealt([qk, small, middle, down], 2) == want
    assert set(dealt([qk, small, middle, down], 1).values()) == {0}


def _adds_up():
    names = [layer("q", 2, 3), layer("k", 2, 3), layer("o", 2, 3), layer("never", 2, 3)]
    rows = torch.randint(-4, 5, (2, 6, 3), generator=torch.Generator().manual_seed(0)).float()
    with joined() as ranks:
        mine, other = rows[ranks.rank], rows[1 - ranks.rank]

        def of(x, dense=None):
            stats = Stats.zeros(3, True)
            stats.add_(x, dense)
            return stats

        # q and k share theirs on the first rank only; o is called on the second only, beside a dense model
        one = of(mine)
        found = {"q": one, "k": one if ranks.first else of(mine)}
        if not ranks.first:
            found["o"] = of(mine, 2 * mine)
        total, owner = summed(found, names, True, ranks)
        assert set(total) == {"q", "k", "o"}
        assert total["q"] is not total["k"]
        whole = rows.flatten(0, 1)
        want = {"q": whole, "k": whole, "o": rows[1]}
        for name, stats in total.items():
            assert stats.tokens == len(want[name])
            assert torch.equal(stats.sqnorm_I, want[name].square().sum(0))
            if owner[name] == ranks.rank:
                assert torch.equal(stats.gram_II, want[name].T @ want[name])
                drift = want[name].T @ want[name] if name == "o" else None
                assert (stats.drift_II is None) if drift is None else torch.equal(stats.drift_II, drift)
            else:
                assert (stats.gram_II, stats.drift_II) == (None, None)
        # three groups of one cost on two ranks
        assert owner == {"q": 0, "k": 1, "o": 0}
        del other


def test_stats_are_shared_where_every_rank_shares_them():
    assert [done.error[-2000:] for done in process.Job(2, _adds_up).join() if done.code] == []


def test_ranks_drop_their_own_batches(tmp_path):
    first, second, alone = (OnDisk(tmp_path, ranks) for ranks in (Ranks(0, 2), Ranks(1, 2), ALONE))
    for i in range(2):
        first.write(3, i, torch.full((1,), 2.0 * i))
        second.write(3, i, torch.full((1,), 2.0 * i + 1))
    # one process reads what two have written
    assert [float(alone.read(3, i)) for i in range(4)] == [0, 1, 2, 3]
    first.drop(3)
    assert float(second.read(3, 1)) == 3
    second.drop(3)
    assert not any(tmp_path.iterdir())
