# SPDX-License-Identifier: Apache-2.0
"""``critic_engine=megatron``: it composes, and an impossible setting is refused by name on the driver."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, open_dict
from test_configs import compose_config
from verl.utils.config import omega_conf_to_dataclass

from critic import models
from critic.megatron_cpu import trial
from verl_dvpo.critic import megatron_config
from verl_dvpo.critic.checkpoints import refuse_other_engine
from verl_dvpo.critic.megatron_config import DistributionalMegatronCriticConfig, MegatronEngineConfig
from verl_dvpo.critic.megatron_models import known_architectures


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four layers, four heads and two key-value heads."""
    return trial.save_model(tmp_path_factory.mktemp("model"))


#: Positions of four times the length, by linear scaling.
SCALED = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


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
        ("critic.megatron.dtype=float64", "critic.megatron.dtype is 'float64'; bfloat16, float16, float32 are allowed"),
        ("critic.checkpoint.async_save=true", "critic.checkpoint.async_save is True; False is allowed"),
        ("critic.value.num_quantiles=0", "critic.value.num_quantiles"),
    ],
)
def test_what_the_critic_cannot_run_with_is_refused_by_name(model, override, message):
    with pytest.raises(Exception, match=message) as error:
        section(model, override)
    causes = [error.value, error.value.__cause__]
    assert any(isinstance(cause, ValueError) for cause in causes)


def test_the_backbone_may_be_fp32(model):
    assert section(model, "critic.megatron.dtype=float32").engine.dtype == "float32"
    assert section(model).engine.dtype == "bfloat16"


BLOCKS = "critic.value.tokens_per_block=4"
PADDED = "critic.model.use_remove_padding=false"
SPLIT = "critic.megatron.tensor_model_parallel_size=2"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            (BLOCKS, "critic.megatron.context_parallel_size=2"),
            r"context_parallel_size is 2; critic.value.tokens_per_block",
        ),
        ((BLOCKS, SPLIT, PADDED), r"tokens_per_block is 4; sequence parallelism allows it with packed sequences only"),
    ],
)
def test_blocks_are_refused_where_ranks_do_not_hold_tokens_in_order(model, overrides, words):
    with pytest.raises(Exception, match=words) as error:
        section(model, *overrides)
    assert any(isinstance(cause, ValueError) for cause in (error.value, error.value.__cause__))


@pytest.mark.parametrize(
    "overrides", [(BLOCKS, PADDED), (BLOCKS, SPLIT), (BLOCKS, SPLIT, PADDED, "critic.megatron.sequence_parallel=false")]
)
def test_blocks_are_taken_elsewhere(model, overrides):
    assert section(model, *overrides).value.tokens_per_block == 4


def saved_by(**settings: Any) -> dict[str, Any]:
    return megatron_config.saved_facts(MegatronEngineConfig(vanilla_mbridge=True, **settings))


