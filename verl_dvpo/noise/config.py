# SPDX-License-Identifier: Apache-2.0
"""The typed side of ``noise.*``: one dataclass a corruption, checked in ``__post_init__`` before Ray starts.

Rewards that have a right and a wrong (every corruption with ``low`` and ``high``) are read as ``correct`` above the
middle of [low, high], and their wrong verdict is the mirror image ``low + high - score``.

Every corruption has a rate, so that it can be dosed and measured: the share of the samples that it touches.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from omegaconf import DictConfig, OmegaConf

PREFIX = "noise"
#: What a draw is repeated for. sample: nothing else; response: the same response to a prompt; prompt: all responses.
SCOPES = ("sample", "response", "prompt")
STABLE, STUDENT_T = "stable", "student_t"


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """What all corruptions share.

    Attributes:
        seed: any integer >= 0. Runs with equal seeds draw the same numbers for the same samples, whatever the kind and
            rate: the flips at rate 0.3 are among those at 0.5.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        whole("seed", self.seed, 0)


@dataclass(frozen=True, kw_only=True)
class Binary(NoiseConfig):
    """A corruption of rewards with two ends.

    Attributes:
        low: reward of a wrong response.
        high: reward of a right response, above ``low``. A clean score outside [low, high] is an error.
    """

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        number("low", self.low)
        number("high", self.high)
        if not self.low < self.high:
            raise ValueError(f"{PREFIX}.low must be below {PREFIX}.high, got low={self.low} and high={self.high}")


@dataclass(frozen=True, kw_only=True)
class Flip(Binary):
    """Symmetric label flip: the mirror image with probability ``rate``, right or wrong alike."""

    rate: float
    scope: str = "sample"

    def __post_init__(self) -> None:
        super().__post_init__()
        share("rate", self.rate)
        one_of("scope", self.scope, SCOPES)


@dataclass(frozen=True, kw_only=True)
class FlipAsymmetric(Binary):
    """Wrong responses pass with probability ``false_positive``, right ones fail with ``false_negative``."""

    false_positive: float
    false_negative: float
    scope: str = "sample"

    def __post_init__(self) -> None:
        super().__post_init__()
        share("false_positive", self.false_positive)
        share("false_negative", self.false_negative)
        one_of("scope", self.scope, SCOPES)


@dataclass(frozen=True, kw_only=True)
class Additive(NoiseConfig):
    """Something is added to a share ``rate`` of the scores."""

    rate: float = 1.0
    scope: str = "sample"

    def __post_init__(self) -> None:
        super().__post_init__()
        share("rate", self.rate)
        one_of("scope", self.scope, SCOPES)


@dataclass(frozen=True, kw_only=True)
class Gaussian(Additive):
    """Plus a normal number with mean 0 and standard deviation ``scale`` >= 0, in units of reward."""

    scale: float

    def __post_init__(self) -> None:
        super().__post_init__()
        number("scale", self.scale, 0.0)


@dataclass(frozen=True, kw_only=True)
class HeavyTailed(Additive):
    """Plus ``scale`` times a standard heavy-tailed number, symmetric about 0.

    Attributes:
        family: ``student_t`` or ``stable`` (symmetric alpha-stable; characteristic function exp(-|t|^alpha)).
        tail: P(|x| > u) falls as u^-tail. Degrees of freedom in [0.5, 100] of student_t, alpha in [0.5, 2] of stable.
            No variance at or below 2 (stable: below 2), no mean at or below 1.
        scale: >= 0, in units of reward.
    """

    family: str
    tail: float
    scale: float

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("family", self.family, (STUDENT_T, STABLE))
        # Below 0.5 single draws leave the range of the fp32 in which verl stores rewards.
        number("tail", self.tail, 0.5, 2.0 if self.family == STABLE else 100.0)
        number("scale", self.scale, 0.0)


@dataclass(frozen=True, kw_only=True)
class Inflation(Additive):
    """Plus ``amount`` >= 0, in units of reward."""

    amount: float

    def __post_init__(self) -> None:
        super().__post_init__()
        number("amount", self.amount, 0.0)


@dataclass(frozen=True, kw_only=True)
class Deflation(Inflation):
    """Minus ``amount`` >= 0, in units of reward."""


