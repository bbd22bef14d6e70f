"""Sentence-transformers folders: where the transformer lies, how embeddings are pooled, and what a pruned folder holds."""

import json
import shutil

import pytest
import tiny
import torch
from plans import asked

import secateurs as sc
from secateurs.base.errors import CalibrationError, CheckpointError
from secateurs.model.checkpoint import Checkpoint
from secateurs.model.sentences import sentences_of

FAST = {"samples": 4, "eval_windows": 4, "method": "wanda"}


def write(file, data):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(data))


def sentence_folder(folder, inside="", pooling=None, more=()):
    """A tiny BERT with modules.json; inside: the folder of the transformer in it."""
    place = tiny.save(folder / inside, "bert base")
    write(place / "sentence_bert_config.json", {"max_seq_length": 16})
    kinds = [(inside, "Transformer"), ("1_Pooling", "Pooling"), *more]
    write(folder / "modules.json", [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"} for i, (path, kind) in enumerate(kinds)
    ])  # fmt: skip
    write(
        folder / "1_Pooling" / "config.json",
        pooling or {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True},
    )
    write(folder / "config_sentence_transformers.json", {"similarity_fn_name": "cosine"})
    return folder


@pytest.mark.parametrize("inside", ["", "0_Transformer"])
def test_such_a_folder_prunes_to_such_a_folder(inside, tmp_path, words):
    dense = sentence_folder(tmp_path / "dense", inside, more=(("2_Dense", "Dense"),))
    write(dense / "2_Dense" / "config.json", {"in_features": 32})
    (dense / "2_Dense" / "model.safetensors").write_bytes(b"weights of its own")
    report = sc.prune(dense, asked(sc.Plan, calibration=str(words), eval_text=str(words), **FAST), out=tmp_path / "run")
    model = tmp_path / "run" / "model"
    modules = json.loads((model / "modules.json").read_text())
    assert [(m["path"], m["type"].rpartition(".")[2]) for m in modules] == [
        ("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense")
    ]  # fmt: skip
    for file in (
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
        "config_sentence_transformers.json",
    ):
        assert (model / file).read_bytes() == (dense / file).read_bytes()
    assert json.loads((model / "sentence_bert_config.json").read_text()) == {"max_seq_length": 16}
    # as long as sentence-transformers would read
    assert report.calibration["seqlen"] == report.evaluation["seqlen"] == 16
    assert any("before the modules Dense of" in warning for warning in report.warnings)
    again = sentences_of(model)
    assert (again.pooling, again.length, again.transformer) == (("mean",), 16, model)
    assert sc.verify(tmp_path / "run").status == "complete"

    # the cosine is that of pooled hidden states of whole models
    from transformers import BertModel

    from secateurs.quality import texts

    windows = texts.load(str(words), tiny.tokenizer(), 4, 16, None, "held-out", bare=True).windows
    with torch.no_grad():
        a, b = (BertModel.from_pretrained(f)(windows).last_hidden_state.mean(1) for f in (dense / inside, model))
    want = torch.nn.functional.cosine_similarity(a, b).mean()
    assert report.quality["cosine"]["value"] == pytest.approx(float(want), rel=1e-5)


@pytest.mark.parametrize(
    ("config", "ways"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, ("cls",)),
        ({"pooling_mode_mean_sqrt_len_tokens": True, "pooling_mode_max_tokens": True}, ("mean_sqrt_len", "max")),
        ({"pooling_mode_lasttoken": True, "word_embedding_dimension": 1}, ("lasttoken",)),
        ({"pooling_mode": "mean"}, ("mean",)),
        ({"pooling_mode": ["cls", "max"]}, ("cls", "max")),
        ({}, ()),
    ],
)
def test_pooling_is_read_as_versions_write_it(config, ways, tmp_path):
    folder = sentence_folder(tmp_path, pooling={"embedding_dimension": 32, **config})
    assert sentences_of(folder).pooling == ways


def test_a_way_of_pooling_that_is_not_known_is_refused_before_the_run(tmp_path, words):
    folder = sentence_folder(tmp_path / "dense", pooling={"pooling_mode": "attention"})
    with pytest.raises(
        CalibrationError, match="pools embeddings by attention, which is not known here; known: cls, mean"
    ):
        sc.prune(folder, asked(sc.Plan, calibration=str(words), **FAST), out=tmp_path / "run")


def test_what_is_no_such_folder(tmp_path):
    assert Checkpoint(tiny.save(tmp_path / "plain", "bert base")).sentences is None
    folder = sentence_folder(tmp_path / "a")
    shutil.rmtree(folder / "1_Pooling")
    with pytest.raises(CheckpointError, match=r"modules\.json or a file that it names cannot be read"):
        sentences_of(folder)
    write(folder / "modules.json", [{"path": "", "type": "sentence_transformers.models.WordEmbeddings"}])
    with pytest.raises(CheckpointError, match="names no transformer, so there is nothing to prune"):
        sentences_of(folder)
