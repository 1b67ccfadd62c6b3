# SPDX-License-Identifier: Apache-2.0
"""Completes an algorithm's page: its settings from ``config/algorithm``, and the rows that measured it in ``docs/``."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from pymdownx.slugs import slugify

from site_pages import CONFIG, DOCS
from site_pages.configuration import fields_of, heading_of, section
from site_pages.links import outside_fences

#: Pages whose tables hold measurements.
MEASURED = ("demo.md", "results.md", "critic_lab.md", "benchmarks.md")
FOLDER = "algorithms/"


@dataclass(frozen=True)
class Row:
    """Rows of one table that are about one algorithm.

    Attributes:
        page: the page in ``docs/``.
        heading: the heading above the table.
        header: the table's first two lines.
        rows: the lines.
    """

    page: str
    heading: str
    header: tuple[str, str]
    rows: tuple[str, ...]


def names() -> list[str]:
    """Returns the algorithms that ship."""
    return sorted(file.stem for file in (CONFIG / "algorithm").glob("[!_]*.yaml"))


def completed(text: str, path: str) -> str:
    """Returns the Markdown of a page, with settings and measurements if it is that of an algorithm."""
    name = PurePosixPath(path).stem
    if not path.startswith(FOLDER) or name not in names():
        return text
    return "\n\n".join([text.rstrip(), "## Settings", settings(name), "## Measured here", measured(name)]) + "\n"


def settings(name: str) -> str:
    """Returns what ``config/algorithm/NAME.yaml`` sets itself, and from which files it starts."""
    file = CONFIG / "algorithm" / f"{name}.yaml"
    text = file.read_text()
    own = section("algorithm", file).partition("\n\n")[2] if fields_of(text) else heading_of(text)
    starts = [line.strip()[2:] for line in text.splitlines() if line.strip().startswith("- ") and "_self_" not in line]
    listed = ", ".join(f"`{start}`" for start in starts)
    return (
        f"`config/algorithm/{name}.yaml` starts from {listed}. {own}\n\n"
        "All fields: [configuration](../reference/configuration.md)."
    )


def measured(name: str) -> str:
    """Returns the rows of the tables in ``docs/`` that begin with the algorithm's name."""
    parts = []
    for row in rows_of(name):
        anchor = slugify(case="lower")(row.heading, "-")
        parts.append(f"From [{row.heading}](../{row.page}#{anchor}):")
        parts.append("\n".join([*row.header, *row.rows]))
    if not parts:
        return "No table of this documentation has a row of it: nothing has been measured."
    parts.append("Commands and conditions stand there. [The gallery](../gallery.md) has the commit of each.")
    return "\n\n".join(parts)


def rows_of(name: str) -> Iterator[Row]:
    """Yields the rows whose first cell is the algorithm's name alone, table by table."""
    for page in MEASURED:
        heading, header, rows = "", [], []
        for line, prose in (*outside_fences((DOCS / page).read_text()), ("\n", True)):
            if prose and line.startswith("|"):
                (header if len(header) < 2 else rows).append(line.rstrip())
                continue
            found = tuple(row for row in rows if row.split("|")[1].strip() in (f"`{name}`", name))
            if found:
                yield Row(page, heading, (header[0], header[1]), found)
            header, rows = [], []
            if prose and line.startswith("#"):
                heading = line.lstrip("#").strip()
