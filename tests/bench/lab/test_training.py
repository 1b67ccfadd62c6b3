# SPDX-License-Identifier: Apache-2.0
"""Training: seeds side by side equal seeds alone, every family learns a process it can learn, forms of constraints."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from verl_dvpo.bench.lab import forms, registry
from verl_dvpo.bench.lab.process import bernoulli_walk, skewed_walk
from verl_dvpo.bench.lab.training import TrainConfig, train
from verl_dvpo.distributional import DVPOLossConfig, quantile_levels
from verl_dvpo.families.quantile_ensemble import QuantileEnsembleConfig, QuantileEnsembleFamily

FAST = TrainConfig(updates=3, batch=8, points=2, learning_rate=0.05)


@pytest.mark.parametrize("model", ["table", "mlp"])
def test_a_run_does_not_depend_on_the_others(model: str) -> None:
    # Batch constraints on: a multiplier shared by mistake between the runs would show.
    family = registry.quantiles(coef=dict.fromkeys(registry.TERMS, 0.5))
    config = replace(FAST, model=model)
    both = train(family, skewed_walk(3), noise="heavy", seeds=[3, 8], config=config)
    for i, seed in enumerate((3, 8)):
        alone = train(family, skewed_walk(3), noise="heavy", seeds=[seed], config=config)
        np.testing.assert_allclose(both.samples[i], alone.samples[0], atol=2e-5)
        np.testing.assert_allclose(both.curve[:, i], alone.curve[:, 0], atol=2e-5)


def test_seeds_differ_and_critics_share_their_sequences() -> None:
    first = train(registry.setup("ppo").build(), bernoulli_walk(4), seeds=[0, 1], config=FAST)
    again = train(registry.setup("ppo").build(), bernoulli_walk(4), seeds=[0, 1], config=FAST)
    np.testing.assert_array_equal(first.samples, again.samples)
    assert np.abs(first.samples[0] - first.samples[1]).max() > 1e-3


@pytest.mark.parametrize("critic", sorted(registry.FAMILIES))
def test_every_family_learns_a_short_walk(critic: str) -> None:
    chosen = registry.setup(critic)
    config = TrainConfig(updates=40, batch=32, learning_rate=0.05, points=1, lam=chosen.lam or 0.95)
    trained = train(chosen.build(), bernoulli_walk(3), seeds=[0, 1], config=config)
    # Untrained, V is near 0: an error of √(Σ visits·V²) = 0.55.
    assert trained.metrics["v_error"].max() < 0.2
    np.testing.assert_allclose(trained.curve[-1], trained.metrics["v_error"], rtol=1e-6)


def test_scalar_critic_finds_the_value_of_a_certain_process() -> None:
    # One token: the reward is a fair label and there is one state.
    config = TrainConfig(updates=200, batch=64, learning_rate=0.02, points=1)
    trained = train(registry.setup("ppo").build(), bernoulli_walk(1), seeds=[0], config=config)
    assert trained.samples[0, 0, 0] == pytest.approx(0.5, abs=0.06)


def test_dvpo_and_dvpo_calibrated_are_what_ships() -> None:
    dvpo, calibrated = (registry.setup(name).build() for name in ("dvpo", "dvpo_calibrated"))
    assert isinstance(dvpo, QuantileEnsembleFamily)
    assert isinstance(calibrated, QuantileEnsembleFamily)
    shipped = QuantileEnsembleFamily(QuantileEnsembleConfig())
    assert dvpo.loss_config == shipped.loss_config
    assert (dvpo.target, dvpo.levels[-1]) == (shipped.target, shipped.levels[-1])
    # tests/test_configs.py: what algorithm=dvpo_calibrated ships.
    assert calibrated.loss_config == DVPOLossConfig(kappa=0.0, constraint_statistics="level")
    assert (calibrated.target, calibrated.levels[0].item()) == ("sample_replacement", pytest.approx(0.01))


def test_config_is_checked() -> None:
    with pytest.raises(ValueError, match="mini_batches must divide batch"):
        TrainConfig(batch=10, mini_batches=3)
    with pytest.raises(ValueError, match="model is 'gpt'"):
        TrainConfig(model="gpt")
    with pytest.raises(ValueError, match="critic is 'a2c'; allowed are ppo"):
        registry.setup("a2c")


def distributions() -> tuple[torch.Tensor, torch.Tensor]:
    """q (L, M), the true quantiles of N(0, 1) at midpoints, and z (L, K): per token one trajectory's narrow targets."""
    generator = torch.Generator().manual_seed(0)
    levels = quantile_levels(200, "midpoint", dtype=torch.float64)
    q = torch.special.ndtri(levels).expand(20_000, -1)
    centre = torch.randn(20_000, 1, generator=generator, dtype=torch.float64)
    z = 0.8 * centre + 0.6 * torch.randn(20_000, 50, generator=generator, dtype=torch.float64)
    return q, z.sort(-1).values


def test_the_unbiased_statistic_and_the_shape_of_levels_vanish_at_the_mixture() -> None:
    q, z = distributions()
    unbiased = forms.unbiased_differences(q, z, 0.1, 0.1)
    level = forms.level_shape_differences(q, z, quantile_levels(200, "midpoint", dtype=torch.float64), 0.1, 0.1)
    for name in ("cvar", "gain", "shape_low", "shape_up"):
        # 4 standard errors; what is left is that 200 points stop at N(0, 1)'s 0.25 % quantile: of a tail variance of
        # 0.17 they miss 0.01 to 0.02, and of a tail's mean 0.002.
        error = 4 * float(unbiased[name].std()) / 20_000**0.5
        assert float(unbiased[name].mean()) == pytest.approx(0.0, abs=error + 0.02)
    for name in ("shape_low", "shape_up"):
        error = 4 * float(level[name].std()) / 20_000**0.5
        assert float(level[name].mean()) == pytest.approx(0.0, abs=error + 1e-4)


