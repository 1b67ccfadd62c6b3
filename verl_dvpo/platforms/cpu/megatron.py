# SPDX-License-Identifier: Apache-2.0
"""The critic's Megatron engine on plain memory: verl, megatron-core and mbridge are the real ones.

Three things stand in: CUDA's functions while a method of the engine runs, layers for those of Transformer Engine, and
torch's AdamW, which megatron-core takes by itself, is given states to load into.
"""

from types import ModuleType
from typing import Any

import torch
from verl.workers.engine.base import EngineRegistry

from verl_dvpo.platforms.cpu.megatron_cuda import inside

#: Of verl's engine: the methods that reach megatron-core.
METHODS = (
    "__init__",
    "initialize",
    "to",
    "train_batch",
    "infer_batch",
    "forward_backward_batch",
    "optimizer_zero_grad",
    "optimizer_step",
    "lr_scheduler_step",
    "save_checkpoint",
    "load_checkpoint",
)


def register_engine(critic: ModuleType) -> None:
    """Registers the critic's engine for the CPU.

    Args:
        critic: the module ``verl_dvpo.critic.megatron``.
    """
    engine = on_the_cpu(critic.MegatronDistributionalEngine)
    EngineRegistry.register(model_type=critic.MODEL_TYPE, backend="megatron", device="cpu")(engine)


def on_the_cpu(engine: Any) -> Any:
    """Derives from ``engine`` a class that runs without CUDA and without Transformer Engine."""

    class CPUEngine(engine):
        optimizer: Any

        def _build_tf_config(self) -> None:
            from verl_dvpo.platforms.cpu.megatron_layers import use_local_layers

            super()._build_tf_config()
            use_local_layers(self.bridge.inner)

        def load_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            """Loads a checkpoint into states that are there, and the optimizer's count of steps with them."""
            parts = [part for part in _parts(self.optimizer) if hasattr(part, "init_state_fn")]
            for part in parts:
                open_states(part)
                keep_steps(part)
            super().load_checkpoint(*args, **kwargs)
            for part in parts:
                vars(part).pop("_set_main_param_and_optimizer_states", None)
                count_steps(part)

    for name in METHODS:
        setattr(CPUEngine, name, inside(getattr(CPUEngine, name)))
    CPUEngine.__name__ = CPUEngine.__qualname__ = f"CPU{engine.__name__}"
    return CPUEngine


def _parts(optimizer: Any) -> list[Any]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def open_states(part: Any) -> None:
    """Gives a fresh optimizer of megatron-core its states; without them torch's AdamW has no count of steps to save."""
    part.init_state_fn(part.optimizer, part.config)
    for state in part.optimizer.state.values():
        state.setdefault("step", torch.tensor(0.0))


def keep_steps(part: Any) -> None:
    """Lets a state that is loaded for other parallel sizes leave the count of steps alone.

    megatron-core 0.16.1 takes it out of what is loaded, and then asks for it, where torch's AdamW has one.
    """
    original = getattr(part, "_set_main_param_and_optimizer_states", None)
    if original is None:  # not the distributed optimizer
        return

    def set_states(parameter: Any, tensors: dict[str, torch.Tensor]) -> None:
        group, place = part.model_param_group_index_map[parameter]
        state = part.optimizer.state[part.optimizer.param_groups[group]["params"][place]]
        original(parameter, {"step": state["step"], **tensors} if "step" in state else tensors)

    part._set_main_param_and_optimizer_states = set_states


def count_steps(part: Any) -> None:
    """Sets the count of steps of each parameter to that of its group, which is the one that was saved.

    megatron-core 0.16.1 loads it, and then copies this process's own count over it.
    """
    for group in part.optimizer.param_groups:
        for parameter in group["params"]:
            if "step" in group and parameter in part.optimizer.state:
                part.optimizer.state[parameter]["step"] = torch.as_tensor(float(group["step"]))
