# SPDX-License-Identifier: Apache-2.0
"""Chooses a critic's density of levels and its risk weight from returns that it has not learned from (ours).

docs/method.md, section 7c, has the equations. Nothing is held back from training: a batch is scored with what the
critic said of it before its update, and then learned from. Sequences of the next batch are new again.

Shapes: M levels of the critic, C candidates, L tokens, "..." any leading shape.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .losses import spectral_weights
from .metrics import crps

#: In place of a number, where the number is chosen in training.
AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class AutoConfig:
    """Settings of the automatic choices (ours).

    Attributes:
        sizes: candidates for the number of levels, ascending, at least 2; the last is the head's own number, and each
            divides it, for midpoint levels by an odd number, so that every candidate's levels are among the head's.
        tolerance: >= 0; a candidate's CRPS and squared error may exceed the best candidate's by this share.
        risks: candidates for the risk weight, ascending in [0, 1], at least 2.
        memory: in [0, 1]; the weight of an earlier update's scores falls by this factor with each update. 1 weighs all
            the same: follow the leader.
        every: updates from one choice to the next, >= 1.

    Raises:
        ValueError: a field is outside its bounds; the message begins with ``auto.`` and the field's name.
    """

    sizes: Sequence[int] = (7, 21, 63, 189)
    tolerance: float = 0.01
    risks: Sequence[float] = (0.0, 0.05, 0.1, 0.2, 0.5)
    memory: float = 0.98
    every: int = 5

    def __post_init__(self) -> None:
        for name in ("sizes", "risks"):
            values = getattr(self, name)
            if isinstance(values, str) or not isinstance(values, Sequence) or not all(map(_is_number, values)):
                _refuse(name, values, "it must be a list of numbers")
            object.__setattr__(self, name, tuple(values))
            if len(values) < 2 or any(b <= a for a, b in itertools.pairwise(values)):
                _refuse(name, values, "it must have at least 2 numbers, ascending")
        if not all(isinstance(size, int) and size >= 1 for size in self.sizes):
            _refuse("sizes", self.sizes, "they must be integers >= 1")
        if any(self.sizes[-1] % size for size in self.sizes):
            _refuse("sizes", self.sizes, "each must divide the last")
        if not 0.0 <= self.risks[0] <= self.risks[-1] <= 1.0:
            _refuse("risks", self.risks, "they must be in [0, 1]")
        if not (_is_number(self.tolerance) and self.tolerance >= 0):
            _refuse("tolerance", self.tolerance, "it must be a finite number >= 0")
        if not (_is_number(self.memory) and 0.0 <= self.memory <= 1.0):
            _refuse("memory", self.memory, "it must be in [0, 1]")
        if not isinstance(self.every, int) or isinstance(self.every, bool) or self.every < 1:
            _refuse("every", self.every, "it must be an integer >= 1")

    def check_nested(self, kind: str) -> None:
        """Raises ValueError unless each candidate's levels of this kind are among the head's."""
        if kind == "midpoint" and any(self.sizes[-1] // size % 2 == 0 for size in self.sizes):
            _refuse("sizes", self.sizes, "with levels 'midpoint' each must divide the last by an odd number")


def nested_levels(size: int, most: int, kind: str) -> Tensor:
    """Indices (size,) of the levels of ``size`` quantiles among those of ``most``.

    With c = most/size they are i·c for ``right`` and i·c − (c − 1)/2 for ``midpoint``, i = 1 ... size, counted from 1:
    (2j − 1)/(2·most) is (2i − 1)/(2·size) there.
    """
    step = most // size
    last = torch.arange(1, size + 1) * step - 1
    return last if kind == "right" else last - (step - 1) // 2


def weighted_crps(points: Tensor, weights: Tensor, returns: Tensor) -> Tensor:
    """Computes the CRPS of weighted points: E|X − y| − ½E|X − X'| = 2 Σ_j p_j (1{y < x_j} − c_j)(x_j − y).

    c_j = Σ_{i<j} p_i + ½ p_j, the middle of point j's share. With p_j = 1/M it is ``metrics.crps``.

    Args:
        points: (..., M) ascending.
        weights: (M,) p >= 0, with sum 1.
        returns: (...) realised returns y.

    Returns:
        (...) >= 0, in units of the value.
    """
    middle = weights.cumsum(0) - 0.5 * weights
    above = points - returns.unsqueeze(-1)
    return 2.0 * ((above > 0).to(points.dtype).sub_(middle) * above * weights).sum(-1)


class Chooser:
    """Keeps each candidate's scores, and the choice that follows from them.

    Args:
        levels: (M,) the head's levels.
        kind: ``right`` or ``midpoint``.
        temperature: of the risk weights, > 0.
        config: the candidates and the rule.
        density: whether the number of levels is chosen; else all M are used.
        risk: the risk weight, or ``auto``.
    """

    def __init__(
        self, levels: Tensor, kind: str, temperature: float, config: AutoConfig, *, density: bool, risk: float | str
    ) -> None:
        self.config = config
        self.levels, self.kind, self.temperature = levels, kind, temperature
        most = levels.shape[0]
        self.sizes: tuple[int, ...] = tuple(config.sizes) if density else (most,)
        self.risks: tuple[float, ...] = tuple(config.risks) if isinstance(risk, str) else (risk,)
        self.size, self.risk = most, self.risks[0]
        self.losses = dict.fromkeys(self.names, 0.0)
        self.updates = 0

    @property
    def names(self) -> list[str]:
        """Names of the scores, in the order in which ``scores`` stacks them."""
        density = [f"{kind}_{size}" for size in self.sizes for kind in ("crps", "error")]
        risk = [f"risk_crps_{risk:g}" for risk in self.risks]
        return density * (len(self.sizes) > 1) + risk * (len(self.risks) > 1)

    @property
    def chosen(self) -> dict[str, float]:
        """Returns what is chosen now: ``num_quantiles``, ``risk``, or both."""
        found = {"num_quantiles": (float(self.size), self.sizes), "risk": (self.risk, self.risks)}
        return {name: value for name, (value, candidates) in found.items() if len(candidates) > 1}

    @property
    def index(self) -> Tensor:
        """(size,) the chosen levels among the head's."""
        return nested_levels(self.size, self.levels.shape[0], self.kind)

    def weights(self, risk: float | None = None) -> Tensor:
        """(size,) float64, sum 1: the share of each chosen level in the value; ``risk`` None takes the chosen one."""
        share = self.risk if risk is None else risk
        return spectral_weights(self.levels[self.index.to(self.levels.device)], self.temperature, share) / self.size

    def scores(self, points: Tensor, returns: Tensor) -> Tensor:
        """Scores every candidate against the realised returns, each token by itself.

        Args:
            points: (..., M) the head's quantiles, ascending, before the update.
            returns: (...) realised returns of these states.

        Returns:
            (..., C) in the order of ``names``: CRPS, and the squared error of the mean, of each number of levels, then
            CRPS of each risk weight on the levels that are chosen now.
        """
        found = []
        if len(self.sizes) > 1:
            for size in self.sizes:
                subset = points[..., nested_levels(size, points.shape[-1], self.kind).to(points.device)]
                found += [crps(subset, returns), (subset.mean(-1) - returns).square()]
        if len(self.risks) > 1:
            subset = points[..., self.index.to(points.device)]
            found += [weighted_crps(subset, self.weights(risk).to(subset), returns) for risk in self.risks]
        return torch.stack(found, -1)

    def update(self, means: Mapping[str, float]) -> None:
        """Adds an update's scores, averaged over valid tokens and ranks, and chooses if it is time.

        A score that is not finite leaves everything as it is.
        """
        if not all(math.isfinite(means[name]) for name in self.losses):
            return
        self.losses = {name: self.config.memory * loss + means[name] for name, loss in self.losses.items()}
        self.updates += 1
        if self.updates % self.config.every == 0:
            self._choose()

    def _choose(self) -> None:
        if len(self.sizes) > 1:
            limits = {
                kind: (1.0 + self.config.tolerance) * min(self.losses[f"{kind}_{size}"] for size in self.sizes)
                for kind in ("crps", "error")
            }
            fits = (s for s in self.sizes if all(self.losses[f"{k}_{s}"] <= limit for k, limit in limits.items()))
            # Two best candidates may rule each other out; then nothing is saved.
            self.size = next(fits, self.sizes[-1])
        if len(self.risks) > 1:
            self.risk = min(self.risks, key=lambda risk: self.losses[f"risk_crps_{risk:g}"])

    def state(self) -> dict[str, Tensor]:
        """Everything that later choices depend on, to the bit, with the candidates that it is of."""
        numbers = {"losses": list(self.losses.values()), "risks": self.risks, "risk": self.risk}
        counts = {"sizes": self.sizes, "size": self.size, "updates": self.updates}
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()} | {
            name: torch.tensor(value) for name, value in counts.items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what ``state`` returned.

        Raises:
            ValueError: there is none, or it is that of other candidates.
        """
        mine = (list(self.sizes), list(self.risks))
        theirs = (state["sizes"].tolist(), state["risks"].tolist()) if state else None
        if theirs != mine:
            found = "there is none" if theirs is None else f"it has the levels {theirs[0]} and the risks {theirs[1]}"
            raise ValueError(
                f"auto has the levels {mine[0]} and the risks {mine[1]}; a state of the same is allowed; {found}; "
                "resume with the settings of that run, or start anew"
            )
        self.losses = dict(zip(self.names, state["losses"].tolist(), strict=True))
        self.updates, self.size = int(state["updates"]), int(state["size"])
        self.risk = float(state["risk"])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _refuse(name: str, value: object, allowed: str) -> None:
    shown = list(value) if isinstance(value, tuple) else value
    raise ValueError(f"auto.{name} is {shown!r}; {allowed}")
