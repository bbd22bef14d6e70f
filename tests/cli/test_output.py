"""Progress in a log, and streams that nobody reads."""

import json
import os
import sys
import time

import process
import pytest

from secateurs import cli
from secateurs.cli import output


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when a test says so."""
    now = [1000.0]
    monkeypatch.setattr(output.time, "monotonic", lambda: now[0])
    return now


def test_a_log_says_when_a_stage_begins_and_then_nothing_until_it_is_time(clock, capsys):
    log = output._Log()
    log.write()
    for done in range(5):
        log("pruning", done, 10)
        clock[0] += 15
    # 4 steps of 10 took 75 seconds, so 6 more take 112.5
    log.write()
    log("evaluating", 1, 8)
    log("pruning", 5, 10)
    clock[0] += 40
    log.write()
    assert capsys.readouterr().err.splitlines() == [
        "pruning: 0 of 10",
        "pruning: 4 of 10, 0:01:15 elapsed, 0:01:52 left",
        "evaluating: 1 of 8",
        "pruning: 5 of 10, 0:01:55 elapsed, 0:01:55 left",
    ]


def test_a_log_of_a_run_that_goes_on_knows_the_pace_of_this_part(clock, capsys):
    log = output._Log()
    log("training", 81, 100)
    clock[0] += 20
    log("training", 91, 100)
    log.write()
    assert capsys.readouterr().err.splitlines() == [
        "training: 81 of 100",
        "training: 91 of 100, 0:00:20 elapsed, 0:00:18 left",
    ]


def test_a_log_says_that_a_finished_stage_is_finished_and_when_it_begins_again(clock, capsys):
    log = output._Log()
    log("evaluating", 1, 2)
    clock[0] += 10
    log("evaluating", 2, 2)
    clock[0] += 45
    log.write()
    log("evaluating", 1, 2)
    clock[0] += 5
    log.write()
    assert capsys.readouterr().err.splitlines() == [
        "evaluating: 1 of 2",
        "evaluating: done in 0:00:10, and what follows has taken 0:00:45 so far",
        "evaluating: 1 of 2",
        "evaluating: 1 of 2, 0:00:05 elapsed",
    ]


def test_a_log_has_lines_however_long_a_step_takes_and_not_more_often(monkeypatch, capsys):
    monkeypatch.setattr(output, "_EVERY", 0.2)
    began = time.monotonic()
    with output.progress_bars(True) as progress:
        for _ in range(100):
            progress("pruning", 0, 2)
        progress("pruning", 1, 2)
        time.sleep(0.5)
    found = capsys.readouterr().err.splitlines()
    assert found[0] == "pruning: 0 of 2"
    assert 2 <= len(found) <= 1 + (time.monotonic() - began) / 0.2, found
    with output.progress_bars(False) as progress:
        progress("pruning", 0, 2)
    assert capsys.readouterr().err == ""


def test_candidates_of_a_decision_are_lines_of_a_log_too(capsys):
    with output.live_table(True) as (progress, show):
        show([{"candidate": "0.5", "status": "running"}, {"candidate": "2:4", "status": "estimated"}])
        progress("0.5: pruning", 0, 10)
    assert capsys.readouterr().err.splitlines() == ["0.5 running, 2:4 estimated", "0.5: pruning: 0 of 10"]
    with output.live_table(False) as (progress, show):
        show([{"candidate": "0.5", "status": "running"}])
        progress("0.5: pruning", 0, 10)
    assert capsys.readouterr().err == ""


def _unread(number, *arguments):
    """The command line with a stream whose reader has gone."""
    reads, writes = os.pipe()
    os.close(reads)
    os.dup2(writes, number)
    os.close(writes)
    cli.main([str(a) for a in arguments])


def _printed():
    """What stays in a buffer until the end, as other libraries' lines do."""
    reads, writes = os.pipe()
    os.close(reads)
    os.dup2(writes, 1)
    os.close(writes)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    with output.streams():
        print("a line")


def _closed(number, *arguments):
    """The command line with a stream that is not there."""
    os.close(number)
    setattr(sys, ("stdin", "stdout", "stderr")[number], None)
    cli.main([str(a) for a in arguments])


@pytest.mark.parametrize("arguments", ["methods", "methods --json", "--version", "prune --help", "lab magnitude"])
def test_output_that_nobody_reads_ends_as_if_by_the_system(arguments):
    assert process.run(_unread, 1, *arguments.split()) == (output.GONE, "", "")


def test_what_is_still_in_a_buffer_at_the_end_is_no_traceback_either():
    assert process.run(_printed) == (output.GONE, "", "")


def _to_a_process_that_ended():
    """The command line with a command that writes to a pipe of its own whose reader has gone."""
    from secateurs.report import tables

    def fails(*_):
        reads, writes = os.pipe()
        os.close(reads)
        os.write(writes, b"a word")

    tables.print_methods = fails
    cli.main(["methods"])


def test_a_pipe_to_another_process_that_broke_is_an_error_with_a_sentence():
    sentence = "error: a process that this one wrote to has ended; nothing that was finished is lost\n"
    assert process.run(_to_a_process_that_ended) == (1, "", sentence)


def test_errors_keep_their_code_and_sentence_when_nobody_reads_output():
    done = process.run(_unread, 1, "realize", "blok", "--profile", "a100")
    assert (done.code, done.out) == (2, "")
    assert done.error.startswith("error: ")


def test_nothing_of_a_run_is_lost_whose_output_nobody_reads(llama, tmp_path):
    how = ["prune", llama, "--method", "magnitude", "--eval-windows", "0"]
    done = process.run(_unread, 1, *how, "--out", tmp_path / "run")
    assert (done.code, "Traceback" in done.error) == (output.GONE, False)
    assert json.loads((tmp_path / "run" / "report.json").read_text())["status"] == "complete"
    # nor does a run end because nobody reads its progress
    done = process.run(_unread, 2, *how, "--out", tmp_path / "other")
    assert done.code == 0
    assert "Pruned 21 layers" in done.out


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_stream_that_is_closed_is_no_error_and_no_file_gets_its_number(number, llama, tmp_path):
    how = ["prune", llama, "--method", "magnitude", "--eval-windows", "0"]
    done = process.run(_closed, number, *how, "--out", tmp_path / "run")
    assert (done.code, "Traceback" in done.error) == (0, False)
    assert json.loads((tmp_path / "run" / "report.json").read_text())["status"] == "complete"
    assert process.run(_closed, number, "methods").code == 0
