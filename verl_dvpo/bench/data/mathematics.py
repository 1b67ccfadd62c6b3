# SPDX-License-Identifier: Apache-2.0
"""Sets of mathematics: Light-R1 to train on; MATH500, AIME24, Minerva-Math and AMC23 to evaluate on."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from verl_dvpo.bench.data.answers import after_thinking, last_boxed
from verl_dvpo.bench.data.schema import DataSet, Example, Field, SkippedRow, id_of, text_of

INSTRUCTION = "Reason step by step, and put your final answer in \\boxed{}."


def truth_of(value: Any, what: str) -> str:
    """Returns an answer without the dollar signs around it; of a worked solution, the last box.

    Raises:
        SkippedRow: it is empty.
    """
    text = text_of(value, what)
    boxed = last_boxed(text)
    if boxed is not None:
        text = boxed
    elif text.count("$") == 2 and text[0] == text[-1] == "$":
        text = text[1:-1]
    return text_of(text, what)


def problem_and_answer(values: Mapping[str, Any], rng: np.random.Generator) -> Example:
    """Makes an example of a problem and its answer."""
    return Example(
        prompt=text_of(values["problem"], "problem"),
        truth=truth_of(values["answer"], "answer"),
        grader="math",
        id=id_of(values),
    )


def conversation(values: Mapping[str, Any], rng: np.random.Generator) -> Example:
    """Makes an example of a question and a worked answer, whose last box is the label."""
    turns = values["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise SkippedRow("conversations is no list of turns")
    said = [turn.get("value", turn.get("content")) for turn in turns if turn.get("from", turn.get("role")) != "system"]
    if len(said) != 2:
        raise SkippedRow("conversations is not a question and an answer")
    boxed = last_boxed(after_thinking(str(said[1])))
    if not boxed:
        raise SkippedRow("the worked answer has no box")
    return Example(prompt=text_of(said[0], "question"), truth=boxed, grader="math")


_PROBLEM = Field("problem", ("problem", "question", "Problem"))
_ANSWER = Field("answer", ("answer", "Answer"), "str or number")

LIGHT_R1 = DataSet(
    name="light_r1",
    ability="math",
    grader="math",
    fields=(Field("conversations", ("conversations",), "list of {from, value}"),),
    build=conversation,
    instruction=INSTRUCTION,
    hub="qihoo360/Light-R1-SFTData",
    licence="Apache-2.0",
)
MATH500 = DataSet(
    name="math500",
    ability="math",
    grader="math",
    fields=(_PROBLEM, _ANSWER, Field("id", ("unique_id",), required=False)),
    build=problem_and_answer,
    tags=("subject", "level"),
    instruction=INSTRUCTION,
    hub="HuggingFaceH4/MATH-500",
    split="test",
)
AIME24 = DataSet(
    name="aime24",
    ability="math",
    grader="math",
    fields=(_PROBLEM, _ANSWER, Field("id", ("id", "ID"), "int or str", required=False)),
    build=problem_and_answer,
    tags=("url", "year"),
    instruction=INSTRUCTION,
    hub="HuggingFaceH4/aime_2024",
)
MINERVA_MATH = DataSet(
    name="minerva_math",
    ability="math",
    grader="math",
    fields=(
        Field("problem", ("question", "problem")),
        Field("answer", ("answer", "solution"), "str; of a solution, the last box"),
    ),
    build=problem_and_answer,
    instruction=INSTRUCTION,
    hub="math-ai/minervamath",
    split="test",
)
AMC23 = DataSet(
    name="amc23",
    ability="math",
    grader="math",
    fields=(
        Field("problem", ("question", "problem")),
        _ANSWER,
        Field("id", ("id",), "int or str", required=False),
    ),
    build=problem_and_answer,
    tags=("url",),
    instruction=INSTRUCTION,
    hub="math-ai/amc23",
    split="test",
)
SETS = (LIGHT_R1, MATH500, AIME24, MINERVA_MATH, AMC23)
