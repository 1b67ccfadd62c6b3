# SPDX-License-Identifier: Apache-2.0
"""Reads the commands in fenced blocks of the documents."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

#: Comments above a block whose commands no test can execute.
MARKERS = ("needs a GPU", "needs the network", "takes long", "changes this machine")
JOINED = re.compile(r"\\\n\s*")
MARKER = re.compile(r"<!-- (" + "|".join(MARKERS) + r") -->")
SHELLS = ("", "bash", "sh", "shell", "console")
#: Programs of every shell: they are part of no interface of ours.
UTILITIES = {"mkdir", "tar", "grep", "cd", "git", "export", "ls", "cat", "tensorboard"}
PROGRAMS = {"verl-dvpo", "python", "make", "bash", "pip", "docker", "pip-audit", "pre-commit", "uv"} | UTILITIES
PAGES = sorted(
    {
        *ROOT.glob("*.md"),
        *(page for page in ROOT.glob("docs/**/*.md") if page.relative_to(ROOT).parts[1] not in ("results", "figures")),
        *ROOT.glob("examples/**/*.md"),
        *ROOT.glob("verl_dvpo/**/*.md"),
    }
)


@dataclass(frozen=True)
class Command:
    """One command of a document.

    Attributes:
        place: page and line, for messages.
        words: program and arguments, without settings of the environment before it.
        marker: why no test executes it; "" if one does.
    """

    place: str
    words: tuple[str, ...]
    marker: str

    @property
    def program(self) -> str:
        return self.words[0].rsplit("/bin/", 1)[-1]


def blocks(page: Path) -> Iterator[tuple[int, str, str, str]]:
    """Yields the fenced blocks of a page: number of the first line, marker above, language, text."""
    lines = page.read_text().splitlines()
    number = 0
    while number < len(lines):
        opened = re.match(r"^(```+|~~~+)\s*(\w*)", lines[number])
        if opened is None:
            number += 1
            continue
        above = next((line for line in reversed(lines[:number]) if line.strip()), "")
        marker = MARKER.fullmatch(above.strip())
        end = next(i for i in range(number + 1, len(lines)) if lines[i].rstrip() == opened[1])
        yield number + 2, marker[1] if marker else "", opened[2], "\n".join(lines[number + 1 : end])
        number = end + 1


def commands(page: Path) -> Iterator[Command]:
    """Yields the commands of a page's blocks; a line that begins with no known program is output, or YAML."""
    for number, marker, language, text in blocks(page):
        if language not in SHELLS:
            continue
        for line in JOINED.sub(" ", text).splitlines():
            for words in _parts(line):
                yield Command(f"{page.relative_to(ROOT).as_posix()}:{number}", words, marker)


def overrides(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Yields the lines of blocks that are Hydra overrides alone, with their place."""
    for number, _, language, text in blocks(page):
        for line in JOINED.sub(" ", text).splitlines() if language in SHELLS else ():
            words = _split(line)
            if words and all(re.match(r"^\+*[a-z_][\w./]*=", word) for word in words) and "." in line:
                yield f"{page.relative_to(ROOT).as_posix()}:{number}", words


def _split(line: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError:  # an apostrophe: prose or output
        return []


def _parts(line: str) -> Iterator[tuple[str, ...]]:
    part: list[str] = []
    for word in [*_split(line), "&&"]:
        if word in ("&&", ";", "|"):
            if part and _is_program(part[0]):
                yield tuple(part)
            part = []
        elif part or not (re.match(r"^[A-Z_]+=", word) or word == "time"):
            part.append(word)


def _is_program(word: str) -> bool:
    name = word.rsplit("/bin/", 1)[-1]
    return name in PROGRAMS or (word.startswith("scripts/") and word.endswith(".sh"))
