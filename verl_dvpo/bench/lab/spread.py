# SPDX-License-Identifier: Apache-2.0
"""Computes the spread of each target kind at its fixed point, without fitting error (docs/method.md, section 3).

One table entry of M quantiles per state; the targets of many sequences are pooled per state, their empirical quantiles
at the midpoints become the new entries, and so on. A state's targets depend on later states only, so T rounds reach
the fixed point.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from verl_dvpo.distributional import distributional_gae, sample_replacement_returns

from .process import Array, TokenProcess

LAMBDAS = (0.0, 0.5, 0.95, 1.0)
KINDS = ("quantile_gae", "sample_replacement")


def fixed_point(
    process: TokenProcess, kind: str, lam: float, *, seed: int, batch: int = 2000, num_quantiles: int = 50
) -> Array:
    """Returns the quantiles (S, M) at the fixed point of ``kind``, undiscounted, ``batch`` sequences a round."""
    rng = np.random.default_rng([seed, 2])
    generator = torch.Generator().manual_seed(seed)
    levels = (np.arange(num_quantiles) + 0.5) / num_quantiles
    table = torch.zeros(process.num_states, num_quantiles)
    for _ in range(process.length):
        states, clean = process.sample(batch, rng)
        rewards = torch.zeros(states.shape)
        rewards[:, -1] = torch.from_numpy(clean)
        quantiles, mask = table[torch.from_numpy(states)], torch.ones(states.shape)
        if kind == "quantile_gae":
            targets, _ = distributional_gae(rewards, quantiles, mask, gamma=1.0, lam=lam)
        else:
            targets = sample_replacement_returns(rewards, quantiles, mask, gamma=1.0, lam=lam, generator=generator)
        flat, pooled = states.ravel(), targets.flatten(0, 1).numpy()
        for state in np.unique(flat):
            # The smallest sample whose share reaches the level: reads atoms as atoms.
            table[state] = torch.from_numpy(
                np.quantile(pooled[flat == state], levels, method="inverted_cdf").astype(np.float32)
            )
    return table.double().numpy()


def spreads(process: TokenProcess, seeds: Sequence[int], *, batch: int = 2000) -> list[dict]:
    """Returns the start state's mean and standard deviation for each kind and λ, one number per seed, and the truth."""
    truth = process.truth()[0]
    mean = float(truth @ process.atoms)
    rows = []
    for kind in KINDS:
        for lam in LAMBDAS:
            start = np.stack([fixed_point(process, kind, lam, seed=seed, batch=batch)[0] for seed in seeds])
            rows.append(
                {
                    "kind": kind,
                    "lam": lam,
                    "mean": start.mean(-1).tolist(),
                    "std": start.std(-1).tolist(),
                    "true_mean": mean,
                    "true_std": float(np.sqrt(truth @ (process.atoms - mean) ** 2)),
                }
            )
    return rows
