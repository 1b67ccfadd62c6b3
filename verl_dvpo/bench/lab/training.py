# SPDX-License-Identifier: Apache-2.0
"""Trains a value family on the token process as the critic worker does, several seeds at once.

One update: sample B sequences, keep the old critic's distribution of each token, build targets and multipliers once,
then one optimiser step on each of a few mini-batches. The seeds share nothing but the kernels: each has its own
sequences, weights, multipliers and optimiser state, and a run of one seed gives the same numbers.

Shapes: R runs (seeds), B sequences, T tokens, S states, F features, D outputs, L = R·B·T tokens of all runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from verl_dvpo.distributional import quantile_levels
from verl_dvpo.families.base import SampledFamily, ValueFamily

from .metrics import evaluate
from .process import Array, TokenProcess, corrupt


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a critic's training.

    Attributes:
        updates: critic updates, each on fresh sequences.
        batch: B sequences of an update.
        mini_batches: optimiser steps of an update; divides ``batch``.
        learning_rate: Adam's, constant.
        gamma: discount in [0, 1].
        lam: trace λ in [0, 1] of the critic's targets.
        model: ``table``, the head on one-hot states, so that every state's outputs are free; or ``mlp``, a shared tanh
            network of two layers under the same head.
        points: number of times that the error is recorded.
    """

    updates: int = 200
    batch: int = 32
    mini_batches: int = 2
    learning_rate: float = 0.01
    gamma: float = 1.0
    lam: float = 0.95
    model: str = "table"
    points: int = 30

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise ValueError(f"model is {self.model!r}; allowed are {', '.join(MODELS)}; choose one of them")
        if self.updates < 1 or self.batch < 1 or self.batch % max(self.mini_batches, 1) or self.mini_batches < 1:
            raise ValueError(
                f"updates {self.updates}, batch {self.batch}, mini_batches {self.mini_batches}: all must be at least 1 "
                "and mini_batches must divide batch"
            )


@dataclass
class Trained:
    """Result of training.

    Attributes:
        metrics: metric name -> (R,).
        at: updates after which ``curve`` was recorded.
        curve: (P, R) the error of V after ``at`` updates.
        samples: (R, S, K) points of each state's value, ascending.
        chosen: what a family that chooses in training had chosen after each of ``at``; empty for others.
    """

    metrics: dict[str, Array]
    at: list[int]
    curve: Array
    samples: Array = field(repr=False)
    chosen: list[dict[str, float]] = field(default_factory=list)


class _Table(torch.nn.Module):
    """Outputs (R, S, D) of each run's head on one-hot states of root mean square 1, with the bias folded in."""

    def __init__(self, family: ValueFamily, process: TokenProcess, seeds: Sequence[int]) -> None:
        super().__init__()
        weight, bias = _heads(family, process.num_states, seeds)
        self.outputs = torch.nn.Parameter((weight * process.num_states**0.5).transpose(1, 2) + bias[:, None])

    def forward(self) -> Tensor:
        return self.outputs


class _Mlp(torch.nn.Module):
    """Outputs (R, S, D) of each run's head on a network of width H that all states share."""

    HIDDEN = 64

    def __init__(self, family: ValueFamily, process: TokenProcess, seeds: Sequence[int]) -> None:
        super().__init__()
        t = np.concatenate([np.full(i + 1, i) for i in range(process.length)])
        x = np.concatenate([2 * np.arange(i + 1) - i for i in range(process.length)])
        remaining = process.length - t
        columns = [np.ones_like(t), t / process.length, x / 3, x / np.sqrt(remaining), 1 / remaining]
        self.register_buffer("features", torch.tensor(np.stack(columns, 1), dtype=torch.float32))
        sizes = [(len(columns), self.HIDDEN), (self.HIDDEN, self.HIDDEN)]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.layers = torch.nn.ParameterList(
            torch.stack([torch.randn(n, m, generator=g) * n**-0.5 for g in generators]) for n, m in sizes
        )
        weight, bias = _heads(family, self.HIDDEN, seeds)
        self.weight, self.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)

    def forward(self) -> Tensor:
        hidden = self.get_buffer("features").expand(self.weight.shape[0], -1, -1)
        for weight in self.layers:
            hidden = torch.tanh(hidden @ weight)
        return hidden @ self.weight.transpose(1, 2) + self.bias[:, None]


MODELS: dict[str, type[_Table] | type[_Mlp]] = {"table": _Table, "mlp": _Mlp}


