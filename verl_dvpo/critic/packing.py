# SPDX-License-Identifier: Apache-2.0
"""Finds a micro-batch's response tokens, without padding and without waiting for the device.

Shape legend: B sequences, T response positions, L response tokens laid end to end, nnz prompt and response tokens.
"""

from dataclasses import dataclass

import torch
from tensordict import TensorDict
from torch import Tensor


@dataclass(frozen=True)
class ResponseTokens:
    """Index tensors over the L response tokens of a micro-batch, in order.

    Attributes:
        rows: (L,) the sequence of each token.
        columns: (L,) its position within the response.
        states: (L,) the position in the packed sequence of the state that predicts it, one to the left.
    """

    rows: Tensor
    columns: Tensor
    states: Tensor

    @classmethod
    def of(cls, micro_batch: TensorDict) -> "ResponseTokens":
        """Makes the indices from the jagged ``prompts`` and ``responses`` of a micro-batch, on their device."""
        prompts, responses = micro_batch["prompts"], micro_batch["responses"]
        total = responses.values().shape[0]
        offsets = responses.offsets()
        lengths = offsets.diff()
        sequences = torch.arange(lengths.shape[0], device=offsets.device)
        rows = torch.repeat_interleave(sequences, lengths, output_size=total)
        columns = torch.arange(total, device=offsets.device) - offsets[rows]
        starts = (prompts.offsets().diff() + lengths).cumsum(0) - lengths  # where each response begins
        return cls(rows, columns, starts[rows] + columns - 1)

    def in_sequences(self, micro_batch: TensorDict) -> Tensor:
        """(L,): the states' positions, each counted from the beginning of its own sequence."""
        return self.states - micro_batch["input_ids"].offsets()[:-1][self.rows]

    def in_padded(self, micro_batch: TensorDict, width: int) -> Tensor:
        """(L,): the states' positions where sequences are padded on the right to ``width`` and laid end to end."""
        return self.in_sequences(micro_batch) + self.rows * width

    def padded(self, tokens: Tensor, shape: torch.Size) -> Tensor:
        """Pads: (L, ...) -> (B, T, ...) with (B, T) = ``shape`` and zeros elsewhere; differentiable."""
        out = tokens.new_zeros(*shape, *tokens.shape[1:])
        return out.index_put((self.rows, self.columns), tokens)
