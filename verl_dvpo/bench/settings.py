# SPDX-License-Identifier: Apache-2.0
"""Turns the errors of pydantic into one line: ``<field> is <value>; <what is allowed>; <what to do>``."""

import typing
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

_LONGEST = 100


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Returns one line that names each field that is wrong, its value, what is allowed and what to do.

    Args:
        error: raised while ``model`` was validated.
        model: the outermost model.
    """
    # an entry that is wrong is left out of its list, which then counts as too short
    wrong = [each for each in error.errors() if each["type"] != "too_short" or not each["input"]]
    return " | ".join(_explain_one(each, model) for each in wrong)


def _explain_one(each: ErrorDetails, model: type[BaseModel]) -> str:
    field = _field(each["loc"]) or model.__name__.lower()
    if each["type"] == "missing":
        return f"{field} is missing; a value is required; add it"
    value = repr(each["input"])
    value = value if len(value) <= _LONGEST else f"{value[:_LONGEST]}..."
    if each["type"] == "extra_forbidden":
        owner = _model_at(model, each["loc"][:-1])
        allowed = ", ".join(sorted(owner.model_fields)) if owner else "others"
        return f"{field} is {value}; there is no such field, allowed are {allowed}; rename or remove it"
    if each["type"] == "value_error":
        return f"{field} is {value}; {each['ctx']['error']}"
    allowed = each["msg"].replace("Input should be", "allowed is").replace("tuple", "list")
    if each["type"] == "too_short":
        allowed = f"at least {each['ctx']['min_length']} entry is required"
    return f"{field} is {value}; {allowed}; correct it"


def _field(place: Sequence[int | str]) -> str:
    """Joins a place to a path: ``("noises", 0, "rate")`` -> ``noises[0].rate``."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")


def _model_at(model: type[BaseModel], place: Sequence[int | str]) -> type[BaseModel] | None:
    found: type[BaseModel] | None = model
    for part in place:
        if isinstance(part, str) and found is not None:
            found = _model_in(found.model_fields[part].annotation)
    return found


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """Returns the model that an annotation like ``tuple[Model, ...]`` holds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, typing.get_args(annotation))), None)
