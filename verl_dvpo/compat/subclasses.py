# SPDX-License-Identifier: Apache-2.0
"""The methods of verl that classes of ours redefine."""

from verl_dvpo.compat.entry import Entry, Kind
from verl_dvpo.compat.versions import SUPPORTED

_CPU = "verl_dvpo.platforms.cpu"
_AGENT_LOOP = "verl.experimental.agent_loop.agent_loop"
_AGENT_LOOP_TQ = "verl.trainer.ppo.v1.agent_loop_tq"
_ENGINE = "verl_dvpo.critic.fsdp:FSDPDistributionalEngine"
_FSDP = "verl.workers.engine.fsdp.transformer_impl"
_MEGATRON = "verl.workers.engine.megatron.transformer_impl"
_MEGATRON_ENGINE = "verl_dvpo.critic.megatron:MegatronDistributionalEngine"
_SERVER = "verl.workers.rollout.vllm_rollout.vllm_async_server"
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


def _override(
    symbol: str,
    ours: str,
    members: str,
    *,
    what: str,
    why: str,
    relies_on: tuple[str, ...] = (),
    versions: tuple[str, ...] = tuple(SUPPORTED),
) -> Entry:
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
    _override(
        _TRAINER,
        _MIXIN,
        "__init__",
        what="verl sees the base mode's name, and the version of verl is checked",
        why="verl compares the mode's name in several places",
        relies_on=(f"{_SEPARATE}.__init__",),
    ),
    _override(
        _TRAINER,
        _MIXIN,
        "_build_replay_buffer",
        what="the buffer asks TransferQueue every poll_interval seconds",
        why="verl waits 2 s, most of a small run's step",
    ),
    _override(
        _TRAINER,
        _MIXIN,
        "_init_resource_pool_mgr",
        what="the critic's role is played by our worker",
        why="verl names its worker in this method",
        relies_on=(f"{_SEPARATE}._init_resource_pool_mgr",),
    ),
    _override(
        _TRAINER,
        _MIXIN,
        "_fetch_one_gen_batch _balance_batch",
        what="samples are worked on in the order of the data",
        why="sums of floats depend on the order, and verl's is the order of arrival",
    ),
    _override(
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
    _override(
        _TRAINER,
        _MIXIN,
        "_compute_advantage",
        what="values reach the estimator dvpo, and rewards that are not finite stop the run",
        why="verl passes values to gae only",
    ),
    _override(
        _TRAINER,
        _MIXIN,
        "_update_critic",
        what="gamma, lam and the step reach the critic",
        why="verl's critic has its targets built by the trainer",
    ),
    _override(
        _TRAINER,
        _MIXIN,
        "_save_checkpoint",
        what="the critic learns the run's seeds and the hash of its configuration before it saves",
        why="its manifest names them, and a worker sees its own section only",
    ),
    *(
        _override(
            trainer,
            _MIXIN,
            "on_step_end",
            what="pictures of the critic's values go to the loggers that take images",
            why="verl hands its loggers numbers only",
        )
        for trainer in (_TRAINER, *_MODES)
    ),
    _override(
        _TRAINER,
        _GUARDED,
        "__init__ init fit on_step_begin on_sample_begin on_step_end _compute_old_log_prob _compute_values "
        "_update_critic _update_actor _validate",
        what="a run whose part has died, or in which nothing moves, ends with a message",
        why="verl notices a dead process only where it waits for that very process",
    ),
    *(
        _override(
            trainer,
            _GUARDED,
            members,
            what="the watch learns which phase begins",
            why="each of verl's trainers has its own",
        )
        for trainer, members in zip(_MODES, ("on_step_end", "on_step_end", "on_step_end on_sample_begin"), strict=True)
    ),
    _override(
        _SEPARATE,
        _GUARDED,
        "on_step_begin",
        what="the watch learns which phase begins",
        why="each of verl's trainers has its own",
        versions=("0.9.1", "0.10.0.dev0"),
    ),
    _override(
        _TRAINER,
        _GUARDED,
        "_build_replay_buffer",
        what="each answer that comes is a sign of progress",
        why="verl's buffer waits without a limit",
        relies_on=(f"{_BUFFER}._wait_for_next_poll", f"{_BUFFER}._sync_metadata_from_transfer_queue"),
    ),
    _override(
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
    _override(
        "verl.workers.engine_workers:TrainingWorker",
        _WORKER,
        "__init__ set_loss_fn",
        what="the engine is ours, and the loss is the family's",
        why="the trainer names verl's value model and hands every critic verl's value loss",
        relies_on=(f"{_TRAINER}._setup",),
    ),
    _override(
        "verl.workers.engine_workers:TrainingWorker",
        _WORKER,
        "infer_batch train_mini_batch",
        what="the worker keeps the samples of its inference and builds its targets from them",
        why="nothing of size B*T*K may cross a process border",
    ),
    _override(
        "verl.workers.engine_workers:TrainingWorker",
        _WORKER,
        "save_checkpoint load_checkpoint",
        what="a manifest is written last, and everything is checked against it before anything loads",
        why="verl loads whatever is there, part by part",
        relies_on=("verl.utils.checkpoint.fsdp_checkpoint_manager:FSDPCheckpointManager.save_checkpoint",),
    ),
    _override(
        f"{_FSDP}:FSDPEngine",
        _ENGINE,
        "load_checkpoint",
        what="verl's files are read as data",
        why="verl asks torch.load for pickles, which run what they hold",
        relies_on=("verl.utils.checkpoint.fsdp_checkpoint_manager:FSDPCheckpointManager.load_checkpoint",),
    ),
    _override(
        f"{_FSDP}:FSDPEngine",
        _ENGINE,
        "_build_module _build_lora_module _build_fsdp_module",
        what="the backbone has one fp32 head of D outputs, wrapped and trained on its own",
        why="verl loads a head with one output in the backbone's precision",
    ),
    _override(
        "verl.workers.engine.base:BaseEngine",
        "verl_dvpo.critic.engine:DistributionalEngine",
        "infer_batch",
        what="the decoded samples stay on the rank",
        why="verl gathers everything that an engine returns",
    ),
    _override(
        f"{_FSDP}:FSDPEngineWithLMHead",
        _ENGINE,
        "prepare_model_inputs prepare_model_outputs",
        what="the head computes response tokens only; outputs are jagged (B, T, D)",
        why="verl's are probabilities of tokens, at every position",
    ),
    _override(
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
    _override(
        f"{_MEGATRON}:MegatronEngine",
        _MEGATRON_ENGINE,
        "_build_optimizer load_checkpoint",
        what="states of the optimizer are saved under the right parameters, and loaded without gradients",
        why="megatron-core 0.16.1 mixes them up where fp32 and half-precision parameters share a group",
    ),
    _override(
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
    _override(
        f"{_MEGATRON}:MegatronEngineWithLMHead",
        _MEGATRON_ENGINE,
        "postprocess_micro_batch_func",
        what="outputs of a training pass are dropped after the loss",
        why="verl keeps them, D numbers a token, until the mini-batch ends",
    ),
    _override(
        "verl.workers.config.critic:McoreCriticConfig",
        "verl_dvpo.critic.megatron_config:DistributionalMegatronCriticConfig",
        "__post_init__ validate",
        what="critic.value reaches the model's configuration, and what cannot run is refused",
        why="verl's critic configuration has no section for a family",
    ),
    _override(
        "verl.workers.config.engine:McoreEngineConfig",
        "verl_dvpo.critic.megatron_config:MegatronEngineConfig",
        "__post_init__",
        what="the backbone's precision may be float32",
        why="verl's check knows half precisions only, and platform=cpu computes in fp32",
    ),
    _override(
        "verl.workers.config.critic:FSDPCriticConfig",
        "verl_dvpo.critic.config:DistributionalFSDPCriticConfig",
        "__post_init__",
        what="critic.value reaches the model's configuration",
        why="verl's critic configuration has no section for a family",
    ),
    _override(
        "verl.workers.config.model:HFModelConfig",
        "verl_dvpo.critic.config:ValueModelConfig",
        "_mutable_fields",
        what="the model's configuration carries the family's",
        why="the engine gets nothing else of the critic's configuration",
    ),
)

_CPU_PLATFORM = (
    _override(
        "verl.plugin.platform.platform_base:PlatformBase",
        f"{_CPU}.platform:PlatformCPU",
        "device_name vendor_name device_module is_available is_platform_available current_device device_count "
        "set_device synchronize manual_seed manual_seed_all set_allocator_settings empty_cache get_device_capability "
        "communication_backend_name visible_devices_envvar nvtx_range profiler_start profiler_stop ray_resource_name "
        "ray_resource_options ray_noset_envvars is_ipc_supported rollout_env_vars cudart",
        what="the interface of a platform, on plain memory",
        why="verl has no platform without an accelerator",
    ),
    _override(
        f"{_FSDP}:FSDPEngine",
        f"{_CPU}.patches:without_offload",
        "_build_fsdp_module",
        what="no CPU offload",
        why="verl offloads every reference policy, which pins memory for an accelerator that is not there",
    ),
    _override(
        "verl.workers.rollout.vllm_rollout.vllm_rollout:ServerAdapter",
        f"{_CPU}.rollout:CPUServerAdapter",
        "__init__",
        what="the socket of the weight transfer is named after the cluster as well as the job",
        why="every Ray cluster counts its jobs from 1, so two runs on one machine would meet at one socket",
    ),
    _override(
        f"{_SERVER}:vLLMHttpServer",
        f"{_CPU}.rollout:VLLMCPUHttpServer",
        "__init__ _get_worker_extension_cls _get_engine_kwargs_key",
        what="the server's side of that socket, and a worker extension for CPU layers",
        why="verl names the extension in a method of the server",
    ),
    _override(
        f"{_SERVER}:vLLMReplica",
        f"{_CPU}.rollout:VLLMCPUReplica",
        "__init__ _get_server_name_prefix",
        what="the replica starts that server",
        why="verl names the server's class in the replica",
    ),
    _override(
        "verl.workers.rollout.vllm_rollout.utils:vLLMColocateWorkerExtension",
        f"{_CPU}.vllm_worker:CPUWorkerExtension",
        "update_weights_from_ipc _get_zmq_handle",
        what="weights are copied out of the bucket and loaded with reload_weights; the socket is among the run's files",
        why="vLLM's CPU layers repack their weights after loading and cannot load into the packed ones; verl's socket "
        "stays in /tmp where a process is killed",
        relies_on=(
            "verl.workers.rollout.vllm_rollout.bucketed_weight_transfer:BucketedWeightReceiver.__init__",
            "verl.workers.rollout.vllm_rollout.bucketed_weight_transfer:BucketedWeightReceiver.receive_weights",
            "vllm.v1.worker.gpu_model_runner:GPUModelRunner.reload_weights",
        ),
    ),
    _override(
        f"{_AGENT_LOOP_TQ}:AgentLoopWorkerTQ",
        f"{_CPU}.agent_loops:CPUAgentLoopWorker",
        "__init__",
        what="rewards are scored in the worker's own process, and writes are gathered",
        why="verl sends each sample to a reward worker and back",
        relies_on=(f"{_AGENT_LOOP}:AgentLoopWorker.__init__", "ray.actor:_ActorClassMetadata"),
    ),
    _override(
        f"{_AGENT_LOOP}:AgentLoopWorker",
        f"{_CPU}.agent_loops:CPUAgentLoopWorker",
        "_run_agent_loop",
        what="each answer has a seed of its own",
        why="verl draws all samples from one stream, in the order in which requests arrive",
    ),
    _override(
        f"{_AGENT_LOOP_TQ}:AgentLoopManagerTQ",
        f"{_CPU}.agent_loops:CPUAgentLoopManager",
        "__init__",
        what="the manager starts that worker",
        why="verl names the worker's class in the manager",
        relies_on=(f"{_AGENT_LOOP}:AgentLoopManager.__init__",),
    ),
    _override(
        "verl.workers.rollout.llm_server:LLMServerClient",
        f"{_CPU}.agent_loops:SeededClient",
        "generate",
        what="the turns of an answer draw apart",
        why="one seed would give each turn the same draws",
    ),
    _override(
        "verl.workers.rollout.llm_server:LLMServerClient",
        f"{_CPU}.agent_loops:OneServerClient",
        "_acquire_server _release_server",
        what="a single server is asked for once",
        why="verl asks an actor for a server, and tells it when done, for each sample",
    ),
)

_OTHERS = (
    _override(
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
    _override(
        f"{_AGENT_LOOP}:AgentLoopBase",
        "verl_dvpo.bench.tasks.agent_loop:DialogueAgentLoop",
        "__init__ run",
        what="a dialogue with a simulated user",
        why="this is verl's way to add an agent loop",
    ),
)

SUBCLASSES: tuple[Entry, ...] = (*_TRAINERS, *_CRITIC, *_CPU_PLATFORM, *_OTHERS)
