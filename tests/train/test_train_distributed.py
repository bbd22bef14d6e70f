"""Zeros that stay, grow and move on two ranks, by gloo on this machine's CPUs."""

import copy
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


def _holds_zeros_of_one_rank():
    """Rank 0 has all zeros of layer 0; rank 1 those of layer 1, and layer 2's only weights."""
    from torch.distributed import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    with torch.no_grad():
        model[0].weight[1, 2] = model[1].weight[6, 3] = 0
        model[2].weight[:4] = 0
    wholes = [layer.weight.detach().clone() for layer in model]
    # an average that is sharded otherwise: by inputs
    average = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model, mesh=mesh)
    fully_shard(average, mesh=mesh, shard_placement_fn=lambda p: Shard(p.dim() - 1))
    held = sc.train.hold(model, torch.optim.SGD(model.parameters(), 0.1))
    assert list(held.masks) == ["0.weight", "1.weight", "2.weight"]
    with torch.no_grad():
        average[0].weight.fill_(1.0)
    with pytest.warns(UserWarning, match="1 of 3 matrices .* first 0.weight"):
        held.release(average)
    held.apply_to(average)
    assert torch.equal(_full(average[0].weight), (wholes[0] != 0).float())
    for layer, before in zip(average[1:], wholes[1:], strict=True):
        assert torch.equal(_full(layer.weight), before)


def _one_of_two(rank, meeting):
    faulthandler.dump_traceback_later(60, exit=True)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    try:
        _holds_zeros_of_one_rank()
    finally:
        torch.distributed.destroy_process_group()


def test_ranks_hold_the_same_matrices_whichever_has_the_zeros(tmp_path):
    mp.spawn(_one_of_two, (str(tmp_path / "meeting"),), nprocs=2)


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
