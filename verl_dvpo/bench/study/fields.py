# SPDX-License-Identifier: Apache-2.0
"""Defines the types of fields that a study's files share."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictStr

_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")


def _is_label(value: str) -> str:
    if not _LABEL.fullmatch(value):
        raise ValueError("letters, digits and _ . + - are allowed, a letter or digit first; rename it")
    return value


def _is_share(value: float | None) -> float | None:
    if value is not None and not 0.0 <= value <= 1.0:
        raise ValueError("a number in [0, 1] is allowed; correct it")
    return value


def _are_distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"each may stand once, but {repeated} are repeated; remove the repetition")
    return names


Label = Annotated[StrictStr, AfterValidator(_is_label)]
ShareOrNone = Annotated[Annotated[float, Field(strict=True)] | None, AfterValidator(_is_share)]
#: Names of entries on one axis of the study.
Names = Annotated[tuple[Label, ...], AfterValidator(_are_distinct)]


class Settings(BaseModel):
    """Refuses unknown fields; the result cannot be changed."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def read_yaml(path: Path, what: str) -> Any:
    """Returns the content of a YAML file.

    Args:
        path: the file.
        what: its name in errors.

    Raises:
        ValueError: the file is missing or no YAML.
    """
    if not path.is_file():
        raise ValueError(f"{what} is {str(path)!r}; a YAML file is allowed, this one does not exist; correct the path")
    try:
        return yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{what} is {str(path)!r}; a YAML file is allowed; correct its syntax: {reason}") from error


def check_mapping(content: Any, what: str) -> Mapping[str, Any]:
    """Returns ``content``; raises ValueError if it is no mapping."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{what} is {content!r}; a mapping of fields is allowed; write `name: ...` and so on")
    return content
