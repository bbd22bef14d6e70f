"""Processes that share a job: those that torchrun started, or this one alone. They communicate over gloo.

    with joined() as ranks:
        mine = ranks.share(windows)      # every size-th one
        ranks.sum(total)                 # over all ranks, in place
        with ranks.leading(): ...        # the first rank, then the others

Every rank calls the same functions that communicate, in the same order. A rank that ends before the job does ends all others
within seconds (watching.py).
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from secateurs.base.errors import PlanError, RankError
from secateurs.base.watching import ENDED, watched

T = TypeVar("T")
# long, because the first one measures and writes while the others wait; a rank that is gone is noticed otherwise
_PATIENCE = timedelta(hours=24)
# seconds in which the end of another rank shows, once a message to it failed
_NOTICED = 5.0


@dataclass(frozen=True)
class Ranks:
    """This process is number `rank` of `size`; `here` of them are on this machine.

    What is shared is dealt out in turn: item i is rank i % size's, which has it as its item i // size.
    """

    rank: int = 0
    size: int = 1
    here: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """The items that this rank works on."""
        return items[self.rank :: self.size]

    def owner(self, number: int) -> int:
        """The rank that has item `number` of all."""
        return number % self.size

    def number(self, mine: int) -> int:
        """The number among all of one of this rank's items."""
        return self.rank + mine * self.size

    def local(self, number: int) -> int:
        """The number among its owner's of item `number` of all."""
        return number // self.size

    def merged(self, mine: Sequence[T]) -> list[T]:
        """All ranks' items in order, of which each has its share."""
        shares = self.gather(list(mine))
        return [shares[self.owner(i)][self.local(i)] for i in range(sum(map(len, shares)))]

    def gather(self, mine: T) -> list[T]:
        """What every rank has, by rank, on all of them. It is pickled."""
        if self.size == 1:
            return [mine]
        found: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(found, mine)
        return found

    def tell(self, found: T) -> T:
        """What the first rank found, on all of them."""
        if self.size == 1:
            return found
        told: list[Any] = [found if self.first else None]
        torch.distributed.broadcast_object_list(told)
        return found if self.first else told[0]

    def sum(self, tensor: Tensor, to: int | None = None) -> None:
        """Sum a tensor over all ranks, in place; on rank `to` only, and what the others then hold is undefined."""
        if self.size == 1:
            return
        # gloo adds numbers as they lie in memory, which ranks need not have alike
        in_order = tensor.contiguous()
        if to is None:
            torch.distributed.all_reduce(in_order)
        else:
            torch.distributed.reduce(in_order, to)
        if in_order is not tensor:
            tensor.copy_(in_order)

    def hand_out(self, tensor: Tensor, owner: int) -> None:
        """Give all ranks the owner's bits of a contiguous tensor, in place."""
        if self.size > 1:
            torch.distributed.broadcast(tensor.view(-1).view(torch.uint8), owner)

    def total(self, value: float) -> float:
        found = torch.tensor(value, dtype=torch.float64)
        self.sum(found)
        return float(found)

    def wait(self) -> None:
        """Wait until all ranks have arrived here."""
        if self.size > 1:
            torch.distributed.barrier()

    @contextmanager
    def leading(self) -> Iterator[None]:
        """A context through which the first rank goes, and after it the others: they find what it has written."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def alone(self, do: Callable[[], None]) -> None:
        """Let the first rank do something once all ranks are here; they go on when it is done."""
        self.wait()
        if self.first:
            do()
        self.wait()

    @contextmanager
    def all_threads(self) -> Iterator[None]:
        """A context in which this rank computes with the threads of all ranks of its machine, because those wait for it."""
        own = torch.get_num_threads()
        if self.here > 1:
            torch.set_num_threads(own * self.here)
        try:
            yield
        finally:
            if self.here > 1:
                torch.set_num_threads(own)

    def need(self, count: int, what: str) -> None:
        """Raise PlanError if there are fewer of something than ranks that share it."""
        if count < self.size:
            raise PlanError(f"{self.size} processes cannot share {count} {what}; start {count} at most, or give more")


ALONE = Ranks()


def is_alone() -> bool:
    """False in a process of a torchrun of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) == 1


def is_first() -> bool:
    """True for the first process of a torchrun, which prints, and for a process alone."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the ranks of this job, as torchrun's environment variables say; alone without them. Raises RankError where another
    rank ended.
    """
    if is_alone():
        yield ALONE
        return
    torch.distributed.init_process_group("gloo", timeout=_PATIENCE)
    ranks = Ranks(
        torch.distributed.get_rank(), torch.distributed.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    )
    try:
        with watched(ranks.rank, ranks.size, ranks.tell) as lost:
            try:
                yield ranks
                ranks.wait()
            except RuntimeError as error:
                # what gloo says of a connection that broke is raised before or after the watch sees why
                if lost.wait(_NOTICED) and "gloo" in str(error).lower():
                    raise RankError(ENDED) from None
                raise
    finally:
        torch.distributed.destroy_process_group()
