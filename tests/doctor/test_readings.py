# SPDX-License-Identifier: Apache-2.0
"""Runs are read from every place where verl leaves metrics; what cannot be used is one line and exit status 2."""

import json
import os
import shutil
import time

import numpy as np
import pytest
from planted import STEPS, healthy, write
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from verl_dvpo import cli
from verl_dvpo.doctor.lines import PICTURE, sparkline
from verl_dvpo.doctor.readings import Curve, read_run
from verl_dvpo.doctor.run import diagnose, headline, verdict


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs ``verl-dvpo doctor`` in this process, with no other command installed."""
    info = tmp_path / "site" / "only_doctor-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: only-doctor\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{cli.GROUP}]\ndoctor = verl_dvpo.doctor.commands:doctor\n")
    found = cli.metadata.distributions(path=[str(tmp_path / "site")])
    (entry,) = next(iter(found)).entry_points
    monkeypatch.setattr(cli.metadata, "entry_points", lambda group: [entry])
    return cli.main


def with_line(folder, number, text):
    """Puts a line of its own into metrics."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines.insert(number - 1, text)
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def empty_folder(folder):
    folder.mkdir()


def study(folder):
    for name in ("a", "b"):
        write(folder / "runs" / name, healthy())


def broken(folder):
    with_line(write(folder, healthy()), 3, '{"step": 3, "data": {"critic/vf')


def no_record(folder):
    with_line(write(folder, healthy()), 7, "[1, 2]")


def nothing_yet(folder):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "da')


def no_metrics_file(folder):
    folder.write_text("hello")


