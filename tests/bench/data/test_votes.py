# SPDX-License-Identifier: Apache-2.0
"""Votes against examples worked by hand."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from published import PUBLISHED

from verl_dvpo.bench.data.commands import pseudo_labels
from verl_dvpo.bench.data.prepare import Options, prepare
from verl_dvpo.bench.data.registry import set_of
from verl_dvpo.bench.data.votes import count_votes, label, read_samples

#: Three classes: 1/2 (four ways to write it), 2 (two), and 7; one sample has no answer.
#: The majority has 4 of 8 samples: a share of 0.5. Strings alone would give 2 of 8, a tie of 2 and \frac12.
WORKED = [
    r"\boxed{2}",
    r"I get \boxed{\frac12}.",
    r"\boxed{0.5}",
    r"\boxed{2.0}",
    r"\boxed{\frac{1}{2}}",
    "I cannot say.",
    r"<think>\boxed{7}</think>\boxed{\frac{2}{4}}",
    r"\boxed{7}",
]


def test_the_worked_example():
    vote = count_votes(WORKED, grader="math")
    assert (vote.answer, vote.count, vote.samples, vote.tie) == (r"\frac12", 4, 8, False)
    assert vote.share == 0.5


def test_a_tie_goes_to_the_answer_that_came_first():
    vote = count_votes([r"\boxed{3}", r"\boxed{4}", r"\boxed{4.0}", r"\boxed{3}"], grader="math")
    assert (vote.answer, vote.count, vote.share, vote.tie) == ("3", 2, 0.5, True)
    vote = count_votes(["Answer: B", "Answer: A", "Answer: A", "Answer: B", "x"], grader="choice", options=4)
    assert (vote.answer, vote.count, vote.share, vote.tie) == ("B", 2, 0.4, True)


def test_letters_and_texts():
    vote = count_votes(["Answer: C", "(C)", "Answer: E", "Answer: E", "Answer: E"], grader="choice", options=4)
    assert (vote.answer, vote.count, vote.share) == ("C", 2, 0.4)
    vote = count_votes(["Answer: the Rhine", "Answer: Main", "Rhine."], grader="text")
    assert (vote.answer, vote.count) == ("the Rhine", 2)


def test_nothing_to_vote_on():
    vote = count_votes(["none", ""], grader="math")
    assert (vote.answer, vote.count, vote.share, vote.tie) == (None, 0, 0.0, False)
    assert count_votes([], grader="choice").share == 0.0
    with pytest.raises(ValueError, match="grader is 'dialogue'"):
        count_votes(["a"], grader="dialogue")


def prepared(tmp_path, name="rlvr_noisy"):
    source = tmp_path / "source.json"
    source.write_text(json.dumps(PUBLISHED[name]))
    prepare(set_of(name), tmp_path, Options(source=str(source), limit=4))
    return tmp_path / f"{name}.parquet"


#: For the questions n + 2, n = 0..3, whose labels are n + 3: 3 of 4 for 2; 2 of 4 for 4; a tie of 4 and 9; none.
ANSWERS = [
    ["\\boxed{2}", "\\boxed{2}", "\\boxed{3}", "\\boxed{2}"],
    ["\\boxed{4}", "no", "\\boxed{3}", "\\boxed{4}"],
    ["\\boxed{4}", "\\boxed{9}", "\\boxed{9}", "\\boxed{4}"],
    ["?", "?", "?", "?"],
]


def test_labels_shares_and_what_was_before(tmp_path):
    rows = pq.read_table(prepared(tmp_path)).to_pylist()
    done = label(rows, ANSWERS)
    assert [row["reward_model"]["ground_truth"] for row in done.rows] == ["2", "4", "4"]
    assert [row["vote_share"] for row in done.rows] == [0.75, 0.5, 0.5]
    assert [row["vote_tie"] for row in done.rows] == [False, False, True]
    assert [row["extra_info"]["original_truth"] for row in done.rows] == ["2", "3", "4"]
    assert (done.no_answer, done.tied, done.below) == (1, 0, 0)
    assert (done.agree, done.had_label) == (1, 3)


@pytest.mark.parametrize(
    ("min_share", "ties", "kept", "left"),
    [
        (0.5, "first", 3, (1, 0, 0)),
        (0.51, "first", 1, (1, 0, 2)),
        (0.5, "drop", 2, (1, 1, 0)),
        (1.0, "drop", 0, (1, 1, 2)),
    ],
)
def test_the_filters(min_share, ties, kept, left, tmp_path):
    rows = pq.read_table(prepared(tmp_path)).to_pylist()
    done = label(rows, ANSWERS, min_share=min_share, ties=ties)
    assert len(done.rows) == kept
    assert (done.no_answer, done.tied, done.below) == left


@pytest.mark.parametrize("shape", ["list", "lines", "parquet"])
def test_the_command_with_saved_samples(shape, tmp_path, capsys):
    data = prepared(tmp_path)
    lists = [{"index": place, "responses": texts} for place, texts in enumerate(ANSWERS)]
    samples = tmp_path / ("samples.parquet" if shape == "parquet" else "samples.jsonl")
    if shape == "parquet":
        pq.write_table(pa.Table.from_pylist(lists[::-1]), samples)
    else:
        lines = [{"index": one["index"], "response": text} for one in lists for text in one["responses"]]
        samples.write_text("\n".join(json.dumps(one) for one in (lines if shape == "lines" else lists)))
    pseudo_labels(data, tmp_path / "new/votes.parquet", samples, min_share=0.6)
    table = pq.read_table(tmp_path / "new/votes.parquet")
    assert table.column("vote_share").to_pylist() == [0.75]
    assert table.column("vote_count").to_pylist() == [3]
    assert table.column("num_samples").to_pylist() == [4]
    assert table.column("reward_model").to_pylist() == [{"style": "rule", "ground_truth": "2"}]
    shown = capsys.readouterr().out
    assert "labelled 1 of 4 prompts" in shown
    assert "left out: 1 without an answer, 0 tied, 2 below the smallest share" in shown


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"responses": ["a"]}], "column index or id is missing"),
        ([{"index": 0, "text": "a"}], "column responses or response is missing"),
        ([{"index": 0, "responses": [1]}], r"responses is \[1\]"),
        ([{"index": 0, "response": "a"}], "3 of 4 prompts have none there, the first is index 1"),
    ],
)
def test_samples_that_do_not_fit(lines, message, tmp_path):
    rows = pq.read_table(prepared(tmp_path)).to_pylist()
    path = tmp_path / "samples.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    with pytest.raises(ValueError, match=message):
        read_samples(path, rows)


def test_mistakes_of_the_command(tmp_path):
    data, out = prepared(tmp_path), tmp_path / "votes.parquet"
    with pytest.raises(ValueError, match="exactly one of them is allowed"):
        pseudo_labels(data, out)
    with pytest.raises(ValueError, match="exactly one of them is allowed"):
        pseudo_labels(data, out, tmp_path / "a.jsonl", "model")
    with pytest.raises(ValueError, match="there is none"):
        pseudo_labels(data, out, tmp_path / "missing.jsonl")
    with pytest.raises(ValueError, match="column 'data_source' is missing"):
        pseudo_labels(tmp_path / "source.json", out, tmp_path / "missing.jsonl")
    samples = tmp_path / "samples.jsonl"
    samples.write_text("\n".join(json.dumps({"index": place, "response": "?"}) for place in range(4)))
    with pytest.raises(ValueError, match="no prompt is left"):
        pseudo_labels(data, out, samples)
    for name, value in (("min_share", 2.0), ("ties", "last")):
        with pytest.raises(ValueError, match=f"{name} is"):
            pseudo_labels(data, out, samples, **{name: value})
    for name, value in (("num_samples", 0), ("temperature", -1.0), ("top_p", 0.0)):
        with pytest.raises(ValueError, match=f"{name} is"):
            pseudo_labels(data, out, model="model", **{name: value})
    assert not out.exists()
