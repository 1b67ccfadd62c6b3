# SPDX-License-Identifier: Apache-2.0
"""Reads a sweep from the folder that Hydra wrote: what was swept, and how each run ended.

    <folder>/<run>/.hydra/overrides.yaml   what this run was told
                   .hydra/config.yaml      its configuration
                   metrics.jsonl           verl's metrics, one line a step

A run counts when it has done all its steps and was validated.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from verl_dvpo.records import last_score, read_metrics
from verl_dvpo.seeds import SEEDS

OVERRIDES = Path(".hydra", "overrides.yaml")
CONFIG = Path(".hydra", "config.yaml")
METRICS = "metrics.jsonl"
#: What a run that was not told has.
UNSET = "(unset)"

Value = float | str


@dataclass(frozen=True, kw_only=True)
class SweptRun:
    """One run of a sweep.

    Attributes:
        name: of its folder.
        point: what was swept, without seeds: field -> value.
        seed: what differs between the runs of a point: field -> value.
        step: the last that was logged, >= 0.
        score: mean over the data sources of the objective at the last validation; None if the run does not count.
        problem: the reason that it does not count; empty if it does.
    """

    name: str
    point: Mapping[str, Value]
    seed: Mapping[str, Value]
    step: int
    score: float | None
    problem: str = ""


def read_sweep(folder: Path) -> list[SweptRun]:
    """Reads all runs of a sweep, by number.

    Raises:
        ValueError: there is no sweep, or a file of it cannot be read.
    """
    folders = sorted((file.parents[1] for file in folder.glob(f"*/{OVERRIDES}")), key=_number)
    if not folders:
        raise ValueError(
            f"folder is '{folder}'; that of a sweep is allowed, with NUMBER/{OVERRIDES} in it; give hydra.sweep.dir, "
            "which is multirun/DATE/TIME by default"
        )
    told = {each: _overrides(each / OVERRIDES) for each in folders}
    swept = swept_fields(told.values())
    return [_read(each, {field: told[each].get(field, UNSET) for field in swept}) for each in folders]


def swept_fields(runs: Iterable[Mapping[str, Value]]) -> list[str]:
    """Lists the fields whose values differ between runs, in the order in which they were given."""
    runs = list(runs)
    order = dict.fromkeys(field for run in runs for field in run)
    return [field for field in order if len({run.get(field, UNSET) for run in runs}) > 1]


def is_seed(field: str) -> bool:
    """Tells whether a field is a seed: ``seed`` itself, one of those that it sets, or any whose name ends like it."""
    return field in ("seed", *SEEDS) or re.search(r"(^|[._])seed$", field) is not None


def shown(value: object) -> str:
    """Returns a value as people write it: 200 for 200.0."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _number(folder: Path) -> tuple[int, str]:
    return (int(folder.name) if folder.name.isdecimal() else -1, folder.name)


def _overrides(path: Path) -> dict[str, Value]:
    """Reads ``[+field=value, ...]`` as a mapping; a number becomes a float."""
    listed = _yaml(path)
    if not isinstance(listed, list) or not all(isinstance(each, str) for each in listed):
        raise ValueError(f"{path} holds a {type(listed).__name__}; a list of overrides is allowed; take a whole copy")
    found: dict[str, Value] = {}
    for text in listed:
        field, _, value = text.lstrip("+~").partition("=")
        found[field] = "(removed)" if text.startswith("~") else _value(value)
    return found


def _value(text: str) -> Value:
    try:
        return float(text)
    except ValueError:
        return text


def _yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read: {reason}; take a whole copy of its folder") from error


def _read(folder: Path, told: Mapping[str, Value]) -> SweptRun:
    config = _yaml(folder / CONFIG)
    if not isinstance(config, dict):
        raise ValueError(f"{folder / CONFIG} holds a {type(config).__name__}; a configuration is allowed")
    records = read_metrics(folder / METRICS)
    step = max((record["step"] for record in records), default=0)
    steps = (config.get("trainer") or {}).get("total_training_steps")
    problem, score = "", None
    if not records:
        problem = f"has no {METRICS}: it waits, runs its first step, or has failed"
    elif isinstance(steps, int) and step < steps:
        problem = f"is at step {step} of {steps}: it runs, or has failed"
    else:
        score = last_score(folder / METRICS, config.get("objective"))
        problem = "" if score is not None else "was never validated: trainer.test_freq is off"
    return SweptRun(
        name=folder.name,
        point={field: value for field, value in told.items() if not is_seed(field)},
        seed={field: value for field, value in told.items() if is_seed(field)},
        step=step,
        score=score,
        problem=problem,
    )
