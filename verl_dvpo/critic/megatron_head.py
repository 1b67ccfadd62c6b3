# SPDX-License-Identifier: Apache-2.0
"""A value head in the place of megatron-core's output layer, on the last pipeline stage.

Shape legend: B sequences, L response tokens of a micro-batch laid end to end, L' those of them in this rank's part of
the sequence, s positions of this rank's part of the sequence, b sequences side by side (1 where they are packed), H
hidden size, D outputs of the head, C numbers a token that a loss is made of.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from verl_dvpo.critic.head import TwoLayerHead, ValueHead
from verl_dvpo.critic.head_call import HeadCall, Parts, Reader
from verl_dvpo.critic.packing import ResponseTokens


@dataclass
class MicroBatchCall:
    """Asks the head for the states of one micro-batch, and holds its answer.

    Attributes:
        tokens: its response tokens.
        places: (L,) the position of each token's state in its own sequence.
        read: called with the outputs of a block of tokens; None leaves the outputs themselves.
        block: tokens whose outputs are in memory at once, see ``HeadCall``.
        decoded: what the reader of an inference pass has read, block by block.
        computed: (L, D), or (L, C) where there is a reader.
    """

    tokens: ResponseTokens
    places: Tensor
    read: Reader | None
    block: int | None
    decoded: list[dict[str, Tensor]] = field(default_factory=list)
    computed: Tensor | None = None


class OutputLayer(ValueHead):
    """A value head in the place of GPTModel's output layer: every tensor-parallel rank holds the whole head.

    Its last layer's weight is ``output_layer.weight``, a name that megatron-core's sharded state needs. A two-layer
    head's first layer is the child ``hidden``.

    Args:
        head: taken over, not copied.
        sequence_parallel: each rank computes its part of the sequence, and the outputs are gathered.

    Attributes:
        asked: set by the engine for one forward pass; then only the states of response tokens are computed.
        starts: (B,) where each sequence begins in the packed one; None where they lie side by side.
    """

    asked: MicroBatchCall | None = None
    starts: Tensor | None = None

    def __init__(self, head: ValueHead | TwoLayerHead, *, sequence_parallel: bool) -> None:
        last = head.out if isinstance(head, TwoLayerHead) else head
        super().__init__(last.in_features, last.out_features, device="meta")
        self.weight, self.bias = last.weight, last.bias
        self.hidden = head.hidden if isinstance(head, TwoLayerHead) else None
        self.activation = head.activation if isinstance(head, TwoLayerHead) else None
        self.sequence_parallel = sequence_parallel
        for parameter in self.parameters():
            # Each rank then sees a part of the tokens, and megatron-core adds the gradients over the ranks.
            parameter.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def forward(  # type: ignore[override]
        self, hidden: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, None]:
        """(s, b, H) -> (whole sequence, b, D, 1) in fp32, and no bias, as GPTModel calls its output layer.

        verl drops the last axis of a value model's outputs. Where response tokens are asked for, their outputs go into
        ``asked``, and what is returned, (whole sequence, b, 1), holds none.
        """
        if self.asked is None:
            return self._of_all_ranks(self.outputs(hidden)).unsqueeze(-1), None
        self.asked.computed = self._of_response_tokens(hidden, self.asked)
        size = self._ranks()
        return hidden.new_zeros(hidden.shape[0] * size, hidden.shape[1], 1, dtype=torch.float32), None

    def outputs(self, hidden: Tensor) -> Tensor:
        """Computes (..., H) -> (..., D)."""
        if self.hidden is not None and self.activation is not None:
            hidden = self.activation(self.hidden(hidden))
        return super().outputs(hidden)

    def _ranks(self) -> int:
        """The ranks among which each sequence is divided here."""
        return parallel_state.get_tensor_model_parallel_world_size() if self.sequence_parallel else 1

    def _of_all_ranks(self, own: Tensor) -> Tensor:
        """(n, ...) of this rank -> (n · ranks, ...)."""
        if not self.sequence_parallel:
            return own
        # Every rank computes the whole loss, so that gradients are split on the way back, not added.
        return gather_from_sequence_parallel_region(own, tensor_parallel_output_grad=False)

    def _of_response_tokens(self, hidden: Tensor, asked: MicroBatchCall) -> Tensor:
        """(s, b, H) -> (L, D), or (L, C) where there is a reader."""
        rows, side_by_side = asked.tokens.rows, hidden.shape[1]
        packed = self.starts is not None
        states = asked.places + self.starts[rows] if self.starts is not None else asked.places * side_by_side + rows
        ranks = self._ranks()
        if ranks == 1:
            return HeadCall(states, 0, asked.read, asked.block)(self.outputs, hidden)
        order = None if packed else states.argsort()  # the parts of the ranks are parts of the sequence
        ascending = states if order is None else states[order]
        length = hidden.shape[0] * side_by_side * ranks
        parts = Parts.of(ascending, length, ranks, parallel_state.get_tensor_model_parallel_rank())
        places, first = parts.own(ascending)
        own = HeadCall(places, first, asked.read, asked.block)(self.outputs, hidden)
        joined = parts.joined(self._of_all_ranks(parts.padded(own)))
        return joined if order is None else joined[order.argsort()]

    def _apply(self, fn: Callable, recurse: bool = True) -> "OutputLayer":
        """Moves with the model, but stays fp32 where Float16Module casts the model."""

        def keep_fp32(tensor: Tensor) -> Tensor:
            sample = fn(tensor.new_empty(0))
            return fn(tensor) if sample.dtype == tensor.dtype else tensor.to(sample.device)

        return super()._apply(keep_fp32, recurse)

    def plain_state(self) -> dict[str, Tensor]:
        """Returns the weights under the names of the head that was taken over."""
        prefix = "out." if self.hidden is not None else ""
        own: dict[str, Any] = {f"{prefix}{name}": part for name, part in (("weight", self.weight), ("bias", self.bias))}
        first = {} if self.hidden is None else {f"hidden.{n}": t for n, t in self.hidden.named_parameters()}
        return {name: tensor.detach() for name, tensor in (own | first).items()}
