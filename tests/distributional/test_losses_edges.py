# SPDX-License-Identifier: Apache-2.0
"""The eight terms at their edges: shards and chunks, no valid token, NaN, bfloat16, wrong settings and shapes."""

from __future__ import annotations

import math

import pytest
import torch

from verl_dvpo.distributional import (
    MULTIPLIERS,
    TERMS,
    DVPOLossConfig,
    constraint_multipliers,
    dvpo_loss,
    quantile_levels,
)


def test_multipliers_do_not_depend_on_sharding():
    torch.manual_seed(4)
    q, z = torch.randn(10, 8), torch.randn(10, 8) + 0.2
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 0, 0, 1, 1])
    levels, config = quantile_levels(8), DVPOLossConfig(alpha=0.4, beta=0.4)
    whole = constraint_multipliers(q, z, mask, levels, config)
    shards = [slice(0, 3), slice(3, 4), slice(4, 10)]
    seen: list[torch.Tensor] = []
    for shard in shards:  # a first round collects what each rank would send
        constraint_multipliers(q[shard], z[shard], mask[shard], levels, config, reduce=lambda s: seen.append(s) or s)
    assert all(sent.ndim == 1 for sent in seen)
    total = sum(seen)
    for shard in shards:
        found = constraint_multipliers(q[shard], z[shard], mask[shard], levels, config, reduce=lambda s: total)
        for name in MULTIPLIERS:
            assert found[name].item() == pytest.approx(whole[name].item(), rel=1e-12), name


def test_multipliers_of_more_rows_than_one_chunk(monkeypatch):
    torch.manual_seed(5)
    q, z, mask = torch.randn(4, 25, 8), torch.randn(4, 25, 8), torch.rand(4, 25) < 0.6
    levels, config = quantile_levels(8), DVPOLossConfig()
    whole = constraint_multipliers(q, z, mask, levels, config)
    monkeypatch.setattr("verl_dvpo.distributional.constraints._CHUNK_CPU", 56)  # seven rows
    cut = constraint_multipliers(q, z, mask, levels, config)
    assert all(cut[name].item() == pytest.approx(whole[name].item(), rel=1e-12) for name in MULTIPLIERS)


@pytest.mark.parametrize("tokens", [0, 3])
def test_no_valid_token_gives_zero_multipliers(tokens):
    q = torch.full((tokens, 5), math.nan)
    found = constraint_multipliers(q, q, torch.zeros(tokens), quantile_levels(5), DVPOLossConfig())
    assert all(value.item() == 0 for value in found.values())


@pytest.mark.parametrize("where", ["quantiles", "targets"])
@pytest.mark.parametrize("mode", ["batch", "token"])
def test_nan_shows_in_the_total_of_its_token(where, mode):
    torch.manual_seed(6)
    theta, z = torch.randn(3, 2, 10), torch.randn(3, 10)
    (theta[1, 0] if where == "quantiles" else z[1])[4] = math.nan
    theta.requires_grad_()
    config = DVPOLossConfig(constraint=mode, coef=dict.fromkeys(TERMS, 0.1))
    given = {name: torch.tensor(0.1) for name in MULTIPLIERS}
    total = dvpo_loss(theta, z, quantile_levels(10), config, given).total
    total.sum().backward()
    assert total.isnan().tolist() == [False, True, False]
    assert theta.grad[1, 0].isnan().all()
    assert theta.grad[[0, 2]].isfinite().all()


def test_a_nan_among_valid_tokens_makes_multipliers_nan():
    q = torch.randn(3, 10)
    q[1, 9] = math.nan
    found = constraint_multipliers(q, torch.randn(3, 10), torch.ones(3), quantile_levels(10), DVPOLossConfig())
    assert found["shift"].isnan()
    assert found["gain"].isnan()


def test_bfloat16_and_empty_batches():
    theta, z = torch.randn(4, 2, 10).bfloat16().requires_grad_(), torch.randn(4, 12).bfloat16()
    config = DVPOLossConfig(constraint="token", coef=dict.fromkeys(TERMS, 0.1))
    found = dvpo_loss(theta, z, quantile_levels(10), config)
    same = dvpo_loss(theta.detach().float(), z.float(), quantile_levels(10), config)
    assert found.total.dtype == torch.float32
    assert torch.equal(found.total, same.total)
    found.total.sum().backward()
    assert theta.grad.dtype == torch.bfloat16
    empty = dvpo_loss(torch.zeros(0, 2, 10, requires_grad=True), torch.zeros(0, 12), quantile_levels(10), config)
    empty.total.sum().backward()
    assert empty.total.shape == (0,)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kappa": -1.0}, "kappa is -1.0"),
        ({"alpha": 0.0}, r"alpha is 0.0.*\(0, 0.5\]"),
        ({"beta": 0.6}, r"beta is 0.6.*\(0, 0.5\]"),
        ({"alpha": math.nan}, "alpha is nan"),
        ({"risk_temperature": 0.0}, "risk_temperature is 0"),
        ({"risk_temperature": -2.0}, "risk_temperature is -2.0"),
        ({"constraint": "both"}, "constraint is 'both'.*batch, token"),
        ({"coef": {"cvr": 0.1}}, "cvr.*risk, cvar, gain, shift, shape, curvature, consistency"),
        ({"coef": {"quantile": 1.0}}, "quantile"),
        ({"coef": {"cvar": -0.1}}, r"coef.cvar is -0.1"),
        ({"coef": {"cvar": math.inf}}, r"coef.cvar is inf"),
    ],
)
def test_bad_config_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        DVPOLossConfig(**fields)


def test_bad_input_is_named():
    levels, config = quantile_levels(4), DVPOLossConfig()
    with pytest.raises(ValueError, match=r"quantiles has shape \(4,\)"):
        dvpo_loss(torch.zeros(4), torch.zeros(4), levels, config)
    with pytest.raises(ValueError, match=r"quantiles has shape \(2, 0, 4\)"):
        dvpo_loss(torch.zeros(2, 0, 4), torch.zeros(2, 4), levels, config)
    with pytest.raises(ValueError, match=r"\(2, 4\).*\(3, 4\)"):
        dvpo_loss(torch.zeros(2, 3, 4), torch.zeros(3, 4), levels, config)
    with pytest.raises(ValueError, match="multipliers is None"):
        dvpo_loss(torch.zeros(2, 3, 4), torch.zeros(2, 4), levels, config)
    with pytest.raises(ValueError, match=r"mask has shape \(3,\)"):
        constraint_multipliers(torch.zeros(2, 4), torch.zeros(2, 4), torch.ones(3), levels, config)
    with pytest.raises(ValueError, match=r"levels has shape \(4,\)"):
        constraint_multipliers(torch.zeros(2, 5), torch.zeros(2, 4), torch.ones(2), levels, config)
