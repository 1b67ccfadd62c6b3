# SPDX-License-Identifier: Apache-2.0
"""A study with hypotheses from its file to its collected report, with a trainer that takes no time."""

import contextlib
import io
import itertools
import json
import multiprocessing
import os
import time

import numpy as np
import pandas as pd
import pytest
import yaml
from fake import FakeTrainer, names, score_of, study_of, texts
from omegaconf import DictConfig
from registered import contrast_of, hypotheses_of, registered, written

from verl_dvpo.bench.common import write_json
from verl_dvpo.bench.study import plan as planning
from verl_dvpo.bench.study import runner
from verl_dvpo.bench.study.collect import collect
from verl_dvpo.bench.study.plan import plan
from verl_dvpo.bench.study.report import write_report
from verl_dvpo.bench.study.runner import read_record, run_study, unfinished
from verl_dvpo.cli import main

#: Added to dvpo's score, by seed: half-widths of the first 3, 4 and 5 in the study's order are 0.063, 0.033, 0.024.
LUCK = {4: 0.10, 0: 0.13, 1: 0.08, 2: 0.11, 3: 0.09, 5: 0.10}
#: Configurations of this file's arms.
COMPOSED: dict[tuple[str, ...], DictConfig] = {}


class Lucky(FakeTrainer):
    """Adds luck to dvpo's validation scores, and noise rates to its training steps."""

    def __call__(self, config, metrics):
        super().__call__(config, metrics)
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        for line in lines:
            for name in line["data"]:
                if name.startswith("val-core") and config.algorithm.adv_estimator == "dvpo":
                    line["data"][name] += LUCK[config.data.seed]
            if line["step"]:
                line["data"] |= {"noise/fpr": 0.25, "noise/fnr": 0.35, "noise/youden_j": 0.4}
        metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(autouse=True)
def _composed_once(monkeypatch):
    """Composes each arm once; its seeds are set as `compose` sets them."""

    def compose(run):
        if run.overrides not in COMPOSED:
            COMPOSED[run.overrides] = planning.compose(run)
        config = COMPOSED[run.overrides].copy()
        config.data.seed, config.trainer.experiment_name = run.seed, run.name
        return config

    monkeypatch.setattr(runner, "compose", compose)


def lucky_study(out, **fields):
    return registered(out, contrast_of(bound=0.034), **fields)


def test_seeds_are_added_until_the_interval_is_narrow(out):
    study = lucky_study(out)
    trainer = Lucky()
    stream = io.StringIO()
    assert run_study(study, train=trainer, stream=stream) == []
    assert trainer.calls == names(plan(study))[:8]  # four seeds of two arms
    assert "at most 12 runs, 0 of them finished before" in stream.getvalue()
    assert unfinished(study) == []
    again = Lucky()
    assert run_study(study, train=again, stream=io.StringIO()) == []
    assert again.calls == []


def test_an_interrupted_study_ends_with_the_report_of_an_uninterrupted_one(out, tmp_path):
    run_study(lucky_study(tmp_path / "whole"), train=Lucky(), stream=io.StringIO())
    study = lucky_study(out)
    with pytest.raises(KeyboardInterrupt):
        run_study(study, train=Lucky(kill_at=(7, 3)), stream=io.StringIO())
    run_study(study, train=Lucky(), stream=io.StringIO())
    mine, whole = texts(write_report(out)), texts(write_report(tmp_path / "whole"))
    frozen = [line for line in mine["report.md"].split(b"\n") if line.startswith(b"Written before")]
    assert len(frozen) == 1
    when = [text.pop("report.md").split(b"frozen 20")[1][21:] for text in (mine, whole)]
    assert when[0] == when[1]
    assert mine == whole


def test_a_run_that_fails_is_repeated_by_the_next_call_which_goes_on_from_there(out):
    study = lucky_study(out)
    bad = names(plan(study))[3]
    (failed,) = run_study(study, train=Lucky(fail=(bad,)), stream=io.StringIO())
    assert failed.name == bad
    assert len(list((out / "runs").iterdir())) > 8  # another seed took its place
    again = Lucky()
    assert run_study(study, train=again, stream=io.StringIO()) == []
    assert again.calls == [bad]


class Slow(Lucky):
    """Takes long enough for other processes to look."""

    def __call__(self, config, metrics):
        time.sleep(0.2)
        super().__call__(config, metrics)


