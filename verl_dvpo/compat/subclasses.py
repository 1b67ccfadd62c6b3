# SPDX-License-Identifier: Apache-2.0
"""The methods of verl that classes of ours redefine."""

from verl_dvpo.compat.entry import Entry, Kind
from verl_dvpo.compat.versions import SUPPORTED

_AGENT_LOOP = "verl.experimental.agent_loop.agent_loop"
_ENGINE = "verl_dvpo.critic.fsdp:FSDPDistributionalEngine"
_FSDP = "verl.workers.engine.fsdp.transformer_impl"
_MEGATRON = "verl.workers.engine.megatron.transformer_impl"
_MEGATRON_ENGINE = "verl_dvpo.critic.megatron:MegatronDistributionalEngine"
_SEPARATE = "verl.trainer.ppo.v1.trainer_separate_async:PPOTrainerSeparateAsync"
_TRAINER = "verl.trainer.ppo.v1.trainer_base:PPOTrainer"
_MODES = (
    "verl.trainer.ppo.v1.trainer_sync:PPOTrainerSync",
    "verl.trainer.ppo.v1.trainer_colocate_async:PPOTrainerColocateAsync",
    _SEPARATE,
)
_MIXIN = "verl_dvpo.trainer:DistributionalCriticMixin"
_GUARDED = "verl_dvpo.guarded:GuardedTrainer"
_BUFFER = "verl.trainer.ppo.v1.replay_buffer:ReplayBuffer"
_CHECKPOINTS = "verl.utils.checkpoint.checkpoint_manager"
_WORKER = "verl_dvpo.critic.worker:DistributionalCriticWorker"


def override(
    symbol: str,
    ours: str,
    members: str,
    *,
    what: str,
    why: str,
    relies_on: tuple[str, ...] = (),
    versions: tuple[str, ...] = tuple(SUPPORTED),
) -> Entry:
    """Makes the row of methods ``members``, separated by spaces, that ``ours`` redefines of the class ``symbol``."""
    return Entry(
        symbol=symbol,
        kind=Kind.OVERRIDE,
        ours=ours,
        members=tuple(members.split()),
        what=what,
        why=why,
        relies_on=relies_on,
        versions=versions,
    )


