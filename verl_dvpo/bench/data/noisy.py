# SPDX-License-Identifier: Apache-2.0
"""Published sets with noisy labels or noisy verifiers.

- ``rlvr_noisy`` (arXiv 2603.16140): questions with a right and a verified wrong answer.
- ``olr`` (arXiv 2604.03993): rows in verl's schema whose label is wrong for a share of the prompts; some of these
  labels are ``__NoCorrectAnswer__``, which no response matches.
- ``tinyv`` (arXiv 2505.14625): prompts whose right answers rule verifiers reject, with what two verifiers said.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from verl_dvpo.bench.data.mathematics import INSTRUCTION, problem_and_answer, truth_of
from verl_dvpo.bench.data.schema import DataSet, Example, Field, SkippedRow, text_of

#: The label of OLR's rows that have no right answer.
NO_CORRECT_ANSWER = "__NoCorrectAnswer__"


def right_and_wrong(values: Mapping[str, Any], rng: np.random.Generator) -> Example:
    """Makes an example of a question with a right and a wrong answer."""
    right = truth_of(values["right"], "right answer")
    return Example(
        prompt=text_of(values["question"], "question"),
        truth=right,
        wrong=truth_of(values["wrong"], "wrong answer"),
        original=right,
        grader="math",
    )


def messages_of(value: Any, what: str) -> list[dict[str, str]]:
    """Returns chat messages as role and content.

    Raises:
        SkippedRow: they are none, or the last one is not the user's.
    """
    if not isinstance(value, list) or not value or not all(isinstance(each, dict) for each in value):
        raise SkippedRow(f"{what} is no list of messages")
    messages = [{"role": str(each.get("role")), "content": str(each.get("content"))} for each in value]
    if messages[-1]["role"] != "user":
        raise SkippedRow(f"{what} does not end with the user")
    return messages


def verl_row(values: Mapping[str, Any], rng: np.random.Generator) -> Example:
    """Makes an example of a row in verl's schema; the prompt stays as it was published."""
    label, info = values["reward_model"], values.get("extra_info")
    if not isinstance(label, dict):
        raise SkippedRow("reward_model is no struct")
    info = info if isinstance(info, dict) else {}
    original = info.get("original_ground_truth")
    index = info.get("index")
    return Example(
        prompt=messages_of(values["prompt"], "prompt"),
        truth=truth_of(label.get("ground_truth"), "ground_truth"),
        original=None if original is None else str(original).strip(),
        grader="math",
        id="" if index is None else str(index),
    )


_VERL_FIELDS = (
    Field("prompt", ("prompt",), "list of {role, content}"),
    Field("reward_model", ("reward_model", "reward_spec"), "{ground_truth, ...}"),
    Field("extra_info", ("extra_info",), "{index, original_ground_truth}", required=False),
)

RLVR_NOISY = DataSet(
    name="rlvr_noisy",
    ability="math",
    grader="math",
    fields=(
        Field("question", ("question",)),
        Field("right", ("groundtruth_answer",)),
        Field("wrong", ("incorrect_answer",)),
    ),
    build=right_and_wrong,
    instruction=INSTRUCTION,
    hub="uiuc-kang-lab/DeepScaleR-Qwen2.5-Math-7B-Incorrect-Answers",
)
OLR = DataSet(
    name="olr",
    ability="math",
    grader="math",
    fields=_VERL_FIELDS,
    build=verl_row,
    licence="Apache-2.0",
)
_TINYV_TAGS = ("source", "domain", "llama8b_solve_rate", "prime_correctness", "llm_verifier_is_correct", "fn_output")
TINYV = DataSet(
    name="tinyv",
    ability="math",
    grader="math",
    fields=(
        Field("problem", ("problem", "question")),
        Field("answer", ("answer", "ground_truth")),
        Field("id", ("id",), "int", required=False),
    ),
    build=problem_and_answer,
    tags=_TINYV_TAGS,
    instruction=INSTRUCTION,
    hub="zhangchenxu/bigmath_tinyv_filtered",
    licence="MIT (the repository; none stated for the set)",
    alternative=DataSet(
        name="tinyv", ability="math", grader="math", fields=_VERL_FIELDS, build=verl_row, tags=_TINYV_TAGS
    ),
)
SETS = (RLVR_NOISY, OLR, TINYV)
