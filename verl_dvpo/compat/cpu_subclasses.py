# SPDX-License-Identifier: Apache-2.0
"""The methods of verl that the CPU platform's classes redefine."""

from verl_dvpo.compat.subclasses import override

_CPU = "verl_dvpo.platforms.cpu"
_AGENT_LOOP = "verl.experimental.agent_loop.agent_loop"
_AGENT_LOOP_TQ = "verl.trainer.ppo.v1.agent_loop_tq"
_FSDP = "verl.workers.engine.fsdp.transformer_impl"
_SERVER = "verl.workers.rollout.vllm_rollout.vllm_async_server"

CPU_SUBCLASSES = (
    override(
        "verl.plugin.platform.platform_base:PlatformBase",
        f"{_CPU}.platform:PlatformCPU",
        "device_name vendor_name device_module is_available is_platform_available current_device device_count "
        "set_device synchronize manual_seed manual_seed_all set_allocator_settings empty_cache get_device_capability "
        "communication_backend_name visible_devices_envvar nvtx_range profiler_start profiler_stop ray_resource_name "
        "ray_resource_options ray_noset_envvars is_ipc_supported rollout_env_vars cudart",
        what="the interface of a platform, on plain memory",
        why="verl has no platform without an accelerator",
    ),
    override(
        f"{_FSDP}:FSDPEngine",
        f"{_CPU}.patches:without_offload",
        "_build_fsdp_module",
        what="no CPU offload",
        why="verl offloads every reference policy, which pins memory for an accelerator that is not there",
    ),
    override(
        "verl.checkpoint_engine.base:CheckpointEngine",
        f"{_CPU}.checkpoint_engine:GlooCheckpointEngine",
        "prepare build_topology init_process_group finalize send_weights receive_weights",
        what="weights go over gloo to rollout servers apart from the actor",
        why="verl's engines need an accelerator or its network",
    ),
    override(
        "verl.workers.rollout.vllm_rollout.vllm_rollout:ServerAdapter",
        f"{_CPU}.rollout:CPUServerAdapter",
        "__init__",
        what="the socket of the weight transfer is named after the cluster as well as the job",
        why="every Ray cluster counts its jobs from 1, so two runs on one machine would meet at one socket",
    ),
    override(
        f"{_SERVER}:vLLMHttpServer",
        f"{_CPU}.rollout:VLLMCPUHttpServer",
        "__init__ _get_worker_extension_cls _get_engine_kwargs_key",
        what="the server's side of that socket, and a worker extension for CPU layers",
        why="verl names the extension in a method of the server",
    ),
    override(
        f"{_SERVER}:vLLMReplica",
        f"{_CPU}.rollout:VLLMCPUReplica",
        "__init__ _get_server_name_prefix",
        what="the replica starts that server",
        why="verl names the server's class in the replica",
    ),
    override(
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
    override(
        f"{_AGENT_LOOP_TQ}:AgentLoopWorkerTQ",
        f"{_CPU}.agent_loops:CPUAgentLoopWorker",
        "__init__",
        what="rewards are scored in the worker's own process, and writes are gathered",
        why="verl sends each sample to a reward worker and back",
        relies_on=(f"{_AGENT_LOOP}:AgentLoopWorker.__init__", "ray.actor:_ActorClassMetadata"),
    ),
    override(
        f"{_AGENT_LOOP}:AgentLoopWorker",
        f"{_CPU}.agent_loops:CPUAgentLoopWorker",
        "_run_agent_loop",
        what="each answer has a seed of its own",
        why="verl draws all samples from one stream, in the order in which requests arrive",
    ),
    override(
        f"{_AGENT_LOOP_TQ}:AgentLoopManagerTQ",
        f"{_CPU}.agent_loops:CPUAgentLoopManager",
        "__init__",
        what="the manager starts that worker",
        why="verl names the worker's class in the manager",
        relies_on=(f"{_AGENT_LOOP}:AgentLoopManager.__init__",),
    ),
    override(
        "verl.workers.rollout.llm_server:LLMServerClient",
        f"{_CPU}.agent_loops:SeededClient",
        "generate",
        what="the turns of an answer draw apart",
        why="one seed would give each turn the same draws",
        relies_on=("verl.workers.rollout.llm_server:FullyAsyncLLMServerClient.generate",),
    ),
    override(
        "verl.workers.rollout.llm_server:LLMServerClient",
        f"{_CPU}.agent_loops:OneServerClient",
        "_acquire_server _release_server",
        what="a single server is asked for once",
        why="verl asks an actor for a server, and tells it when done, for each sample",
    ),
)
