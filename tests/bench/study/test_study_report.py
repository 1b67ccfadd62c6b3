# SPDX-License-Identifier: Apache-2.0
"""The report's numbers against loops in numpy, on scores that are drawn here."""

import io
import itertools
import json
import math

import numpy as np
import pandas as pd
import pytest
from fake import FakeTrainer, study_of

from verl_dvpo.bench.common import write_json
from verl_dvpo.bench.study.plan import plan
from verl_dvpo.bench.study.report import write_report
from verl_dvpo.bench.study.results import CLEAN_REWARD, EXPLAINED, REWARD, Results, load_results
from verl_dvpo.bench.study.runner import read_record, run_study
from verl_dvpo.bench.study.statistics import interquartile_mean, paired_difference, probability_of_improvement
from verl_dvpo.bench.study.summary import curves, summarise, training
from verl_dvpo.cli import main

RNG = np.random.default_rng(5)
STRATA = [RNG.uniform(size=5), RNG.uniform(size=4) + 0.3]
OTHER = [RNG.uniform(size=5) + 0.1, RNG.uniform(size=4) + 0.2]


def naive_iqm(values) -> float:
    ordered = sorted(values)
    cut = len(ordered) // 4
    kept = ordered[cut : len(ordered) - cut]
    return sum(kept) / len(kept)


def naive_t(values) -> tuple[float, float, float]:
    """Mean with Student's interval from sums; the quantile of t with 4 degrees of freedom is from a printed table."""
    assert len(values) == 5
    mean = sum(values) / 5
    half = 2.776445 * math.sqrt(sum((value - mean) ** 2 for value in values) / 4 / 5)
    return mean, mean - half, mean + half


def naive_sign_flips(differences) -> float:
    patterns = list(itertools.product((1, -1), repeat=len(differences)))
    sums = [sum(sign * d for sign, d in zip(signs, differences, strict=True)) for signs in patterns]
    return sum(abs(each) >= abs(sum(differences)) - 1e-12 for each in sums) / len(patterns)


def naive_probability(first, second) -> float:
    each = []
    for a, b in zip(first, second, strict=True):
        wins = sum((x > y) + 0.5 * (x == y) for x, y in itertools.product(a, b))
        each.append(wins / (len(a) * len(b)))
    return sum(each) / len(each)


def naive_interval(statistic, sizes, draws=20_000) -> tuple[float, float]:
    """Percentiles of `statistic` over seeds drawn anew within each stratum, in a plain loop."""
    rng = np.random.default_rng(1)
    values = [statistic([rng.integers(size, size=size) for size in sizes]) for _ in range(draws)]
    return float(np.percentile(values, 2.5)), float(np.percentile(values, 97.5))


def test_interquartile_mean_and_its_interval():
    estimate = interquartile_mean(STRATA)
    assert estimate.value == pytest.approx(naive_iqm(np.concatenate(STRATA)))
    expected = naive_interval(
        lambda chosen: naive_iqm(np.concatenate([s[i] for s, i in zip(STRATA, chosen, strict=True)])), [5, 4]
    )
    # two bootstraps of 5000 and 20000 draws; the statistic spreads over about 0.3
    assert (estimate.low, estimate.high) == pytest.approx(expected, abs=0.012)


def test_three_runs_have_no_interquartile_mean():
    with pytest.raises(ValueError, match="runs is 3; an IQM needs at least 4; use the mean"):
        interquartile_mean([np.array([0.1, 0.2, 0.9])])
    assert interquartile_mean([np.array([0.1, 0.2, 0.4, 0.9])]).value == pytest.approx(0.3)


def test_paired_difference_and_its_interval():
    estimate = paired_difference(STRATA, OTHER)
    differences = [a - b for a, b in zip(STRATA, OTHER, strict=True)]
    assert estimate.value == pytest.approx(naive_iqm(np.concatenate(differences)))
    expected = naive_interval(
        lambda chosen: naive_iqm(np.concatenate([s[i] for s, i in zip(differences, chosen, strict=True)])), [5, 4]
    )
    assert (estimate.low, estimate.high) == pytest.approx(expected, abs=0.02)


