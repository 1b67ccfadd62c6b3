# SPDX-License-Identifier: Apache-2.0
"""Measures how strongly each term of a family's loss acts: its share of the gradient at the critic's outputs.

Shape legend: L response tokens of a micro-batch laid end to end, D outputs of the head.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from verl_dvpo.families.base import FamilyLoss, Reduce


class TermShares:
    """Collects ‖∂(coef·term)/∂outputs‖² of each term over the micro-batches of one update.

    Outputs are those of the head, so nothing runs through the backbone. Tokens of different micro-batches, mini-batches
    and ranks are different outputs, so squares add up and do not depend on how a mini-batch is cut.
    """

    def __init__(self) -> None:
        self._squares: dict[str, Tensor] = {}

    def add(
        self, outputs: Tensor, loss_of: Callable[[Tensor], FamilyLoss], aggregate: Callable[[Tensor], Tensor]
    ) -> None:
        """Adds one micro-batch, by one more forward pass of the loss and a backward pass for each term.

        Args:
            outputs: (L, D); its graph is left alone.
            loss_of: (L, D) -> the family's loss. Terms whose coefficient it does not say are left out.
            aggregate: (L,) -> scalar, as the loss itself is aggregated over tokens.
        """
        leaf = outputs.detach().requires_grad_()
        loss = loss_of(leaf)
        for name, coefficient in loss.coef.items():
            square = leaf.new_zeros((), dtype=torch.float64)
            if loss.terms[name].requires_grad:
                objective = coefficient * aggregate(loss.terms[name])
                (gradient,) = torch.autograd.grad(objective, leaf, retain_graph=True)
                square = gradient.double().square().sum()
            self._squares[name] = self._squares[name] + square if name in self._squares else square

    def shares(self, reduce: Reduce | None = None) -> dict[str, float]:
        """Returns term -> its norm over the sum of all terms' norms, in [0, 1]; empty where no term has a coefficient.

        All are 0 where no term has a gradient.

        Args:
            reduce: adds a 1-D tensor over data-parallel ranks; None for one rank.
        """
        if not self._squares:
            return {}
        squares = torch.stack(list(self._squares.values()))
        norms = (reduce(squares) if reduce is not None else squares).sqrt()
        total = norms.sum()
        found = torch.where(total > 0, norms / total, norms)
        return dict(zip(self._squares, found.tolist(), strict=True))


def is_due(every: int, step: int) -> bool:
    """Tells if shares are measured in this update: never for 0, else in every ``every``-th step of training."""
    return every > 0 and step % every == 0
