# SPDX-License-Identifier: Apache-2.0
"""Letters of options and identifiers, by hand-made rows."""

import numpy as np
import pytest

from verl_dvpo.bench.data.knowledge import exam_question, listed_choice
from verl_dvpo.bench.data.schema import SkippedRow

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("letter", ["AB", "E", "CD"])
def test_an_answer_is_one_of_the_letters(letter):
    row = {"question": "Which?", "options": ["one", "two", "three", "four"], "answer_letter": letter}
    with pytest.raises(SkippedRow, match="no option's letter"):
        listed_choice(row, RNG)


def test_an_exam_s_answer_of_several_letters_is_compared_as_text():
    row = {"question": "Which two?", "answer_type": "multipleChoice", "answer": "BC", "image": ""}
    assert exam_question(row, RNG).grader == "exact"
    assert exam_question({**row, "answer": "B"}, RNG).grader == "choice"


@pytest.mark.parametrize(("given", "kept"), [(0, "0"), ("x7", "x7"), (None, ""), ("", "")])
def test_the_first_row_s_number_is_an_identifier(given, kept):
    row = {"question": "Which?", "options": ["one", "two"], "answer_letter": "A", "id": given}
    assert listed_choice(row, RNG).id == kept