def test_probability_of_improvement_and_its_interval():
    tied = [OTHER[0].copy(), OTHER[1]]
    tied[0][2] = STRATA[0][1]
    estimate = probability_of_improvement(STRATA, tied)
    assert estimate.value == pytest.approx(naive_probability(STRATA, tied))
    expected = naive_interval(
        lambda chosen: naive_probability(
            [s[i] for s, i in zip(STRATA, chosen, strict=True)], [s[i] for s, i in zip(tied, chosen, strict=True)]
        ),
        [5, 4],
        draws=4000,
    )
    assert (estimate.low, estimate.high) == pytest.approx(expected, abs=0.03)


def test_extremes_of_the_probability():
    high, low = [np.array([0.8, 0.9, 0.7])], [np.array([0.1, 0.2, 0.3])]
    assert probability_of_improvement(high, low) == (1.0, 1.0, 1.0)
    assert probability_of_improvement(low, high) == (0.0, 0.0, 0.0)
    same = probability_of_improvement(high, high)
    assert same.value == 0.5
    with pytest.raises(ValueError, match="paired by seed"):
        probability_of_improvement(high, [np.array([0.1, 0.2])])


def test_one_run_has_no_interval_and_equal_runs_have_none_to_speak_of():
    single = interquartile_mean([np.array([0.5]), np.array([0.1, 0.4, 0.6])])
    assert single.value == pytest.approx(0.45)
    assert math.isnan(single.low)
    assert interquartile_mean([np.array([0.5, 0.5, 0.5, 0.5])]) == (0.5, 0.5, 0.5)


@pytest.fixture
def study(out):
    """Finished runs with three sources, of which two are out of the domain, and scores drawn at random."""
    study = study_of(out, seeds=[0, 1, 2, 3, 4], noises=["none", *({"kind": "flip", "rate": r} for r in (0.2, 0.4))])
    rng = np.random.default_rng(9)
    for run in plan(study):
        run.folder.mkdir(parents=True)
        with open(run.metrics, "w") as file:
            for step in (0, 2, 4):
                sources = rng.permutation(["a_far", "demo_addition", "farther"])  # verl logs them as they come
                data = {f"val-core/{source}/acc/mean@1": rng.uniform() for source in sources}
                file.write(json.dumps({"step": step, "data": data}) + "\n")
                metrics = {"critic/score/mean": rng.uniform(), "critic/vf_explained_var": rng.uniform()}
                if run.noise.kind != "none":
                    metrics["noise/clean_score/mean"] = rng.uniform()
                if step:
                    file.write(json.dumps({"step": step - 1, "data": metrics}) + "\n")
        axes = {"algorithm": run.algorithm.name, "noise": run.noise.name, "task": run.task.name, "seed": run.seed}
        ended = {"status": "finished", "score": 0.5, "error": None, "wall_seconds": 1.0, "started": "", "versions": {}}
        write_json(run.record, {"name": run.name, **axes, **ended})
    write_json(out / "study.json", study.to_json())
    return study


def last_scores(study, algorithm, noise, sources) -> list[float]:
    found = []
    for run in plan(study):
        if (run.algorithm.name, run.noise.name) == (algorithm, noise):
            lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
            data = next(line["data"] for line in lines if line["step"] == 4)
            found.append(np.mean([data[f"val-core/{source}/acc/mean@1"] for source in sources]))
    return found


