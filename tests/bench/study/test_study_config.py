# SPDX-License-Identifier: Apache-2.0
"""What a study's YAML may say, and what its runs' configurations become."""

import pytest
from fake import study_of

from verl_dvpo.bench.study.config import load_study, parse_study
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
    assert parse_study(study.to_json()) == study


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps is 0; allowed is greater than or equal to 1; correct it"),
        ({"steps": 1.5}, "steps is 1.5; allowed is a valid integer; correct it"),
        ({"steps": True}, "steps is True; allowed is a valid integer; correct it"),
        ({"test_freq": -1}, "test_freq is -1; allowed is greater than or equal to 1; correct it"),
        ({"seeds": []}, "seeds is []; at least 1 entry is required; correct it"),
        (
            {"seeds": [1, 1]},
            "seeds is [1, 1]; each may stand once, but ['1'] are repeated; give variants a name of their own",
        ),
        ({"seeds": [0, -1]}, "seeds[1] is -1; allowed is greater than or equal to 0; correct it"),
        (
            {"algorithms": ["ppo", "ppo"]},
            "algorithms is ['ppo', 'ppo']; each may stand once, but ['ppo'] are repeated; give variants a name of "
            "their own",
        ),
        (
            {"algorithms": [{"name": "a/b", "algorithm": "ppo"}]},
            "algorithms[0].name is 'a/b'; letters, digits and _ . + - are allowed, a letter or digit first; rename it",
        ),
        (
            {"algorithms": [{"name": "x", "override": []}]},
            "algorithms[0].override is []; there is no such field, allowed are algorithm, name, overrides; rename or "
            "remove it",
        ),
        ({"algorithms": [5]}, "algorithms[0] is 5; a name or a mapping of fields is allowed; write one of them"),
        (
            {"noises": [{"kind": "flip", "rate": 1.3}]},
            "noises[0].rate is 1.3; a number in [0, 1] is allowed; correct it",
        ),
        (
            {"noises": [{"kind": "flip", "rate": float("nan")}]},
            "noises[0].rate is nan; a number in [0, 1] is allowed; correct it",
        ),
        (
            {"noises": [{"kind": "flip", "rate": None}]},
            "noises[0] is {'kind': 'flip', 'rate': None}; a rate is a number in [0, 1]; correct or remove it",
        ),
        (
            {"noises": [{"kind": "flip", "seed": 1}]},
            "noises[0] is {'kind': 'flip', 'seed': 1}; the seed of a noise is the run's own; remove seed",
        ),
        ({"reference": "grpo"}, "reference is 'grpo'; allowed are ppo, dvpo; choose one of them"),
        ({"minutes_per_run": 0}, "minutes_per_run is 0; allowed is greater than 0; correct it"),
        (
            {"stepz": 4},
            "stepz is 4; there is no such field, allowed are algorithms, arms, base, hypotheses, minutes_per_run, "
            "name, noises, out, reference, same_head, seeds, steps, tasks, test_freq, tuning; rename or remove it",
        ),
        ({"base": "platform=cpu"}, "base is 'platform=cpu'; allowed is a valid list; correct it"),
        (
            {"steps": 0, "test_freq": 0},
            "steps is 0; allowed is greater than or equal to 1; correct it"
            " | test_freq is 0; allowed is greater than or equal to 1; correct it",
        ),
    ],
)
def test_impossible_values_are_named(out, fields, message):
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - the whole message is compared
        study_of(out, **fields)
    assert str(refused.value) == message


def test_files_that_are_no_study_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"study is '.*nothing.yaml'; .* does not exist; correct the path"):
        load_study(tmp_path / "nothing.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"study is '.*bad.yaml'; a YAML file is allowed; correct its syntax"):
        load_study(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ValueError, match=r"list.yaml: study is \['a'\]; a mapping of fields is allowed"):
        load_study(tmp_path / "list.yaml")
    (tmp_path / "lacks.yaml").write_text("name: a\nsteps: 2\n")
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - every missing field is looked for
        load_study(tmp_path / "lacks.yaml")
    for field in ("algorithms", "noises", "out", "seeds", "tasks", "test_freq"):
        assert f"{field} is missing; a value is required; add it" in str(refused.value)


def test_the_settings_of_a_noise_keep_their_order_and_their_values(out):
    noise = {"rate": 1, "low": -1.0, "kind": "flip", "name": "all"}
    (first,) = study_of(out, noises=[noise]).noises
    assert (first.name, first.kind, first.rate) == ("all", "flip", 1.0)
    assert first.selection == ("noise=flip", "noise.rate=1", "noise.low=-1.0")
    names = [each.name for each in study_of(out, noises=["none", "flip", {"kind": "flip", "rate": 0.25}]).noises]
    assert names == ["none", "flip", "flip_0.25"]


def test_a_changed_study_is_checked_again(out):
    study = study_of(out)
    assert study.changed(reference="dvpo").reference == "dvpo"
    with pytest.raises(ValueError, match="reference is 'sac'; allowed are ppo, dvpo; choose one of them"):
        study.changed(reference="sac")


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
