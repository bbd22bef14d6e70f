"""What models are called with: text between special tokens and on both sides, images, recordings; what is refused, and how."""

import dataclasses
import shutil
from types import SimpleNamespace

import numpy as np
import others
import pytest
import tiny
import torch
from plans import asked
from safetensors.torch import load_file
from scipy.io import wavfile

import secateurs as sc
from secateurs.base.errors import CalibrationError, PlanError
from secateurs.model.checkpoint import Checkpoint
from secateurs.prune import run as prune_run
from secateurs.quality import compare, evaluation, inputs, media, outputs
from secateurs.quality.inputs import Inputs
from secateurs.quality.kinds import kind_of, kind_of_class
from secateurs.quality.settings import Calibration, Evaluation


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{name: model folder} of others.OTHERS, made when first asked for; and 'images', 'audio', 'text'."""
    root = tmp_path_factory.mktemp("others")
    makers = {"images": others.images, "audio": others.recordings, "text": tiny.text}

    class Folders(dict):
        def __missing__(self, name):
            self[name] = makers[name](root / name) if name in makers else others.save(root / f"m {name}", name)
            return self[name]

    return Folders()


def read(folder, source, **settings):
    checkpoint = Checkpoint(folder)
    return inputs.read(Calibration(str(source), **settings), checkpoint, checkpoint.skeleton())


def load(folder, source, count, part, seqlen=None):
    checkpoint = Checkpoint(folder)
    return inputs.load(str(source), count, seqlen, checkpoint, checkpoint.skeleton(), kind_of(checkpoint), part)


# ---------------------------------------------------------------------------------------------------------------- kinds


@pytest.mark.parametrize(
    ("name", "reads", "predicts", "pairs", "prompted"),
    [
        ("ViTForImageClassification", ("images",), "classes", False, False),
        ("ConvNextModel", ("images",), "embeddings", False, False),
        ("DetrForObjectDetection", ("images",), "outputs", False, False),
        ("BertForMaskedLM", ("text",), "classes", False, False),
        ("BertModel", ("text",), "embeddings", False, False),
        ("T5EncoderModel", ("text",), "embeddings", False, False),
        ("T5ForConditionalGeneration", ("text",), "next token", True, False),
        ("MarianMTModel", ("text",), "next token", True, False),
        ("BartModel", ("text",), "embeddings", True, False),
        # it makes what its decoder reads of what its encoder reads
        ("BartForSequenceClassification", ("text",), "classes", False, False),
        ("WhisperForConditionalGeneration", ("audio",), "next token", True, False),
        ("Wav2Vec2ForCTC", ("audio",), "classes", False, False),
        ("VisionEncoderDecoderModel", ("images",), "next token", True, False),
        ("CLIPModel", ("images",), "embeddings", False, True),
        ("CLIPVisionModel", ("images",), "embeddings", False, False),
        ("LlavaForConditionalGeneration", ("text", "images"), "next token", False, True),
        ("Qwen2VLForConditionalGeneration", ("text", "images"), "next token", False, True),
    ],
)
def test_a_class_says_what_it_reads_and_what_it_predicts(name, reads, predicts, pairs, prompted):
    import transformers

    kind = kind_of_class(getattr(transformers, name), SimpleNamespace())
    assert (kind.reads, kind.predicts, kind.pairs, kind.prompted) == (reads, predicts, pairs, prompted)
    assert kind.causal == (name in ("LlavaForConditionalGeneration", "Qwen2VLForConditionalGeneration"))


@pytest.mark.parametrize(("settings", "predicts"), [({"num_labels": 1}, "outputs"), ({"num_labels": 2}, "classes"),
    ({"num_labels": 4, "problem_type": "multi_label_classification"}, "outputs")])  # fmt: skip
def test_a_score_and_labels_that_hold_together_are_no_distribution(settings, predicts):
    import transformers

    assert kind_of_class(transformers.BertForSequenceClassification, SimpleNamespace(**settings)).predicts == predicts


# ----------------------------------------------------------------------------------------------------------------- text


def bracketed():
    """tiny's tokenizer that puts a text between <bos> and <eos>."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 256), ("<eos>", 257)]
    )
    return tokenizer


