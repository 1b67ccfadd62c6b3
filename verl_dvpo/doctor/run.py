# SPDX-License-Identifier: Apache-2.0
"""Judges the critic of one run, from its metrics and its checkpoints."""

from pathlib import Path

import verl_dvpo.doctor.distribution  # noqa: F401  (registers its symptoms)
from verl_dvpo.doctor import thresholds
from verl_dvpo.doctor.lines import Line, as_json, show, summary, worst
from verl_dvpo.doctor.readings import Run, has_checkpoints, read_run
from verl_dvpo.doctor.symptoms import EXPLAINED, LOSS, has_critic, judge

#: Where the run can have no verdict.
NO_CRITIC = "this run has no critic: neither critic/values/mean nor critic/vf_loss was logged"


def diagnose(path: Path) -> tuple[Run, list[Line]]:
    """Judges the critic of the run at ``path``.

    Returns:
        the run, and its findings, the worst first; none for a run without a critic.

    Raises:
        ValueError: there is no run that could be judged, see ``readings.read_run``.
    """
    run = read_run(path)
    lines = list(judge(run)) if has_critic(run) else []
    if has_checkpoints(path):
        from verl_dvpo.doctor.heads import judge_heads  # torch is imported for a checkpoint alone

        lines.extend(judge_heads(run))
    order = {"problem": 0, "warning": 1, "ok": 2}
    return run, sorted(lines, key=lambda line: order[line.state])


def report(run: Run, lines: list[Line]) -> str:
    """Writes the findings for a terminal, and the verdict last."""
    parts = [headline(run), *map(show, lines), verdict(run, lines)]
    return "\n".join(parts)


def headline(run: Run) -> str:
    """Says which run it is, how long, and whether it has ended."""
    if run.source is None:
        return f"{run.path}: no metrics, judged by its checkpoints alone"
    length = f"{run.last_step} of {run.total} steps" if run.total is not None else f"{run.last_step} steps"
    ended = {
        "finished": "finished",
        "unfinished": "unfinished: judged by what is there so far",
        "unknown": "whether it has finished is not known",
    }
    return f"{run.path}: {length}, {ended[run.state]}"


def verdict(run: Run, lines: list[Line]) -> str:
    """Says in one sentence what the findings come to; of a healthy critic with its figures."""
    if not lines:
        return NO_CRITIC
    unfinished = " so far" if run.state == "unfinished" else ""
    if worst(lines) == "problem":
        names = ", ".join(line.name for line in lines if line.state == "problem")
        return f"the critic is ill{unfinished}: {names} ({summary(lines)})"
    if worst(lines) == "warning":
        names = ", ".join(line.name for line in lines if line.state == "warning")
        return f"no problem{unfinished}, but look at {names} ({summary(lines)})"
    steps = max((len(curve) for curve in run.curves.values()), default=0)
    if run.source is not None and steps < thresholds.FEWEST_STEPS:
        return f"nothing wrong{unfinished}, but {steps} steps are too few for trends ({thresholds.FEWEST_STEPS} needed)"
    shown = {"explained variance": EXPLAINED, "value loss": LOSS}
    figures = [
        f"{name} {curve.last(thresholds.LATE).median:.3g}" for name, key in shown.items() if (curve := run.curve(key))
    ]
    return f"the critic is healthy{unfinished}: {', '.join([*figures, summary(lines)])}"


def report_json(run: Run, lines: list[Line]) -> str:
    """Writes the findings for a program."""
    return as_json(
        lines,
        run=str(run.path),
        metrics=None if run.source is None else str(run.source),
        last_step=run.last_step,
        total_steps=run.total,
        run_state=run.state,
        verdict=verdict(run, lines),
    )
