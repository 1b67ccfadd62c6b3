# SPDX-License-Identifier: Apache-2.0
"""Documents point at files and functions that exist."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for page in [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("examples/**/*.md"),
        *ROOT.glob("verl_dvpo/**/*.md"),
    ]
)
SECTIONS = ("1", "2", "3", "4", "5", "6", "7", "7b", "7c", "7d", "8")


def definitions() -> set[str]:
    """Names every class and function of the package."""
    trees = [ast.parse(file.read_text()) for file in (ROOT / "verl_dvpo").rglob("*.py")]
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, kinds)}


def functions_of_the_method() -> list[str]:
    """Lists the names in the column ``function`` of each table of docs/method.md."""
    found, column = [], None
    for line in (ROOT / "docs" / "method.md").read_text().splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)] if line.startswith("|") else []
        if not cells:
            column = None
        elif "function" in cells:
            column = cells.index("function")
        elif column is not None and not set(cells[1]) <= set("- "):
            found += re.findall(r"`(\w+)`", cells[column])
    return found


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (ROOT / page).read_text())
    local = [link for link in links if not link.startswith("http")]
    assert not [link for link in local if not (ROOT / page).parent.joinpath(link).exists()]


def test_functions_of_the_method_exist():
    named = functions_of_the_method()
    assert len(named) > 15
    assert not sorted(set(named) - definitions())


def test_code_cites_sections_that_exist():
    """``docs/method.md, section N`` in code is a heading of the page."""
    page = (ROOT / "docs" / "method.md").read_text()
    assert tuple(re.findall(r"^## (\w+)\. ", page, flags=re.MULTILINE)) == SECTIONS
    cited = set()
    for folder in ("verl_dvpo", "tests", "config", "benchmarks", "examples"):
        for file in (ROOT / folder).rglob("*"):
            if file.suffix in (".py", ".yaml", ".md"):
                cited |= set(re.findall(r"docs/method\.md,?\s+sections? (\d\w?)", file.read_text()))
    assert cited
    assert cited <= set(SECTIONS)


def test_nothing_cites_a_document_outside_the_repository():
    files = [f for folder in ("verl_dvpo", "tests", "config") for f in (ROOT / folder).rglob("*") if f.is_file()]
    text = {f: f.read_text() for f in files if f.suffix in (".py", ".yaml", ".md") and f != pathlib.Path(__file__)}
    assert not [f.relative_to(ROOT).as_posix() for f, t in text.items() if re.search(r"\bspec,? sections? \d", t, re.I)]
