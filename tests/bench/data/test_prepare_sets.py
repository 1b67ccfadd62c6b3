# SPDX-License-Identifier: Apache-2.0
"""Each set's published columns become rows that verl reads, and what is missing is named before anything is written."""

import csv
import json
import os
import subprocess
import sys
from importlib import metadata

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from published import PUBLISHED

from verl_dvpo import cli
from verl_dvpo.bench.data.commands import data
from verl_dvpo.bench.data.prepare import Options, prepare
from verl_dvpo.bench.data.registry import SETS, set_of
from verl_dvpo.bench.data.schema import ROW_SCHEMA
from verl_dvpo.bench.tasks.tokenizer import build_tokenizer


def write(path, rows):
    """Writes rows in the format of the path's suffix."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        lines = [json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) if path.suffix == ".jsonl" else f"[{','.join(lines)}]")
    return str(path)


def made(name, tmp_path, rows=None, suffix=".jsonl", **options):
    """Prepares a set and returns its rows."""
    source = write(tmp_path / f"source{suffix}", PUBLISHED[name] if rows is None else rows)
    prepare(set_of(name), tmp_path / "out", Options(source=source, **options))
    return pq.read_table(tmp_path / "out" / f"{name}.parquet").to_pylist()


def test_every_set_has_rows_here():
    assert set(PUBLISHED) == set(SETS)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json"])
@pytest.mark.parametrize("name", SETS)
def test_every_set_from_every_format(name, suffix, tmp_path):
    rows = made(name, tmp_path, suffix=suffix)
    usable = [row for row in PUBLISHED[name] if not row.get("image")]
    assert len(rows) == len(usable)
    table = pq.read_schema(tmp_path / "out" / f"{name}.parquet")
    assert table.equals(ROW_SCHEMA)
    for row in rows:
        assert row["data_source"] == name
        assert row["ability"] == SETS[name].ability
        assert row["prompt"][-1]["role"] == "user"
        assert row["reward_model"]["style"] == "rule"
        assert row["reward_model"]["ground_truth"]


@pytest.mark.parametrize("name", ["gpqa", "simpleqa", "supergpqa", "math500", "rlvr_noisy"])
def test_csv_gives_the_same_prompts_and_answers(name, tmp_path):
    found = []
    for suffix in (".csv", ".jsonl"):
        rows = made(name, tmp_path, suffix=suffix, overwrite=True)
        found.append([(row["prompt"], row["reward_model"], row["extra_info"]["options"]) for row in rows])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("name", "index", "words", "truth"),
    [
        ("light_r1", 3, "Add 3 and 3.", "6"),
        ("math500", 0, "What is $1/2$?", "\\frac{1}{2}"),
        ("aime24", 1, "Find 61.", "061"),
        ("minerva_math", 0, "How fast is light, in m/s?", "3e8"),
        ("amc23", 0, "What is 9 times 3?", "27"),
        ("supergpqa", 2, "Which is the number 2?\n\nA) one\nB) two\nC) three\nD) four\nE) five", "C"),
        ("simpleqa", 0, "Which river flows through Bonn?", "The Rhine"),
        ("hle", 1, "Pick.\nA. x\nB. y", "B"),
        ("rlvr_noisy", 4, "What is 4 + 2?", "7"),
        ("tinyv", 0, "Write one percent.", "1\\%"),
    ],
)
def test_prompt_and_truth(name, index, words, truth, tmp_path):
    row = made(name, tmp_path)[index]
    assert row["prompt"] == [{"role": "user", "content": f"{words}\n\n{SETS[name].instruction}"}]
    assert row["reward_model"]["ground_truth"] == truth
    assert row["extra_info"]["index"] == index


def test_tags_and_ids_are_kept(tmp_path):
    row = made("math500", tmp_path)[1]
    assert row["extra_info"]["id"] == "test/prealgebra/3.json"
    assert json.loads(row["extra_info"]["tags"]) == {"subject": "Prealgebra", "level": 1}


def test_the_options_of_gpqa_are_shuffled_by_the_seed(tmp_path):
    rows = made("gpqa", tmp_path)
    letters = [row["reward_model"]["ground_truth"] for row in rows]
    assert len(set(letters)) > 1
    for row, letter in zip(rows, letters, strict=True):
        assert f"\n{letter}) this one\n" in row["prompt"][0]["content"]
        assert sorted(line[3:] for line in row["prompt"][0]["content"].splitlines()[2:6]) == [
            "never this",
            "nor this",
            "not this",
            "this one",
        ]
    assert made("gpqa", tmp_path, overwrite=True) == rows
    assert made("gpqa", tmp_path, overwrite=True, seed=1) != rows


def test_published_messages_stay_as_they_are(tmp_path):
    row = made("olr", tmp_path)[1]
    assert row["prompt"] == [
        {"role": "system", "content": "Box the answer."},
        {"role": "user", "content": "What is 1 + 1?"},
    ]
    assert row["extra_info"]["id"] == "41"


def test_olr_says_which_labels_are_noisy(tmp_path):
    rows = made("olr", tmp_path)
    labels = [(row["reward_model"]["ground_truth"], row["extra_info"]["original_truth"]) for row in rows]
    assert labels == [("__NoCorrectAnswer__", "1"), ("2", "2"), ("__NoCorrectAnswer__", "3"), ("4", "4")]
    assert json.loads((tmp_path / "out/olr.json").read_text())["noisy_labels"] == 2


@pytest.mark.parametrize(("share", "noisy"), [(None, 10), (1.0, 10), (0.3, 3), (0.0, 0)])
def test_the_share_of_wrong_labels_is_exact(share, noisy, tmp_path):
    rows = made("rlvr_noisy", tmp_path, noise_share=share)
    wrong = [row["reward_model"]["ground_truth"] != row["extra_info"]["original_truth"] for row in rows]
    assert sum(wrong) == noisy
    assert [row["extra_info"]["original_truth"] for row in rows] == [str(number + 2) for number in range(10)]


def test_the_repositorys_rows_of_tinyv_and_rlvr_noisy(tmp_path):
    rows = made("tinyv", tmp_path, rows=[{**row, "prime_correctness": False} for row in PUBLISHED["olr"]])
    assert [row["data_source"] for row in rows] == ["tinyv"] * 4
    assert json.loads(rows[0]["extra_info"]["tags"]) == {"prime_correctness": False}


def test_rows_that_cannot_be_used_are_counted(tmp_path, capsys):
    question, answer = PUBLISHED["light_r1"][0]["conversations"]
    rows = [
        *PUBLISHED["light_r1"],
        {"conversations": [question]},
        {"conversations": [question, {"from": "assistant", "value": "I do not know."}]},
        {"conversations": [question, {"from": "assistant", "value": "<think>So \\boxed{4}"}]},
        {"conversations": None},
        {"conversations": [{"from": "user", "value": "  "}, answer]},
    ]
    data("light_r1", tmp_path / "out", write(tmp_path / "source.jsonl", rows))
    shown = capsys.readouterr().out
    assert "6 rows in" in shown
    assert "left out 2: the worked answer has no box" in shown
    assert "left out 1: conversations is not a question and an answer" in shown
    assert "left out 1: conversations is no list of turns" in shown
    assert "left out 1: question is empty" in shown


def test_rows_are_held_out(tmp_path):
    train = made("light_r1", tmp_path, num_val=2)
    val = pq.read_table(tmp_path / "out/light_r1_val.parquet").to_pylist()
    assert sorted(row["extra_info"]["index"] for row in [*train, *val]) == list(range(6))
    assert [row["extra_info"]["split"] for row in val] == ["val", "val"]
    assert len(made("light_r1", tmp_path, overwrite=True)) == 6
    assert not (tmp_path / "out/light_r1_val.parquet").exists()


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    write(folder / "b.json", PUBLISHED["aime24"][1:])
    write(folder / "a.parquet", PUBLISHED["aime24"][:1])
    prepare(set_of("aime24"), tmp_path / "out", Options(source=str(folder)))
    rows = pq.read_table(tmp_path / "out/aime24.parquet").to_pylist()
    assert [row["reward_model"]["ground_truth"] for row in rows] == ["060", "061"]


def test_columns_by_another_name(tmp_path):
    rows = [{"frage": "1+1?", "antwort": "2"}]
    source = write(tmp_path / "source.jsonl", rows)
    data("math500", tmp_path / "out", source, column=["problem=frage", "answer=antwort"], instruction="Say it.")
    row = pq.read_table(tmp_path / "out/math500.parquet").to_pylist()[0]
    assert row["prompt"] == [{"role": "user", "content": "1+1?\n\nSay it."}]
    assert row["reward_model"]["ground_truth"] == "2"


def without(name, column):
    return [{key: value for key, value in row.items() if key != column} for row in PUBLISHED[name]]


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("light_r1", "conversations"),
        ("supergpqa", "options"),
        ("supergpqa", "answer_letter"),
        ("service_dialogue", "goal"),
        ("math500", "answer"),
        ("aime24", "problem"),
        ("minerva_math", "question"),
        ("amc23", "answer"),
        ("simpleqa", "problem"),
        ("gpqa", "Incorrect Answer 3"),
        ("hle", "answer_type"),
        ("rlvr_noisy", "incorrect_answer"),
        ("olr", "reward_model"),
        ("tinyv", "answer"),
    ],
)
def test_a_missing_column_is_named_and_nothing_is_written(name, column, tmp_path):
    rows = [row or {"other": 1} for row in without(name, column)]
    with pytest.raises(ValueError, match=f"column '{column}' is missing") as error:
        made(name, tmp_path, rows=rows)
    assert SETS[name].schema in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": {"problem": "task"}}, "column is 'problem=task'; the source has problem, solution"),
        ({"columns": {"title": "problem"}}, "column is 'title=problem'; math500 has the fields problem, answer, id"),
        ({"num_val": 3}, "num_val is 3; only 3 rows"),
        ({"num_val": -1}, "num_val is -1; it must be at least 0"),
        ({"limit": 0}, "limit is 0; it must be at least 1"),
        ({"noise_share": 0.5}, "math500 has no wrong answers of its own"),
        ({"noise_share": 1.5}, r"noise_share is 1.5; it must be in \[0, 1\]"),
    ],
)
def test_options_that_cannot_be(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        made("math500", tmp_path, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"", "empty.jsonl", "it holds no rows"),
        (b"{", "broken.jsonl", "it cannot be read"),
        (b"{}", "object.json", "it holds a dict in place of a list of rows"),
        (b"[1]", "number.json", "it holds a int; each row has to be an object"),
        (b"PAR1", "cut.parquet", "it cannot be read"),
        (b"\xff\xfe", "bytes.csv", "it cannot be read"),
        (b"text", "notes.txt", "convert it to one of these"),
    ],
)
def test_files_that_cannot_be_read(content, name, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        prepare(set_of("math500"), tmp_path / "out", Options(source=str(tmp_path / name)))
    assert not (tmp_path / "out").exists()


def test_other_mistakes(tmp_path):
    with pytest.raises(ValueError, match="NAME is 'math'; the sets are light_r1"):
        data("math")
    with pytest.raises(ValueError, match="there is no such file or folder"):
        prepare(set_of("math500"), tmp_path, Options(source="missing.jsonl"))
    with pytest.raises(ValueError, match="olr is on no hub"):
        prepare(set_of("olr"), tmp_path, Options())
    made("math500", tmp_path)
    with pytest.raises(ValueError, match=r"math500\.parquet is there already"):
        made("math500", tmp_path)
    with pytest.raises(ValueError, match="FIELD=COLUMN is allowed"):
        data("math500", tmp_path, column=["problem"])


def test_the_sets_are_listed(capsys):
    data(None)
    shown = capsys.readouterr().out
    assert all(name in shown for name in SETS)
    assert "answer_letter (A to J)" in shown


def test_verl_reads_all_sets_together(tmp_path):
    from omegaconf import OmegaConf
    from verl.utils.dataset.rl_dataset import RLHFDataset

    files = []
    for name, rows in PUBLISHED.items():
        prepare(set_of(name), tmp_path, Options(source=write(tmp_path / f"{name}.source.jsonl", rows)))
        files.append(str(tmp_path / f"{name}.parquet"))
    config = OmegaConf.create({"max_prompt_length": 4096, "cache_dir": str(tmp_path / "cache")})
    dataset = RLHFDataset(files, build_tokenizer(max_length=4096), config)
    sources = [dataset[place]["data_source"] for place in range(len(dataset))]
    assert list(dict.fromkeys(sources)) == list(PUBLISHED)
    assert np.isin(["single_turn_agent", "service_dialogue_agent"], [row["agent_name"] for row in dataset]).all()


@pytest.fixture
def command_line(monkeypatch):
    """The command line with the two commands, whatever the installed metadata say."""
    entries = [
        metadata.EntryPoint(name, f"verl_dvpo.bench.data.commands:{function}", cli.GROUP)
        for name, function in (("data", "data"), ("pseudo-labels", "pseudo_labels"))
    ]
    monkeypatch.setattr(cli.metadata, "entry_points", lambda group: entries)
    return cli.main


def test_the_commands_say_mistakes_in_one_line(command_line, tmp_path, capsys):
    source = write(tmp_path / "source.jsonl", without("math500", "answer"))
    arguments = ["data", "math500", "--source", source, "--out", str(tmp_path / "out")]
    assert command_line(arguments) == 2
    shown = capsys.readouterr()
    (line,) = shown.err.splitlines()
    assert line.startswith("error: column 'answer' is missing, the source has problem, solution, subject, level")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="column 'answer' is missing"):
        command_line(["--debug", *arguments])
    assert command_line(["pseudo-labels", "--data", source, "--out", str(tmp_path / "votes.parquet")]) == 2


def test_the_command_line_prepares_a_set(command_line, tmp_path, capsys):
    source = write(tmp_path / "source.parquet", PUBLISHED["rlvr_noisy"])
    out = tmp_path / "out"
    assert command_line(["data", "rlvr_noisy", "--source", source, "--out", str(out), "--noise-share", "0.4"]) == 0
    shown = capsys.readouterr().out
    assert f"10 rows in {out}/rlvr_noisy.parquet" in shown
    assert "4 labels are other than the right answer" in shown
    assert json.loads((out / "rlvr_noisy.json").read_text())["noisy_labels"] == 4


def test_an_unreachable_hub_is_one_line(tmp_path):
    program = (
        "import sys; from verl_dvpo.bench.data.prepare import *; from verl_dvpo.bench.data.registry import set_of\n"
        "try: prepare(set_of('math500'), sys.argv[1], Options())\n"
        "except ValueError as error: print(error)"
    )
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "out")],
        env={**os.environ, **nowhere},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    (line,) = done.stdout.splitlines()
    assert line.startswith("source is 'HuggingFaceH4/MATH-500', split 'test'; there is no such path here, and the hub")
    assert not (tmp_path / "out").exists()
