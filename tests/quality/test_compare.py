import math

import pytest
import tiny
import torch

from secateurs.base.estimate import Estimate
from secateurs.model import blocks
from secateurs.model.activations import InMemory
from secateurs.model.blocks import AllLoaded
from secateurs.model.checkpoint import Checkpoint
from secateurs.model.walk import stream
from secateurs.quality import compare
from secateurs.quality.compare import Window, measure, summarise
from secateurs.quality.evaluation import quality as quality_of
from secateurs.quality.settings import Evaluation

IDS = torch.randint(0, 256, (5, 20), generator=torch.Generator().manual_seed(0))


def models():
    dense, pruned = tiny.make("llama"), tiny.make("llama")
    with torch.no_grad():
        for name, parameter in pruned.named_parameters():
            if "proj" in name:
                parameter.mul_(parameter.abs() > parameter.abs().median())
    return dense, pruned


@pytest.mark.parametrize("pieces", [1, 7 * tiny.VOCABULARY, 1 << 26])
@pytest.mark.parametrize("chunk", [1, 1000, 1 << 20])
def test_metrics_equal_those_of_whole_logits(chunk, pieces, monkeypatch):
    """However many logits are made, and compared, at a time."""
    monkeypatch.setattr(compare, "_CHUNK", chunk)
    monkeypatch.setattr(blocks, "LOGITS", pieces)
    dense, pruned = models()
    got = measure((dense, AllLoaded()), (pruned, AllLoaded()), IDS)
    for window, ids in zip(got, IDS, strict=True):
        p, q = (m(ids[None]).logits[0, :-1].double().log_softmax(-1) for m in (dense, pruned))
        label = ids[1:, None]
        assert window.tokens == 19
        assert window.nll_dense == pytest.approx(-float(p.gather(1, label).sum()), rel=1e-5)
        assert window.nll == pytest.approx(-float(q.gather(1, label).sum()), rel=1e-5)
        assert window.kl == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-4)
        assert window.agree == int((p.argmax(-1) == q.argmax(-1)).sum())


def test_a_model_against_itself_costs_nothing():
    dense, _ = models()
    quality = summarise(measure((dense, AllLoaded()), (dense, AllLoaded()), IDS))
    assert quality.kl.value == pytest.approx(0, abs=1e-7)
    assert quality.agree.value == 1
    assert quality.ppl_ratio == Estimate(1.0, 1.0, 1.0, 5)


@pytest.mark.parametrize("pieces", [1, 1 << 26])
def test_surprise_is_the_mean_over_all_windows(pieces, monkeypatch):
    monkeypatch.setattr(blocks, "LOGITS", pieces)
    model, store = tiny.make("llama"), InMemory()
    for _ in stream(model, [{"input_ids": IDS}], AllLoaded(), store, keep_last=True):
        pass
    with torch.no_grad():
        rows = model(IDS).logits[:, :-1].reshape(-1, tiny.VOCABULARY)
        want = float(torch.nn.functional.cross_entropy(rows, IDS[:, 1:].reshape(-1)))
    assert compare.surprise(model, AllLoaded(), store.read(3, 0), {"input_ids": IDS}) == pytest.approx(want, rel=1e-5)


def test_the_first_of_equal_words_is_the_top_one():
    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, 0.0, 2.0], [5.0, 5.0, 0.0]])
    other = torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, 2.0], [5.0, 0.0, 0.0]])
    assert compare.compare(torch.tensor([0, 0, 0]), [logits, other]).agree == 2


def test_finished_windows_are_not_measured_again():
    dense, pruned = models()
    whole = measure((dense, AllLoaded()), (pruned, AllLoaded()), IDS)
    marked = [Window(1, 2.0, 3.0, 4.0, 5.0)]
    assert measure((dense, AllLoaded()), (pruned, AllLoaded()), IDS, done=marked) == marked + whole[1:]


def test_the_dense_half_is_kept_and_used_again(tmp_path, monkeypatch):
    dense, pruned = ((m, AllLoaded()) for m in models())
    whole = measure(dense, pruned, IDS)
    # in two groups, as a run that notes its place does
    part = measure(dense, pruned, IDS[:2], ends=tmp_path)
    assert measure(dense, pruned, IDS, done=part, ends=tmp_path) == whole
    assert len(list(tmp_path.iterdir())) == 5
    walked, stream = [], compare.stream
    monkeypatch.setattr(compare, "stream", lambda model, *a, **k: walked.append(model) or stream(model, *a, **k))
    ticks = []
    assert measure(dense, pruned, IDS, ends=tmp_path, tick=lambda: ticks.append(1)) == whole
    assert walked == [pruned[0]]
    assert len(ticks) == 5 * (3 + 3 + 1)
    # what is not all there is computed
    (tmp_path / "00003.safetensors").unlink()
    assert measure(dense, pruned, IDS, ends=tmp_path) == whole
    assert walked[1:] == [dense[0], pruned[0]]


def test_one_model_alone_has_only_its_perplexity():
    dense, _ = models()
    quality = summarise(measure((dense, AllLoaded()), None, IDS))
    assert quality.ppl is None
    assert quality.kl is None
    assert quality.ppl_dense.n == 5


def test_intervals_are_of_windows_and_the_ratio_is_paired():
    # windows differ by e^1, the ratio by nothing
    windows = [Window(10, 10.0 * (1 + i), 10.0 * (1.5 + i), 1.0, 5.0) for i in range(2)]
    quality = summarise(windows)
    assert quality.ppl_dense.value == pytest.approx(math.exp(1.5))
    # one degree of freedom: 12.706 standard errors of half a nat
    assert quality.ppl_dense.low == pytest.approx(math.exp(1.5 - 12.7062 * 0.5), rel=1e-4)
    assert quality.ppl_dense.high == pytest.approx(math.exp(1.5 + 12.7062 * 0.5), rel=1e-4)
    assert quality.ppl_ratio.low == pytest.approx(quality.ppl_ratio.high) == pytest.approx(math.exp(0.5))
    assert quality.kl.value == pytest.approx(0.1)
    assert quality.agree.value == pytest.approx(0.5)


def test_intervals_end_where_what_they_are_of_ends():
    windows = [Window(10, 20.0, 20.0, kl, agree) for kl, agree in ((0.1, 9.5), (8.0, 2.0), (0.2, 9.9))]
    quality = summarise(windows)
    assert quality.kl.low == 0 < quality.kl.high
    assert quality.agree.high == 1 > quality.agree.low


def test_windows_of_another_text_are_not_taken_for_this_one_s(tmp_path, llama, words):
    other, file = tiny.text(tmp_path, seed=5), tmp_path / "windows.json"

    def measured(text, cache=None):
        found, _ = quality_of(Checkpoint(llama), None, Evaluation(str(text), 2, 32), cache=cache)
        return found.as_dict()

    assert measured(words, file) == measured(words)
    assert measured(other, file) == measured(other) != measured(words)
