# SPDX-License-Identifier: Apache-2.0
"""Each message in docs/troubleshooting.md is one that the code can say."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
HEADINGS = re.findall(r"^### `(.+)`$", PAGE.read_text(), flags=re.MULTILINE)


@cache
def constants(module: str) -> dict[str, str]:
    """The strings that a module of the package names at its top level, those that it imports from another included."""
    file = ROOT / (module.replace(".", "/") + ".py")
    found: dict[str, str] = {}
    for node in ast.parse(file.read_text()).body if file.exists() else []:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("verl_dvpo."):
            found |= {a.name: constants(node.module)[a.name] for a in node.names if a.name in constants(node.module)}
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            found |= {target.id: node.value.value for target in node.targets if isinstance(target, ast.Name)}
    return found


def spoken(node: ast.AST, known: dict[str, str]) -> str | None:
    """A string of the code as a reader meets it: named constants filled in, anything else that is filled in as …."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if not isinstance(node, ast.JoinedStr):
        return None
    parts = []
    for part in node.values:
        if isinstance(part, ast.Constant):
            parts.append(str(part.value))
        else:
            parts.append(known.get(getattr(part.value, "id", ""), "…"))
    return "".join(parts)


@cache
def messages() -> list[str]:
    found = []
    for file in (ROOT / "verl_dvpo").rglob("*.py"):
        known = constants(".".join(file.relative_to(ROOT).with_suffix("").parts))
        found += [text for node in ast.walk(ast.parse(file.read_text())) if (text := spoken(node, known))]
    return found


def test_there_are_messages_to_look_for():
    assert len(HEADINGS) > 30
    assert len(set(HEADINGS)) == len(HEADINGS)


@pytest.mark.parametrize("heading", HEADINGS)
def test_the_code_says_it(heading):
    pattern = re.compile(".*".join(re.escape(piece.strip()) for piece in heading.split("…")), re.DOTALL)
    assert any(pattern.search(message) for message in messages()), (
        f"no message of verl_dvpo contains {heading!r}; docs/troubleshooting.md has to follow the code: write what "
        "it says now, with … for what is filled in, or take the entry out"
    )


def test_each_entry_has_a_cause_and_a_remedy():
    """An entry is more than its heading."""
    bodies = re.split(r"^##+ .*$", PAGE.read_text(), flags=re.MULTILINE)[1:]
    titles = re.findall(r"^##+ .*$", PAGE.read_text(), flags=re.MULTILINE)
    short = [title for title, body in zip(titles, bodies, strict=True) if title.startswith("### ") and len(body) < 40]
    assert not short


def test_a_message_that_nobody_says_is_found():
    with pytest.raises(AssertionError, match="no message of verl_dvpo contains"):
        test_the_code_says_it("critic.value is …; it must be a banana")
