# SPDX-License-Identifier: Apache-2.0
"""Reads the metrics that verl's ``file`` logger writes: JSON lines ``{"step": int, "data": {metric: value}}``."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads all complete records of a metrics file.

    A last line without its newline is still being written, and is left out. A file that does not exist has no records.

    Raises:
        ValueError: a line is no record; its number is named.
    """
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    return [_record(path, number, line) for number, line in enumerate(lines, start=1)]


def _record(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if isinstance(record, dict) and isinstance(record.get("step"), int) and isinstance(record.get("data"), dict):
        return record
    shown = line[:60].decode(errors="replace") + ("..." if len(line) > 60 else "")
    raise ValueError(
        f'{path}, line {number} is {shown!r}; {{"step": N, "data": {{...}}}} is allowed; take the line out, or a whole '
        "copy of the file"
    )


def scores(record: dict[str, Any]) -> dict[str, float]:
    """Returns the validation score of each data source in one record; empty if the record has none.

    verl's key is ``val-core/<data source>/<variable>/mean@<answers per prompt>``.
    """
    found = {}
    for key, value in record["data"].items():
        section, _, rest = key.partition("/")
        if section == "val-core" and rest.rpartition("/")[2].startswith("mean@"):
            source = rest.rsplit("/", 2)[0]
            found[source] = float(value)
    return found


def last_score(metrics: Path, sources: Sequence[str] | None = None) -> float | None:
    """Averages the scores over data sources in the last record of ``metrics`` that has any; None if none has.

    Args:
        metrics: what verl's file logger wrote.
        sources: data sources that count; all by default.

    Raises:
        ValueError: that record lacks one of ``sources``.
    """
    found: dict[str, float] = {}
    for record in read_metrics(metrics):
        found = scores(record) or found
    if not found:
        return None
    missing = [source for source in sources or () if source not in found]
    if missing:
        raise ValueError(
            f"objective is {list(sources or ())!r}; data sources of the validation are allowed, {sorted(found)}; "
            f"take out {missing}"
        )
    values = [found[source] for source in sources or found]
    return sum(values) / len(values)
