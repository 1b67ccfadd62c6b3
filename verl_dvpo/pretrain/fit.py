# SPDX-License-Identifier: Apache-2.0
"""Fits a critic to rollouts with its family's own targets and loss, and stops when what is held out gets no better.

Shape legend: B sequences, S tokens of the longest, T tokens of the longest response, D outputs, L response tokens.
"""

import copy
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from verl_dvpo.export.value_model import ValueModel
from verl_dvpo.pretrain.measure import Measured, measure
from verl_dvpo.pretrain.rollouts import Rollout


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Settings of a fit.

    Attributes:
        epochs: at most, >= 1.
        batch_size: sequences of one update, >= 1.
        lr: of AdamW, > 0.
        gamma: discount in [0, 1].
        lam: trace in [0, 1] of the targets; 1 takes the rewards alone, as nothing is learned yet.
        patience: epochs without a better held-out score before it stops, >= 1; 0 makes all epochs and keeps the last.
        clip: largest norm of the gradient, > 0.
        seed: of the order of sequences and of targets that are drawn.

    Raises:
        ValueError: a field is outside its bounds.
    """

    epochs: int = 20
    batch_size: int = 32
    lr: float = 1e-4
    gamma: float = 1.0
    lam: float = 1.0
    patience: int = 3
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("patience", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)!r}; at least {least} is allowed")
        for name in ("lr", "clip"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} is {getattr(self, name)!r}; a number above 0 is allowed")
        for name in ("gamma", "lam"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)!r}; a number in [0, 1] is allowed")


@dataclass
class Fitted:
    """The result of a fit.

    Attributes:
        history: held-out measurements: before the first epoch, then after each.
        losses: mean training loss of each epoch.
        best: index into ``history`` of the weights that the model has now.
    """

    history: list[Measured] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    best: int = 0


@dataclass(frozen=True)
class Batch:
    """Rollouts, padded.

    Attributes:
        input_ids: (B, S), padded on the right.
        attention_mask: (B, S).
        states: (B, T) the position whose output predicts each response token; 0 at padding.
        mask: (B, T) 1 at response tokens.
        rewards: (B, T), each at its response's last token.
        prompts: (B,) int64 >= 0, equal for equal prompts.
    """

    input_ids: Tensor
    attention_mask: Tensor
    states: Tensor
    mask: Tensor
    rewards: Tensor
    prompts: Tensor

    @classmethod
    def of(cls, rollouts: Sequence[Rollout], device: torch.device) -> "Batch":
        """Pads rollouts together."""
        size = len(rollouts)
        longest = max(len(r.prompt) + len(r.response) for r in rollouts)
        width = max(len(r.response) for r in rollouts)
        ids, attention = torch.zeros(size, longest, dtype=torch.int64), torch.zeros(size, longest, dtype=torch.int64)
        states, mask = torch.zeros(size, width, dtype=torch.int64), torch.zeros(size, width)
        rewards = torch.zeros(size, width)
        for row, r in enumerate(rollouts):
            start, length = len(r.prompt), len(r.response)
            ids[row, : start + length] = torch.tensor(r.prompt + r.response)
            attention[row, : start + length] = 1
            states[row, :length] = torch.arange(start - 1, start + length - 1)
            mask[row, :length] = 1.0
            rewards[row, length - 1] = r.reward
        prompts = torch.tensor([_key(r.prompt) for r in rollouts])
        return cls(*(tensor.to(device) for tensor in (ids, attention, states, mask, rewards, prompts)))

    def outputs(self, model: ValueModel) -> Tensor:
        """(B, T, D) in fp32: what the head says of each state."""
        found = model(self.input_ids, self.attention_mask).float()
        return found.gather(1, self.states.unsqueeze(-1).expand(-1, -1, found.shape[-1]))

    def returns(self, gamma: float) -> Tensor:
        """(B, T): the discounted reward that each response token still has before it, its own included."""
        left = self.mask.flip(1).cumsum(1).flip(1) - 1.0
        total = self.rewards.sum(1, keepdim=True)
        return torch.where(self.mask > 0, total * gamma ** left.clamp_min(0.0), 0.0)


def fit(
    model: ValueModel,
    train: Sequence[Rollout],
    held_out: Sequence[Rollout],
    config: FitConfig | None = None,
    *,
    progress: Callable[[str], None] = lambda line: None,
) -> Fitted:
    """Fits all weights of ``model``; it ends with those that were best on what is held out, or with the last.

    Better is a smaller continuous ranked probability score.

    Args:
        model: changed in place.
        train: rollouts to learn from.
        held_out: rollouts to judge by.
        config: settings.
        progress: gets a line an epoch.

    Raises:
        FloatingPointError: the loss is not a finite number.
        ValueError: a rollout is too long for the model, or has an id outside its vocabulary.
    """
    config = config or FitConfig()
    check_fits(model, [*train, *held_out])
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0)
    order = torch.Generator().manual_seed(config.seed)
    draws = torch.Generator(device).manual_seed(config.seed)
    fitted = Fitted(history=[evaluate(model, held_out, config)])
    best = copy.deepcopy(model.state_dict())
    progress(f"before: {fitted.history[0].line()}")
    for epoch in range(1, config.epochs + 1):
        model.train()
        losses = [
            update(model, Batch.of(rows, device), optimizer, config, draws)
            for rows in _shuffled(train, config.batch_size, order)
        ]
        fitted.losses.append(sum(losses) / len(losses))
        fitted.history.append(evaluate(model, held_out, config))
        progress(f"epoch {epoch} of {config.epochs}: loss {fitted.losses[-1]:.4g}, {fitted.history[-1].line()}")
        if config.patience == 0 or fitted.history[-1].crps < fitted.history[fitted.best].crps:
            fitted.best, best = epoch, copy.deepcopy(model.state_dict())
        elif epoch - fitted.best >= config.patience:
            progress(f"stopped: {config.patience} epochs without a better score")
            break
    model.load_state_dict(best)
    model.eval()
    return fitted


def update(
    model: ValueModel, batch: Batch, optimizer: torch.optim.Optimizer, config: FitConfig, draws: torch.Generator
) -> float:
    """Makes one update on one batch, with targets from the outputs before it, and returns its loss.

    Raises:
        FloatingPointError: the loss is not a finite number.
    """
    family, inside = model.family, batch.mask > 0
    outputs = batch.outputs(model)
    with torch.no_grad():
        kept = family.keep(outputs.detach())
        more: dict[str, Any] = {"prompts": batch.prompts} if family.sees_prompts else {}
        built = family.build_targets(
            kept, batch.rewards, batch.mask, gamma=config.gamma, lam=config.lam, generator=draws, **more
        )
        targets = {name: tensor[inside] for name, tensor in built.items()}
        multipliers = family.multipliers(targets, batch.mask[inside])
    loss = family.loss(outputs[inside], targets, multipliers).total.mean()
    if not bool(torch.isfinite(loss)):
        raise FloatingPointError(f"the loss is {loss.item()}; a finite number is allowed; lower lr")
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    optimizer.step()
    return loss.item()


@torch.no_grad()
def evaluate(model: ValueModel, rollouts: Sequence[Rollout], config: FitConfig) -> Measured:
    """Measures the model on rollouts."""
    model.eval()
    device = next(model.parameters()).device
    parts = []
    for first in range(0, len(rollouts), config.batch_size):
        batch = Batch.of(rollouts[first : first + config.batch_size], device)
        inside = batch.mask > 0
        lengths = batch.mask.sum(1, keepdim=True)
        place = (torch.arange(batch.mask.shape[1], device=device) + 0.5) / lengths
        parts.append(
            (batch.outputs(model)[inside].cpu(), batch.returns(config.gamma)[inside].cpu(), place[inside].cpu())
        )
    outputs, returns, places = (torch.cat(column) for column in zip(*parts, strict=True))
    return measure(model.family, outputs, returns, places)


def check_fits(model: ValueModel, rollouts: Sequence[Rollout]) -> None:
    """Raises ValueError where a rollout is too long for the model or has an id outside its vocabulary."""
    config = model.module.config.get_text_config()  # type: ignore[union-attr, operator]
    longest = max(len(r.prompt) + len(r.response) for r in rollouts)
    largest = max(max(r.prompt + r.response) for r in rollouts)
    allowed = getattr(config, "max_position_embeddings", longest)
    if longest > allowed:
        raise ValueError(f"rollouts hold a sequence of {longest} tokens; the model allows {allowed}; leave it out")
    if largest >= config.vocab_size:
        raise ValueError(f"rollouts hold the token id {largest}; the model allows ids below {config.vocab_size}")


def _key(prompt: tuple[int, ...]) -> int:
    return int.from_bytes(hashlib.blake2b(repr(prompt).encode(), digest_size=8).digest(), "little") >> 1


def _shuffled(rollouts: Sequence[Rollout], size: int, generator: torch.Generator) -> Iterator[list[Rollout]]:
    order = torch.randperm(len(rollouts), generator=generator).tolist()
    for first in range(0, len(order), size):
        yield [rollouts[i] for i in order[first : first + size]]
