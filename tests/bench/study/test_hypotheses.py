# SPDX-License-Identifier: Apache-2.0
"""What a hypotheses file may say, and which arms a study then has."""

import pytest
import yaml
from fake import study_of
from registered import contrast_of, hypotheses_of, registered, written

from verl_dvpo.bench.study.config import load_study, parse_study
from verl_dvpo.bench.study.plan import plan


def arms(study) -> list[str]:
    return sorted({"/".join(run.arm) for run in plan(study)})


def test_the_matrix_shrinks_to_what_contrasts_need(out):
    study = registered(out, algorithms=["ppo", "dvpo", "grpo"])
    assert arms(study) == ["dvpo/flip_0.3/demo", "ppo/flip_0.3/demo"]
    assert [run.seed for run in plan(study)] == [4, 4, 0, 0, 1, 1, 2, 2, 3, 3, 5, 5]  # seed-major, in the given order
    both = registered(out, contrast_of(noises=["none", "flip_0.3"]))
    assert len(plan(both)) == 2 * 2 * 6


def test_arms_restrict_a_study_without_hypotheses_too(out):
    study = study_of(out, arms=[{"algorithms": ["ppo"]}, {"algorithms": ["dvpo"], "noises": ["none"]}])
    assert arms(study) == ["dvpo/none/demo", "ppo/flip_0.3/demo", "ppo/none/demo"]
    assert len(plan(study)) == 3 * 2
    assert len(plan(study_of(out))) == 2 * 2 * 2


def test_a_file_beside_the_study_is_read_and_kept(out, tmp_path):
    written(tmp_path, hypotheses_of())
    content = study_of(out, seeds=[0, 1, 2, 3, 4, 5]).to_json() | {"hypotheses": "small.hypotheses.yaml"}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
    study = load_study(tmp_path / "study.yaml")
    assert study.hypotheses.file == tmp_path / "small.hypotheses.yaml"
    assert study.hypotheses.stopping.max_seeds == 6
    assert study.hypotheses.contrasts[0].bound == 0.02
    assert parse_study(study.to_json()) == study
    content["hypotheses"] = "nowhere.yaml"
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=r"hypotheses is '.*nowhere.yaml'; a YAML file is allowed, this one does not"):
        load_study(tmp_path / "study.yaml")


@pytest.mark.parametrize(
    ("contrast", "stopping", "message"),
    [
        ({"direction": "better"}, {}, "contrasts[0].direction is 'better'; allowed is 'higher' or 'lower'; correct it"),
        ({"bound": 0.0}, {}, "contrasts[0].bound is 0.0; allowed is greater than 0; correct it"),
        ({"bound": float("nan")}, {}, "contrasts[0].bound is nan; allowed is a finite number; correct it"),
        ({"noises": []}, {}, "contrasts[0].noises is []; at least 1 entry is required; correct it"),
        ({"control": "dvpo"}, {}, "contrasts[0].control is 'dvpo'; another algorithm than the treatment is allowed;"),
        ({"expected": -0.1}, {}, "contrasts[0].expected is -0.1; a number above 0 is allowed with direction=higher;"),
        ({"last_validations": 0}, {}, "contrasts[0].last_validations is 0; allowed is greater than or equal to 1;"),
        ({"prio": 1}, {}, "contrasts[0].prio is 1; there is no such field, allowed are bound, control, direction,"),
        ({}, {"min_seeds": 2}, "stopping.min_seeds is 2; allowed is greater than or equal to 3; correct it"),
        ({}, {"max_seeds": 2}, "stopping.max_seeds is 2; an integer of at least min_seeds=3 is allowed; raise it"),
        ({}, {"budget_hours": 0.0}, "stopping.budget_hours is 0.0; allowed is greater than 0; correct it"),
    ],
)
def test_impossible_fields_are_named(out, tmp_path, contrast, stopping, message):
    path = written(tmp_path, hypotheses_of(contrast_of(**contrast), **stopping))
    with pytest.raises(ValueError, match=r"small.hypotheses.yaml: ") as refused:
        study_of(out, hypotheses=str(path))
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"hypotheses": hypotheses_of(contrast_of(treatment="grpo"))},
            "hypotheses.contrasts[0].treatment is 'grpo'; allowed are ppo, dvpo; choose one of them",
        ),
        (
            {"hypotheses": hypotheses_of(contrast_of(noises=["flip"]))},
            "hypotheses.contrasts[0].noises is 'flip'; allowed are none, flip_0.3; choose one of them",
        ),
        (
            {"seeds": [0, 1, 2]},
            "seeds is [0, 1, 2]; at least 6 are required by hypotheses.stopping.max_seeds; add some",
        ),
        (
            {"arms": [{"algorithms": ["ppo"]}]},
            "arms is without dvpo/flip_0.3/demo; every arm of a contrast is required, dvpo_over_ppo needs them; add "
            "them, or remove arms",
        ),
        (
            {"hypotheses": hypotheses_of(contrast_of(last_validations=3))},
            "hypotheses.contrasts[0].last_validations is 3; at most 2 are allowed with steps=4 and test_freq=2; lower",
        ),
        ({"arms": [{"tasks": ["demos"]}]}, "arms[0].tasks is 'demos'; allowed are demo; choose one of them"),
        ({"tuning": {"grpo": {"settings": 3, "how": "x"}}}, "tuning is 'grpo'; allowed are ppo, dvpo; choose one of"),
        ({"tuning": {"ppo": {"settings": 0, "how": "x"}}}, "tuning.ppo.settings is 0; allowed is greater than or"),
    ],
)
def test_what_no_axis_has_is_named(out, fields, message):
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - the message is compared below
        registered(out, **fields)
    assert str(refused.value).startswith(message)


def test_a_test_that_no_number_of_seeds_can_pass_is_refused(out, tmp_path):
    """Three primary contrasts, 7 pairs: 3 * 2 / 2^7 = 0.047 passes 0.05, 6 pairs give 0.094."""
    names = [contrast_of(name=f"c{number}") for number in range(3)]
    hypotheses = hypotheses_of(*names) | {"verdict": {"by": "interval_and_test"}}
    with pytest.raises(ValueError, match=r"stopping.max_seeds is 6; at least 7 are required by verdict.alpha=0.05"):
        study_of(out, hypotheses=str(written(tmp_path, hypotheses)), seeds=list(range(9)))
    hypotheses["stopping"]["max_seeds"] = 7
    assert study_of(out, hypotheses=str(written(tmp_path, hypotheses)), seeds=list(range(9))).hypotheses
