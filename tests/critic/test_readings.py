# SPDX-License-Identifier: Apache-2.0
"""What the actor's options read of a critic: against numpy, through the real worker, and what is refused before."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from verl.utils import tensordict_utils as tu
from verl.workers.utils.padding import response_from_nested

from critic import harness
from verl_dvpo.critic.readings import OPTIONS, check_readings, read_states
from verl_dvpo.distributional.advantage_config import AdvantageConfig
from verl_dvpo.families.registry import build_family, family_settings

EVERY = {
    "precision": AdvantageConfig(weighting="precision"),
    "winsorised": AdvantageConfig(reward="winsorised", reward_low=0.1, reward_high=0.7, reward_widening=1.0),
    "gated": AdvantageConfig(reward="gated"),
    "median": AdvantageConfig(readout="median"),
    "trimmed": AdvantageConfig(readout="trimmed", readout_level=0.2),
    "cvar": AdvantageConfig(readout="cvar", readout_level=0.4),
    "cvar auto": AdvantageConfig(readout="cvar", readout_level="auto"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return harness.save_model(tmp_path_factory.mktemp("model"))


def expected_of(heads: np.ndarray, options: AdvantageConfig) -> dict[str, np.ndarray]:
    """(L, N, M) quantiles of each head -> the fields, by numpy; its method hazen places points as we do."""
    points = np.sort(heads.mean(1), -1)

    def at(level: float) -> np.ndarray:
        return np.quantile(points, level, axis=-1, method="hazen")

    level = 1.0 if options.readout_level == "auto" else options.readout_level
    readouts = {
        "median": np.median(points, -1),
        "trimmed": stats.trim_mean(points, min(level, 0.49), axis=-1),
        "cvar": points[:, : max(round(level * points.shape[-1]), 1)].mean(-1),
    }
    often = points.repeat(20, axis=-1)  # a level may end within a point's share
    every = {
        "value_sigma": (at(0.84) - at(0.16)) / 2,
        "value_low": at(options.reward_low),
        "value_high": at(options.reward_high),
        "value_disagreement": heads.mean(-1).std(-1),
        "value_readout": readouts.get(options.readout),
        **{f"value_cvar_{n}": often[:, : n * often.shape[-1] // 100].mean(-1) for n in (10, 25, 50)},
    }
    return {name: every[name] for name in options.fields}


@pytest.mark.parametrize("name", EVERY)
def test_readings_of_a_quantile_ensemble_are_numpys(name):
    family = build_family(family_settings("quantile_ensemble", num_heads=3, num_quantiles=10, levels="midpoint"))
    outputs = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    found = read_states(family, outputs, EVERY[name])
    expected = expected_of(outputs.double().numpy().reshape(40, 3, 10), EVERY[name])
    assert list(expected)
    assert found.keys() == expected.keys()
    for field, reading in found.items():
        np.testing.assert_allclose(reading.numpy(), expected[field], rtol=1e-4, atol=1e-5)


def test_readings_of_a_normal_distribution_are_scipys():
    family = build_family(family_settings("gaussian"))
    outputs = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    mean, std = family.keep(outputs).double().unbind(-1)
    options = AdvantageConfig(weighting="precision", reward="winsorised", readout="cvar", readout_level=0.25)
    found = read_states(family, outputs, options)
    np.testing.assert_allclose(found["value_sigma"], std * stats.norm.ppf(0.84), rtol=1e-5)
    np.testing.assert_allclose(found["value_low"], stats.norm.ppf(0.05, mean, std), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["value_high"], stats.norm.ppf(0.95, mean, std), rtol=1e-4, atol=1e-5)
    tail = mean - std * stats.norm.pdf(stats.norm.ppf(0.25)) / 0.25
    np.testing.assert_allclose(found["value_readout"], tail, rtol=1e-2, atol=1e-2)


def test_nothing_is_read_where_nothing_is_asked():
    family = build_family(family_settings("quantile_ensemble"))
    clipped = AdvantageConfig(reward="clipped", weighting="group_std", lam_actor="length")
    for options in (AdvantageConfig(), clipped, AdvantageConfig(reward="gated", gate_gain=0.3)):
        assert read_states(family, torch.zeros(3, family.num_outputs), options) == {}


def infer(worker, batch, options: AdvantageConfig | None):
    data = batch.clone()
    tu.assign_non_tensor(data, compute_loss=False, temperature=1.0)
    if options is not None:
        tu.assign_non_tensor(data, **{OPTIONS: options})
    return worker.infer_batch(data)


@pytest.mark.parametrize("engine", [{}, {"use_dynamic_bsz": True, "infer_max_token_len_per_gpu": 20}])
def test_the_worker_returns_the_fields_beside_the_values(model: Path, engine):
    worker = harness.make_worker(model, engine=engine)
    batch = harness.make_batch()
    options = AdvantageConfig(weighting="precision", reward="gated", readout="median")
    found = infer(worker, batch, options)
    plain = infer(worker, batch, None)
    assert torch.equal(found["values"].values(), plain["values"].values())
    tensors = {name for name, value in plain.items() if isinstance(value, torch.Tensor)}
    assert {name for name, value in found.items() if isinstance(value, torch.Tensor)} == tensors | set(options.fields)

    module = worker.engine.module.eval()
    states = []
    for prompt, ids in zip(batch["prompts"].unbind(), batch["input_ids"].unbind(), strict=True):
        with torch.no_grad():
            states.append(module(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1].double())
    heads = torch.cat(states).numpy().reshape(-1, 2, 5)
    lengths = [len(response) for response in batch["responses"].unbind()]
    for field, expected in expected_of(heads, options).items():
        assert [len(row) for row in found[field].unbind()] == lengths
        np.testing.assert_allclose(found[field].values().numpy(), expected, rtol=1e-3, atol=1e-5)
    values = response_from_nested(found["values"], batch["response_mask"])
    assert [len(row) for row in values.unbind()] == lengths


def test_the_mean_spread_is_logged_when_it_is_used_and_targets_stay_as_they_are(model: Path):
    batch = harness.make_batch()
    logged, gradients = {}, {}
    for name, options in (("off", None), ("on", AdvantageConfig(weighting="precision", readout="cvar"))):
        worker = harness.make_worker(model)
        gradients[name] = harness.capture_gradients(worker)
        found = infer(worker, batch, options)
        logged[name] = harness.train(worker, batch)
        if options is not None:
            mask = batch["response_mask"].values() != 0
            mean = found["value_sigma"].values()[mask].double().mean().item()
    (sigma,) = logged["on"]["critic/quantile/sigma"]
    assert sigma == pytest.approx(mean, rel=1e-5)
    assert sigma > 0
    assert logged["on"].keys() - logged["off"].keys() == {"critic/quantile/sigma"}
    assert all(torch.equal(gradient, gradients["off"][name]) for name, gradient in gradients["on"].items())


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("family", ["scalar", "scalar_ensemble", "robust_bellman"])
def test_a_critic_without_a_distribution_is_refused(family, name):
    message = f"critic.value.family is '{family}', whose quantiles are all equal"
    with pytest.raises(ValueError, match=re.escape(message)):
        check_readings(build_family(family_settings(family)), EVERY[name], family)


def test_the_refusal_names_what_was_chosen():
    options = AdvantageConfig(weighting="precision", readout="median")
    message = "algorithm.value.weighting is 'precision', algorithm.value.readout is 'median'; that needs a critic with"
    with pytest.raises(ValueError, match=message):
        check_readings(build_family(family_settings("scalar")), options, "scalar")


def test_a_gate_needs_heads_that_can_disagree():
    one = build_family(family_settings("quantile_ensemble", num_heads=1))
    with pytest.raises(ValueError, match=r"algorithm.value.reward is 'gated'; its gain needs heads that can disagree"):
        check_readings(one, EVERY["gated"], "quantile_ensemble")
    with pytest.raises(ValueError, match=r"its level needs heads .* set .*num_heads to 2 or more, or .*readout_level"):
        check_readings(one, EVERY["cvar auto"], "quantile_ensemble")
    check_readings(one, AdvantageConfig(reward="gated", gate_gain=0.5), "quantile_ensemble")
    check_readings(one, EVERY["precision"], "quantile_ensemble")
    check_readings(build_family(family_settings("quantile_ensemble")), EVERY["gated"], "quantile_ensemble")


@pytest.mark.parametrize("family", ["quantile_ensemble", "value_flow", "gaussian"])
def test_a_distribution_serves(family):
    check_readings(build_family(family_settings(family)), EVERY["precision"], family)


@pytest.mark.parametrize("family", ["scalar", "value_flow", "gaussian"])
def test_a_family_without_heads_has_one(family):
    built = build_family(family_settings(family))
    outputs = torch.randn(4, built.num_outputs, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(built.head_values(outputs), built.value(outputs)[:, None])
