# SPDX-License-Identifier: Apache-2.0
"""What the parts of the workbench share: writes that are whole or absent, tables, and progress without a terminal."""

import io

import pandas as pd
import pytest

from verl_dvpo.bench import common
from verl_dvpo.bench.common import Progress, markdown_table, write_csv, write_json, write_text


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(common.os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["file.txt"]


def test_json_and_csv_are_written_whole(tmp_path):
    write_json(tmp_path / "a.json", {"b": [1, None]})
    assert (tmp_path / "a.json").read_text() == '{\n  "b": [\n    1,\n    null\n  ]\n}\n'
    write_csv(tmp_path / "a.csv", pd.DataFrame({"x": [1, 2], "y": ["a,b", None]}))
    assert (tmp_path / "a.csv").read_text() == 'x,y\n1,"a,b"\n2,\n'
    assert len(list(tmp_path.iterdir())) == 2


def test_a_markdown_table():
    assert markdown_table(["a", "b"], [[1, "x"], [None, float("nan")]]) == [
        "| a | b |", "| --- | --- |", "| 1 | x |", "|  |  |", ""
    ]  # fmt: skip
    assert markdown_table(["a"], []) == ["| a |", "| --- |", ""]
    with pytest.raises(ValueError, match=r"row is \[1, 2\]; it must have 1 cells"):
        markdown_table(["a"], [[1, 2]])


def test_without_a_terminal_progress_is_one_line_an_event(monkeypatch):
    clock = iter([100.0, 110.0, 130.0])
    monkeypatch.setattr(common.time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    with Progress(8, unit="step", done=2, stream=stream) as progress:
        progress.note("begins")
        progress.update(4, "two more")  # 2 steps in 10 s, 4 to come
        progress.update(5, "one more", keep=True)  # 3 steps in 30 s, 3 to come
        progress.update(8, "all")
    assert stream.getvalue().split("\n") == [
        "begins",
        "two more [4 of 8 steps, 00:20 left]",
        "one more [5 of 8 steps, 00:30 left]",
        "all [8 of 8 steps]",
        "",
    ]
    assert "\r" not in stream.getvalue()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_progress_is_a_bar_and_what_is_kept_stands_above_it():
    stream = Terminal()
    with Progress(8, unit="step", stream=stream) as progress:
        progress.update(2, "for now")
        progress.update(4, "for good", keep=True)
    assert "\r" in stream.getvalue()
    assert "for good\n" in stream.getvalue()
    assert "for now\n" not in stream.getvalue()


def test_quiet_is_quiet():
    for stream in (io.StringIO(), Terminal()):
        with Progress(8, unit="step", stream=stream, quiet=True) as progress:
            progress.update(2, "x", keep=True)
            progress.note("y")
        assert stream.getvalue() == ""
