"""Quality beside the dense model's outputs: values worked out by hand, and walks against whole models."""

import math
from types import SimpleNamespace as Output

import others
import pytest
import torch

from secateurs.base.errors import CalibrationError
from secateurs.model.blocks import AllLoaded
from secateurs.quality import outputs
from secateurs.quality.kinds import Kind
from secateurs.quality.outputs import POOLINGS, READERS, Subject, embedding, summarise


def subject(predicts, **more):
    return Subject(Kind("Net", predicts=predicts), **more)


def logs(*chances):
    return torch.tensor(chances).log()


# of 80% and 20% to 40% and 60%, and of equal ones
KL = 0.8 * math.log(2) + 0.2 * math.log(1 / 3)


def test_classes_by_hand():
    dense = Output(logits=logs([0.8, 0.2], [0.5, 0.5], [0.1, 0.9]))
    pruned = Output(logits=logs([0.4, 0.6], [0.5, 0.5], [0.1, 0.9]))
    found = summarise(READERS["classes"]([dense, pruned], {}, subject("classes")), subject("classes"))
    assert found.kl.value == pytest.approx(KL / 3, rel=1e-5)
    assert found.agree.value == pytest.approx(2 / 3)
    # Clopper and Pearson's interval of 2 of 3
    assert (found.agree.low, found.agree.high) == pytest.approx((0.094, 0.992), abs=0.01)
    assert (found.windows, found.tokens, found.ppl_dense, found.ppl_ratio) == (3, 3, None, None)


