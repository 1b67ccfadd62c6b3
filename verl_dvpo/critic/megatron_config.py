# SPDX-License-Identifier: Apache-2.0
"""The critic's section for Megatron-core, and its checks, which run before Ray starts. Imports nothing of Megatron."""

import importlib.util
from dataclasses import dataclass
from typing import Any

from verl.workers.config import McoreCriticConfig

from verl_dvpo.critic.config import attach_family

#: Module -> distribution; the extra ``megatron`` of this package installs them.
PACKAGES = {"megatron.core": "megatron-core", "mbridge": "mbridge"}

#: Field of ``critic.megatron`` -> the one value that the critic can run with.
ONLY: dict[str, Any] = {
    "vanilla_mbridge": True,
    "use_dist_checkpointing": False,
    "use_megatron_fsdp": False,
    "dynamic_context_parallel": False,
}


#: Fields of ``critic.megatron.override_transformer_config`` that give stages different numbers of layers.
UNEVEN = {
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "pipeline_model_parallel_layout",
}


@dataclass
class DistributionalMegatronCriticConfig(McoreCriticConfig):
    """verl's critic section for Megatron-core, and ``critic.value``.

    Attributes:
        value: the typed section of the family.

    Raises:
        ValueError: ``value`` names no family, ``model`` is verl's own section, or a setting that the critic cannot
            run with.
    """

    value: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        attach_family(self)
        if self.strategy != "megatron":
            raise ValueError(
                f"critic.strategy is {self.strategy!r}; it must be 'megatron' with critic_engine=megatron; "
                "leave that out for FSDP"
            )
        for name, allowed in ONLY.items():
            require(f"critic.megatron.{name}", getattr(self.megatron, name), allowed)
        lora = self.model.lora_rank or self.model.lora.get("rank", 0)
        require("critic.model.lora_rank", lora, 0)
        require("critic.model.mtp.enable", self.model.mtp.enable, False)
        require("critic.value.tokens_per_block", self.value.tokens_per_block, None)

    def validate(self, n_gpus: int, train_batch_size: int) -> None:
        """Checks packages and sizes; verl calls it on the driver before it starts Ray.

        Args:
            n_gpus: of the whole run.
            train_batch_size: sequences per step.

        Raises:
            ValueError: a package is missing, or a parallel size does not divide what it splits.
        """
        super().validate(n_gpus, train_batch_size)
        require_packages()
        sizes, text = self.megatron, self.model.hf_config.get_text_config()
        tensor, stages = sizes.tensor_model_parallel_size, sizes.pipeline_model_parallel_size
        together = tensor * stages * sizes.context_parallel_size
        if n_gpus % together != 0:
            raise ValueError(
                f"critic.megatron: tensor_model_parallel_size * pipeline_model_parallel_size * context_parallel_size "
                f"is {together}; it must divide the number of GPUs, {n_gpus}; change a size or trainer.n_gpus_per_node"
            )
        for name in ("num_attention_heads", "num_key_value_heads"):
            require_divisor("tensor_model_parallel_size", tensor, name, getattr(text, name, None))
        if not UNEVEN & set(sizes.override_transformer_config):
            pieces = stages * (sizes.virtual_pipeline_model_parallel_size or 1)
            field = "pipeline_model_parallel_size times virtual_pipeline_model_parallel_size"
            require_divisor(field, pieces, "num_hidden_layers", text.num_hidden_layers)


def require(field: str, value: Any, allowed: Any) -> None:
    """Raises ValueError unless a setting has the one value that is allowed."""
    if value != allowed:
        raise ValueError(
            f"{field} is {value!r}; the critic on Megatron runs with {allowed!r} only; set {field}={allowed}"
        )


def require_divisor(field: str, size: int, name: str, number: int | None) -> None:
    """Raises ValueError unless ``size`` divides the backbone's ``number``; None stands for a backbone without it."""
    if number is not None and number % size != 0:
        raise ValueError(
            f"critic.megatron.{field} is {size}; it must divide the {name} of critic.model.path, {number}; "
            "choose a divisor"
        )


def require_packages() -> None:
    """Raises ValueError unless the packages of the extra ``megatron`` can be found."""
    missing = [package for module, package in PACKAGES.items() if not _found(module)]
    if missing:
        raise ValueError(
            f"critic.strategy is 'megatron'; it needs {' and '.join(missing)}, which cannot be imported; "
            "install verl-dvpo[megatron], or choose fsdp2"
        )


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is not there
        return False
