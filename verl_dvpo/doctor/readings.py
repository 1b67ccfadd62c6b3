# SPDX-License-Identifier: Apache-2.0
"""Reads what a run has left: metrics as JSON lines or TensorBoard files, its length and its checkpoints."""

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from verl_dvpo.records import read_metrics

EVENTS = "events.out.tfevents*"
#: Where a run's configuration may lie: in a study's run, in the demo's, in Hydra's own folder.
CONFIGS = ("config.yaml", "hydra/.hydra/config.yaml", ".hydra/config.yaml")
#: A file that has not changed for so many steps of its run is no longer written to.
SILENCE = 5


@dataclass(frozen=True)
class Curve:
    """One metric over steps.

    Attributes:
        steps: (S,) ascending, those at which it was logged.
        values: (S,) NaN where NaN or infinity was logged.
    """

    steps: NDArray[np.int64]
    values: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.steps)

    def last(self, share: float) -> "Curve":
        """Returns the last ``share`` of it, at least one value."""
        start = min(len(self) - 1, int(len(self) * (1 - share)))
        return Curve(self.steps[start:], self.values[start:])

    def first(self, share: float) -> "Curve":
        """Returns the first ``share`` of it, at least one value."""
        end = max(1, round(len(self) * share))
        return Curve(self.steps[:end], self.values[:end])

    @property
    def median(self) -> float:
        """The median of what is finite; NaN where nothing is."""
        finite = self.values[np.isfinite(self.values)]
        return float(np.median(finite)) if finite.size else float("nan")


@dataclass(frozen=True)
class Run:
    """A run as it was read from its folder.

    Attributes:
        path: as it was given.
        source: the file or folder of its metrics; None where only checkpoints are left.
        curves: metric -> curve.
        total: the steps that it was to make; None if unknown.
        state: ``finished``, ``unfinished`` or ``unknown``.
        settings: its configuration as plain values; empty if unknown.
    """

    path: Path
    source: Path | None
    curves: Mapping[str, Curve]
    total: int | None = None
    state: str = "unknown"
    settings: Mapping[str, Any] = field(default_factory=dict)

    def curve(self, name: str) -> Curve | None:
        """Returns a metric's curve; None if it was never logged."""
        return self.curves.get(name)

    @property
    def last_step(self) -> int:
        """The last step of any metric; 0 where there is none."""
        return max((int(curve.steps[-1]) for curve in self.curves.values()), default=0)

    def setting(self, name: str) -> Any:
        """Looks a dotted name up in the run's configuration; None where it is unknown."""
        found: Any = self.settings
        for part in name.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        return found


def read_run(path: Path) -> Run:
    """Reads a run.

    Args:
        path: its folder, a file of verl's ``file`` logger, a TensorBoard file, or a folder of checkpoints.

    Raises:
        ValueError: there is nothing at ``path``, no metrics and no checkpoints in it, several runs, or a broken line.
    """
    if not path.exists():
        raise ValueError(f"run is '{path}'; a folder or file that exists is allowed; give a run's folder")
    source = _source(path)
    folder = path if path.is_dir() else path.parent
    settings = _settings(folder)
    if source is None:
        return Run(path, None, {}, settings=settings)
    records = read_metrics(source) if source.suffix == ".jsonl" else _read_events(source)
    curves = _curves(records)
    if not curves:
        raise ValueError(f"run is '{path}'; {source} holds no finished step yet; wait for the first")
    total = _total(settings)
    run = Run(path, source, curves, total=total, settings=settings)
    return Run(path, source, curves, total=total, settings=settings, state=_state(run, folder))


