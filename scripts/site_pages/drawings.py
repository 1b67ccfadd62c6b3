# SPDX-License-Identifier: Apache-2.0
"""Turns a drawing in Mermaid, which GitHub draws with a script from elsewhere, into a table for the site."""

import re

FENCE = re.compile(r"```mermaid\n(.*?)```\n", re.DOTALL)
ARROW = re.compile(r"^\s*(\w+) (-->|-\.->) (\w+)$", re.MULTILINE)


def as_tables(text: str) -> str:
    """Returns the Markdown with each graph of Mermaid as a table: who, imports whom, and whom it names in a string."""
    return FENCE.sub(lambda found: _table(found[1]), text)


def _table(graph: str) -> str:
    rows: dict[str, dict[str, list[str]]] = {}
    for start, arrow, end in ARROW.findall(graph):
        rows.setdefault(start, {"-->": [], "-.->": []})[arrow].append(f"`{_name(end)}`")
    lines = ["| part | imports | names in a string |", "| --- | --- | --- |"]
    lines += [f"| `{_name(part)}` | {', '.join(to['-->'])} | {', '.join(to['-.->'])} |" for part, to in rows.items()]
    return "\n".join(lines) + "\n"


def _name(node: str) -> str:
    """``bench_tasks`` stands for ``bench.tasks``: the graph's names have no dots."""
    return node.replace("bench_", "bench.", 1)
