"""What people would run instead: which ways there are, in which order, and what is said where one is missing."""

import pytest
import tiny
import torch
from gridded import save

from secateurs.machine import llama_cpp
from secateurs.machine.bench import Variant
from secateurs.pack import rivals


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(llama_cpp, "installed", lambda: True)


def test_the_dense_model_is_run_as_it_is_and_in_8_and_4_bits(tmp_path, installed):
    dense = str(save(tmp_path / "dense", dtype=torch.bfloat16))
    ways, said = rivals.in_llama_cpp(dense, tmp_path / "made")
    assert said == []
    assert [w.name for w in ways] == ["llama.cpp, 16 bits", "llama.cpp, 8 bits", "llama.cpp, 4 bits"]
    assert [w.runs(dense) for w in ways] == [True, False, False]
    assert all(w.rival and w.how == "llama.cpp" for w in ways)
    sizes = [(tmp_path / "made" / name).stat().st_size for name in ("dense.gguf", "q8_0.gguf", "q4_0.gguf")]
    assert [w.folder for w in ways] == [str(tmp_path / "made" / n) for n in ("dense.gguf", "q8_0.gguf", "q4_0.gguf")]
    assert sizes == sorted(sizes, reverse=True)


def test_they_stand_before_the_last_variant_and_their_files_go(tmp_path, installed):
    dense = str(save(tmp_path / "dense"))
    ours = [Variant("dense", dense, "dense"), Variant("packed", "packed", "packed")]
    with rivals.beside(ours, True, tmp_path) as (ways, _):
        assert [w.name for w in ways] == [
            "dense", "dense, torch.compile", "llama.cpp, 32 bits", "llama.cpp, 8 bits", "llama.cpp, 4 bits", "packed",
        ]  # fmt: skip
        assert (tmp_path / "rivals" / "q4_0.gguf").is_file()
    assert not (tmp_path / "rivals").exists()
    with rivals.beside(ours, False, tmp_path) as (ways, said):
        assert (ways, said) == (ours, [])


def test_without_its_package_one_sentence_says_what_to_install_and_what_is_not_known(tmp_path, monkeypatch):
    monkeypatch.setattr(llama_cpp, "installed", lambda: False)
    ways, (said,) = rivals.in_llama_cpp("anything", tmp_path)
    assert ways == []
    assert "pip install xllamacpp): whether the dense model is faster in it" in said


def test_a_model_that_llama_cpp_has_no_place_for_is_said_and_does_not_fail(tmp_path, installed):
    dense = str(tiny.save(tmp_path / "dense", "gpt2"))
    ways, (said,) = rivals.in_llama_cpp(dense, tmp_path / "made")
    assert ways == []
    assert said.startswith(f"llama.cpp was not run: {dense} is a GPT2LMHeadModel")
    assert not list((tmp_path / "made").glob("*"))


def test_rows_that_keep_their_bits_are_named(tmp_path, installed):
    dense = str(save(tmp_path / "dense", intermediate_size=48))
    _, said = rivals.in_llama_cpp(dense, tmp_path / "made")
    assert len(said) == 2
    assert said[0].startswith(
        "3 matrices keep their bits in the file of 8 bits for llama.cpp, first model.layers.0.mlp.down_proj"
    )
