# SPDX-License-Identifier: Apache-2.0
"""Composes a recipe and reads from it what memory and time depend on."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_dvpo.composing import compose
from verl_dvpo.estimate.memory import DTYPES
from verl_dvpo.estimate.shapes import Shape, find_shape

#: Where a checkout keeps recipes, beside the package.
RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
#: The group of settings for a model and its machines, which the wheel has, too.
GROUP = "recipe"


@dataclass(frozen=True)
class Role:
    """One model of the run.

    Attributes:
        shape: of its backbone.
        parameters: of the whole model.
        rest: parameters that are neither in a layer nor in an untied embedding or output layer.
        outputs: numbers per token of its last layer, V or D.
        policy: whether those are logits.
        dtype: bytes of a sharded weight.
        shards: GPUs that share the weights.
        sequence_parallel: GPUs that share a sequence.
        tokens: of a micro-batch in an update, over the GPUs that share it.
        forward_tokens: of a micro-batch in a forward pass.
        checkpointing: whether layers are computed again on the way back.
        offload_weights, offload_optimizer: what waits in the machine's memory between its turns.
        block: ``critic.value.tokens_per_block``.
        kept: numbers of a response token that stay on the GPU between inference and update.
        epochs: passes over the data of a step.
    """

    shape: Shape
    parameters: int
    rest: int
    outputs: int
    policy: bool
    dtype: int
    shards: int
    sequence_parallel: int
    tokens: int
    forward_tokens: int
    checkpointing: bool
    offload_weights: bool
    offload_optimizer: bool
    block: int | None = None
    kept: int = 0
    epochs: int = 1


@dataclass(frozen=True)
class Settings:
    """Holds all that the estimate of a run depends on.

    Attributes:
        name: of the recipe.
        gpus: that train.
        rollout_gpus: that sample; the same ones where ``colocated``.
        sequences: answers of a step.
        prompt, response: longest prompt and answer, tokens.
        actor: the policy.
        critic: None without one.
        reference: None without one.
        recompute_log_probs: whether the old policy's log-probabilities are computed again.
        tensor_parallel: GPUs of one replica of the sampler.
        sampler_share: ``gpu_memory_utilization``.
        max_num_seqs: sequences that a replica runs at once, at most.
        asleep: whether the sampler gives its memory back while models train.
    """

    name: str
    gpus: int
    rollout_gpus: int
    colocated: bool
    sequences: int
    prompt: int
    response: int
    actor: Role
    critic: Role | None
    reference: Role | None
    recompute_log_probs: bool
    tensor_parallel: int
    sampler_share: float
    max_num_seqs: int
    asleep: bool


def recipe_names() -> list[str]:
    """Lists the recipes that are known by a name: those of the checkout, and the package's settings for a model."""
    group = Path(__file__).parents[1] / "config" / GROUP
    folders = (RECIPES, group if group.is_dir() else Path(__file__).parents[2] / "config" / GROUP)
    return sorted({file.stem for folder in folders if folder.is_dir() for file in folder.glob("[!_]*.yaml")})


