# SPDX-License-Identifier: Apache-2.0
"""What every value family is: the meaning of a critic head's D outputs. Pure torch, no parameters, no verl.

Shape legend (spec, section 1):
    B sequences, T response positions, L tokens of any batch laid end to end,
    D outputs of the head per token, S numbers kept per token between inference and update,
    K equally weighted samples of Z(s).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

#: Adds a 1-D tensor over data-parallel ranks and returns it.
Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FamilyLoss:
    """A family's loss per token.

    Attributes:
        total: (L,) what is minimised, after aggregation over tokens.
        terms: name -> (L,) each active term before its coefficient; logged, not minimised.
    """

    total: Tensor
    terms: dict[str, Tensor]


class ValueFamily(ABC):
    """Gives the outputs of a critic head meaning. One instance serves inference, targets, loss and statistics.

    The worker calls, once an update: :meth:`keep` and :meth:`statistics` on each micro-batch of the inference pass,
    :meth:`build_targets` on what was kept, :meth:`multipliers` on its targets, then :meth:`loss` on every micro-batch.
    """

    #: D, the outputs of the head per token.
    num_outputs: int
    #: S, the numbers per token that :meth:`keep` returns.
    num_kept: int

    @abstractmethod
    def samples(self, outputs: Tensor) -> Tensor:
        """(..., D) -> (..., K): equally weighted points of Z(s), ascending; their mean is the value the actor sees."""

    def keep(self, outputs: Tensor) -> Tensor:
        """(..., D) -> (..., S): what targets need later. The samples, unless a family needs less or more."""
        return self.samples(outputs)

    def values_from_kept(self, kept: Tensor) -> Tensor:
        """(..., S) -> (...): the mean of Z(s)."""
        return kept.mean(-1)

    @abstractmethod
    def build_targets(
        self,
        kept: Tensor,
        rewards: Tensor,
        mask: Tensor,
        *,
        gamma: float,
        lam: float,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Targets of one update, from whole sequences.

        Args:
            kept: (B, T, S) from :meth:`keep`, before the update.
            rewards: (B, T).
            mask: (B, T), 0 at padding and at tokens that the policy did not write.
            gamma: discount in [0, 1].
            lam: trace in [0, 1].
            generator: for families whose targets are drawn.

        Returns:
            name -> (B, T, ...): per-token tensors that :meth:`loss` takes back, flattened to (L, ...).
        """

    @abstractmethod
    def loss(
        self, outputs: Tensor, targets: Mapping[str, Tensor], multipliers: Mapping[str, Tensor] | None = None
    ) -> FamilyLoss:
        """Loss per token.

        Args:
            outputs: (L, D) with gradient.
            targets: name -> (L, ...) from :meth:`build_targets`.
            multipliers: name -> scalar from :meth:`multipliers`.
        """

    def multipliers(
        self, targets: Mapping[str, Tensor], mask: Tensor, *, reduce: Reduce | None = None
    ) -> dict[str, Tensor]:
        """What :meth:`loss` needs to know of the whole update at once: nothing, unless a family has constraints.

        Args:
            targets: name -> (L, ...) of every token of this rank.
            mask: (L,).
            reduce: adds a 1-D tensor over ranks; None for one rank.

        Returns:
            name -> scalar.
        """
        return {}

    def statistics(self, outputs: Tensor) -> dict[str, Tensor]:
        """(L, D) -> metric name -> (L,): averaged over valid tokens and logged as ``critic/<name>``."""
        return {}

    def warnings(self, statistics: Mapping[str, float], reward_std: float) -> dict[str, str]:
        """What is wrong with the values as a whole: metric name -> what to tell the user; nothing for most families.

        Args:
            statistics: those of :meth:`statistics`, averaged over all valid tokens of the update and all ranks.
            reward_std: standard deviation of the sequences' total rewards, over the same.
        """
        return {}

    def init_head(self, weight: Tensor, bias: Tensor, generator: torch.Generator) -> None:
        """Fills the head's last weight (D, H) and bias (D,) in place.

        Normal with standard deviation 0.1/sqrt(H), every output drawn on its own: hidden states leave the backbone's
        last norm with a root mean square near 1, so first values are near 0.1 and heads start apart. Bias 0.
        """
        weight.normal_(std=0.1 * weight.shape[1] ** -0.5, generator=generator)
        bias.zero_()
