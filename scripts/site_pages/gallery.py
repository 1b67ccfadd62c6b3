# SPDX-License-Identifier: Apache-2.0
"""Makes the gallery of results: each measured file of ``docs/`` with its command and the commit that wrote it."""

import subprocess
from functools import cache
from pathlib import Path

import yaml

from site_pages import DOCS, ROOT

LIST = Path(__file__).parent / "gallery.yaml"
FOLDERS = ("results", "figures", "benchmarks")


@cache
def entries() -> list[dict]:
    """Returns the entries of ``gallery.yaml``; its head says what the fields are."""
    return yaml.safe_load(LIST.read_text())


def files_of(entry: dict) -> list[Path]:
    """Returns the files of an entry, those of its folders included."""
    found: list[Path] = []
    for path in entry["files"]:
        place = DOCS / path
        found += sorted(file for file in place.rglob("*") if file.is_file()) if place.is_dir() else [place]
    return found


def measured_files() -> list[Path]:
    """Returns every file of ``docs/`` that holds measurements or figures."""
    return sorted(file for folder in FOLDERS for file in (DOCS / folder).rglob("*") if file.is_file())


def commit_of(files: list[Path]) -> str:
    """Returns the last commit that wrote any of the files, with its day; "" outside of a repository with history."""
    command = ["git", "log", "-1", "--format=%h of %cs", "--", *map(str, files)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def page() -> str:
    """Returns the page of Markdown."""
    parts = [
        "# Gallery of results",
        "What this repository's figures and numbers are, which command makes each, and the commit that last wrote its "
        "files. A study's own folder also records versions, seeds and the commit of each run. The pages that are "
        "linked say what the numbers do not show.",
    ]
    for entry in entries():
        commit = (
            f"Commit: `{commit}`."
            if (commit := commit_of(files_of(entry)))
            else "Commit: see the history of the files."
        )
        files = [file for file in files_of(entry) if file.suffix != ".png"]
        parts += [f"## {entry['title']}", entry["says"].strip()]
        parts.append(f"```\n{entry['command'].strip()}\n```")
        parts.append(f"{commit} Machine: {entry['machine']}. More: [{entry['page']}]({entry['page']}).")
        parts += [f"![{entry['title']}]({path})" for path in entry.get("show", [])]
        if files:
            links = ", ".join(f"[{name}]({name})" for name in (file.relative_to(DOCS).as_posix() for file in files))
            parts.append(f"Files: {links}.")
    return "\n\n".join(parts) + "\n"
