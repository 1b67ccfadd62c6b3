# SPDX-License-Identifier: Apache-2.0
"""What ``import verl`` loads, in every process of a run: names are registered here, and nothing heavy is imported.

verl 0.9.1 imports this module from ``verl/__init__.py`` while that module is still running, and logs a failure at
DEBUG only. So nothing of verl is imported here: each registration waits for the module that holds its registry and
runs right after that module's first import. A failure is logged with its traceback at ERROR, and raised.
"""

import importlib
import logging
import os
from collections.abc import Callable
from types import ModuleType

logger = logging.getLogger("verl_dvpo")


def _import(name: str) -> Callable[[ModuleType], None]:
    def hook(module: ModuleType) -> None:
        importlib.import_module(name)

    return hook


def _install(name: str) -> Callable[[ModuleType], None]:
    """Calls ``install(module)`` of our module ``name``."""

    def hook(module: ModuleType) -> None:
        importlib.import_module(name).install(module)

    return hook


def _register_search_path() -> None:
    from hydra.core.plugins import Plugins

    from verl_dvpo.hydra_plugin import VerlDvpoSearchPath

    Plugins.instance().register(VerlDvpoSearchPath)


def _register_rollout_adapter(base: ModuleType) -> None:
    base._ROLLOUT_REGISTRY[("vllm_cpu", "async")] = "verl_dvpo.platforms.cpu.rollout.CPUServerAdapter"


def _register_rollout_replica(replica: ModuleType) -> None:
    def load() -> type:
        from verl_dvpo.platforms.cpu.rollout import VLLMCPUReplica

        return VLLMCPUReplica

    replica.RolloutReplicaRegistry.register("vllm_cpu", load)


def _register_dialogue(agent_loop: ModuleType) -> None:
    agent_loop._agent_loop_registry["dialogue_agent"] = {
        "_target_": "verl_dvpo.bench.domains.agent_loop.DialogueAgentLoop"
    }


def _on_cpu(function: str) -> Callable[[ModuleType], None]:
    """Calls ``verl_dvpo.platforms.cpu.patches.<function>`` where the CPU platform was asked for."""

    def hook(module: ModuleType) -> None:
        if os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu":
            getattr(importlib.import_module("verl_dvpo.platforms.cpu.patches"), function)(module)

    return hook


# Module of verl -> what to do once it is there.
HOOKS: tuple[tuple[str, Callable[[ModuleType], None]], ...] = (
    ("verl.plugin.platform.platform_manager", _import("verl_dvpo.platforms.cpu.platform")),
    ("verl.utils.config", _install("verl_dvpo.preflight")),
    ("verl.utils.distributed", _on_cpu("use_gloo")),
    ("verl.utils.seqlen_balancing", _on_cpu("skip_single_partitions")),
    ("verl.utils.torch_functional", _on_cpu("use_whole_batch_log_probs")),
    ("verl.workers.engine.fsdp.transformer_impl", _on_cpu("register_engines")),
    ("verl.workers.engine.fsdp.transformer_impl", _import("verl_dvpo.critic.fsdp")),
    ("verl.workers.rollout.base", _register_rollout_adapter),
    ("verl.workers.rollout.replica", _register_rollout_replica),
    ("verl.trainer.ppo.core_algos", _import("verl_dvpo.estimator")),
    ("verl.trainer.ppo.v1.trainer_base", _import("verl_dvpo.trainer")),
    ("verl.trainer.ppo.reward", _install("verl_dvpo.noise.manager")),
    ("verl.experimental.agent_loop.agent_loop", _install("verl_dvpo.noise.rollout")),
    ("verl.experimental.agent_loop.agent_loop", _register_dialogue),
    ("verl.trainer.ppo.v1.trainer_base", _install("verl_dvpo.noise.metrics")),
)


def register() -> None:
    """Registers everything that verl should know of verl-dvpo. Safe to call again."""
    from wrapt import register_post_import_hook

    _register_search_path()
    for module, hook in HOOKS:
        register_post_import_hook(hook, module)
    if os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu":
        from verl_dvpo.platforms.cpu import distribution

        distribution.install()


try:
    register()
except BaseException:
    logger.exception("verl-dvpo could not be registered with verl; none of its algorithms will be found")
    raise
