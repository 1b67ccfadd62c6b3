# SPDX-License-Identifier: Apache-2.0
"""Labels prompts by the majority among several answers of a model, and keeps the share of the votes.

Answers vote together if math-verify takes them for the same; letters and normalised texts, if they are equal. An
answer is compared with the first of each class, in the order of the samples. The share is the largest class over all
samples, those without an answer included. A tie goes to the class whose first answer came first, and the row's
``vote_tie`` says so.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from verl_dvpo.bench.data.answers import chosen_letter, normalised, short_answer
from verl_dvpo.bench.data.equivalence import are_equal, read_answer, require_math_verify
from verl_dvpo.bench.data.registry import set_of
from verl_dvpo.bench.data.schema import ROW_SCHEMA
from verl_dvpo.bench.data.sources import Row, read_rows

#: What labelling adds to the columns of ``ROW_SCHEMA``.
VOTE_SCHEMA = pa.schema(
    [
        *ROW_SCHEMA,
        ("vote_share", pa.float64()),
        ("vote_count", pa.int64()),
        ("num_samples", pa.int64()),
        ("vote_tie", pa.bool_()),
    ]
)
TIES = ("first", "drop")


@dataclass(frozen=True)
class Vote:
    """The result for one prompt.

    Attributes:
        answer: the majority's, as its first sample wrote it; None if no sample has an answer.
        count: samples that gave it.
        samples: all samples.
        tie: whether another answer has as many.
    """

    answer: str | None
    count: int
    samples: int
    tie: bool

    @property
    def share(self) -> float:
        """The majority's share of all samples, in [0, 1]."""
        return self.count / self.samples if self.samples else 0.0


@dataclass(frozen=True)
class Labelled:
    """Rows with new labels, and how many were left out.

    Attributes:
        rows: of ``VOTE_SCHEMA``.
        no_answer: prompts without any answer.
        tied: prompts that were left out for a tie.
        below: prompts whose share is too small.
        agree: rows whose label is as it was, of those that had one.
        had_label: rows that had a label.
    """

    rows: list[Row]
    no_answer: int
    tied: int
    below: int
    agree: int
    had_label: int


def count_votes(responses: Sequence[str], *, grader: str, options: int = 0) -> Vote:
    """Returns the majority's answer among the responses to one prompt.

    Args:
        responses: of a model.
        grader: the row's rule: math, exact, choice or text.
        options: number of options of a multiple choice; 0 for any.

    Raises:
        ValueError: the rule has no answers that could be compared.
    """
    read, same = _rules(grader, options)
    firsts: list[Any] = []
    counts: list[int] = []
    texts: list[str] = []
    for response in responses:
        found = read(response)
        if found is None:
            continue
        answer, text = found
        place = next((place for place, first in enumerate(firsts) if same(first, answer)), None)
        if place is None:
            firsts.append(answer)
            texts.append(text)
            counts.append(1)
        else:
            counts[place] += 1
    if not counts:
        return Vote(None, 0, len(responses), False)
    most = max(counts)
    return Vote(texts[counts.index(most)], most, len(responses), counts.count(most) > 1)


def label(
    rows: Sequence[Row], samples: Sequence[Sequence[str]], *, min_share: float = 0.0, ties: str = "first"
) -> Labelled:
    """Gives each row the majority's answer as its ground truth.

    Args:
        rows: of ``ROW_SCHEMA``.
        samples: the responses to each row, in the same order.
        min_share: smallest share in [0, 1] of a row that is kept.
        ties: ``first`` takes the answer that came first, ``drop`` leaves the row out.

    Raises:
        ValueError: a value is out of its range, or a row's rule has no answers.
    """
    if not 0.0 <= min_share <= 1.0:
        raise ValueError(f"min_share is {min_share}; it must be in [0, 1]; choose a share")
    if ties not in TIES:
        raise ValueError(f"ties is {ties!r}; {' and '.join(TIES)} are allowed; choose one of them")
    kept: list[Row] = []
    left = {"no_answer": 0, "tied": 0, "below": 0}
    agree = had_label = 0
    for row, responses in zip(rows, samples, strict=True):
        grader = row["extra_info"]["grader"] or set_of(row["data_source"]).grader
        options = row["extra_info"]["options"] or 0
        vote = count_votes(responses, grader=grader, options=options)
        reason = _reason(vote, min_share, ties)
        if reason is not None:
            left[reason] += 1
            continue
        truth = row["reward_model"]["ground_truth"]
        had_label += bool(truth)
        agree += bool(truth) and _agrees(truth, vote, grader, options)
        kept.append(_relabelled(row, vote))
    return Labelled(kept, **left, agree=agree, had_label=had_label)


