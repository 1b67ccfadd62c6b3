# SPDX-License-Identifier: Apache-2.0
"""One finding of the doctor, and how findings are shown."""

import itertools
import json
import math
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

#: From harmless to harmful.
STATES = ("ok", "warning", "problem")
BARS = "▁▂▃▄▅▆▇█"
#: Characters of a picture, and of a line of text.
PICTURE, WIDTH = 24, 118


@dataclass(frozen=True, kw_only=True)
class Line:
    """One finding.

    Attributes:
        name: of the check or the symptom, as docs/doctor.md lists it.
        state: one of ``STATES``.
        text: what was found, with its figures.
        fix: what to do; empty for ``ok``.
        picture: a curve in ``PICTURE`` characters at most; empty where there is none.
    """

    name: str
    state: str
    text: str
    fix: str = ""
    picture: str = ""

    def __post_init__(self) -> None:
        if self.state not in STATES:
            raise ValueError(f"state is {self.state!r}; one of {', '.join(STATES)} is allowed")


def ok(name: str, text: str, picture: str = "") -> Line:
    """Makes the line of something that is in order."""
    return Line(name=name, state="ok", text=text, picture=picture)


def warning(name: str, text: str, fix: str, picture: str = "") -> Line:
    """Makes the line of something that may harm."""
    return Line(name=name, state="warning", text=text, fix=fix, picture=picture)


def problem(name: str, text: str, fix: str, picture: str = "") -> Line:
    """Makes the line of something that stops or spoils a run."""
    return Line(name=name, state="problem", text=text, fix=fix, picture=picture)


def worst(lines: Iterable[Line]) -> str:
    """Returns the most harmful state of all; ``ok`` for none."""
    return max((line.state for line in lines), key=STATES.index, default="ok")


def exit_status(lines: Iterable[Line]) -> int:
    """Returns 1 where there is a problem, else 0."""
    return int(worst(lines) == "problem")


def sparkline(values: Iterable[float]) -> str:
    """Draws a curve in one line of text: its lowest value is the lowest bar, a value that is not finite is ``×``.

    Long curves are cut into ``PICTURE`` pieces, and the median of each is drawn.
    """
    curve = [float(value) for value in values]
    if len(curve) > PICTURE:
        ends = [round(i * len(curve) / PICTURE) for i in range(PICTURE + 1)]
        curve = [_middle(curve[start:end]) for start, end in itertools.pairwise(ends)]
    finite = [value for value in curve if math.isfinite(value)]
    low, height = min(finite, default=0.0), max(finite, default=0.0) - min(finite, default=0.0)
    scale = (len(BARS) - 1) / height if height > 0 else 0.0
    return "".join(BARS[round((value - low) * scale)] if math.isfinite(value) else "×" for value in curve)


def _middle(piece: Sequence[float]) -> float:
    return statistics.median(piece) if all(map(math.isfinite, piece)) else math.nan


def show(line: Line) -> str:
    """Writes a finding for a terminal: state, name, picture and text; the fix is below it."""
    head = f"{line.state:<8} {line.name:<24} "
    body = f"{line.picture}  {line.text}" if line.picture else line.text
    indent = " " * len(head)
    found = _wrapped(body, head, indent)
    return f"{found}\n{_wrapped(f'fix: {line.fix}', indent, f'{indent}     ')}" if line.fix else found


def _wrapped(text: str, first: str, rest: str) -> str:
    """Fills lines; settings and commands stay whole, so that they can be copied."""
    return textwrap.fill(
        text, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False, break_long_words=False
    )


def summary(lines: Sequence[Line]) -> str:
    """Counts the findings of each state in one sentence."""
    counts = [(state, sum(line.state == state for line in lines)) for state in reversed(STATES)]
    return ", ".join(f"{number} {_plural(state, number)}" for state, number in counts)


def _plural(state: str, number: int) -> str:
    return state if state == "ok" or number == 1 else f"{state}s"


def as_json(lines: Sequence[Line], **about: Any) -> str:
    """Writes findings for a program: ``{"state": ..., **about, "lines": [...]}``."""
    return json.dumps({"state": worst(lines), **about, "lines": [asdict(line) for line in lines]}, indent=2)
