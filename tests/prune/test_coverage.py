"""Every parameter of two or more dimensions is pruned or has a record with the reason."""

import pytest
import tiny
import torch
import transformers
from plans import asked
from torch import nn
from torch.nn.utils import parametrizations

import secateurs as sc
from secateurs.base.errors import PlanError
from secateurs.prune.record import failure


def names_of(report, tensor):
    """The records of a parameter: of a layer, of one of its parts, or of a parameter that is none."""
    layer = tensor.removesuffix(".weight")
    return [r for r in report.layers if r.name in (tensor, layer) or r.name.rpartition(".")[0] == tensor]


def checked(model, report):
    """Check the records of a model that is pruned: zeros where a record says so, a reason where it does not."""
    assert len({r.name for r in report.layers}) == len(report.layers)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            assert not names_of(report, name), name
            continue
        records = names_of(report, name)
        assert records, name
        assert all(r.skipped is None or (r.skipped_by and r.skipped) for r in records)
        assert sum(r.kept for r in records) == int((parameter != 0).sum()), name
        assert sum(r.numel for r in records) == parameter.numel(), name
        assert all(r.numel - r.kept >= int(r.sparsity * r.numel) > 0 for r in records if r.skipped is None), name


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(16, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.depthwise = nn.Conv1d(8, 8, 3, padding=1, groups=8)
        self.back = nn.ConvTranspose1d(8, 8, 1)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 2)
        self.memory = nn.LSTM(8, 8, batch_first=True)
        self.normed = parametrizations.weight_norm(nn.Linear(8, 8))
        self.both = nn.Bilinear(8, 8, 8)
        self.own = nn.Parameter(torch.randn(8, 8))
        self.head = nn.Linear(8, 4)

    def forward(self, ids):
        x = self.table(ids).transpose(1, 2)
        x = self.back(self.depthwise(self.conv(x))).transpose(1, 2)
        x = self.normed(self.memory(self.encoder(x))[0])
        return self.head(self.both(x, x) @ self.own)


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_a_module_s_matrices_all_have_a_record(method):
    net = Everything().eval()
    batches = [{"ids": torch.randint(0, 16, (4, 6))} for _ in range(2)]
    report = sc.prune(net, asked(sc.Plan, method=method, sparsity=0.5), calibration=batches)
    checked(net, report)
    pruned = [r for r in report.layers if r.skipped is None]
    assert [r.name for r in pruned if "encoder" not in r.name] == ["conv", "head"]
    assert len(pruned) == 2 + 2 * 6
    assert {r.name: r.skipped_by for r in report.layers if r.skipped} == {
        "depthwise": "shape", **dict.fromkeys((
            "table", "back", "memory.weight_ih_l0", "memory.weight_hh_l0", "normed.parametrizations.weight.original0",
            "normed.parametrizations.weight.original1", "both", "own",
        ), "kind"),
    }  # fmt: skip
    assert report.totals["layers_skipped_by_kind"] == 8
    if method == "sparsegpt":
        assert all(r.tokens == 48 for r in pruned)


def test_a_weight_of_two_names_is_pruned_once_and_says_so():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    net = Tied()
    report = sc.prune(net, asked(sc.Plan, method="wanda"), calibration=[{"x": torch.randn(64, 8)} for _ in range(2)])
    (record,) = report.layers
    assert (record.name, record.tokens, record.note) == ("a", 256, "the weight of b too, pruned once for all its uses")
    assert net.b.weight is net.a.weight
    assert record.kept == int((net.a.weight != 0).sum()) == 32


@pytest.mark.parametrize("effort", [{"method": "sparsegpt"}, {"effort": "best"}, {"method": "sparsegpt", "blend": 0.5}])
def test_blocks_that_share_a_weight_are_pruned_once(effort):
    model = tiny.make("llama")
    model.model.layers[2] = model.model.layers[0]
    plan = asked(sc.Plan, sparsity=0.5, **effort)
    report = sc.prune(model, plan, calibration=torch.randint(0, 250, (8, 32)))
    checked(model, report)
    assert "the model is walked as a whole: LlamaForCausalLM's blocks share weights" in report.warnings
    assert any(w.startswith("left out: ") for w in report.warnings) == (len(effort) > 1 or "effort" in effort)
    tokens = {r.name: r.tokens for r in report.layers}
    assert tokens["model.layers.0.mlp.down_proj"] == 512
    assert tokens["model.layers.1.mlp.down_proj"] == 256
    assert tokens["lm_head"] == tokens["model.embed_tokens"] == 0
    assert len(tokens) == 2 * 7 + 2


def test_inference_mode_changes_nothing():
    models, ids = [tiny.make("llama") for _ in range(2)], torch.randint(0, 250, (8, 32))
    plan = asked(sc.Plan, sparsity=0.5)
    sc.prune(models[0], plan, calibration=ids)
    with torch.inference_mode():
        sc.prune(models[1], plan, calibration=ids.clone())
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)


def test_a_module_without_a_matrix_of_ours_is_refused_with_the_reason():
    with pytest.raises(PlanError, match=r"weights to prune; weight_ih_l0: a recurrent layer"):
        sc.prune(nn.LSTM(4, 4), asked(sc.Plan, method="magnitude"))


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gpt2", "bert"])
def test_a_folder_s_matrices_all_have_a_record(model_type, tmp_path):
    source = tiny.save(tmp_path / "dense", model_type)
    plan = asked(sc.Plan, method="magnitude", sparsity=0.5, eval_windows=0)
    report = sc.prune(source, plan, out=tmp_path / "run")
    config = transformers.AutoConfig.from_pretrained(source)
    model = getattr(transformers, config.architectures[0]).from_pretrained(tmp_path / "run" / "model")
    checked(model, report)
    outside = [r for r in report.layers if r.skipped_by == "kind"]
    assert outside
    assert all(r.kept == r.numel for r in outside)
    # nobody asked for them, so they are no failure
    assert failure(report) is None
    assert sc.verify(tmp_path / "run").status == "complete"