def test_tokens_are_counted_without_padding():
    dense = Output(logits=logs([[0.8, 0.2], [0.5, 0.5], [0.8, 0.2]], [[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]))
    pruned = Output(logits=logs([[0.4, 0.6], [0.5, 0.5], [0.01, 0.99]], [[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]))
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    found = READERS["classes"]([dense, pruned], {"attention_mask": mask}, subject("classes"))
    assert [(w.tokens, w.agree) for w in found] == [(2, 1), (3, 3)]
    assert found[0].kl == pytest.approx(KL, rel=1e-5)
    assert summarise(found, subject("classes")).kl.value == pytest.approx(KL / 5, rel=1e-5)


def test_a_pixel_has_classes_and_a_question_a_start_and_an_end():
    # two classes of a 1 x 2 image: pixel 0 changes, pixel 1 does not
    dense, pruned = (
        Output(logits=logs(*row).T[None, :, None]) for row in ([[0.8, 0.2], [0.3, 0.7]], [[0.4, 0.6], [0.3, 0.7]])
    )
    (pixels,) = READERS["classes"]([dense, pruned], {}, subject("classes"))
    assert (pixels.tokens, pixels.agree) == (2, 1)
    assert pixels.kl == pytest.approx(KL, rel=1e-5)
    one, same = logs([0.8, 0.2]), logs([0.3, 0.7])
    pair = [Output(start_logits=one, end_logits=same), Output(start_logits=logs([0.4, 0.6]), end_logits=same)]
    (span,) = READERS["classes"](pair, {}, subject("classes"))
    assert (span.tokens, span.agree) == (2, 1)
    assert span.kl == pytest.approx(KL, rel=1e-5)


# hidden states of three positions, the last of them padding
HIDDEN, MASK = torch.tensor([[[1.0, 0.0], [3.0, 4.0], [9.0, 0.0]]]), torch.tensor([[1, 1, 0]])
POOLED = {
    "cls": (1.0, 0.0), "mean": (2.0, 2.0), "mean_sqrt_len": (2.0, 2.0), "max": (3.0, 4.0), "lasttoken": (3.0, 4.0),
    "weightedmean": (7.0, 8.0),
}  # fmt: skip


@pytest.mark.parametrize("way", POOLINGS)
def test_pooling_by_hand(way):
    want = torch.tensor([POOLED[way]], dtype=torch.float64)
    got = embedding(Output(last_hidden_state=HIDDEN), MASK, subject("embeddings", pooling=(way,)))
    assert torch.allclose(got, want / want.norm())


def test_an_embedding_is_what_the_folder_says_then_what_the_model_pools_then_a_mean():
    output = Output(last_hidden_state=HIDDEN, pooler_output=torch.tensor([[0.0, 5.0]]))
    plain, root = subject("embeddings"), 0.5**0.5
    assert embedding(output, MASK, subject("embeddings", pooling=("mean",))).tolist()[0] == pytest.approx([root, root])
    assert embedding(output, MASK, plain).tolist() == [[0, 1]]
    assert embedding(Output(last_hidden_state=HIDDEN), MASK, plain).tolist()[0] == pytest.approx([root, root])
    both = Output(
        image_embeds=torch.tensor([[2.0, 0.0]]), text_embeds=torch.tensor([[0.0, 9.0]]), logits_per_image=None
    )
    assert embedding(both, None, plain).tolist()[0] == pytest.approx([root, 0, 0, root])
    # a map of features [1, 1, 1, 2], of a convolutional net
    assert embedding(Output(last_hidden_state=torch.tensor([[[[2.0, 4.0]]]])), None, plain).tolist() == [[1]]
    with pytest.raises(CalibrationError, match="Net gives neither hidden states nor an embedding"):
        embedding(Output(last_hidden_state=None), None, plain)


def test_cosines_and_neighbours_by_hand():
    def at(*degrees):
        return [
            torch.tensor([math.cos(math.radians(d)), math.sin(math.radians(d))], dtype=torch.float64) for d in degrees
        ]

    # the second one turns by 18 degrees, and is then nearer to the third than to the first
    found = summarise(list(zip(at(0, 10, 50, 60), at(0, 28, 50, 60), strict=True)), subject("embeddings"))
    assert found.cosine.value == pytest.approx((3 + math.cos(math.radians(18))) / 4)
    assert found.cosine.high == 1
    assert found.neighbours.value == 3 / 4
    assert found.neighbours.n == 4
    # two are each other's neighbours whatever happened
    assert summarise(list(zip(at(0, 10), at(0, 80), strict=True)), subject("embeddings")).neighbours is None


def test_the_error_of_an_output_s_tensors_counts_alike_however_large_they_are():
    kind = subject("outputs")

    def of(a, b):
        return Output(a=torch.tensor([a]), b=torch.tensor([[b]]), hidden_states=torch.ones(3), n=torch.tensor(3))

    def read(dense, pruned):
        return READERS["outputs"]([vars(of(*dense)), vars(of(*pruned))], {}, kind)

    # of a: 4 off of 16 and of 48, 8 off; of b nothing
    found = read((4.0, 1000.0), (6.0, 1000.0)) + read((48.0**0.5, 1000.0), (48.0**0.5 - 12.0**0.5, 1000.0))
    # (4 + 12) / 2 over (16 + 48) / 2 is 1/4, half of it for b
    assert summarise(found, kind).error.value == pytest.approx((1 / 8) ** 0.5, rel=1e-5)
    with pytest.raises(CalibrationError, match="Net gives no numbers"):
        READERS["outputs"]([{"n": torch.tensor(3)}] * 2, {}, kind)


def pruned_of(name, **changes):
    dense, pruned = others.make(name, **changes), others.make(name, **changes)
    with torch.no_grad():
        for parameter in pruned.parameters():
            if parameter.dim() == 2:
                parameter.mul_(parameter.abs() > parameter.abs().median())
    return dense, pruned


def test_a_walked_image_classifier_equals_the_whole_one():
    dense, pruned = pruned_of("vit")
    batches = [{"pixel_values": torch.randn(n, 3, 16, 16)} for n in (3, 2)]
    kind = Subject(Kind("ViTForImageClassification", ("images",), "classes"))
    got = outputs.measure((dense, AllLoaded()), (pruned, AllLoaded()), batches, kind)
    images = torch.cat([batch["pixel_values"] for batch in batches])
    p, q = (m(images).logits.double().log_softmax(-1) for m in (dense, pruned))
    assert [w.kl for w in got] == pytest.approx((p.exp() * (p - q)).sum(-1).tolist(), rel=1e-4)
    assert [w.agree for w in got] == (p.argmax(-1) == q.argmax(-1)).tolist()


@pytest.mark.parametrize("together", [1, 2, 64])
def test_an_encoder_decoder_s_next_tokens_are_those_that_its_decoder_reads(together, monkeypatch):
    monkeypatch.setattr(outputs, "_TOGETHER", together)
    dense, pruned = pruned_of("bart")
    batches = [
        {"input_ids": torch.randint(0, 250, (2, 11)), "decoder_input_ids": torch.randint(0, 250, (2, 7))} for _ in "ab"
    ]
    kind, ticks = Subject(Kind("BartForConditionalGeneration", pairs=True)), []
    got = outputs.measure((dense, AllLoaded()), (pruned, AllLoaded()), batches, kind, lambda: ticks.append(1))
    for n, window in enumerate(got):
        batch = {name: ids[n % 2][None] for name, ids in batches[n // 2].items()}
        p, q = (m(**batch).logits[0, :-1].double().log_softmax(-1) for m in (dense, pruned))
        label = batch["decoder_input_ids"][0, 1:, None]
        assert window.tokens == 6
        assert window.nll_dense == pytest.approx(-float(p.gather(1, label).sum()), rel=1e-5)
        assert window.nll == pytest.approx(-float(q.gather(1, label).sum()), rel=1e-5)
        assert window.kl == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-4)
    assert len(got) == 4
    assert summarise(got, kind).ppl_ratio.n == 4


def test_a_head_that_reads_several_blocks_is_run_with_all_of_them():
    dense, pruned = pruned_of("dpt")
    batches = [{"pixel_values": torch.randn(1, 3, 16, 16)} for _ in range(2)]
    kind = Subject(Kind("DPTForDepthEstimation", ("images",), "outputs"))
    got = summarise(outputs.measure((dense, AllLoaded()), (pruned, AllLoaded()), batches, kind), kind)
    maps = [torch.cat([m(**b).predicted_depth for b in batches]).double() for m in (dense, pruned)]
    assert got.error.value == pytest.approx(float((maps[1] - maps[0]).norm() / maps[0].norm()), rel=1e-4)


def test_places_of_images_are_no_text():
    logits = torch.randn(1, 5, 9)
    ids = torch.tensor([[8, 8, 8, 1, 2]])
    (window,) = READERS["next token"]([Output(logits=logits)], {"input_ids": ids}, subject("next token", pictured=8))
    want = torch.nn.functional.cross_entropy(logits[0, 2:4], ids[0, 3:], reduction="sum")
    assert (window.tokens, window.nll_dense) == (2, pytest.approx(float(want), rel=1e-5))


@pytest.mark.parametrize("predicts", ["classes", "next token"])
def test_outputs_of_another_kind_are_refused(predicts):
    batch = {"input_ids": torch.zeros(1, 4, dtype=torch.long)}
    with pytest.raises(CalibrationError, match="gives no logits"):
        READERS[predicts]([Output(last_hidden_state=HIDDEN)], batch, subject(predicts))
    if predicts == "next token":
        with pytest.raises(CalibrationError, match="not one row for each token"):
            READERS[predicts]([Output(logits=torch.randn(1, 9))], batch, subject(predicts))
