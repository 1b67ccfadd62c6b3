# SPDX-License-Identifier: Apache-2.0
"""Heads of different width in a study: refused where it is asked for, reported where not."""

import pytest
from fake import FakeTrainer, study_of

from verl_dvpo.bench.study.report import write_report
from verl_dvpo.bench.study.runner import run_study

#: dfpo ships with a hidden layer of 256, grpo has no critic.
MIXED = {"algorithms": ["ppo", "grpo", "dfpo"], "noises": ["none"], "seeds": [0]}


def test_heads_of_different_width_are_refused_before_anything_runs(tmp_path):
    trainer = FakeTrainer()
    with pytest.raises(ValueError, match=r"same_head is True; .* these are ppo linear, dfpo 256; set"):
        run_study(study_of(tmp_path / "study", **MIXED, same_head=True), train=trainer)
    assert trainer.calls == []
    assert not (tmp_path / "study").exists()


def test_the_same_width_for_all_runs_and_the_report_says_nothing(tmp_path):
    wide = {"name": "ppo", "overrides": ["critic.value.head_width=256"]}
    study = study_of(tmp_path / "study", **{**MIXED, "algorithms": [wide, "dfpo"]}, same_head=True)
    assert run_study(study, train=FakeTrainer()) == []
    assert "width of their heads" not in (write_report(study.out) / "report.md").read_text()


def test_the_report_says_which_heads_differ(tmp_path):
    study = study_of(tmp_path / "study", **{**MIXED, "algorithms": ["ppo", "dfpo"]})
    run_study(study, train=FakeTrainer(fail=("ppo__none__demo__s0",)))
    text = (write_report(study.out) / "report.md").read_text()
    assert "**Critics differ in the width of their heads: ppo linear, dfpo 256.**" in text
