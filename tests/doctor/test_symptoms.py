# SPDX-License-Identifier: Apache-2.0
"""Problems planted in the curves of a healthy run are found, named, shown with their figures, and gone when mended."""

import dataclasses
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import yaml
from planted import DOTTED, STEPS, healthy, line_of, write

import verl_dvpo.doctor.distribution  # noqa: F401  (registers its symptoms)
from verl_dvpo.doctor import heads, symptoms
from verl_dvpo.doctor.lines import exit_status
from verl_dvpo.doctor.run import diagnose, report, verdict
from verl_dvpo.families.registry import family_class, family_names

RAMP = np.linspace(0.0, 1.0, STEPS)
NAN = np.where(np.arange(STEPS) < 30, 0.1, np.nan)

#: name -> what is planted, the symptom, its state, and what its line and its fix must say.
PLANTED = {
    "explained variance below zero for long": (
        {"critic/vf_explained_var": -0.2 - 0.1 * RAMP},
        ("explained variance", "problem", r"-0\.27.* steps 21 to 40 .*below 0 in 20 of 20", "trainer.critic_warmup"),
    ),
    "nothing explained": (
        {"critic/vf_explained_var": 0.01 * np.cos(np.arange(STEPS))},
        ("explained variance", "warning", r"below 0 in \d+ of 20$", "critic.optim.lr"),
    ),
    "rare extremes": (
        {
            "critic/vf_explained_var": 0.001 * np.cos(np.arange(STEPS)),
            "critic/rewards/max": np.where(np.arange(STEPS) == 25, 250.0, 5.0),
        },
        ("explained variance", "warning", r"rewards reach from 0 to 250", "algorithm.value.reward=winsorised"),
    ),
    "collapsed critic": (
        {"critic/quantile/spread": np.geomspace(0.2, 1e-4, STEPS)},
        ("spread", "problem", r"collapsed: 0\.000\d+, 0\.00\d+ of the unexplained", "critic.value.target"),
    ),
    "a flow that says so itself": (
        {"critic/quantile/spread": 0.02 * np.ones(STEPS), "critic/flow/collapsed": np.ones(STEPS)},
        ("spread", "problem", r"the flow has collapsed in 10 of 10 steps", "critic.value.coupling=calibrated"),
    ),
    "exploding spread": (
        {"critic/quantile/spread": np.geomspace(0.2, 50.0, STEPS)},
        ("spread", "problem", r"exploded: 2\d\.\d+, \d+ of the unexplained", "critic.optim.lr"),
    ),
    "crossing quantiles": (
        {"critic/quantile/crossing_fraction": 0.49 * np.ones(STEPS)},
        ("crossing", "warning", r"49% of adjacent", "critic.value.num_quantiles"),
    ),
    "identical heads": (
        {"critic/ensemble/std": 1e-9 * np.ones(STEPS)},
        ("heads", "problem", r"identical: heads differ by 1e-09", "critic.value.coef.consistency"),
    ),
    "heads far apart": (
        {"critic/ensemble/std": 2.0 * np.ones(STEPS)},
        ("heads", "warning", r"apart: heads differ by 2, 5\.\d+ of the unexplained", "critic.value.coef.consistency"),
    ),
    "saturated support": (
        {"critic/hl_gauss/out_of_support": 0.3 * np.ones(STEPS), "critic/returns/max": 5.0 * np.ones(STEPS)},
        ("support", "problem", r"30\.0% of targets", "critic.value.value_min=-1 critic.value.value_max=6"),
    ),
    "values outside the rewards": (
        {"critic/values/max": 4.0 * RAMP},
        (
            "values and rewards",
            "problem",
            r"values from .* to 4 in step 40, rewards so far from 0 to 1",
            "algorithm.lam",
        ),
    ),
    "not a number": (
        {"critic/vf_loss": NAN, "critic/grad_norm": NAN},
        ("not a number", "problem", r"critic/grad_norm is NaN .* step 31 on, in 10 of 40.*1 other", "critic.grad_clip"),
    ),
    "diverging loss": (
        {"critic/vf_loss": np.geomspace(0.05, 20.0, STEPS)},
        ("value loss", "problem", r"best 0\.06\d", "critic.optim.lr"),
    ),
    "no gradient": (
        {"critic/grad_norm": np.zeros(STEPS)},
        ("learning", "problem", r"gradient 0 in steps 31 to 40", "critic.value.head_from=seed"),
    ),
    "learning rate 0": (
        {"critic/lr": np.zeros(STEPS)},
        ("learning", "problem", r"learning rate 0$", "critic.optim.lr"),
    ),
    "one value for all tokens": (
        {name: 0.5 * np.ones(STEPS) for name in ("critic/values/min", "critic/values/max")},
        ("one value for all", "problem", r"values differ by 0, 0 of", "critic.value.head_width"),
    ),
    "rewards that stop to vary": (
        {"critic/rewards/max": np.geomspace(1.0, 1e-3, STEPS), "critic/rewards/mean": np.geomspace(0.5, 5e-4, STEPS)},
        (
            "rewards",
            "warning",
            r"spread of rewards 0\.00\d+ in steps 31 to 40, 0\.\d+ in steps 1 to 10",
            "data.train_files",
        ),
    ),
    "clipped values": (
        {"critic/vf_clipfrac": 0.6 * np.ones(STEPS)},
        ("value clipping", "warning", r"60% of values", "critic.cliprange_value"),
    ),
    "old answers, as our trainers count": (
        {"critic/staleness/mean": 5.0 * np.ones(STEPS)},
        ("staleness", "warning", r"5 versions", "max_off_policy_threshold"),
    ),
    "old answers": (
        {"training/off_policy/trajectory_staleness/mean": 7.0 * np.ones(STEPS)},
        ("staleness", "warning", r"7 versions", "max_off_policy_threshold"),
    ),
}


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_problem_is_found_named_and_shown(case, tmp_path):
    planted, (name, state, text, fix) = PLANTED[case]
    curves = healthy()
    run, lines = diagnose(write(tmp_path / "ill", curves | planted))
    (found,) = [line for line in lines if line.name == name]
    assert found.state == state, found
    assert re.search(text, found.text), found.text
    assert fix in found.fix
    assert found.picture
    assert exit_status(lines) == int(state == "problem")
    shown = report(run, lines)
    assert name in shown
    said = "the critic is ill: " if state == "problem" else "no problem, but look at "
    assert shown.splitlines()[-1].startswith(said)
    kept = curves | {key: curves[key] for key in planted if key in curves}
    assert line_of(write(tmp_path / "mended", kept), name).state == "ok"


