# SPDX-License-Identifier: Apache-2.0
"""The value flow in float64, one number at a time: what the vectorised code is held against."""

import math

import torch
from scipy.stats import norm
from torch import Tensor


def noise(k: int, count: int, scale: float) -> float:
    """ε_k, k from 0."""
    return scale * float(norm.ppf((2 * k + 1) / (2 * count)))


def field(a: Tensor, zeta: float, u: float, scale: float) -> Tensor:
    """v(ζ,u) of one token: a (I, P) float64 -> scalar with gradient."""
    level = float(norm.cdf(zeta / scale))
    value = torch.zeros((), dtype=torch.float64)
    for i in range(a.shape[0]):
        for p in range(a.shape[1]):
            value = value + a[i, p] * math.cos(math.pi * i * level) * u**p
    return value


def euler(a: Tensor, zeta: float, scale: float, steps: int) -> float:
    for step in range(steps):
        zeta = zeta + field(a, zeta, step / steps, scale).item() / steps
    return zeta


def at_zero_held(a: Tensor) -> Tensor:
    """a (I, P) whose field at u = 0 passes no gradient."""
    return torch.cat([a[:, :1].detach(), a[:, 1:]], 1)


def field_terms(a: Tensor, token: dict[str, Tensor], *, scale: float, calibrated: bool) -> dict[str, Tensor]:
    """anchor, straightness and flow_matching of one token: a (I, P), targets of that token (K,) or scalars, float64."""
    count = token["targets"].shape[0]
    terms = {name: torch.zeros((), dtype=torch.float64) for name in ("anchor", "straightness", "flow_matching")}
    u = token["time"].item()
    for k in range(count):
        eps = noise(k, count, scale)
        start = field(a, eps, 0.0, scale)
        goal = (token["anchor"] if calibrated else token["targets"])[k].item() - eps
        end = (token["old"] if calibrated else token["targets"])[k].item()
        v = field(at_zero_held(a) if calibrated else a, (1 - u) * eps + u * end, u, scale)
        terms["anchor"] = terms["anchor"] + (v - goal) ** 2 / count
        if calibrated:
            terms["anchor"] = terms["anchor"] + (start - goal) ** 2 / count
        terms["straightness"] = terms["straightness"] + (v - start.detach()) ** 2 / count
        velocity = token["next_velocity"][k].item()
        gamma = token["next_discount"].item()
        here = token["next_reward"].item() + gamma * eps + u * velocity
        miss = (field(a, here, u, scale) - velocity) ** 2
        terms["flow_matching"] = terms["flow_matching"] + token["next_weight"].item() * miss / count
    return terms
