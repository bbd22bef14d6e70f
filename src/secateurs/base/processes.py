"""Processes that share a job: those that torchrun started, or this one alone. They communicate over gloo."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
# long, because the first one measures and writes while the others wait
_PATIENCE = timedelta(hours=24)


@dataclass(frozen=True)
class Ranks:
    """This process is number `rank` of `size`."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """The items that this rank works on: every size-th one."""
        return items[self.rank :: self.size]

    def sum(self, tensor: Tensor) -> None:
        """Sum a tensor over all ranks, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor)

    def total(self, value: float) -> float:
        found = torch.tensor(value, dtype=torch.float64)
        self.sum(found)
        return float(found)

    def wait(self) -> None:
        """Wait until all ranks have arrived here."""
        if self.size > 1:
            torch.distributed.barrier()


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the ranks of this job, as torchrun's environment variables say; alone without them."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks()
        return
    torch.distributed.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Ranks(torch.distributed.get_rank(), size)
    finally:
        torch.distributed.destroy_process_group()