@torch.no_grad()
def _heads(family: ValueFamily, width: int, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Draws initial weights (R, D, width) and biases (R, D) as the critic's head does."""
    weights = torch.empty(len(seeds), family.num_outputs, width)
    biases = torch.zeros(len(seeds), family.num_outputs)
    for weight, bias, seed in zip(weights, biases, seeds, strict=True):
        family.init_head(weight, bias, torch.Generator().manual_seed(seed))
    return weights, biases


def train(
    family: ValueFamily,
    process: TokenProcess,
    *,
    noise: str = "clean",
    seeds: Sequence[int],
    config: TrainConfig,
    progress: Callable[[], None] | None = None,
) -> Trained:
    """Trains one family, R = len(seeds) runs at once.

    Args:
        family: the critic.
        process: source of the sequences.
        noise: corruption of the rewards, one of ``process.NOISES``.
        seeds: one run each. The sequences of a seed are the same for every family.
        config: settings of the training.
        progress: called after each recorded point.
    """
    torch.manual_seed(seeds[0])  # for families whose loss draws
    model = MODELS[config.model](family, process, seeds)
    optimiser = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    streams = [np.random.default_rng([seed, 1]) for seed in seeds]
    generator = torch.Generator().manual_seed(seeds[0])
    clean = torch.from_numpy(process.truth() @ process.atoms)
    weight = torch.from_numpy(process.visits())
    record = sorted({round(i) for i in np.linspace(0, config.updates, config.points + 1)[1:]})
    at, curve, chosen = [], [], []
    for update in range(1, config.updates + 1):
        states, rewards = _rollout(process, noise, streams, config.batch)
        choice = _update(family, model, optimiser, states, rewards, config, generator)
        if update in record:
            values = _values(family, model().detach())
            at.append(update)
            if choice:
                chosen.append(choice)
            curve.append(((values - clean).square() @ weight).sqrt().numpy())
            if progress:
                progress()
    samples = points(family, model().detach()).double().numpy()
    metrics = evaluate(samples, process, noise, values=_values(family, model().detach()).numpy())
    return Trained(metrics, at, np.stack(curve), samples, chosen)


def _values(family: ValueFamily, outputs: Tensor) -> Tensor:
    """(..., D) -> (...): the value that the actor sees; of a family without samples the mean of its points."""
    sampled = isinstance(family, SampledFamily)
    return family.value(outputs).double() if sampled else points(family, outputs).double().mean(-1)


def points(family: ValueFamily, outputs: Tensor) -> Tensor:
    """(..., D) -> (..., K): equally weighted points of Z(s), ascending; of a family without samples 200 quantiles."""
    if isinstance(family, SampledFamily):
        return family.samples(outputs)
    return family.quantiles(outputs, quantile_levels(200, "midpoint"))


def _rollout(
    process: TokenProcess, noise: str, streams: Sequence[np.random.Generator], batch: int
) -> tuple[Tensor, Tensor]:
    """Draws states (R, B, T) and rewards per token (R, B, T), which are 0 but at the last token."""
    all_states, all_rewards = [], []
    for stream in streams:
        visited, clean = process.sample(batch, stream)
        all_states.append(visited)
        all_rewards.append(corrupt(clean, noise, process.atoms, stream))
    states = torch.from_numpy(np.stack(all_states))
    rewards = torch.zeros(states.shape)
    rewards[:, :, -1] = torch.from_numpy(np.stack(all_rewards))
    return states, rewards


def _update(
    family: ValueFamily,
    model: _Table | _Mlp,
    optimiser: torch.optim.Optimizer,
    states: Tensor,
    rewards: Tensor,
    config: TrainConfig,
    generator: torch.Generator,
) -> dict[str, float]:
    runs, batch, length = states.shape
    row = torch.arange(runs)[:, None, None]
    with torch.no_grad():
        kept = family.keep(model())[row, states]
        targets = family.build_targets(
            kept.flatten(0, 1),
            rewards.flatten(0, 1),
            torch.ones(runs * batch, length),
            gamma=config.gamma,
            lam=config.lam,
            generator=generator,
        )
        per_run = {name: value.unflatten(0, (runs, batch)) for name, value in targets.items()}
        multipliers = _multipliers(family, per_run)
        flat = {name: value.flatten(0, 1) for name, value in targets.items()}
        scores = {name: float(score.mean()) for name, score in family.target_statistics(flat).items()}
    size = batch // config.mini_batches
    for start in range(0, batch, size):
        cut = slice(start, start + size)
        outputs = model()[row, states[:, cut]].flatten(0, 2)
        part = {name: value[:, cut].flatten(0, 2) for name, value in per_run.items()}
        # A multiplier per token stands for a scalar per run.
        spread = {name: value.repeat_interleave(size * length) for name, value in multipliers.items()}
        total = family.loss(outputs, part, spread).total
        optimiser.zero_grad()
        (total.sum() / (size * length)).backward()
        optimiser.step()
    return family.adapt(scores)


def _multipliers(family: ValueFamily, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the multipliers of each run: name -> (R,)."""
    per_run = []
    for run in range(next(iter(targets.values())).shape[0]):
        mine = {name: value[run].flatten(0, 1) for name, value in targets.items()}
        tokens = next(iter(mine.values())).shape[0]
        per_run.append(family.multipliers(mine, torch.ones(tokens)))
    return {name: torch.stack([m[name] for m in per_run]) for name in per_run[0]}