@pytest.mark.parametrize(("domain", "sources"), [("in", ["demo_addition"]), ("out", ["a_far", "farther"])])
def test_the_summary_is_what_a_loop_over_the_files_gives(study, domain, sources):
    summary = summarise(load_results(study.out))
    summary = summary[summary["domain"] == domain].set_index(["noise", "algorithm"])
    assert len(summary) == 2 * (3 + 1)
    pooled: dict[str, list] = {"ppo": [], "dvpo": []}
    for noise in ("none", "flip_0.2", "flip_0.4"):
        ppo, dvpo = (np.array(last_scores(study, name, noise, sources)) for name in ("ppo", "dvpo"))
        pooled["ppo"].append(ppo)
        pooled["dvpo"].append(dvpo)
        row = summary.loc[(noise, "dvpo")]
        assert row["runs"] == 5
        assert row["iqm"] == pytest.approx(naive_iqm(dvpo))
        assert (row["mean"], row["mean_low"], row["mean_high"]) == pytest.approx(naive_t(dvpo))
        difference = (row["difference"], row["difference_low"], row["difference_high"])
        assert difference == pytest.approx(naive_t(dvpo - ppo))
        assert row["p_value"] == pytest.approx(naive_sign_flips(dvpo - ppo))
        assert row["difference_iqm"] == pytest.approx(naive_iqm(dvpo - ppo))
        assert row["probability"] == pytest.approx(naive_probability([dvpo], [ppo]))
        assert row["iqm_low"] <= row["iqm"] <= row["iqm_high"]
        assert math.isnan(summary.loc[(noise, "ppo")]["difference"])
    row = summary.loc[("all", "dvpo")]
    assert row["iqm"] == pytest.approx(naive_iqm(np.concatenate(pooled["dvpo"])))
    assert row["probability"] == pytest.approx(naive_probability(pooled["dvpo"], pooled["ppo"]))
    # five seeds, and not fifteen runs, are what repeats
    of_seeds = [np.mean([cell[seed] for cell in pooled["dvpo"]]) for seed in range(5)]
    assert (row["mean"], row["mean_low"], row["mean_high"]) == pytest.approx(naive_t(of_seeds))
    differences = [
        np.mean([a[seed] - b[seed] for a, b in zip(pooled["dvpo"], pooled["ppo"], strict=True)]) for seed in range(5)
    ]
    assert row["p_value"] == pytest.approx(naive_sign_flips(differences))


def test_seeds_that_one_side_lacks_are_not_compared(study):
    for run in plan(study):
        if run.algorithm.name == "dvpo" and run.seed in (1, 3):
            run.record.unlink()
    summary = summarise(load_results(study.out)).set_index(["domain", "noise", "algorithm"])
    row = summary.loc[("in", "none", "dvpo")]
    ppo, dvpo = (np.array(last_scores(study, name, "none", ["demo_addition"])) for name in ("ppo", "dvpo"))
    assert row["runs"] == 3
    assert summary.loc[("in", "none", "ppo")]["runs"] == 5
    kept = [0, 2, 4]
    assert row["difference"] == pytest.approx(np.mean(dvpo[kept] - ppo[kept]))
    assert row["p_value"] >= 0.25
    assert math.isnan(row["iqm"])  # three runs
    assert math.isnan(row["difference_iqm"])
    assert row["probability"] == pytest.approx(naive_probability([dvpo[kept]], [ppo[kept]]))


def test_curves_have_a_row_for_each_validation(study):
    table = curves(load_results(study.out))
    assert len(table) == 2 * 3 * 3
    row = table[(table["algorithm"] == "ppo") & (table["noise"] == "flip_0.4") & (table["step"] == 4)].iloc[0]
    expected = naive_t(last_scores(study, "ppo", "flip_0.4", ["demo_addition"]))
    assert (row["mean"], row["mean_low"], row["mean_high"]) == pytest.approx(expected)


def test_the_second_half_of_training_is_averaged_over_steps_and_then_over_seeds(study):
    table = training(load_results(study.out)).set_index(["noise", "algorithm"])
    assert list(table.index) == list(itertools.product(["none", "flip_0.2", "flip_0.4"], ["ppo", "dvpo"]))
    for noise, metric, column in [
        ("none", "critic/score/mean", "clean reward"),
        ("flip_0.4", "noise/clean_score/mean", "clean reward"),
        ("flip_0.4", "critic/score/mean", "reward"),
        ("flip_0.2", "critic/vf_explained_var", "explained variance"),
    ]:
        late = []
        for run in plan(study):
            if (run.algorithm.name, run.noise.name) == ("dvpo", noise):
                lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
                late.append(next(line["data"][metric] for line in lines if line["step"] == 3))
        assert table.loc[(noise, "dvpo"), column] == pytest.approx(np.mean(late))


