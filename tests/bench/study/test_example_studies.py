# SPDX-License-Identifier: Apache-2.0
"""Every study that ships is read, and its runs compose."""

from pathlib import Path

import pytest

from verl_dvpo.bench.study.config import load_study
from verl_dvpo.bench.study.plan import compose, plan

STUDIES = sorted((Path(__file__).parents[3] / "examples" / "studies").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _domains_folder(tmp_path, monkeypatch):
    for name in ("arithmetic", "science", "dialogue"):
        (tmp_path / name).mkdir()
        for part in ("train", "val", "shifted"):
            (tmp_path / name / f"{part}.parquet").touch()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}')
    monkeypatch.setenv("VERL_DVPO_DOMAINS_DIR", str(tmp_path))


RUNS = {"families": 9, "first": 42, "smoke": 8}


@pytest.mark.parametrize(("path", "runs"), [(path, RUNS[path.stem]) for path in STUDIES])
def test_every_run_of_a_shipped_study_composes(path, runs):
    study = load_study(path)
    planned = plan(study)
    assert len(planned) == runs
    one_of_each = {(run.algorithm.name, run.noise.name, run.task.name): run for run in planned}
    for run in one_of_each.values():
        config = compose(run)
        assert config.noise.kind == run.noise.kind
        assert config.trainer.total_training_steps == study.steps


def test_the_first_study_is_the_one_that_was_announced():
    study = load_study(next(path for path in STUDIES if path.stem == "first"))
    assert [each.name for each in study.algorithms] == [
        "ppo", "grpo", "ppo_ensemble", "robust_bellman", "dvpo", "dvpo_calibrated", "dfpo"
    ]  # fmt: skip
    assert [(noise.kind, noise.rate) for noise in study.noises] == [("none", 0.0), ("flip", 0.3)]
    assert [task.name for task in study.tasks] == ["arithmetic"]
    assert len(study.seeds) == 3
