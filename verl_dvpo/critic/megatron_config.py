# SPDX-License-Identifier: Apache-2.0
"""The critic's section for Megatron-core, and its checks, which run before Ray starts. Imports nothing of Megatron."""

import importlib.util
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl.workers.config import McoreCriticConfig, McoreEngineConfig

from verl_dvpo.critic.checkpoints import ENGINE, refuse_other_engine
from verl_dvpo.critic.config import attach_family
from verl_dvpo.critic.megatron_models import refuse_model

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

#: Names that transformers' configurations have for the number of experts.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")

#: Precisions of the backbone; the head is fp32 with each.
DTYPES = ("bfloat16", "float16", "float32")

#: Among a manifest's facts: the sizes by which megatron-core divides optimizer states and random states.
SIZES = "megatron_sizes"
DISTRIBUTED = "use_distributed_optimizer"
SIZE_NAMES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size",
    DISTRIBUTED,
)
#: Whether the optimizer's states were saved in the form that other sizes can load.
RESHARDABLE = "dist_ckpt_optim_fully_reshardable"


@dataclass
class MegatronEngineConfig(McoreEngineConfig):
    """verl's engine section for Megatron-core, whose ``dtype`` may be ``float32`` too.

    Raises:
        ValueError: ``dtype`` is another.
    """

    def __post_init__(self) -> None:
        wanted = self.dtype
        if wanted not in DTYPES:
            raise ValueError(f"critic.megatron.dtype is {wanted!r}; {', '.join(DTYPES)} are allowed; choose one")
        object.__setattr__(self, "dtype", "bfloat16")  # verl's check knows half precisions only
        super().__post_init__()
        object.__setattr__(self, "dtype", wanted)


@dataclass
class DistributionalMegatronCriticConfig(McoreCriticConfig):
    """verl's critic section for Megatron-core, and ``critic.value``.

    Attributes:
        value: the typed section of the family.
        fsdp: not read; ``platform=cpu`` sets fields of the other engine's section, whichever engine the run has.

    Raises:
        ValueError: ``value`` names no family, ``model`` is verl's own section, or a setting that the critic cannot
            run with.
    """

    value: Any = None
    fsdp: Any = None

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
        if self.value.tokens_per_block is not None:
            self._check_blocks()

    def _check_blocks(self) -> None:
        """Raises ValueError where the head cannot take response tokens in blocks: it must hold them in their order."""
        sizes = self.megatron
        require(
            "critic.megatron.context_parallel_size", sizes.context_parallel_size, 1, "critic.value.tokens_per_block"
        )
        if sizes.sequence_parallel and sizes.tensor_model_parallel_size > 1 and not self.model.use_remove_padding:
            raise ValueError(
                f"critic.value.tokens_per_block is {self.value.tokens_per_block}; sequence parallelism allows it with "
                "packed sequences only; set critic.model.use_remove_padding=true, "
                "critic.megatron.sequence_parallel=false or critic.value.tokens_per_block=null"
            )

    def validate(self, n_gpus: int, train_batch_size: int) -> None:
        """Checks packages and sizes; verl calls it on the driver before it starts Ray.

        Args:
            n_gpus: of the whole run.
            train_batch_size: sequences per step.

        Raises:
            ValueError: a package is missing, mbridge cannot translate the model, or a parallel size does not divide
                what it splits.
        """
        super().validate(n_gpus, train_batch_size)
        require_packages()
        refuse_model(self.model.hf_config, self.megatron.override_transformer_config)
        sizes, text = self.megatron, self.model.hf_config.get_text_config()
        tensor, stages = sizes.tensor_model_parallel_size, sizes.pipeline_model_parallel_size
        together = tensor * stages * sizes.context_parallel_size
        if n_gpus % together != 0:
            raise ValueError(
                f"critic.megatron: tensor_model_parallel_size * pipeline_model_parallel_size * context_parallel_size "
                f"is {together}; it must divide the number of GPUs, {n_gpus}; change a size or trainer.n_gpus_per_node"
            )
        self._check_experts(n_gpus, text)
        for name in ("num_attention_heads", "num_key_value_heads"):
            require_divisor("tensor_model_parallel_size", tensor, name, getattr(text, name, None))
        if not UNEVEN & set(sizes.override_transformer_config):
            pieces = stages * (sizes.virtual_pipeline_model_parallel_size or 1)
            field = "pipeline_model_parallel_size times virtual_pipeline_model_parallel_size"
            require_divisor(field, pieces, "num_hidden_layers", text.num_hidden_layers)

    def _check_experts(self, n_gpus: int, text: Any) -> None:
        """Raises ValueError where experts cannot be divided among ranks."""
        sizes = self.megatron
        size = sizes.expert_model_parallel_size
        if size == 1:
            return
        experts = next((number for name in EXPERTS if (number := getattr(text, name, None))), None)
        if experts is None:
            raise ValueError(
                f"critic.megatron.expert_model_parallel_size is {size}; critic.model.path has no experts, which allows "
                "1; set critic.megatron.expert_model_parallel_size=1"
            )
        require_divisor("expert_model_parallel_size", size, "number of experts", experts)
        each = sizes.expert_tensor_parallel_size or sizes.tensor_model_parallel_size
        together = size * each * sizes.pipeline_model_parallel_size
        if n_gpus % together != 0:
            raise ValueError(
                f"critic.megatron: expert_model_parallel_size * expert_tensor_parallel_size (where it is null, "
                f"tensor_model_parallel_size) * pipeline_model_parallel_size is {together}; it must divide the number "
                f"of GPUs, {n_gpus}; change a size or trainer.n_gpus_per_node"
            )


