# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch

from verl_dvpo.distributional import quantile_huber_loss, quantile_levels
from verl_dvpo.distributional.levels import read_at


def test_hand_worked_levels():
    # M = 4: j/4, and (2j − 1)/8
    assert quantile_levels(4, "right").tolist() == [0.25, 0.5, 0.75, 1.0]
    assert quantile_levels(4).tolist() == [0.125, 0.375, 0.625, 0.875]
    assert quantile_levels(1).tolist() == [0.5]
    assert quantile_levels(3, dtype=torch.float64).dtype == torch.float64


@pytest.mark.parametrize(
    ("size", "kind", "message"),
    [
        (0, "right", "num_quantiles is 0"),
        (2.0, "right", "2.0"),
        (3, "left", "kind is 'left'.*midpoint, right"),
    ],
)
def test_bad_levels_are_named(size, kind, message):
    with pytest.raises(ValueError, match=message):
        quantile_levels(size, kind)


def test_levels_changed_in_place_are_checked_again():
    """Levels are checked once per tensor, and again after their values change in place."""
    levels = quantile_levels(3)
    quantile_huber_loss(torch.zeros(3), torch.zeros(2), levels)
    levels[0] = 0.9
    with pytest.raises(ValueError, match="ascend"):
        quantile_huber_loss(torch.zeros(3), torch.zeros(2), levels)


def test_levels_made_under_inference_mode_are_checked():
    with torch.inference_mode():
        levels = quantile_levels(3)
        quantile_huber_loss(torch.zeros(3), torch.zeros(2), levels)
        levels[0] = 0.9
        with pytest.raises(ValueError, match="ascend"):
            quantile_huber_loss(torch.zeros(3), torch.zeros(2), levels)


@pytest.mark.parametrize(("k", "m"), [(1, 5), (7, 3), (5, 5), (16, 50)])
def test_read_at_equals_numpy_interp(k, m):
    samples = np.sort(np.random.default_rng(k).normal(size=(4, k)), axis=-1)
    for kind in ("midpoint", "right"):
        levels = quantile_levels(m, kind, dtype=torch.float64)
        at = (np.arange(k) + 0.5) / k
        expected = np.stack([np.interp(levels.numpy(), at, row) for row in samples])
        np.testing.assert_allclose(read_at(torch.from_numpy(samples), levels).numpy(), expected, rtol=1e-12, atol=1e-14)
