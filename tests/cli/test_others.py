"""The command line on models that are no causal language models."""

import json
import os
import subprocess
import sys

import others
import pytest
from command import fails, run


def test_a_vision_model_is_pruned_and_measured_on_images_of_one_folder(tmp_path, capsys):
    model, pictures = others.save(tmp_path / "vit", "vit"), others.images(tmp_path / "pictures")
    (pictures / "a" / "99.png").write_bytes(b"")
    out = tmp_path / "run"
    text, _ = run(
        "prune", model, "--out", out, "--method", "sparsegpt", "--calibration", pictures, "--samples", 9, "--eval-text", pictures,
        "--eval-windows", 4, "--gate", "agree>=0%", code=3,
    )  # fmt: skip
    text = " ".join(text.split())
    assert "4 images; 95% intervals over images" in text
    assert "KL to dense, nats an input" in text
    assert "same top class as dense" in text
    assert "perplexity" not in text
    card = (out / "model" / "README.md").read_text()
    assert "| same top class as dense |" in card
    assert "loads with `ViTForImageClassification.from_pretrained`" in card
    assert "erplexity" not in card
    report = json.loads((out / "report.json").read_text())
    assert report["gate"][0]["verdict"] == "undecided"
    # of 13 files 5 are held out, the last of them no image
    assert "1 file was left out: 99.png cannot be read" in report["warnings"][-1]
    # eval takes the part of the folder that calibration left alone, as prune did
    again = json.loads(run("eval", out, "--eval-text", pictures, "--eval-windows", 4, "--json")[0])
    assert again["quality"] == report["quality"]
    assert again["evaluation"]["sha256"] == report["evaluation"]["sha256"]
    sentence = fails(capsys, 1, "eval", model, "--eval-text", pictures)
    assert (
        "predicts no next token, so it has no perplexity, and nothing to compare it with: give a run directory"
        in sentence
    )
    assert "reads images, and pydoc is text: give --eval-text a folder" in fails(capsys, 1, "eval", out)


def test_an_encoder_decoder_alone_has_its_perplexity(tmp_path, words):
    model = others.save(tmp_path / "bart", "bart")
    found = json.loads(run("eval", model, "--eval-text", words, "--eval-windows", 2, "--eval-seqlen", 16, "--json")[0])
    assert found["quality"]["ppl_dense"]["value"] > 1
    assert found["quality"]["ppl"] is None
    assert found["evaluation"]["decoder"].startswith("the 16 tokens that follow")


@pytest.mark.parametrize("own", [None, "100"])
def test_caches_for_shapes_of_products_are_small_unless_the_user_says_otherwise(own):
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    there = {k: v for k, v in os.environ.items() if k not in names} | (dict.fromkeys(names, own) if own else {})
    code = f"import os, secateurs.cli; print([os.environ[n] for n in {names}])"
    out = subprocess.run([sys.executable, "-c", code], env=there, capture_output=True, text=True, check=True).stdout
    assert out.strip() == str([own or "16"] * 2)
