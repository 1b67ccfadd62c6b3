# SPDX-License-Identifier: Apache-2.0
"""Makes links that hold on GitHub hold on the site, where files outside ``docs/`` have pages of their own."""

import os
import posixpath
import re
from collections.abc import Iterator

from site_pages import ROOT

#: Files outside ``docs/`` whose page has a place of its own; others are at ``files/<path>.md``.
HOMES = {"README.md": "index.md"}
LINK = re.compile(r"(?<=\]\()([^)\s#]+)(#[^)\s]*)?(?=\))")
FENCE = re.compile(r"^(\s*)(`{3,}|~{3,})")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".sh": "bash", ".toml": "toml", ".json": "json"}


def outside_fences(text: str) -> Iterator[tuple[str, bool]]:
    """Yields each line with its end, and whether it is prose (not part of a fenced block)."""
    fence = None
    for line in text.splitlines(keepends=True):
        found = FENCE.match(line)
        if fence is None and found:
            fence = found[2]
            yield line, False
        elif fence is not None:
            if found and found[2].startswith(fence) and line.strip() == found[2]:
                fence = None
            yield line, False
        else:
            yield line, True


def rewrite(text: str, *, source: str, page: str) -> str:
    """Returns the text of ``source`` as the site's page ``page``.

    Args:
        text: Markdown with links relative to ``source``.
        source: path of the file in the repository.
        page: path of its page below the site's root, with the ending ``.md``.
    """

    def replaced(found: re.Match[str]) -> str:
        target, anchor = found[1], found[2] or ""
        if re.match(r"[a-z]+:", target):
            return found[0]
        place = page_of(posixpath.normpath(posixpath.join(posixpath.dirname(source), target)))
        return posixpath.relpath(place, posixpath.dirname(page) or ".") + anchor

    return "".join(LINK.sub(replaced, line) if prose else line for line, prose in outside_fences(text))


def page_of(path: str) -> str:
    """Returns where the site has a file of the repository; a file of ``docs/`` keeps its place below it."""
    if path in HOMES:
        return HOMES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if (ROOT / path).is_dir():
        readme = f"{path}/README.md"
        return f"files/{readme}" if (ROOT / readme).exists() else f"files/{path}/index.md"
    return f"files/{path}" if path.endswith(".md") else f"files/{path}.md"


def linked_outside(text: str, *, source: str) -> set[str]:
    """Returns the files and folders outside ``docs/`` to which the text of ``source`` links; those that exist."""
    found = set()
    for line, prose in outside_fences(text):
        for link in LINK.finditer(line) if prose else ():
            path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[1]))
            inside = re.match(r"[a-z]+:", link[1]) or path.startswith(("docs/", "../")) or path in ("docs", "..")
            if not inside and (ROOT / path).exists():
                found.add(f"{path}/README.md" if (ROOT / path / "README.md").exists() else path)
    return found


def outside_pages() -> dict[str, str]:
    """Returns a page for each file outside ``docs/`` to which a page of the site leads, over any number of links.

    Returns:
        the page's path below the site's root -> its Markdown.
    """
    pages: dict[str, str] = {}
    waiting = {"README.md", "CONTRIBUTING.md", "CHANGELOG.md"}
    for file in sorted((ROOT / "docs").rglob("*.md")):
        waiting |= linked_outside(file.read_text(), source=file.relative_to(ROOT).as_posix())
    while waiting:
        path = waiting.pop()
        page = page_of(path)
        if page in pages:
            continue
        pages[page] = _page(path, page)
        if path.endswith(".md"):
            waiting |= linked_outside((ROOT / path).read_text(), source=path)
    return pages


def _page(path: str, page: str) -> str:
    """Returns the Markdown of one file's page: the file itself, its text in a block, or a folder's list."""
    file = ROOT / path
    if file.is_dir():
        names = sorted(os.listdir(file))
        return f"# `{path}/`\n\nA folder of the repository:\n\n" + "".join(f"- `{name}`\n" for name in names)
    if path.endswith(".md"):
        return rewrite(file.read_text(), source=path, page=page)
    text = file.read_text()
    return f"# `{path}`\n\n~~~~{LANGUAGES.get(file.suffix, 'text')}\n{text.rstrip()}\n~~~~\n"
