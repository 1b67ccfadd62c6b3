# SPDX-License-Identifier: Apache-2.0
"""Defines the lab's experiments, and executes the training runs that they need, each once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context

import numpy as np
import torch

from verl_dvpo.bench.common import Progress
from verl_dvpo.distributional import TERMS
from verl_dvpo.distributional.config import DEFAULT_COEF, LEVEL_TERMS

from .metrics import evaluate, true_samples
from .process import PROCESSES, bernoulli_walk
from .registry import BASES, FAMILIES, FORMS, KAPPAS, LOWERED, NUM_HEADS, NUM_QUANTILES, RISKS, SIZES, TARGETS, setup
from .spread import spreads
from .training import TrainConfig, train

#: (process, noise) -> name of the condition in the report.
CONDITIONS = {
    ("bernoulli", "clean"): "label, clean",
    ("bernoulli", "flip"): "label, 30 % flipped",
    ("skewed", "clean"): "score, clean",
    ("skewed", "heavy"): "score, heavy-tailed noise",
}
_ALL = tuple(CONDITIONS)
_CLEAN = (("bernoulli", "clean"), ("skewed", "clean"))
_CLEAN_AND_HEAVY = (*_CLEAN, ("skewed", "heavy"))
#: Shipped critic -> its coefficients: those of ``constraint_statistics: value`` (small) or ``level`` (levels).
SHIPPED = {"dvpo": "small", "dvpo_calibrated": "levels"}


@dataclass(frozen=True)
class Experiment:
    """One question, with the critics and conditions that answer it.

    Attributes:
        title: title of its section in the report.
        critics: names in the registry, in the order of the table's rows.
        conditions: (process, noise) pairs.
        baseline: whether errors of V are divided by that of the last ``quantile ...`` row above.
        longer: factor on the usual number of updates.
        seeds: largest number of seeds; 0 for all.
    """

    title: str
    critics: tuple[str, ...]
    conditions: tuple[tuple[str, str], ...]
    baseline: bool = False
    longer: int = 1
    seeds: int = 0

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Yields each critic with its baseline: the last ``quantile ...`` row at or above it."""
        reference = ""
        for critic in self.critics:
            reference = critic if critic.startswith("quantile ") else reference
            yield critic, reference


def _term_rows(base: str, shipped: str) -> tuple[str, ...]:
    return (
        f"quantile {base}",
        *(f"{base} + {term}" for term in TERMS),
        *(f"{base} + {term} {DEFAULT_COEF[term]:g}" for term in LOWERED),
        f"{base} + all",
        *(f"{base} + level {term}" for term in (*LEVEL_TERMS, "shape")),
        *(f"{base} + all, {kind}" for kind in ("small", "levels") if SHIPPED[shipped] != kind),
        shipped,
    )


