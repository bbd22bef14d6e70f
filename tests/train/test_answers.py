"""recover --train-on assistant: of conversations only what the assistant wrote is learned."""

import json
import shutil

import pytest
import tiny
import torch
from plans import asked

from secateurs.base.errors import CalibrationError, PlanError
from secateurs.train import RecoverPlan, recover
from secateurs.train.objective import Objective, Teacher

TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


@pytest.mark.parametrize(
    "weights", [{"kl": 0.5, "temperature": 2.0}, {"kl": 0.0, "labels": 3.0}, {"kl": 0.0, "hidden": 1.5}]
)
@pytest.mark.parametrize("marked", [[3, 4, 9], [1], list(range(1, 12))])
def test_the_loss_and_its_gradient_are_those_before_answers_alone(weights, marked):
    torch.manual_seed(0)
    model, dense = tiny.make("llama"), tiny.make("llama")
    for parameter in dense.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
        parameter.requires_grad_(False)
    ids = torch.randint(0, 256, (2, 12))
    answers = torch.zeros(2, 12, dtype=torch.bool)
    answers[1, marked] = True
    plan = RecoverPlan("x", train_on="assistant", **weights)
    objective = Objective(plan, model, Teacher(dense, None, None), [{"input_ids": ids}], [answers])
    parameters = list(model.parameters())

    found, want = (m(input_ids=ids[1:], output_hidden_states=True) for m in (model, dense))
    loss = torch.zeros(())
    for place in marked:
        before = place - 1
        p, q = ((o.logits[0, before] / plan.temperature).log_softmax(-1) for o in (found, want))
        loss = loss + plan.kl * plan.temperature**2 * (q.exp() * (q - p)).sum() / len(marked)
        loss = loss - (plan.labels or 0) * found.logits[0, before].log_softmax(-1)[ids[1, place]] / len(marked)
    at = [place - 1 for place in marked]
    for h, d in zip(found.hidden_states[1:], want.hidden_states[1:], strict=True):
        loss = loss + plan.hidden * (h[0, at] - d[0, at]).square().sum() / d[0, at].square().sum() / 3
    assert objective.loss((0, 1)) == pytest.approx(loss.item(), rel=1e-4)
    wanted = torch.autograd.grad(loss, parameters, allow_unused=True)
    for got, right in zip(objective.gradients((0, 1), parameters), wanted, strict=True):
        assert (got is None) == (right is None)
        if right is not None:
            torch.testing.assert_close(got, right, rtol=1e-3, atol=1e-6)


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    """A run directory of a tiny Llama with a chat template."""
    import secateurs as sc
    from secateurs.prune.plan import Plan

    folder = tmp_path_factory.mktemp("speaker")
    tiny.save(folder / "dense")
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "dense")
    sc.prune(folder / "dense", asked(Plan, method="magnitude", sparsity=0.6, eval_windows=0), out=folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    """Conversations: a long question and a short answer each; and one without an answer, longer than a window."""
    file = tmp_path_factory.mktemp("talks") / "talks.jsonl"
    talk = [{"role": "user", "content": "What is it? " * 3}, {"role": "assistant", "content": "It is this."}]
    alone = [{"role": "user", "content": "Nothing. " * 30}]
    file.write_text("".join(json.dumps({"messages": m}) + "\n" for m in [talk] * 20 + [alone]))
    return file


def trained(speaker, talks, **options):
    options = {"samples": 40, "seqlen": 32, "steps": 8, "batch": 2, "eval_windows": 0, **options}
    return asked(RecoverPlan, str(speaker), calibration=str(talks), **options)


def test_training_on_answers_learns_answers(speaker, talks, tmp_path):
    report = recover(trained(speaker, talks, train_on="assistant", kl=0.0, labels=1.0), tmp_path / "answers")
    text = report["calibration"]
    # the answer and the token that ends it
    assert 0 < text["answer_tokens"] <= 20 * 12
    # every window but those of the question without an answer
    assert report["training"]["windows"] == text["windows"] < 40
    assert report["training"]["after"] < report["training"]["before"]
    assert report["plan"]["train_on"] == "assistant"
    everything = recover(trained(speaker, talks, kl=0.0, labels=1.0), tmp_path / "all")
    assert "answer_tokens" not in everything["calibration"]
    assert everything["training"]["before"] != report["training"]["before"]


def test_answers_are_asked_for_where_there_are_some(speaker, talks, words, tmp_path):
    with pytest.raises(PlanError, match="unknown train-on 'asistant'; write all, assistant; did you mean 'assistant'"):
        trained(speaker, talks, train_on="asistant")
    with pytest.raises(CalibrationError, match=r"text-0\.txt holds no conversations"):
        recover(trained(speaker, words, train_on="assistant"), tmp_path / "run")
    with pytest.raises(CalibrationError, match="a model's own samples are no conversations"):
        recover(trained(speaker, "self", train_on="assistant"), tmp_path / "run")
    silent = tmp_path / "silent.jsonl"
    silent.write_text(json.dumps({"messages": [{"role": "user", "content": "Hello? " * 50}]}))
    with pytest.raises(PlanError, match=r"has no window of 32 tokens to train on, and one is held out"):
        recover(trained(speaker, silent, train_on="assistant"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_calibration_and_evaluation_read_conversations_too(speaker, talks, tmp_path):
    import secateurs as sc
    from secateurs.prune.plan import Plan

    dense = shutil.copytree(speaker.parent / "dense", tmp_path / "dense")
    plan = asked(
        Plan, method="wanda", calibration=str(talks), samples=4, seqlen=32, eval_text=f"{talks}:messages", eval_windows=2,
        eval_seqlen=32,
    )  # fmt: skip
    report = sc.prune(dense, plan, out=tmp_path / "run")
    assert report.calibration["source"] == "talks.jsonl"
    assert report.evaluation["source"] == "talks.jsonl:messages"
    assert report.quality["ppl_dense"]
