"""Names that files state: none leads out of a model's folder, links do."""

import json
import shutil

import pytest
import tiny
from plans import asked

import secateurs as sc
from secateurs.base.errors import CheckpointError
from secateurs.base.files import inside
from secateurs.base.run_directory import model_in
from secateurs.model.checkpoint import Checkpoint
from secateurs.model.sentences import sentences_of
from secateurs.report.page import write as write_page


@pytest.mark.parametrize("name", ["../other/a.safetensors", "/tmp/a", "sub/../../a", "..", 3, None, ["a"]])
def test_a_name_that_leads_out_is_refused(name, tmp_path):
    with pytest.raises(CheckpointError, match=r"index\.json names .*, which leads out of"):
        inside(tmp_path, name, tmp_path / "index.json")


@pytest.mark.parametrize("name", ["a.safetensors", "sub/a", "sub/../a", "..a", "a..b/c", "."])
def test_a_name_that_stays_is_taken(name, tmp_path):
    assert inside(tmp_path, name, tmp_path / "index.json") == tmp_path / name


@pytest.fixture
def shards(tmp_path):
    """A model's folder with an index, and another folder with the same shards."""
    folder = tiny.save(tmp_path / "model")
    shutil.copytree(folder, tmp_path / "other")
    return folder


def restate(file, change):
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


@pytest.mark.parametrize("there", ["../other", "{}/other"])
def test_an_index_does_not_lead_to_another_folder(there, shards):
    there = there.format(shards.parent)
    name = "model.embed_tokens.weight"

    def change(data):
        data["weight_map"][name] = f"{there}/{data['weight_map'][name]}"

    restate(shards / "model.safetensors.index.json", change)
    with pytest.raises(CheckpointError, match=rf"index\.json names '{there}/model.*safetensors', which leads out of"):
        Checkpoint(str(shards))
    restate(shards / "model.safetensors.index.json", lambda data: data.update(weight_map=["a"]))
    with pytest.raises(CheckpointError, match="weight_map says no file for each tensor"):
        Checkpoint(str(shards))


def test_a_config_does_not_lead_to_another_file(shards):
    for file in shards.glob("*.safetensors*"):
        file.unlink()
    restate(
        shards / "config.json", lambda data: data.update(transformers_weights="../other/model.safetensors.index.json")
    )
    with pytest.raises(
        CheckpointError, match=r"config\.json names '\.\./other/model\.safetensors\.index\.json', which"
    ):
        Checkpoint(str(shards))


def test_links_of_a_hub_cache_are_followed(shards, tmp_path):
    """snapshots/REVISION/NAME -> ../../blobs/HASH"""
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "main"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(shards.iterdir())):
        shutil.copyfile(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    dense, linked = Checkpoint(str(shards)), Checkpoint(str(snapshot))
    assert set(dense.file_of) == set(linked.file_of)
    assert linked.nbytes == dense.nbytes


@pytest.mark.parametrize("kind", ["Transformer", "Dense"])
def test_modules_of_sentence_transformers_lie_in_their_folder(kind, tmp_path):
    modules = [{"path": "0_Transformer", "type": "models.Transformer"}, {"path": "2_Dense", "type": "models.Dense"}]
    for module in modules:
        if module["type"].endswith(kind):
            module["path"] = f"../{module['path']}"
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(CheckpointError, match=r"modules\.json names '\.\./\d_.*leads out of"):
        sentences_of(tmp_path)


def test_a_report_and_a_decision_name_what_lies_in_the_run(llama, tmp_path):
    run = tmp_path / "run"
    sc.prune(llama, asked(sc.Plan, method="magnitude", eval_windows=0), out=run)
    restate(run / "report.json", lambda data: data.update(shards={"../../other": "0"}))
    with pytest.raises(CheckpointError, match=r"report\.json names '\.\./\.\./other'"):
        sc.verify(run)
    rows = [{"candidate": "0.5", "status": "measured", "folder": "../run"}]
    (run / "decide.json").write_text(json.dumps({"recommended": "0.5", "rows": rows}))
    with pytest.raises(CheckpointError, match=r"decide\.json names '\.\./run'"):
        model_in(run)
    restate(run / "plan.json", lambda data: data.update(candidates=["0.5"]))
    with pytest.raises(CheckpointError, match=r"decide\.json names '\.\./run'"):
        write_page([run], None)