EXPERIMENTS: dict[str, Experiment] = {
    "families": Experiment("Every family and target kind", tuple(FAMILIES), _ALL),
    "kappa": Experiment(
        "kappa and the levels, quantile loss alone, Eq 2 targets",
        tuple(f"{levels}, kappa {kappa:g}" for levels in ("right", "midpoint") for kappa in KAPPAS),
        _CLEAN,
    ),
    "terms": Experiment(
        "Each term, and what `dvpo_calibrated` ships, against the quantile loss alone: kappa 0, midpoints, sample "
        "replacement",
        _term_rows("sr", "dvpo_calibrated"),
        _CLEAN_AND_HEAVY,
        baseline=True,
    ),
    "terms_paper": Experiment(
        "Each term, and what `dvpo` ships, against the quantile loss alone: kappa 1, right levels, Eq 2",
        _term_rows("paper", "dvpo"),
        _CLEAN_AND_HEAVY,
        baseline=True,
    ),
    "forms": Experiment(
        "Forms of the constraints, each at 0.02, against the quantile loss alone",
        tuple(
            name
            for base in BASES
            for name in (
                f"quantile {base}",
                f"{base} + tail, mean",
                f"{base} + level, mean",
                f"{base} + level, signed",
            )
        ),
        _CLEAN_AND_HEAVY,
        baseline=True,
    ),
    "runaway": Experiment(
        "One-sided terms per token and per batch, every coefficient 0.1",
        tuple(
            f"{base} {mode}, {label} 0.1" for base in BASES for label in ("shift", "all") for mode in ("token", "batch")
        ),
        (("bernoulli", "clean"),),
    ),
    "long": Experiment(
        "Ten times the usual number of updates",
        ("quantile paper", "paper + all", "dvpo", "quantile sr", "sr + all", "dvpo_calibrated"),
        _CLEAN_AND_HEAVY,
        baseline=True,
        longer=10,
        seeds=3,
    ),
    "long_forms": Experiment(
        "Ten times the usual number of updates: one-sided, gated and signed levels",
        ("quantile sr", "sr + level, mean", "sr + level, gated", "sr + level, signed"),
        (("bernoulli", "clean"), ("skewed", "heavy")),
        longer=10,
        seeds=3,
    ),
    "long_runaway": Experiment(
        "Ten times the usual number of updates: one-sided terms per token and per batch",
        tuple(
            f"{base} {mode}, {label} 0.1"
            for base, label in (("paper", "shift"), ("eq2", "shift"), ("sr", "all"))
            for mode in ("token", "batch")
        ),
        _CLEAN,
        longer=10,
        seeds=3,
    ),
    "density": Experiment(
        "The number of levels, given and chosen on returns not yet trained on", tuple(SIZES), _CLEAN_AND_HEAVY
    ),
    "risk": Experiment(
        "The risk weight of the value, given and chosen on returns not yet trained on", tuple(RISKS), _ALL
    ),
    "search": Experiment(
        "Every form of the constraints that was tried",
        tuple(
            name
            for target in TARGETS
            for name in (
                f"quantile {target}",
                *(f"{target} + {statistic}, {average}" for statistic, average in FORMS),
                f"{target} + level x 5, signed",
            )
        ),
        (("skewed", "clean"), ("skewed", "heavy")),
        baseline=True,
    ),
}
#: Experiments that run only with ``--all`` or by name.
EXTRA = ("terms_paper", "long_forms", "long_runaway", "density", "risk", "search")
DEFAULT = ("spread", *(name for name in EXPERIMENTS if name not in EXTRA))


@dataclass(frozen=True)
class Job:
    """One training run of all seeds: the name of the critic, its condition, and its training."""

    critic: str
    process: str
    noise: str
    config: TrainConfig
    seeds: tuple[int, ...]

    @property
    def key(self) -> str:
        """The run's key in the JSON."""
        return run_key(self.critic, self.process, self.noise, self.config.updates)


def run_key(critic: str, process: str, noise: str, updates: int) -> str:
    """Returns the key of a run in the JSON."""
    return f"{critic}|{process}|{noise}|{updates}"


def jobs(names: Sequence[str], config: TrainConfig, seeds: Sequence[int]) -> Iterator[Job]:
    """Yields the training runs that the named experiments need, each once, the longest first."""
    found: dict[str, Job] = {}
    for experiment in sorted((EXPERIMENTS[name] for name in names), key=lambda e: -e.longer):
        chosen = tuple(seeds[: experiment.seeds or None])
        for process, noise in experiment.conditions:
            for critic in experiment.critics:
                lam = setup(critic).lam
                own = replace(config, updates=config.updates * experiment.longer)
                own = own if lam is None else replace(own, lam=lam)
                job = Job(critic, process, noise, own, chosen)
                found.setdefault(job.key, job)
    yield from found.values()