@dataclass(frozen=True, kw_only=True)
class LengthBias(Additive):
    """Plus ``slope`` (any sign, in units of reward) times the response's length over ``reference``, both in tokens."""

    slope: float
    reference: int

    def __post_init__(self) -> None:
        super().__post_init__()
        number("slope", self.slope)
        whole("reference", self.reference, 1)


@dataclass(frozen=True, kw_only=True)
class PromptConsistent(Binary):
    """A share ``rate`` of the prompts has a wrong reference answer, for the whole run, as after a wrong majority vote.

    There a right response fails, and a wrong one passes where it agrees with the wrong reference.

    Attributes:
        rate: share of the prompts.
        agreement: share in [0, 1] of the wrong answers to such a prompt that count as agreeing. An answer is what the
            reward function returns under ``answer_key``, or else the whole response; the same answer to the same
            prompt is always judged alike.
        answer_key: key in the wrapped reward's dict that holds the extracted answer, as verl's own rewards do.
        wrong_answer_key: key in the sample's ``extra_info`` with the wrong reference itself, where the data has it;
            a wrong response then passes if its answer equals that exactly, and ``agreement`` is not used.
    """

    rate: float
    agreement: float = 0.5
    answer_key: str = "pred"
    wrong_answer_key: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        share("rate", self.rate)
        share("agreement", self.agreement)
        text("answer_key", self.answer_key)
        if self.wrong_answer_key is not None:
            text("wrong_answer_key", self.wrong_answer_key)


@dataclass(frozen=True, kw_only=True)
class RewardModel(Binary):
    """A learnt judge: its latent score is normal around +m for right and -m for wrong responses, m = Φ^-1(accuracy).

    Attributes:
        accuracy: share in [0, 1] of its verdicts that are right (paper: 0.718).
        graded: true: low + (high - low) * logistic(2 |m| z) of the latent score z, for m > 0 the probability of
            ``right`` given z at even odds; false: ``high`` where z > 0 and ``low`` elsewhere.
        scope: a real one gives the same score to the same response, so ``response``.
    """

    accuracy: float
    graded: bool = True
    scope: str = "response"

    def __post_init__(self) -> None:
        super().__post_init__()
        share("accuracy", self.accuracy)
        if not isinstance(self.graded, bool):
            raise ValueError(f"{PREFIX}.graded must be true or false, got {self.graded!r}")
        one_of("scope", self.scope, SCOPES)


@dataclass(frozen=True, kw_only=True)
class Dropout(NoiseConfig):
    """The reward is withheld with probability ``rate``: the score becomes ``withheld``, in units of reward."""

    rate: float
    withheld: float = 0.0
    scope: str = "sample"

    def __post_init__(self) -> None:
        super().__post_init__()
        share("rate", self.rate)
        number("withheld", self.withheld)
        one_of("scope", self.scope, SCOPES)


@dataclass(frozen=True, kw_only=True)
class Adversary(Binary):
    """May flip a share ``rate`` of the verdicts on each prompt, and spends it on the rarer verdict first.

    It sees one sample at a time: the clean verdict, and how often the prompt is expected to be solved, p. Flipping a
    share f of right and g of wrong responses leaves a gap of (1 - f - g) (high - low) between what right and wrong
    responses earn on average, and costs p f + (1 - p) g of the budget. The gap shrinks most per unit of budget on the
    rarer verdict: right answers to hard prompts fail, wrong answers to easy prompts pass. What is left goes to the
    other verdict. It cannot see the other samples, so the budget holds where p does; the share that it spent is
    logged.

    Attributes:
        rate: budget, the share of the responses to each prompt.
        pass_rate: p in [0, 1] where the data does not say. At 1/2 it takes the right responses first.
        pass_rate_key: key in the sample's ``extra_info`` with the prompt's own p; null uses ``pass_rate`` for all.
    """

    rate: float
    pass_rate: float = 0.5
    pass_rate_key: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        share("rate", self.rate)
        share("pass_rate", self.pass_rate)
        if self.pass_rate_key is not None:
            text("pass_rate_key", self.pass_rate_key)


KINDS: dict[str, type[NoiseConfig]] = {
    "flip": Flip,
    "flip_asymmetric": FlipAsymmetric,
    "gaussian": Gaussian,
    "heavy_tailed": HeavyTailed,
    "inflation": Inflation,
    "deflation": Deflation,
    "length_bias": LengthBias,
    "prompt_consistent": PromptConsistent,
    "reward_model": RewardModel,
    "dropout": Dropout,
    "adversary": Adversary,
}
#: Clean rewards: nothing of verl's is touched.
NONE = "none"


