# SPDX-License-Identifier: Apache-2.0
"""Makes the page and the PNGs of ``verl-dvpo plot``."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from verl_dvpo.pictures.calibration import Estimate, Tokens, coverage, mean_over, tokens_of
from verl_dvpo.pictures.choose import Shown, choose_answers
from verl_dvpo.pictures.curves import curves
from verl_dvpo.pictures.fan import fan_figure
from verl_dvpo.pictures.figure import to_png
from verl_dvpo.pictures.figures import calibration_figure, curves_figure
from verl_dvpo.pictures.page import Picture, Section, coloured_text, page
from verl_dvpo.pictures.runs import Run
from verl_dvpo.saved.files import whole_folder

PAGE = "index.html"

READING = (
    "The band is what the critic believed, before each token, that the answer would still receive; the diamond is what "
    "it received. In the text, blue tokens raised the median and orange ones lowered it."
)
FIT = (
    "Each state is judged by the return that came, before the critic learned from it. The answers were taken at even "
    "distances from their batches, whatever their reward. For a calibrated critic points lie on the dashed lines. A "
    "reward that is only 0 or 1 may lie on the edge of many bands at once: coverage above the line is no fault there."
)


def draw(runs: Sequence[Run], out: Path, *, answers: int = 4) -> Path:
    """Draws everything that there is of some runs into a new folder, whole or not at all.

    Args:
        runs: of one or several groups.
        out: a folder that does not exist or is empty.
        answers: of each run that are shown, >= 1.

    Returns:
        The page.

    Raises:
        ValueError: there is something at ``out``, or nothing to draw.
    """
    believing = [run for run in runs if any(answer.mask.any() for dump in run.dumps for answer in dump.answers)]
    _require_something(runs, believing)
    sections = [_run_section(run, answers, several=len(believing) > 1) for run in believing]
    groups: dict[str, list[Path]] = {}
    for run in runs:
        if run.has_metrics:
            groups.setdefault(run.name, []).append(run.folder)
    if panels := curves(groups):
        text = "Numbers that verl logged, a line for each group of runs."
        picture = Picture("curves", "Curves", text, to_png(curves_figure(panels)))
        sections.append(Section("Training", [picture]))
    names = ", ".join(dict.fromkeys(run.name for run in runs))
    with whole_folder(out) as folder:
        for section in sections:
            for picture in section.pictures:
                (folder / f"{picture.name}.png").write_bytes(picture.png)
        (folder / PAGE).write_text(page(f"What the critic believes: {names}", sections), encoding="utf-8")
    return out / PAGE


def _require_something(runs: Sequence[Run], believing: Sequence[Run]) -> None:
    """Raises ValueError where no critic wrote anything, unless there are several runs with curves to compare."""
    if believing or sum(run.has_metrics for run in runs) > 1:
        return
    raise ValueError(
        f"run is '{runs[0].folder}'; a run whose critic wrote values/step_N.safetensors is allowed; there is none with "
        "an answer; train with critic.value.dump_every=10, or give --rollouts FILE for a run with a checkpoint"
    )


def _run_section(run: Run, count: int, *, several: bool) -> Section:
    prefix = f"{_slug(run.folder.resolve().name)}_" if several else ""
    tokens = tokens_of([answer for dump in run.dumps for answer in dump.answers])
    shown = choose_answers(run.dumps, count)
    pictures = [_fan_picture(f"{prefix}fan", shown)]
    for number, each in enumerate(shown, 1):
        title = f"Answer {number}: {each.why}"
        pictures.append(_answer_picture(f"{prefix}answer_{number}", title, each))
    title = "Does it fit the returns that came?"
    pictures.append(Picture(f"{prefix}calibration", title, FIT, to_png(calibration_figure(tokens))))
    tables: dict[str, Mapping[str, Any]] = {"Measured": _measured(run, tokens)}
    if run.settings:
        tables["Settings"] = run.settings
    return Section(f"{run.name}: {run.folder.resolve().name}" if several else run.name, pictures, tables)


def _fan_picture(name: str, shown: Sequence[Shown]) -> Picture:
    """Draws the first two answers, right and wrong where there are both, with their fans alone."""
    pair = shown[:2]
    title = "An answer that goes right, and one that goes wrong" if _differ(pair) else "Along an answer"
    return Picture(name, title, READING, to_png(fan_figure(pair, panels=("fan",))))


def _answer_picture(name: str, title: str, shown: Shown) -> Picture:
    text = "Below the fan: how far the heads are apart, and the actor's advantage of each token, where they are known."
    return Picture(name, title, text, to_png(fan_figure([shown])), coloured_text(shown.answer))


def _differ(shown: Sequence[Shown]) -> bool:
    return len(shown) == 2 and shown[0].answer.reward > shown[1].answer.reward


def _measured(run: Run, tokens: Tokens) -> dict[str, str]:
    steps = [dump.step for dump in run.dumps]
    found = {
        "answers": str(tokens.count),
        "tokens": str(len(tokens.values)),
        "steps": f"{len(steps)}: " + ", ".join(map(str, steps[:12])) + (", …" if len(steps) > 12 else ""),
        "return less value": _shown(mean_over(tokens.realised - tokens.values, tokens.answers), "units of reward"),
    }
    if tokens.spread:
        for band in (0.5, 0.9):
            found[f"returns in the {100 * band:.0f} % band"] = _shown(coverage(tokens, band), "share")
    return found


def _shown(estimate: Estimate, unit: str) -> str:
    interval = "" if estimate.low != estimate.low else f" [{estimate.low:.3f}, {estimate.high:.3f}]"
    return f"{estimate.value:.3f}{interval} ({unit})"


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", text).strip("._") or "run"
