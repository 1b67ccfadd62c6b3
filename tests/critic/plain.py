# SPDX-License-Identifier: Apache-2.0
"""A critic's update by transformers and plain loops: one sequence at a time in float64, nothing of verl or verl_dvpo.

The critic is two heads of five quantiles with the terms ``quantile``, ``cvar`` and ``consistency`` (docs/method.md,
sections 3 and 4), targets of ``quantile_gae``, and the mean over valid tokens.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import linear

HEADS, QUANTILES, TAIL = 2, 5, 1
GAMMA, LAM = 0.9, 0.8
COEF = dict.fromkeys(("risk", "gain", "shift", "shape", "curvature"), 0.0) | {"cvar": 0.1, "consistency": 0.2}
#: The same, as the worker's settings; alpha and beta make a tail of one quantile.
VALUE = {
    "family": "quantile_ensemble",
    "num_heads": HEADS,
    "num_quantiles": QUANTILES,
    "alpha": 0.2,
    "beta": 0.2,
    "kappa": 1.0,
    "coef": COEF,
}

#: (backbone, row) -> (length, H): the last hidden states of one sequence.
Forward = Callable[[Any, int], Tensor]


def backbone_of(path: str) -> Any:
    """The inner part of the model that was saved; attention and experts by transformers' slowest and plainest code."""
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    (name,) = transformers.AutoConfig.from_pretrained(path).architectures
    return getattr(transformers, name).from_pretrained(path, dtype=torch.float64, **eager).base_model


def states_of(backbone: Any, head: dict[str, Tensor], batch: Any, forward: Forward | None = None) -> list[Tensor]:
    """Each sequence's (T, N·M) outputs at the states that predict its response."""
    found = []
    for row, (prompt, ids) in enumerate(zip(batch["prompts"].unbind(), batch["input_ids"].unbind(), strict=True)):
        if forward is None:
            hidden = backbone(input_ids=ids[None], use_cache=False).last_hidden_state[0]
        else:
            hidden = forward(backbone, row)
        found.append(linear(hidden[len(prompt) - 1 : -1], head["weight"], head["bias"]))
    return found


def values_of(states: list[Tensor]) -> list[Tensor]:
    """The mean over heads and quantiles."""
    return [each.mean(-1) for each in states]


def targets_of(states: list[Tensor], batch: Any) -> list[Tensor]:
    """Eq 2 by a loop: each sequence's (T, M), meaningless where the mask is 0."""
    found = []
    for outputs, rewards, mask in zip(
        states, batch["rm_scores"].unbind(), batch["response_mask"].unbind(), strict=True
    ):
        theta = outputs.detach().unflatten(-1, (HEADS, QUANTILES)).mean(-2).sort(-1).values
        following, advantage = torch.zeros(QUANTILES, dtype=theta.dtype), torch.zeros(QUANTILES, dtype=theta.dtype)
        targets = torch.zeros_like(theta)
        for t in reversed(range(len(theta))):
            if not mask[t]:
                continue
            advantage = rewards[t] + GAMMA * following - theta[t] + GAMMA * LAM * advantage
            following = theta[t]
            targets[t] = theta[t] + advantage
        found.append(targets.sort(-1).values)
    return found


def loss_of(states: list[Tensor], batch: Any) -> Tensor:
    """The loss of an update on the whole batch, with the multiplier of ``cvar`` from the states themselves."""
    targets = targets_of(states, batch)
    masks = [mask.bool() for mask in batch["response_mask"].unbind()]
    heads = torch.cat([each[mask] for each, mask in zip(states, masks, strict=True)]).unflatten(-1, (HEADS, QUANTILES))
    z = torch.cat([each[mask] for each, mask in zip(targets, masks, strict=True)])
    levels = torch.arange(1, QUANTILES + 1, dtype=heads.dtype) / QUANTILES
    u = z[:, None, None, :] - heads[..., None]
    huber = torch.where(u.abs() <= 1, 0.5 * u.square(), u.abs() - 0.5)
    quantile = ((levels[:, None] - (u < 0).to(u)).abs() * huber).mean((-1, -2, -3))
    low = heads.mean(-2).sort(-1).values[:, :TAIL].mean(-1)
    difference = low - z[:, :TAIL].mean(-1)
    cvar = 2.0 * difference.mean().detach() * difference
    consistency = (heads[:, 0] - heads[:, 1]).square().mean(-1)
    return (quantile + COEF["cvar"] * cvar + COEF["consistency"] * consistency).mean()


def gradients_of(
    backbone: Any, head: dict[str, Tensor], batch: Any, forward: Forward | None = None
) -> dict[str, Tensor]:
    """The gradient of ``loss_of`` under the names of the worker: ``model.*`` for the backbone, ``score.*``."""
    backbone.requires_grad_(True).zero_grad()
    head = {name: tensor.clone().requires_grad_() for name, tensor in head.items()}
    loss_of(states_of(backbone, head, batch, forward), batch).backward()
    found = {f"model.{name}": parameter.grad for name, parameter in backbone.named_parameters()}
    found |= {f"score.{name}": tensor.grad for name, tensor in head.items()}
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def head_of(worker: Any) -> dict[str, Tensor]:
    """The worker's head, in float64."""
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().double()
        for name, p in worker.engine._head.named_parameters()
    }
