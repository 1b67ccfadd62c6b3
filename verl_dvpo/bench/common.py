# SPDX-License-Identifier: Apache-2.0
"""Holds what all parts of the workbench share: atomic writes, tables and progress.

JSON lines are read by ``verl_dvpo.records.read_metrics``, which the product needs too.
"""

import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import pandas as pd
from tqdm import tqdm


def write_text(path: Path, text: str) -> None:
    """Writes a file atomically: at ``path`` there is the old file or the whole new one, also after a crash."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(partial, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Writes ``content`` as indented JSON, atomically."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_csv(path: Path, frame: pd.DataFrame) -> None:
    """Writes a table as CSV without its index, atomically."""
    write_text(path, frame.to_csv(index=False))


def markdown_table(headings: Sequence[object], rows: Iterable[Sequence[object]]) -> list[str]:
    """Returns the lines of a Markdown table, an empty line at the end; None and NaN become empty cells.

    Raises:
        ValueError: a row has not as many cells as there are headings.
    """
    lines = [_row(headings), _row(["---"] * len(headings))]
    for row in rows:
        if len(row) != len(headings):
            raise ValueError(f"row is {list(row)!r}; it must have {len(headings)} cells; add or remove some")
        lines.append(_row(row))
    return [*lines, ""]


def _row(cells: Sequence[object]) -> str:
    return "| " + " | ".join("" if cell is None or cell != cell else str(cell) for cell in cells) + " |"


class Progress:
    """Shows how much of a job is done: a bar on a terminal, elsewhere one line for each event.

    Args:
        total: amount of work, in ``unit``.
        unit: name of one piece of work.
        done: amount that was done before.
        stream: where to write; standard error by default.
        quiet: writes nothing.
    """

    def __init__(
        self, total: int, *, unit: str, done: int = 0, stream: IO[str] | None = None, quiet: bool = False
    ) -> None:
        self.stream = stream or sys.stderr
        self.terminal = self.stream.isatty() and not quiet
        self.total, self.unit, self.initial, self.quiet = total, unit, done, quiet
        self.start = time.monotonic()
        # smoothing=0: estimates the time left from the average of this call, starts and validations included
        self.bar = tqdm(total=total, initial=done, unit=unit, smoothing=0, file=self.stream, disable=not self.terminal)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()

    def note(self, text: str) -> None:
        """Writes a line, above the bar if there is one."""
        if self.terminal:
            self.bar.write(text, file=self.stream)
        elif not self.quiet:
            print(text, file=self.stream, flush=True)

    def update(self, done: int, event: str, *, keep: bool = False) -> None:
        """Reports that ``done`` units are finished, and what happened; a bar shows it only for now unless ``keep``."""
        if not self.terminal:
            self.note(f"{event} [{done} of {self.total} {self.unit}s{self._time_left(done)}]")
            return
        if keep:
            self.note(event)
        else:
            self.bar.set_description_str(event, refresh=False)
        self.bar.n = done
        self.bar.refresh()

    def _time_left(self, done: int) -> str:
        if not self.initial < done < self.total:
            return ""
        seconds = (time.monotonic() - self.start) / (done - self.initial) * (self.total - done)
        return f", {tqdm.format_interval(int(seconds))} left"
