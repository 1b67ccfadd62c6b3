# SPDX-License-Identifier: Apache-2.0
"""Tests what a demo's run prints, on records in the form of verl's file logger."""

import json
import subprocess
import sys

import pytest
from pictures import made

from verl_dvpo.bench.tasks.run import RunPaths, follow, show, summarise

ACCURACY = "val-core/demo_addition/acc/mean@1"
RECORDS = [
    {"step": 0, "data": {ACCURACY: 0.25}},
    {"step": 1, "data": {"critic/score/mean": 0.5, "response_length/mean": 26.0, "timing_s/step": 3.0}},
    {"step": 2, "data": {"critic/score/mean": 0.75, "timing_s/step": 1.0, ACCURACY: 0.875}},
]


def test_without_a_terminal_each_step_is_a_line(capfd):
    show(iter(RECORDS))
    said = capfd.readouterr()
    assert said.err == ""
    assert "\r" not in said.out
    starting, before, heading, first, second, after = said.out.splitlines()
    assert starting.startswith("starting")
    assert before.endswith("before training: 0.250")
    assert heading.split()[:3] == ["step", "reward", "length"]
    assert first.split() == ["1", "0.500", "26.000", "3.000"]
    # Blank cells keep their width, so numbers stand below their headings; both words have six characters.
    assert first.index("26.000") == heading.index("length")
    assert len(first) == len(second) == len(heading)
    assert after.endswith("after step 2: 0.875")


def test_the_summary_compares_the_first_and_the_last_validation(tmp_path, capsys):
    paths = RunPaths(tmp_path)
    paths.metrics.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    for step in (9, 10):
        (paths.checkpoints / f"global_step_{step}").mkdir(parents=True)
    assert summarise(paths, 12.0) == 0
    said = capsys.readouterr().out
    assert "0.250 before, 0.875 after 2 steps (+0.625)" in said
    assert "12 s in all, 3.00 s a step" in said
    assert f"checkpoint:   {paths.checkpoints / 'global_step_10'}" in said


def test_the_summary_ends_with_the_pictures_of_the_run(tmp_path, capsys):
    """Drawn anew each time; a run whose critic wrote nothing has none, and a broken file is named."""
    paths = RunPaths(tmp_path / "dvpo")
    paths.folder.mkdir()
    paths.metrics.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    assert summarise(paths, 12.0) == 0
    assert "pictures:     none: a critic with critic.value.dump_every above 0" in capsys.readouterr().out
    made.save_run(paths.folder, made.story())
    paths.pictures.mkdir()
    (paths.pictures / "old.png").touch()
    assert summarise(paths, 12.0) == 0
    assert f"pictures:     {paths.pictures / 'index.html'}\n" in capsys.readouterr().out
    names = {file.name for file in paths.pictures.iterdir()}
    assert {"index.html", "fan.png", "curves.png"} <= names
    assert "old.png" not in names
    (paths.checkpoints / "values" / "step_10.safetensors").write_bytes(b"")
    assert summarise(paths, 12.0) == 0
    assert "pictures:     none: " in capsys.readouterr().out


@pytest.mark.parametrize("kept", [0, 1])
def test_a_run_without_a_validation_after_training_has_failed(kept, tmp_path, capsys):
    paths = RunPaths(tmp_path)
    paths.metrics.write_text("".join(json.dumps(record) + "\n" for record in RECORDS[:kept]))
    assert summarise(paths, 1.0) == 1
    assert f"holds {kept} validations" in capsys.readouterr().err


def test_records_are_followed_in_order_and_in_pieces(tmp_path):
    """A line may be there in part when it is read, and the last lines come with the end of the process."""
    file = tmp_path / "metrics.jsonl"
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS)
    code = f"""
import time
text = {lines!r}
with open({str(file)!r}, "w") as out:
    for start in range(0, len(text), 60):
        out.write(text[start:start + 60]); out.flush(); time.sleep(0.35)
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    assert list(follow(file, process)) == RECORDS
    assert process.wait() == 0
