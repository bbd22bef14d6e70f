"""Models that predict no next token are shrunk by how far their outputs are from the dense model's."""

import json

import others
import pytest
import tiny
import torch
from test_shrink import plan

from secateurs.base.errors import PlanError
from secateurs.model.batches import batched
from secateurs.model.blocks import AllLoaded
from secateurs.model.miniature import small_instance
from secateurs.quality.kinds import kind_of_class
from secateurs.quality.outputs import embedding, subject_of
from secateurs.report.page import write
from secateurs.shrink import losses
from secateurs.shrink.cuts import cuts_of
from secateurs.shrink.run import shrink

IDS = torch.arange(48).reshape(3, 16) % tiny.VOCABULARY


def subject(model):
    return subject_of(kind_of_class(type(model), model.config))


def live(model):
    return model, AllLoaded()


def base(**changes):
    """A BERT that gives embeddings."""
    return tiny.random("BertModel", "bert", {**others.OTHERS["bert"][1], "num_labels": 3, **changes}).eval()


def test_an_encoder_s_loss_is_the_distance_of_its_classes_or_embeddings():
    classes, other = others.make("bert"), others.make("bert")
    with torch.no_grad():
        other.classifier.weight.mul_(0.5)
        rows, lost = (m(input_ids=IDS).logits.double().log_softmax(-1) for m in (classes, other))
    kl = (rows.exp() * (rows - lost)).sum(-1).mean()
    assert losses.above(live(classes), IDS, subject(classes))(live(other)) == pytest.approx(float(kl), rel=1e-4)
    model, less = base(), base()
    with torch.no_grad():
        less.encoder.layer[2].output.dense.weight.zero_()
        a, b = (embedding(m(input_ids=IDS), None, subject(model)) for m in (model, less))
    cosine = (a * b).sum(-1).mean()
    assert losses.above(live(model), IDS, subject(model))(live(less)) == pytest.approx(1 - float(cosine), rel=1e-4)
    assert losses.above(live(model), IDS, subject(model))(live(model)) == pytest.approx(0, abs=1e-9)


def test_the_block_that_changes_an_encoder_s_embeddings_least_goes_first():
    model = base()
    with torch.no_grad():
        # a block that hands on what it gets, but for its norms
        for name in ("attention.output.dense", "output.dense"):
            for parameter in model.encoder.layer[1].get_submodule(name).parameters():
                parameter.zero_()
    order, after = losses.blocks(model, IDS, 2, lambda: None, subject=subject(model))
    assert order[0] == 1
    assert 0 <= after[0] < 0.01 < after[1]
    # as by the whole model without that block
    from torch import nn

    with torch.no_grad():
        dense = embedding(model(input_ids=IDS), None, subject(model))
    model.encoder.layer = nn.ModuleList([model.encoder.layer[0], model.encoder.layer[2]])
    with torch.no_grad():
        left = embedding(model(input_ids=IDS), None, subject(model))
    assert after[0] == pytest.approx(1 - float((dense * left).sum(-1).mean()), abs=1e-9)


@pytest.mark.parametrize("architecture", ["BertModel", "BertForMaskedLM", "BertForSequenceClassification"])
def test_an_encoder_is_shrunk_and_has_no_seconds_a_token(architecture, tmp_path, words):
    from transformers import AutoModel, BertForMaskedLM, BertForSequenceClassification

    cls = {"BertForMaskedLM": BertForMaskedLM, "BertForSequenceClassification": BertForSequenceClassification}
    model = tiny.random(architecture, "bert", {**others.OTHERS["bert"][1], "num_labels": 3})
    model.save_pretrained(tmp_path / "dense")
    tiny.tokenizer().save_pretrained(tmp_path / "dense")
    report = shrink(plan(tmp_path / "dense", words, "params=0.85x", units=("mlp", "layers")), tmp_path / "run")
    assert report["left"]["parameters"] < 0.85 * report["dense"]["parameters"]
    assert report["quality"]["cosine" if architecture == "BertModel" else "kl"]
    assert (report["latency"]["new"], set(report["latency"]["ratio"])) == (0, {"prefill"})
    cls.get(architecture, AutoModel).from_pretrained(tmp_path / "run" / "model")
    page = write([tmp_path / "run"]).read_text()
    assert "Seconds of a prompt" in page
    assert "Seconds a token" not in page
    assert f"`{architecture}.from_pretrained`" in (tmp_path / "run" / "model" / "README.md").read_text()


