"""tools/tiny_moe.py: each domain is read, some of each is held out, and the folder loads and says how its experts share the domains."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture(scope="module")
def tiny_moe():
    sys.path.insert(0, str(TOOLS))
    import tiny_moe

    yield tiny_moe
    sys.path.remove(str(TOOLS))


@pytest.fixture
def plan(tiny_moe):
    return tiny_moe.Plan(
        vocabulary=280, width=16, blocks=2, heads=2, kv_heads=1, mlp=8, window=16, batch=2, epochs=0.2, seconds=1e9, warmup=2,
        every=50, experts=4,
    )  # fmt: skip


@pytest.fixture
def sources(tmp_path):
    """A folder with the texts that the tool reads, and one with Python files."""
    data, code = tmp_path / "data", tmp_path / "code"
    data.mkdir()
    code.mkdir()
    passages = [f"Passage {i} of a story, in which {i * i} things happen." for i in range(95)]
    (data / "lambada_openai_test.jsonl").write_text("".join(json.dumps({"text": p}) + "\n" for p in passages))
    (data / "tinystories_30KB.txt").write_text("once upon a time there was a fox")
    articles = [
        f" = Article {i} = \n\n Of it {'much ' * i}is known .\n\n = = Life = = \n\n It lived .\n\n" for i in range(12)
    ]
    (data / "wikitext-2-raw.test.txt").write_text(" \n" + "".join(articles))
    for i in range(12):
        (code / f"module{i}.py").write_text(f"def function{i}(x):\n    return x + {i}\n")
    (code / "long.py").write_text("# " + "x" * 60_000)
    return data, code


def test_documents_of_each_domain(tiny_moe, sources):
    found = tiny_moe.documents(*sources, seed=0)
    assert {name: len(texts) for name, texts in found.items()} == {"stories": 4, "code": 12, "encyclopedia": 12}
    assert found["stories"][1].startswith("Passage 40 of")
    assert "Passage 80" in found["stories"][2]
    # a heading within an article begins none, and a long file is left out
    assert all(text.startswith(f" = Article {i} = ") for i, text in enumerate(found["encyclopedia"]))
    assert sorted(found["code"]) == sorted(f"def function{i}(x):\n    return x + {i}\n" for i in range(12))
    assert found["code"] != tiny_moe.documents(*sources, seed=1)["code"]


def test_every_tenth_document_of_a_domain_is_held_out(tiny_moe):
    train, held_out = tiny_moe.parted({"a": list(range(12)), "b": [7]})
    assert (held_out, train) == ({"a": [0, 10], "b": [7]}, {"a": [1, 2, 3, 4, 5, 6, 7, 8, 9, 11], "b": []})


def test_what_an_expert_says_of_the_domain_by_hand(tiny_moe):
    assert tiny_moe.information(torch.tensor([[1.0, 0.0], [0.0, 1.0]])) == pytest.approx(1)
    assert tiny_moe.information(torch.tensor([[0.3, 0.7], [0.3, 0.7]])) == pytest.approx(0)
    # joint 1/2, 0, 1/4, 1/4 of 3/4 and 1/4: (1/2) log2(4/3) + (1/4) log2(2/3) + (1/4) log2(2)
    assert tiny_moe.information(torch.tensor([[1.0, 0.0], [0.5, 0.5]])) == pytest.approx(0.311278, abs=1e-6)


def test_the_loss_is_that_of_tokens_and_of_balance(tiny_moe, plan):
    import small_lm

    model, windows = tiny_moe.make(plan).eval(), torch.randint(280, (2, 17))
    plain, all_of_it = small_lm.loss_of(model, windows), tiny_moe.loss_of(model, windows)
    logits = model(input_ids=windows[:, :-1], output_router_logits=True).router_logits
    mean = sum(float(tiny_moe.balance(x.detach(), 2)) for x in logits) / 2
    assert float((all_of_it - plain).detach()) == pytest.approx(0.05 * mean, rel=1e-3)


def test_balance_by_hand(tiny_moe):
    # probabilities 3/4 and 1/4, and the other way round: even
    three = 1.0986123
    assert float(tiny_moe.balance(torch.tensor([[three, 0.0], [0.0, three]]), 1)) == pytest.approx(1)
    # all choose the first: 2 * 3/4
    assert float(tiny_moe.balance(torch.tensor([[three, 0.0], [three, 0.0]]), 1)) == pytest.approx(1.5)
    # two of two are always even
    assert float(tiny_moe.balance(torch.tensor([[9.0, 0.0]]), 2)) == pytest.approx(1)


def test_shares_count_every_choice(tiny_moe, plan):
    model = tiny_moe.make(plan).eval()
    # the second block sends all tokens to the same two
    model.model.layers[1].mlp.gate.weight.data.zero_()
    found = tiny_moe.shares(model, torch.randint(280, (9, 17)))
    assert found.shape == (2, 4)
    assert found.sum(1).tolist() == pytest.approx([1, 1])
    assert sorted(found[1].tolist()) == pytest.approx([0, 0, 0.5, 0.5])


def test_the_folder_loads_and_its_recipe_says_what_it_is(tiny_moe, plan, sources, tmp_path, monkeypatch):
    import small_lm
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("SECATEURS_CACHE", str(tmp_path / "cache"))
    folder = tiny_moe.fetch(plan, *sources)
    recipe = json.loads((folder.parent / "recipe.json").read_text())
    assert recipe["plan"] == dataclasses.asdict(plan)
    assert recipe["documents"]["code"] == {"train": 10, "held_out": 2}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert (model.config.num_experts, model.config.num_experts_per_tok, model.dtype) == (4, 2, torch.bfloat16)
    assert recipe["parameters"] == sum(p.numel() for p in model.parameters())
    for name in ("stories", "code", "encyclopedia"):
        ids = torch.tensor(tokenizer((folder.parent / f"held_out-{name}.txt").read_text()).input_ids)
        loss = small_lm.evaluate(model.float().eval(), small_lm.windows_of(ids, 16))
        assert recipe["held_out_loss_by_domain"][name] == pytest.approx(loss, rel=1e-5)
        assert [sum(shares) for shares in recipe["shares"][name]] == pytest.approx([1, 1])
    said = tiny_moe.shown(recipe)
    assert said.startswith("block 0: an expert says 0.")
    assert len(said.splitlines()) == 2 * 4
    assert "train-code.txt" in {f.name for f in folder.parent.iterdir()}


def test_without_the_text_it_says_so(tiny_moe, plan, tmp_path, monkeypatch):
    monkeypatch.setenv("SECATEURS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(SystemExit, match="absent is absent"):
        tiny_moe.fetch(plan, tmp_path / "absent")
