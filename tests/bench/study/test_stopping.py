# SPDX-License-Identifier: Apache-2.0
"""The stopping rule on records that are written here, against hand-worked seeds."""

import json
import math

import numpy as np
import pytest
from fake import names
from registered import contrast_of, ended, records, registered
from scipy import stats

from verl_dvpo.bench.study.plan import plan
from verl_dvpo.bench.study.stopping import State, hours, needed, standings

#: Differences by place of the seed. By numpy: half-widths of the first 3, 4, 5, 6 are 0.124, 0.063, 0.043, 0.033.
DIFFERENCES = (0.00, 0.10, 0.05, 0.05, 0.04, 0.06)


def score(study, differences=DIFFERENCES, fail=()):
    """A base of its own for each seed, which pairing must take away."""

    def of(run):
        place = study.seeds.index(run.seed)
        if (run.algorithm.name, place) in fail:
            return None
        return 0.1 * place + (differences[place] if run.algorithm.name == "dvpo" else 0.0)

    return of


def half_width(values) -> float:
    return float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))


@pytest.mark.parametrize(
    ("bound", "seeds", "state"),
    [(0.13, 3, State.NARROW), (0.07, 4, State.NARROW), (0.05, 5, State.NARROW), (0.01, 6, State.MAX_SEEDS)],
)
def test_a_contrast_closes_at_the_first_seed_that_makes_it_narrow(out, bound, seeds, state):
    study = registered(out, contrast_of(bound=bound))
    (standing,) = standings(study, records(study, score(study), 6))
    assert (len(standing.seeds), standing.state) == (seeds, state)
    assert standing.seeds == study.seeds[:seeds]
    assert standing.differences == pytest.approx(DIFFERENCES[:seeds])
    assert standing.half_width == pytest.approx(half_width(DIFFERENCES[:seeds]))
    assert standing.estimate.value == pytest.approx(np.mean(DIFFERENCES[:seeds]))
    assert needed(study, records(study, score(study), 6)) == []


def test_a_study_with_the_rule_runs_the_seeds_that_it_names_and_no_more(out):
    study = registered(out, contrast_of(bound=0.05))
    found = dict.fromkeys(names(plan(study)))
    order = []
    while runs := needed(study, found):
        found[runs[0].name] = ended(score(study)(runs[0]))
        order.append(runs[0].name)
    assert order == names(plan(study))[:10]  # five seeds of two arms, in the order of the plan
    assert len(needed(study, dict.fromkeys(found))) == 6  # min_seeds at once, for other processes
    assert names(needed(study, records(study, score(study), 3))) == names(plan(study))[6:8]  # then one by one


def test_contrasts_that_share_a_control_close_each_at_its_own_seed(out):
    study = registered(
        out,
        contrast_of(bound=0.13),
        contrast_of(name="other", treatment="grpo", bound=0.05, primary=False),
        algorithms=["ppo", "dvpo", "grpo"],
    )

    def of(run):
        return score(study)(run) + 0.3 * DIFFERENCES[::-1][study.seeds.index(run.seed)] * (run.algorithm.name == "grpo")

    three = standings(study, records(study, of, 3))
    assert [(len(each.seeds), each.state) for each in three] == [(3, State.NARROW), (3, State.NARROW)]
    assert {run.algorithm.name for run in needed(study, records(study, of, 2))} == {"ppo", "dvpo", "grpo"}
    wide = registered(
        out,
        contrast_of(bound=0.13),
        contrast_of(name="other", treatment="grpo", bound=0.001, primary=False),
        algorithms=["ppo", "dvpo", "grpo"],
    )
    assert {run.algorithm.name for run in needed(wide, records(wide, of, 3))} == {"ppo", "grpo"}
    first, _ = standings(wide, records(wide, of, 6))
    assert len(first.seeds) == 3  # what the other contrast adds to the control changes nothing here


