# SPDX-License-Identifier: Apache-2.0
"""Tests of ``noise.*``: shipped files compose on the user's command line; faults are named before Ray starts."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from omegaconf import DictConfig, OmegaConf

import verl_dvpo.config
from verl_dvpo.hydra_plugin import VerlDvpoSearchPath
from verl_dvpo.noise.base import Correction, NoiseConfig, Where
from verl_dvpo.noise.config import check_config, noise_config
from verl_dvpo.noise.kinds import KINDS, NONE, Flip, HeavyTailed, LengthBias

FOLDER = Path(verl_dvpo.config.__file__).parent / "noise"


@functools.cache
def composed(*overrides: str) -> DictConfig:
    """verl's own primary config with overrides, as main_ppo composes it."""
    Plugins.instance().register(VerlDvpoSearchPath)
    GlobalHydra.instance().clear()
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", list(overrides))


@pytest.mark.parametrize("name", [NONE, *KINDS])
def test_every_shipped_file_composes_and_parses(name: str):
    config = composed(f"+noise={name}")
    check_config(config)
    parsed = noise_config(config.noise)
    assert type(parsed) is KINDS.get(name, type(None))
    if parsed is not None:
        every_field_has_a_comment(
            FOLDER / f"{name}.yaml", set(KINDS[name].model_fields) - set(NoiseConfig.model_fields)
        )


def test_every_shared_field_is_in_the_shared_file():
    every_field_has_a_comment(FOLDER / "_base.yaml", set(NoiseConfig.model_fields))
    every_field_has_a_comment(FOLDER / "_base.yaml", {*Where.model_fields, *Correction.model_fields}, indent=4)


def every_field_has_a_comment(file: Path, fields: set[str], indent: int = 2) -> None:
    lines = file.read_text().splitlines()
    for field in fields:
        (at,) = [number for number, line in enumerate(lines) if line.startswith(f"{' ' * indent}{field}:")]
        assert lines[at - 1].startswith(f"{' ' * indent}#")


def test_there_is_a_file_for_every_kind_and_no_other():
    assert sorted(path.stem for path in FOLDER.glob("[!_]*.yaml")) == sorted([NONE, *KINDS])


def test_overrides_reach_the_model():
    assert noise_config(composed("+noise=flip", "noise.rate=0.8", "noise.seed=3").noise) == Flip(rate=0.8, seed=3)
    config = composed("+noise=heavy_tailed", "noise.family=stable", "noise.tail=2")
    assert noise_config(config.noise) == HeavyTailed(family="stable", tail=2, scale=0.5)
    config = composed("+noise=length_bias", "data.max_response_length=640", "noise.slope=-1")
    assert noise_config(config.noise) == LengthBias(slope=-1, reference=640)


def test_the_users_reward_settings_are_left_as_they_are():
    overrides = (
        "reward.custom_reward_function.path=mine.py",
        "reward.custom_reward_function.name=score",
        "+reward.custom_reward_function.reward_kwargs={a: 1}",
        "reward.reward_manager.name=dapo",
    )
    assert composed("+noise=flip", *overrides).reward == composed(*overrides).reward


def test_no_noise_is_no_noise():
    assert noise_config(None) is None
    assert noise_config({"kind": "none"}) is None
    assert noise_config(composed().get("noise")) is None


