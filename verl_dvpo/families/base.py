# SPDX-License-Identifier: Apache-2.0
"""The interface of a value family, and the settings that all families share. Pure torch: no parameters, no verl.

A family gives the D outputs of a critic head their meaning: which value they stand for, which quantiles, which targets
they learn from, and with which loss. ``docs/families.md`` shows how to write one.

Shape legend (docs/method.md, section 1):
    B sequences, T response positions, L tokens of any batch laid end to end,
    D outputs of the head per token, S numbers kept per token between inference and update,
    K equally weighted samples of Z(s), J quantile levels.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from verl_dvpo.distributional.levels import read_at
from verl_dvpo.families.bounds import require_between, require_choice, require_integer

#: Adds a 1-D tensor over data-parallel ranks and returns it.
Reduce = Callable[[Tensor], Tensor]

#: Of a hidden layer in the head; ``verl_dvpo.critic.head`` has the functions.
ACTIVATION_NAMES = ("gelu", "silu", "relu", "tanh")

#: Where a critic's first head comes from.
HEAD_SOURCES = ("model", "seed")

#: Answers of one step whose distributions are written: a look at the critic, never the whole batch.
MOST_DUMPED = 64


@dataclass(frozen=True, kw_only=True)
class FamilyConfig:
    """The settings that every family has. A family adds its own fields in a subclass, also frozen and keyword-only.

    A subclass checks its fields in ``__post_init__`` after it called this class's. Each ValueError begins with the
    field's name; ``critic.value.`` is put in front of it where settings come from YAML.

    Attributes:
        family: the registered name or import path by which the family was chosen; empty where it was built in code.
        lam: trace in [0, 1] of the critic's targets; null takes ``algorithm.lam`` (VC-PPO, VAPO: a λ of its own).
        head_seed: seed of the head's first weights.
        head_width: width >= 1 of a hidden layer before the outputs; null for a linear head.
        head_activation: of that layer: ``gelu``, ``silu``, ``relu`` or ``tanh``.
        head_from: ``model``: an exported critic brings its head, a model with one output (a token classifier, a reward
            model) gives its value to the family's first head, any other leaves it to ``head_seed``. ``seed``: the head
            is drawn from ``head_seed`` whatever the model has.
        target_seed: seed of targets that are drawn; the draw of update n depends on it and on n alone.
        keep_on: ``device`` or ``cpu``: where kept numbers wait between inference and update.
        rows_per_chunk: sequences whose targets are built at once, >= 1; bounds the memory of that step.
        tokens_per_block: response tokens whose outputs are in memory at once, >= 1; on the way back they are computed
            once more. null keeps those of a micro-batch.
        share_every: >= 0: every how many steps each term's share of the gradient at the head's outputs is logged; 0
            never. Such an update computes the loss twice and has a backward pass, to the outputs, for each term.
        dump_every: >= 0: every how many steps the distribution along a few answers is written to the folder ``values``
            of ``trainer.default_local_dir``; 0 never.
        dump_sequences: how many answers that is, in [1, 64].

    Raises:
        ValueError: a field is outside its bounds.
    """

    #: The fields that fix what the head's outputs mean; a saved head loads only where they and D agree.
    meaning: ClassVar[tuple[str, ...]] = ()

    family: str = ""
    lam: float | None = None
    head_seed: int = 0
    head_width: int | None = None
    head_activation: str = "gelu"
    head_from: str = "model"
    target_seed: int = 0
    keep_on: str = "device"
    rows_per_chunk: int = 32
    tokens_per_block: int | None = None
    share_every: int = 0
    dump_every: int = 0
    dump_sequences: int = 4

    def __post_init__(self) -> None:
        if self.lam is not None:
            require_between("lam", self.lam, 0.0, 1.0)
        if self.head_width is not None:
            require_integer("head_width", self.head_width, least=1)
        require_choice("head_activation", self.head_activation, ACTIVATION_NAMES)
        require_choice("head_from", self.head_from, HEAD_SOURCES)
        require_choice("keep_on", self.keep_on, ("device", "cpu"))
        require_integer("rows_per_chunk", self.rows_per_chunk, least=1)
        if self.tokens_per_block is not None:
            require_integer("tokens_per_block", self.tokens_per_block, least=1)
        require_integer("share_every", self.share_every, least=0)
        require_integer("dump_every", self.dump_every, least=0)
        require_integer("dump_sequences", self.dump_sequences, least=1, most=MOST_DUMPED)

    def plain(self) -> dict[str, Any]:
        """Returns every setting but the family's name, as JSON holds them."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "family"}
        found: dict[str, Any] = json.loads(json.dumps(own, default=dict))
        return found

    def layout(self) -> dict[str, Any]:
        """Returns the settings that fix shape and meaning of the head's outputs, as JSON holds them."""
        head = ("head_width",) if self.head_width is None else ("head_width", "head_activation")
        return {name: value for name, value in self.plain().items() if name in (*head, *self.meaning)}


