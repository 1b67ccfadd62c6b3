# SPDX-License-Identifier: Apache-2.0
"""``critic_engine=megatron``: it composes, and an impossible setting is refused by name on the driver."""

import importlib.util
from typing import Any

import pytest
from omegaconf import DictConfig, open_dict
from test_configs import compose_config
from verl.utils.config import omega_conf_to_dataclass

from critic.megatron_cpu import trial
from verl_dvpo.critic import megatron_config
from verl_dvpo.critic.megatron_config import DistributionalMegatronCriticConfig


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four layers, four heads and two key-value heads."""
    return trial.save_model(tmp_path_factory.mktemp("model"))


def composed(model: str, *overrides: str, base: str = "dvpo_trainer") -> DictConfig:
    config = compose_config(
        base,
        *(["algorithm=dvpo"] if base == "dvpo_trainer" else ["+algorithm=dvpo"]),
        "+critic_engine=megatron",
        f"critic.model.path={model}",
        "critic.ppo_micro_batch_size_per_gpu=2",
        *overrides,
    )
    with open_dict(config):
        config.critic.model.load_tokenizer = False
    return config


def section(model: str, *overrides: str, **kwargs: Any) -> DistributionalMegatronCriticConfig:
    return omega_conf_to_dataclass(composed(model, *overrides, **kwargs).critic)


@pytest.mark.parametrize("base", ["dvpo_trainer", "ppo_trainer"])
def test_it_composes_into_verls_section_with_the_family(model, base):
    config = composed(model, "critic.value.num_quantiles=7", "critic.megatron.tensor_model_parallel_size=2", base=base)
    assert config.actor_rollout_ref.actor.strategy.startswith("fsdp")
    critic = omega_conf_to_dataclass(config.critic)
    assert isinstance(critic, DistributionalMegatronCriticConfig)
    assert critic.engine is critic.megatron
    assert (critic.engine.strategy, critic.engine.tensor_model_parallel_size) == ("megatron", 2)
    assert critic.model.value.num_quantiles == 7
    critic.validate(n_gpus=4, train_batch_size=256)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("critic.megatron.vanilla_mbridge=false", "critic.megatron.vanilla_mbridge is False; .* True only"),
        ("critic.megatron.use_dist_checkpointing=true", "critic.megatron.use_dist_checkpointing is True; .* False"),
        ("critic.megatron.use_megatron_fsdp=true", "critic.megatron.use_megatron_fsdp is True; .* False only"),
        ("critic.model.lora_rank=8", "critic.model.lora_rank is 8; .* 0 only"),
        ("critic.model.lora.rank=8", "critic.model.lora_rank is 8; .* 0 only"),
        ("critic.strategy=fsdp2", "critic.strategy is 'fsdp2'; it must be 'megatron'"),
        ("critic.value.num_quantiles=0", "critic.value.num_quantiles"),
    ],
)
def test_what_the_critic_cannot_run_with_is_refused_by_name(model, override, message):
    with pytest.raises(Exception, match=message) as error:
        section(model, override)
    causes = [error.value, error.value.__cause__]
    assert any(isinstance(cause, ValueError) for cause in causes)


def test_the_strategy_alone_is_refused_with_the_group_that_does_it(model):
    config = compose_config("dvpo_trainer", "algorithm=dvpo", "critic.strategy=megatron", f"critic.model.path={model}")
    with open_dict(config):
        config.critic.ppo_micro_batch_size_per_gpu = 2
        config.critic.model.load_tokenizer = False
    with pytest.raises(Exception, match=r"critic\.strategy is 'megatron'.*critic_engine=megatron"):
        omega_conf_to_dataclass(config.critic)


@pytest.mark.parametrize(
    ("sizes", "n_gpus", "words"),
    [
        ({"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, 6, ["is 4", "GPUs, 6"]),
        ({"tensor_model_parallel_size": 4}, 4, ["tensor_model_parallel_size is 4", "num_key_value_heads", "2"]),
        ({"tensor_model_parallel_size": 3}, 3, ["tensor_model_parallel_size is 3", "num_attention_heads", "4"]),
        ({"pipeline_model_parallel_size": 3}, 3, ["pipeline_model_parallel_size", "is 3", "num_hidden_layers", "4"]),
        (
            {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 4},
            2,
            ["virtual_pipeline_model_parallel_size is 8", "num_hidden_layers", "4"],
        ),
    ],
)
def test_a_size_that_does_not_divide_is_refused_by_name(model, sizes, n_gpus, words):
    critic = section(model, *(f"critic.megatron.{name}={size}" for name, size in sizes.items()))
    with pytest.raises(ValueError, match=r"critic\.megatron") as error:
        critic.validate(n_gpus=n_gpus, train_batch_size=256)
    for word in words:
        assert word in str(error.value)


def test_stages_of_different_sizes_are_left_to_megatron(model):
    uneven = "+critic.megatron.override_transformer_config.num_layers_in_first_pipeline_stage=2"
    critic = section(model, "critic.megatron.pipeline_model_parallel_size=3", uneven)
    critic.validate(n_gpus=3, train_batch_size=256)


@pytest.mark.parametrize("package", megatron_config.PACKAGES)
def test_a_missing_package_is_named_with_its_remedy(model, package, monkeypatch):
    critic = section(model)
    real = importlib.util.find_spec

    def find(name: str, *rest: Any) -> Any:
        if name == package:
            raise ModuleNotFoundError(name)
        return real(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    distribution = megatron_config.PACKAGES[package]
    with pytest.raises(ValueError, match=rf"critic\.strategy.*needs {distribution}, which.*verl-dvpo\[megatron\]"):
        critic.validate(n_gpus=1, train_batch_size=256)
