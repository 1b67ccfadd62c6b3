# SPDX-License-Identifier: Apache-2.0
"""Measures how strongly each term of the shipped DVPO losses acts while a critic learns.

    python benchmarks/term_shares.py

The process is that of docs/method.md, section 3: 9 fair ±1 steps and a reward of 1 if the walk ends above 0; the critic
is a table with N = 3 heads of M quantiles per state. Each update samples walks, builds targets and multipliers once and
takes two Adam steps. The first two shares are ratios of sums over the steps of each half of the run: coef·|term| to the
``quantile`` term, and the norm of the term's gradient in the table (coefficient included) to that of the ``quantile``
term. The third is what training logs as ``critic/share/<term>``, a mean over steps: the norm of the gradient at the
head's outputs to the sum of all terms' norms.

Shapes: B walks, T steps, N heads, M quantiles.
"""

import argparse
from collections import defaultdict

import torch
from torch import Tensor

from verl_dvpo.critic.shares import TermShares
from verl_dvpo.distributional import (
    TERMS,
    DVPOLossConfig,
    constraint_multipliers,
    distributional_gae,
    dvpo_loss,
    quantile_levels,
    sample_replacement_returns,
)
from verl_dvpo.families.base import FamilyLoss

STEPS, HEADS, LAM = 9, 3, 0.95

#: ``algorithm=`` -> levels, target and loss, as shipped.
SHIPPED = {
    "dvpo": ("right", "quantile_gae", DVPOLossConfig()),
    "dvpo_calibrated": (
        "midpoint",
        "sample_replacement",
        DVPOLossConfig(kappa=0.0, constraint_statistics="level"),
    ),
}


def walks(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Samples walks: the table's row of each state (B, T), and rewards (B, T)."""
    moves = 2 * torch.randint(2, (size, STEPS), generator=generator) - 1
    places = moves.cumsum(-1)
    before = torch.cat([torch.zeros_like(places[:, :1]), places[:, :-1]], -1)
    rewards = torch.zeros(size, STEPS)
    rewards[:, -1] = (places[:, -1] > 0).float()
    return torch.arange(STEPS) * (2 * STEPS + 1) + before + STEPS, rewards


def train(algorithm: str, *, quantiles: int, updates: int, batch: int, seed: int) -> dict[str, Tensor]:
    """Trains one critic; term -> (2, 3) sums over each half of the run.

    The three are the term's size, the norm of its gradient in the table, and its share of the gradient at the outputs.
    """
    kind, target, config = SHIPPED[algorithm]
    generator = torch.Generator().manual_seed(seed)
    levels = quantile_levels(quantiles, kind)
    table = torch.randn(STEPS * (2 * STEPS + 1), HEADS, 1, generator=generator) * 0.1
    table = (table + torch.linspace(-0.01, 0.01, quantiles)).requires_grad_()
    optimizer = torch.optim.Adam([table], lr=0.01)
    found: dict[str, Tensor] = defaultdict(lambda: torch.zeros(2, 3, dtype=torch.float64))
    for update in range(updates):
        states, rewards = walks(batch, generator)
        mask = torch.ones_like(rewards)
        old = table.detach()[states].mean(-2).sort(-1).values
        if target == "quantile_gae":
            z, _ = distributional_gae(rewards, old, mask, gamma=1.0, lam=LAM)
        else:
            z = sample_replacement_returns(rewards, old, mask, gamma=1.0, lam=LAM, generator=generator)
        multipliers = constraint_multipliers(old, z, mask, levels, config)

        def loss_of(outputs: Tensor) -> FamilyLoss:
            found = dvpo_loss(outputs, z, levels, config, multipliers)  # noqa: B023 (used within this update)
            return FamilyLoss(found.total, found.terms, {name: config.coef.get(name, 1.0) for name in found.terms})

        for _ in range(2):
            loss, shares = loss_of(table[states]), TermShares()
            shares.add(table[states], loss_of, torch.Tensor.mean)
            share = shares.shares()
            for name, term in loss.terms.items():
                weighted = config.coef.get(name, 1.0) * term.mean()
                (gradient,) = torch.autograd.grad(weighted, table, retain_graph=True)
                found[name][2 * update // updates] += torch.tensor(
                    [weighted.detach().abs(), gradient.norm(), share[name] / updates]
                )
            optimizer.zero_grad()
            loss.total.mean().backward()
            optimizer.step()
    return dict(found)


def main() -> None:
    """Prints a table for each algorithm, the mean over seeds."""
    parser = argparse.ArgumentParser(description="Measure the share of each DVPO term in the loss and its gradient.")
    parser.add_argument("--updates", type=int, default=200, help="updates of the critic (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="walks an update (default: %(default)s)")
    parser.add_argument("--quantiles", type=int, default=200, help="M (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=4, help="runs of each algorithm (default: %(default)s)")
    options = parser.parse_args()
    print(
        "| `algorithm=` | term | loss, first half | loss, second half | gradient, first half | gradient, second half "
        "| `critic/share`, first half | `critic/share`, second half |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for algorithm in SHIPPED:
        runs = [
            train(algorithm, quantiles=options.quantiles, updates=options.updates, batch=options.batch, seed=seed)
            for seed in range(options.seeds)
        ]
        for name in ("quantile", *TERMS):
            if name in runs[0]:
                total = 100 * sum(run[name] for run in runs)
                share = total / sum(run["quantile"] for run in runs)
                cells = [f"{value:.3f} %" for value in (*share[:, 0], *share[:, 1], *total[:, 2] / len(runs))]
                print(f"| `{algorithm}` | `{name}` | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