def _source(path: Path) -> Path | None:
    """Finds the metrics; None where there are checkpoints alone."""
    if path.is_file():
        if path.suffix != ".jsonl" and "tfevents" not in path.name:
            raise ValueError(f"run is '{path}'; a file of metrics is *.jsonl or {EVENTS}; give one of those")
        return path
    if (path / "metrics.jsonl").is_file():
        return path / "metrics.jsonl"
    lines = sorted(path.glob("*.jsonl"))
    if len(lines) == 1:
        return lines[0]
    events = sorted({file.parent for file in path.rglob(EVENTS)})
    if len(events) == 1 and not lines:
        return events[0]
    inside = sorted({file.parent for file in path.glob("*/**/metrics.jsonl")})
    several = [str(found.relative_to(path)) for found in (lines or inside or events)]
    if several:
        shown = ", ".join(several[:4]) + (", ..." if len(several) > 4 else "")
        raise ValueError(f"run is '{path}'; the folder of one run is allowed, and it holds {shown}; give one of them")
    if has_checkpoints(path):
        return None
    raise ValueError(
        f"run is '{path}'; a folder with metrics.jsonl, another *.jsonl of verl's file logger, TensorBoard's files or "
        "checkpoints is allowed, and it has none; run with trainer.logger='[console,file]'"
    )


def has_checkpoints(path: Path) -> bool:
    """Tells whether a folder is, or holds, a checkpoint of a critic."""
    return (path / "manifest.json").is_file() or bool(checkpoints(path))


def checkpoints(path: Path) -> list[Path]:
    """Lists the folders of a run's critic, the earliest step first."""
    folder = path if path.is_dir() else path.parent
    if (folder / "manifest.json").is_file():
        return [folder]
    found = [place for root in (folder, folder / "checkpoints") for place in root.glob("global_step_*/critic")]
    if (folder / "critic" / "manifest.json").is_file():
        found.append(folder / "critic")
    numbers = {place: place.parent.name.removeprefix("global_step_") for place in found}
    return sorted(found, key=lambda place: int(numbers[place]) if numbers[place].isdigit() else 0)


def _read_events(source: Path) -> list[dict[str, Any]]:
    """Reads the scalars of TensorBoard's files as records of verl's file logger."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError as error:
        raise ValueError(f"{source} is TensorBoard's, which is not installed; pip install tensorboard") from error
    events = EventAccumulator(str(source), size_guidance={"scalars": 0})
    events.Reload()
    return [
        {"step": event.step, "data": {name: event.value}}
        for name in events.Tags()["scalars"]
        for event in events.Scalars(name)
    ]


def _curves(records: Iterable[Mapping[str, Any]]) -> dict[str, Curve]:
    """Collects numbers by metric. verl writes NaN as null; of a step that was logged twice the later value counts."""
    found: dict[str, dict[int, float]] = {}
    for record in records:
        for name, value in record["data"].items():
            if value is None or isinstance(value, int | float):
                number = float("nan") if value is None else float(value)
                found.setdefault(name, {})[record["step"]] = number if np.isfinite(number) else float("nan")
    return {
        name: Curve(np.array(sorted(points)), np.array([points[step] for step in sorted(points)]))
        for name, points in found.items()
    }


def _settings(folder: Path) -> dict[str, Any]:
    import yaml

    for name in CONFIGS:
        if (folder / name).is_file():
            try:
                found = yaml.safe_load((folder / name).read_text())
            except (OSError, yaml.YAMLError):
                continue
            return found if isinstance(found, dict) else {}
    return {}


def _total(settings: Mapping[str, Any]) -> int | None:
    total = (settings.get("trainer") or {}).get("total_training_steps")
    return total if isinstance(total, int) else None


def _state(run: Run, folder: Path) -> str:
    """Judges whether the run has ended: by its steps, what a study wrote of it, or how long it has been silent."""
    if run.total is not None:
        return "finished" if run.last_step >= run.total else "unfinished"
    if (folder / "run.json").is_file():
        try:
            status = json.loads((folder / "run.json").read_text()).get("status")
        except (OSError, ValueError, AttributeError):
            status = None
        if status:
            return "finished" if status == "finished" else "unfinished"
    seconds = run.curve("perf/time_per_step")
    if run.source is None or seconds is None or not run.source.is_file():
        return "unknown"
    quiet = time.time() - run.source.stat().st_mtime
    return "unfinished" if quiet < SILENCE * seconds.median else "unknown"
