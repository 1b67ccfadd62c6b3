# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations of a step, and its seconds on a GPU of known peak.

A multiplication and an addition are two operations. Shape legend: as in ``shapes``.
"""

from dataclasses import dataclass

from verl_dvpo.estimate.gpus import Gpu
from verl_dvpo.estimate.memory import cache_per_token
from verl_dvpo.estimate.shapes import Shape

#: Share of a GPU's memory bandwidth that decoding reaches.
BANDWIDTH = 0.6


def forward_flops(shape: Shape, length: float, sequences: float, outputs: int | None, *, causal: bool = True) -> float:
    """Counts one forward pass: 2 for each weight and token, and the attention's two products.

    Source: arXiv 2001.08361, section 2.1, with the attention's 4 * length^2 * A * E a layer (tag: paper), half of it
    where a kernel skips what the causal mask hides.

    Args:
        shape: of the backbone.
        length: tokens of a sequence, prompt and answer.
        sequences: number of sequences.
        outputs: of the last layer for each token: V of a policy, D of a critic; None for no last layer.
        causal: whether the hidden half of the attention is skipped.
    """
    per_token = 2 * (shape.layers * shape.layer_matrices + shape.hidden * (outputs or 0))
    attention = 4 * length * length * shape.heads * shape.head * shape.layers * (0.5 if causal else 1.0)
    return sequences * (length * per_token + attention)


def recomputed_flops(shape: Shape, length: float, sequences: float, *, causal: bool = True) -> float:
    """Counts what checkpointing computes again: all layers but the last product of each, whose result nothing needs.

    torch stops recomputation where the last saved state is there (``torch.utils.checkpoint``, early stop).

    Args:
        shape: of the backbone.
        length: tokens of a sequence.
        sequences: number of sequences.
        causal: as for `forward_flops`.
    """
    last = sequences * length * 2 * shape.mlp * shape.hidden * shape.layers
    return forward_flops(shape, length, sequences, None, causal=causal) - last


def update_flops(forward: float, recomputed: float) -> float:
    """Counts an update: a forward pass, a backward pass of twice that, and what is computed again on the way.

    Args:
        forward: operations of the whole forward pass.
        recomputed: from `recomputed_flops` with checkpointing; 0 without.
    """
    return 3 * forward + recomputed


@dataclass(frozen=True)
class Rollout:
    """The sampling of one step.

    Attributes:
        sequences: answers of the step.
        prompt: mean tokens of a prompt.
        response: mean tokens of an answer.
        replicas: copies of the policy that answer.
        tensor_parallel: GPUs of each.
        at_once: answers that one replica writes at the same time, >= 1.
    """

    sequences: int
    prompt: float
    response: float
    replicas: int
    tensor_parallel: int
    at_once: int


def rollout_seconds(shape: Shape, rollout: Rollout, gpu: Gpu, utilisation: float) -> float:
    """Estimates the seconds of a step's sampling: prefill by operations, decoding by the slower of two (ours).

    A decoding step of a replica reads its weights and the keys and values of its running sequences, at half of their
    last length on average, and computes one token for each. Sequences are taken in waves of equal length; a longest
    answer that holds up the step makes it longer.

    Args:
        shape: of the policy.
        rollout: what is sampled.
        gpu: the GPU.
        utilisation: share of the GPU's peak that matrix products reach, in (0, 1].
    """
    share = rollout.sequences / rollout.replicas
    speed = gpu.flops * utilisation * rollout.tensor_parallel
    prefill = forward_flops(shape, rollout.prompt, share, None) / speed
    running = min(share, rollout.at_once)
    waves = share / running
    context = rollout.prompt + rollout.response / 2
    read = 2 * shape.policy + running * context * cache_per_token(shape)
    by_memory = read / (gpu.bandwidth * BANDWIDTH * rollout.tensor_parallel)
    last = forward_flops(shape, 1, 1, shape.vocabulary) + 4 * context * shape.heads * shape.head * shape.layers
    by_operations = running * last / speed
    return prefill + waves * rollout.response * max(by_memory, by_operations)