def test_a_process_waits_for_those_who_hold_what_the_rule_needs(out, tmp_path, monkeypatch):
    """Three processes: beyond the least number of seeds there are two runs at a time, and one process waits."""
    monkeypatch.setattr(runner, "WAIT", 0.05)
    study = lucky_study(out)
    for run in runner._State(study).first_of_arms():
        runner.compose(run)

    def execute():
        trainer = Slow()
        run_study(study, train=trainer, stream=io.StringIO())
        (tmp_path / f"calls.{os.getpid()}").write_text(json.dumps(trainer.calls))

    processes = [multiprocessing.get_context("fork").Process(target=execute) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    calls = [json.loads(path.read_text()) for path in tmp_path.glob("calls.*")]
    assert len(calls) == 3
    assert all(calls)
    assert sorted(itertools.chain(*calls)) == sorted(names(plan(study))[:8])  # no run twice, none too many


def test_status_report_and_collect_say_the_same(out, tmp_path, capsys, monkeypatch):
    written(tmp_path, hypotheses_of(contrast_of(bound=0.034, expected=0.3)))
    tuning = {"ppo": {"settings": 4, "how": "four learning rates"}}
    content = study_of(out, seeds=list(LUCK), tuning=tuning).to_json() | {"hypotheses": "small.hypotheses.yaml"}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
    trainer = Lucky(kill_at=(4, 0))
    monkeypatch.setattr(runner, "_verl", lambda: contextlib.nullcontext(trainer))
    assert main(["study", "run", str(tmp_path / "study.yaml")]) != 0
    assert main(["study", "status", str(out)]) == 0
    said = capsys.readouterr().out
    assert "3 finished, 0 failed, 3 needed now" in said
    assert "| dvpo_over_ppo | 1 | +0.3000 |  |  | 0.0340 | open |" in said  # 0.2 and the luck of seed 4
    trainer.kill_at = None
    assert main(["study", "run", str(tmp_path / "study.yaml")]) == 0
    assert main(["study", "status", str(out)]) == 0
    differences = [0.2 + LUCK[seed] for seed in list(LUCK)[:4]]
    half = 3.182446 * np.std(differences, ddof=1) / 2  # t(0.975, 3)
    mean = np.mean(differences)
    row = f"| dvpo_over_ppo | 4 | {mean:+.4f} | [{mean - half:+.4f}, {mean + half:+.4f}] | {half:.4f} | 0.0340 |"
    assert f"{row} narrow enough |" in capsys.readouterr().out
    assert main(["study", "collect", str(out), "--out", str(tmp_path / "kept")]) == 0
    files = capsys.readouterr().out.split()
    kept = tmp_path / "kept"
    assert {"report.md", "contrasts.csv", "contrasts.png", "noise.csv", "runs.csv", "validations.csv"} <= {
        path.name for path in kept.iterdir()
    }
    assert len(files) == len([path for path in kept.rglob("*") if path.is_file()])
    assert (kept / "frozen" / "hypotheses.yaml").read_text() == (tmp_path / "small.hypotheses.yaml").read_text()
    report = (kept / "report.md").read_text()
    shown = f"| **dvpo_over_ppo** | +0.300 | {mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}] | 4 |"
    assert shown in report
    assert "| narrow enough | supported |" in report
    assert "| demo | flip_0.3 | 8 | 0.250 | 0.350 | 0.400 |" in report
    assert "**different numbers of settings were** tried" in report
    assert "8 of 8 runs finished, 0 failed, 0 to come" in report
    assert str(tmp_path) not in "".join(path.read_text() for path in kept.rglob("*.*") if path.suffix != ".png")


def test_the_table_of_runs_has_what_a_repository_keeps(out):
    study = lucky_study(out)
    run_study(study, train=Lucky(), stream=io.StringIO())
    first = plan(study)[0]
    write_json(first.record, read_record(first) | {"cpu_seconds": 12.5})
    folder = write_report(out)
    runs = pd.read_csv(folder / "runs.csv").set_index("name")
    assert runs.loc[first.name, "cpu_seconds"] == 12.5
    assert runs.loc[first.name, ["FPR", "FNR", "J"]].tolist() == [0.25, 0.35, 0.4]
    assert runs.loc[first.name, "reward"] == pytest.approx(0.1)
    assert {"seed", "wall_seconds", "version_verl", "explained_variance", "clean_reward"} <= set(runs.columns)
    validations = pd.read_csv(folder / "validations.csv")
    mine = validations[(validations["algorithm"] == "ppo") & (validations["seed"] == first.seed)]
    assert mine["step"].tolist() == [0, 2, 4]
    config = planning.compose(first)
    assert mine["score"].tolist() == pytest.approx([score_of(config, step) for step in (0, 2, 4)])


def test_results_are_not_written_over_something_else(out, tmp_path):
    run_study(study_of(out, seeds=[0], noises=["none"]), train=FakeTrainer(), stream=io.StringIO())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="a folder that is new, empty or holds an earlier report is allowed"):
        collect(out, tmp_path / "mine")
    first = collect(out, tmp_path / "kept")
    assert collect(out, tmp_path / "kept") == first
    assert not (tmp_path / "kept" / "contrasts.csv").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("verl_dvpo.bench.study.collect.LARGEST", 1000)
        with pytest.raises(ValueError, match="make the study's test_freq larger"):
            collect(out, tmp_path / "kept")