def read_samples(path: Path, rows: Sequence[Row]) -> list[list[str]]:
    """Returns the responses to each row from a file of samples.

    The file has a column ``index`` (``extra_info.index`` of the row) or ``id``, and ``responses`` (a list) or
    ``response`` (one sample a line, as many lines as samples).

    Raises:
        ValueError: a column is missing, a value is of another type, or a row has no samples.
    """
    lines = read_rows(path)
    present = {name for line in lines for name in line}
    key = next((name for name in ("index", "id") if name in present), None)
    column = next((name for name in ("responses", "response") if name in present), None)
    for found, wanted in ((key, "index or id"), (column, "responses or response")):
        if found is None:
            raise ValueError(
                f"column {wanted} is missing, {path} has {', '.join(sorted(present)) or 'none'}; samples need index "
                "(int) or id (str), and responses (list of str) or response (str); rename its columns"
            )
    by_key: dict[str, list[str]] = {}
    for line in lines:
        value = line.get(column or "")
        texts: list[Any] = value if isinstance(value, list) else [value]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{column} is {value!r} in {path}; text is allowed; correct the file")
        by_key.setdefault(str(line.get(key or "")), []).extend(texts)
    found_rows = [by_key.get(str(row["extra_info"][key or "index"])) for row in rows]
    missing = [row["extra_info"][key or "index"] for row, found in zip(rows, found_rows, strict=True) if not found]
    if missing:
        raise ValueError(
            f"samples is {str(path)!r}; {len(missing)} of {len(rows)} prompts have none there, the first is {key} "
            f"{missing[0]!r}; sample them too, or label fewer prompts"
        )
    return [found or [] for found in found_rows]


def _rules(grader: str, options: int) -> tuple[Callable[[str], tuple[Any, str] | None], Callable[[Any, Any], bool]]:
    """Returns how a response is read, as answer and text, and how two answers are compared."""
    if grader == "choice":
        return lambda response: _twice(chosen_letter(response, options)), lambda first, other: first == other
    if grader == "text":
        return _read_text, lambda first, other: first == other
    if grader in ("math", "exact"):
        require_math_verify()
        return _read_math, are_equal
    raise ValueError(f"grader is {grader!r}; math, exact, choice and text can be voted on; leave such rows out")


def _twice(letter: str | None) -> tuple[str, str] | None:
    return None if letter is None else (letter, letter)


def _read_text(response: str) -> tuple[str, str] | None:
    said = short_answer(response)
    return None if said is None or not normalised(said) else (normalised(said), said)


def _read_math(response: str) -> tuple[Any, str] | None:
    found = read_answer(response)
    return None if found is None else (found, found.text)


def _reason(vote: Vote, min_share: float, ties: str) -> str | None:
    if vote.answer is None:
        return "no_answer"
    if vote.tie and ties == "drop":
        return "tied"
    return "below" if vote.share < min_share else None


def _agrees(truth: str, vote: Vote, grader: str, options: int) -> bool:
    read, same = _rules(grader, options)
    boxed = [read(f"\\boxed{{{text}}}") for text in (truth, vote.answer)]
    return all(each is not None for each in boxed) and same(*(each[0] for each in boxed if each is not None))


def _relabelled(row: Row, vote: Vote) -> Row:
    info = row["extra_info"]
    before = info["original_truth"] or row["reward_model"]["ground_truth"]
    return {
        **row,
        "reward_model": {**row["reward_model"], "ground_truth": vote.answer},
        "extra_info": {**info, "original_truth": before},
        "vote_share": vote.share,
        "vote_count": vote.count,
        "num_samples": vote.samples,
        "vote_tie": vote.tie,
    }


def summary(labelled: Labelled) -> Iterable[str]:
    """Says in lines what was labelled and what was left out."""
    counts = {each.name: getattr(labelled, each.name) for each in dataclasses.fields(labelled) if each.name != "rows"}
    total = len(labelled.rows) + counts["no_answer"] + counts["tied"] + counts["below"]
    yield f"labelled {len(labelled.rows)} of {total} prompts"
    yield (
        f"  left out: {counts['no_answer']} without an answer, {counts['tied']} tied, "
        f"{counts['below']} below the smallest share"
    )
    if labelled.had_label:
        yield f"  the majority agrees with the label that was there in {labelled.agree} of {labelled.had_label}"
