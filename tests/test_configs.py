# SPDX-License-Identifier: Apache-2.0
"""Every YAML that ships composes, from another directory, into configurations that verl and we accept."""

import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

import verl_dvpo.plugin  # noqa: F401  (puts verl_dvpo.config on the search path)
from verl_dvpo import preflight
from verl_dvpo.critic.config import family_config
from verl_dvpo.distributional.advantage_config import AdvantageConfig
from verl_dvpo.estimator import advantage_config
from verl_dvpo.families.base import FamilyConfig
from verl_dvpo.families.registry import build_family, family_names

CONFIG = Path(__file__).parent.parent / "config"


def names(group: str) -> list[str]:
    return sorted(file.stem for file in (CONFIG / group).glob("[!_]*.yaml"))


def compose_config(name: str, *overrides: str) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose(name, overrides=list(overrides))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def family_of(config: DictConfig) -> FamilyConfig:
    settings = OmegaConf.to_container(config.critic.value, resolve=True)
    return family_config(**{name: value for name, value in settings.items() if name != "_target_"})


@pytest.mark.parametrize("platform", names("platform"))
@pytest.mark.parametrize("algorithm", names("algorithm"))
def test_every_algorithm_composes_on_every_platform(algorithm, platform):
    config = compose_config("dvpo_trainer", f"algorithm={algorithm}", f"platform={platform}", "+task=demo")
    assert config.trainer.v1.trainer_mode == "dvpo_sync"
    assert config.actor_rollout_ref.rollout.name == {"gpu": "vllm", "cpu": "vllm_cpu"}[platform]
    if config.critic.enable:
        assert family_of(config).family in family_names()
    OmegaConf.to_container(config, resolve=True)


@pytest.mark.parametrize("algorithm", names("algorithm"))
def test_every_algorithm_composes_on_verls_own_primary_config(algorithm):
    config = compose_config("ppo_trainer", f"+algorithm={algorithm}", "actor_rollout_ref.rollout.name=vllm")
    assert config.trainer.v1.trainer_mode == "dvpo_sync"
    OmegaConf.to_container(config, resolve=True)


@pytest.mark.parametrize("noise", names("noise"))
def test_every_noise_composes(noise):
    config = compose_config("dvpo_trainer", f"noise={noise}", "+task=demo")
    preflight.check_noise(config)
    assert config.reward.custom_reward_function.path == "pkg://verl_dvpo.bench.tasks.reward"


@pytest.mark.parametrize("preset", names("preset"))
def test_a_preset_composes_with_a_scalar_critic_and_its_options_reach_the_estimator(preset):
    config = compose_config("ppo_trainer", "+algorithm=ppo", f"+preset={preset}", "actor_rollout_ref.rollout.name=vllm")
    OmegaConf.to_container(config, resolve=True)
    assert config.algorithm.adv_estimator == "dvpo"
    options = advantage_config(config.algorithm)
    assert (options.lam_actor, options.length_alpha) == ("length", {"sao": 1.5, "vapo": 0.05}[preset])
    assert family_of(config).lam == 1.0
    assert config.trainer.critic_warmup > 0


def test_the_presets_trainer_and_sizes_are_what_the_command_line_says():
    """A preset changes what it has to; trainer mode and batch come from the command line where they are there."""
    config = compose_config("dvpo_trainer", "+preset=sao", "data.train_batch_size=48")
    assert config.trainer.v1.trainer_mode == "dvpo_colocate_async"
    assert config.actor_rollout_ref.actor.ppo_mini_batch_size == config.critic.ppo_mini_batch_size == 48
    assert (
        config.actor_rollout_ref.rollout.n,
        config.critic.ppo_epochs,
        config.actor_rollout_ref.actor.ppo_epochs,
    ) == (
        1,
        2,
        1,
    )
    sync = compose_config("dvpo_trainer", "+preset=sao", "trainer_mode=sync", "platform=cpu")
    assert sync.trainer.v1.trainer_mode == "dvpo_sync"
    assert compose_config("dvpo_trainer", "+preset=vapo").trainer.v1.trainer_mode == "dvpo_sync"


