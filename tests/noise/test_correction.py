# SPDX-License-Identifier: Apache-2.0
"""Tests of ``noise.correction``: exact expectations over the noise, without sampling; and what it refuses."""

import numpy as np
import pytest
from samples import question

from verl_dvpo.noise import corruptions
from verl_dvpo.noise.config import noise_config
from verl_dvpo.noise.correction import correct
from verl_dvpo.noise.reward import with_noise

GRID = 1000
#: Every rate is a multiple of 1 / GRID, so that a mean over the grid is the expectation.
BINARY = [
    {"kind": "flip", "rate": 0.3},
    {"kind": "flip", "rate": 0.6},
    {"kind": "flip", "rate": 1.0},
    {"kind": "flip", "rate": 0.2, "low": -1.0, "high": 3.0},
    {"kind": "flip_asymmetric", "false_positive": 0.3, "false_negative": 0.1},
    {"kind": "flip_asymmetric", "false_positive": 0.9, "false_negative": 0.7},
    {"kind": "reward_model", "accuracy": 0.718, "graded": False},
    {"kind": "dropout", "rate": 0.25},
    {"kind": "adversary", "rate": 0.3, "pass_rate": 0.6},
]


def expected(settings: dict, clean: float, monkeypatch: pytest.MonkeyPatch) -> float:
    """The mean corrected reward over all draws: the uniform number runs over the middles of GRID equal parts."""
    noisy = with_noise(lambda **_: clean, noise_config(settings), "constant")
    asked = question(5, right=True)
    scores = []
    for part in range(GRID):
        draw = (part + 0.5) / GRID
        monkeypatch.setattr(corruptions, "uniforms", lambda seed, key, draw=draw: (draw,) * 8)
        scores.append(noisy(**asked)["score"])
    return sum(scores) / GRID


@pytest.mark.parametrize("settings", BINARY, ids=str)
def test_backward_correction_is_unbiased(settings: dict, monkeypatch: pytest.MonkeyPatch):
    corrected = {**settings, "correction": {"kind": "backward"}}
    for clean in (settings.get("low", 0.0), settings.get("high", 1.0)):
        assert abs(expected(corrected, clean, monkeypatch) - clean) < 1e-9
    assert any(
        abs(expected(settings, clean, monkeypatch) - clean) > 0.05
        for clean in (settings.get("low", 0.0), settings.get("high", 1.0))
    ), "the noise alone has a bias"


@pytest.mark.parametrize(
    ("false_positive", "false_negative"), [(0.0, 0.0), (0.1, 0.3), (0.5, 0.4), (0.0, 0.9), (0.8, 0.0)]
)
def test_forward_correction_points_where_the_clean_gradient_does(false_positive: float, false_negative: float):
    # a softmax policy over four responses; all expectations are sums
    logits = np.array([0.3, -1.0, 0.8, 0.1])
    policy = np.exp(logits) / np.exp(logits).sum()
    scores = np.eye(4) - policy  # row a: the gradient of log policy(a)
    clean = np.array([1.0, 0.0, 0.0, 1.0])
    noise = {"kind": "flip_asymmetric", "false_positive": false_positive, "false_negative": false_negative}
    config = noise_config({**noise, "correction": {"kind": "forward"}})
    passing = np.where(clean == 1.0, 1.0 - false_negative, false_positive)
    weights = passing * correct(config, 1.0, acts=True) + (1.0 - passing) * correct(config, 0.0, acts=True)
    np.testing.assert_allclose(weights[clean == 1.0], 0.0, atol=1e-15)
    youden_j = 1.0 - false_positive - false_negative
    np.testing.assert_allclose(weights[clean == 0.0], -youden_j, atol=1e-15)
    np.testing.assert_allclose((policy * weights) @ scores, youden_j * ((policy * clean) @ scores), atol=1e-15)


def test_forward_correction_with_ends_of_its_own():
    noise = {"kind": "flip", "rate": 0.2, "low": -1.0, "high": 3.0, "correction": {"kind": "forward"}}
    config = noise_config(noise)
    assert correct(config, 3.0, acts=True) == pytest.approx(4.0 * 0.2)
    assert correct(config, -1.0, acts=True) == pytest.approx(4.0 * -0.8)


def test_rates_are_0_where_the_noise_does_not_act():
    flip = {"kind": "flip", "rate": 0.3, "where": {"prompt_matches": "^[5-9]"}}
    noisy = with_noise(lambda **_: 1.0, noise_config({**flip, "correction": {"kind": "backward"}}), "constant")
    outside, inside = noisy(**question(0, right=True)), noisy(**question(450, right=True))
    assert outside["score"] == outside["noisy_score"] == 1.0
    assert inside["score"] == pytest.approx((inside["noisy_score"] - 0.3) / 0.4)
    forward = with_noise(lambda **_: 1.0, noise_config({**flip, "correction": {"kind": "forward"}}), "constant")
    assert forward(**question(0, right=True))["score"] == 0.0


