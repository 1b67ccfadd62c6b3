# SPDX-License-Identifier: Apache-2.0
"""Draws the imports between the parts of ``verl_dvpo`` into docs/architecture.md, as a mermaid graph.

    python scripts/draw_imports.py            # writes the drawing
    python scripts/draw_imports.py --check    # exit status 1 if the committed drawing is out of date

A part is a package or module directly under ``verl_dvpo``, or directly under ``verl_dvpo.bench``. A full arrow is an
import statement, at the top of a module or inside a function. A dotted arrow is a module named in a string.
"""

import argparse
import ast
import pathlib
import sys

import grimp

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- imports: begin, made by scripts/draw_imports.py -->", "<!-- imports: end -->"

Edge = tuple[str, str]


def part(module: str) -> str:
    """Names the part that a module belongs to: ``families``, ``bench.lab``; empty for ``verl_dvpo`` itself."""
    names = module.split(".")[1:]
    return ".".join(names[:2] if names[:1] == ["bench"] else names[:1])


def imported(graph: grimp.ImportGraph) -> set[Edge]:
    """Finds every pair of parts of which the first imports the second."""
    edges = set()
    for module in graph.modules:
        for target in graph.find_modules_directly_imported_by(module):
            edges.add((part(module), part(target)))
    return {(a, b) for a, b in edges if a and b and a != b}


def named(package: pathlib.Path, parts: set[str]) -> set[Edge]:
    """Finds every pair of parts of which the first names a module of the second in a string."""
    edges = set()
    for file in sorted(package.rglob("*.py")):
        module = ".".join(("verl_dvpo", *file.relative_to(package).with_suffix("").parts))
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("verl_dvpo."):
                edges.add((part(module), part(node.value)))
    return {(a, b) for a, b in edges if {a, b} <= parts and a != b}


def drawing(package: pathlib.Path = ROOT / "verl_dvpo") -> str:
    """Returns the mermaid graph of ``package``."""
    sys.path.insert(0, str(package.parent))
    graph = grimp.build_graph("verl_dvpo", exclude_type_checking_imports=True, cache_dir=None)
    full = imported(graph)
    parts = {part(module) for module in graph.modules} - {"", "config", "bench"}
    dotted = named(package, parts) - full
    lines = ["```mermaid", "graph TD", "    subgraph bench"]
    lines += [f"        {_node(name)}" for name in sorted(parts) if name.startswith("bench.")]
    lines += ["    end"]
    lines += [f"    {_node(name)}" for name in sorted(parts) if not name.startswith("bench.")]
    lines += [f"    {_identifier(a)} --> {_identifier(b)}" for a, b in sorted(full) if {a, b} <= parts]
    lines += [f"    {_identifier(a)} -.-> {_identifier(b)}" for a, b in sorted(dotted)]
    return "\n".join([*lines, "```"])


def _identifier(name: str) -> str:
    return name.replace(".", "_")


def _node(name: str) -> str:
    return f"{_identifier(name)}[{name.removeprefix('bench.')}]"


def with_drawing(document: str, graph: str) -> str:
    """Returns ``document`` with ``graph`` between its two marks.

    Raises:
        ValueError: a mark is missing.
    """
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{DOCUMENT.name} has no drawing; it must have the lines {BEGIN!r} and {END!r}; add them")
    return f"{before}{BEGIN}\n{graph}\n{END}{after}"


def main() -> int:
    """Writes or checks the drawing; returns the exit status."""
    parser = argparse.ArgumentParser(description="Draw the imports of verl_dvpo into docs/architecture.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the drawing is out of date")
    check = parser.parse_args().check
    old = DOCUMENT.read_text()
    new = with_drawing(old, drawing())
    if check:
        return int(old != new)
    DOCUMENT.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