def test_sao_weighs_tokens_by_their_ratio_and_leaves_out_those_outside_of_its_bounds():
    """verl's own loss with the preset's fields, against -A * ratio * log p averaged over five tokens."""
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.utils.config import omega_conf_to_dataclass

    config = compose_config("dvpo_trainer", "+preset=sao", "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1")
    OmegaConf.resolve(config)
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    ratios = torch.tensor([[0.65, 0.75, 1.0, 5.5, 6.5, 1.0]])
    advantages, mask = torch.tensor([[1.0, -2.0, 3.0, 0.5, 4.0, 9.0]]), torch.tensor([[1, 1, 1, 1, 1, 0]])
    new = torch.tensor([[-0.1, -0.2, -0.3, -0.4, -0.5, -0.6]])
    loss, _ = get_policy_loss_fn(actor.policy_loss.loss_mode)(
        old_log_prob=new - ratios.log(),
        log_prob=new,
        advantages=advantages,
        response_mask=mask,
        loss_agg_mode=actor.loss_agg_mode,
        config=actor,
    )
    kept = [(0.75, -2.0, -0.2), (1.0, 3.0, -0.3), (5.5, 0.5, -0.4)]
    assert loss.item() == pytest.approx(-sum(ratio * a * p for ratio, a, p in kept) / 5, rel=1e-5)


@pytest.mark.parametrize("preset", names("preset"))
def test_a_preset_without_a_critic_is_refused(preset):
    config = compose_config("dvpo_trainer", "algorithm=grpo", f"+preset={preset}", "+task=demo")
    with pytest.raises(ValueError, match=r"critic\.enable is False; algorithm\.adv_estimator=dvpo allows True"):
        preflight.check(config)


@pytest.mark.parametrize("mode", names("trainer_mode"))
def test_every_trainer_mode_composes(mode):
    config = compose_config("dvpo_trainer", "algorithm=dvpo", f"trainer_mode={mode}")
    assert config.trainer.v1.trainer_mode == f"dvpo_{mode}"
    assert config.trainer.v1[f"dvpo_{mode}"].poll_interval > 0


def test_fields_of_dvpo_reach_the_typed_configuration():
    config = compose_config(
        "dvpo_trainer", "critic.value.num_quantiles=50", "critic.value.coef.risk=0.2", "critic.value.kappa=0"
    )
    family = family_of(config)
    assert (family.num_quantiles, family.coef["risk"], family.kappa) == (50, 0.2, 0)
    assert build_family(family).num_outputs == 150


@pytest.mark.parametrize("algorithm", names("algorithm"))
def test_a_study_can_give_every_critic_the_same_head(algorithm):
    config = compose_config("dvpo_trainer", f"algorithm={algorithm}")
    if not config.critic.enable:
        pytest.skip("has no critic")
    config = compose_config("dvpo_trainer", f"algorithm={algorithm}", "critic.value.head_width=256")
    assert family_of(config).head_width == 256


def test_the_worst_case_ships_with_a_bootstrap_and_the_family_without():
    assert family_of(compose_config("dvpo_trainer", "algorithm=robust_bellman")).heads_see == "bootstrap"
    assert family_config("robust_bellman").heads_see == "all"


def test_the_huber_control_is_one_override():
    assert family_of(compose_config("dvpo_trainer", "algorithm=ppo", "critic.value.huber=0.5")).huber == 0.5
    assert family_of(compose_config("dvpo_trainer", "algorithm=ppo")).huber is None


def test_shipped_defaults_are_the_dataclasses_defaults():
    """A YAML that says something else than the code it documents would mislead."""
    config = compose_config("dvpo_trainer", "algorithm=dvpo")
    default = family_config("quantile_ensemble")
    shipped = family_of(config)
    assert shipped.loss_config() == default.loss_config()
    assert shipped.auto_config() == default.auto_config()
    for field in fields(default):
        if field.name not in ("coef", "auto"):  # compared above, with what is filled in
            assert getattr(shipped, field.name) == getattr(default, field.name), field.name


