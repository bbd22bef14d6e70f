"""Files are written whole or not at all, and what stops them is said as it is."""

import errno
import json
import os
import resource
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file

from secateurs.base.errors import OutputError
from secateurs.base.files import replace, to_json, trim, write_json, write_tensors, writing
from secateurs.model.activations import OnDisk


@pytest.mark.parametrize(
    ("data", "where"),
    [
        ({"layers": [{"error": 0.5}, {"error": float("nan")}]}, r"layers\[1\]\.error is nan"),
        ({"a": 1, "quality": {"ppl": (1.0, [float("inf")])}}, r"quality\.ppl\[1\]\[0\] is inf"),
        ([-float("inf")], r"\[0\] is -inf"),
        (float("nan"), r"it is nan"),
    ],
)
def test_a_number_that_is_none_is_named_with_its_place(data, where, tmp_path):
    file = tmp_path / "report.json"
    write_json(file, {"old": 1})
    with pytest.raises(OutputError, match=rf"report\.json was not written: {where}, which no result may be") as refusal:
        write_json(file, data)
    assert "space" not in str(refusal.value)
    assert json.loads(file.read_text()) == {"old": 1}
    assert [f.name for f in tmp_path.iterdir()] == ["report.json"]
    with pytest.raises(OutputError, match="the object of --json was not written"):
        to_json(data, "the object of --json")


def test_a_mistake_of_ours_is_not_blamed_on_the_disk(tmp_path):
    """Nor is what json cannot write at all."""

    def write(part):
        part.write_text("half")
        raise KeyError("shape")

    with pytest.raises(KeyError):
        replace(tmp_path / "f", write)
    with pytest.raises(TypeError):
        write_json(tmp_path / "f", {"a": torch.zeros(1)})
    circle = {}
    circle["a"] = circle
    with pytest.raises((ValueError, RecursionError)):
        write_json(tmp_path / "f", circle)
    with pytest.raises(AttributeError):
        OnDisk(tmp_path / "a").write(0, 0, [1.0])
    assert not list(tmp_path.glob("f*"))


@pytest.fixture
def small_files():
    """No file may grow past 64 KB, as on a disk that is full; the signal that comes with it is ignored by Python."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_what_was_there(tmp_path, small_files):
    file = tmp_path / "m.safetensors"
    write_tensors(file, {"a": torch.ones(8)})
    with pytest.raises(
        OutputError, match=r"cannot write .*m\.safetensors: .*; nothing else was changed, free space and rerun"
    ):
        replace(file, lambda part: part.write_bytes(b"x" * (1 << 17)))
    assert [f.name for f in tmp_path.iterdir()] == ["m.safetensors"]
    assert torch.equal(load_file(file)["a"], torch.ones(8))


def test_a_full_disk_is_said_by_safetensors_in_words_of_its_own(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OutputError, match="No space left on device .* free space and rerun"):
        write_tensors(tmp_path / "m.safetensors", {"a": torch.ones(8)})
    with pytest.raises(OutputError, match="No space left on device .* free space and rerun"):
        OnDisk(tmp_path / "store").write(0, 0, torch.ones(8))


def test_a_full_folder_for_temporary_files_is_said_by_shrink(tmp_path, monkeypatch):
    import tempfile

    import tiny
    import transformers

    from secateurs.shrink.latency import blank

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(transformers.LlamaForCausalLM, "save_pretrained", full)
    with pytest.raises(OutputError, match=rf"cannot write {tmp_path}: No space left on device; .* free space"):
        blank(transformers.LlamaForCausalLM, tiny.make("llama").config, torch.float32)
    assert not list(tmp_path.glob("tmp*"))


def test_a_folder_that_may_not_be_written_is_not_called_full(tmp_path):
    (tmp_path / "f").write_text("a file")
    with pytest.raises(
        OutputError, match=r"cannot write .*f/x\.json: (Not a directory|File exists); .* make it writable and rerun"
    ):
        write_json(tmp_path / "f" / "x.json", {})
    with pytest.raises(OutputError, match="make it writable"), writing(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied")


def test_the_cache_is_trimmed_by_use_whatever_the_clock_says(tmp_path):
    """A clock that goes back makes folders of the future; they count as used last and nothing fails."""
    for name, when in (("old", 1e9), ("new", 2e9), ("future", 4e9)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "f").write_bytes(b"x" * 10)
        os.utime(tmp_path / name, (when, when))
    trim(tmp_path, 20)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["future", "new"]


def test_of_two_that_write_one_file_at_once_each_writes_it_whole(tmp_path):
    """As runs of one model do, which keep what they learn of it in the cache."""
    file, both = tmp_path / "f", threading.Barrier(2)

    def write(text):
        def slowly(part):
            with part.open("w") as handle:
                handle.write(text[:9])
                handle.flush()
                both.wait(10)
                handle.write(text[9:])

        replace(file, slowly)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, ["a" * 100, "b" * 200]))
    assert file.read_text() in ("a" * 100, "b" * 200)
    assert list(tmp_path.iterdir()) == [file]


def test_the_same_tensors_have_the_same_bytes_each_time(tmp_path):
    # safetensors writes two entries of metadata in either order
    tensors = {"a": torch.ones(2), "b": torch.zeros(3)}
    for i in range(20):
        write_tensors(tmp_path / f"{i}", tensors, {"grids": "{}"})
    assert len({(tmp_path / f"{i}").read_bytes() for i in range(20)}) == 1
    assert load_file(tmp_path / "0").keys() == tensors.keys()
