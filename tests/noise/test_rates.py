# SPDX-License-Identifier: Apache-2.0
"""Tests of the rates of noise on binary rewards: known ones against counts, logged ones against a loop."""

import math

import pytest
from samples import questions
from scipy import integrate

from verl_dvpo.bench.tasks.reward import compute_score
from verl_dvpo.noise.config import noise_config
from verl_dvpo.noise.kinds import KINDS
from verl_dvpo.noise.metrics import noise_metrics
from verl_dvpo.noise.rates import Rates, rates
from verl_dvpo.noise.reward import with_noise

COUNT = 20_000
KNOWN = [
    {"kind": "flip", "rate": 0.3},
    {"kind": "flip", "rate": 0.6},
    {"kind": "flip", "rate": 1.0},
    {"kind": "flip_asymmetric", "false_positive": 0.3, "false_negative": 0.1},
    {"kind": "gaussian", "scale": 0.5},
    {"kind": "gaussian", "scale": 2.0, "rate": 0.4},
    {"kind": "gaussian", "scale": 0.0},
    {"kind": "heavy_tailed", "family": "student_t", "tail": 1.5, "scale": 0.5},
    {"kind": "heavy_tailed", "family": "stable", "tail": 1.2, "scale": 0.5},
    {"kind": "heavy_tailed", "family": "stable", "tail": 1.0, "scale": 0.5},
    {"kind": "heavy_tailed", "family": "stable", "tail": 2.0, "scale": 0.5, "rate": 0.7},
    {"kind": "inflation", "amount": 0.6, "rate": 0.4},
    {"kind": "inflation", "amount": 0.5},
    {"kind": "deflation", "amount": 0.5, "rate": 0.4},
    {"kind": "deflation", "amount": 0.4},
    {"kind": "prompt_consistent", "rate": 0.6, "agreement": 0.3},
    {"kind": "reward_model", "accuracy": 0.718},
    {"kind": "reward_model", "accuracy": 0.3, "graded": False},
    {"kind": "reward_model", "accuracy": 0.5},
    {"kind": "dropout", "rate": 0.3},
    {"kind": "dropout", "rate": 0.3, "withheld": 0.9},
    {"kind": "dropout", "rate": 0.3, "withheld": 0.5},
    {"kind": "adversary", "rate": 0.3, "pass_rate": 0.2},
    {"kind": "adversary", "rate": 0.4, "pass_rate": 0.8},
]


def counted(results: list[dict], low: float = 0.0, high: float = 1.0) -> Rates:
    """FPR and FNR by looking at every score."""
    fp = tn = fn = tp = 0
    for result in results:
        passes = result["score"] > low + (high - low) / 2
        if result["clean_score"] == low:
            fp, tn = fp + passes, tn + (not passes)
        elif result["clean_score"] == high:
            tp, fn = tp + passes, fn + (not passes)
    return Rates(fp / (fp + tn), fn / (fn + tp))


def results(settings: dict, count: int = COUNT, reward=compute_score) -> list[dict]:
    noisy = with_noise(reward, noise_config(settings), "demo")
    return [noisy(**asked) for _, asked in questions(count)]


def test_every_kind_with_known_rates_is_counted_below():
    assert {settings["kind"] for settings in KNOWN} | {"length_bias", "preference_model"} == set(KINDS)


@pytest.mark.parametrize("settings", KNOWN, ids=str)
def test_known_rates_against_a_count(settings: dict):
    known = rates(noise_config({"seed": 2, **settings}))
    seen = counted(results({"seed": 2, **settings}))
    for name in ("fpr", "fnr"):
        expected = getattr(known, name)
        assert 0.0 <= expected <= 1.0
        error = math.sqrt(expected * (1.0 - expected) / (COUNT / 2))
        # of the fifty comparisons, four standard errors leave out one in 300 seeds
        assert abs(getattr(seen, name) - expected) <= 4.0 * error + 1e-12, (name, seen, known)


