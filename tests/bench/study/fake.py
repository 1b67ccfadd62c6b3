# SPDX-License-Identifier: Apache-2.0
"""A trainer that takes no time: scores are a function of algorithm, noise and seed, so that a repeated run repeats."""

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from verl_dvpo.bench.study.config import Study, parse_study
from verl_dvpo.bench.study.plan import Run


def study_of(out: Path, **fields: Any) -> Study:
    content = {
        "name": "small",
        "out": str(out),
        "algorithms": ["ppo", "dvpo"],
        "noises": ["none", {"kind": "flip", "rate": 0.3}],
        "tasks": [{"name": "demo", "in_domain": ["demo_addition"]}],
        "seeds": [0, 1],
        "steps": 4,
        "test_freq": 2,
    }
    return parse_study(content | fields)


def score_of(config: DictConfig, step: int, source: str = "demo_addition") -> float:
    mean = 0.4 + 0.1 * step / config.trainer.total_training_steps
    mean += 0.2 * (config.algorithm.adv_estimator == "dvpo") - 0.1 * (config.noise.kind == "flip")
    return round(mean + 0.01 * config.data.seed - 0.15 * (source != "demo_addition"), 6)


class FakeTrainer:
    """Writes records as verl does, and may die on the way.

    Args:
        kill_at: (number of the call from 1, step) at which it is interrupted as by Ctrl-C.
        fail: names of runs that raise.
        sources: data sources of the validation.
    """

    def __init__(
        self,
        kill_at: tuple[int, int] | None = None,
        fail: tuple[str, ...] = (),
        sources: tuple[str, ...] = ("demo_addition",),
    ):
        self.kill_at, self.fail, self.sources = kill_at, fail, sources
        self.calls: list[str] = []

    def __call__(self, config: DictConfig, metrics: Path) -> None:
        name = config.trainer.experiment_name
        self.calls.append(name)
        print(f"output of {name}")
        for step in range(config.trainer.total_training_steps + 1):
            if self.kill_at == (len(self.calls), step):
                raise KeyboardInterrupt
            if name in self.fail and step == 1:
                raise RuntimeError(f"the critic of {name} exploded")
            data: dict[str, float] = {"critic/score/mean": 0.1} if step else {}
            if step % config.trainer.test_freq == 0:
                for source in self.sources:
                    data[f"val-core/{source}/acc/mean@1"] = score_of(config, step, source)
                    data[f"val-aux/{source}/reward/mean@1"] = 9.0
            with open(metrics, "a") as file:
                file.write(json.dumps({"step": step, "data": data}) + "\n")


def folders(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "runs").iterdir())


def texts(report: Path) -> dict[str, bytes]:
    """What a report says, without what depends on when it was made."""
    return {path.name: path.read_bytes() for path in sorted(report.iterdir()) if path.name != "runs.csv"}


def names(runs: list[Run]) -> list[str]:
    return [run.name for run in runs]