def test_rates_that_the_user_knows_come_first_and_serve_real_noise():
    known = {"kind": "backward", "false_positive": 0.2, "false_negative": 0.3}
    for noise in ({"kind": "none"}, {"kind": "flip", "rate": 0.1}):
        config = noise_config({**noise, "correction": known})
        assert correct(config, 1.0, acts=True) == pytest.approx(0.8 / 0.5)
        assert correct(config, 0.0, acts=True) == pytest.approx(-0.2 / 0.5)
    result = with_noise(lambda **_: 1.0, noise_config({"kind": "none", "correction": known}), "constant")(
        **question(5, right=True)
    )
    assert (result["score"], result["clean_score"], result["corrupted"]) == (pytest.approx(1.6), 1.0, 0.0)


def test_a_validation_is_not_corrected():
    config = noise_config({"kind": "flip", "rate": 0.3, "correction": {"kind": "backward"}})
    assert with_noise(lambda **_: 1.0, config, "constant")(**question(5, right=True, validate=True)) == 1.0


@pytest.mark.parametrize(
    ("correction", "bounds"), [({}, (0.0, 1.0)), ({"low": -2.0, "high": 3.0}, (-2.0, 3.0)), ({"high": 2}, (0.0, 2.0))]
)
def test_clipping_of_heavy_tails(correction: dict, bounds: tuple[float, float]):
    heavy = {"kind": "heavy_tailed", "family": "student_t", "tail": 0.8, "scale": 2.0}
    config = noise_config({**heavy, "correction": {"kind": "clip", **correction}})
    noisy = with_noise(lambda **_: 0.5, config, "constant")
    scores = []
    for number in range(300):
        result = noisy(**question(number, right=True))
        scores.append(result["score"])
        assert result["score"] == float(np.clip(result["noisy_score"], *bounds))
    assert {min(scores), max(scores)} == set(bounds)
    assert sum(bounds[0] < score < bounds[1] for score in scores) > 30


KNOWN = {"false_positive": 0.1, "false_negative": 0.1}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"correction": {"kind": "sideways"}}, "noise.correction.kind is 'sideways'; it must be one of 'none', "),
        ({"correction": 3}, "noise.correction is 3; it must be fields"),
        ({"correction": {"kind": "backward", "rate": 1}}, "noise.correction.rate is 1; .* has no such field; .*'high'"),
        (
            {"correction": {"kind": "backward", "false_positive": 1.5}},
            r"false_positive is 1.5; .* in \[0, 1\], or null",
        ),
        ({"correction": {"kind": "forward", **KNOWN}}, "false_positive is 0.1; it must be null with noise.correction"),
        ({"correction": KNOWN}, "false_positive is 0.1; it must be null with noise.correction.kind=none"),
        ({"correction": {"kind": "backward", "low": 0.0}}, "correction.low is 0.0; it must be null with"),
        ({"correction": {"kind": "clip", "low": 2.0}}, "correction.high is 1.0; it must be above .* which is 2.0"),
        ({"rate": 0.5, "correction": {"kind": "backward"}}, "must not add up to 1"),
        ({"rate": 0.6, "correction": {"kind": "forward"}}, "must add up to less than 1"),
        ({"kind": "none", "correction": {"kind": "backward"}}, "false_positive is None; .*noise.kind=none"),
        ({"kind": "none", "correction": {"kind": "forward"}}, "false_negative is None; .*noise.kind=none"),
        (
            {"kind": "adversary", "pass_rate_key": "p", "correction": {"kind": "backward"}},
            "false_positive is None; .*noise.kind=adversary, whose own rates are not known",
        ),
        (
            {"kind": "reward_model", "rate": None, "accuracy": 0.7, "correction": {"kind": "backward"}},
            "use .*kind=clip",
        ),
        ({"kind": "dropout", "withheld": 0.5, "correction": {"kind": "forward"}}, "use noise.correction.kind=clip"),
        ({"where": {"share": 2}}, r"noise.where.share is 2; it must be a number in \[0, 1\], or null"),
        ({"where": {"data_source": "gsm8k"}}, "noise.where.data_source is 'gsm8k'; it must be a list of names"),
        ({"where": {"data_source": [3]}}, "noise.where.data_source is 3; it must be a list of names"),
        ({"where": {"data_source": []}}, r"noise.where.data_source is \[\]; it must be a list of names"),
        ({"where": {"prompt": "5"}}, "noise.where.prompt is '5'; .* no such field; its fields are .*'prompt_matches'"),
        ({"where": "5"}, "noise.where is '5'; it must be fields"),
        ({"from_step": -1}, "noise.from_step is -1; it must be an integer of at least 0, or null"),
        ({"from_step": 5, "until_step": 4}, "noise.until_step is 4; it must be at least noise.from_step, which is 5"),
    ],
)
def test_bad_settings_are_named(settings: dict, said: str):
    given = {"kind": "flip", "rate": 0.3, **settings}
    given = {name: value for name, value in given.items() if value is not None}
    if given["kind"] == "none":
        del given["rate"]
    with pytest.raises(ValueError, match=said) as caught:
        noise_config(given)
    assert len(str(caught.value).splitlines()) == 1
