# SPDX-License-Identifier: Apache-2.0
"""DVPO's critic: N heads of M quantiles each (arXiv 2512.03847)."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from verl_dvpo.distributional.advantages import gae
from verl_dvpo.distributional.automatic import AUTO, AutoConfig, Chooser
from verl_dvpo.distributional.config import CONSTRAINT_TERMS, DVPOLossConfig, check_level_statistics
from verl_dvpo.distributional.constraints import constraint_multipliers
from verl_dvpo.distributional.levels import LEVEL_KINDS, quantile_levels
from verl_dvpo.distributional.losses import dvpo_loss, risk_averse_weights
from verl_dvpo.distributional.metrics import crossing_fraction, population_std
from verl_dvpo.distributional.returns import distributional_gae, sample_replacement_returns
from verl_dvpo.distributional.sorting import sort_samples
from verl_dvpo.families.base import FamilyConfig, FamilyLoss, Reduce, SampledFamily, move_to_value
from verl_dvpo.families.bounds import require_choice, require_integer
from verl_dvpo.families.registry import register_family

TARGETS = ("quantile_gae", "sample_replacement")


@dataclass(frozen=True, kw_only=True)
class QuantileEnsembleConfig(FamilyConfig):
    """Settings of ``family: quantile_ensemble``. Defaults are the paper's, or as tagged.

    Attributes:
        num_heads: N >= 1.
        num_quantiles: M >= 1; or ``auto`` (ours): the head has the most of ``auto.sizes``, and how many of its levels
            make up value and targets is chosen in training (docs/method.md, section 7c).
        levels: ``right`` (τ_j = j/M, paper) or ``midpoint`` (τ_j = (2j−1)/(2M), ours).
        target: ``quantile_gae`` (Eq 2, paper) or ``sample_replacement`` (ours, after GMAC).
        kappa: Huber threshold >= 0, in units of reward; 0 is the pinball loss.
        alpha: share of the lower tail, in (0, 0.5].
        beta: share of the upper tail, in (0, 0.5].
        risk_temperature: > 0, in units of a level: how fast the weight of a level falls in ``risk``.
        risk_form: ``separable`` (Eq 4 to the letter: a term that moves no minimiser) or ``readout`` (a risk-averse
            value with coef.risk in [0, 1] as its share); both rebuilt.
        constraint: ``batch`` (ours) or ``token`` (the paper's literal reading).
        constraint_statistics: ``value`` or ``level`` (ours): the unit in which a constraint's violation is measured;
            ``level`` needs ``levels: midpoint`` and ``constraint: batch``, and has no ``shape`` and no ``curvature``.
        coef: term -> coefficient >= 0; 0 switches the term off. Terms left out keep their defaults, which are others
            with ``level``. With ``risk_form: readout`` the coefficient of ``risk`` may be ``auto`` (ours), one of
            ``auto.risks``.
        auto: fields of ``AutoConfig``, for the choices in training; those left out keep their default.
    """

    meaning: ClassVar[tuple[str, ...]] = ("num_heads", "num_quantiles", "levels")

    num_heads: int = 3
    num_quantiles: int | str = 200
    levels: str = "right"
    target: str = "quantile_gae"
    kappa: float = 1.0
    alpha: float = 0.1
    beta: float = 0.1
    risk_temperature: float = 1.0
    risk_form: str = "separable"
    constraint: str = "batch"
    constraint_statistics: str = "value"
    coef: Mapping[str, float | str] = field(default_factory=dict)
    auto: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_integer("num_heads", self.num_heads, least=1)
        require_integer("num_quantiles", self.num_quantiles, least=1, other=AUTO)
        require_choice("levels", self.levels, LEVEL_KINDS)
        require_choice("target", self.target, TARGETS)
        for name in ("coef", "auto"):
            object.__setattr__(self, name, dict(getattr(self, name)))  # YAML gives another kind of mapping
        self._check_auto()
        check_level_statistics(float(quantile_levels(self.most_quantiles, self.levels)[-1]), self.loss_config())

    def _check_auto(self) -> None:
        unknown = sorted(set(self.auto) - {each.name for each in fields(AutoConfig)})
        if unknown:
            raise ValueError(f"auto has unknown fields {', '.join(unknown)}; use those of AutoConfig")
        settings = self.auto_config()
        if self.num_quantiles == AUTO:
            settings.check_nested(self.levels)
        if self.coef.get("risk") == AUTO and self.risk_form != "readout":
            raise ValueError(
                f"coef.risk is 'auto', but risk_form is {self.risk_form!r}; that form moves no minimiser, so no score "
                "can tell its weights apart; set risk_form to 'readout', or coef.risk to a number"
            )

    def auto_config(self) -> AutoConfig:
        """The candidates and the rule of the choices in training.

        Raises:
            ValueError: one of its fields is outside its bounds.
        """
        return AutoConfig(**self.auto)

    @property
    def most_quantiles(self) -> int:
        """M, the levels of each head."""
        return self.auto_config().sizes[-1] if isinstance(self.num_quantiles, str) else self.num_quantiles

    def loss_config(self) -> DVPOLossConfig:
        """The eight terms and their coefficients.

        Raises:
            ValueError: one of its fields is outside its bounds.
        """
        return DVPOLossConfig(
            kappa=self.kappa,
            alpha=self.alpha,
            beta=self.beta,
            risk_temperature=self.risk_temperature,
            risk_form=self.risk_form,
            constraint=self.constraint,
            constraint_statistics=self.constraint_statistics,
            coef={**self.coef, **({"risk": 0.0} if self.coef.get("risk") == AUTO else {})},  # type: ignore[dict-item]
        )


@register_family("quantile_ensemble")
class QuantileEnsembleFamily(SampledFamily):
    """θ_j(s) = (1/N) Σ_i θ_ij(s) (Eq 1 of [DVPO], paper); outputs are laid out as (N, M).

    The value is the mean of θ over j. With ``risk_form: readout`` and coef.risk > 0 low levels weigh more in it, while
    distribution, targets and statistics stay those of θ.
    """

    Config = QuantileEnsembleConfig

    def __init__(self, config: QuantileEnsembleConfig) -> None:
        self.num_heads = config.num_heads
        self.num_quantiles = config.most_quantiles
        self.num_outputs = self.num_heads * self.num_quantiles
        self.num_kept = self.num_quantiles
        self.target = config.target
        self.loss_config = config.loss_config()
        self.levels = quantile_levels(self.num_quantiles, config.levels, dtype=torch.float32)
        self.averse = self.loss_config.risk_form == "readout" and self.loss_config.coef["risk"] > 0
        self.value_weights = risk_averse_weights(self.levels, self.loss_config).float()
        self.chooser = _chooser(config, self.levels)
        self.active: Tensor | None = None
        self._follow()

    def _follow(self) -> None:
        """Takes over what the chooser has chosen."""
        if self.chooser is None:
            return
        self.averse = self.chooser.risk > 0
        self.value_weights = (self.chooser.weights() * self.chooser.size).float()
        self.active = None if self.chooser.size == self.num_quantiles else self.chooser.index

    def _heads(self, outputs: Tensor) -> Tensor:
        """(..., D) -> (..., N, M)."""
        return outputs.reshape(*outputs.shape[:-1], self.num_heads, self.num_quantiles)

    def _levels_on(self, device: torch.device) -> Tensor:
        if self.levels.device != device:
            self.levels = self.levels.to(device)
        return self.levels

    def value(self, outputs: Tensor) -> Tensor:
        """(..., N·M) -> (...): the mean over heads and quantiles, or the risk-averse one."""
        plain = not self.averse and self.active is None
        return outputs.mean(-1) if plain else self.values_from_kept(self.keep(outputs))

    def head_values(self, outputs: Tensor) -> Tensor:
        """(..., N·M) -> (..., N): each head's mean over its quantiles, or its risk-averse one."""
        heads = self._heads(outputs)
        plain = not self.averse and self.active is None
        return heads.mean(-1) if plain else self.values_from_kept(sort_samples(heads))

    def values_from_kept(self, kept: Tensor) -> Tensor:
        """(..., M) ascending -> (...): the mean of the quantiles, or the risk-averse one."""
        kept = self._chosen(kept)
        if not self.averse:
            return kept.mean(-1)
        if self.value_weights.device != kept.device:
            self.value_weights = self.value_weights.to(kept.device)
        return (kept * self.value_weights).mean(-1)

    def samples(self, outputs: Tensor) -> Tensor:
        """(..., N·M) -> (..., M): the head-averaged quantiles, ascending; with ``auto`` those that are chosen."""
        return self._chosen(self.keep(outputs))

    def keep(self, outputs: Tensor) -> Tensor:
        """(..., N·M) -> (..., M): all head-averaged quantiles, ascending."""
        return sort_samples(self._heads(outputs).mean(-2))

    def _chosen(self, kept: Tensor) -> Tensor:
        """(..., M) -> (..., those that are chosen)."""
        if self.active is None:
            return kept
        if self.active.device != kept.device:
            self.active = self.active.to(kept.device)
        return kept[..., self.active]

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
        """Returns ``targets`` (B, T, M), by Eq 2 or by sample replacement, and ``old`` (B, T, M), all kept quantiles.

        With ``auto`` the targets rest on the chosen quantiles, and ``scores`` (B, T, C) are each candidate's.
        """
        points = self._chosen(kept)
        if self.target == "quantile_gae":
            targets, _ = distributional_gae(rewards, points, mask, gamma=gamma, lam=lam)
        else:
            targets = sample_replacement_returns(rewards, points, mask, gamma=gamma, lam=lam, generator=generator)
        built = {"targets": targets, "old": kept}
        if self.chooser is not None:
            returns = gae(rewards, torch.zeros_like(kept[..., 0]), mask, gamma=gamma, lam=1.0)
            built["scores"] = self.chooser.scores(kept, returns)
        return built

    def loss(
        self, outputs: Tensor, targets: Mapping[str, Tensor], multipliers: Mapping[str, Tensor] | None = None
    ) -> FamilyLoss:
        """L of Eq 11 of [DVPO] (docs/method.md, section 4)."""
        levels = self._levels_on(outputs.device)
        result = dvpo_loss(self._heads(outputs), targets["targets"], levels, self.loss_config, multipliers)
        coef = {name: self.loss_config.coef.get(name, 1.0) for name in result.terms}
        return FamilyLoss(total=result.total, terms=result.terms, coef=coef)

    def multipliers(
        self, targets: Mapping[str, Tensor], mask: Tensor, *, reduce: Reduce | None = None
    ) -> dict[str, Tensor]:
        """The multipliers of ``constraint: batch``; none for ``token`` or where every constraint is switched off."""
        config = self.loss_config
        if config.constraint != "batch" or not any(config.coef[name] > 0 for name in CONSTRAINT_TERMS):
            return {}
        levels = self._levels_on(mask.device)
        return constraint_multipliers(targets["old"], targets["targets"], mask, levels, config, reduce=reduce)

    def statistics(self, outputs: Tensor) -> dict[str, Tensor]:
        """q10, q50, q90, spread (standard deviation over quantiles), crossing fraction, and the heads' disagreement."""
        heads = self._heads(outputs)
        quantiles = heads.mean(-2)
        ascending = sort_samples(quantiles)
        return {
            "quantile/q10": ascending[..., round(0.1 * (self.num_quantiles - 1))],
            "quantile/q50": ascending[..., round(0.5 * (self.num_quantiles - 1))],
            "quantile/q90": ascending[..., round(0.9 * (self.num_quantiles - 1))],
            "quantile/spread": population_std(ascending, -1),
            "quantile/crossing_fraction": crossing_fraction(quantiles),
            "ensemble/std": population_std(heads.mean(-1), -1),
            "ensemble/quantile_std": population_std(heads, -2).mean(-1),
        }

    def target_statistics(self, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """With ``auto`` each candidate's scores, else nothing."""
        if self.chooser is None:
            return {}
        columns = targets["scores"].unbind(-1)
        return {f"auto/{name}": column for name, column in zip(self.chooser.names, columns, strict=True)}

    def adapt(self, statistics: Mapping[str, float]) -> dict[str, float]:
        """With ``auto`` chooses from the scores, and returns the number of levels, the risk weight, or both."""
        if self.chooser is None:
            return {}
        self.chooser.update({name: statistics[f"auto/{name}"] for name in self.chooser.names})
        self._follow()
        return {f"auto/{name}": value for name, value in self.chooser.chosen.items()}

    def state(self) -> dict[str, Tensor]:
        """With ``auto`` the chooser's state, else nothing."""
        return {} if self.chooser is None else self.chooser.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes over a chooser's state; raises ValueError where it has other candidates, or nothing is ``auto``."""
        if self.chooser is None:
            return super().load_state(state)
        self.chooser.load_state(state)
        return self._follow()

    def init_head(self, weight: Tensor, bias: Tensor, generator: torch.Generator) -> None:
        """Draws each head on its own; its M quantiles share a weight and differ by an ascending bias. (ours)

        The bias runs from −0.01 to 0.01, in units of reward. So no pair starts out of order, and no two are equal,
        where rounding would decide which of them belong to a tail.
        """
        rows = torch.empty(self.num_heads, 1, weight.shape[1], dtype=weight.dtype)
        rows.normal_(std=0.1 * weight.shape[1] ** -0.5, generator=generator)
        weight.copy_(rows.expand(-1, self.num_quantiles, -1).flatten(0, 1))
        if self.num_quantiles == 1:
            bias.zero_()
        else:
            bias.copy_(torch.linspace(-0.01, 0.01, self.num_quantiles, dtype=bias.dtype).repeat(self.num_heads))

    def start_at(self, weight: Tensor, bias: Tensor, value_weight: Tensor, value_bias: Tensor) -> bool:
        """Moves the mean of the quantiles to the value; heads and quantiles keep their first distances from it."""
        return move_to_value(weight, bias, value_weight, value_bias)


def _chooser(config: QuantileEnsembleConfig, levels: Tensor) -> Chooser | None:
    """The chooser of density and risk in training; None where nothing is ``auto``."""
    risk: float | str = config.coef.get("risk", 0.0)
    if config.num_quantiles != AUTO and risk != AUTO:
        return None
    fixed = config.loss_config().coef["risk"] if config.risk_form == "readout" else 0.0
    return Chooser(
        levels,
        config.levels,
        config.risk_temperature,
        config.auto_config(),
        density=config.num_quantiles == AUTO,
        risk=AUTO if risk == AUTO else fixed,
    )