def test_the_scalar_ensemble_ships_the_coefficients_of_dvpo():
    shipped = family_of(compose_config("dvpo_trainer", "algorithm=ppo_ensemble"))
    assert shipped.loss_config() == family_config("scalar_ensemble").loss_config()
    dvpo = family_config("quantile_ensemble").loss_config()
    assert all(shipped.coef[name] == dvpo.coef[name] for name in ("shift", "consistency"))


def test_the_calibrated_critic_ships_the_defaults_of_its_constraints():
    """Midpoints, pinball, sample replacement, violations in levels; everything else is `dvpo`'s."""
    shipped = family_of(compose_config("dvpo_trainer", "algorithm=dvpo_calibrated"))
    own = {"levels": "midpoint", "kappa": 0.0, "target": "sample_replacement", "constraint_statistics": "level"}
    expected = family_config("quantile_ensemble", **own)
    assert shipped.loss_config() == expected.loss_config()
    plain = family_of(compose_config("dvpo_trainer", "algorithm=dvpo"))
    for field in fields(shipped):
        if field.name != "coef":
            assert getattr(shipped, field.name) == own.get(field.name, getattr(plain, field.name)), field.name


def test_the_options_of_the_advantage_ship_switched_off_with_the_dataclasses_defaults():
    section = OmegaConf.to_container(compose_config("dvpo_trainer", "algorithm=dvpo").algorithm.value)
    default = AdvantageConfig()
    assert section == {field.name: getattr(default, field.name) for field in fields(default)}
    assert default.is_off
    assert default.fields == ()


@pytest.mark.parametrize("algorithm", names("algorithm"))
def test_only_the_weighted_and_the_winsorised_algorithms_change_the_advantage(algorithm):
    options = advantage_config(compose_config("dvpo_trainer", f"algorithm={algorithm}").algorithm)
    if algorithm.endswith("_weighted"):
        assert options == AdvantageConfig(weighting="precision", weighting_eps=0.25)
    elif algorithm.endswith("_winsorised"):
        weights = {"weighting": "precision", "weighting_eps": 0.02} if "weighted" in algorithm else {}
        assert options == AdvantageConfig(reward="winsorised", reward_low=0.3, reward_high=0.7, **weights)
    else:
        assert options.is_off


@pytest.mark.parametrize("algorithm", ["dvpo_weighted", "dvpo_winsorised", "dvpo_weighted_winsorised"])
def test_their_critic_is_the_calibrated_one(algorithm):
    ours, calibrated = (compose_config("dvpo_trainer", f"algorithm={a}") for a in (algorithm, "dvpo_calibrated"))
    assert ours.critic == calibrated.critic
    assert family_of(ours) == family_of(calibrated)


def test_the_gaussian_critic_ships_the_dataclasses_defaults():
    shipped = family_of(compose_config("dvpo_trainer", "algorithm=ppo_gaussian_weighted"))
    assert shipped == family_config("gaussian")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["critic.value.levels=right"], "constraint_statistics is 'level', but levels is 'right'"),
        (["critic.value.constraint=token"], "constraint_statistics is 'level', but constraint is 'token'"),
        (["critic.value.coef.shape=0.02"], "constraint_statistics is 'level', but coef.shape is 0.02"),
        (["critic.value.coef.curvature=0.1"], "constraint_statistics is 'level', but coef.curvature is 0.1"),
        (["critic.value.constraint_statistics=rank"], "constraint_statistics is 'rank'; it must be one of value"),
    ],
)
def test_constraints_in_levels_are_checked_where_the_configuration_is(overrides, message):
    """Raised by the typed section, which verl builds before it starts Ray."""
    config = compose_config("dvpo_trainer", "algorithm=dvpo_calibrated", *overrides)
    with pytest.raises(ValueError, match=re.escape(f"critic.value.{message}")):
        family_of(config)


def test_the_command_line_finds_it_from_any_directory(tmp_path):
    """The two commands of the README, as far as Hydra takes them."""
    for arguments in (
        ["--config-name", "dvpo_trainer", "algorithm=dvpo", "critic.value.num_quantiles=50"],
        ["+algorithm=dvpo"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "verl.trainer.main_ppo", *arguments, "--cfg", "job"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "adv_estimator: dvpo" in done.stdout
