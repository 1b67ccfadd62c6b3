# SPDX-License-Identifier: Apache-2.0
"""A small study with hypotheses, and records of its runs with scores that a test chooses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from fake import study_of

from verl_dvpo.bench.study.config import Study
from verl_dvpo.bench.study.plan import Run, plan


def contrast_of(**fields: Any) -> dict[str, Any]:
    return {
        "name": "dvpo_over_ppo",
        "sentence": "dvpo scores above ppo.",
        "primary": True,
        "treatment": "dvpo",
        "control": "ppo",
        "noises": ["flip_0.3"],
        "tasks": ["demo"],
        "direction": "higher",
        "bound": 0.02,
    } | fields


def hypotheses_of(*contrasts: dict[str, Any], **stopping: Any) -> dict[str, Any]:
    return {
        "stopping": {"min_seeds": 3, "max_seeds": 6} | stopping,
        "verdict": {"by": "interval"},
        "contrasts": list(contrasts or (contrast_of(),)),
    }


def registered(out: Path, *contrasts: dict[str, Any], stopping: dict[str, Any] | None = None, **fields: Any) -> Study:
    content = {"hypotheses": hypotheses_of(*contrasts, **(stopping or {})), "seeds": [4, 0, 1, 2, 3, 5]}
    return study_of(out, **(content | fields))


def written(folder: Path, hypotheses: dict[str, Any]) -> Path:
    path = folder / "small.hypotheses.yaml"
    path.write_text("# why: see the issue\n" + yaml.safe_dump(hypotheses, sort_keys=False))
    return path


def ended(score: float | None, seconds: float = 60.0) -> dict[str, Any]:
    return {"status": "failed" if score is None else "finished", "score": score, "wall_seconds": seconds}


def records(study: Study, score: Callable[[Run], float | None], seeds: int) -> dict[str, Any]:
    """Records of the runs of the first so many seeds."""
    first = study.seeds[:seeds]
    return {run.name: ended(score(run)) if run.seed in first else None for run in plan(study)}