def test_an_encoder_reads_text_between_its_special_tokens(tmp_path, folders):
    model = shutil.copytree(folders["bert"], tmp_path / "model")
    bracketed().save_pretrained(model)
    found = read(model, folders["text"], samples=5, seqlen=32)
    text = folders["text"].read_bytes()
    assert len(found.rows) == 5
    for row in found.rows:
        first, *body, last = row["input_ids"][0].tolist()
        assert (first, last, len(body)) == (256, 257, 30)
        assert tiny.tokenizer().decode(body).encode() in text
    assert found.facts["special_tokens"] == ["<bos>", "<eos>"]
    assert (found.facts["windows"], found.facts["tokens"], found.facts["seqlen"]) == (5, 160, 32)


def test_a_decoder_reads_what_follows_the_encoder_s_window(tmp_path, folders):
    model = shutil.copytree(folders["bart"], tmp_path / "model")
    bracketed().save_pretrained(model)
    found = read(model, folders["text"], samples=3, seqlen=20)
    text = folders["text"].read_text()
    for row in found.rows:
        encoder, decoder = (row[name][0].tolist() for name in ("input_ids", "decoder_input_ids"))
        # labels are <bos> 18 tokens <eos>; their <bos> is the start token as well, and is read once
        assert (encoder[0], encoder[-1], decoder[0], len(encoder), len(decoder)) == (256, 257, 256, 20, 19)
        assert tiny.tokenizer().decode(encoder[1:-1] + decoder[1:]) in text
    assert "18 tokens that follow" in found.facts["decoder"]
    assert found.facts["tokens"] == 3 * 39


def test_a_decoder_s_labels_are_shifted_by_its_start_token():
    assert inputs.shifted(torch.tensor([[5, 6, 7]]), 0).tolist() == [[0, 5, 6]]
    assert inputs.shifted(torch.tensor([[0, 5, 6]]), 0).tolist() == [[0, 5]]
    with pytest.raises(CalibrationError, match="names no decoder_start_token_id"):
        inputs.start_of(SimpleNamespace())
    assert inputs.start_of(SimpleNamespace(decoder=SimpleNamespace(bos_token_id=4))) == 4


# -------------------------------------------------------------------------------------------------------------- batches


def rows(*shapes):
    return [{"pixel_values": torch.full(shape, float(i))} for i, shape in enumerate(shapes)]


def test_inputs_of_one_shape_run_together(monkeypatch):
    monkeypatch.setattr(inputs, "_ROWS_PER_BATCH", 3)
    found = Inputs(rows(*[(1, 2)] * 4, (1, 3), (1, 2)), 6, "images", {})
    assert [len(b["pixel_values"]) for b in found.batches()] == [3, 1, 1, 1]
    assert torch.cat([b["pixel_values"][:, 0] for b in found.batches()]).tolist() == [0, 1, 2, 3, 4, 5]
    assert [len(b["pixel_values"]) for b in found.batches(alone=True)] == [1] * 6
    monkeypatch.setattr(inputs, "_NUMBERS_PER_BATCH", 5)
    assert [len(b["pixel_values"]) for b in found.batches()] == [2, 2, 1, 1]


def test_stored_inputs_are_read_back(tmp_path):
    two = [{"input_features": torch.randn(1, 3, 4), "decoder_input_ids": torch.tensor([[i, 2]])} for i in range(12)]
    Inputs(two, 12, "audio", {}).write(tmp_path / "a")
    back = inputs.read_rows(tmp_path / "a")
    assert [list(row) for row in back] == [["input_features", "decoder_input_ids"]] * 12
    assert all(torch.equal(a[name], b[name]) for a, b in zip(two, back, strict=True) for name in a)
    windows = torch.arange(6).reshape(2, 3)
    Inputs(inputs.rows_of(windows), 2, "text", {}).write(tmp_path / "b")
    assert torch.equal(load_file(tmp_path / "b")["windows"], windows)
    assert torch.equal(Inputs(inputs.read_rows(tmp_path / "b"), 2, "text", {}).windows, windows)


# --------------------------------------------------------------------------------------------------------------- images


