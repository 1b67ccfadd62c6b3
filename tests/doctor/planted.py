# SPDX-License-Identifier: Apache-2.0
"""Runs made by hand: curves of a healthy critic, with problems planted in them, in the files that verl writes."""

import json
import os
from pathlib import Path

import numpy as np

from verl_dvpo.doctor.lines import Line
from verl_dvpo.doctor.run import diagnose

STEPS = 40
DOTTED = r"[a-z_]+(?:\.[a-z_0-9]+)+"


def healthy(seed: int = 0) -> dict[str, np.ndarray]:
    """Curves of an ensemble of quantile heads that learns rewards of 0 and 1; figures as in runs of the studies."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=STEPS)
    learned = 1.0 - np.exp(-np.arange(STEPS) / 8.0)
    one, zero = np.ones(STEPS), np.zeros(STEPS)
    return {
        "critic/vf_explained_var": -0.5 + 0.9 * learned + 0.03 * noise,
        "critic/vf_loss": 0.16 - 0.1 * learned + 0.003 * noise,
        "critic/grad_norm": 0.1 + 0.01 * noise,
        "critic/lr": 1e-3 * one,
        "critic/rewards/min": zero,
        "critic/rewards/mean": 0.4 + 0.1 * learned,
        "critic/rewards/max": one,
        "critic/returns/min": zero,
        "critic/returns/max": one,
        "critic/values/min": 0.1 * learned,
        "critic/values/mean": 0.5 * learned,
        "critic/values/max": 0.8 * learned,
        "critic/quantile/spread": 0.005 + 0.2 * learned,
        "critic/quantile/crossing_fraction": 0.1 * learned,
        "critic/ensemble/std": 0.1 - 0.095 * learned,
        "critic/hl_gauss/out_of_support": zero,
        "critic/vf_clipfrac": 0.02 * one,
        "training/off_policy/trajectory_staleness/mean": zero,
        "perf/time_per_step": 3.0 * one,
    }


def write(folder: Path, curves: dict[str, np.ndarray], name: str = "metrics.jsonl") -> Path:
    """Writes curves as verl's file logger does, NaN as null; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    length = max(len(values) for values in curves.values())
    lines = []
    for step in range(length):
        found = {key: float(values[step]) for key, values in curves.items() if step < len(values)}
        data = {key: value if np.isfinite(value) else None for key, value in found.items()}
        lines.append(json.dumps({"step": step + 1, "data": data}))
    (folder / name).write_text("\n".join(lines) + "\n")
    os.utime(folder / name, (0, 0))  # long ago
    return folder


def line_of(path: Path, name: str) -> Line:
    """Judges a run and returns the line of one symptom."""
    _, lines = diagnose(path)
    (found,) = [line for line in lines if line.name == name]
    return found