def test_the_step_in_the_middle_belongs_to_the_first_half(tmp_path):
    """Of four steps the third and the fourth are the second half: (3 + 4)/2 and, of the other seed, (30 + 40)/2."""
    rows = [
        ("ppo", "none", "none", 0.0, "demo", seed, step, scale * step, math.nan, 0.1 * step)
        for seed, scale in ((0, 1.0), (1, 10.0))
        for step in (1, 2, 3, 4)
    ]
    columns = ["algorithm", "noise", "kind", "rate", "task", "seed", "step", REWARD, CLEAN_REWARD, EXPLAINED]
    steps = pd.DataFrame(rows, columns=columns)
    table = training(Results(study_of(tmp_path, steps=4), pd.DataFrame(), steps, [], [], []))
    assert len(table) == 1
    row = table.iloc[0]
    assert (row[REWARD], row[CLEAN_REWARD], row[EXPLAINED]) == pytest.approx((19.25, 19.25, 0.35))


def test_the_report_has_tables_csv_and_every_figure(study, capsys):
    assert main(["study", "report", str(study.out)]) == 0
    folder = study.out / "report"
    assert capsys.readouterr().out.strip() == str(folder / "report.md")
    assert sorted(path.name for path in folder.iterdir()) == [
        "curves.csv", "curves.png", "domains.png", "noise.csv", "noise_rate.png", "report.md", "runs.csv",
        "summary.csv",
        "training.csv", "validations.csv",
    ]  # fmt: skip
    text = (folder / "report.md").read_text()
    mean, low, high = naive_t(last_scores(study, "dvpo", "flip_0.2", ["demo_addition"]))
    section = text.split("### demo, noise flip_0.2")[1]
    assert f"| `dvpo` | 5 | {mean:.3f} [{low:.3f}, {high:.3f}] |" in section.split("###")[0]
    runs = pd.read_csv(folder / "runs.csv")
    assert len(runs) == 30
    assert set(runs["status"]) == {"finished"}
    assert "different versions" not in text
    assert "| task | noise | algorithm | demo_addition | a_far | farther |" in text
    for path in folder.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_another_reference_turns_the_comparison_round(study, tmp_path, capsys):
    command = ["study", "report", str(study.out), "--out", str(tmp_path / "report"), "--reference"]
    assert main([*command, "dvpo"]) == 0
    summary = pd.read_csv(tmp_path / "report" / "summary.csv", keep_default_na=False, na_values=[""])
    row = summary.set_index(["domain", "noise", "algorithm"]).loc[("in", "flip_0.2", "ppo")]
    ppo, dvpo = (np.array(last_scores(study, name, "flip_0.2", ["demo_addition"])) for name in ("ppo", "dvpo"))
    assert row["difference"] == pytest.approx(np.mean(ppo - dvpo))
    assert main([*command, "sac"]) == 2
    assert "reference is 'sac'; allowed are ppo, dvpo; choose one of them" in capsys.readouterr().err


def test_runs_of_different_versions_are_not_mixed_silently(study):
    for run in plan(study)[:2]:
        write_json(run.record, {**read_record(run), "versions": {"verl": "0.9.2"}})
    text = (write_report(study.out) / "report.md").read_text()
    assert "made by 2 different versions of the software" in text


def test_figures_that_a_study_has_no_axis_for_are_not_drawn(out):
    study = study_of(out, noises=["none"], seeds=[0])
    run_study(study, train=FakeTrainer(), stream=io.StringIO())
    folder = write_report(study.out)
    assert sorted(path.name for path in folder.glob("*.png")) == ["curves.png"]


def test_folders_without_a_finished_study_are_named(tmp_path, out, capsys):
    assert main(["study", "report", str(tmp_path)]) == 2
    assert "the folder of a study has a study.json" in capsys.readouterr().err
    study = study_of(out, seeds=[0])
    run_study(study, train=FakeTrainer(fail=tuple(run.name for run in plan(study))), stream=io.StringIO())
    assert main(["study", "report", str(out)]) == 2
    assert "a report needs a finished run, of this study 4 failed and 0 are to come" in capsys.readouterr().err