def compose_recipe(recipe: str, overrides: list[str]) -> DictConfig:
    """Composes as ``main_ppo --config-dir ... --config-name ...`` does, without importing verl.

    Args:
        recipe: a YAML file, or one of `recipe_names`.
        overrides: as on the command line of ``main_ppo``.

    Raises:
        ValueError: no such recipe, or an override that Hydra refuses.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    folder, name, choices = _find(recipe)
    try:
        config = compose(name, [*choices, *overrides], folder)
        OmegaConf.resolve(config)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(f"recipe {recipe!r} does not compose: {error}") from error
    return config


def _find(recipe: str) -> tuple[Path | None, str, list[str]]:
    """Returns the folder of the primary configuration (None for verl's), its name, and overrides that complete it."""
    path = Path(recipe).expanduser()
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ValueError(f"recipe is {recipe!r}, which is no file; {_known()}")
        return path.resolve().parent, path.stem, []
    if (RECIPES / f"{recipe}.yaml").is_file():
        return RECIPES, recipe, []
    if recipe in recipe_names():
        return None, "dvpo_trainer", [f"+{GROUP}={recipe}"]
    raise ValueError(f"recipe is {recipe!r}; {_known()}")


def _known() -> str:
    return f"a YAML file or one of {', '.join(recipe_names())} is allowed; give one of them"


def with_gpus(overrides: list[str], gpus: int | None) -> list[str]:
    """Adds what ``--gpus`` means: nodes of eight GPUs, or one smaller node.

    Raises:
        ValueError: a number below 1, or one above 8 that is no multiple of 8.
    """
    if gpus is None:
        return overrides
    if gpus < 1 or (gpus > 8 and gpus % 8):
        raise ValueError(f"--gpus is {gpus!r}; 1 to 8 and multiples of 8 are allowed; for others set trainer.nnodes")
    per_node = min(gpus, 8)
    return [*overrides, f"trainer.n_gpus_per_node={per_node}", f"trainer.nnodes={gpus // per_node}"]


def read_settings(config: DictConfig, name: str) -> Settings:
    """Reads a composed configuration.

    Raises:
        ValueError: a backend or an adapter that is not counted, or a model whose shape is not known.
    """
    trainer, rollout = config.trainer, config.actor_rollout_ref.rollout
    gpus = trainer.n_gpus_per_node * trainer.nnodes
    separate = str(trainer.v1.trainer_mode).endswith("separate_async")
    rollout_gpus = rollout.n_gpus_per_node * rollout.nnodes if separate else gpus
    if rollout_gpus < 1 or rollout_gpus % rollout.tensor_model_parallel_size:
        raise ValueError(
            f"actor_rollout_ref.rollout.tensor_model_parallel_size is {rollout.tensor_model_parallel_size!r}; it must "
            f"divide the {rollout_gpus} GPUs that sample; change one of the two"
        )
    needs_reference = config.algorithm.use_kl_in_reward or config.actor_rollout_ref.actor.use_kl_loss
    return Settings(
        name=name,
        gpus=gpus,
        rollout_gpus=rollout_gpus,
        colocated=not separate,
        sequences=config.data.train_batch_size * rollout.n,
        prompt=config.data.max_prompt_length,
        response=config.data.max_response_length,
        actor=_actor(config, gpus),
        critic=_critic(config, gpus) if _has_critic(config) else None,
        reference=_reference(config, gpus) if needs_reference else None,
        recompute_log_probs=not config.algorithm.rollout_correction.bypass_mode,
        tensor_parallel=rollout.tensor_model_parallel_size,
        sampler_share=rollout.gpu_memory_utilization,
        max_num_seqs=rollout.max_num_seqs,
        asleep=bool(rollout.free_cache_engine),
    )


def _has_critic(config: DictConfig) -> bool:
    """Follows verl: ``critic.enable``, or GAE where it is null."""
    enable = config.critic.enable
    return bool(config.algorithm.adv_estimator in ("gae", "dvpo", "flowrl") if enable is None else enable)


def _actor(config: DictConfig, gpus: int) -> Role:
    actor, model = config.actor_rollout_ref.actor, config.actor_rollout_ref.model
    _check_backend(actor.strategy, "actor_rollout_ref.actor.strategy", model.get("lora_rank", 0))
    shape = find_shape(model.path)
    tokens = _tokens(actor, "actor_rollout_ref.actor", "ppo_max_token_len_per_gpu", config)
    return Role(
        shape=shape,
        parameters=shape.policy,
        rest=shape.hidden + (shape.embedding if shape.tied else 0),
        outputs=shape.vocabulary,
        policy=True,
        tokens=tokens * actor.ulysses_sequence_parallel_size,
        forward_tokens=tokens * actor.ulysses_sequence_parallel_size,
        sequence_parallel=actor.ulysses_sequence_parallel_size,
        checkpointing=bool(model.enable_gradient_checkpointing),
        epochs=actor.ppo_epochs,
        **_engine(actor.fsdp_config, gpus),
    )


def _reference(config: DictConfig, gpus: int) -> Role:
    ref = config.actor_rollout_ref.ref
    own = _engine(ref.fsdp_config, gpus)
    return replace(_actor(config, gpus), sequence_parallel=ref.ulysses_sequence_parallel_size, **own)


def _critic(config: DictConfig, gpus: int) -> Role:
    critic = config.critic
    _check_backend(critic.strategy, "critic.strategy", critic.model.get("lora_rank", 0))
    shape = find_shape(critic.model.path)
    outputs, kept, value = _head(critic.get("value"))
    tokens = _tokens(critic, "critic", "ppo_max_token_len_per_gpu", config)
    forward = critic.forward_max_token_len_per_gpu if critic.use_dynamic_bsz else tokens
    parameters = shape.critic(outputs, value.get("head_width"))
    return Role(
        shape=shape,
        parameters=parameters,
        rest=parameters - shape.layers * shape.layer - (0 if shape.tied else shape.embedding),
        outputs=outputs,
        policy=False,
        tokens=tokens * critic.ulysses_sequence_parallel_size,
        forward_tokens=forward * critic.ulysses_sequence_parallel_size,
        sequence_parallel=critic.ulysses_sequence_parallel_size,
        checkpointing=bool(critic.model.enable_gradient_checkpointing),
        block=value.get("tokens_per_block"),
        kept=kept if value.get("keep_on", "device") == "device" else 0,
        epochs=critic.ppo_epochs,
        **_engine(critic.fsdp, gpus),
    )


def _head(section: DictConfig | None) -> tuple[int, int, dict[str, Any]]:
    """Returns D, the numbers kept per response token, and the fields of ``critic.value``; (1, 0) for verl's critic."""
    if section is None:
        return 1, 0, {}
    from verl_dvpo.families.registry import build_family, family_settings

    given = OmegaConf.to_container(section, resolve=True)
    assert isinstance(given, dict)
    fields = {str(name): value for name, value in given.items() if name not in ("_target_", "family")}
    try:
        family = build_family(family_settings(section.family, **fields))
    except ValueError as error:
        raise ValueError(f"critic.value.{error}") from error
    return family.num_outputs, family.num_kept, fields


def _engine(section: DictConfig, gpus: int) -> dict[str, Any]:
    """Reads an FSDP section: how many GPUs share the weights, their type, and what is offloaded."""
    size = section.fsdp_size
    return {
        "dtype": DTYPES[section.model_dtype or "fp32"],
        "shards": gpus if size in (-1, None) or size >= gpus else size,
        "offload_weights": bool(section.param_offload or section.offload_policy),
        "offload_optimizer": bool(section.optimizer_offload or section.offload_policy),
    }


def _tokens(section: DictConfig, where: str, field: str, config: DictConfig) -> int:
    """Returns the tokens of a micro-batch on one GPU."""
    if section.use_dynamic_bsz:
        return int(section[field])
    rows = section.ppo_micro_batch_size_per_gpu
    if not rows:
        raise ValueError(
            f"{where}.ppo_micro_batch_size_per_gpu is {rows!r}; a number of at least 1 is allowed; "
            f"set it, or {where}.use_dynamic_bsz=true"
        )
    return int(rows * (config.data.max_prompt_length + config.data.max_response_length))


def _check_backend(strategy: str, field: str, lora_rank: int) -> None:
    if strategy not in ("fsdp", "fsdp2"):
        raise ValueError(f"{field} is {strategy!r}; 'fsdp' and 'fsdp2' are counted; other backends are not yet")
    if lora_rank:
        raise ValueError(f"lora_rank is {lora_rank!r} beside {field}; 0 is counted; adapters are not yet")
