# SPDX-License-Identifier: Apache-2.0
"""Fits a critic of any family to rollouts of a fixed policy: the family's own targets and loss, in plain torch.

Shapes: B responses, L tokens of a prompt with its response, T tokens of a response, D outputs of the head.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from verl_dvpo.bench.gate.rollouts import Rollouts
from verl_dvpo.critic.head import build_head
from verl_dvpo.families.base import FamilyConfig, ValueFamily
from verl_dvpo.families.registry import build_family

#: Responses at once where there is no gradient.
BATCH = 512


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Settings of a fit.

    Attributes:
        epochs: passes over the rollouts, at least 1.
        update: responses between two inferences, which give the old values that targets and clipping rest on; at
            least 1.
        mini_batch: responses of an optimizer step, at least 1.
        learning_rate: of AdamW, above 0.
        gamma: discount in [0, 1].
        lam: trace in [0, 1] of the targets; 1 takes Monte-Carlo returns.
        max_grad_norm: gradients are clipped to it, above 0.
        seed: of the order of the rollouts, and of targets that are drawn.
    """

    epochs: int = 4
    update: int = 256
    mini_batch: int = 64
    learning_rate: float = 1e-3
    gamma: float = 1.0
    lam: float = 1.0
    max_grad_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "update", "mini_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1; choose a larger one")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0; choose a larger one")
        for name in ("gamma", "lam"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be in [0, 1]; choose one there")


class Critic(nn.Module):
    """A policy's backbone with a fresh head, as the critic's worker builds it.

    Args:
        policy: a causal language model; its weights are copied.
        settings: of the family.
    """

    def __init__(self, policy: PreTrainedModel, settings: FamilyConfig) -> None:
        super().__init__()
        self.family: ValueFamily = build_family(settings)
        self.backbone: nn.Module = copy.deepcopy(policy.base_model)
        self.head = build_head(
            policy.config.hidden_size,
            self.family,
            seed=settings.head_seed,
            width=settings.head_width,
            activation=settings.head_activation,
        )

    def forward(self, rollouts: Rollouts) -> Tensor:
        """Computes the head's outputs (B, T, D) at the states before each token; padding repeats the last state.

        Padding on the right needs no attention mask: under causal attention no real token sees it.
        """
        hidden = self.backbone(input_ids=rollouts.ids, use_cache=False).last_hidden_state
        states = rollouts.states[:, :, None].expand(-1, -1, hidden.shape[-1])
        return self.head(hidden.gather(1, states))

    @torch.no_grad()
    def values(self, rollouts: Rollouts) -> Tensor:
        """Computes the values (B, T) that the actor would see, in units of reward."""
        found = torch.zeros_like(rollouts.mask)
        for first in range(0, len(rollouts), BATCH):
            piece = rollouts[slice(first, first + BATCH)]
            values = self.family.values_from_kept(self.family.keep(self(piece).float()))
            found[first : first + BATCH, : values.shape[1]] = values
        return found


def fit_critic(policy: PreTrainedModel, settings: FamilyConfig, rollouts: Rollouts, config: FitConfig) -> Critic:
    """Fits a critic to rollouts, update by update as the worker does, and returns it.

    Each update infers, keeps what the family needs, builds targets of λ-returns, and steps over its mini-batches. The
    same arguments and number of threads give the same critic.

    Args:
        policy: its backbone is where the critic starts; it does not change.
        settings: of the family; ``lam`` in it goes before that of ``config``.
        rollouts: B >= 1 of them.
        config: how to fit.
    """
    critic = Critic(policy, settings)
    optimizer = torch.optim.AdamW(critic.parameters(), lr=config.learning_rate, weight_decay=0.01)
    generator = torch.Generator().manual_seed(config.seed)
    lam = config.lam if settings.lam is None else settings.lam
    for _ in range(config.epochs):
        order = torch.randperm(len(rollouts), generator=generator)
        for rows in order.split(config.update):
            _update(critic, optimizer, rollouts[rows], config, lam=lam, generator=generator)
    return critic.eval()


def _update(
    critic: Critic,
    optimizer: torch.optim.Optimizer,
    rollouts: Rollouts,
    config: FitConfig,
    *,
    lam: float,
    generator: torch.Generator,
) -> None:
    """Builds the targets of one update and takes a step on each of its mini-batches."""
    family, mask = critic.family, rollouts.mask
    with torch.no_grad():
        kept = family.keep(critic(rollouts).float())
        # Families that see prompts take a key >= 0 of each row's prompt.
        more = {"prompts": rollouts.prompts} if family.sees_prompts else {}
        targets = family.build_targets(
            kept, rollouts.token_rewards, mask, gamma=config.gamma, lam=lam, generator=generator, **more
        )
        inside = mask.bool()
        multipliers = family.multipliers({name: each[inside] for name, each in targets.items()}, mask[inside])
    for rows in torch.arange(len(rollouts)).split(config.mini_batch):
        piece = rollouts[rows]
        inside = piece.mask.bool()
        chosen = {name: each[rows, : inside.shape[1]][inside] for name, each in targets.items()}
        loss = family.loss(critic(piece).float()[inside], chosen, multipliers).total.mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(critic.parameters(), config.max_grad_norm)
        optimizer.step()
