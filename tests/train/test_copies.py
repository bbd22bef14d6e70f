"""Other copies of a model whose zeros are held: averages, deep copies, checkpoints, wrapped models."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import secateurs as sc
from secateurs.base.errors import PlanError
from secateurs.train.copies import found_in, plain_name


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.randn(4, 8)).square().mean().backward()
    optimizer.step()


def sparsity(model):
    weights = [p for p in model.parameters() if p.dim() > 1]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def averaged(make, follow):
    """A model that is pruned to 75% while an average of its weights goes on; and the average, and what held it."""
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    pruner = make(model, optimizer)
    if follow:
        pruner.held.follow(average)
    for _ in range(8):
        step(model, optimizer)
        average.update_parameters(model)
    return model, average, pruner.held


def gradual(model, optimizer):
    return sc.train.gradual(model, optimizer, sc.train.cubic(0.75, begin=1, end=6, every=1))


def test_an_average_that_follows_has_the_model_s_zeros_and_is_an_average():
    model, average, held = averaged(gradual, follow=True)
    assert sparsity(model) == sparsity(average) == 0.75
    for name, mask in held.masks.items():
        assert torch.equal(average.get_parameter(f"module.{name}") != 0, mask)
    assert not torch.equal(average.module[0].weight, model[0].weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        held.release(average, copy.deepcopy(model))


def test_release_names_a_copy_that_is_less_sparse_and_one_call_mends_it():
    model, average, held = averaged(gradual, follow=False)
    assert (sparsity(model), sparsity(average)) == (0.75, 0)
    with pytest.warns(
        UserWarning, match=r"AveragedModel is not as sparse as the model: 2 of 2 matrices .*, first 0.weight; call"
    ):
        held.release(model, average)
    before = average.module[0].weight.clone()
    held.apply_to(average)
    assert torch.equal(average.module[0].weight, before * held.masks["0.weight"])
    assert sparsity(average) == 0.75


def test_connections_that_move_leave_the_average_too():
    def moving(model, optimizer):
        return sc.train.dynamic(model, optimizer, 0.75, until=100, every=1)

    model, average, held = averaged(moving, follow=True)
    assert sparsity(average) >= sparsity(model) - 1e-9
    assert not average.module[0].weight[~held.masks["0.weight"]].any()
    assert average.module[0].weight.any()


class Wrapped(nn.Module):
    def __init__(self, model, name):
        super().__init__()
        self.add_module(name, model)


def peft_names(model):
    """LoRA of peft on both layers."""
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["0", "2"]))


COPIES = {
    "deep copy": copy.deepcopy,
    "DDP's names": lambda model: Wrapped(model, "module"),
    "average of DDP's": lambda model: AveragedModel(Wrapped(model, "module")),
    "compiled": torch.compile,
    "FSDP's names": lambda model: Wrapped(model, "_fsdp_wrapped_module"),
    "PEFT": peft_names,
    "state dict": lambda model: model.state_dict(),
    "state dict of DDP's": lambda model: Wrapped(model, "module").state_dict(),
}


@pytest.mark.parametrize("kind", COPIES)
@pytest.mark.parametrize("held_inside", [False, True])
def test_zeros_go_to_the_same_weights_whatever_is_around_them(kind, held_inside):
    model = net()
    masks = {name: torch.rand(p.shape) < 0.5 for name, p in model.named_parameters() if p.dim() > 1}
    around = torch.compile(Wrapped(model, "module")) if held_inside else model
    before = "_orig_mod.module." if held_inside else ""
    of_names = {before + name: mask for name, mask in masks.items()}
    held = sc.train.hold(around, torch.optim.SGD(model.parameters(), 0.1), of_names)
    other = COPIES[kind](net())
    held.apply_to(other)
    state = {plain_name(name): value for name, value in getattr(other, "state_dict", lambda: other)().items()}
    for name, mask in masks.items():
        assert torch.equal(state[name] != 0, mask)
    assert state["0.bias"].all()


def test_names_of_wrappers_are_no_part_of_a_name():
    assert plain_name("module._orig_mod.model.layers.0.mlp.weight") == "model.layers.0.mlp.weight"
    assert plain_name("module.base_model.model.model.layers.0.base_layer.weight") == "model.layers.0.weight"
    assert plain_name("layers.0._checkpoint_wrapped_module.weight") == "layers.0.weight"


def test_a_copy_that_is_another_model_is_refused_and_left_alone():
    model = net()
    mask = torch.ones(16, 8, dtype=torch.bool)
    mask[0] = False
    held = sc.train.hold(model, torch.optim.SGD(model.parameters(), 0.1), {"0.weight": mask, "2.weight": mask.T})
    other = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    with pytest.raises(PlanError, match=r"2.weight of Sequential is \(4, 16\) and its mask \(8, 16\)"):
        held.apply_to(other)
    assert other[0].weight.all()
    with pytest.raises(PlanError, match="2.weight go to the same name in another copy, and the state dict has none"):
        held.apply_to({"0.weight": torch.ones(16, 8), "epoch": 3})
    with pytest.raises(PlanError, match="has several: a.module.weight, a.weight"):
        found_in({"a.module.weight": mask, "a.weight": mask}, {"module.a.weight": (16, 8)})
    assert found_in({"a.module.weight": mask, "a.weight": mask}, {"a.weight": (16, 8)}) == {"a.weight": mask}


def test_finish_makes_an_average_plain_too_and_names_one_that_is_dense():
    model = net()
    dense = copy.deepcopy(model)
    sc.train.sr_ste(model)
    average = AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        step(model, optimizer)
        average.update_parameters(model)
    with pytest.warns(
        UserWarning, match="Sequential is not as sparse as the model: 2 of 2 matrices have fewer zeros, first 0.weight"
    ):
        sc.train.finish(model, average, dense)
    assert sparsity(model) == sparsity(average) == 0.5
    assert not torch.equal(average.module[0].weight, model[0].weight)
    assert set(average.module.state_dict()) == set(dense.state_dict())


def test_hold_leaves_added_matrices_of_lora_alone():
    import peft

    model = net()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight[:, ::2] = 0
    masks = {name: p != 0 for name, p in model.named_parameters() if p.dim() > 1}
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"]))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], 0.1)
    with pytest.raises(
        PlanError,
        match=r"no zeros that training could change.*frozen matrices have zeros \(2, first .*0.base_layer.weight\)",
    ):
        sc.train.hold(adapted, optimizer)
    for _ in range(2):
        step(adapted, optimizer)
    merged = adapted.merge_and_unload()
    assert sparsity(merged) < 0.45
    held = sc.train.hold(merged, torch.optim.SGD(merged.parameters(), 0.1), masks)
    assert sparsity(merged) == 0.5
    assert held.sparsity == 0.5


def test_an_average_of_lora_is_merged_with_its_own_products():
    model = net()
    with torch.no_grad():
        model[0].weight[:, ::2] = 0
    low = sc.train.lora(model, rank=2)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD(low.parameters(), 0.5)
    for _ in range(3):
        step(model, optimizer)
        average.update_parameters(model)
    x = torch.randn(4, 8)
    wanted = model(x), average(x)
    low.merge(average)
    for found, want in zip((model(x), average(x)), wanted, strict=True):
        assert torch.allclose(found, want, atol=1e-6)
    assert not torch.allclose(*wanted)
    for merged in model, average.module:
        assert type(merged[0]) is nn.Linear
        assert not merged[0].weight[:, ::2].any()


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("how", ["StochasticWeightAveraging", "EMAWeightAveraging"])
def test_lightning_s_averages_follow(how, where, tmp_path):
    import lightning
    from lightning.pytorch import callbacks

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net()

        def training_step(self, batch, index):
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.05)

    averaging = (
        callbacks.StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)
        if how == "StochasticWeightAveraging"
        else callbacks.EMAWeightAveraging(decay=0.9)
    )
    ours = sc.train.lightning_callback(begin=gradual)
    module = Module()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(32, 8)), batch_size=8)
    trainer = lightning.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, default_root_dir=tmp_path,
        callbacks=[ours, averaging] if where == "before" else [averaging, ours], enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader)
    assert ours.pruners[0].step == 12
    assert sparsity(module) == 0.75
    for name, mask in ours.held[0].masks.items():
        assert torch.equal(
            averaging._average_model.get_parameter(
                f"module.{name}" if isinstance(averaging._average_model, AveragedModel) else name
            )
            != 0,
            mask,
        )


def test_trainer_s_model_and_the_averages_that_it_is_given_are_pruned_alike(tmp_path):
    import tiny
    import transformers

    model = tiny.make("llama")
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))

    class Average(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            average.update_parameters(model)

    rows = [{"input_ids": torch.arange(8) + i, "labels": torch.arange(8) + i} for i in range(32)]
    ours = sc.train.trainer_callback(begin=gradual, copies=[average])
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=8, per_device_train_batch_size=4, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[Average(), ours]).train()
    assert ours.pruner.step == 8
    assert ours.held.sparsity == pytest.approx(0.75, abs=0.001)
    for name, mask in ours.held.masks.items():
        assert torch.equal(model.get_parameter(name) != 0, mask)
        assert not average.get_parameter(f"module.{name}")[~mask].any()
