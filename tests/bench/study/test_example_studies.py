# SPDX-License-Identifier: Apache-2.0
"""Every study that ships is read, and its runs compose."""

from pathlib import Path

import pytest

from verl_dvpo.bench.study.config import load_study
from verl_dvpo.bench.study.plan import Run, compose, plan

FILES = sorted((Path(__file__).parents[3] / "examples" / "studies").glob("*.yaml"))
STUDIES = [path for path in FILES if not path.stem.endswith(".hypotheses")]


@pytest.fixture(autouse=True)
def _folders(tmp_path, monkeypatch):
    """Makes what the studies expect on disk: the domains' folder, the exam's, and pretrained critics."""

    def model(folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text('{"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}')

    for name in ("arithmetic", "science", "dialogue", "exam"):
        (tmp_path / name).mkdir()
        for part in ("train", "val", "shifted"):
            (tmp_path / name / f"{part}.parquet").touch()
    critics = ["exam/critic", "demo/critic"]
    critics += [f"exam/{place}/{kind}" for place in FITTED for kind in KINDS]
    for folder in (tmp_path / "model", tmp_path / "exam" / "model", *(tmp_path / "runs" / name for name in critics)):
        model(folder)
    monkeypatch.setenv("VERL_DVPO_DOMAINS_DIR", str(tmp_path))
    monkeypatch.setenv("VERL_DVPO_EXAM_DIR", str(tmp_path / "exam"))
    monkeypatch.chdir(tmp_path)


#: Folders of `fit_exam_critics.sh`, and what is in them.
KINDS = ("quantiles", "variance", "variance_last", "scalar", "huber")
FITTED = ("critics", "critics_cauchy", "critics_outliers", "critics_preference", "critics_mixed")
#: reference: 15 seeds of 32 + 18 + 12 arms.
RUNS = {
    "families": 9,
    "first": 42,
    "first_steps": 9,
    "known_noise_pilot": 9,
    "known_noise_pilot_cauchy": 5,
    "outliers": 5 * 8,
    "mixed": 12 * 6,
    "mixed_pilot": 4,
    "outliers_pilot": 8,
    "preference_pilot": 10,
    "pretrained": 16,
    "reference": 15 * 62,
    "smoke": 8,
    "weights": 12 * 11,
}


def some_of_each(runs: list[Run]) -> list[Run]:
    """Runs that have every algorithm, noise and task of `runs` at least once."""
    seen: set[tuple[int, str]] = set()
    chosen = []
    for run in runs:
        if not seen.issuperset(enumerate(run.arm)):
            seen.update(enumerate(run.arm))
            chosen.append(run)
    return chosen


@pytest.mark.parametrize(("path", "runs"), [(path, RUNS[path.stem]) for path in STUDIES])
def test_every_run_of_a_shipped_study_composes(path, runs):
    study = load_study(path)
    planned = plan(study)
    assert len(planned) == runs
    for run in some_of_each(planned):
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


def test_the_reference_study_asks_first_what_the_issue_names():
    study = load_study(next(path for path in STUDIES if path.stem == "reference"))
    primary = {(each.treatment, each.control) for each in study.hypotheses.primary}
    controls = ("ppo", "ppo_gaussian_weighted", "reinforce_plus_plus")
    assert primary == {("dvpo_weighted", control) for control in controls}
    assert {(each.noises, each.tasks) for each in study.hypotheses.primary} == {(("heavy_prompt",), ("one_answer",))}
    heavy = compose(next(run for run in plan(study) if run.arm == ("dvpo_weighted", "heavy_prompt", "one_answer")))
    assert (heavy.noise.kind, heavy.noise.where.prompt_matches) == ("heavy_tailed", "^[5-9]")
    assert heavy.actor_rollout_ref.rollout.n == 1
