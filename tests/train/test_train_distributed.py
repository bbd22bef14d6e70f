"""Zeros that stay, grow and move on two ranks, by gloo on this machine's CPUs."""

import faulthandler
import gc

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

import secateurs as sc


def _net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    for p in model.parameters():
        if p.dim() > 1:
            p.data.mul_(torch.rand(p.shape) > 0.5)
    return model


PRUNERS = {
    "gradual": lambda m, o: sc.train.gradual(m, o, sc.train.cubic(0.8, 1, 3, 0.6, every=1), scope="global", score="taylor"),
    "rigl": lambda m, o: sc.train.dynamic(m, o, 0.7, until=9, every=2),
}  # fmt: skip


def _train(model, rank, ranks, steps=4, masks=None, pruner=sc.train.hold):
    optimizer = torch.optim.AdamW(model.parameters(), 0.05, weight_decay=0.1)
    pruner(model, optimizer, *([masks] if masks else []))
    generator = torch.Generator().manual_seed(1)
    part = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
    for i in range(steps):
        x, y = torch.randn(8, 8, generator=generator), torch.randint(0, 4, (8,), generator=generator)

        def closure(x=x[part], y=y[part]):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()

        if i % 2:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    moments = [optimizer.state[p]["exp_avg"] for p in model.parameters() if p.dim() > 1]
    assert all(bool((_full(m) == 0).any()) for m in moments)


def _full(p):
    return (p.full_tensor() if hasattr(p, "full_tensor") else p).detach()


def _trained(kind, rank):
    model = _net()
    # whole masks, as someone has them who made them before sharding
    masks = {n: p.detach() != 0 for n, p in model.named_parameters() if p.dim() > 1} if "masks" in kind else None
    if "ddp" in kind:
        wrapped = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        wrapped = fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    _train(wrapped, rank, 2, masks=masks, pruner=PRUNERS.get(kind.rpartition(" ")[2], sc.train.hold))
    return [_full(p) for p in wrapped.parameters()]


def _rank(rank, meeting, kind, file):
    faulthandler.dump_traceback_later(300, exit=True)
    torch.set_num_threads(1)
    # a rank that knocks at a free port before the other listens may be given that port and meet itself
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    try:
        found = [_trained(one, rank) for one in kind]
        if rank == 0:
            torch.save(found, file)
        # a reducer that outlives its process group joins gloo's threads with the GIL held, and they may be waiting for it
        gc.collect()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "kind", [("ddp", "ddp gradual", "ddp rigl"), ("fsdp2", "fsdp2 masks"), ("fsdp2 gradual", "fsdp2 rigl")]
)
def test_two_ranks_keep_zeros_and_learn_what_one_does(kind, tmp_path):
    mp.spawn(_rank, (str(tmp_path / "meeting"), kind, str(tmp_path / "found.pt")), nprocs=2)
    for one, got in zip(kind, torch.load(tmp_path / "found.pt"), strict=True):
        alone = _net()
        zeros = [p.detach() == 0 for p in alone.parameters()]
        pruner = PRUNERS.get(one.rpartition(" ")[2], sc.train.hold)
        _train(alone, 0, 1, pruner=pruner)
        for p, expected, zero in zip(got, alone.parameters(), zeros, strict=True):
            assert torch.equal(p == 0, expected == 0)
            assert torch.equal(p == 0, zero) == (pruner is sc.train.hold or p.dim() == 1)
            torch.testing.assert_close(p, expected.detach(), rtol=1e-4, atol=1e-5)
