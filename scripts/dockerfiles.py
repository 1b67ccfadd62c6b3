# SPDX-License-Identifier: Apache-2.0
"""Reads what docker/Dockerfile.* say; ``try_image.py`` runs it and tests/test_images.py checks it."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from dockerfile_parse import DockerfileParser


@dataclass(frozen=True)
class Step:
    """One instruction: its name in capitals, its options without their dashes, and the rest."""

    name: str
    value: str
    options: Mapping[str, str] = field(default_factory=dict)

    def words(self) -> list[str]:
        """Splits the rest as a shell does, or reads it as JSON where it is a list."""
        return json.loads(self.value) if self.value.startswith("[") else shlex.split(self.value)


@dataclass(frozen=True)
class Stage:
    """One stage of a build: its name, or its number where it has none, its base image and its steps after ``FROM``."""

    name: str
    base: str
    steps: tuple[Step, ...]


def read_stages(path: Path, arguments: Mapping[str, str] | None = None) -> list[Stage]:
    """Reads a Dockerfile.

    Args:
        path: of the file.
        arguments: values for ``ARG`` before the first ``FROM``, in place of the defaults.
    """
    with open(path, "rb") as file:
        structure = DockerfileParser(fileobj=file).structure
    outer: dict[str, str] = {}
    stages: list[Stage] = []
    for each in structure:
        name, value = each["instruction"].upper(), each["value"]
        if name == "COMMENT":
            continue
        if name == "FROM":
            image, *alias = replaced(value, outer).split()
            stages.append(Stage(alias[-1] if alias else str(len(stages)), image, ()))
        elif not stages:
            key, _, default = value.partition("=")
            outer[key] = (arguments or {}).get(key, default)
        else:
            last = stages.pop()
            stages.append(Stage(last.name, last.base, (*last.steps, _step(name, value))))
    return stages


def _step(name: str, value: str) -> Step:
    options = {}
    while found := re.match(r"--([a-z-]+)=(\S+)\s+", value):
        options[found[1]] = found[2]
        value = value[found.end() :]
    return Step(name, value.strip(), options)


def replaced(text: str, values: Mapping[str, str]) -> str:
    """Puts values in place of ``$NAME`` and ``${NAME}``; a name without a value becomes empty."""
    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", lambda found: values.get(found[1] or found[2], ""), text)


def ignored(path: str, patterns: Sequence[str]) -> bool:
    """Tells whether ``.dockerignore`` keeps a path of the context out of the image, it or a folder that it is in."""
    parts = path.split("/")
    for pattern in patterns:
        anywhere = pattern.startswith("**/")
        plain = pattern.removeprefix("**/").strip("/")
        length = plain.count("/") + 1
        for start in range(len(parts) - length + 1) if anywhere else (0,):
            if fnmatch("/".join(parts[start : start + length]), plain):
                return True
    return False


def ignore_patterns(context: Path) -> list[str]:
    """Reads ``.dockerignore``; a pattern that begins with ``!`` is not known here.

    Raises:
        ValueError: there is one.
    """
    file = context / ".dockerignore"
    lines = [line.strip() for line in file.read_text().splitlines()] if file.is_file() else []
    patterns = [line for line in lines if line and not line.startswith("#")]
    if wrong := [pattern for pattern in patterns if pattern.startswith("!")]:
        raise ValueError(
            f"{file} holds {wrong[0]!r}; patterns without an exclamation mark are allowed; name the folders"
        )
    return patterns
