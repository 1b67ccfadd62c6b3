# SPDX-License-Identifier: Apache-2.0
"""Bytes on one GPU: weights, gradients and optimizer under FSDP, activations, outputs, the sampler's cache.

Shape legend: as in ``shapes``; n tokens of a micro-batch on this GPU.
"""

from dataclasses import dataclass

from verl_dvpo.estimate.shapes import Shape

GIB = 1024**3
#: Bytes of a number.
DTYPES = {"fp32": 4, "float32": 4, "bf16": 2, "bfloat16": 2, "fp16": 2, "float16": 2}
#: Bytes of a logit in an update: bf16 and its gradient, and one copy in fp32 for the softmax.
LOGIT = 2 + 2 + 4
#: Bytes of a number of the critic's head in an update: fp32, its gradient, and one working copy of the loss.
OUTPUT = 3 * 4
#: Bytes that are there whatever runs: the CUDA context, NCCL's buffers, the allocator's slack.
OVERHEAD = 2 * GIB
#: Bytes beside weights and cache of the sampler: CUDA graphs and its own activations.
SAMPLER_OVERHEAD = 2 * GIB


@dataclass(frozen=True)
class States:
    """Holds the bytes on one GPU that stay from step to step."""

    weights: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer


def training_states(parameters: int, shards: int, dtype: int = 4) -> States:
    """Computes weights, gradients and AdamW's two moments, all in the type of the sharded weights.

    Source: ZeRO stage 3 (arXiv 1910.02054, section 3.1), with FSDP2's sharded gradients (tag: paper).

    Args:
        parameters: of the model.
        shards: GPUs that share them, >= 1.
        dtype: bytes of a weight (``model_dtype``; verl trains in fp32 with bf16 computation).
    """
    share = parameters * dtype / shards
    return States(weights=share, gradients=share, optimizer=2 * share)


def gathered_bytes(shape: Shape, rest: int, *, training: bool) -> float:
    """Computes what FSDP2 holds whole for computation, in bf16: a layer and the largest group beside it, and the root.

    Groups are the layers, and embedding and output layer where they are not tied; what is in no group is the root's. In
    training one group's gradient is there as well, in bf16 and in fp32 for its reduction.

    Args:
        shape: of the backbone.
        rest: parameters that are neither in a layer nor in an untied embedding or output layer.
        training: whether there is a backward pass.
    """
    largest = shape.layer if shape.tied else max(shape.layer, shape.embedding)
    weights = 2.0 * (shape.layer + largest + rest)
    return weights + (6.0 * max(largest, rest) if training else 0.0)


def layer_activations(shape: Shape) -> float:
    """Counts the bytes that one layer saves for its backward pass, per token, in bf16 with an attention that fuses.

    In the manner of arXiv 2205.05198, section 4.1, for this kind of layer (ours): two norms (the input in fp32 and the
    normalised states), the inputs of the projections, query, key, value, output and log-sum of the attention, and four
    (F,) states of the gated MLP; qwen3 normalises queries and keys, too.
    """
    queries, keys = shape.heads * shape.head, shape.groups * shape.head
    norms = 2 * 6 * shape.hidden + (6 * (queries + keys) if shape.model_type == "qwen3" else 0)
    attention = 2 * shape.hidden + 2 * (2 * queries + 2 * keys) + 4 * shape.heads
    return norms + attention + 2 * shape.hidden + 8 * shape.mlp


def activation_bytes(shape: Shape, tokens: float, *, checkpointing: bool) -> float:
    """Computes what a micro-batch's backward pass needs, without the outputs.

    With checkpointing each layer keeps its input, (n, H) in bf16, and one layer at a time is computed again.
    """
    if checkpointing:
        return tokens * (shape.layers * 2 * shape.hidden + layer_activations(shape))
    return tokens * shape.layers * layer_activations(shape)


def forward_bytes(shape: Shape, tokens: float) -> float:
    """Computes what a pass without gradients holds at its widest point: the states and the MLP's, in bf16."""
    return tokens * (2 * 2 * shape.hidden + 3 * 2 * shape.mlp)


def head_bytes(shape: Shape, tokens: float, outputs: int, block: int | None) -> float:
    """Computes the critic's head in an update: its input in fp32 and its D outputs.

    Args:
        shape: of the backbone.
        tokens: n.
        outputs: D.
        block: ``critic.value.tokens_per_block``; None keeps the outputs of all n tokens.
    """
    at_once = tokens if block is None else min(tokens, block)
    return tokens * 4 * shape.hidden + at_once * OUTPUT * outputs


def cache_per_token(shape: Shape, dtype: int = 2) -> int:
    """Counts the bytes of keys and values of one token, over all layers."""
    return 2 * shape.layers * shape.groups * shape.head * dtype


@dataclass(frozen=True)
class Sampler:
    """The inference engine on one GPU, in bytes.

    Attributes:
        reserve: what it may take of the GPU.
        weights: its share of the model.
        cache: what is left for keys and values; below 0 where the weights do not fit.
        sequences: whole sequences that the cache of one replica holds, at the length of the longest.
    """

    reserve: float
    weights: float
    cache: float
    sequences: int


def sampler_bytes(shape: Shape, memory: float, share: float, tensor_parallel: int, length: int) -> Sampler:
    """Divides the sampler's share of a GPU.

    Args:
        shape: of the policy.
        memory: of the GPU, bytes.
        share: ``gpu_memory_utilization``, in (0, 1].
        tensor_parallel: GPUs of one replica, >= 1.
        length: tokens of the longest prompt and answer.
    """
    reserve, weights = memory * share, 2 * shape.policy / tensor_parallel
    cache = reserve - weights - SAMPLER_OVERHEAD
    per_token = cache_per_token(shape) / min(tensor_parallel, shape.groups)
    return Sampler(reserve, weights, cache, max(0, int(cache // (per_token * length))))
