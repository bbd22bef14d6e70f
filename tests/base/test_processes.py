"""What ranks share, what they tell each other, and that none outlives another; whose random numbers are whose."""

import os
import signal
import socket
import sys
import threading
import time

import process
import pytest
import torch

from secateurs.base import watching
from secateurs.base.errors import OutputError, PlanError
from secateurs.base.processes import ALONE, Ranks, joined
from secateurs.base.run_directory import locked
from secateurs.base.seed import seed_of


def test_shares_are_all_of_it_and_nobody_has_another_s():
    shares = [list(Ranks(rank, 3).share(range(8))) for rank in range(3)]
    assert shares == [[0, 3, 6], [1, 4, 7], [2, 5]]
    assert list(Ranks().share(range(4))) == [0, 1, 2, 3]
    for rank, share in enumerate(shares):
        ranks = Ranks(rank, 3)
        assert [ranks.number(i) for i in range(len(share))] == share
        assert [(ranks.owner(item), ranks.local(item)) for item in share] == [(rank, i) for i in range(len(share))]


def _all_of_it(size):
    with joined() as ranks:
        assert (ranks.size, ranks.here) == (size, size)
        mine = [10 * i for i in ranks.share(range(7))]
        assert ranks.merged(mine) == [0, 10, 20, 30, 40, 50, 60]
        assert ranks.gather(ranks.rank) == list(range(size))
        assert ranks.tell(f"rank {ranks.rank}") == "rank 0"
        assert ranks.total(ranks.rank + 0.5) == sum(range(size)) + size / 2
        summed = torch.full((3, 2), 2.0**ranks.rank)
        ranks.sum(summed, to=1)
        assert ranks.rank != 1 or summed.tolist() == [[2.0**size - 1] * 2] * 3
        # as gradients lie that autograd left transposed on one rank alone
        numbers = torch.arange(6.0).view(3, 2)
        lying = numbers.T.contiguous().T if ranks.first else numbers.clone()
        ranks.sum(lying)
        assert lying.tolist() == (size * numbers).tolist()
        told = torch.tensor([1.0, -0.0, float("nan")], dtype=torch.bfloat16) * (ranks.rank == 1)
        ranks.hand_out(told, 1)
        assert told[0] == 1
        assert torch.signbit(told[1])
        assert torch.isnan(told[2])
        with ranks.all_threads():
            assert torch.get_num_threads() == size
        assert torch.get_num_threads() == 1


@pytest.mark.parametrize("size", [2, 3])
def test_what_ranks_tell_each_other(size):
    assert [done.code for done in process.Job(size, _all_of_it, size).join()] == [0] * size


def test_alone_everything_is_one_s_own():
    with joined() as ranks:
        assert ranks is ALONE
        assert ranks.merged([1, 2]) == [1, 2]
        assert ranks.gather("x") == ["x"]
        assert ranks.total(2) == 2.0
        done = []
        ranks.alone(lambda: done.append(1))
        assert done == [1]
    with pytest.raises(PlanError, match="3 processes cannot share 2 windows; start 2 at most"):
        Ranks(0, 3).need(2, "windows")


def _in_turn(folder):
    with joined() as ranks:
        with ranks.leading():
            if ranks.first:
                time.sleep(0.3)
                (folder / "found").write_text("it")
            assert (folder / "found").read_text() == "it"
        ranks.alone(lambda: (folder / "found").unlink())
        assert not (folder / "found").exists()


def test_the_first_rank_leads(tmp_path):
    assert [done.code for done in process.Job(2, _in_turn, tmp_path).join()] == [0, 0]


def _until(what, who, folder):
    with joined() as ranks:
        ranks.wait()
        (folder / str(ranks.rank)).write_text("here")
        if ranks.rank == who:
            time.sleep(0.2)
            if what == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise PlanError("mine alone")
        if ranks.rank == 1 - min(who, 1):
            # in a message that the lost rank never answers
            ranks.total(1.0)
        # in something that takes long
        time.sleep(60)


def _said(function, *arguments):
    from secateurs.base.errors import SecateursError

    try:
        function(*arguments)
    except SecateursError as error:
        sys.exit(f"error: {error}")


@pytest.mark.parametrize("who", [0, 2])
@pytest.mark.parametrize("what", ["killed", "fails"])
def test_no_rank_outlives_another(what, who, tmp_path):
    job = process.Job(3, _said, _until, what, who, tmp_path)
    until = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 3 and time.monotonic() < until:
        time.sleep(0.05)
    began = time.monotonic()
    done = job.join(30)
    # a second where nothing else runs
    assert time.monotonic() - began < 20
    assert done[who].code == (-signal.SIGKILL if what == "killed" else 1)
    assert ("mine alone" in done[who].error) == (what == "fails")
    for rank in {0, 1, 2} - {who}:
        assert done[rank].code == 1
        assert "another process of this run ended before the run did" in done[rank].error
        assert "Traceback" not in done[rank].error


def test_an_end_that_was_announced_is_no_loss(monkeypatch):
    ended = []
    monkeypatch.setattr(watching, "_GRACE", 0.0)
    monkeypatch.setattr(os, "_exit", ended.append)
    for said, want in ((b".", []), (b"", [1])):
        ours, theirs = socket.socketpair()
        theirs.sendall(said)
        theirs.close()
        lost = threading.Event()
        watching._watch(ours, lost, threading.Event())
        assert (ended, lost.is_set()) == (want, bool(want))


def _holds(run, seconds):
    with joined() as ranks, locked(run, ranks):
        (run / f"held-{ranks.rank}").touch()
        time.sleep(seconds)


def test_a_run_begins_once_the_ranks_of_the_one_before_are_gone(tmp_path):
    job = process.Job(2, _holds, tmp_path, 60)
    while not (tmp_path / "held-1").exists():
        time.sleep(0.05)
    with pytest.raises(OutputError, match="another secateurs is at work"), locked(tmp_path):
        pass
    job.processes[0].kill()
    job.processes[0].join()
    began = time.monotonic()
    # the other rank still holds it, and ends
    with locked(tmp_path):
        job.processes[1].join(0.5)
        assert not job.processes[1].is_alive()
    assert time.monotonic() - began < 10
    job.join(5)


def test_a_command_of_one_process_says_so_to_several():
    from secateurs import cli

    done = process.run(cli.main, ["methods"], WORLD_SIZE=2, RANK=0)
    assert done.code == 2
    assert "methods runs in one process, and torchrun started several" in done.error


def test_every_name_and_seed_has_its_own_numbers():
    seeds = [seed_of(seed, name) for seed in (0, 1) for name in ("layers.0", "layers.1")]
    assert len(set(seeds)) == 4
    assert seeds[0] == seed_of(0, "layers.0")
