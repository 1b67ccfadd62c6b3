# SPDX-License-Identifier: Apache-2.0
"""What a study's YAML may say, and what its runs' configurations become."""

import pytest
from fake import study_of

from verl_dvpo.bench.study.config import Study, load_study
from verl_dvpo.bench.study.plan import compose, plan


def test_the_matrix_is_complete_and_names_are_unique(out):
    runs = plan(study_of(out, seeds=[3, 5, 8]))
    assert len({run.name for run in runs}) == len(runs) == 2 * 2 * 1 * 3
    assert runs[0].name == "ppo__none__demo__s3"
    assert runs[-1].name == "dvpo__flip_0.3__demo__s8"
    assert {run.seed for run in runs[:4]} == {3}  # a study cut short has whole seeds


def test_a_run_gets_its_algorithm_noise_steps_and_seed_everywhere(out):
    study = study_of(out, noises=[{"kind": "flip", "rate": 0.3, "low": -1.0}], seeds=[7], algorithms=["dvpo", "grpo"])
    dvpo, grpo = (compose(run) for run in plan(study))
    assert (dvpo.noise.kind, dvpo.noise.rate, dvpo.noise.low, dvpo.noise.seed) == ("flip", 0.3, -1.0, 7)
    assert dvpo.algorithm.adv_estimator == "dvpo"
    assert (dvpo.trainer.total_training_steps, dvpo.trainer.test_freq, dvpo.trainer.save_freq) == (4, 2, -1)
    assert dvpo.data.seed == grpo.data.seed == dvpo.actor_rollout_ref.rollout.seed == 7
    assert dvpo.critic.value.head_seed == dvpo.critic.value.target_seed == dvpo.critic.fsdp.seed == 7
    assert grpo.algorithm.adv_estimator == "grpo"
    assert "value" not in grpo.critic


def test_a_variant_of_an_algorithm_has_a_name_of_its_own(out):
    study = study_of(
        out, algorithms=["dvpo", {"name": "flat", "algorithm": "dvpo", "overrides": ["critic.value.coef.risk=0"]}]
    )
    configs = {run.algorithm.name: compose(run) for run in plan(study)}
    assert configs["flat"].critic.value.coef.risk == 0
    assert configs["dvpo"].critic.value.coef.risk > 0
    assert study.reference == "dvpo"


def test_json_gives_the_study_back(out):
    study = study_of(out, minutes_per_run=2.5)
    assert Study.from_json(study.to_json()) == study


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 1.5}, "steps must be an integer, got 1.5"),
        ({"test_freq": -1}, "test_freq must be at least 1"),
        ({"seeds": []}, "seeds is empty"),
        ({"seeds": [1, 1]}, r"seeds has \['1'\] more than once"),
        ({"seeds": [-1]}, "seeds must be at least 0"),
        ({"algorithms": ["ppo", "ppo"]}, r"algorithms has \['ppo'\] more than once"),
        ({"algorithms": ["a/b"]}, "algorithms: .*'a/b' is no name"),
        ({"algorithms": [{"name": "x", "override": []}]}, r"unknown \['override'\]; allowed are"),
        ({"noises": [{"kind": "flip", "rate": 1.3}]}, r"rate must be in \[0, 1\], got 1.3 for 'flip'"),
        ({"noises": [{"kind": "flip", "rate": float("nan")}]}, r"rate must be in \[0, 1\], got nan"),
        ({"noises": [{"kind": "flip", "seed": 1}]}, "seed is the run's own"),
        ({"reference": "grpo"}, r"reference is 'grpo'; it must be one of \['ppo', 'dvpo'\]"),
        ({"minutes_per_run": 0}, "minutes_per_run must be above 0"),
        ({"stepz": 4}, r"unknown \['stepz'\]"),
        ({"base": "platform=cpu"}, "base must be a list"),
    ],
)
def test_impossible_values_are_named(out, fields, message):
    with pytest.raises(ValueError, match=message):
        study_of(out, **fields)


def test_files_that_are_no_study_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"nothing.yaml does not exist"):
        load_study(tmp_path / "nothing.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"bad.yaml is no YAML"):
        load_study(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ValueError, match=r"list.yaml: a study is a mapping"):
        load_study(tmp_path / "list.yaml")
    (tmp_path / "lacks.yaml").write_text("name: a\nsteps: 2\n")
    with pytest.raises(ValueError, match=r"lacks \['algorithms', 'noises', 'out', 'seeds', 'tasks', 'test_freq'\]"):
        load_study(tmp_path / "lacks.yaml")


@pytest.mark.parametrize(
    "fields",
    [
        {"algorithms": ["ppo", "unheard_of"]},
        {"noises": [{"kind": "unheard_of"}]},
        {"noises": [{"kind": "flip", "rate": 0.3, "unheard_of": 1}]},
        {"noises": [{"kind": "heavy_tailed", "tail": 0.1}]},
        {"base": ["critic.ppo_mini_batch_size=7"]},
    ],
)
def test_what_hydra_or_preflight_refuses_names_the_run(out, fields):
    runs = plan(study_of(out, **fields))
    with pytest.raises(ValueError, match=f"run {runs[-1].name}: "):
        compose(runs[-1])