def noise_config(settings: Mapping[str, Any] | DictConfig | None) -> NoiseConfig | None:
    """The corruption that ``noise:`` asks for; None where it is absent or ``kind: none``.

    Raises:
        ValueError: an unknown kind or field, a missing one, or a value outside its bounds.
    """
    if settings is None:
        return None
    if isinstance(settings, DictConfig):
        plain = OmegaConf.to_container(settings, resolve=True)
        assert isinstance(plain, dict)
        settings = {str(name): value for name, value in plain.items()}
    if not isinstance(settings, Mapping):
        raise ValueError(f"{PREFIX} must hold fields, got {settings!r}; choose a corruption with noise=NAME")
    values: dict[str, Any] = {str(name): value for name, value in settings.items()}
    kind = values.pop("kind", None)
    if kind not in (NONE, *KINDS):
        raise ValueError(f"{PREFIX}.kind must be one of {[NONE, *KINDS]}, got {kind!r}")
    allowed = ["seed"] if kind == NONE else [field.name for field in fields(KINDS[kind])]
    if unknown := sorted(values.keys() - set(allowed)):
        raise ValueError(f"{PREFIX}.{unknown[0]} is no field of {PREFIX}.kind={kind}; its fields are {sorted(allowed)}")
    if kind == NONE:
        return None
    try:
        return KINDS[kind](**values)
    except TypeError as error:
        raise ValueError(f"{PREFIX}.kind={kind} lacks a field: {error}") from error


def check_config(config: DictConfig) -> None:
    """Raises ValueError for a ``noise:`` that is wrong in itself, or that this run would not honour."""
    if noise_config(config.get(PREFIX)) is None:
        return
    kind = config[PREFIX].kind
    if not config.trainer.get("use_v1", True):
        raise ValueError(f"noise={kind} needs trainer.use_v1=true, got trainer.use_v1={config.trainer.use_v1}")
    reward = config.reward
    if reward.reward_model.enable and not reward.reward_model.enable_resource_pool:
        raise ValueError(
            f"noise={kind}: with reward.reward_model.enable=true and reward.reward_model.enable_resource_pool=false "
            "verl scores after the rollout without telling training from validation; "
            "set reward.reward_model.enable_resource_pool=true"
        )
    if reward.reward_model.enable and not reward.custom_reward_function.path:
        raise ValueError(
            f"noise={kind} wraps reward functions, but reward.reward_model.enable=true without "
            "reward.custom_reward_function.path asks none; set a reward function that asks the reward model"
        )
    groups = config.algorithm.get("filter_groups")
    if groups is not None and groups.enable and groups.metric not in ("reward", "score"):
        raise ValueError(
            f"algorithm.filter_groups.metric={groups.metric!r} stays clean under noise={kind}, so the filter would see "
            "through the noise; use reward or score"
        )
    if config.algorithm.adv_estimator == "gdpo":
        raise ValueError(
            f"algorithm.adv_estimator=gdpo learns from the parts that the reward function returns, and noise={kind} "
            "corrupts only their sum; choose another estimator, or noise=none"
        )


def number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> None:
    """Raises ValueError unless `value` is a finite number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{PREFIX}.{name} must be a number{_bounds(low, high)}, got {value!r}")
    if not (math.isfinite(value) and low <= value <= high):
        raise ValueError(f"{PREFIX}.{name} must be a finite number{_bounds(low, high)}, got {value!r}")


def share(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is a number in [0, 1]."""
    number(name, value, 0.0, 1.0)


def whole(name: str, value: Any, low: int) -> None:
    """Raises ValueError unless `value` is an integer of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{PREFIX}.{name} must be an integer of at least {low}, got {value!r}")


def one_of(name: str, value: Any, allowed: Iterable[str]) -> None:
    """Raises ValueError unless `value` is one of `allowed`."""
    if value not in tuple(allowed):
        raise ValueError(f"{PREFIX}.{name} must be one of {list(allowed)}, got {value!r}")


def text(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is a string with something in it."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"{PREFIX}.{name} must be a name, got {value!r}")


def _bounds(low: float, high: float) -> str:
    if math.isinf(low) and math.isinf(high):
        return ""
    return f" of at least {low}" if math.isinf(high) else f" in [{low}, {high}]"
