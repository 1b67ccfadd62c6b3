# SPDX-License-Identifier: Apache-2.0
"""Sets of science and knowledge: SuperGPQA to train on; GPQA, SimpleQA and HLE to evaluate on.

SimpleQA and HLE are published with a judge model; none is used here. ``reward.py`` compares texts and mathematics.
"""

import ast
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from verl_dvpo.bench.data.mathematics import truth_of
from verl_dvpo.bench.data.schema import DataSet, Example, Field, SkippedRow, id_of, text_of

CHOICE_INSTRUCTION = "Reason step by step. End with the line `Answer: X`, where X is the letter of the right option."
TEXT_INSTRUCTION = "End with the line `Answer: ...`, which holds the answer alone."
EXACT_INSTRUCTION = (
    "Reason step by step. End with the line `Answer: ...`, which holds the answer (or its letter) alone."
)
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def with_options(question: str, options: Sequence[str]) -> str:
    """Returns a question and its options, one a line, with letters from A."""
    if not 2 <= len(options) <= len(_LETTERS):
        raise SkippedRow("there are not 2 to 26 options")
    lines = [f"{letter}) {option}" for letter, option in zip(_LETTERS, options, strict=False)]
    return "\n".join([question, "", *lines])


def listed_choice(values: Mapping[str, Any], rng: np.random.Generator) -> Example:
    """Makes an example of a question, its options in order, and the letter of the right one."""
    options = values["options"]
    if isinstance(options, str):  # a CSV file holds the list as Python or JSON writes it
        try:
            options = ast.literal_eval(options)
        except (ValueError, SyntaxError) as error:
            raise SkippedRow("options is no list") from error
    if not isinstance(options, list | tuple):
        raise SkippedRow("options is no list")
    letter = text_of(values["answer_letter"], "answer_letter").upper()
    if letter not in list(_LETTERS[: len(options)]):
        raise SkippedRow("answer_letter is no option's letter")
    return Example(
        prompt=with_options(text_of(values["question"], "question"), [str(option) for option in options]),
        truth=letter,
        grader="choice",
        options=len(options),
        id=id_of(values),
    )


def shuffled_choice(values: Mapping[str, Any], rng: np.random.Generator) -> Example:
    """Makes an example of a question, a right and three wrong options, in an order that ``rng`` draws."""
    right = text_of(values["correct"], "correct answer")
    options = [right, *(text_of(values[f"incorrect{place}"], "incorrect answer") for place in (1, 2, 3))]
    order = rng.permutation(len(options))
    return Example(
        prompt=with_options(text_of(values["question"], "question"), [options[place] for place in order]),
        truth=_LETTERS[int(np.flatnonzero(order == 0)[0])],
        grader="choice",
        options=len(options),
        id=id_of(values),
    )


def short_text(values: Mapping[str, Any], rng: np.random.Generator) -> Example:
    """Makes an example of a question whose answer is a short text."""
    question, answer = text_of(values["question"], "question"), text_of(values["answer"], "answer")
    return Example(prompt=question, truth=answer, grader="text", id=id_of(values))


def exam_question(values: Mapping[str, Any], rng: np.random.Generator) -> Example:
    """Makes an example of a question of HLE that needs no picture."""
    if values.get("image"):
        raise SkippedRow("the question has an image")
    kind = text_of(values["answer_type"], "answer_type")
    if kind not in ("exactMatch", "multipleChoice"):
        raise SkippedRow("answer_type is neither exactMatch nor multipleChoice")
    answer = text_of(values["answer"], "answer")
    lettered = kind == "multipleChoice" and answer in list(_LETTERS)
    return Example(
        prompt=text_of(values["question"], "question"),
        truth=answer if lettered else truth_of(answer, "answer"),
        grader="choice" if lettered else "exact",
        id=id_of(values),
    )


SUPERGPQA = DataSet(
    name="supergpqa",
    ability="science",
    grader="choice",
    fields=(
        Field("question", ("question",)),
        Field("options", ("options",), "list of str"),
        Field("answer_letter", ("answer_letter",), "A to J"),
        Field("id", ("uuid",), required=False),
    ),
    build=listed_choice,
    tags=("discipline", "field", "subfield", "difficulty", "is_calculation"),
    instruction=CHOICE_INSTRUCTION,
    hub="m-a-p/SuperGPQA",
    licence="ODC-BY",
)
GPQA = DataSet(
    name="gpqa",
    ability="science",
    grader="choice",
    fields=(
        Field("question", ("Question",)),
        Field("correct", ("Correct Answer",)),
        *(Field(f"incorrect{place}", (f"Incorrect Answer {place}",)) for place in (1, 2, 3)),
        Field("id", ("Record ID",), required=False),
    ),
    build=shuffled_choice,
    tags=("High-level domain", "Subdomain"),
    instruction=CHOICE_INSTRUCTION,
    hub="Idavidrein/gpqa",
    subset="gpqa_diamond",
    licence="CC-BY-4.0, access on request",
)
SIMPLEQA = DataSet(
    name="simpleqa",
    ability="knowledge",
    grader="text",
    fields=(Field("question", ("problem", "question")), Field("answer", ("answer",))),
    build=short_text,
    tags=("metadata",),
    instruction=TEXT_INSTRUCTION,
    hub="basicv8vc/SimpleQA",
    split="test",
    licence="MIT",
)
HLE = DataSet(
    name="hle",
    ability="knowledge",
    grader="exact",
    fields=(
        Field("question", ("question",)),
        Field("answer", ("answer",)),
        Field("answer_type", ("answer_type",), "exactMatch or multipleChoice"),
        Field("image", ("image",), "str, empty for none", required=False),
        Field("id", ("id",), required=False),
    ),
    build=exam_question,
    tags=("category", "raw_subject"),
    instruction=EXACT_INSTRUCTION,
    hub="cais/hle",
    split="test",
    licence="MIT, access on request",
)
SETS = (SUPERGPQA, GPQA, SIMPLEQA, HLE)
