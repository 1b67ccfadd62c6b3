# SPDX-License-Identifier: Apache-2.0
"""The typed side of ``critic.*``: what may be set, within which bounds, and the family that it builds.

``critic.value._target_`` in the YAML is :func:`family_config`, which picks the dataclass by ``critic.value.family``.
Everything is checked when verl validates its configuration, before Ray starts.
"""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

from verl.workers.config import FSDPCriticConfig, HFModelConfig

from verl_dvpo.critic.head import ACTIVATIONS
from verl_dvpo.distributional.config import DVPOLossConfig
from verl_dvpo.families.base import ValueFamily
from verl_dvpo.families.flow_config import FlowConfig
from verl_dvpo.families.quantile_ensemble import QuantileEnsembleFamily
from verl_dvpo.families.robust_bellman import RobustBellmanFamily
from verl_dvpo.families.scalar import ScalarFamily
from verl_dvpo.families.scalar_ensemble import ScalarEnsembleFamily
from verl_dvpo.families.value_flow import ValueFlowFamily

PREFIX = "critic.value"


@dataclass(frozen=True, kw_only=True)
class FamilyConfig:
    """What all families share.

    Attributes:
        family: the name under which the family is registered here.
        lam: trace in [0, 1] of the critic's targets; null takes ``algorithm.lam`` (VC-PPO, VAPO: a λ of its own).
        head_seed: seed of the head's first weights.
        head_width: width >= 1 of a hidden layer before the outputs; null for a linear head.
        head_activation: of that layer: ``gelu``, ``silu``, ``relu`` or ``tanh``.
        target_seed: seed of targets that are drawn; the draw of update n depends on it and on n alone.
        keep_on: ``device`` or ``cpu``: where samples wait between inference and update.
        rows_per_chunk: sequences whose targets are built at once, >= 1; bounds the memory of that step.
    """

    family: str
    lam: float | None = None
    head_seed: int = 0
    head_width: int | None = None
    head_activation: str = "gelu"
    target_seed: int = 0
    keep_on: str = "device"
    rows_per_chunk: int = 32

    def __post_init__(self) -> None:
        if self.lam is not None:
            in_range("lam", self.lam, 0.0, 1.0)
        if self.head_width is not None:
            at_least("head_width", self.head_width, 1)
        one_of("head_activation", self.head_activation, tuple(ACTIVATIONS))
        one_of("keep_on", self.keep_on, ("device", "cpu"))
        at_least("rows_per_chunk", self.rows_per_chunk, 1)
        self.build()

    @abstractmethod
    def build(self) -> ValueFamily:
        """The family with these settings.

        Raises:
            ValueError: one of them is outside its bounds.
        """


@dataclass(frozen=True, kw_only=True)
class ScalarConfig(FamilyConfig):
    """``family: scalar``, PPO's critic.

    Attributes:
        cliprange: >= 0, in units of reward; verl's ``critic.cliprange_value``.
    """

    cliprange: float = 0.5

    def build(self) -> ScalarFamily:
        at_least("cliprange", self.cliprange, 0.0)
        return ScalarFamily(cliprange=self.cliprange)


@dataclass(frozen=True, kw_only=True)
class QuantileEnsembleConfig(FamilyConfig):
    """``family: quantile_ensemble``, DVPO's critic (arXiv 2512.03847). Defaults are the paper's, or as tagged.

    Attributes:
        num_heads: N >= 1.
        num_quantiles: M >= 1.
        levels: ``right`` (paper) or ``midpoint`` (ours).
        target: ``quantile_gae`` (Eq 2, paper) or ``sample_replacement`` (ours, after GMAC).
        kappa: Huber threshold >= 0; 0 is the pinball loss.
        alpha: share of the lower tail, in (0, 0.5].
        beta: share of the upper tail, in (0, 0.5].
        risk_temperature: > 0; how fast the weight of a level falls as the level rises, in the term ``risk``.
        constraint: ``batch`` (ours) or ``token`` (the paper's literal reading).
        constraint_statistics: ``value`` or ``level`` (ours): in which unit a constraint's violation is measured;
            ``level`` needs ``levels: midpoint`` and ``constraint: batch``, and has no `shape` and no `curvature`.
        coef: term -> coefficient >= 0; 0 switches the term off. Terms left out keep their defaults, which are others
            with ``level``.
    """

    num_heads: int = 3
    num_quantiles: int = 200
    levels: str = "right"
    target: str = "quantile_gae"
    kappa: float = 1.0
    alpha: float = 0.1
    beta: float = 0.1
    risk_temperature: float = 1.0
    constraint: str = "batch"
    constraint_statistics: str = "value"
    coef: dict[str, float] = field(default_factory=dict)

    def build(self) -> QuantileEnsembleFamily:
        at_least("num_heads", self.num_heads, 1)
        at_least("num_quantiles", self.num_quantiles, 1)
        one_of("levels", self.levels, ("right", "midpoint"))
        one_of("target", self.target, ("quantile_gae", "sample_replacement"))
        with prefixed():
            loss = DVPOLossConfig(
                kappa=self.kappa,
                alpha=self.alpha,
                beta=self.beta,
                risk_temperature=self.risk_temperature,
                constraint=self.constraint,
                constraint_statistics=self.constraint_statistics,
                coef=dict(self.coef),
            )
            return QuantileEnsembleFamily(
                num_heads=self.num_heads,
                num_quantiles=self.num_quantiles,
                levels=self.levels,
                target=self.target,
                loss=loss,
            )


