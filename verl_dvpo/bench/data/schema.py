# SPDX-License-Identifier: Apache-2.0
"""Defines what a set is: its published columns, how a row becomes a prompt with an answer, and the rows of verl."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from verl_dvpo.bench.tasks.task import SINGLE_TURN_AGENT

#: How a response is compared with the answer: ``answers.py`` and ``equivalence.py``; ``dialogue.py`` for the last one.
Grader = Literal["math", "choice", "text", "exact", "dialogue"]
#: A chat message: ``role`` and ``content``.
Message = dict[str, str]

#: The columns that every set is written with. They are the same for all sets, because verl concatenates its files.
ROW_SCHEMA = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
        ("agent_name", pa.string()),
        (
            "extra_info",
            pa.struct(
                [
                    ("split", pa.string()),
                    ("index", pa.int64()),
                    ("id", pa.string()),
                    ("grader", pa.string()),
                    ("options", pa.int64()),
                    ("original_truth", pa.string()),
                    ("tags", pa.string()),
                ]
            ),
        ),
    ]
)


class SkippedRow(Exception):
    """A row that cannot be used; the message says why, in words that are the same for all such rows."""


@dataclass(frozen=True)
class Field:
    """One thing that a set's rows hold.

    Attributes:
        name: what ``DataSet.build`` and ``--column`` call it.
        columns: the published names; the first that is there is read.
        kind: the column's type, for messages.
        required: False if a set without the column can be used.
    """

    name: str
    columns: tuple[str, ...]
    kind: str = "str"
    required: bool = True


@dataclass(frozen=True, kw_only=True)
class Example:
    """One prompt.

    Attributes:
        prompt: the user's words, or the messages of a conversation that ends with the user's.
        truth: the answer that the reward compares a response with.
        grader: how it compares.
        options: number of the options of a multiple choice; 0 if the prompt does not list them.
        wrong: a published wrong answer; None if there is none.
        original: the right answer, where ``truth`` may be a wrong one; None where it is not known.
        id: the row's published name; empty for none.
    """

    prompt: str | Sequence[Message]
    truth: str
    grader: Grader
    options: int = 0
    wrong: str | None = None
    original: str | None = None
    id: str = ""


#: Makes an example of a row's fields (absent ones are None). The generator is the row's own.
Build = Callable[[Mapping[str, Any], np.random.Generator], Example]


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A published set.

    Attributes:
        name: of the command's argument, of the files and of the rows' ``data_source``.
        ability: verl's column of that name.
        grader: of its rows, if a row does not say another.
        fields: what its rows hold.
        build: makes an example of a row.
        tags: optional columns that are kept as JSON in ``extra_info.tags``.
        instruction: follows the user's words in the prompt.
        hub: the identifier on the hub; None if it is not published there.
        subset: of the hub's set; None for the only one.
        split: of the hub's set.
        licence: as its card or repository states it.
        agent: the name of the agent loop that rolls it out.
        alternative: the same set with other columns, as another place publishes it.
    """

    name: str
    ability: str
    grader: Grader
    fields: tuple[Field, ...]
    build: Build
    tags: tuple[str, ...] = ()
    instruction: str = ""
    hub: str | None = None
    subset: str | None = None
    split: str = "train"
    licence: str = "none stated"
    agent: str = SINGLE_TURN_AGENT
    alternative: "DataSet | None" = None

    @property
    def schema(self) -> str:
        """The expected columns in words."""
        needed = ", ".join(f"{' or '.join(each.columns)} ({each.kind})" for each in self.fields if each.required)
        extra = [" or ".join(each.columns) for each in self.fields if not each.required]
        text = needed + (f" and reads {', '.join(extra)} if there" if extra else "")
        return text + (f"; or {self.alternative.schema}" if self.alternative is not None else "")


def find_columns(dataset: DataSet, present: Iterable[str], chosen: Mapping[str, str]) -> dict[str, str]:
    """Returns the column of each field that the source has.

    Args:
        dataset: the set.
        present: the source's columns.
        chosen: field or published column -> column, as the user names them.

    Raises:
        ValueError: a required column is missing, or ``chosen`` names an unknown field or column.
    """
    there = list(dict.fromkeys(present))
    known = {name: each for each in dataset.fields for name in (each.name, *each.columns)}
    named = {}
    for chosen_name, chosen_column in chosen.items():
        if chosen_name not in known:
            raise ValueError(
                f"column is '{chosen_name}={chosen_column}'; {dataset.name} has the fields "
                f"{', '.join(each.name for each in dataset.fields)}; name one of them"
            )
        if chosen_column not in there:
            raise ValueError(
                f"column is '{chosen_name}={chosen_column}'; the source has {', '.join(there)}; name one of these"
            )
        named[known[chosen_name].name] = chosen_column
    found = dict(named)
    for field in dataset.fields:
        column = next((each for each in field.columns if each in there), None)
        if field.name not in found and column is not None:
            found[field.name] = column
        if field.required and field.name not in found:
            raise ValueError(
                f"column {field.columns[0]!r} is missing, the source has {', '.join(there) or 'none'}; {dataset.name} "
                f"needs {dataset.schema}; take another --source, or say --column {field.name}=NAME"
            )
    return found


def id_of(values: Mapping[str, Any]) -> str:
    """Returns the field ``id`` as text; "" where it is missing or empty, and 0 is one."""
    found = values.get("id")
    return "" if found is None else str(found)


def text_of(value: Any, what: str) -> str:
    """Returns a value as text without spaces around it; a whole number is written without a decimal point.

    Raises:
        SkippedRow: it is empty.
    """
    if isinstance(value, float):
        value = int(value) if value.is_integer() else None if math.isnan(value) else value
    text = "" if value is None else str(value).strip()
    if not text:
        raise SkippedRow(f"{what} is empty")
    return text