def test_no_image_is_in_both_parts_of_a_folder(folders):
    calibration = read(folders["vit"], folders["images"], samples=99)
    held_out = load(folders["vit"], folders["images"], 99, "held-out")
    everything = load(folders["vit"], folders["images"], 99, "all")
    keys = [{row["pixel_values"].sum().item() for row in found.rows} for found in (calibration, held_out, everything)]
    assert [len(k) for k in keys] == [8, 4, 12]
    assert not keys[0] & keys[1]
    assert keys[0] | keys[1] == keys[2]
    assert calibration.facts["images"] == 8
    assert "calibration part, 8 images" in calibration.facts["source"]
    assert calibration.warnings("calibration") == [
        f"calibration: {calibration.facts['source']} has 8 images, 99 were asked for"
    ]


def test_the_seed_draws_the_images(folders):
    first, again, other = (read(folders["vit"], folders["images"], samples=4, seed=seed) for seed in (0, 0, 1))
    assert first.facts == again.facts
    assert first.facts["sha256"] != other.facts["sha256"]
    assert first.facts["images"] == 4


def test_images_are_what_the_folder_s_processor_makes_of_them(folders):
    from PIL import Image
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    (file,) = folders["images"].rglob("03.png")
    (row,) = load(folders["vit"], file, 1, "all").rows
    want = ViTImageProcessorPil.from_pretrained(folders["vit"])(images=[Image.open(file)], return_tensors="pt")
    assert torch.equal(row["pixel_values"], want["pixel_values"])
    assert media.image(file, SimpleNamespace(num_channels=1)).mode == "L"


