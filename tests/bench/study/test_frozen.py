# SPDX-License-Identifier: Apache-2.0
"""Hypotheses that changed after the first run are refused, and the difference is shown, before anything starts."""

import contextlib
import hashlib
import io
import json
import subprocess

import pytest
import yaml
from fake import FakeTrainer, study_of
from registered import contrast_of, hypotheses_of, written

from verl_dvpo.bench.study import runner
from verl_dvpo.bench.study.config import load_study
from verl_dvpo.bench.study.frozen import StudyChangedError, check_frozen, facts_of, freeze
from verl_dvpo.bench.study.runner import run_study
from verl_dvpo.cli import main


@pytest.fixture
def yaml_file(out, tmp_path):
    """A study's file, with its hypotheses beside it."""
    written(tmp_path, hypotheses_of())
    content = study_of(out, seeds=list(range(6))).to_json() | {"hypotheses": "small.hypotheses.yaml"}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "study.yaml"


def edit(path, **fields):
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | fields))


def test_the_first_run_freezes_hypotheses_and_settings(out, yaml_file):
    freeze(load_study(yaml_file))
    text = (yaml_file.parent / "small.hypotheses.yaml").read_bytes()
    assert (out / "frozen" / "hypotheses.yaml").read_bytes() == text
    assert b"# why" in text
    frozen = yaml.safe_load((out / "frozen" / "study.yaml").read_text())
    assert (frozen["steps"], frozen["seeds"]) == (4, [0, 1, 2, 3, 4, 5])
    assert not {"out", "minutes_per_run", "hypotheses"} & frozen.keys()
    facts = facts_of(out)
    assert facts["sha256"]["hypotheses.yaml"] == hashlib.sha256(text).hexdigest()
    assert facts["hypotheses"] == {"file": "small.hypotheses.yaml", "commit": None, "committed": False}
    before = (out / "frozen" / "frozen.json").read_bytes()
    freeze(load_study(yaml_file))
    assert (out / "frozen" / "frozen.json").read_bytes() == before


def test_the_revision_is_that_of_the_hypotheses_own_repository(out, yaml_file):
    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        done = subprocess.run(
            ["git", *who, *arguments], cwd=yaml_file.parent, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    git("init", "-q")
    git("add", "small.hypotheses.yaml")
    git("commit", "-qm", "hypotheses")
    freeze(load_study(yaml_file))
    assert facts_of(out)["hypotheses"] == {
        "file": "small.hypotheses.yaml", "commit": git("rev-parse", "HEAD"), "committed": True
    }  # fmt: skip
    with open(yaml_file.parent / "small.hypotheses.yaml", "a") as file:
        file.write("# not committed\n")
    other = out.with_name("other")
    freeze(load_study(yaml_file).changed(out=str(other)))
    assert not facts_of(other)["hypotheses"]["committed"]


@pytest.mark.parametrize(
    ("change", "removed", "added"),
    [
        ({"hypotheses": hypotheses_of(contrast_of(bound=0.05))}, "-  bound: 0.02", "+  bound: 0.05"),
        ({"hypotheses": hypotheses_of(max_seeds=5)}, "-  max_seeds: 6", "+  max_seeds: 5"),
        ({"steps": 6}, "-steps: 4", "+steps: 6"),
        ({"base": ["data.seed=1"]}, " name: small", "+base:"),
    ],
)
def test_a_changed_study_is_refused_with_its_difference(out, yaml_file, monkeypatch, capsys, change, removed, added):
    trainer = FakeTrainer()
    monkeypatch.setattr(runner, "_verl", lambda: contextlib.nullcontext(trainer))
    freeze(load_study(yaml_file))
    before = {path.name: path.read_bytes() for path in (out / "frozen").iterdir()}
    if "hypotheses" in change:
        written(yaml_file.parent, change["hypotheses"])
    else:
        edit(yaml_file, **change)
    assert main(["study", "run", str(yaml_file)]) == 2
    said = capsys.readouterr().err
    assert removed in said.splitlines()
    assert added in said.splitlines()
    assert "error: study is changed since its first run" in said
    assert trainer.calls == []
    assert not (out / "runs").exists()
    assert {path.name: path.read_bytes() for path in (out / "frozen").iterdir()} == before


def test_hypotheses_cannot_be_removed_or_added_later(out, yaml_file):
    study = load_study(yaml_file)
    freeze(study)
    with pytest.raises(StudyChangedError) as refused:
        check_frozen(study.changed(hypotheses=None))
    assert "-contrasts:" in refused.value.diff
    check_frozen(study.changed(minutes_per_run=3.0))  # decides nothing
    late = study.changed(out=str(out.with_name("late")))
    record = late.out / "runs" / "ppo__none__demo__s0" / "run.json"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"status": "failed"}))
    with pytest.raises(ValueError, match=r"hypotheses is new to .*late, where 1 runs have ended, ppo__none__demo__s0"):
        freeze(late)
    assert facts_of(late.out) is None


def test_a_study_without_hypotheses_is_not_frozen_and_may_grow(out):
    freeze(study_of(out))
    freeze(study_of(out, seeds=[0, 1, 2]))
    assert not out.exists()


def test_a_configuration_that_is_wrong_freezes_nothing(out, yaml_file):
    edit(yaml_file, base=["data.no_such_field=1"])
    with pytest.raises(ValueError, match="no_such_field"):
        run_study(load_study(yaml_file), train=FakeTrainer(), stream=io.StringIO())
    assert facts_of(out) is None
