"""The options of the command line: shared ones are the same everywhere, help fits a screen, mistakes are answered with what is near."""

import dataclasses
import json
import re
import subprocess
import sys

import process
import pytest
import typer
from plans import asked

import secateurs as sc
from secateurs import cli
from secateurs.base.errors import OutputError
from secateurs.base.run_directory import model_in, model_note
from secateurs.cli.options import CALIBRATION, EVALUATION, METHOD, MODEL, OUTPUT, PATTERN, RARE, SPEED
from secateurs.quality.settings import FLAGS, Calibration, Evaluation

COMMANDS = typer.main.get_command(cli.app).commands
PLANNED = ("prune", "shrink", "recover", "decide")
PANELS = (MODEL, PATTERN, METHOD, CALIBRATION, EVALUATION, SPEED, OUTPUT, RARE)


def options(command):
    return {
        p.opts[0]: p for p in COMMANDS[command].params if isinstance(p, typer.core.TyperOption) and p.name != "help"
    }


def said(*arguments, code=0):
    """Standard output and error of the command line, which is no terminal."""
    done = process.run(cli.main, [str(a) for a in arguments])
    assert done.code == code, done.error + done.out
    return done.out, done.error


@pytest.mark.parametrize("part", FLAGS)
def test_each_setting_has_one_flag_with_one_meaning_in_every_command(part):
    kind = {"calibration": Calibration, "evaluation": Evaluation}[part]
    assert set(FLAGS[part]) == {f.name for f in dataclasses.fields(kind)}
    for flag in FLAGS[part].values():
        helps = {command: options(command)[f"--{flag}"].help for command in PLANNED}
        if flag == "samples":
            # what is trained on is read once
            assert helps.pop("recover") != helps["prune"]
        assert len(set(helps.values())) == 1, helps


def test_code_of_a_model_is_allowed_by_one_flag_wherever_a_model_is_read():
    taking = {c for c in COMMANDS if c != "lab" and any(p.name == "model" for p in COMMANDS[c].params)} | {"verify"}
    assert taking == {c for c in COMMANDS if c != "lab" and "--trust-remote-code" in options(c)}
    assert len({options(c)["--trust-remote-code"].help for c in taking}) == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_options_stand_in_panels_and_say_their_default_or_an_example(command):
    if command == "lab":
        return
    for name, found in options(command).items():
        assert found.rich_help_panel in (*PANELS, "Traffic"), name
        if not found.is_flag and not found.required:
            assert re.search(r"Default: |[Ee]\.g\. |lists them", found.help), name
    assert "Example: secateurs " in COMMANDS[command].help or command == "methods"


@pytest.mark.parametrize("command", COMMANDS)
def test_common_options_fit_one_screen(command):
    lines = process.run(cli.main, [command, "--help"], COLUMNS=110).out.splitlines()
    rare = next((i for i, line in enumerate(lines) if RARE in line), len(lines))
    assert rare <= 55


def test_every_command_prints_json():
    for command, found in COMMANDS.items():
        for one in getattr(found, "commands", {command: found}).values():
            assert any("--json" in p.opts for p in one.params), command


def test_the_version_and_the_module():
    want = re.fullmatch(r"secateurs \d+\.\d+\.\d+\n", said("--version")[0])
    assert want
    got = subprocess.run([sys.executable, "-m", "secateurs", "--version"], capture_output=True, text=True, check=True)
    assert got.stdout == want[0]


@pytest.mark.parametrize(("arguments", "near"), [
    (("prun",), "'prune'"),
    (("prune", "m", "--out", "o", "--efort", "fast"), "--effort"),
    (("prune", "m", "--out", "o", "--effort", "balnced"), "did you mean 'balanced'?"),
    (("prune", "m", "--out", "o", "--method", "sparsgpt"), "did you mean 'sparsegpt'?"),
    (("prune", "m", "--out", "o", "--method", "wanda+refitt"), "did you mean 'refit'?"),
    (("prune", "m", "--out", "o", "--pattern", "unstructred"), "did you mean 'unstructured'?"),
    (("prune", "m", "--out", "o", "--pattern", "2-4"), "did you mean '2:4'?"),
    (("prune", "m", "--out", "o", "--allocation", "globl"), "did you mean 'global'?"),
    (("shrink", "m", "--out", "o", "--budget", "params=0.5x", "--units", "head"), "did you mean 'heads'?"),
    (("shrink", "m", "--out", "o", "--budget", "params=0.5x", "--criterion", "obss"), "did you mean 'obs'?"),
    (("recover", "m", "--out", "o", "--train", "block"), "did you mean 'blocks'?"),
])  # fmt: skip
def test_a_mistyped_word_is_answered_with_the_nearest(arguments, near):
    assert near in " ".join(said(*arguments, code=2)[1].split())


