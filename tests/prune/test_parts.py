"""Which lists of blocks are pruned: encoder, decoder, the text or the vision part."""

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

import secateurs as sc
from secateurs.base.errors import PlanError
from secateurs.model.discover import assume
from secateurs.model.made_up import inputs
from secateurs.model.miniature import small_instance
from secateurs.model.proof import prove

LAYERS = {"encoder": "encoder.block.", "decoder": "decoder.block."}


def t5():
    return small_instance(transformers.T5ForConditionalGeneration, transformers.AutoConfig.for_model("t5"))


def plan(**asked):
    return sc.Plan("model", method="wanda", sparsity=0.5, evaluation=sc.Evaluation(windows=0), **asked)


@pytest.mark.parametrize("part", [None, "encoder", "decoder", "all"])
def test_a_part_is_pruned_and_the_rest_stays_dense(part):
    model = t5()
    dense = {name: p.clone() for name, p in model.named_parameters()}
    report = sc.prune(model, plan(part=part), calibration=inputs(model))
    pruned = {r.name for r in report.layers if r.skipped is None}
    for name, prefix in LAYERS.items():
        here = {r for r in pruned if r.startswith(prefix)}
        assert bool(here) == (part in (None, "all", name))
        for parameter, weight in model.named_parameters():
            if parameter.startswith(prefix) and not here:
                assert torch.equal(weight, dense[parameter])
    left = [w for w in report.warnings if w.startswith("left dense: ")]
    assert left == {"encoder": ["left dense: decoder.block; --part says which lists are pruned"],
                    "decoder": ["left dense: encoder.block; --part says which lists are pruned"]}.get(part, [])  # fmt: skip


def test_a_part_that_is_not_there_is_named():
    with pytest.raises(
        PlanError, match=r"no part 'vision': the model's lists of blocks are encoder\.block, decoder\.block; or"
    ):
        sc.prune(t5(), plan(part="vision"), calibration=inputs(t5()))


def test_a_model_of_text_and_images_is_pruned_in_its_text_part_unless_another_one_is_asked_for():
    def llava():
        return small_instance(transformers.LlavaForConditionalGeneration, transformers.AutoConfig.for_model("llava"))

    def pruned(report):
        return {r.name.split(".layers.")[0] for r in report.layers if r.skipped is None}

    text, seen = inputs(llava(), "text"), inputs(llava(), "images and text")
    language, vision = "model.language_model", "model.vision_tower.encoder"
    for batches in (text, seen):
        assert pruned(sc.prune(llava(), plan(), calibration=batches)) == {language}
    # the same of a model that was only ever seen with images
    model = llava()
    assume(model, prove(model, kind="images and text"))
    assert pruned(sc.prune(model, plan(), calibration=seen)) == {language}
    assert pruned(sc.prune(llava(), plan(part="vision"), calibration=seen)) == {vision}
    assert pruned(sc.prune(llava(), plan(part="all"), calibration=seen)) == {language, vision}
    with pytest.raises(PlanError, match=r"model\.vision_tower\.encoder\.layers is not called on such inputs"):
        sc.prune(llava(), plan(part="vision"), calibration=text)


@pytest.mark.parametrize("model_type", ["t5", "albert"])
def test_folders_of_several_lists_and_of_shared_blocks_are_pruned_and_verified(model_type, tmp_path):
    classes = {"t5": "T5ForConditionalGeneration", "albert": "AlbertForMaskedLM"}
    cls = getattr(transformers, classes[model_type])
    source, words = tmp_path / "dense", tiny.text(tmp_path)
    small_instance(cls, transformers.AutoConfig.for_model(model_type)).save_pretrained(source)
    tiny.tokenizer().save_pretrained(source)
    asked = sc.Plan(
        str(source), method="sparsegpt", sparsity=0.5, calibration=sc.Calibration(str(words), 4, 32),
        evaluation=sc.Evaluation(str(words), 2, 32),
    )  # fmt: skip
    report = sc.prune(source, asked, out=tmp_path / "run")
    assert report.status == "complete"
    assert report.quality["kl"]["value"] > 0
    layers = [r for r in report.layers if r.skipped is None]
    assert len(layers) >= 6
    result = cls.from_pretrained(tmp_path / "run" / "model")
    weights = dict(result.named_parameters())
    for layer in layers:
        assert int((weights[f"{layer.name}.weight"] != 0).sum()) == layer.kept
        assert 2 * layer.kept == layer.shape[0] * layer.shape[1]


def test_a_pruned_head_that_is_stored_twice_is_pruned_in_both_places(tmp_path):
    """I-BERT is walked as a whole, so its head is pruned, which the embeddings share."""
    cls, source = transformers.IBertForMaskedLM, tmp_path / "dense"
    small = small_instance(cls, transformers.AutoConfig.for_model("ibert"))
    small.save_pretrained(source)
    (shard,) = source.glob("*.safetensors")
    tensors = load_file(shard)
    tiny.tokenizer().save_pretrained(source)
    names = "ibert.embeddings.word_embeddings.weight", "lm_head.decoder.weight"
    save_file({**tensors, **{name: small.get_parameter(names[0]).clone() for name in names}}, shard, {"format": "pt"})
    asked = sc.Plan(str(source), method="magnitude", scope="layer", evaluation=sc.Evaluation(windows=0))
    report = sc.prune(source, asked, out=tmp_path / "run")
    (head,) = (r for r in report.layers if r.name == "lm_head.decoder")
    assert 2 * head.kept == head.shape[0] * head.shape[1]
    (shard,) = (tmp_path / "run" / "model").glob("*.safetensors")
    stored = load_file(shard)
    assert torch.equal(*(stored[name] for name in names))
    model = cls.from_pretrained(tmp_path / "run" / "model")
    for name in names:
        assert int((model.get_parameter(name) != 0).sum()) == head.kept


def test_layers_that_are_stored_as_one_tensor_are_pruned_apart_and_verified(tmp_path):
    cls, source = transformers.NomicBertForMaskedLM, tmp_path / "dense"
    small_instance(cls, transformers.AutoConfig.for_model("nomic_bert")).save_pretrained(source)
    tiny.tokenizer().save_pretrained(source)
    asked = sc.Plan(
        str(source), method="magnitude", scope="layer", skip=("*q_proj",), evaluation=sc.Evaluation(windows=0)
    )
    report = sc.prune(source, asked, out=tmp_path / "run")
    model, dense = cls.from_pretrained(tmp_path / "run" / "model"), cls.from_pretrained(source)
    for block in model.nomic_bert.layers:
        kept = [int((getattr(block.self_attn, f"{name}_proj").weight != 0).sum()) for name in "qkv"]
        assert kept == [1024, 512, 512]
    name = "nomic_bert.layers.0.self_attn.q_proj.weight"
    assert torch.equal(model.get_parameter(name), dense.get_parameter(name))
    assert sum(r.skipped is None for r in report.layers) == 6 * len(model.nomic_bert.layers)