def test_rates_by_hand():
    assert rates(noise_config({"kind": "flip", "rate": 0.6})).youden_j == pytest.approx(-0.2)
    assert rates(noise_config({"kind": "flip", "rate": 1.0})).youden_j == -1.0
    # a normal number with standard deviation 1 is above 1, half of [-1, 1], with probability 0.15866
    gaussian = noise_config({"kind": "gaussian", "scale": 1.0, "low": -1.0, "high": 1.0})
    assert rates(gaussian) == pytest.approx((0.15866, 0.15866), abs=1e-5)
    # standard Cauchy above 1: a quarter
    cauchy = {"kind": "heavy_tailed", "tail": 1.0, "scale": 0.5}
    for family in ("student_t", "stable"):
        assert rates(noise_config({**cauchy, "family": family})) == pytest.approx((0.25, 0.25), abs=1e-9)


@pytest.mark.parametrize(("tail", "scale"), [(0.7, 0.5), (1.2, 0.5), (1.6, 0.25), (2.0, 0.5)])
def test_rates_of_stable_noise_against_the_inverted_characteristic_function(tail: float, scale: float):
    # Gil-Pelaez: P(x > c) = 1/2 - 1/pi * integral over t > 0 of sin(c t) exp(-t^tail) / t
    far = 0.5 / scale
    area, _ = integrate.quad(lambda t: math.sin(far * t) * math.exp(-(t**tail)) / t, 0.0, 200.0, limit=2000)
    settings = {"kind": "heavy_tailed", "family": "stable", "tail": tail, "scale": scale, "rate": 0.8}
    assert rates(noise_config(settings)).fpr == pytest.approx(0.8 * (0.5 - area / math.pi), abs=1e-7)


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "length_bias", "slope": 1.0, "reference": 10},
        {"kind": "preference_model", "family": "student_t", "tail": 1.0, "scale": 1.0, "offset": 1.0},
        {"kind": "prompt_consistent", "rate": 0.1, "wrong_answer_key": "vote"},
        {"kind": "adversary", "rate": 0.1, "pass_rate_key": "solved"},
    ],
)
def test_rates_that_depend_on_the_data_are_not_known(settings: dict):
    assert rates(noise_config(settings)) is None


@pytest.mark.parametrize("settings", [*KNOWN, {"kind": "length_bias", "slope": 0.7, "reference": 20}], ids=str)
def test_logged_rates_against_a_count(settings: dict):
    infos = results(settings, 500)
    logged = noise_metrics(infos)
    seen = counted(infos)
    assert logged["noise/fpr"] == pytest.approx(seen.fpr, abs=1e-12)
    assert logged["noise/fnr"] == pytest.approx(seen.fnr, abs=1e-12)
    assert logged["noise/youden_j"] == pytest.approx(1.0 - seen.fpr - seen.fnr, abs=1e-12)


def test_logged_rates_with_other_ends():
    settings = {"kind": "gaussian", "scale": 1.0, "low": -1.0, "high": 1.0}
    infos = results(settings, 500, lambda **asked: 2.0 * compute_score(**asked)["score"] - 1.0)
    seen = counted(infos, -1.0, 1.0)
    assert 0.05 < seen.fpr < 0.3
    assert noise_metrics(infos)["noise/fpr"] == pytest.approx(seen.fpr, abs=1e-12)


def test_a_rate_without_its_class_is_left_out():
    flip = {"kind": "flip", "rate": 0.4}
    names = ("noise/fpr", "noise/fnr", "noise/youden_j")

    def logged(reward) -> dict:
        return {name: value for name, value in noise_metrics(results(flip, 200, reward)).items() if name in names}

    assert set(logged(lambda **_: 1.0)) == {"noise/fnr"}
    assert set(logged(lambda **_: 0.0)) == {"noise/fpr"}
    assert logged(lambda **_: 0.7) == {}, "a graded reward has no rates"
    assert set(logged(compute_score)) == set(names)


def test_logged_rates_are_those_before_a_correction():
    flip = {"kind": "flip", "rate": 0.4}
    plain, corrected = (
        noise_metrics(results(settings, 500)) for settings in (flip, {**flip, "correction": {"kind": "backward"}})
    )
    assert corrected["noise/noisy_score/mean"] == plain["noise/score/mean"]
    assert corrected["noise/score/mean"] == pytest.approx((plain["noise/score/mean"] - 0.4) / 0.2)
    same = set(plain) - {"noise/score/mean"}
    assert {name: corrected[name] for name in same} == {name: plain[name] for name in same}
