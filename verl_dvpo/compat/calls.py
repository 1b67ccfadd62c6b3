# SPDX-License-Identifier: Apache-2.0
"""The functions of verl and Ray that our code calls by position.

Their order of parameters is ours to watch: a call that goes on to work with other meanings raises nothing.
"""

from verl_dvpo.compat.entry import Entry, Kind
from verl_dvpo.compat.versions import SUPPORTED

_AGENT_LOOP = "verl.experimental.agent_loop.agent_loop:AgentLoopBase"


def _call(
    symbol: str, ours: str, what: str, *, members: str = "", versions: tuple[str, ...] = tuple(SUPPORTED)
) -> Entry:
    return Entry(
        symbol=symbol,
        kind=Kind.CALL,
        ours=ours,
        members=tuple(members.split()),
        what=what,
        why="called by position",
        versions=versions,
    )


CALLS: tuple[Entry, ...] = (
    _call("verl.trainer.ppo.core_algos:get_adv_estimator_fn", "verl_dvpo.trainer", "finds the estimator"),
    _call("verl.trainer.ppo.ray_trainer:apply_kl_penalty", "verl_dvpo.trainer", "subtracts the KL penalty"),
    _call(
        "verl.trainer.ppo.rollout_corr_helper:compute_rollout_correction_and_add_to_batch",
        "verl_dvpo.trainer",
        "computes importance weights",
    ),
    _call("verl.utils.tensordict_utils:assign_non_tensor_stack", "verl_dvpo.trainer", "names the prompts"),
    _call("verl.workers.utils.padding:response_to_nested", "verl_dvpo.trainer", "makes (B, T) jagged"),
    _call("verl.trainer.ppo.core_algos:compute_gae_advantage_return", "verl_dvpo.estimator", "computes advantages"),
    _call("verl.utils.torch_functional:masked_whiten", "verl_dvpo.estimator", "whitens advantages"),
    _call("verl.trainer.ppo.utils:need_critic", "verl_dvpo.preflight", "tells whether there is a critic"),
    _call("verl.trainer.ppo.utils:need_reference_policy", "verl_dvpo.train", "tells whether there is a reference"),
    _call("verl.plugin.platform.platform_manager:set_platform", "verl_dvpo.preflight", "sets the platform"),
    _call("verl.plugin.platform.platform_manager:get_platform", "verl_dvpo.preflight", "reads the platform"),
    _call("verl.utils.device:auto_set_device", "verl_dvpo.train", "writes trainer.device"),
    _call("verl.trainer.main_ppo:run_ppo", "verl_dvpo.train", "runs the training"),
    _call("ray._private.worker:remote", "verl_dvpo.trainer", "makes an actor's class"),
    _call("ray._private.state:actors", "verl_dvpo.health", "reads Ray's table of actors"),
    _call(
        "ray._private.services:get_node_ip_address", "verl_dvpo.platforms.cpu.loopback", "finds the loopback address"
    ),
    _call("ray.util.placement_group:PlacementGroup", "verl_dvpo.train", "names a placement group", members="__init__"),
    _call("verl.utils.fsdp_utils:fsdp2_load_full_state_dict", "verl_dvpo.critic.fsdp", "fills the head"),
    _call("verl.utils.torch_dtypes:PrecisionType", "verl_dvpo.critic.fsdp", "reads a type's name", members="to_dtype"),
    _call("verl.utils.ulysses:gather_outputs_and_unpad", "verl_dvpo.critic.fsdp", "gathers outputs of a sequence"),
    _call(
        "verl.workers.rollout.utils:ensure_async_iterator",
        "verl_dvpo.platforms.cpu.checkpoint_engine",
        "takes weights from either kind of generator",
    ),
    _call("verl.utils.megatron_utils:unwrap_model", "verl_dvpo.critic.megatron_bridge", "finds the output layer"),
    _call("verl.utils.tensordict_utils:get", "verl_dvpo.critic.worker", "reads metrics"),
    _call("verl.utils.tensordict_utils:pop", "verl_dvpo.critic.worker", "takes scalars out of a batch"),
    _call("verl.utils.tensordict_utils:get_tensordict", "verl_dvpo.critic.worker", "makes a batch to infer again"),
    _call("verl.utils.tensordict_utils:assign_non_tensor", "verl_dvpo.critic.worker", "makes a batch to infer again"),
    _call(
        "verl.experimental.reward_loop.reward_loop:RewardLoopWorker",
        "verl_dvpo.platforms.cpu.agent_loops",
        "scores in this process",
        members="__init__",
    ),
    _call(
        "verl.workers.rollout.vllm_rollout.utils:vLLMColocateWorkerExtension",
        "verl_dvpo.platforms.cpu.vllm_worker",
        "loads adapters",
        members="_update_weights",
    ),
    _call(
        _AGENT_LOOP,
        "verl_dvpo.bench.tasks.agent_loop",
        "turns messages into tokens",
        members="ct_build_initial_tokens ct_merge_assistant_token",
    ),
    _call(
        _AGENT_LOOP,
        "verl_dvpo.compat.moved:merge_context",
        "adds the user's turn",
        members="ct_merge_context_msg",
        versions=("0.9.1",),
    ),
    _call(
        _AGENT_LOOP,
        "verl_dvpo.compat.moved:merge_context",
        "adds the user's turn",
        members="ct_merge_non_assistant_msg",
        versions=("0.9.0", "0.10.0.dev0"),
    ),
    _call("verl.utils.profiler.performance:simple_timer", "verl_dvpo.bench.tasks.agent_loop", "times a generation"),
)