def test_level_shape_by_hand() -> None:
    # q = 1..10 at 0.05 .. 0.95 and tails of 2 points; z has 1 point below q_1, ties with q_2 and q_9, 1 in the middle.
    q = torch.arange(1.0, 11.0)[None]
    z = torch.tensor([[0.0, 2.0, 5.5, 9.0]])
    d = forms.level_shape_differences(q, z, quantile_levels(10), 0.2, 0.2)
    # Lower: edge q_2 at 0.15 has 0.375 below it, middle q_1 at 0.05 has 0.25; a third of 0.375 is expected.
    assert d["shape_low"].item() == pytest.approx(0.375 / 3 - 0.25)
    # Upper: above edge q_9 0.125, above middle q_10 0, and 0.05/0.15 of 0.125 is expected.
    assert d["shape_up"].item() == pytest.approx(0.0 - 0.125 / 3)


def test_unbiased_differences_by_hand() -> None:
    # q = 0..9, share 0.2: tail {0, 1}, edge 1.5. z = {-3, 1, 4, 8, 8}: below the edge −3 and 1, so
    # 1.5 − (4.5 + 0.5)/5/0.2 = −3.5 against 0.5; second moments about 0.5: (12.25 + 0.25)/5/0.2 + 0 − 0.
    q = torch.arange(10.0)[None]
    z = torch.tensor([[-3.0, 1.0, 4.0, 8.0, 8.0]])
    d = forms.unbiased_differences(q, z, 0.2, 0.2)
    # 2 of 5 are below the edge, 0.4 of the probability for a share of 0.2: the excess 0.2 is taken back at the edge.
    second = (12.25 + 0.25) / 5 / 0.2 + (0.2 - 0.4) * 1.0**2 / 0.2
    assert d["cvar"].item() == pytest.approx(0.5 + 3.5)
    assert d["shape_low"].item() == pytest.approx(0.25 - second)
    # Upper: edge 7.5, tail mean 8.5; z: 7.5 + (0.5 + 0.5)/5/0.2 = 8.5.
    assert d["gain"].item() == pytest.approx(8.5 - 8.5)


def test_averages_over_blocks() -> None:
    # 16 blocks of 2 with means 0.5, 2.5, ..., 30.5: the median is (14.5 + 16.5)/2. An outlier in the first block moves
    # that block to the end, and the median to (16.5 + 18.5)/2.
    values = torch.arange(32.0)
    assert forms._median_of_blocks(values).item() == pytest.approx(15.5)
    values[0] = 1e6
    assert forms._median_of_blocks(values).item() == pytest.approx(17.5)
    noise = torch.randn(16_000, generator=torch.Generator().manual_seed(0))
    assert forms._gated_mean(noise).item() == pytest.approx(0.0, abs=0.01)
    assert forms._gated_mean(noise + 1.0).item() == pytest.approx(1.0, abs=0.03)


def test_multipliers_of_levels() -> None:
    # q = 1..10, tails of 2 points, each with a standard deviation of 0.5; every target above q: F_z = 0.
    config = QuantileEnsembleConfig(num_heads=1, num_quantiles=10, levels="midpoint", kappa=0.0, alpha=0.2, beta=0.2)
    targets = {"old": torch.arange(10.0, 0.0, -1.0).expand(16, -1), "targets": torch.full((16, 4), 99.0)}
    for average, one_sided in (("mean", True), ("signed", False)):
        chosen = forms.ConstraintFormFamily(config, statistic="level", average=average)
        mu = chosen.multipliers(targets, torch.ones(16))
        # cvar: −(0.05 + 0.15)/2; gain: (0.85 + 0.95)/2; shift: 0.5; shape_low: 0 − 0; shape_up: 1 − 1/3, over 2·0.5.
        assert mu["cvar"].item() == pytest.approx(-0.1)
        assert mu["gain"].item() == pytest.approx(0.9)
        assert mu["shift"].item() == pytest.approx(0.5)
        assert mu["shape_low"].item() == pytest.approx(0.0)
        assert mu["shape_up"].item() == pytest.approx((1 - 1 / 3) / (2 * 0.5))
        # The other way round only a two-sided constraint pulls.
        below = chosen.multipliers({**targets, "targets": torch.full((16, 4), -99.0)}, torch.ones(16))
        assert below["gain"].item() == pytest.approx(0.0 if one_sided else -0.1)
        assert below["shift"].item() == pytest.approx(0.0 if one_sided else -0.5)


def test_plain_form_and_signed_levels_are_the_core_s_and_bad_forms_are_refused() -> None:
    coef = registry.CONSTRAINT_COEF
    plain, core = registry.form("tail", coef=coef), registry.quantiles("eq2", coef=coef)
    trained = [train(family, skewed_walk(3), seeds=[0], config=FAST).samples for family in (plain, core)]
    np.testing.assert_array_equal(*trained)
    strong = dict.fromkeys(registry.LEVEL_COEF, 1.0)
    signed = registry.form("level", "signed", coef=strong), registry.quantiles("eq2", coef=strong, statistics="level")
    levels = [train(family, skewed_walk(3), seeds=[0], config=FAST).samples for family in signed]
    np.testing.assert_allclose(*levels, atol=1e-6)
    assert np.abs(levels[0] - trained[0]).max() > 1e-3
    with pytest.raises(ValueError, match="statistic is 'mode'"):
        registry.form("mode", coef=coef)
    with pytest.raises(ValueError, match="average is 'max'"):
        registry.form("tail", "max", coef=coef)