BAD = [
    ({}, r"noise.kind is None; it must be one of \['none', 'flip', .*; choose one with noise=NAME"),
    ({"kind": "salt"}, "noise.kind is 'salt'; it must be one of "),
    ("flip", "noise is 'flip'; it must hold fields"),
    ({"kind": "none", "rate": 0.1}, "noise.rate is 0.1; noise.kind=none has no such field"),
    (
        {"kind": "flip", "rate": 1.2},
        r"noise.rate is 1.2; it must be a number in \[0, 1\]; config/noise/flip.yaml explains it",
    ),
    ({"kind": "flip", "rate": -0.1}, r"noise.rate is -0.1; it must be a number in \[0, 1\]"),
    ({"kind": "flip", "rate": float("nan")}, r"noise.rate is nan; it must be a number in \[0, 1\]"),
    ({"kind": "flip", "rate": "0.3"}, r"noise.rate is '0.3'; it must be a number in \[0, 1\]"),
    ({"kind": "flip", "rate": True}, r"noise.rate is True; it must be a number in \[0, 1\]"),
    ({"kind": "flip", "rate": None}, r"noise.rate is None; it must be a number in \[0, 1\]"),
    ({"kind": "flip"}, r"noise.rate is missing; it must be a number in \[0, 1\]; set it, or .* noise=flip"),
    ({"kind": "flip", "rate": 0.1, "scale": 1.0}, "noise.scale is 1.0; noise.kind=flip has no such field; .*'rate'"),
    ({"kind": "flip", "rate": 0.1, "seed": -1}, "noise.seed is -1; it must be an integer of at least 0"),
    ({"kind": "flip", "rate": 0.1, "seed": 1.5}, "noise.seed is 1.5; it must be an integer of at least 0"),
    ({"kind": "flip", "rate": 0.1, "scope": "batch"}, "noise.scope is 'batch'; it must be one of 'sample', "),
    ({"kind": "flip", "rate": 0.1, "low": 1.0, "high": 0.0}, "noise.high is 0.0; it must be above noise.low, .* 1.0;"),
    ({"kind": "flip", "rate": 0.1, "low": 1.0}, "noise.high is 1.0; it must be above noise.low, which is 1.0"),
    ({"kind": "flip", "rate": 0.1, "low": 2.0}, "noise.high is 1.0; it must be above noise.low, which is 2.0"),
    ({"kind": "flip", "rate": 0.1, "high": float("inf")}, "noise.high is inf; it must be a finite number"),
    ({"kind": "flip_asymmetric", "false_positive": 2, "false_negative": 0}, "noise.false_positive is 2; "),
    ({"kind": "flip_asymmetric", "false_positive": 0, "false_negative": -1}, "noise.false_negative is -1; "),
    ({"kind": "gaussian", "scale": -0.5}, "noise.scale is -0.5; it must be a finite number of at least 0"),
    ({"kind": "gaussian", "scale": 0.5, "rate": 7}, "noise.rate is 7; "),
    ({"kind": "heavy_tailed", "family": "levy", "tail": 1, "scale": 1}, "noise.family is 'levy'; it must be one of"),
    (
        {"kind": "heavy_tailed", "family": "stable", "tail": 2.5, "scale": 1},
        r"noise.tail is 2.5; it must be a number in \[0.5, 2\] with noise.family=stable",
    ),
    ({"kind": "heavy_tailed", "family": "student_t", "tail": 0, "scale": 1}, r"noise.tail is 0; .*\[0.5, 100\]"),
    ({"kind": "heavy_tailed", "family": "stable", "tail": 1, "scale": -1}, "noise.scale is -1; "),
    ({"kind": "inflation", "amount": -1.0}, "noise.amount is -1.0; .*at least 0"),
    ({"kind": "deflation", "amount": -1.0}, "noise.amount is -1.0; .*at least 0"),
    ({"kind": "length_bias", "slope": "steep", "reference": 9}, "noise.slope is 'steep'; it must be a finite number"),
    (
        {"kind": "length_bias", "slope": 1.0, "reference": 0},
        "noise.reference is 0; it must be an integer of at least 1",
    ),
    ({"kind": "prompt_consistent", "rate": 9}, "noise.rate is 9; "),
    ({"kind": "prompt_consistent", "rate": 0.1, "agreement": 3}, "noise.agreement is 3; "),
    ({"kind": "prompt_consistent", "rate": 0.1, "answer_key": ""}, "noise.answer_key is ''; it must be a name"),
    ({"kind": "prompt_consistent", "rate": 0.1, "wrong_answer_key": 3}, "noise.wrong_answer_key is 3; .* or null"),
    ({"kind": "reward_model", "accuracy": 71.8}, r"noise.accuracy is 71.8; it must be a number in \[0, 1\]"),
    ({"kind": "reward_model", "accuracy": 0.7, "graded": 1}, "noise.graded is 1; it must be true or false"),
    ({"kind": "reward_model", "accuracy": 0.7, "scope": "run"}, "noise.scope is 'run'; it must be one of"),
    ({"kind": "dropout", "rate": 1.01}, "noise.rate is 1.01; "),
    (
        {"kind": "dropout", "rate": 0.5, "withheld": "nothing"},
        "noise.withheld is 'nothing'; it must be a finite number",
    ),
    ({"kind": "adversary", "rate": 2}, "noise.rate is 2; "),
    ({"kind": "adversary", "rate": 0.2, "pass_rate": 1.5}, "noise.pass_rate is 1.5; "),
    ({"kind": "adversary", "rate": 0.2, "pass_rate_key": ""}, "noise.pass_rate_key is ''; it must be a name"),
]


@pytest.mark.parametrize(("settings", "said"), BAD)
def test_bad_settings_are_named(settings, said):
    with pytest.raises(ValueError, match=said) as caught:
        noise_config(settings)
    assert type(caught.value) is ValueError
    assert len(str(caught.value).splitlines()) == 1, "one line, none of pydantic's"
    with pytest.raises(ValueError, match=said):
        check_config(OmegaConf.create({"noise": settings}))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("trainer.use_v1=false",), "trainer.use_v1 is False; .* set trainer.use_v1=true"),
        (("reward.reward_model.enable=true",), "set reward.reward_model.enable_resource_pool=true"),
        (
            ("reward.reward_model.enable=true", "reward.reward_model.enable_resource_pool=true"),
            "reward.custom_reward_function.path is None; it must name a file",
        ),
        (
            ("algorithm.filter_groups.enable=true", "algorithm.filter_groups.metric=acc"),
            "metric is 'acc'; it must be 'reward' or 'score'",
        ),
        (("algorithm.adv_estimator=gdpo",), "algorithm.adv_estimator is 'gdpo'"),
    ],
)
def test_runs_that_would_not_honour_the_noise_are_refused(overrides, said):
    check_config(composed("+noise=none", *overrides))
    check_config(composed(*overrides))
    with pytest.raises(ValueError, match=said):
        check_config(composed("+noise=flip", *overrides))


def test_runs_that_look_alike_and_honour_it_are_not():
    check_config(
        composed("+noise=flip", "algorithm.filter_groups.enable=true", "algorithm.filter_groups.metric=reward")
    )
    pool = ("reward.reward_model.enable=true", "reward.reward_model.enable_resource_pool=true")
    check_config(composed("+noise=flip", "reward.custom_reward_function.path=mine.py", *pool))


def test_main_ppo_composes_it_from_another_directory(tmp_path: Path):
    overrides = ["+noise=flip", "noise.rate=0.6", "reward.custom_reward_function.path=mine.py"]
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *overrides, "--cfg", "job"]
    done = subprocess.run(command, cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, check=True)
    printed = OmegaConf.create(done.stdout)
    assert noise_config(printed.noise) == Flip(rate=0.6)
    assert printed.reward.custom_reward_function.path == "mine.py"