def run_job(job: Job) -> dict:
    """Trains one critic; returns its metrics, one number per seed, and the curve of the error of V, for the JSON."""
    torch.set_num_threads(1)
    build, process = setup(job.critic).build, PROCESSES[job.process]()
    # A family that chooses in training makes one choice for all of its runs, so each seed gets its own.
    groups = [[seed] for seed in job.seeds] if build().state() else [list(job.seeds)]
    parts = [train(build(), process, noise=job.noise, seeds=group, config=job.config) for group in groups]
    names = parts[0].metrics
    chosen = [part.chosen for part in parts if part.chosen]
    return {
        "metrics": {name: np.concatenate([part.metrics[name] for part in parts]).tolist() for name in names},
        "at": parts[0].at,
        "curve": np.concatenate([part.curve for part in parts], 1).T.tolist(),
    } | ({"chosen": chosen} if chosen else {})


def run_spread(seeds: Sequence[int]) -> list[dict]:
    """Computes the fixed points of docs/method.md, section 3, on the label process."""
    torch.set_num_threads(1)
    return spreads(bernoulli_walk(), seeds)


def truth_row(process: str) -> dict[str, float]:
    """Returns the metrics of the exact quantiles at M midpoints: the best that M points can do."""
    clean = PROCESSES[process]()
    return {name: float(v[0]) for name, v in evaluate(true_samples(clean, NUM_QUANTILES), clean).items()}


def run(
    names: Sequence[str],
    config: TrainConfig,
    seeds: Sequence[int],
    *,
    workers: int | None = None,
    done: dict | None = None,
    save: Callable[[dict], None] | None = None,
    quiet: bool = False,
) -> dict:
    """Runs the named experiments and returns what the report reads, ready for JSON.

    Args:
        names: keys of ``EXPERIMENTS``, or ``spread``.
        config: training of each critic.
        seeds: seeds of each run.
        workers: processes of one thread each; None for one per CPU.
        done: an earlier result with the same config and seeds; its runs are kept.
        save: called with the result so far after each run, so that an interrupted lab can resume.
        quiet: shows no progress.

    Raises:
        ValueError: an experiment is unknown, there are fewer than 2 seeds, or ``done`` has other settings.
    """
    _check_names(names, seeds)
    result: dict = {
        "meta": {
            "experiments": list(names),
            "seeds": list(seeds),
            "config": asdict(config),
            "num_quantiles": NUM_QUANTILES,
            "num_heads": NUM_HEADS,
        },
        "truth": {process: truth_row(process) for process in PROCESSES},
        "runs": {} if done is None else dict(done["runs"]),
        "spread": [],
    }
    if done is not None:
        _check_same(done["meta"], result["meta"])
    wanted = jobs([name for name in names if name != "spread"], config, seeds)
    todo = [job for job in wanted if job.key not in result["runs"]]
    with ProcessPoolExecutor(workers or os.cpu_count(), mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(run_job, job): job.key for job in todo}
        fixed = pool.submit(run_spread, tuple(seeds)) if "spread" in names else None
        with Progress(len(todo), unit="run", quiet=quiet) as progress:
            for number, future in enumerate(as_completed(waiting), start=1):
                result["runs"][waiting[future]] = future.result()
                if save is not None:
                    save(result)
                progress.update(number, waiting[future])
        if fixed is not None:
            result["spread"] = fixed.result()
    return result


def _check_names(names: Sequence[str], seeds: Sequence[int]) -> None:
    unknown = sorted(set(names) - set(EXPERIMENTS) - {"spread"})
    if unknown:
        raise ValueError(f"experiments is {unknown}; allowed are spread, {', '.join(EXPERIMENTS)}; choose some of them")
    if len(seeds) < 2:
        raise ValueError(f"seeds is {list(seeds)}; an interval needs at least 2; add some")


def _check_same(before: dict, now: dict) -> None:
    for name in ("seeds", "config", "num_quantiles", "num_heads"):
        if before[name] != now[name]:
            raise ValueError(
                f"{name} is {now[name]}; the runs to resume have {before[name]}; use theirs, or another folder"
            )