def test_a_failed_run_costs_its_seed_and_the_rule_goes_on(out):
    study = registered(out, contrast_of(bound=0.13))
    lost = records(study, score(study, fail=[("ppo", 1)]), 3)
    (standing,) = standings(study, lost)
    assert (standing.seeds, standing.state, standing.ended) == ((4, 1), State.OPEN, 3)
    assert {run.seed for run in needed(study, lost)} == {study.seeds[3]}
    (standing,) = standings(study, records(study, score(study, fail=[("ppo", 1)]), 4))
    assert standing.seeds == (4, 1, 2)
    assert standing.differences == pytest.approx([0.0, 0.05, 0.05])
    all_lost = records(study, lambda run: None, 6)
    (standing,) = standings(study, all_lost)
    assert (standing.seeds, standing.state) == ((), State.MAX_SEEDS)
    assert math.isnan(standing.half_width)


def test_a_seed_that_has_not_ended_hides_those_after_it(out):
    """With several processes a later seed may end first."""
    study = registered(out, contrast_of(bound=0.05))
    found = records(study, score(study), 6)
    found[plan(study)[7].name] = None  # seed at place 3
    (standing,) = standings(study, found)
    assert (standing.seeds, standing.state) == (study.seeds[:3], State.OPEN)
    assert names(needed(study, found)) == [plan(study)[7].name]


def test_the_budget_ends_a_study(out):
    study = registered(out, contrast_of(bound=0.001), stopping={"budget_hours": 0.1})
    six = records(study, score(study), 3)  # 6 runs of a minute: 0.1 hours
    assert hours(six) == pytest.approx(0.1)
    assert needed(study, six) == []
    assert standings(study, six)[0].state is State.BUDGET
    name = plan(study)[5].name
    less = six | {name: None}
    assert names(needed(study, less)) == [name]
    assert standings(study, less)[0].state is State.OPEN
    # a failed run has cost its time as well
    assert needed(study, less | {name: ended(None)}) == []


def test_arms_that_no_contrast_names_get_the_least_number_of_seeds(out):
    study = registered(out, contrast_of(bound=0.05), arms=[{}])
    found = records(study, score(study), 3)
    assert {run.arm for run in needed(study, found)} == {("ppo", "flip_0.3", "demo"), ("dvpo", "flip_0.3", "demo")}
    one = plan(study)[0]
    assert one.noise.name == "none"
    assert needed(study, found | {one.name: None})[0] == one


def test_scores_of_several_cells_are_averaged_by_seed(out):
    study = registered(out, contrast_of(noises=["none", "flip_0.3"]))

    def of(run):
        place = study.seeds.index(run.seed)
        return 0.5 + (run.algorithm.name == "dvpo") * (0.2 if run.noise.name == "none" else 0.1 * place)

    (standing,) = standings(study, records(study, of, 3))
    assert standing.differences == pytest.approx([0.1, 0.15, 0.2])
    half = records(study, of, 3)
    half[next(run.name for run in plan(study) if run.noise.name == "none")] = None
    assert standings(study, half)[0].seeds == ()


def test_the_measure_may_be_the_mean_of_the_last_validations(out):
    study = registered(out, contrast_of(last_validations=2))
    rng = np.random.default_rng(3)
    curves = {run.name: rng.uniform(size=3) for run in plan(study)}
    for run in plan(study):
        run.folder.mkdir(parents=True)
        lines = []
        for step, value in zip((0, 2, 4), curves[run.name], strict=True):
            lines.append(
                {"step": step, "data": {"val-core/demo_addition/acc/mean@1": value, "val-core/far/acc/mean@1": 9}}
            )
            lines.append({"step": step + 1, "data": {"critic/score/mean": 1.0}})
        run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (standing,) = standings(study, records(study, lambda run: 0.0, 6))
    for place, seed in enumerate(standing.seeds):
        ppo, dvpo = (curves[f"{algorithm}__flip_0.3__demo__s{seed}"][1:].mean() for algorithm in ("ppo", "dvpo"))
        assert standing.differences[place] == pytest.approx(dvpo - ppo)


def test_equal_differences_are_as_narrow_as_can_be(out):
    study = registered(out)
    (standing,) = standings(study, records(study, lambda run: 0.25, 3))
    assert (standing.half_width, standing.state) == (0.0, State.NARROW)