def test_a_healthy_run_is_said_to_be_healthy_with_its_figures(tmp_path):
    run, lines = diagnose(write(tmp_path, healthy()))
    assert {line.state for line in lines} == {"ok"}
    assert len(lines) == len(symptoms.SYMPTOMS)
    said = verdict(run, lines)
    assert re.fullmatch(
        r"the critic is healthy: explained variance 0\.3\d*, value loss 0\.06\d*, 0 problems, 0 warnings, 13 ok", said
    )


def test_a_critic_that_starts_badly_and_recovers_is_healthy(tmp_path):
    """The first steps of a run say nothing: everything is wrong in them."""
    start = np.arange(STEPS) < 12
    bad = {"critic/vf_explained_var": -20.0, "critic/vf_loss": 90.0, "critic/quantile/spread": 30.0}
    curves = healthy()
    curves |= {name: np.where(start, value, curves[name]) for name, value in bad.items()}
    _, lines = diagnose(write(tmp_path, curves))
    assert {line.state for line in lines} == {"ok"}


def test_noise_around_zero_is_no_negative_explained_variance(tmp_path):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        curves = healthy() | {"critic/vf_explained_var": 0.03 * rng.normal(size=STEPS)}
        assert line_of(write(tmp_path, curves), "explained variance").state == "warning"


def test_a_loss_that_rises_with_wilder_rewards_has_not_diverged(tmp_path):
    """Rewards ten times as wide make a squared error a hundred times as large."""
    wide = np.linspace(1.0, 10.0, STEPS)
    scaled = {name: healthy()[name] * wide for name in ("critic/rewards/max", "critic/rewards/mean")}
    grown = scaled | {"critic/vf_loss": 0.06 * wide**2}
    assert line_of(write(tmp_path / "wild", healthy() | grown), "value loss").state == "ok"
    tame = healthy() | {"critic/vf_loss": 0.06 * wide**2}
    assert line_of(write(tmp_path / "tame", tame), "value loss").state == "problem"


def test_where_rewards_do_not_vary_only_that_is_said(tmp_path):
    """Explained variance is then some rounding over a guard of 1e-5, and hugely negative."""
    ill = {f"critic/rewards/{end}": np.zeros(STEPS) for end in ("min", "mean", "max")}
    _, lines = diagnose(write(tmp_path, healthy() | ill | {"critic/vf_explained_var": -50.0 * np.ones(STEPS)}))
    found = {line.name: line.state for line in lines}
    assert found["rewards"] == "warning"
    assert "explained variance" not in found
    assert "spread" not in found


def test_a_run_of_verls_own_ppo_is_judged_by_what_it_logs(tmp_path):
    """What verl's value loss and its data metrics log, and nothing of ours."""
    ours = ("quantile", "ensemble", "hl_gauss")
    plain = {name: curve for name, curve in healthy().items() if not any(part in name for part in ours)}
    run, lines = diagnose(write(tmp_path / "plain", plain))
    names = {line.name for line in lines}
    assert names == set(symptoms.SYMPTOMS) - {"spread", "crossing", "heads", "support"}
    assert verdict(run, lines).startswith("the critic is healthy")
    ill = plain | {"critic/vf_explained_var": -np.ones(STEPS)}
    assert line_of(write(tmp_path / "ill", ill), "explained variance").state == "problem"


def test_a_run_without_a_critic_has_no_verdict(tmp_path):
    rewards = {name: curve for name, curve in healthy().items() if "rewards" in name}
    run, lines = diagnose(write(tmp_path, rewards))
    assert not lines
    assert "no critic" in verdict(run, lines)


def test_every_setting_of_a_remedy_exists():
    """In verl's configuration, in ours, or among a family's settings; a metric is logged by verl."""
    folder = Path(find_spec("verl").submodule_search_locations[0]) / "trainer" / "config"
    known = yaml.safe_load((folder / "_generated_ppo_trainer.yaml").read_text())
    ours = Path(__file__).parents[2] / "config"
    known["algorithm"] |= yaml.safe_load((ours / "algorithm" / "_with_critic.yaml").read_text())["algorithm"]
    known["critic"]["fsdp"] |= yaml.safe_load((ours / "platform" / "cpu.yaml").read_text())["critic"]["fsdp"]
    settings = {f.name for name in family_names() for f in dataclasses.fields(family_class(name).Config)}
    texts = [each.remedy for each in symptoms.SYMPTOMS.values()] + [symptoms.EXTREMES_REMEDY, heads.REMEDY]
    named = {name for text in texts for name in re.findall(DOTTED, text)}
    assert len(named) > 15
    for name in named:
        if name.startswith("critic.value."):
            assert name.split(".")[2] in settings, name
            continue
        place = known
        for part in name.split("."):
            assert part in place, name
            place = place[part]