BAD = {
    "an unknown folder": (lambda folder: None, r"run is '.*/run'; a folder or file that exists is allowed"),
    "a folder without metrics": (empty_folder, r"it has none; run with trainer\.logger='\[console,file\]'"),
    "a folder of several runs": (study, r"it holds runs/a, runs/b; give one of them"),
    "a broken line": (broken, r"metrics\.jsonl, line 3 is '\{\"step\": 3, \"data\": \{\"critic/vf'; .* is allowed"),
    "a line that is no record": (no_record, r"metrics\.jsonl, line 7 is '\[1, 2\]'"),
    "a run without a step": (nothing_yet, r"holds no finished step yet; wait for the first"),
    "another file": (no_metrics_file, r"a file of metrics is \*\.jsonl or events"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_status_2(case, tmp_path, command, capsys):
    make, message = BAD[case]
    make(tmp_path / "run")
    assert command(["doctor", str(tmp_path / "run")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    with pytest.raises(ValueError, match=message):
        command(["--debug", "doctor", str(tmp_path / "run")])


def test_options_that_do_not_fit(tmp_path, command, capsys):
    write(tmp_path / "run", healthy())
    assert command(["doctor", str(tmp_path / "run"), "--quick"]) == 2
    assert "choose checks of the machine" in capsys.readouterr().err
    assert command(["doctor", "--only", "moon"]) == 2
    assert "--only is 'moon'; allowed are 'python', 'verl'" in capsys.readouterr().err


def test_exit_status_and_json_of_a_run(tmp_path, command, capsys):
    well, ill = write(tmp_path / "well", healthy()), write(tmp_path / "ill", healthy())
    write(ill, healthy() | {"critic/vf_loss": np.full(STEPS, np.nan)})
    assert command(["doctor", str(well)]) == 0
    assert "the critic is healthy" in capsys.readouterr().out
    assert command(["doctor", str(ill), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["state"] == "problem"
    assert (found["last_step"], found["run_state"]) == (STEPS, "unknown")
    first = found["lines"][0]
    assert (first["name"], first["state"]) == ("not a number", "problem")
    assert first["picture"] == "×" * PICTURE


def test_a_run_is_found_by_its_folder_its_file_and_its_tensorboard(tmp_path):
    """The same numbers, to float32, whichever way they are read."""
    curves = healthy()
    by_file = read_run(write(tmp_path / "a", curves) / "metrics.jsonl")
    by_other_name = read_run(write(tmp_path / "b", curves, name="experiment.jsonl"))
    writer = EventFileWriter(str(tmp_path / "c" / "tensorboard"))
    for step in range(STEPS):
        for name, values in curves.items():
            value = Summary.Value(tag=name, simple_value=float(values[step]))
            writer.add_event(Event(step=step + 1, summary=Summary(value=[value])))
    writer.close()
    by_events = read_run(tmp_path / "c")
    (file,) = (tmp_path / "c" / "tensorboard").iterdir()
    for run in (by_file, by_other_name, by_events, read_run(file)):
        assert set(run.curves) == set(curves)
        for name, curve in run.curves.items():
            np.testing.assert_array_equal(curve.steps, np.arange(1, STEPS + 1))
            np.testing.assert_allclose(curve.values, curves[name], rtol=1e-6, atol=1e-7)


def test_a_run_that_is_still_going_is_judged_and_said_to_be_unfinished(tmp_path):
    curves = healthy()
    run = write(tmp_path / "run", curves)
    assert read_run(run).state == "unknown"
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text() + '{"step": 41, "data": {"cri')
    os.utime(run / "metrics.jsonl", (time.time() - 10,) * 2)  # a step takes 3 seconds
    going, lines = diagnose(run)
    assert going.last_step == STEPS
    assert "unfinished: judged by what is there so far" in headline(going)
    assert verdict(going, lines).startswith("the critic is healthy so far")
    os.utime(run / "metrics.jsonl", (time.time() - 60,) * 2)
    assert read_run(run).state == "unknown"
    for status, state in (("running", "unfinished"), ("failed", "unfinished"), ("finished", "finished")):
        (run / "run.json").write_text(json.dumps({"status": status}))
        assert read_run(run).state == state
    for total, state in ((STEPS, "finished"), (STEPS + 20, "unfinished")):
        (run / "config.yaml").write_text(f"trainer:\n  total_training_steps: {total}\n")
        assert read_run(run).state == state
    assert f"{STEPS} of {STEPS + 20} steps" in headline(read_run(run))


def test_few_steps_are_too_few_for_a_verdict(tmp_path):
    few = {name: curve[:5] for name, curve in healthy().items()}
    run, lines = diagnose(write(tmp_path / "few", few))
    assert [line.name for line in lines] == ["not a number"]
    assert "5 steps are too few for trends (8 needed)" in verdict(run, lines)
    broken_early = few | {"critic/vf_loss": np.array([1.0, np.nan, 1.0, 1.0, 1.0])}
    _, lines = diagnose(write(tmp_path / "nan", broken_early))
    assert lines[0].state == "problem"


def test_metrics_that_are_logged_every_few_steps(tmp_path):
    """A validation's record of the same step is merged; a metric that comes every fourth step has its own steps."""
    run = write(tmp_path, {name: curve for name, curve in healthy().items() if name != "critic/vf_explained_var"})
    with (run / "metrics.jsonl").open("a") as file:
        for step in range(4, STEPS + 1, 4):
            file.write(json.dumps({"step": step, "data": {"critic/vf_explained_var": -1.0}}) + "\n")
    curve = read_run(run).curves["critic/vf_explained_var"]
    assert curve.steps.tolist() == list(range(4, STEPS + 1, 4))
    _, lines = diagnose(run)
    (found,) = [line for line in lines if line.name == "explained variance"]
    assert found.state == "problem"
    assert "steps 24 to 40 (median), below 0 in 5 of 5" in found.text


def test_a_run_whose_checkpoints_were_moved_away_is_no_run(tmp_path):
    folder = write(tmp_path / "run", healthy())
    shutil.move(folder / "metrics.jsonl", tmp_path / "elsewhere.jsonl")
    (folder / "global_step_4" / "actor").mkdir(parents=True)
    with pytest.raises(ValueError, match="it has none"):
        read_run(folder)


def test_parts_of_a_curve():
    curve = Curve(np.arange(1, 11), np.arange(10.0))
    assert curve.last(0.25).values.tolist() == [7.0, 8.0, 9.0]
    assert curve.first(0.25).values.tolist() == [0.0, 1.0]
    assert curve.last(0.01).values.tolist() == [9.0]
    assert Curve(np.arange(3), np.array([1.0, np.nan, 5.0])).median == 3.0
    assert np.isnan(Curve(np.arange(1), np.array([np.nan])).median)


def test_sparklines():
    assert sparkline([0.0, 1.0, 2.0, 7.0]) == "▁▂▃█"
    assert sparkline([3.0, 3.0]) == "▁▁"
    assert sparkline([1.0, float("nan"), 2.0]) == "▁×█"
    assert sparkline([float("inf")] * 3) == "×××"
    assert sparkline([]) == ""
    long = sparkline(np.arange(1000.0))
    assert (len(long), long[0], long[-1]) == (PICTURE, "▁", "█")
    assert list(long) == sorted(long)