def saved_facts(megatron: Any) -> dict[str, Any]:
    """Returns what a checkpoint's manifest notes of the engine.

    Args:
        megatron: the section ``critic.megatron``.
    """
    sizes = {name: 1 if (size := getattr(megatron, name)) is None else int(size) for name in SIZE_NAMES}
    return {ENGINE: "megatron", SIZES: sizes, RESHARDABLE: bool(getattr(megatron, RESHARDABLE))}


def refuse_saved(folder: Path, facts: Mapping[str, Any], megatron: Any, contents: Collection[str]) -> None:
    """Refuses a checkpoint whose parts megatron-core cannot divide anew.

    Weights load into any sizes. So do the optimizer's states that were saved with
    ``dist_ckpt_optim_fully_reshardable``, and random states never.

    Args:
        folder: of the checkpoint.
        facts: of its manifest.
        megatron: the section ``critic.megatron`` of the run that shall load it.
        contents: ``critic.checkpoint.load_contents``.

    Raises:
        ValueError: names the sizes that differ.
    """
    refuse_other_engine(folder, facts, "megatron")
    here = saved_facts(megatron)[SIZES]
    saved = facts.get(SIZES, here)
    differing = [
        f"{name} {saved.get(name)} there and {here[name]} here" for name in here if saved.get(name) != here[name]
    ]
    divisible = facts.get(RESHARDABLE) and saved.get(DISTRIBUTED) == here[DISTRIBUTED]
    loadable = {"model", "hf_model"} | ({"optimizer"} if divisible else set())
    if differing and not set(contents) <= loadable:
        raise ValueError(
            f"critic.megatron has {', '.join(differing)}, for {folder}; other sizes load {sorted(loadable)} of it; set "
            f"the sizes as they were, or critic.checkpoint.load_contents=[{','.join(sorted(loadable - {'hf_model'}))}]"
        )


def require(field: str, value: Any, allowed: Any, who: str = "the critic on Megatron") -> None:
    """Raises ValueError unless a setting has the one value that is allowed."""
    if value != allowed:
        raise ValueError(f"{field} is {value!r}; {who} runs with {allowed!r} only; set {field}={allowed}")


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
