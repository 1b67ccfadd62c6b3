# SPDX-License-Identifier: Apache-2.0
"""DFPO's critic: the return distribution of a state as a flow from base noises (arXiv 2602.05890; rebuilt).

The formulas are in docs/method.md, section 7; what was measured of their choices is in docs/families.md.

Shapes: B sequences, T response positions, R tokens laid end to end, I frequencies, P powers of u, K base noises.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from verl_dvpo.distributional.config import TERMS, DVPOLossConfig
from verl_dvpo.distributional.constraints import PARTS, constraint_multipliers, constraint_terms
from verl_dvpo.distributional.levels import quantile_levels
from verl_dvpo.distributional.metrics import crossing_fraction, population_std
from verl_dvpo.distributional.returns import distributional_gae, sample_replacement_returns
from verl_dvpo.distributional.sorting import count_below, sort_samples, sort_with_gradient
from verl_dvpo.families.base import FamilyConfig, FamilyLoss, Reduce, SampledFamily
from verl_dvpo.families.bounds import require_choice, require_finite, require_integer, require_terms
from verl_dvpo.families.flow_field import at_time, base_noises, cosine_series, euler_samples, noise_basis
from verl_dvpo.families.registry import register_family

#: Terms on the field, and constraints on the one-step samples.
FIELD_TERMS = ("anchor", "flow_matching", "straightness")
FLOW_CONSTRAINTS = ("cvar", "gain", "shift", "shape")
FLOW_TERMS = FIELD_TERMS + FLOW_CONSTRAINTS

#: The anchor's pull has a slope of ``step``, where DVPO's pinball has one of 1: so the constraints weigh 1/20 of 0.02,
#: the coefficient from which docs/method.md, section 4, starts.
FLOW_COEF: Mapping[str, float] = MappingProxyType(
    {
        "anchor": 1.0,
        "flow_matching": 0.005,
        "straightness": 1.0,
        "cvar": 0.001,
        "gain": 0.001,
        "shift": 0.001,
        "shape": 0.001,
    }
)


@dataclass(frozen=True, kw_only=True)
class ValueFlowConfig(FamilyConfig):
    """Settings of ``family: value_flow``.

    Attributes:
        num_noises: K >= 2 base noises, and samples of a state's value.
        num_frequencies: I >= 1 cosines over the base distribution; I = K can give every sample a value of its own.
        num_powers: P >= 1 powers of the virtual time u; 1 is a field that does not depend on u.
        value_scale: σ > 0, in units of reward: the spread of the base noises, and of a state that is not learned yet.
            A little above the returns' own, which for returns in [0, 1] is at most 0.5: paths that widen are harder to
            follow in one step.
        euler_steps: >= 1 steps from noise to sample; 1 is the paper's. Each further step costs as much again; with
            more than one, ``flow/one_step_gap`` is logged.
        target: ``quantile_gae`` (Eq 2 of DVPO on the samples) or ``sample_replacement``.
        coupling: ``calibrated`` (ours) or ``sorted`` (the k-th noise goes to the k-th smallest target of its token);
            see ``ValueFlowFamily``.
        step: > 0, in units of value_scale: how far ``calibrated`` moves a sample in one update.
        uncertainty: c >= 0, per unit of reward: w = sigmoid(−c·spread(s')) + ½ weighs ``flow_matching``.
        collapse_threshold: >= 0: a spread below this share of the rewards' standard deviation is a collapse; 0 never
            warns.
        alpha: lower tail's share of the samples, in (0, 0.5].
        beta: upper tail's share of the samples, in (0, 0.5].
        constraint: ``batch`` (ours) or ``token``: how ``cvar``, ``gain``, ``shift`` and ``shape`` act.
        coef: coefficient >= 0 of each term; 0 removes the term and its cost. Names left out keep their default.
    """

    meaning: ClassVar[tuple[str, ...]] = ("num_noises", "num_frequencies", "num_powers", "value_scale", "euler_steps")

    num_noises: int = 64
    num_frequencies: int = 64
    num_powers: int = 3
    value_scale: float = 0.7
    euler_steps: int = 1
    target: str = "sample_replacement"
    coupling: str = "calibrated"
    step: float = 0.05
    uncertainty: float = 1.0
    collapse_threshold: float = 0.02
    alpha: float = 0.1
    beta: float = 0.1
    constraint: str = "batch"
    coef: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("num_noises", 2), ("num_frequencies", 1), ("num_powers", 1), ("euler_steps", 1)):
            require_integer(name, getattr(self, name), least=least)
        for name in ("value_scale", "step"):
            require_finite(name, getattr(self, name), above=0.0)
        for name in ("uncertainty", "collapse_threshold"):
            require_finite(name, getattr(self, name), least=0.0)
        require_choice("target", self.target, ("quantile_gae", "sample_replacement"))
        require_choice("coupling", self.coupling, ("calibrated", "sorted"))
        require_terms(self.coef, FLOW_TERMS)
        object.__setattr__(self, "coef", {**FLOW_COEF, **self.coef})
        for name in FLOW_TERMS:
            require_finite(f"coef.{name}", self.coef[name], least=0.0)
        if not any(self.coef.values()):
            raise ValueError(f"coef has no term above 0; it must keep one of {', '.join(FLOW_TERMS)}")
        self.loss_config()

    def loss_config(self) -> DVPOLossConfig:
        """The constraints on the one-step samples.

        Raises:
            ValueError: alpha, beta or constraint is not allowed.
        """
        chosen = {name: self.coef[name] for name in FLOW_CONSTRAINTS}
        return DVPOLossConfig(
            alpha=self.alpha, beta=self.beta, constraint=self.constraint, coef=dict.fromkeys(TERMS, 0.0) | chosen
        )


@register_family("value_flow")
class ValueFlowFamily(SampledFamily):
    """ẑ_k = ε_k + v(ε_k, 0|s): one Euler step of the field v from K base noises; outputs are laid out as (I, P).

    The K sorted samples of a state are kept, not its I·P outputs. ``flow_matching`` takes the next state's flow from
    them as straight, from ε_k to the k-th sample z̄_k: ζ̄_u = ε_k + u·v̄ with v̄ = z̄_k − ε_k. The end of that flow is what
    the actor and the targets see; the field of u > 0 only approximates it.

    Couplings. The K targets of one token come from one trajectory, so they know little of how returns differ between
    trajectories. ``sorted`` regresses ε_k on the k-th smallest of them; squared errors then average quantiles over
    trajectories, and the distribution shrinks. ``calibrated`` (ours) moves the kept sample z̄_k by
    step·σ·½·(τ_k − 1{z < z̄_k})/√(τ_k(1−τ_k)), averaged over the targets z. That is the pinball's direction, at rest
    where z̄_k is the τ_k-quantile of all trajectories' targets. There the path runs along the kept samples, and what is
    learned at u > 0 leaves the field at u = 0 alone, because misfits of the later field would act on the samples.
    """

    Config = ValueFlowConfig

    def __init__(self, config: ValueFlowConfig) -> None:
        self.config = config
        self.num_outputs = config.num_frequencies * config.num_powers
        self.num_kept = config.num_noises
        self.loss_config = config.loss_config()
        self.active = [name for name in FLOW_CONSTRAINTS if config.coef[name] > 0]
        self.noises = base_noises(config.num_noises, config.value_scale)
        self.basis = noise_basis(config.num_noises, config.num_frequencies)
        self.levels = quantile_levels(config.num_noises, "midpoint", dtype=torch.float32)

    def _move_to(self, device: torch.device) -> None:
        if self.noises.device != device:
            self.noises, self.basis, self.levels = (t.to(device) for t in (self.noises, self.basis, self.levels))

    def _coefficients(self, outputs: Tensor) -> Tensor:
        """(..., D) -> (R, I, P)."""
        return outputs.reshape(-1, self.config.num_frequencies, self.config.num_powers)

    def _points(self, outputs: Tensor, steps: int) -> Tensor:
        """(..., D) -> (..., K): samples in the order of their noises."""
        self._move_to(outputs.device)
        coefficients = self._coefficients(outputs)
        points = euler_samples(coefficients, self.noises, self.basis, self.config.value_scale, steps)
        return points.reshape(*outputs.shape[:-1], -1)

    def value(self, outputs: Tensor) -> Tensor:
        """(..., D) -> (...): the mean of the samples, in any order."""
        return self._points(outputs, self.config.euler_steps).mean(-1)

    def samples(self, outputs: Tensor) -> Tensor:
        """(..., D) -> (..., K), ascending."""
        return sort_with_gradient(self._points(outputs, self.config.euler_steps))

    # ------------------------------------------------------------------ targets

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
        """Returns ``targets`` z and ``old`` z̄ (B, T, K), ascending; ``anchor`` (B, T, K), where the paths should end.

        With a term on the field also ``time`` (B, T), the token's u ~ U(0, 1): drawn here and not in the loss, so that
        gradients do not depend on how a batch is cut. With ``flow_matching``, of the next valid state s' as in verl:
        ``next_velocity`` γ·v̄ (B, T, K); ``next_reward`` r, ``next_discount`` γ and ``next_weight`` w(s) (B, T), which
        is 0 at the last token, whose next state has no flow.
        """
        self._move_to(kept.device)
        if self.config.target == "quantile_gae":
            drawn, _ = distributional_gae(rewards, kept, mask, gamma=gamma, lam=lam)
        else:
            drawn = sample_replacement_returns(rewards, kept, mask, gamma=gamma, lam=lam, generator=generator)
        targets = sort_samples(drawn)
        built = {"targets": targets, "old": kept}
        if any(self.config.coef[name] > 0 for name in FIELD_TERMS):
            built["time"] = torch.rand(mask.shape, generator=generator, device=kept.device)
        if self.config.coupling == "calibrated":
            pull = quantile_pull(kept, targets, self.levels)
            built["anchor"] = torch.add(kept, pull, alpha=self.config.step * self.config.value_scale)
        if self.config.coef["flow_matching"] > 0:
            built |= self._next_flow(kept, rewards, mask, gamma)
        return built

    def _next_flow(self, kept: Tensor, rewards: Tensor, mask: Tensor, gamma: float) -> dict[str, Tensor]:
        index, exists = next_valid(mask != 0)
        following = kept.gather(1, index.unsqueeze(-1).expand_as(kept))
        weight = torch.sigmoid(-self.config.uncertainty * following.std(-1, correction=0)) + 0.5
        return {
            "next_velocity": gamma * (following - self.noises),
            "next_reward": rewards.to(kept.dtype),
            "next_discount": torch.full_like(weight, gamma),
            "next_weight": torch.where(exists, weight, 0.0),
        }

    # ------------------------------------------------------------------ loss

    def loss(
        self, outputs: Tensor, targets: Mapping[str, Tensor], multipliers: Mapping[str, Tensor] | None = None
    ) -> FamilyLoss:
        """L = Σ coef[name]·term: the terms on the field, and the constraints of section 4 on the samples ẑ.

        Raises:
            ValueError: ``constraint`` is ``batch``, a constraint is active, and ``multipliers`` is None.
        """
        if self.active and self.config.constraint == "batch" and multipliers is None:
            raise ValueError(
                f"multipliers is None, but constraint is 'batch' and {', '.join(self.active)} are active; "
                "pass what multipliers() returned"
            )
        self._move_to(outputs.device)
        coefficients = self._coefficients(outputs)
        # v(ε_k, 0|s): (R, K).
        start = coefficients[..., 0] @ self.basis.T
        terms = self._field_terms(coefficients, start, targets)
        if self.active:
            given = multipliers if self.config.constraint == "batch" else None
            q, z = self.noises + start, targets["targets"]
            terms |= constraint_terms(q, z, self.levels, self.loss_config, self.active, given)
        total = torch.zeros_like(start[:, 0])
        for name, term in terms.items():
            total = torch.add(total, term, alpha=self.config.coef[name])
        return FamilyLoss(total=total, terms=terms, coef={name: self.config.coef[name] for name in terms})

    def _field_terms(self, coefficients: Tensor, start: Tensor, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Computes the active ones of three terms, each a mean over k (rebuilt; ``calibrated``: ours, see the class).

        ``anchor``: (v(ζ,u|s) − (g_k − ε_k))² at ζ = (1−u)ε_k + u·e_k. ``sorted``: g = e = z, the sorted targets.
        ``calibrated``: g is the moved kept sample and e the kept one; plus the same at u = 0.
        ``straightness``: (v(ζ,u|s) − stop_gradient v(ε_k, 0|s))².
        ``flow_matching``: w(s)·(v(r + γζ̄_u, u|s) − γv̄)² along the next state's kept flow.
        """
        coef, terms = self.config.coef, {}
        calibrated = self.config.coupling == "calibrated"
        goal = (targets["anchor"] if calibrated else targets["targets"]) - self.noises
        if coef["anchor"] > 0 or coef["straightness"] > 0:
            time = targets["time"]
            held = coefficients
            if calibrated:
                held = torch.cat([coefficients[..., :1].detach(), coefficients[..., 1:]], -1)
            path = torch.lerp(self.noises, targets["old" if calibrated else "targets"], time[:, None])
            field = cosine_series(at_time(held, time), path, self.config.value_scale)
            if coef["anchor"] > 0:
                terms["anchor"] = (field - goal).square().mean(-1)
                if calibrated:
                    terms["anchor"] = terms["anchor"] + (start - goal).square().mean(-1)
            if coef["straightness"] > 0:
                terms["straightness"] = (field - start.detach()).square().mean(-1)
        if coef["flow_matching"] > 0:
            terms["flow_matching"] = self._flow_matching(coefficients, targets)
        return terms

    def _flow_matching(self, coefficients: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
        time, velocity = targets["time"], targets["next_velocity"]
        path = targets["next_reward"][:, None] + targets["next_discount"][:, None] * self.noises
        path = torch.addcmul(path, time[:, None], velocity)
        field = cosine_series(at_time(coefficients, time), path, self.config.value_scale)
        return targets["next_weight"] * (field - velocity).square().mean(-1)

    def multipliers(
        self, targets: Mapping[str, Tensor], mask: Tensor, *, reduce: Reduce | None = None
    ) -> dict[str, Tensor]:
        """The multipliers of the active constraints under ``constraint: batch``; none otherwise."""
        if self.config.constraint != "batch" or not self.active:
            return {}
        self._move_to(mask.device)
        old, z = targets["old"], targets["targets"]
        found = constraint_multipliers(old, z, mask, self.levels, self.loss_config, reduce=reduce)
        return {part: found[part] for name in self.active for part in PARTS[name]}

    # ------------------------------------------------------------------ metrics

    def statistics(self, outputs: Tensor) -> dict[str, Tensor]:
        """q10, q50, q90, spread (standard deviation over samples), share of adjacent samples out of order.

        With more than one Euler step also ``flow/one_step_gap``, the mean distance of a one-step sample from its
        many-step one, in units of reward.
        """
        points = self._points(outputs, self.config.euler_steps)
        ascending = sort_samples(points)
        last = self.config.num_noises - 1
        measured = {
            "quantile/q10": ascending[..., round(0.1 * last)],
            "quantile/q50": ascending[..., round(0.5 * last)],
            "quantile/q90": ascending[..., round(0.9 * last)],
            "quantile/spread": population_std(ascending, -1),
            "quantile/crossing_fraction": crossing_fraction(points),
        }
        if self.config.euler_steps > 1:
            measured["flow/one_step_gap"] = (self._points(outputs, 1) - points).abs().mean(-1)
        return measured

    def warnings(self, statistics: Mapping[str, float], reward_std: float) -> dict[str, str]:
        """Warns of ``flow/collapsed``, see ``has_collapsed``."""
        spread = statistics["quantile/spread"]
        if not has_collapsed(spread, reward_std, self.config.collapse_threshold):
            return {}
        text = (
            f"the value flow has collapsed: its samples spread by {spread:.3g} on average while rewards spread by "
            f"{reward_std:.3g}; the critic is a scalar one now. critic.value.coupling=calibrated, a smaller "
            "critic.value.coef.flow_matching or a larger critic.value.value_scale may help"
        )
        return {"flow/collapsed": text}

    def init_head(self, weight: Tensor, bias: Tensor, generator: torch.Generator) -> None:
        """Draws the output of i = p = 0, which is the mean of the samples, as a scalar critic's; the others start at 0.

        So every state starts as the base distribution, shifted: as uncertain as ``value_scale`` says. (ours)
        """
        weight.zero_()
        weight[0].normal_(std=0.1 * weight.shape[1] ** -0.5, generator=generator)
        bias.zero_()

    def start_at(self, weight: Tensor, bias: Tensor, value_weight: Tensor, value_bias: Tensor) -> bool:
        """Takes the value over as the mean of the samples; every state keeps the base distribution's spread."""
        weight[0] = value_weight
        bias[0] = value_bias
        return True


def quantile_pull(samples: Tensor, targets: Tensor, levels: Tensor) -> Tensor:
    """Computes the standardised slope of the pinball, ½·(τ_k·P(z > q_k) − (1−τ_k)·P(z < q_k))/√(τ_k(1−τ_k)). (ours)

    It is zero where q_k is the τ_k-quantile of z. Its standard deviation there is ½ at every level; without the square
    root the last levels hardly move where a return is certain.

    Args:
        samples: (..., K) q, ascending.
        targets: (..., J) z, ascending.
        levels: (K,) τ, in (0, 1).

    Returns:
        (..., K).
    """
    q, z = samples.reshape(-1, samples.shape[-1]), targets.reshape(-1, targets.shape[-1])
    below = count_below(z, q).number / z.shape[1]
    above = 1.0 - count_below(z, q, or_equal=True).number / z.shape[1]
    pull = (levels * above - (1.0 - levels) * below) * (0.5 * (levels * (1.0 - levels)).rsqrt())
    return pull.reshape(samples.shape)


def next_valid(valid: Tensor) -> tuple[Tensor, Tensor]:
    """Finds the next valid position after each: verl carries the next value through masked tokens.

    Args:
        valid: (B, T) bool.

    Returns:
        index (B, T), some valid index where there is none; exists (B, T) bool.
    """
    length = valid.shape[1]
    positions = torch.arange(length, device=valid.device)
    at_or_after = torch.where(valid, positions, length).flip(1).cummin(1).values.flip(1)
    after = torch.nn.functional.pad(at_or_after[:, 1:], (0, 1), value=length)
    return after.clamp(max=length - 1), after < length


def has_collapsed(spread: float, reward_std: float, threshold: float) -> bool:
    """Tells if samples spread by less than ``threshold`` times the rewards' standard deviation, while rewards vary.

    Args:
        spread: mean over valid tokens of the standard deviation over samples, in units of reward.
        reward_std: standard deviation over sequences of their total reward.
        threshold: >= 0; 0 never calls it a collapse.
    """
    return spread < threshold * reward_std