@dataclass(frozen=True, kw_only=True)
class ScalarEnsembleConfig(FamilyConfig):
    """``family: scalar_ensemble``, DVPO's control experiment: its ensemble without its distribution.

    Attributes:
        num_heads: N >= 1.
        cliprange: >= 0, in units of reward; verl's ``critic.cliprange_value``.
        constraint: ``batch`` (ours) or ``token`` (the paper's literal reading): how the term `shift` acts.
        coef: `consistency`, `shift` -> coefficient >= 0; 0 switches the term off. Terms left out keep DVPO's.
    """

    num_heads: int = 3
    cliprange: float = 0.5
    constraint: str = "batch"
    coef: dict[str, float] = field(default_factory=dict)

    def build(self) -> ScalarEnsembleFamily:
        with prefixed():
            return ScalarEnsembleFamily(
                num_heads=self.num_heads, cliprange=self.cliprange, constraint=self.constraint, coef=self.coef
            )


@dataclass(frozen=True, kw_only=True)
class RobustBellmanConfig(FamilyConfig):
    """``family: robust_bellman``, the worst case over N heads.

    Attributes:
        num_heads: N >= 1.
        cliprange: >= 0, in units of reward; verl's ``critic.cliprange_value``.
    """

    num_heads: int = 3
    cliprange: float = 0.5

    def build(self) -> RobustBellmanFamily:
        with prefixed():
            return RobustBellmanFamily(num_heads=self.num_heads, cliprange=self.cliprange)


@dataclass(frozen=True, kw_only=True)
class ValueFlowConfig(FlowConfig, FamilyConfig):
    """``family: value_flow``, DFPO's critic (arXiv 2602.05890); its fields are those of ``FlowConfig``."""

    def __post_init__(self) -> None:
        with prefixed():
            FlowConfig.__post_init__(self)
        FamilyConfig.__post_init__(self)

    def build(self) -> ValueFlowFamily:
        return ValueFlowFamily(self)


#: ``critic.value.family`` -> its dataclass.
FAMILIES: dict[str, type[FamilyConfig]] = {
    "scalar": ScalarConfig,
    "quantile_ensemble": QuantileEnsembleConfig,
    "scalar_ensemble": ScalarEnsembleConfig,
    "robust_bellman": RobustBellmanConfig,
    "value_flow": ValueFlowConfig,
}


def family_config(family: str, **settings: Any) -> FamilyConfig:
    """The dataclass for ``family`` with ``settings``; the ``_target_`` of ``critic.value``.

    Raises:
        ValueError: an unknown family or field, or a value outside its bounds.
    """
    one_of("family", family, tuple(FAMILIES))
    cls = FAMILIES[family]
    allowed = {f.name for f in fields(cls)}
    for name in settings:
        if name not in allowed:
            raise ValueError(f"{PREFIX}.{name}: the family {family!r} has no such field; it has {sorted(allowed)}")
    return cls(family=family, **settings)


@dataclass
class ValueModelConfig(HFModelConfig):
    """verl's model section, with the critic's family beside it, so that an engine can build its head.

    Attributes:
        value: filled by :class:`DistributionalFSDPCriticConfig`; not set by users.
    """

    _mutable_fields = HFModelConfig._mutable_fields | {"value"}

    value: Any = None


@dataclass
class DistributionalFSDPCriticConfig(FSDPCriticConfig):
    """verl's critic section for FSDP and FSDP2, and ``critic.value``.

    Attributes:
        value: the typed section of the family.
    """

    value: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.value, FamilyConfig):
            raise ValueError(f"{PREFIX} must name a family, one of {sorted(FAMILIES)}; got {self.value!r}")
        if not isinstance(self.model, ValueModelConfig):
            raise ValueError("critic.model._target_ must be verl_dvpo.critic.config.ValueModelConfig")
        self.model.value = self.value


@contextmanager
def prefixed() -> Iterator[None]:
    """Puts ``critic.value.`` in front of a family's own ValueError, which begins with the field's name."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{PREFIX}.{error}") from None


def in_range(name: str, value: float, low: float, high: float) -> None:
    """Raises ValueError naming ``critic.value.<name>`` unless low <= value <= high."""
    if not low <= value <= high:
        raise ValueError(f"{PREFIX}.{name} must be in [{low}, {high}], got {value}")


def at_least(name: str, value: float, low: float) -> None:
    """Raises ValueError naming ``critic.value.<name>`` unless value >= low."""
    if not value >= low:
        raise ValueError(f"{PREFIX}.{name} must be >= {low}, got {value}")


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises ValueError naming ``critic.value.<name>`` unless ``value`` is allowed."""
    if value not in allowed:
        raise ValueError(f"{PREFIX}.{name} must be one of {list(allowed)}, got {value!r}")