_TRAINERS = (
    override(
        _TRAINER,
        _MIXIN,
        "__init__",
        what="verl sees the base mode's name, and the version of verl is checked",
        why="verl compares the mode's name in several places",
        relies_on=(f"{_SEPARATE}.__init__",),
    ),
    override(
        _TRAINER,
        _MIXIN,
        "_build_replay_buffer",
        what="the buffer asks TransferQueue every poll_interval seconds",
        why="verl waits 2 s, most of a small run's step",
    ),
    override(
        _TRAINER,
        _MIXIN,
        "_init_resource_pool_mgr",
        what="the critic's role is played by our worker",
        why="verl names its worker in this method",
        relies_on=(f"{_SEPARATE}._init_resource_pool_mgr",),
    ),
    override(
        _TRAINER,
        _MIXIN,
        "_fetch_one_gen_batch _balance_batch",
        what="samples are worked on in the order of the data",
        why="sums of floats depend on the order, and verl's is the order of arrival",
    ),
    override(
        _TRAINER,
        _MIXIN,
        "_compute_old_log_prob _compute_ref_log_prob _compute_values _update_actor",
        what="a worker fetches the fields that it reads, instead of all",
        why="what the rollout keeps beside tensors costs more than the models' passes",
        relies_on=(
            f"{_SEPARATE}._compute_old_log_prob",
            f"{_FSDP}:FSDPEngineWithLMHead.prepare_model_inputs",
            "verl.workers.utils.losses:ppo_loss",
        ),
    ),
    override(
        _TRAINER,
        _MIXIN,
        "_compute_advantage",
        what="values reach the estimator dvpo, and rewards that are not finite stop the run",
        why="verl passes values to gae only",
    ),
    override(
        _TRAINER,
        _MIXIN,
        "_update_critic",
        what="gamma, lam and the step reach the critic",
        why="verl's critic has its targets built by the trainer",
    ),
    override(
        _TRAINER,
        _MIXIN,
        "_save_checkpoint",
        what="the critic learns the run's seeds and the hash of its configuration before it saves",
        why="its manifest names them, and a worker sees its own section only",
    ),
    *(
        override(
            trainer,
            _MIXIN,
            "on_step_end",
            what="pictures of the critic's values go to the loggers that take images",
            why="verl hands its loggers numbers only",
        )
        for trainer in (_TRAINER, *_MODES)
    ),
    override(
        _TRAINER,
        _GUARDED,
        "__init__ init fit on_step_begin on_sample_begin on_step_end _compute_old_log_prob _compute_values "
        "_update_critic _update_actor _validate",
        what="a run whose part has died, or in which nothing moves, ends with a message",
        why="verl notices a dead process only where it waits for that very process",
    ),
    *(
        override(
            trainer,
            _GUARDED,
            members,
            what="the watch learns which phase begins",
            why="each of verl's trainers has its own",
        )
        for trainer, members in zip(_MODES, ("on_step_end", "on_step_end", "on_step_end on_sample_begin"), strict=True)
    ),
    override(
        _SEPARATE,
        _GUARDED,
        "on_step_begin",
        what="the watch learns which phase begins",
        why="each of verl's trainers has its own",
        versions=("0.9.1", "0.10.0.dev0"),
    ),
    override(
        _TRAINER,
        _GUARDED,
        "_build_replay_buffer",
        what="each answer that comes is a sign of progress",
        why="verl's buffer waits without a limit",
        relies_on=(f"{_BUFFER}._wait_for_next_poll", f"{_BUFFER}._sync_metadata_from_transfer_queue"),
    ),
    override(
        _TRAINER,
        _GUARDED,
        "_load_checkpoint _save_checkpoint",
        what="a damaged checkpoint is passed over, and the one before is kept until the new one is whole",
        why="torch.load does not compare checksums, and with room for one checkpoint verl removes the old actor before "
        "the new critic is written",
        relies_on=(
            f"{_CHECKPOINTS}:BaseCheckpointManager.ensure_checkpoint_capacity",
            f"{_CHECKPOINTS}:BaseCheckpointManager.register_checkpoint",
            f"{_CHECKPOINTS}:find_latest_ckpt_path",
        ),
    ),
)

