# SPDX-License-Identifier: Apache-2.0
"""Puts bytes and seconds of a run together: what each role has, what is there at once, how long a step takes."""

from dataclasses import asdict, dataclass
from typing import Any

from verl_dvpo.estimate import memory as mem
from verl_dvpo.estimate.gpus import Gpu
from verl_dvpo.estimate.settings import Role, Settings
from verl_dvpo.estimate.speed import Rollout, forward_flops, recomputed_flops, rollout_seconds, update_flops


@dataclass(frozen=True)
class RoleMemory:
    """One model on one GPU, in bytes.

    Attributes:
        weights, gradients, optimizer: shares of the GPU.
        gathered: what FSDP holds whole for computation.
        activations: of a micro-batch.
        outputs: logits of a policy, or the critic's head and what it keeps.
        between: what stays on the GPU while others have their turn.
    """

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    outputs: float
    between: float

    @property
    def turn(self) -> float:
        """All of it: the model's own turn."""
        return self.weights + self.gradients + self.optimizer + self.gathered + self.activations + self.outputs


def trained_memory(role: Role, kept: float = 0.0) -> RoleMemory:
    """Computes a model that learns, at the widest point of its update.

    Args:
        role: the actor or the critic.
        kept: bytes that wait on the GPU between inference and update.
    """
    states = mem.training_states(role.parameters, role.shards, role.dtype)
    tokens = role.tokens / role.sequence_parallel
    if role.policy:
        outputs = tokens * role.outputs * mem.LOGIT
    else:
        outputs = mem.head_bytes(role.shape, tokens, role.outputs, role.block) + kept
    between = (0.0 if role.offload_weights else states.weights) + (0.0 if role.offload_optimizer else states.optimizer)
    return RoleMemory(
        weights=states.weights,
        gradients=states.gradients,
        optimizer=states.optimizer,
        gathered=mem.gathered_bytes(role.shape, role.rest, training=True),
        activations=mem.activation_bytes(role.shape, tokens, checkpointing=role.checkpointing),
        outputs=outputs,
        between=between + kept,
    )


def reference_memory(role: Role) -> RoleMemory:
    """Computes a model that only looks: its logits in bf16 and once in fp32."""
    weights, tokens = role.parameters * role.dtype / role.shards, role.forward_tokens / role.sequence_parallel
    return RoleMemory(
        weights=weights,
        gradients=0.0,
        optimizer=0.0,
        gathered=mem.gathered_bytes(role.shape, role.rest, training=False),
        activations=mem.forward_bytes(role.shape, tokens),
        outputs=tokens * role.outputs * (2 + 4),
        between=0.0 if role.offload_weights else weights,
    )


def memory_of(settings: Settings, gpu: Gpu) -> dict[str, Any]:
    """Computes the memory of each role, the sampler, and what is on a GPU in each phase of a step.

    Returns:
        ``roles``: name -> `RoleMemory`; ``sampler``: ``memory.Sampler``; ``phases``: name -> bytes on the busiest GPU;
        ``peak``; ``fits``: whether the peak is within the GPU and the sampler has room for a sequence.
    """
    roles = {"actor": trained_memory(settings.actor)}
    if settings.critic is not None:
        tokens = settings.sequences * settings.response / settings.gpus
        roles["critic"] = trained_memory(settings.critic, kept=2 * 4 * settings.critic.kept * tokens)
    if settings.reference is not None:
        roles["reference"] = reference_memory(settings.reference)
    length = settings.prompt + settings.response
    sampler = mem.sampler_bytes(
        settings.actor.shape, gpu.memory, settings.sampler_share, settings.tensor_parallel, length
    )
    waiting = {name: role.between for name, role in roles.items()}
    beside = sampler.reserve if settings.colocated and not settings.asleep else 0.0
    phases = {
        f"update {name}" if name != "reference" else "reference": role.turn
        + sum(bytes_ for other, bytes_ in waiting.items() if other != name)
        + beside
        + mem.OVERHEAD
        for name, role in roles.items()
    }
    phases["rollout"] = sampler.reserve + (sum(waiting.values()) if settings.colocated else 0.0) + mem.OVERHEAD
    peak = max(phases.values())
    return {
        "roles": roles,
        "sampler": sampler,
        "phases": phases,
        "peak": peak,
        "fits": peak <= gpu.memory and sampler.sequences >= 1,
    }


def flops_of(settings: Settings, response: float) -> dict[str, float]:
    """Counts the operations of a step by phase, over all GPUs, for answers of ``response`` tokens on average."""
    length = settings.prompt + response

    def forward(role: Role) -> float:
        return forward_flops(role.shape, length, settings.sequences, role.outputs)

    def update(role: Role) -> float:
        again = recomputed_flops(role.shape, length, settings.sequences) if role.checkpointing else 0.0
        return role.epochs * update_flops(forward(role), again)

    actor, found = settings.actor, {}
    found["rollout"] = forward(actor)
    if settings.recompute_log_probs:
        found["old log-probabilities"] = forward(actor)
    if settings.reference is not None:
        found["reference"] = forward(settings.reference)
    if (critic := settings.critic) is not None:
        found["values"] = forward(critic)
        found["update critic"] = update(critic)
    found["update actor"] = update(actor)
    return found


def seconds_of(settings: Settings, gpu: Gpu, response: float, utilisation: float) -> dict[str, float]:
    """Estimates the seconds of each phase and of the whole ``step``, in which sampling may run beside training."""
    speed = settings.gpus * gpu.flops * utilisation
    found = {name: count / speed for name, count in flops_of(settings, response).items() if name != "rollout"}
    sampler = memory_of(settings, gpu)["sampler"]
    room = max(1, min(settings.max_num_seqs, sampler.sequences))
    rollout = Rollout(
        sequences=settings.sequences,
        prompt=settings.prompt,
        response=response,
        replicas=settings.rollout_gpus // settings.tensor_parallel,
        tensor_parallel=settings.tensor_parallel,
        at_once=room,
    )
    training = sum(found.values())
    found["rollout"] = rollout_seconds(settings.actor.shape, rollout, gpu, utilisation)
    found["step"] = training + found["rollout"] if settings.colocated else max(training, found["rollout"])
    return found


def result(settings: Settings, gpus: dict[str, Gpu], response: float, utilisation: float) -> dict[str, Any]:
    """Puts together what is printed, as numbers and strings: bytes, operations, seconds."""
    by_gpu: dict[str, Any] = {}
    for name, gpu in gpus.items():
        found = memory_of(settings, gpu)
        by_gpu[name] = {
            "memory": gpu.memory,
            "peak": found["peak"],
            "fits": found["fits"],
            "phases": found["phases"],
            "sampler": asdict(found["sampler"]),
            "seconds": seconds_of(settings, gpu, response, utilisation),
        }
    roles = memory_of(settings, next(iter(gpus.values())))["roles"]
    critic = settings.critic
    return {
        "recipe": settings.name,
        "gpus": settings.gpus,
        "rollout_gpus": settings.rollout_gpus,
        "sequences": settings.sequences,
        "prompt": settings.prompt,
        "response": response,
        "utilisation": utilisation,
        "actor": {"model": settings.actor.shape.name, "parameters": settings.actor.parameters},
        "critic": critic and {"model": critic.shape.name, "parameters": critic.parameters, "outputs": critic.outputs},
        "roles": {name: asdict(role) | {"turn": role.turn} for name, role in roles.items()},
        "cache_per_token": mem.cache_per_token(settings.actor.shape),
        "flops": flops_of(settings, response),
        "by_gpu": by_gpu,
    }
