# SPDX-License-Identifier: Apache-2.0
"""Judges tables written by hand, pairs runs of studies written by hand, and runs the command on a tiny task."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest

from verl_dvpo.bench.gate.commands import gate
from verl_dvpo.bench.gate.comparison import COLUMNS as COMPARED
from verl_dvpo.bench.gate.comparison import compare
from verl_dvpo.bench.gate.critics import critic_of
from verl_dvpo.bench.gate.policy import load_policy, parse_task
from verl_dvpo.bench.gate.report import markdown, read_table, replaced, write_report
from verl_dvpo.bench.gate.variance import ALL, AT, BETWEEN, COLUMNS, DEVIATION, FIRST, LENGTH, MEAN, SETTINGS
from verl_dvpo.bench.gate.verdict import FAILED, OPEN, PASSED, judge
from verl_dvpo.bench.study.config import parse_study
from verl_dvpo.bench.study.plan import plan
from verl_dvpo.bench.tasks.commands import exam_data

ALGORITHMS = ("ppo", "reinforce_plus_plus")
NO_SETTINGS = pd.DataFrame([("exam", "seeds", 3)], columns=SETTINGS)


def measured(*values: float, task: str = "exam", critic: str = "ppo") -> pd.DataFrame:
    """Explained variances of the seeds 0, 1, ..., with the other quantities that a report shows."""
    rows = []
    for seed, value in enumerate(values):
        rows += [(task, "", seed, name, math.nan, 0.5) for name in (BETWEEN, MEAN, DEVIATION)]
        rows += [(task, "", seed, LENGTH, math.nan, 2.0)]
        rows += [(task, critic, seed, FIRST, math.nan, value / 2), (task, critic, seed, ALL, math.nan, value)]
        rows += [(task, critic, seed, AT, float(place), value) for place in range(3)]
    return pd.DataFrame(rows, columns=COLUMNS)


def compared(*differences: float, task: str = "exam") -> pd.DataFrame:
    rows = [(task, "gate", seed, 0.5 + each, 0.5, each) for seed, each in enumerate(differences)]
    return pd.DataFrame(rows, columns=COMPARED)


NONE = compared()


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        # t intervals by hand, 2 degrees of freedom: 4.3027 * standard deviation / sqrt(3)
        ((0.30, 0.32, 0.34), PASSED),  # 0.32 ± 0.0497
        ((0.20, 0.24, 0.28), FAILED),  # 0.24 ± 0.0994: the mean alone is not enough
        ((0.10, 0.11, 0.12), FAILED),
        ((0.19, 0.19, 0.19), FAILED),
        ((0.9,), OPEN),  # one seed has no interval
    ],
)
def test_the_whole_interval_of_the_explained_variance_has_to_be_above_the_gate(values, verdict):
    (found,) = judge(measured(*values), NONE)
    assert found.variance == verdict
    assert found.explained.value == pytest.approx(sum(values) / len(values))
    assert (found.algorithms, found.pairs) == (OPEN, 0)


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [((0.02, 0.03, 0.04), PASSED), ((-0.01, 0.03, 0.04), FAILED), ((-0.02, -0.03, -0.04), FAILED), ((0.1,), OPEN)],
)
def test_the_whole_interval_of_the_difference_has_to_be_above_zero(differences, verdict):
    (found,) = judge(measured(0.5, 0.5), compared(*differences))
    assert (found.algorithms, found.pairs) == (verdict, len(differences))
    assert found.both == verdict  # the other part passed


@pytest.mark.parametrize(
    ("values", "differences", "verdict"),
    [
        ((0.1, 0.1), (0.1, 0.1), FAILED),
        ((0.1, 0.1), (), FAILED),
        ((0.5, 0.5), (), OPEN),
        ((), (0.1, 0.1), OPEN),
        ((0.5, 0.5), (0.1, 0.1), PASSED),
    ],
)
def test_a_failed_part_fails_the_task_and_an_open_part_leaves_it_open(values, differences, verdict):
    assert judge(measured(*values), compared(*differences))[0].both == verdict


def test_the_best_critic_is_that_of_the_highest_mean_and_tasks_are_judged_alone():
    tables = [measured(0.1, 0.9, critic="ppo"), measured(0.6, 0.6, critic="dvpo"), measured(0.0, 0.1, task="science")]
    exam, science = judge(pd.concat(tables), compared(0.1, 0.1, task="arithmetic"))[:2]
    assert (exam.task, exam.critic, exam.explained.value) == ("exam", "dvpo", pytest.approx(0.6))
    assert (science.task, science.variance) == ("science", FAILED)


def test_the_report_says_it_in_words_and_reads_back(tmp_path):
    table, pairs = measured(0.30, 0.32, 0.34), compared(0.02, 0.03, 0.04)
    path = write_report(tmp_path, settings=NO_SETTINGS, measured=table, compared=pairs, algorithms=ALGORITHMS)
    text = path.read_text()
    assert "`exam` **passed**; explained variance passed: `ppo` 0.320 [0.270, 0.370]" in text
    assert "`ppo` against `reinforce_plus_plus` passed: +0.030 [+0.005, +0.055], 3 pairs" in text
    assert "| `exam` | 0.500 ± 0.500 | 2.0 | 0.500 [0.500, 0.500] | `ppo` | 0.160 [0.135, 0.185] | 0.320" in text
    assert "| `exam` | gate | 3 | 0.530 | 0.500 | +0.030 [+0.005, +0.055] |" in text
    assert (tmp_path / "gate.png").read_bytes()[1:4] == b"PNG"
    files = {"settings.csv": SETTINGS, "variance.csv": COLUMNS, "comparison.csv": COMPARED}
    again = [read_table(tmp_path / name, columns) for name, columns in files.items()]
    assert markdown(*again, algorithms=ALGORITHMS) == text


def test_tables_keep_other_tasks_and_refuse_other_columns(tmp_path):
    old = pd.concat([measured(0.1), measured(0.2, task="science")], ignore_index=True)
    new = replaced(old, measured(0.7))
    kept = new[new["quantity"] == ALL]
    assert dict(zip(kept["task"], kept["value"], strict=True)) == {"science": 0.2, "exam": 0.7}
    assert read_table(tmp_path / "none.csv", COLUMNS).empty
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"other\.csv.*'a', 'b'"):
        read_table(tmp_path / "other.csv", COLUMNS)


def write_study(folder: Path, scores: dict[tuple[str, str, int], float | None]) -> Path:
    """Writes a study with finished runs: (algorithm, noise, seed) -> last score; None fails the run."""
    content = {
        "name": "small",
        "out": str(folder),
        "algorithms": sorted({algorithm for algorithm, _, _ in scores}),
        "noises": ["none", {"kind": "flip", "rate": 0.3}],
        "tasks": [{"name": "exam"}],
        "seeds": sorted({seed for _, _, seed in scores}),
        "steps": 4,
        "test_freq": 2,
    }
    study = parse_study(content)
    folder.mkdir(parents=True)
    (folder / "study.json").write_text(json.dumps(study.to_json()))
    for run in plan(study):
        key = (run.algorithm.name, "none" if run.noise.kind == "none" else "flip", run.seed)
        if key not in scores:
            continue
        run.folder.mkdir(parents=True)
        last = scores[key]
        status = "failed" if last is None else "finished"
        run.record.write_text(json.dumps({"status": status, "name": run.name, "seed": run.seed, "score": last}))
        lines = [{"step": 0, "data": {"val-core/exam/acc/mean@1": 0.1, "val-core/other/acc/mean@1": 0.9}}]
        lines += [{"step": 4, "data": {"val-core/exam/acc/mean@1": last or 0.0, "val-core/other/acc/mean@1": 0.9}}]
        run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_pairs_are_clean_runs_of_one_seed_in_the_domain(tmp_path):
    study = write_study(
        tmp_path / "study",
        {
            ("ppo", "none", 0): 0.8,
            ("ppo", "none", 1): 0.7,
            ("ppo", "none", 2): None,
            ("ppo", "none", 3): 0.9,
            ("ppo", "flip", 0): 0.2,
            ("reinforce_plus_plus", "none", 0): 0.75,
            ("reinforce_plus_plus", "none", 1): 0.72,
            ("reinforce_plus_plus", "none", 2): 0.6,
            ("reinforce_plus_plus", "flip", 0): 0.6,
            ("grpo", "none", 0): 0.5,
        },
    )
    found = compare([study], with_critic="ppo", without_critic="reinforce_plus_plus")
    assert found[["task", "study", "seed"]].to_numpy().tolist() == [["exam", "small", 0], ["exam", "small", 1]]
    assert found["difference"].tolist() == pytest.approx([0.05, -0.02])
    with pytest.raises(ValueError, match="finished clean runs of ppo and dvpo"):
        compare([study], with_critic="ppo", without_critic="dvpo")


def test_critics_are_those_that_runs_have():
    assert critic_of("ppo").family == "scalar"
    calibrated = critic_of("dvpo_calibrated")
    assert (calibrated.family, calibrated.levels, calibrated.kappa) == ("quantile_ensemble", "midpoint", 0.0)
    for name, says in (("grpo", "an algorithm with a critic"), ("nothing", "a name in config/algorithm")):
        with pytest.raises(ValueError, match=f"critic is '{name}'; {says}"):
            critic_of(name)


@pytest.mark.parametrize("text", ["exam", "exam=", "nothing=there", "dialogue=there"])
def test_what_is_no_task_and_folder_is_refused(text):
    with pytest.raises(ValueError, match=f"task is {text!r}; TASK=FOLDER is allowed"):
        parse_task(text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exam") / "data"
    exam_data(out=folder, tiny=True, steps=1)
    return folder


def test_a_policy_comes_with_the_prompts_of_its_folder(folder, tmp_path):
    policy = load_policy("exam", folder)
    assert (len(policy.train), len(policy.held_out), policy.longest) == (64, 16, 19)
    row = pd.read_parquet(folder / "val.parquet").iloc[3]
    assert policy.held_out[3].prompt == row["prompt"][0]["content"]
    assert policy.held_out[3].truth == row["reward_model"]["ground_truth"]
    for name, place in (("exam", tmp_path), ("science", folder)):
        with pytest.raises(ValueError, match=f"folder of task {name} is"):
            load_policy(name, place)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"seeds": 1, "tasks": ["exam=there"]}, "seeds is 1; it must be at least 2"),
        ({}, "tasks is empty"),
        ({"tasks": ["exam=there"], "answers": 1}, "answers is 1"),
        ({"tasks": ["exam=there"], "critic": ["grpo"]}, "critic is 'grpo'"),
        ({"tasks": ["exam=there"]}, "folder of task exam is 'there'"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(arguments, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        gate(out=tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_the_command_judges_a_study_and_keeps_what_was_measured(tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    write_report(out, settings=NO_SETTINGS, measured=measured(0.5, 0.6), compared=NONE, algorithms=ALGORITHMS)
    scores = {(name, "none", seed): 0.5 + 0.1 * (name == "ppo") + 0.01 * seed for name in ALGORITHMS for seed in (0, 1)}
    gate(out=out, study=[write_study(tmp_path / "study", scores)])
    assert capsys.readouterr().out == f"{out / 'report.md'}\n"
    text = (out / "report.md").read_text()
    assert "explained variance failed: `ppo` 0.550 [-0.085, 1.185]" in text
    assert "`ppo` against `reinforce_plus_plus` passed: +0.100 [+0.100, +0.100], 2 pairs" in text