_CRITIC = (
    override(
        "verl.workers.engine_workers:TrainingWorker",
        _WORKER,
        "__init__ set_loss_fn",
        what="the engine is ours, and the loss is the family's",
        why="the trainer names verl's value model and hands every critic verl's value loss",
        relies_on=(f"{_TRAINER}._setup",),
    ),
    override(
        "verl.workers.engine_workers:TrainingWorker",
        _WORKER,
        "infer_batch train_mini_batch",
        what="the worker keeps the samples of its inference and builds its targets from them",
        why="nothing of size B*T*K may cross a process border",
    ),
    override(
        "verl.workers.engine_workers:TrainingWorker",
        _WORKER,
        "save_checkpoint load_checkpoint",
        what="a manifest is written last, and everything is checked against it before anything loads",
        why="verl loads whatever is there, part by part",
        relies_on=("verl.utils.checkpoint.fsdp_checkpoint_manager:FSDPCheckpointManager.save_checkpoint",),
    ),
    override(
        f"{_FSDP}:FSDPEngine",
        _ENGINE,
        "load_checkpoint",
        what="verl's files are read as data",
        why="verl asks torch.load for pickles, which run what they hold",
        relies_on=("verl.utils.checkpoint.fsdp_checkpoint_manager:FSDPCheckpointManager.load_checkpoint",),
    ),
    override(
        f"{_FSDP}:FSDPEngine",
        _ENGINE,
        "_build_module _build_lora_module _build_fsdp_module",
        what="the backbone has one fp32 head of D outputs, wrapped and trained on its own",
        why="verl loads a head with one output in the backbone's precision",
    ),
    override(
        "verl.workers.engine.base:BaseEngine",
        "verl_dvpo.critic.engine:DistributionalEngine",
        "infer_batch",
        what="the decoded samples stay on the rank",
        why="verl gathers everything that an engine returns",
    ),
    override(
        f"{_FSDP}:FSDPEngineWithLMHead",
        _ENGINE,
        "prepare_model_inputs prepare_model_outputs",
        what="the head computes response tokens only; outputs are jagged (B, T, D)",
        why="verl's are probabilities of tokens, at every position",
    ),
    override(
        f"{_MEGATRON}:MegatronEngine",
        _MEGATRON_ENGINE,
        "__init__ _build_tf_config",
        what="verl builds a value model, whose output layer comes from our bridge around mbridge's",
        why="verl knows the model type value_model only, and mbridge a value head of one output only",
        relies_on=(
            f"{_MEGATRON}:MegatronEngine._build_megatron_module",
            "verl.utils.megatron_utils:make_megatron_module",
            "verl.models.mcore.model_forward:gptmodel_forward_model_engine",
            f"{_MEGATRON}:MegatronEngineWithValueHead.forward_step",
        ),
    ),
    override(
        f"{_MEGATRON}:MegatronEngine",
        _MEGATRON_ENGINE,
        "_build_optimizer load_checkpoint",
        what="states of the optimizer are saved under the right parameters, and loaded without gradients",
        why="megatron-core 0.16.1 mixes them up where fp32 and half-precision parameters share a group",
    ),
    override(
        f"{_MEGATRON}:MegatronEngineWithValueHead",
        _MEGATRON_ENGINE,
        "forward_step prepare_model_outputs",
        what="the head computes response tokens only; outputs are jagged (B, T, D), decoded in inference",
        why="verl's are one value a token, at every position",
        relies_on=(
            "verl.models.mcore.util:preprocess_thd_engine",
            "verl.models.mcore.util:preprocess_bshd_engine",
        ),
    ),
    override(
        f"{_MEGATRON}:MegatronEngineWithLMHead",
        _MEGATRON_ENGINE,
        "postprocess_micro_batch_func",
        what="outputs of a training pass are dropped after the loss",
        why="verl keeps them, D numbers a token, until the mini-batch ends",
    ),
    override(
        "verl.workers.config.critic:McoreCriticConfig",
        "verl_dvpo.critic.megatron_config:DistributionalMegatronCriticConfig",
        "__post_init__ validate",
        what="critic.value reaches the model's configuration, and what cannot run is refused",
        why="verl's critic configuration has no section for a family",
    ),
    override(
        "verl.workers.config.engine:McoreEngineConfig",
        "verl_dvpo.critic.megatron_config:MegatronEngineConfig",
        "__post_init__",
        what="the backbone's precision may be float32",
        why="verl's check knows half precisions only, and platform=cpu computes in fp32",
    ),
    override(
        "verl.workers.config.critic:FSDPCriticConfig",
        "verl_dvpo.critic.config:DistributionalFSDPCriticConfig",
        "__post_init__",
        what="critic.value reaches the model's configuration",
        why="verl's critic configuration has no section for a family",
    ),
    override(
        "verl.workers.config.model:HFModelConfig",
        "verl_dvpo.critic.config:ValueModelConfig",
        "_mutable_fields",
        what="the model's configuration carries the family's",
        why="the engine gets nothing else of the critic's configuration",
    ),
)

_OTHERS = (
    override(
        "verl.experimental.reward_loop.reward_manager.naive:NaiveRewardManager",
        "verl_dvpo.noise.manager:noisy",
        "__init__ run_single",
        what="the reward function is wrapped, and a reward that fails in training is NaN with a reason",
        why="verl logs the error and goes on without the sample",
        relies_on=(
            "verl.experimental.reward_loop.reward_loop:RewardLoopWorker.compute_score",
            "verl.experimental.reward_loop.reward_manager.base:RewardManagerBase.__init__",
        ),
    ),
    override(
        f"{_AGENT_LOOP}:AgentLoopBase",
        "verl_dvpo.bench.tasks.agent_loop:DialogueAgentLoop",
        "__init__ run",
        what="a dialogue with a simulated user",
        why="this is verl's way to add an agent loop",
    ),
)

SUBCLASSES: tuple[Entry, ...] = (*_TRAINERS, *_CRITIC, *_OTHERS)