def test_what_is_not_read_as_text_is_refused(tmp_path, words):
    for name, what in (("vit", "images"), ("bart", "both sides of an encoder-decoder")):
        others.save(tmp_path / name, name)
        with pytest.raises(PlanError, match=f"reads {what}; shrink takes models of text alone"):
            shrink(plan(tmp_path / name, words), tmp_path / "run")
    others.save(tmp_path / "bert", "bert")
    with pytest.raises(PlanError, match="criterion taylor asks for the gradient of the next token's loss"):
        shrink(plan(tmp_path / "bert", words, criterion="taylor", units=("mlp",)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_of_a_model_with_a_vision_tower_the_text_s_fields_are_changed(tmp_path, words):
    """Both parts have as many heads, as wide MLPs and as many blocks."""
    import transformers

    others.save_vision_language(tmp_path / "dense")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "dense")
    vision, text = model.config.vision_config, model.config.text_config
    assert (vision.intermediate_size, vision.num_hidden_layers) == (text.intermediate_size, text.num_hidden_layers)
    cuts = cuts_of(model)
    for kind in ("mlp", "heads", "layers"):
        names = [name for names in cuts._way(kind).fields.values() for name in names]
        assert all(name.startswith("text_config.") for name in names), names
    shrink(plan(tmp_path / "dense", words, "params=0.9x", units=("mlp",), eval_windows=0), tmp_path / "run")
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["vision_config"]["intermediate_size"] == 64 > config["text_config"]["intermediate_size"]
    small = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "run" / "model")
    inputs = batched(IDS)[0]
    assert small(**inputs).logits.isfinite().all()


def test_blocks_whose_place_counts_beside_images_stay():
    """Qwen3-VL adds an image's features to the outputs of its first blocks."""
    import transformers

    made = transformers.Qwen3VLForConditionalGeneration
    model = small_instance(made, transformers.Qwen3VLConfig())
    assert cuts_of(model).refuses("layers") == (
        "blocks cannot go: the model does more between its blocks than handing on, by their places"
    )
    assert cuts_of(model).refuses("mlp") is None


@pytest.mark.parametrize(
    ("name", "new"), [("MambaForCausalLM", 4), ("BlenderbotForCausalLM", 0), ("BigBirdForCausalLM", 0)]
)
def test_a_class_with_another_cache_is_timed_as_it_decodes(name, new, tmp_path, words):
    """A recurrence's state; a cache that does not run from its decoder alone; modules that are swapped while they run."""
    import transformers

    made = getattr(transformers, name)
    model = small_instance(made, made.config_class())
    model.save_pretrained(tmp_path / "dense")
    tiny.tokenizer().save_pretrained(tmp_path / "dense")
    options = {"units": ("layers" if new else "mlp",), "eval_windows": 0}
    report = shrink(plan(tmp_path / "dense", words, "params=0.95x", **options), tmp_path / "run")
    assert report["latency"]["new"] == new
    assert any("tokens after a prompt were not timed" in line for line in report["warnings"]) == (new == 0)
    made.from_pretrained(tmp_path / "run" / "model")


def test_a_decoder_that_gives_embeddings_decodes_nothing(tmp_path, words):
    import transformers

    transformers.LlamaModel(tiny.make("llama").config).save_pretrained(tmp_path / "dense")
    tiny.tokenizer().save_pretrained(tmp_path / "dense")
    report = shrink(plan(tmp_path / "dense", words, "params=0.9x", units=("mlp",), eval_windows=0), tmp_path / "run")
    assert (report["latency"]["new"], report["warnings"]) == (0, [])
