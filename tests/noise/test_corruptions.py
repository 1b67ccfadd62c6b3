# SPDX-License-Identifier: Apache-2.0
"""Tests of every corruption: its measured rate over 10,000 samples, and the values that it puts in place."""

import functools
import itertools
import math

import numpy as np
import pytest
from samples import problem, question, questions
from scipy import optimize, stats

from verl_dvpo.bench.tasks.reward import compute_score
from verl_dvpo.noise.config import noise_config
from verl_dvpo.noise.corruptions import spend
from verl_dvpo.noise.kinds import KINDS
from verl_dvpo.noise.reward import with_noise

COUNT = 10_000
# Of the hundred or so comparisons below, three standard errors leave out one in 370: a seed may have bad luck in one.
# What holds for all seeds is in test_over_many_seeds_rates_scatter_as_standard_errors_say.
SEED = 1
RATES = (0.0, 0.05, 0.3, 0.5, 0.8, 1.0)
NEEDS = {
    "gaussian": {"scale": 0.5},
    "heavy_tailed": {"family": "student_t", "tail": 1.5, "scale": 0.5},
    "preference_model": {"family": "student_t", "tail": 1.0, "scale": 0.5, "offset": 0.0},
    "inflation": {"amount": 0.5},
    "deflation": {"amount": 0.5},
    "length_bias": {"slope": 0.5, "reference": 40},
    "dropout": {"withheld": -1.0},
    "prompt_consistent": {"agreement": 1.0},
    "adversary": {"pass_rate": 0.5},
}


@functools.cache
def ten_thousand() -> list[tuple[bool, dict]]:
    return list(questions(COUNT))


def run(kind: str, asked, **settings) -> list[tuple[bool, dict]]:
    """Every sample's verdict and result, with the wrapped demo reward called exactly once for each."""
    calls: list[str] = []

    def counted(**kwargs):
        calls.append(kwargs["ground_truth"] + kwargs["solution_str"])
        return compute_score(**kwargs)

    asked = list(asked)
    noisy = with_noise(counted, noise_config({"kind": kind, **settings}), "demo")
    results = [(right, noisy(**sample)) for right, sample in asked]
    assert calls == [sample["ground_truth"] + sample["solution_str"] for _, sample in asked]
    assert all(result["clean_score"] == result["acc"] == float(right) for right, result in results)
    assert all(result["corrupted"] == (result["score"] != result["clean_score"]) for _, result in results)
    return results


def within_three_standard_errors(hits: list[bool], rate: float) -> None:
    error = math.sqrt(rate * (1.0 - rate) / len(hits))
    assert abs(np.mean(hits) - rate) <= 3.0 * error, (np.mean(hits), rate)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("flip_asymmetric", "reward_model")])
def test_measured_rate_is_the_asked_one(kind: str, rate: float):
    results = run(kind, ten_thousand(), rate=rate, seed=SEED, **NEEDS.get(kind, {}))
    within_three_standard_errors([result["corrupted"] == 1.0 for _, result in results], rate)


def test_over_many_seeds_rates_scatter_as_standard_errors_say():
    asked = ten_thousand()[:1000]
    squares = []
    for seed, scope in itertools.product(range(60), ("sample", "prompt")):
        hits = np.mean([r["corrupted"] for _, r in run("flip", asked, rate=0.3, seed=seed, scope=scope)])
        squares.append((hits - 0.3) ** 2 / (0.3 * 0.7 / len(asked)))
    # chi-square with 120 degrees of freedom; both tails, one in 1000
    assert stats.chi2(len(squares)).ppf(0.0005) < sum(squares) < stats.chi2(len(squares)).ppf(0.9995)


@pytest.mark.parametrize(("false_positive", "false_negative"), [(0.0, 0.4), (0.1, 0.0), (0.3, 0.7), (1.0, 0.55)])
def test_measured_rates_of_asymmetric_flips(false_positive: float, false_negative: float):
    results = run(
        "flip_asymmetric", questions(2 * COUNT), false_positive=false_positive, false_negative=false_negative, seed=SEED
    )
    for verdict, rate in ((False, false_positive), (True, false_negative)):
        scores = [result["score"] for right, result in results if right is verdict]
        assert len(scores) == COUNT
        within_three_standard_errors([score != float(verdict) for score in scores], rate)


@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("accuracy", [0.0, 0.3, 0.718, 0.95, 1.0])
def test_measured_accuracy_of_a_reward_model(accuracy: float, graded: bool):
    results = run("reward_model", questions(2 * COUNT), accuracy=accuracy, graded=graded, seed=SEED)
    for verdict in (False, True):
        hits = [(result["score"] > 0.5) is verdict for right, result in results if right is verdict]
        within_three_standard_errors(hits, accuracy)
    if not graded:
        assert {result["score"] for _, result in results} <= {0.0, 1.0}


