# SPDX-License-Identifier: Apache-2.0
"""The report of a sweep: numbers worked by hand, from folders as Hydra writes them."""

import csv
import json
import math
from pathlib import Path

import pytest
import yaml
from scipy import stats

from verl_dvpo.bench.sweep.figure import scores_figure
from verl_dvpo.bench.sweep.read import is_seed, read_sweep
from verl_dvpo.bench.sweep.report import write_report

RISK, DENSITY = "critic.value.coef.risk", "critic.value.num_quantiles"


def write_run(
    sweep: Path, number: int, *overrides: str, scores: dict[int, float] | None = None, steps: int | None = 3
) -> Path:
    """Writes what Hydra and verl leave of one run; ``scores`` is step -> score, of a source that counts."""
    folder = sweep / str(number)
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(["platform=cpu", *overrides]))
    config = {"trainer": {"total_training_steps": steps}, "objective": ["a"], "x": "${oc.env:HOME}"}
    (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump(config))
    if scores is not None:
        lines = [
            {"step": step, "data": {"val-core/a/acc/mean@1": score, "val-core/b/acc/mean@1": 0.9}}
            for step, score in scores.items()
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def sweep(tmp_path):
    """Two risks and three seeds; the last run of the second risk has not ended."""
    folder = tmp_path / "sweep"
    given = {("0", 0): 0.5, ("0", 1): 0.6, ("0", 2): 0.7, ("0.2", 0): 0.8, ("0.2", 1): 0.6}
    for number, ((risk, seed), score) in enumerate(given.items()):
        write_run(folder, number, f"{RISK}={risk}", f"+seed={seed}", scores={0: 0.1, 3: score})
    write_run(folder, 10, f"{RISK}=0.2", "+seed=2", scores={0: 0.1, 2: 0.99})
    return folder


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_points_are_means_over_seeds(sweep):
    report = write_report(sweep)
    first, second = read_csv(report.with_name("points.csv"))
    assert (first[RISK], first["runs"], second[RISK], second["runs"]) == ("0.0", "3", "0.2", "2")
    assert float(first["score"]) == pytest.approx(0.6)
    assert float(first["sd"]) == pytest.approx(0.1)
    reach = stats.t.ppf(0.975, 2) * 0.1 / math.sqrt(3)
    assert float(first["low"]) == pytest.approx(0.6 - reach)
    assert float(first["high"]) == pytest.approx(0.6 + reach)
    assert float(second["score"]) == pytest.approx(0.7)
    assert float(second["sd"]) == pytest.approx(0.1 * math.sqrt(2))
    text = report.read_text()
    assert "| 0 | 3 | 0.6000 | 0.1000 | [0.3516, 0.8484] |" in text
    assert "5 of 6 runs have ended." in text
    assert f"The highest mean is 0.7000, at `{RISK}=0.2`." in text
    assert "- 10 is at step 2 of 3: it runs, or has failed" in text


def test_every_run_is_listed_with_what_it_was_told(sweep):
    rows = read_csv(write_report(sweep).with_name("runs.csv"))
    assert [row["run"] for row in rows] == ["0", "1", "2", "3", "4", "10"]
    assert [row["seed"] for row in rows] == ["0.0", "1.0", "2.0", "0.0", "1.0", "2.0"]
    assert rows[-1]["score"] == ""
    assert "platform" not in rows[0]  # the same in all runs


def test_the_figure_shows_means_and_runs(sweep):
    report = write_report(sweep)
    assert report.with_name("scores.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in report.with_name("scores.svg").read_text()
    (axes,) = scores_figure([run for run in read_sweep(sweep) if run.score is not None]).axes
    assert axes.get_xlabel() == RISK
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "0.2"]
    dots = sorted(round(float(y), 6) for line in axes.lines if line.get_alpha() for y in line.get_ydata())
    assert dots == [0.5, 0.6, 0.6, 0.7, 0.8]
    (means,) = [line for line in axes.lines if line.get_linestyle() == "-" and len(line.get_xdata()) == 2]
    assert list(means.get_ydata()) == pytest.approx([0.6, 0.7])


def test_a_report_does_not_depend_on_when_it_is_written(sweep):
    names = ("report.md", "points.csv", "runs.csv", "scores.png", "scores.svg")
    texts = [[write_report(sweep, sweep.parent / out / "sweep").with_name(name).read_bytes() for name in names]
             for out in ("first", "second")]  # fmt: skip
    assert texts[0] == texts[1]


def test_two_fields_of_a_grid_are_lines(tmp_path):
    for number, (risk, density) in enumerate([(0, 50), (0, 100), (0, 200), (0.1, 50), (0.1, 100), (0.1, 200)]):
        write_run(tmp_path, number, f"{RISK}={risk}", f"{DENSITY}={density}", scores={3: 0.1 * number})
    (axes,) = scores_figure(read_sweep(tmp_path)).axes
    assert axes.get_xlabel() == DENSITY
    legend = axes.get_legend()
    assert legend.get_title().get_text() == RISK
    assert [each.get_text() for each in legend.get_texts()] == ["0", "0.1"]


def test_points_of_a_search_have_a_panel_a_field(tmp_path):
    for number, risk in enumerate([0.01, 0.13, 0.07, 0.19]):
        write_run(tmp_path, number, f"{RISK}={risk}", f"{DENSITY}={50 * (1 + number % 2)}", scores={3: risk})
    first, second = scores_figure(read_sweep(tmp_path)).axes[:2]
    assert (first.get_xlabel(), second.get_xlabel()) == (RISK, DENSITY)
    (ring,) = [line for line in first.lines if line.get_fillstyle() == "none"]
    assert list(ring.get_ydata()) == [0.19]


def test_a_sweep_of_seeds_alone_is_one_point(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path, seed, f"seed={seed}", scores={3: 0.2 + 0.2 * seed})
    (point,) = read_csv(write_report(tmp_path).with_name("points.csv"))
    assert (point["runs"], float(point["score"])) == ("2", pytest.approx(0.3))


def test_words_and_fields_that_some_runs_lack_are_values(tmp_path):
    write_run(tmp_path, 0, "algorithm=ppo", scores={3: 0.2})
    write_run(tmp_path, 1, "algorithm=dvpo", f"{RISK}=0.1", scores={3: 0.4})
    text = write_report(tmp_path).read_text()
    assert "| dvpo | 0.1 | 1 | 0.4000 |  |  |" in text
    assert "| ppo | (unset) | 1 | 0.2000 |  |  |" in text
    assert "Each point has one run" in text


def test_without_a_number_of_steps_the_last_validation_counts(tmp_path):
    write_run(tmp_path, 0, f"{RISK}=0", scores={0: 0.1, 5: 0.3}, steps=None)
    (run,) = read_sweep(tmp_path)
    assert (run.step, run.score, run.problem) == (5, 0.3, "")


@pytest.mark.parametrize(
    ("field", "expected"),
    [("seed", True), ("data.seed", True), ("critic.value.head_seed", True), ("noise.seeded", False), (RISK, False)],
)
def test_what_is_a_seed(field, expected):
    assert is_seed(field) is expected


def spoil_overrides(sweep: Path) -> Path:
    (sweep / "0" / ".hydra" / "overrides.yaml").write_text("a: {")
    return sweep


def spoil_metrics(sweep: Path) -> Path:
    (sweep / "0" / "metrics.jsonl").write_text("{}\n")
    return sweep


def still_going(sweep: Path) -> Path:
    write_run(sweep.parent / "new", 0, f"{RISK}=0")
    return sweep.parent / "new"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda sweep: sweep / "nothing", "hydra.sweep.dir"),
        (lambda sweep: sweep / "0", "hydra.sweep.dir"),
        (spoil_overrides, "0/.hydra/overrides.yaml cannot be read"),
        (spoil_metrics, "metrics.jsonl, line 1"),
        (still_going, "run 0 has no metrics.jsonl: it waits, runs its first step, or has failed"),
    ],
)
def test_bad_input_is_named(sweep, spoil, message):
    with pytest.raises(ValueError, match=r".") as caught:
        write_report(spoil(sweep))
    assert message in str(caught.value)
