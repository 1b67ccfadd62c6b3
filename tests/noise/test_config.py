# SPDX-License-Identifier: Apache-2.0
"""``noise=``: every shipped file composes on the user's command line; what is wrong is said before Ray starts."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import verl_dvpo.config
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from omegaconf import DictConfig, OmegaConf

from verl_dvpo.hydra_plugin import VerlDvpoSearchPath
from verl_dvpo.noise.config import KINDS, NONE, Flip, HeavyTailed, LengthBias, check_config, noise_config

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
        # every field is in the file, with its comment above it
        lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
        for field in parsed.__dataclass_fields__:
            (at,) = [number for number, line in enumerate(lines) if line.startswith(f"  {field}:")]
            assert lines[at - 1].startswith("  #")


def test_there_is_a_file_for_every_kind_and_no_other():
    assert sorted(path.stem for path in FOLDER.glob("*.yaml")) == sorted([NONE, *KINDS])


def test_overrides_reach_the_dataclass():
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
    ({}, r"noise.kind must be one of \['none', 'flip', .*, got None"),
    ({"kind": "salt"}, "noise.kind must be one of .* got 'salt'"),
    ("flip", "noise must hold fields, got 'flip'"),
    ({"kind": "flip", "rate": 1.2}, r"noise.rate must be a finite number in \[0.0, 1.0\], got 1.2"),
    ({"kind": "flip", "rate": -0.1}, r"noise.rate .*\[0.0, 1.0\], got -0.1"),
    ({"kind": "flip", "rate": float("nan")}, r"noise.rate .*\[0.0, 1.0\], got nan"),
    ({"kind": "flip", "rate": "0.3"}, r"noise.rate must be a number in \[0.0, 1.0\], got '0.3'"),
    ({"kind": "flip", "rate": True}, r"noise.rate must be a number in \[0.0, 1.0\], got True"),
    ({"kind": "flip", "rate": None}, r"noise.rate .* got None"),
    ({"kind": "flip"}, "noise.kind=flip lacks a field: .*'rate'"),
    ({"kind": "flip", "rate": 0.1, "scale": 1.0}, "noise.scale is no field of noise.kind=flip; its fields are"),
    ({"kind": "flip", "rate": 0.1, "seed": -1}, "noise.seed must be an integer of at least 0, got -1"),
    ({"kind": "flip", "rate": 0.1, "seed": 1.5}, "noise.seed must be an integer of at least 0, got 1.5"),
    ({"kind": "flip", "rate": 0.1, "scope": "batch"}, "noise.scope must be one of .* got 'batch'"),
    ({"kind": "flip", "rate": 0.1, "low": 1.0, "high": 0.0}, "noise.low must be below noise.high, got low=1.0"),
    ({"kind": "flip", "rate": 0.1, "high": float("inf")}, "noise.high must be a finite number, got inf"),
    ({"kind": "flip_asymmetric", "false_positive": 2, "false_negative": 0}, "noise.false_positive .* got 2"),
    ({"kind": "flip_asymmetric", "false_positive": 0, "false_negative": -1}, "noise.false_negative .* got -1"),
    ({"kind": "gaussian", "scale": -0.5}, "noise.scale must be a finite number of at least 0.0, got -0.5"),
    ({"kind": "gaussian", "scale": 0.5, "rate": 7}, "noise.rate .* got 7"),
    ({"kind": "heavy_tailed", "family": "levy", "tail": 1, "scale": 1}, "noise.family must be one of .* got 'levy'"),
    ({"kind": "heavy_tailed", "family": "stable", "tail": 2.5, "scale": 1}, r"noise.tail .*\[0.5, 2.0\], got 2.5"),
    ({"kind": "heavy_tailed", "family": "student_t", "tail": 0, "scale": 1}, r"noise.tail .*\[0.5, 100.0\], got 0"),
    ({"kind": "heavy_tailed", "family": "stable", "tail": 1, "scale": -1}, "noise.scale .* got -1"),
    ({"kind": "inflation", "amount": -1.0}, "noise.amount .*at least 0.0, got -1.0"),
    ({"kind": "deflation", "amount": -1.0}, "noise.amount .*at least 0.0, got -1.0"),
    ({"kind": "length_bias", "slope": "steep", "reference": 9}, "noise.slope must be a number, got 'steep'"),
    ({"kind": "length_bias", "slope": 1.0, "reference": 0}, "noise.reference must be an integer of at least 1, got 0"),
    ({"kind": "prompt_consistent", "rate": 9}, "noise.rate .* got 9"),
    ({"kind": "prompt_consistent", "rate": 0.1, "agreement": 3}, "noise.agreement .* got 3"),
    ({"kind": "prompt_consistent", "rate": 0.1, "answer_key": ""}, "noise.answer_key must be a name, got ''"),
    ({"kind": "prompt_consistent", "rate": 0.1, "wrong_answer_key": 3}, "noise.wrong_answer_key must be a name, got 3"),
    ({"kind": "reward_model", "accuracy": 71.8}, r"noise.accuracy .*\[0.0, 1.0\], got 71.8"),
    ({"kind": "reward_model", "accuracy": 0.7, "graded": 1}, "noise.graded must be true or false, got 1"),
    ({"kind": "reward_model", "accuracy": 0.7, "scope": "run"}, "noise.scope must be one of .* got 'run'"),
    ({"kind": "dropout", "rate": 1.01}, "noise.rate .* got 1.01"),
    ({"kind": "dropout", "rate": 0.5, "withheld": "nothing"}, "noise.withheld must be a number, got 'nothing'"),
    ({"kind": "adversary", "rate": 2}, "noise.rate .* got 2"),
    ({"kind": "adversary", "rate": 0.2, "pass_rate": 1.5}, "noise.pass_rate .* got 1.5"),
    ({"kind": "adversary", "rate": 0.2, "pass_rate_key": ""}, "noise.pass_rate_key must be a name, got ''"),
]


@pytest.mark.parametrize(("settings", "said"), BAD)
def test_bad_settings_are_named(settings, said):
    with pytest.raises(ValueError, match=said):
        noise_config(settings)
    with pytest.raises(ValueError, match=said):
        check_config(OmegaConf.create({"noise": settings}))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("trainer.use_v1=false",), "trainer.use_v1=true"),
        (("reward.reward_model.enable=true",), "set reward.reward_model.enable_resource_pool=true"),
        (
            ("reward.reward_model.enable=true", "reward.reward_model.enable_resource_pool=true"),
            "without reward.custom_reward_function.path",
        ),
        (("algorithm.filter_groups.enable=true", "algorithm.filter_groups.metric=acc"), "metric='acc' stays clean"),
        (("algorithm.adv_estimator=gdpo",), "algorithm.adv_estimator=gdpo"),
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