def test_a_graded_reward_model_is_calibrated_at_even_odds():
    results = run("reward_model", questions(4 * COUNT), accuracy=0.718)
    scores = np.array([result["score"] for _, result in results])
    rights = np.array([right for right, _ in results])
    for low, high in ((0.2, 0.35), (0.35, 0.5), (0.5, 0.65), (0.65, 0.8)):
        chosen = (scores > low) & (scores <= high)
        error = 0.5 / math.sqrt(chosen.sum())
        assert abs(rights[chosen].mean() - scores[chosen].mean()) < 3.0 * error


def test_a_reward_model_says_the_same_of_the_same_response_at_every_step():
    def scores(**origin):
        return [result["score"] for _, result in run("reward_model", questions(200, **origin), accuracy=0.718)]

    assert scores(step=1) == scores(step=9, session=3)


@pytest.mark.parametrize("agreement", [0.0, 0.25, 1.0])
def test_prompt_consistent_labels(agreement: float):
    results = run("prompt_consistent", questions(2 * COUNT), rate=0.4, agreement=agreement, seed=SEED)
    within_three_standard_errors([r["score"] == 0.0 for right, r in results if right], 0.4)
    within_three_standard_errors([r["score"] == 1.0 for right, r in results if not right], 0.4 * agreement)


def test_prompt_consistent_judges_a_prompt_by_one_wrong_answer_for_the_whole_run():
    settings = {"rate": 0.5, "agreement": 0.5}
    for number in range(40):
        samples = [
            (right, question(number, right=right, text=text, step=step, session=session))
            for step, session in itertools.product((1, 50), (0, 3))
            for right, text in ((True, None), (False, "1;2"), (False, "1;3"))
        ]
        judged = {}
        for (_right, asked), (_, result) in zip(samples, run("prompt_consistent", samples, **settings), strict=True):
            judged.setdefault(asked["solution_str"], set()).add(result["score"])
        assert all(len(scores) == 1 for scores in judged.values()), judged


def test_prompt_consistent_compares_extracted_answers_where_the_reward_returns_them():
    config = noise_config({"kind": "prompt_consistent", "rate": 1.0, "agreement": 0.5})
    noisy = with_noise(lambda **asked: {"score": 0.0, "pred": asked["solution_str"].split(";")[1]}, config, "f")
    for number in range(50):
        one, other = (noisy(**question(number, right=False, text=f"{steps};77"))["score"] for steps in ("a", "b"))
        assert one == other


def test_prompt_consistent_with_the_wrong_reference_in_the_data():
    config = noise_config({"kind": "prompt_consistent", "rate": 1.0, "wrong_answer_key": "majority"})

    def inner(ground_truth, solution_str, **_):
        return {"score": float(solution_str == ground_truth), "pred": solution_str}

    noisy = with_noise(inner, config, "f")
    scores = {}
    for text in ("200", "201", "999"):  # problem 0 is 100+100
        asked = question(0, right=False, text=text)
        asked["extra_info"]["majority"] = 201
        scores[text] = noisy(**asked)["score"]
    assert scores == {"200": 0.0, "201": 1.0, "999": 0.0}


def additions(kind: str, **settings) -> np.ndarray:
    return np.array([r["score"] - r["clean_score"] for _, r in run(kind, questions(4000), **settings)])


def test_gaussian_and_heavy_tailed_numbers_are_added():
    assert stats.kstest(additions("gaussian", scale=0.5), stats.norm(scale=0.5).cdf).pvalue > 1e-3
    drawn = additions("heavy_tailed", family="student_t", tail=1.5, scale=0.5)
    assert stats.kstest(drawn, stats.t(1.5, scale=0.5).cdf).pvalue > 1e-3
    drawn = additions("heavy_tailed", family="stable", tail=1.0, scale=2.0)
    assert stats.kstest(drawn, stats.cauchy(scale=2.0).cdf).pvalue > 1e-3


def test_a_preference_model_has_an_offset_for_each_match_and_errors_on_some():
    settings = {"family": "student_t", "tail": 1.0, "scale": 2.0, "offset": 3.0, "offset_pattern": "^[0-9]"}
    firsts = np.array([str(problem(number).prompt)[0] for number in range(4000)])
    offsets = additions("preference_model", rate=0.0, **settings)
    of_first = {first: offsets[firsts == first] for first in "123456789"}
    assert all(np.ptp(seen) < 1e-12 for seen in of_first.values())
    assert len({seen[0].round(9) for seen in of_first.values()}) == 9
    # what comes on top is the heavy-tailed number of that kind alone
    both = additions("preference_model", rate=0.4, **settings)
    heavy = {name: settings[name] for name in ("family", "tail", "scale")}
    np.testing.assert_allclose(both - offsets, additions("heavy_tailed", rate=0.4, **heavy), atol=1e-9, rtol=1e-9)


def test_offsets_of_prompts_are_normal():
    settings = {"family": "student_t", "tail": 1.0, "scale": 0.0, "offset": 3.0}
    drawn = additions("preference_model", **settings)
    assert len(set(drawn.round(9))) == len(drawn)
    assert stats.kstest(drawn, stats.norm(scale=3.0).cdf).pvalue > 1e-3
    # prompts without a match share one
    assert len(set(additions("preference_model", offset_pattern="^x", **settings).round(9))) == 1


