"""What ranks share, and whose random numbers are whose."""

from secateurs.base.processes import Ranks
from secateurs.base.seed import seed_of


def test_shares_are_all_of_it_and_nobody_has_another_s():
    shares = [list(Ranks(rank, 3).share(range(8))) for rank in range(3)]
    assert shares == [[0, 3, 6], [1, 4, 7], [2, 5]]
    assert list(Ranks().share(range(4))) == [0, 1, 2, 3]


def test_every_name_and_seed_has_its_own_numbers():
    seeds = [seed_of(seed, name) for seed in (0, 1) for name in ("layers.0", "layers.1")]
    assert len(set(seeds)) == 4
    assert seeds[0] == seed_of(0, "layers.0")
