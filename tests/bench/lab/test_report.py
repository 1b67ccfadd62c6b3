# SPDX-License-Identifier: Apache-2.0
"""The lab's command end to end, its report, and the spreads at the fixed points."""

import json
from pathlib import Path

import numpy as np
import pytest

from verl_dvpo.bench.lab.experiments import DEFAULT, EXPERIMENTS, jobs, run
from verl_dvpo.bench.lab.process import bernoulli_walk
from verl_dvpo.bench.lab.report import markdown, show
from verl_dvpo.bench.lab.spread import fixed_point
from verl_dvpo.bench.lab.training import TrainConfig
from verl_dvpo.bench.statistics import ratio_interval, t_interval
from verl_dvpo.cli import main


def test_divergence_is_shown_not_averaged_away() -> None:
    assert show(t_interval([1.0, float("nan")])) == "diverged"
    assert show(ratio_interval([1.0, float("inf")], [1.0, 1.0]), ratio=True) == "diverged"


def test_command_writes_what_the_report_reads(tmp_path: Path) -> None:
    arguments = ["lab", "--out", str(tmp_path), "--quick", "--updates", "2", "--only", "kappa", "--workers", "1"]
    assert main(arguments) == 0
    result = json.loads((tmp_path / "lab.json").read_text())
    runs = json.loads((tmp_path / "lab.json").read_text())["runs"]
    report = (tmp_path / "report.md").read_text()
    assert report == markdown(result)
    assert (tmp_path / "kappa.png").stat().st_size > 1000
    values = result["runs"]["right, kappa 1|skewed|clean|2"]["metrics"]["crps_excess"]
    assert len(values) == 2
    # t_{0.975, 1} = 12.7062 and the standard error of two values is half their distance
    half = 12.7062 * abs(values[0] - values[1]) / 2
    table = report.split("### score, clean")[1].splitlines()
    row = next(line for line in table if line.startswith("| right, kappa 1 "))
    assert f"| {np.mean(values):.3f} ± {half:.3f} |" in row
    # What is there is not run again: a number put in its place stays.
    result["runs"]["right, kappa 1|skewed|clean|2"]["metrics"]["crps_excess"] = [7.0, 7.0]
    (tmp_path / "lab.json").write_text(json.dumps(result))
    assert main([*arguments, "--resume"]) == 0
    assert "| 7.000 ± 0.000 |" in (tmp_path / "report.md").read_text()
    (tmp_path / "lab.json").write_text(json.dumps(result | {"runs": runs}))
    assert main(["lab", "--out", str(tmp_path), "--redraw"]) == 0
    assert (tmp_path / "report.md").read_text() == report


def test_every_experiment_names_critics_that_exist_and_runs_each_once() -> None:
    found = list(jobs(list(EXPERIMENTS), TrainConfig(), [0, 1, 2, 3]))
    keys = [job.key for job in found]
    assert len(keys) == len(set(keys))
    # `quantile mc` is what its name says.
    assert {job.config.lam for job in found if job.critic == "quantile mc"} == {1.0}
    assert len({job.key for job in jobs(DEFAULT[1:], TrainConfig(), [0, 1])} - set(keys)) == 0
    assert max(job.config.updates for job in found) == 10 * TrainConfig().updates
    assert all(len(job.seeds) == 3 for job in found if job.config.updates == 10 * TrainConfig().updates)


def test_bad_runs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"experiments is \['nothing'\]; allowed are spread, families"):
        run(["nothing"], TrainConfig(), [0, 1])
    with pytest.raises(ValueError, match=r"seeds is \[0\]; an interval needs at least 2"):
        run(["kappa"], TrainConfig(), [0])
    earlier = {"meta": {"seeds": [0, 1, 2], "config": {}, "num_quantiles": 50, "num_heads": 3}, "runs": {}}
    with pytest.raises(ValueError, match=r"seeds is \[0, 1\]; the runs to resume have \[0, 1, 2\]"):
        run(["kappa"], TrainConfig(), [0, 1], done=earlier)


def test_eq2_s_fixed_point_is_too_narrow_and_sample_replacement_s_is_not() -> None:
    # 5 steps, λ = 0.5. The truth is a fair label: standard deviation 0.5.
    eq2, replaced = (
        fixed_point(bernoulli_walk(5), kind, 0.5, seed=0, batch=1500)[0]
        for kind in ("quantile_gae", "sample_replacement")
    )
    assert eq2.mean() == pytest.approx(0.5, abs=0.04)
    assert eq2.std() < 0.42
    assert replaced.mean() == pytest.approx(0.5, abs=0.04)
    assert replaced.std() == pytest.approx(0.5, abs=0.01)
