# SPDX-License-Identifier: Apache-2.0
"""What verl's ``file`` logger leaves: JSON lines ``{"step": int, "data": {metric: value}}``."""

import json
from pathlib import Path
from typing import Any


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records; a last line that is not yet whole is left out, a file that is not there has none."""
    if not path.is_file():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def scores(record: dict[str, Any]) -> dict[str, float]:
    """Data source -> validation score in one record; empty where it has none.

    verl's key is ``val-core/<data source>/<variable>/mean@<answers per prompt>``.
    """
    found = {}
    for key, value in record["data"].items():
        section, _, rest = key.partition("/")
        if section == "val-core" and rest.rpartition("/")[2].startswith("mean@"):
            source = rest.rsplit("/", 2)[0]
            found[source] = float(value)
    return found