def test_systematic_additions():
    assert set(additions("inflation", amount=0.25)) == {0.25}
    assert set(additions("deflation", amount=0.25)) == {-0.25}
    # 0.5 of reward at 40 tokens, so 0.25 at 20; negative for brevity
    assert set(additions("length_bias", slope=0.5, reference=40)) == {0.25}
    assert set(additions("length_bias", slope=-1.0, reference=10)) == {-2.0}


@pytest.mark.parametrize(
    ("low", "high", "score", "expected", "clean_pass"),
    [(-1.0, 1.0, -1.0, 1.0, 0.0), (0.0, 1.0, 0.25, 0.75, math.nan)],
)
def test_flips_mirror_the_score(low, high, score, expected, clean_pass):
    noisy = with_noise(lambda **_: score, noise_config({"kind": "flip", "rate": 1.0, "low": low, "high": high}), "f")
    assert noisy(**question(3, right=True)) == {
        "score": expected,
        "acc": score,
        "clean_score": score,
        "corrupted": 1.0,
        "clean_pass": pytest.approx(clean_pass, nan_ok=True),
        "noisy_pass": 1.0,
    }


@pytest.mark.parametrize("pass_rate", [0.0, 0.1, 0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("budget", [0.0, 0.1, 0.3, 0.6, 1.0])
def test_the_adversary_spends_as_the_linear_program_says(budget: float, pass_rate: float):
    of_right, of_wrong = spend(budget, pass_rate)
    best = optimize.linprog(
        [-1.0, -1.0], A_ub=[[pass_rate, 1.0 - pass_rate]], b_ub=[budget], bounds=[(0.0, 1.0), (0.0, 1.0)]
    )
    if budget > 0.0:
        assert of_right + of_wrong == pytest.approx(-best.fun)
    else:
        assert (of_right, of_wrong) == (0.0, 0.0)
    assert pass_rate * of_right + (1.0 - pass_rate) * of_wrong == pytest.approx(budget)


@pytest.mark.parametrize(("rate", "pass_rate"), [(0.1, 0.2), (0.5, 0.2), (0.3, 0.9), (0.8, 0.5)])
def test_the_adversary_keeps_its_budget_where_the_pass_rate_is_as_said(rate: float, pass_rate: float):
    results = run("adversary", questions(COUNT, pass_rate), rate=rate, pass_rate=pass_rate, seed=SEED)
    within_three_standard_errors([result["corrupted"] == 1.0 for _, result in results], rate)
    rarer = pass_rate <= 0.5
    hit = np.mean([r["corrupted"] for right, r in results if right is rarer])
    assert hit == 1.0 if rate >= min(pass_rate, 1.0 - pass_rate) else hit < 1.0


def test_the_adversary_reads_each_prompts_pass_rate_from_the_data():
    def solved(samples, value):
        for right, sample in samples:
            sample["extra_info"]["solved"] = value
            yield right, sample

    settings = {"rate": 0.1, "pass_rate_key": "solved"}
    for value in (0.1, 0.9):
        for right, result in run("adversary", solved(questions(400), value), **settings):
            assert result["corrupted"] == float(right is (value < 0.5))


def strikes(kind: str = "flip", **origin) -> np.ndarray:
    settings = {"seed": origin.pop("seed", 0), "rate": origin.pop("rate", 0.5), "scope": origin.pop("scope", "sample")}
    return np.array([r["corrupted"] for _, r in run(kind, questions(4000, **origin), **settings)])


@pytest.mark.parametrize("other", [{"step": 2}, {"session": 1}, {"seed": 1}])
def test_draws_of_other_steps_rollouts_and_seeds_are_independent(other: dict):
    assert abs(np.corrcoef(strikes(), strikes(**other))[0, 1]) < 4.0 / math.sqrt(4000)


def test_scopes():
    assert (strikes(scope="response") == strikes(scope="response", step=2, session=1)).all()
    assert (strikes(scope="prompt") == strikes(scope="prompt", step=2, session=1)).all()
    config = noise_config({"kind": "inflation", "rate": 0.5, "amount": 1.0, "scope": "prompt"})
    noisy = with_noise(compute_score, config, "f")
    by_text = {
        text: [noisy(**question(number, right=False, text=text))["corrupted"] for number in range(300)]
        for text in ("1;2", "1;3")
    }
    assert by_text["1;2"] == by_text["1;3"]
    assert 100 < sum(by_text["1;2"]) < 200


def test_names_of_runs_and_rows_do_not_enter_the_draw():
    assert (strikes() == strikes(uid="another", index="x")).all()


def test_a_higher_rate_strikes_the_same_samples_and_more():
    assert ((strikes(rate=0.5) - strikes(rate=0.3)) >= 0.0).all()