@dataclass(frozen=True)
class FamilyLoss:
    """A family's loss per token.

    Attributes:
        total: (L,) what is minimised, after aggregation over tokens.
        terms: name -> (L,) each active term before its coefficient; logged as ``critic/loss/<name>``, not minimised.
        coef: name -> coefficient with which each term enters ``total``, so that total = Σ coef·term; empty where the
            total is no such sum, or has one term. ``critic.value.share_every`` logs the terms named here.
    """

    total: Tensor
    terms: dict[str, Tensor]
    coef: Mapping[str, float] = field(default_factory=dict)


class ValueFamily(ABC):
    """Gives the outputs of a critic head their meaning. One instance serves inference, targets, loss and statistics.

    The worker calls, once an update: ``keep`` and ``statistics`` on each micro-batch of the inference pass,
    ``values_from_kept`` for the values that the actor sees, ``build_targets`` on what was kept, ``multipliers`` and
    ``target_statistics`` on those targets, then ``loss`` and ``value`` on every micro-batch, and ``adapt`` at the end.
    """

    #: The settings that ``__init__`` takes.
    Config: ClassVar[type[FamilyConfig]]
    #: D >= 1, the outputs of the head per token.
    num_outputs: int
    #: S >= 1, the numbers per token that ``keep`` returns.
    num_kept: int
    #: True of a family whose ``build_targets`` also takes ``prompts`` (B,): an int64 key >= 0 of each row's prompt, the
    #: same for all its answers, on every rank and in every update.
    sees_prompts: bool = False

    @abstractmethod
    def __init__(self, config: FamilyConfig) -> None:
        """Takes settings that are within their bounds, and sets ``num_outputs`` and ``num_kept``."""

    @abstractmethod
    def value(self, outputs: Tensor) -> Tensor:
        """(..., D) -> (...): the value that the outputs stand for, in units of reward.

        It equals ``values_from_kept(keep(outputs))`` up to rounding, and needs no order among samples.
        """

    @abstractmethod
    def quantiles(self, outputs: Tensor, levels: Tensor) -> Tensor:
        """(..., D) and (J,) in (0, 1) -> (..., J): quantiles of Z(s), for statistics, pictures and metrics.

        They ascend with the level. A family without a distribution repeats its value.
        """

    @abstractmethod
    def keep(self, outputs: Tensor) -> Tensor:
        """(..., D) -> (..., S): what targets need later, in float32."""

    @abstractmethod
    def values_from_kept(self, kept: Tensor) -> Tensor:
        """(..., S) -> (...): the value that the actor sees, in units of reward."""

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
        """Builds the targets of one update from whole sequences.

        Args:
            kept: (B, T, S) from ``keep``, before the update.
            rewards: (B, T).
            mask: (B, T), 0 at padding and at tokens that the policy did not write.
            gamma: discount in [0, 1].
            lam: trace in [0, 1].
            generator: for families whose targets are drawn.

        Returns:
            name -> (B, T, ...): per-token tensors that ``loss`` takes back, flattened to (L, ...).
        """

    @abstractmethod
    def loss(
        self, outputs: Tensor, targets: Mapping[str, Tensor], multipliers: Mapping[str, Tensor] | None = None
    ) -> FamilyLoss:
        """Computes the loss per token.

        Args:
            outputs: (L, D) with gradient.
            targets: name -> (L, ...) from ``build_targets``.
            multipliers: name -> scalar from ``multipliers``.
        """

    def head_values(self, outputs: Tensor) -> Tensor:
        """(..., D) -> (..., N): the value of each head, in units of reward; one, unless the family is an ensemble."""
        return self.value(outputs).unsqueeze(-1)

    def multipliers(
        self, targets: Mapping[str, Tensor], mask: Tensor, *, reduce: Reduce | None = None
    ) -> dict[str, Tensor]:
        """Computes what ``loss`` needs to know of the whole update at once; nothing for a family without constraints.

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

    def target_statistics(self, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """name -> (L, ...) targets -> metric name -> (L,): averaged and logged as those of ``statistics`` are."""
        return {}

    def warnings(self, statistics: Mapping[str, float], reward_std: float) -> dict[str, str]:
        """Judges the values as a whole: metric name -> what to tell the user; nothing for most families.

        Args:
            statistics: those of ``statistics``, averaged over all valid tokens of the update and all ranks.
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

    def start_at(self, weight: Tensor, bias: Tensor, value_weight: Tensor, value_bias: Tensor) -> bool:
        """Moves a head that ``init_head`` filled to a scalar critic's value, in place; its first spread stays.

        Args:
            weight: (D, H) of the head's last layer.
            bias: (D,) of the head's last layer.
            value_weight: (H,) of the scalar critic.
            value_bias: scalar, of the scalar critic.

        Returns:
            False, and nothing moved, where the family's value is no linear function of the hidden state.
        """
        return False

    def adapt(self, statistics: Mapping[str, float]) -> dict[str, float]:
        """Chooses anew what the family chooses in training; nothing for most families.

        Called once an update, after it, with the same numbers on every rank. What later choices depend on belongs into
        ``state``.

        Args:
            statistics: those of ``target_statistics``, averaged over all valid tokens of the update and all ranks.

        Returns:
            metric name -> what is chosen now; logged as ``critic/<name>``.
        """
        return {}

    def state(self) -> dict[str, Tensor]:
        """Returns what the family has learned or counted beside the head, for a checkpoint; nothing for most.

        It must be the same on every rank. With it a resumed run goes on to the bit.
        """
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes back what ``state`` returned.

        Raises:
            ValueError: a family without a state is given one.
        """
        if state:
            raise ValueError(f"state holds {', '.join(sorted(state))}; {type(self).__name__} keeps no state")


def move_to_value(weight: Tensor, bias: Tensor, value_weight: Tensor, value_bias: Tensor) -> bool:
    """Moves all D outputs together so that their mean is a scalar critic's value; what sets them apart stays. (ours)

    The arguments and the result are those of ``ValueFamily.start_at``; True.
    """
    weight += value_weight - weight.mean(0)
    bias += value_bias - bias.mean()
    return True


class SampledFamily(ValueFamily):
    """A family whose outputs stand for K equally weighted samples of Z(s), and that keeps those samples."""

    @abstractmethod
    def samples(self, outputs: Tensor) -> Tensor:
        """(..., D) -> (..., K): equally weighted points of Z(s), ascending.

        Their mean is the value, unless the family weighs them in ``values_from_kept``.
        """

    def quantiles(self, outputs: Tensor, levels: Tensor) -> Tensor:
        """(..., D) and (J,) -> (..., J): the samples, read at the levels by linear interpolation."""
        return read_at(self.samples(outputs), levels)

    def keep(self, outputs: Tensor) -> Tensor:
        """(..., D) -> (..., K): the samples, unless a family needs less or more."""
        return self.samples(outputs)

    def values_from_kept(self, kept: Tensor) -> Tensor:
        """(..., K) -> (...): the mean of the samples."""
        return kept.mean(-1)