@pytest.mark.parametrize(
    ("saved", "here", "contents", "words"),
    [
        (
            {},
            {"tensor_model_parallel_size": 2},
            ["model", "optimizer"],
            ["tensor_model_parallel_size 1 there and 2 here", "=[model]"],
        ),
        (
            {"pipeline_model_parallel_size": 2, "dist_ckpt_optim_fully_reshardable": True},
            {},
            ["model", "optimizer", "extra"],
            ["pipeline_model_parallel_size 2 there and 1 here", "=[model,optimizer]"],
        ),
        (
            {"dist_ckpt_optim_fully_reshardable": True},
            {"use_distributed_optimizer": False},
            ["model", "optimizer"],
            ["use_distributed_optimizer 1 there and 0 here", "=[model]"],
        ),
    ],
)
def test_a_checkpoint_of_other_sizes_is_refused_by_name(saved, here, contents, words):
    config = MegatronEngineConfig(vanilla_mbridge=True, **here)
    with pytest.raises(ValueError, match=r"critic\.megatron has") as error:
        megatron_config.refuse_saved(Path("folder"), saved_by(**saved), config, contents)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("saved", "here", "contents"),
    [
        ({}, {}, ["model", "optimizer", "extra"]),
        ({"sequence_parallel": False}, {}, ["model", "optimizer", "extra"]),
        ({"virtual_pipeline_model_parallel_size": None}, {"virtual_pipeline_model_parallel_size": 1}, ["extra"]),
        ({"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}, ["model"]),
        ({"tensor_model_parallel_size": 2, "dist_ckpt_optim_fully_reshardable": True}, {}, ["model", "optimizer"]),
    ],
)
def test_a_checkpoint_that_megatron_can_divide_passes(saved, here, contents):
    config = MegatronEngineConfig(vanilla_mbridge=True, **here)
    megatron_config.refuse_saved(Path("folder"), saved_by(**saved), config, contents)


def test_a_checkpoint_of_the_other_engine_is_refused_by_name():
    with pytest.raises(ValueError, match=r"folder was saved by the critic on 'fsdp'; this run's is on 'megatron'"):
        megatron_config.refuse_saved(
            Path("folder"), {"engine": "fsdp"}, MegatronEngineConfig(vanilla_mbridge=True), ["model"]
        )
    with pytest.raises(ValueError, match=r"folder was saved by the critic on 'megatron'; this run's is on 'fsdp'"):
        refuse_other_engine(Path("folder"), saved_by(), "fsdp")
    refuse_other_engine(Path("folder"), {}, "fsdp")  # older manifests do not say


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


DENSE = ("llama", {})
ROUTED = ("qwen3_moe", {"norm_topk_prob": True, "num_key_value_heads": 2})


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        (("mistral", {}), ["model_type 'mistral'", "qwen3_moe", "leave critic_engine=megatron out"]),
        (("gemma", {}), ["model_type 'gemma'"]),
        (("llama", {"attention_bias": True}), ["attention_bias True", "False only"]),
        (("llama", {"mlp_bias": True}), ["mlp_bias True", "False only"]),
        (("llama", {"rope_parameters": SCALED}), ["rope_parameters.rope_type 'linear'", "'default' only"]),
        (("qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0}), ["sliding_window 3"]),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_model_that_mbridge_would_compute_otherwise_is_refused_by_name(saved, words, tmp_path):
    critic = section(models.save(tmp_path / "model", saved[0], **saved[1]))
    with pytest.raises(ValueError, match=r"critic\.model\.path has") as error:
        critic.validate(n_gpus=1, train_batch_size=256)
    for word in words:
        assert word in str(error.value)


PRE, GATE = ("moe_router_pre_softmax", "moe_shared_expert_gate")


@pytest.mark.parametrize(
    ("saved", "field", "wrong", "needed"),
    [
        (("qwen3_moe", {"norm_topk_prob": False}), PRE, "False", "true"),
        (("qwen2_moe", {}), GATE, "False", "true"),
        (("qwen2_moe", {"norm_topk_prob": True}), PRE, "True", "false"),
        (("mixtral", {}), PRE, "True", "false"),
    ],
)
def test_a_router_that_mbridge_sets_otherwise_is_refused_until_it_is_overridden(saved, field, wrong, needed, tmp_path):
    path = models.save(tmp_path / "model", saved[0], **saved[1])
    place = f"critic.megatron.override_transformer_config.{field}"
    others = [f"+critic.megatron.override_transformer_config.{GATE}=true"] if "norm_topk_prob" in saved[1] else []
    others = others if saved[0] == "qwen2_moe" else []
    with pytest.raises(ValueError, match=rf"{place} is {wrong}; .*{saved[0]}.*; set \+{place}={needed}"):
        section(path, *others).validate(n_gpus=1, train_batch_size=256)
    section(path, *others, f"+{place}={needed}").validate(n_gpus=1, train_batch_size=256)


@pytest.mark.parametrize("saved", [DENSE, ROUTED, ("qwen2", {"sliding_window": 3})], ids=lambda saved: saved[0])
def test_a_model_that_mbridge_knows_passes(saved, tmp_path):
    section(models.save(tmp_path / "model", saved[0], **saved[1])).validate(n_gpus=1, train_batch_size=256)


def test_the_architectures_are_those_that_mbridge_lists():
    from verl.models.mcore.mbridge import AutoBridge

    assert known_architectures() == set(AutoBridge.list_supported_models())


@pytest.mark.parametrize(
    ("saved", "sizes", "n_gpus", "words"),
    [
        (DENSE, {}, 2, ["expert_model_parallel_size is 2", "no experts", "=1"]),
        (ROUTED, {"expert_model_parallel_size": 3}, 3, ["expert_model_parallel_size is 3", "experts", "4"]),
        (ROUTED, {}, 3, ["expert_tensor_parallel_size", "is 2", "GPUs, 3"]),
        (ROUTED, {"tensor_model_parallel_size": 2}, 2, ["expert_tensor_parallel_size", "is 4", "GPUs, 2"]),
    ],
)
def test_experts_that_ranks_cannot_share_are_refused_by_name(saved, sizes, n_gpus, words, tmp_path):
    sizes = {"expert_model_parallel_size": 2, **sizes}
    overrides = (f"critic.megatron.{name}={size}" for name, size in sizes.items())
    critic = section(models.save(tmp_path / "model", saved[0], **saved[1]), *overrides)
    with pytest.raises(ValueError, match=r"critic\.megatron") as error:
        critic.validate(n_gpus=n_gpus, train_batch_size=256)
    for word in words:
        assert word in str(error.value)


def test_experts_that_ranks_can_share_pass(tmp_path):
    path = models.save(tmp_path / "model", ROUTED[0], **ROUTED[1])
    sizes = ("expert_model_parallel_size=2", "tensor_model_parallel_size=2", "expert_tensor_parallel_size=1")
    section(path, *(f"critic.megatron.{size}" for size in sizes)).validate(n_gpus=2, train_batch_size=256)


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
