# SPDX-License-Identifier: Apache-2.0
"""Makes the glossary of metrics: each name that the code logs, where, and what it means."""

import ast
import fnmatch
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from site_pages import ROOT
from site_pages.configuration import cell
from site_pages.meanings import OURS, VERLS

#: Parts of the package that read metrics, or name other things with a slash, and log none.
READERS = ("bench", "compat", "doctor", "export", "platforms", "saved")
NAME = re.compile(r"[a-z_]+(/[a-z0-9_*]+)+")
#: Prefixes that one part of the code puts before names that another part gives.
GLUE = ("critic/*", "noise/*", "auto/*", "critic/auto/*", "loss/*")
#: Names that are put together from parts without a slash: the name -> the file and the text that holds its last part.
BY_PARTS = {
    "critic/vpred_mean": ("verl_dvpo/critic/worker.py", '"vpred_mean"'),
    "critic/loss/*": ("verl_dvpo/critic/worker.py", 'f"loss/{name}"'),
    "critic/auto/crps_*": ("verl_dvpo/distributional/automatic.py", '("crps", "error")'),
    "critic/auto/error_*": ("verl_dvpo/distributional/automatic.py", '("crps", "error")'),
    "critic/auto/risk_crps_*": ("verl_dvpo/distributional/automatic.py", 'f"risk_crps_{'),
    "critic/auto/num_quantiles": ("verl_dvpo/distributional/automatic.py", '"num_quantiles"'),
    "critic/auto/risk": ("verl_dvpo/distributional/automatic.py", '"risk"'),
}


@cache
def logged() -> dict[str, str]:
    """Returns each name with a slash that the code uses as a key, and its place; ``*`` for what it fills in."""
    found: dict[str, str] = {}
    for file in sorted((ROOT / "verl_dvpo").rglob("*.py")):
        place = file.relative_to(ROOT)
        if place.parts[1] not in READERS:
            for name, line in _keys(file):
                found.setdefault(name, f"{place.as_posix()}:{line}")
    return found


def unexplained() -> list[str]:
    """Returns the names in the code, with their places, that the glossary does not have."""
    return [f"{name} ({place})" for name, place in logged().items() if name not in GLUE and not _entries(name)]


def without_code() -> list[str]:
    """Returns the names in the glossary that no code logs."""
    return [name for name in OURS if not place_of(name)]


def entry_of(name: str) -> str | None:
    """Returns the glossary's entry for a metric's full name; None if there is none."""
    return next((entry for entry in (*OURS, *VERLS) if fnmatch.fnmatchcase(name, entry)), None)


def place_of(entry: str) -> str:
    """Returns where the code logs an entry of the glossary, as ``file:line``; "" if nowhere."""
    if entry in BY_PARTS:
        path, text = BY_PARTS[entry]
        lines = (ROOT / path).read_text().splitlines()
        return next((f"{path}:{number}" for number, line in enumerate(lines, 1) if text in line), "")
    return next((place for name, place in logged().items() if name not in GLUE and entry in _entries(name)), "")


def page() -> str:
    """Returns the page of Markdown."""
    parts = [
        "# Metrics",
        "Names and places come from the code, what they mean from `scripts/site_pages/meanings.py`; a test compares "
        "both with an update of the real worker. Means are over the valid tokens of a step on all ranks unless a line "
        "says otherwise. `*` stands for a name that the code fills in. `metrics.jsonl` of a run has them all; "
        "`verl-dvpo doctor RUN` judges them.",
        "## Of this package",
        _table({name: (unit, text, place_of(name)) for name, (unit, text) in OURS.items()}),
        "## Of verl, with this package",
        _table({name: (unit, text, "verl") for name, (unit, text) in VERLS.items()}),
    ]
    return "\n\n".join(parts) + "\n"


def _table(rows: dict[str, tuple[str, str, str]]) -> str:
    lines = ["| metric | unit or range | meaning | logged in |", "| --- | --- | --- | --- |"]
    lines += [
        f"| `{name}` | {cell(unit)} | {cell(text)} | {_where(place)} |" for name, (unit, text, place) in rows.items()
    ]
    return "\n".join(lines)


def _where(place: str) -> str:
    return f"`{place.rsplit(':', 1)[0].removeprefix('verl_dvpo/')}`" if place else ""


def _entries(name: str) -> list[str]:
    """Returns the entries that a name in the code, which may lack its prefix, is a part of."""
    return [entry for entry in OURS | VERLS if entry == name or entry.endswith(f"/{name}")]


def _keys(file: Path) -> Iterator[tuple[str, int]]:
    """Yields the names with a slash that a file uses as keys of a dict, as an index, or as module constants."""
    for node in ast.walk(ast.parse(file.read_text())):
        keys: list[ast.expr | None] = []
        if isinstance(node, ast.Dict):
            keys = list(node.keys)
        elif isinstance(node, ast.DictComp):
            keys = [node.key]
        elif isinstance(node, ast.Subscript):
            keys = [node.slice]
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            keys = list(node.value.elts)
        for key in keys:
            name = _text(key)
            if name and NAME.fullmatch(name):
                yield name, getattr(key, "lineno", 0)


def _text(node: ast.expr | None) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "*" for part in node.values)
    return None
