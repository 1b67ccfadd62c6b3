# SPDX-License-Identifier: Apache-2.0
"""Tells a head which states to compute, and what to make of its outputs before they leave it.

Shape legend: L response tokens of a micro-batch laid end to end, L' those of them that this rank computes, n positions
of the head's input, H hidden size, D outputs of the head, C numbers a token that a loss is made of.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

#: (outputs (L'', D), the places among the L response tokens that they belong to) -> (L'', C).
Reader = Callable[[Tensor, slice], Tensor]


@dataclass(frozen=True)
class HeadCall:
    """One call of a head.

    Attributes:
        states: (L',) positions in the head's input, its leading axes laid end to end.
        first: the place of the first of them among the micro-batch's response tokens; the others follow it.
        read: called with the outputs of a block of tokens; None returns the outputs themselves.
        block: tokens whose outputs are in memory at once, >= 1. On the way back they are computed once more. None takes
            all tokens together, and keeps their outputs for the way back.
    """

    states: Tensor
    first: int = 0
    read: Reader | None = None
    block: int | None = None

    def __call__(self, outputs_of: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """Computes (..., H) -> (L', D), or (L', C) where there is a reader.

        Args:
            outputs_of: the head, (m, H) -> (m, D).
            hidden: its input, n positions.
        """
        picked = hidden.flatten(0, -2)[self.states]
        if self.read is None:
            return outputs_of(picked)
        size = self.block or max(1, len(picked))
        pieces = []
        for start in range(0, max(1, len(picked)), size):
            piece = picked[start : start + size]
            places = slice(self.first + start, self.first + start + len(piece))
            if self.block is not None and torch.is_grad_enabled():
                pieces.append(
                    checkpoint(self._read, outputs_of, piece, places, use_reentrant=False, preserve_rng_state=False)
                )
            else:
                pieces.append(self._read(outputs_of, piece, places))
        return torch.cat(pieces)

    def _read(self, outputs_of: Callable[[Tensor], Tensor], piece: Tensor, places: slice) -> Tensor:
        assert self.read is not None
        return self.read(outputs_of(piece), places)


@dataclass(frozen=True)
class Parts:
    """The parts of a packed sequence that the ranks of a sequence-parallel group hold, in order and of equal length.

    Attributes:
        counts: response tokens of each rank's part.
        part: positions of each part.
        rank: this one.
    """

    counts: tuple[int, ...]
    part: int
    rank: int

    @classmethod
    def of(cls, states: Tensor, length: int, size: int, rank: int) -> "Parts":
        """Splits (L,) ascending positions in a packed sequence of ``length``, which ``size`` divides.

        Waits for the device: ranks pad what they hand over to one length, which has to be known.
        """
        part = length // size
        counts = torch.bincount(states // part, minlength=size).tolist()
        return cls(tuple(counts), part, rank)

    def own(self, states: Tensor) -> tuple[Tensor, int]:
        """Returns this rank's states as positions in its part, and the place of the first among all."""
        first = sum(self.counts[: self.rank])
        return states[first : first + self.counts[self.rank]] - self.rank * self.part, first

    def padded(self, own: Tensor) -> Tensor:
        """(L', ...) -> (longest L', ...), with zeros at the end; differentiable."""
        missing = max(self.counts) - len(own)
        return torch.cat([own, own.new_zeros(missing, *own.shape[1:])])

    def joined(self, gathered: Tensor) -> Tensor:
        """(size · longest L', ...) -> (L, ...), the tokens of all ranks in order."""
        longest = max(self.counts)
        pieces = [gathered[rank * longest : rank * longest + count] for rank, count in enumerate(self.counts)]
        return torch.cat(pieces)
