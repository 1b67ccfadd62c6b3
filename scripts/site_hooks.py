# SPDX-License-Identifier: Apache-2.0
"""What mkdocs calls while it builds the site: adds pages made from the code, and makes links hold."""

import re
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from site_pages import DOCS, algorithms, commands, configuration, gallery, links, metrics, navigation
from site_pages.drawings import as_tables
from site_pages.equations import with_mathml

#: Above a block of commands that no test executes; a comment on GitHub, and a line on the site.
MARKER = re.compile(r"^<!-- (needs a GPU|needs the network|takes long|changes this machine) -->$", re.MULTILINE)


def generated() -> dict[str, str]:
    """Returns the pages that no file of ``docs/`` holds: path below the site's root -> Markdown."""
    return links.outside_pages() | {
        "reference/configuration.md": configuration.page(),
        "reference/metrics.md": metrics.page(),
        "reference/commands.md": commands.page(),
        "gallery.md": gallery.page(),
    }


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Leaves out of the navigation what does not exist, and adds what it does not name."""
    pages = generated()
    config["generated"] = pages
    existing = {file.relative_to(DOCS).as_posix() for file in DOCS.rglob("*.md")} | set(pages)
    config.nav = navigation.fitted(config.nav or [], existing)
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the generated pages."""
    for path, text in config["generated"].items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(text: str, *, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Makes links of a page of ``docs/`` hold on the site, and adds what an algorithm's page gets from the code."""
    path = page.file.src_uri
    if path not in config["generated"]:
        text = links.rewrite(text, source=f"docs/{path}", page=path)
        text = algorithms.completed(text, path)
    return as_tables(MARKER.sub(r"*\1:*", text))


def on_page_content(html: str, **_: Any) -> str:
    """Writes equations as MathML."""
    return with_mathml(html)
