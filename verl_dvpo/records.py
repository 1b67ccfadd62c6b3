# SPDX-License-Identifier: Apache-2.0
"""Reads the metrics that verl's ``file`` logger writes: JSON lines ``{"step": int, "data": {metric: value}}``."""

import json
from pathlib import Path
from typing import Any


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads all complete records of a metrics file.

    A last line without its newline is still being written, and is left out. A file that does not exist has no records.
    """
    if not path.is_file():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


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
