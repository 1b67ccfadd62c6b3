# SPDX-License-Identifier: Apache-2.0
"""Trains each value family for a moment on a task with a known answer; pure torch, no verl.

Three states, one token each; a state's reward is 0 or 1, with a probability of its own. What a critic should learn is
that probability. An update goes the way the critic's worker goes: keep, build_targets, multipliers, loss.

Shapes: S states, B tokens of each, D outputs of the head.
"""

import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from verl_dvpo.families.base import ValueFamily
from verl_dvpo.families.registry import build_family, family_names, family_settings

#: The expected reward of each state.
TRUTH = (0.2, 0.5, 0.9)
#: B, Adam's step, and how many updates at most.
TOKENS, RATE, UPDATES = 64, 0.02, 300
#: Seconds after which training ends, but not before LEAST updates: on a slow machine fewer updates are enough.
SECONDS, LEAST = 2.0, 100


def learn(family: ValueFamily, *, updates: int = UPDATES, seconds: float = SECONDS, seed: int = 0) -> dict[str, Any]:
    """Trains one family with Adam on a table (S, D).

    Returns:
        ``first`` and ``last``, the mean distance of the values from the truth before and after; ``updates``,
        ``seconds``, and ``finite``, whether every value is a number.
    """
    generator, started = torch.Generator().manual_seed(seed), time.monotonic()
    torch.manual_seed(seed)  # for families whose loss draws
    truth = torch.tensor(TRUTH)
    weight, bias = torch.zeros(family.num_outputs, 1), torch.zeros(family.num_outputs)
    family.init_head(weight, bias, generator)
    table = bias.expand(len(TRUTH), -1).clone().requires_grad_()
    optimiser = torch.optim.Adam([table], lr=RATE)
    mask = torch.ones(len(TRUTH) * TOKENS, 1)
    extra = {"prompts": torch.arange(len(TRUTH) * TOKENS)} if family.sees_prompts else {}
    first, done = _distance(family, table, truth), 0
    for done in range(1, updates + 1):
        drawn = torch.rand(len(TRUTH), TOKENS, generator=generator)
        rewards = (drawn < truth[:, None]).float().reshape(-1, 1)
        outputs = table.repeat_interleave(TOKENS, 0)
        kept = family.keep(outputs.detach())[:, None]
        built = family.build_targets(kept, rewards, mask, gamma=1.0, lam=1.0, generator=generator, **extra)
        targets = {name: tensor.squeeze(1) for name, tensor in built.items()}
        loss = family.loss(outputs, targets, family.multipliers(targets, mask.squeeze(1)))
        optimiser.zero_grad()
        loss.total.mean().backward()
        optimiser.step()
        if done >= LEAST and time.monotonic() - started > seconds:
            break
    finite = bool(table.isfinite().all())
    last = _distance(family, table, truth) if finite else first
    return {"first": first, "last": last, "updates": done, "seconds": time.monotonic() - started, "finite": finite}


@torch.no_grad()
def _distance(family: ValueFamily, table: torch.Tensor, truth: torch.Tensor) -> float:
    return float((family.value(table) - truth).abs().mean())


def learn_all(names: Iterable[str] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Trains each family at its default settings; one that raises has an ``error``."""
    torch.set_num_threads(1)
    for name in family_names() if names is None else names:
        try:
            yield name, learn(build_family(family_settings(name)))
        except Exception as error:  # whatever a family raises
            yield name, {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