def test_a_file_that_cannot_be_read_is_named_and_counted(tmp_path, folders):
    pictures = shutil.copytree(folders["images"], tmp_path / "pictures")
    (pictures / "a" / "02.png").write_bytes(b"no image")
    whole = (pictures / "b" / "03.png").read_bytes()
    (pictures / "b" / "03.png").write_bytes(whole[: len(whole) // 2])
    (pictures / ".hidden").mkdir()
    (pictures / ".hidden" / "99.png").write_bytes(b"")
    found = load(folders["vit"], pictures, 12, "all")
    assert (found.facts["images"], found.facts["left_out"]) == (10, 2)
    assert {sentence[:22] for sentence in found.unread} == {"02.png cannot be read:", "03.png cannot be read:"}
    assert f"of {found.facts['source']} 2 files were left out, first 0" in found.warnings("evaluation")[1]
    for file in pictures.rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(CalibrationError, match=r"none of 12 images of .* can be read; first .*\.png cannot be read"):
        load(folders["vit"], pictures, 12, "all")


# ----------------------------------------------------------------------------------------------------------- recordings


def test_samples_of_a_recording_by_hand(tmp_path):
    def samples(data, own=8, rate=8):
        wavfile.write(tmp_path / "a.wav", own, np.array(data))
        return media.samples(tmp_path / "a.wav", rate).tolist()

    assert samples(np.array([-32768, 16384, 0], dtype=np.int16)) == [-1, 0.5, 0]
    assert samples(np.array([0, 128, 192], dtype=np.uint8)) == [-1, 0, 0.5]
    assert samples(np.array([0.25, -0.5], dtype=np.float32)) == [0.25, -0.5]
    # two channels
    assert samples(np.array([[0.5, 0.0], [1.0, -0.5]], dtype=np.float32)) == [0.25, 0.25]
    # 30 seconds, at half the rate
    assert len(samples(np.ones(8 * 31, dtype=np.float32))) == 240
    assert len(samples(np.ones(80, dtype=np.float32), rate=4)) == 40
    assert samples(np.ones(80, dtype=np.float32), rate=4)[20] == pytest.approx(1, abs=0.01)
    with pytest.raises(ValueError, match="no samples"):
        samples(np.array([], dtype=np.int16))


def test_a_speech_model_s_decoder_reads_what_the_dense_model_writes(folders):
    found = read(folders["whisper"], folders["audio"], samples=3, seqlen=6)
    model = others.make("whisper")
    for row in found.rows:
        ids, want = row["decoder_input_ids"], [256]
        with torch.no_grad():
            while len(want) < ids.shape[1]:
                out = model(input_features=row["input_features"], decoder_input_ids=torch.tensor([want]))
                want.append(int(out.logits[0, -1].argmax()))
        assert ids.tolist() == [want]
    assert "dense model itself writes" in found.facts["decoder"]
    assert not found.given


def test_writing_greedily_is_what_generate_does():
    model = others.make("bart", forced_eos_token_id=None)
    row = {"input_ids": torch.randint(0, 250, (1, 9))}
    want = model.generate(**row, max_new_tokens=7, num_beams=1, do_sample=False)
    got = media.greedy(model, row, 256, 8)
    assert got.tolist() == want[:, : got.shape[1]].tolist()
    assert got.shape[1] == 8 or want[0, got.shape[1]] == 257


def test_a_decoder_reads_the_text_beside_a_recording(tmp_path, folders):
    audio = shutil.copytree(folders["audio"], tmp_path / "audio")
    for file in audio.glob("*.wav"):
        file.with_suffix(".txt").write_text(f"said in {file.stem}\n")
    found = load(folders["whisper"], audio, 9, "all")
    said = {tiny.tokenizer().decode(row["decoder_input_ids"][0, 1:].tolist()) for row in found.rows}
    # the last token is predicted and not read
    assert said == {"said in "}
    assert found.given
    (audio / "3.txt").unlink()
    with pytest.raises(CalibrationError, match=r"3\.wav has no text in a \.txt file of its name, and others have"):
        load(folders["whisper"], audio, 9, "all")


# -------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("name", "source", "sentence"),
    [
        ("vit", "pydoc", "ViTForImageClassification reads images, and pydoc is text: give --x a folder of images"),
        ("vit", "text", r"reads images, and .*\.txt is text"),
        ("vit", "audio", "reads images, and .* holds none; their names end in .png"),
        ("vit", "nowhere", "reads images, and nowhere is no such file or folder"),
        ("bert", "images", "BertForSequenceClassification reads text, and .* holds images: give --x some text"),
        ("whisper", "images", r"reads recordings, and .* holds none; their names end in \.wav"),
    ],
)
def test_a_source_of_another_kind_is_refused(name, source, sentence, folders):
    place = source if source in ("pydoc", "nowhere") else str(folders[source])
    with pytest.raises(CalibrationError, match=sentence):
        inputs.check(kind_of(Checkpoint(folders[name])), place, "--x")


def test_another_model_s_processor_is_said(tmp_path, folders):
    from transformers import Wav2Vec2FeatureExtractor

    wrong = shutil.copytree(folders["whisper"], tmp_path / "wrong")
    Wav2Vec2FeatureExtractor().save_pretrained(wrong)
    sentence = (
        "the processor of .*wrong, Wav2Vec2FeatureExtractor, makes input_values of audio, and WhisperForConditional"
    )
    with pytest.raises(CalibrationError, match=sentence):
        read(wrong, folders["audio"])
    # of other sizes than the model's
    small = shutil.copytree(folders["vit"], tmp_path / "small")
    others.image_processor(size=8).save_pretrained(small)
    plan = asked(sc.Plan, calibration=str(folders["images"]), eval_text=str(folders["images"]), **FAST)
    with pytest.raises(
        CalibrationError, match=r"does not run on .*, pixel_values \[\d+, 3, 8, 8\]: .*; is the processor in"
    ):
        sc.prune(small, plan, out=tmp_path / "run")


def test_what_else_cannot_be_read_is_said(tmp_path, folders):
    bare = shutil.copytree(folders["vit"], tmp_path / "bare")
    (bare / "preprocessor_config.json").unlink()
    with pytest.raises(CalibrationError, match=r"bare has no processor that loads \(preprocessor_config\.json\)"):
        read(bare, folders["images"])
    one = others.images(tmp_path / "one", 1)
    with pytest.raises(
        CalibrationError, match="holds 1 images, and its calibration part none: every third file is held out"
    ):
        read(folders["vit"], one)
    with pytest.raises(CalibrationError, match="BertForSequenceClassification writes no text of its own"):
        read(folders["bert"], "self")
    import transformers

    with pytest.raises(CalibrationError, match="ClapModel reads recordings together with text, and nothing here makes"):
        inputs.check(kind_of_class(transformers.ClapModel, SimpleNamespace()), "pydoc", "--x")
    with pytest.raises(CalibrationError, match="windows of 3 tokens leave 1 beside"):
        model = shutil.copytree(folders["bert"], tmp_path / "short")
        bracketed().save_pretrained(model)
        read(model, folders["text"], seqlen=3)


# ------------------------------------------------------------------------------------------------------------ whole runs

FAST = {"samples": 6, "seqlen": 24, "eval_windows": 4, "eval_seqlen": 24, "method": "sparsegpt"}


@pytest.mark.parametrize("name", others.OTHERS)
def test_models_of_every_kind_prune_and_are_measured(name, folders, tmp_path):
    source = str(folders[others.OTHERS[name][2]])
    plan = asked(sc.Plan, calibration=source, eval_text=source, pattern="2:4", **FAST)
    report = sc.prune(folders[name], plan, out=tmp_path / "run")
    numbers = {"vit": {"kl", "agree"}, "convnext": {"kl", "agree"}, "bert": {"kl", "agree"}, "vit base": {"cosine", "neighbours"}, "dpt": {"error"},
        "bart": {"ppl_dense", "ppl", "ppl_ratio", "kl", "agree"}, "whisper": {"kl", "agree"}}  # fmt: skip
    assert {key for key, value in report.quality.items() if isinstance(value, dict)} == numbers[name]
    assert report.totals["sparsity"] == 0.5
    assert sc.verify(tmp_path / "run").status == "complete"
    assert report.quality["windows"] == {"audio": 3}.get(others.OTHERS[name][2], 4)


def test_without_sensitivities_every_layer_gets_the_same_sparsity(folders, tmp_path):
    source = str(folders["images"])
    settings = {key: value for key, value in FAST.items() if key != "method"}
    report = sc.prune(
        folders["dpt"], asked(sc.Plan, calibration=source, eval_text=source, **settings), out=tmp_path / "run"
    )
    assert {record.sparsity for record in report.pruned} == {0.5}
    assert report.plan["allocation"] == "uniform"
    assert sum("every layer gets the same sparsity" in warning for warning in report.warnings) == 1
    # who asks for one threshold without them gets it
    plan = asked(sc.Plan, calibration=source, eval_text=source, sensitivity=0, allocation="global", **settings)
    assert len({record.sparsity for record in sc.prune(folders["dpt"], plan, out=tmp_path / "own").pruned}) > 3


def test_images_go_with_text_where_a_model_compares_both(folders, tmp_path):
    model = others.save_contrastive(tmp_path / "clip")
    source = str(folders["images"])
    report = sc.prune(model, asked(sc.Plan, calibration=source, eval_text=source, **FAST), out=tmp_path / "run")
    assert {key for key, value in report.quality.items() if isinstance(value, dict)} == {"cosine", "neighbours"}
    assert report.calibration["text"] == "a photo"
    pictures = others.images(tmp_path / "pictures", 3)
    for file in pictures.rglob("*.png"):
        file.with_suffix(".txt").write_text("xy" * (1 + int(file.stem)))
    found = load(model, pictures, 3, "all")
    assert sorted(row["input_ids"].shape[1] for row in found.rows) == [2, 4, 6]
    assert found.facts["text"] == "what lies beside each file"


def test_a_vision_language_model_reads_text_or_images_among_text(folders, tmp_path):
    model = others.save_vision_language(tmp_path / "llava")
    text, pictures = str(folders["text"]), str(folders["images"])
    plain = sc.prune(model, asked(sc.Plan, calibration=text, eval_text=text, **FAST), out=tmp_path / "text")
    assert plain.quality["ppl_ratio"]["value"] > 0
    assert plain.quality["tokens"] == 4 * 23
    seen = sc.prune(model, asked(sc.Plan, calibration=pictures, eval_text=pictures, **FAST), out=tmp_path / "images")
    assert seen.quality["ppl_dense"] is None
    # of an image's 16 places and the 20 letters of the question the letters are counted
    assert seen.calibration["text"] == "Describe this image."
    assert seen.quality["tokens"] == 4 * 20
    with pytest.raises(CalibrationError, match="does not have on .*; it has kl, agree"):
        asked_for = asked(sc.Plan, calibration=text, eval_text=pictures, gate=("ppl<=9",), **FAST)
        sc.prune(model, asked_for, out=tmp_path / "gate")


def test_a_run_on_images_goes_on_after_a_kill_without_them(folders, tmp_path, monkeypatch):
    pictures = shutil.copytree(folders["images"], tmp_path / "pictures")
    plan = asked(sc.Plan, calibration=str(pictures), **{**FAST, "eval_windows": 0})
    whole = sc.prune(folders["vit"], plan, out=tmp_path / "whole")
    prune_block = prune_run.prune_block

    def killed(step, *rest):
        if step.index == 1:
            raise KeyboardInterrupt
        return prune_block(step, *rest)

    monkeypatch.setattr(prune_run, "prune_block", killed)
    with pytest.raises(KeyboardInterrupt):
        sc.prune(folders["vit"], plan, out=tmp_path / "run")
    monkeypatch.setattr(prune_run, "prune_block", prune_block)
    shutil.rmtree(pictures)
    report = sc.prune(folders["vit"], plan, out=tmp_path / "run")
    assert report.shards == whole.shards
    assert report.calibration == whole.calibration


def test_a_gate_without_its_number_is_refused_before_the_run(folders, tmp_path):
    source = str(folders["images"])
    plan = asked(sc.Plan, calibration=source, eval_text=source, gate=("cosine>=0.9",), **FAST)
    sentence = (
        "gate cosine>=0.9 asks about cosine, which ViTForImageClassification does not have on .*; it has kl, agree"
    )
    with pytest.raises(CalibrationError, match=sentence):
        sc.prune(folders["vit"], plan, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    # of its own text a model's perplexity says nothing
    audio = str(folders["audio"])
    plan = asked(sc.Plan, calibration=audio, eval_text=audio, gate=("ppl<=+5%",), **FAST)
    with pytest.raises(CalibrationError, match="does not have on .*; it has kl, agree"):
        sc.prune(folders["whisper"], plan, out=tmp_path / "run")


def test_text_left_at_its_default_is_refused_before_a_vision_model_is_pruned(folders, tmp_path):
    with pytest.raises(CalibrationError, match="reads images, and pydoc is text: give --eval-text a folder of images"):
        sc.prune(folders["vit"], asked(sc.Plan, calibration=str(folders["images"]), **FAST), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_decision_is_about_models_that_write(folders, tmp_path):
    from secateurs.decide.plan import DecidePlan

    with pytest.raises(PlanError, match="is no causal language model, and a decision compares seconds"):
        sc.decide(asked(DecidePlan, str(folders["vit"]), gate=("kl<=0.1",)), tmp_path / "out")


@pytest.mark.parametrize("name", ["vit", "vit base", "dpt", "bart"])
def test_an_evaluation_goes_on_after_a_kill(name, folders, tmp_path, monkeypatch):
    """Classes, embeddings, other outputs, an encoder-decoder's next tokens."""
    source = folders["text" if name == "bart" else "images"]
    of = Evaluation(str(source), windows=8, seqlen=32)
    # random weights: as far from the dense model's as can be
    dense, pruned = Checkpoint(folders[name]), Checkpoint(others.save(tmp_path / "other", name, hidden_act="relu"))
    monkeypatch.setattr(outputs, "_TOGETHER", 2)
    monkeypatch.setattr(inputs, "_ROWS_PER_BATCH", 2)
    walks, dies = [], None
    outputs_of = compare.outputs_of

    def counted(*given):
        walks.append(given)
        if len(walks) == dies:
            raise KeyboardInterrupt
        return outputs_of(*given)

    monkeypatch.setattr(compare, "outputs_of", counted)
    whole, _ = evaluation.quality(dense, pruned, of)
    every, dies = len(walks), len(walks) + 4
    with pytest.raises(KeyboardInterrupt):
        evaluation.quality(dense, pruned, of, cache=tmp_path / "kept.json")
    walks.clear()
    again, _ = evaluation.quality(dense, pruned, of, cache=tmp_path / "kept.json")
    assert again.as_dict() == whole.as_dict()
    # both models had been walked on the first inputs
    assert len(walks) == every - 2
    # of other inputs nothing is taken
    few, _ = evaluation.quality(dense, pruned, dataclasses.replace(of, windows=3), cache=tmp_path / "kept.json")
    assert few.windows == 3