def test_a_word_like_none_is_answered_with_the_list_alone():
    error = said("prune", "m", "--out", "o", "--effort", "zzz", code=2)[1]
    assert "write fast, balanced, best" in error
    assert "did you mean" not in error


def test_a_pipe_gets_neither_control_characters_nor_folded_paths(tmp_path, llama, words):
    out = tmp_path / ("a folder with a long name " * 6).strip().replace(" ", "-") / "run"
    text, error = said(
        "prune",
        llama,
        "--out",
        out,
        "--method",
        "magnitude",
        "--eval-text",
        words,
        "--eval-windows",
        2,
        "--eval-seqlen",
        32,
    )
    for found in (text, error):
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", found.replace("\r", ""))
        assert "\x1b" not in found
    assert f"{out}/model (a plain checkpoint), {out}/report.json" in text
    text, _ = said("pack", out)
    assert str(out / "packed") in text


# ------------------------------------------------------------------------------------------- a run directory is its model


@pytest.fixture(scope="module")
def pruned(tmp_path_factory, llama):
    out = tmp_path_factory.mktemp("pruned") / "run"
    sc.prune(llama, asked(sc.Plan, method="magnitude", pattern="2:4", eval_windows=0), out=out)
    return out


def test_a_run_directory_means_its_model_for_every_command_that_takes_one(pruned, tmp_path, words):
    text = [
        "--calibration",
        words,
        "--eval-text",
        words,
        "--samples",
        4,
        "--seqlen",
        32,
        "--eval-windows",
        2,
        "--eval-seqlen",
        32,
    ]
    _, error = said("prune", pruned, "--out", tmp_path / "again", "--method", "magnitude", "--sparsity", 0.6, *text)
    assert (
        f"{pruned} is a run directory: its model {pruned}/model is taken, not the dense one that it was made of."
        in error
    )
    plan = json.loads((tmp_path / "again" / "plan.json").read_text())
    assert plan["model"] == str((pruned / "model").resolve())
    said(
        "shrink", pruned, "--out", tmp_path / "small", "--budget", "params=0.9x", "--units", "layers", "--quiet", *text
    )
    plan = json.loads((tmp_path / "small" / "plan.json").read_text())
    assert plan["model"] == str((pruned / "model").resolve())
    # zeros of the folder itself are seen, not those of its dense model
    assert json.loads(said("inspect", pruned, "--json")[0])["layers"][0]["holds"][0] == "2:4"


@pytest.mark.parametrize("command", [
    ("prune",), ("shrink", "--budget", "params=0.9x", "--multiple", "8"), ("recover", "--teacher", "none"), ("decide", "--gate", "kl<=1", "--prompt", "16"),
], ids=lambda command: command[0])  # fmt: skip
def test_a_task_that_is_not_known_is_refused_before_anything_is_made(command, llama, tmp_path):
    (tmp_path / "tasks").mkdir()
    name, *options = command
    out = tmp_path / "out"
    _, error = said(
        name, llama, "--out", out, *options, "--tasks", "nothing", "--tasks-path", tmp_path / "tasks", code=1
    )
    assert "no task 'nothing' in" in error
    assert not out.exists()


def test_which_model_a_folder_means(pruned, llama, tmp_path):
    assert model_in(llama) == llama
    assert model_note(llama) is None
    assert model_in(pruned) == pruned / "model"
    decided = tmp_path / "decision"
    decided.mkdir()
    (decided / "plan.json").write_text('{"model": "dense"}')
    with pytest.raises(OutputError, match="without a finished model; rerun the command"):
        model_in(decided)
    rows = [{"candidate": "0.5", "folder": "candidates/0.5"}, {"candidate": "2:4", "folder": "candidates/2-4"}]
    found = {"plan": {"model": "dense"}, "rows": rows, "recommended": "2:4"}
    (decided / "decide.json").write_text(json.dumps(found))
    assert model_in(decided) == decided / "candidates/2-4/model"
    (decided / "decide.json").write_text(json.dumps({**found, "recommended": "dense"}))
    with pytest.raises(OutputError, match="decided for the dense model, so it holds none of its own; name dense"):
        model_in(decided)


def test_the_packed_model_is_mentioned_where_there_is_one(pruned, tmp_path):
    sc.pack_run(pruned)
    assert model_note(pruned).endswith("; the packed one is in packed.")


def test_evaluation_is_measured_on_the_windows_that_were_asked(llama, words):
    from secateurs.model.checkpoint import Checkpoint
    from secateurs.quality.evaluation import measured

    asked_for = Evaluation(str(words), windows=3, seqlen=16, gates=("agree>=0",))
    found = measured(Checkpoint(llama), Checkpoint(llama), asked_for, 0)
    assert (found.evaluation["windows"], found.evaluation["seqlen"]) == (3, 16)
    assert found.quality["kl"]["value"] == pytest.approx(0, abs=1e-7)
    # too few windows pass nothing
    assert [g["verdict"] for g in found.gate] == ["undecided"]
