# SPDX-License-Identifier: Apache-2.0
"""The exact O((M + K) log K) loss against the double loop, the pairwise form, hand-worked numbers and its limits."""

from __future__ import annotations

import math
import pathlib
import re

import hypothesis.strategies as st
import naive
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from verl_dvpo.distributional import quantile_huber_loss, quantile_levels
from verl_dvpo.distributional.sorting import count_below, sort_samples, sort_with_gradient


@st.composite
def cases(draw):
    """Draws θ, z, levels, κ and weights: shapes up to 40, scales 1e-3 to 1e4, far from and at 0, with ties."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    m, k = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    scale = 10.0 ** draw(st.floats(-3, 4))
    offset = draw(st.sampled_from([0.0, 1.0, -30.0])) * scale
    shape = draw(st.sampled_from(["normal", "heavy", "grid", "constant"]))

    def points(n):
        if shape == "normal":
            return rng.normal(size=n)
        if shape == "heavy":
            return rng.standard_t(1.5, size=n)
        if shape == "grid":  # few distinct values: ties within and between θ and z
            return rng.integers(-2, 3, size=n).astype(float)
        return np.full(n, 0.5)

    theta, z = offset + scale * points(m), offset + scale * points(k)
    kappa = draw(st.sampled_from([0.0, 1e-3, 1e-2, 0.1, 0.5, 1.0, 10.0]))
    levels = quantile_levels(m, draw(st.sampled_from(["midpoint", "right"])), dtype=torch.float64)
    weights = torch.from_numpy(rng.uniform(0, 3, size=m)) if draw(st.booleans()) else None
    return torch.from_numpy(theta), torch.from_numpy(z), levels, kappa, weights, scale


def assert_equals_loop(case, dtype, tolerance):
    theta, z, levels, kappa, weights, scale = case
    theta, z = theta.to(dtype), z.to(dtype)
    expected, slope = naive.loop_loss(
        theta.tolist(), z.tolist(), levels.tolist(), kappa, None if weights is None else weights.tolist()
    )
    theta.requires_grad_()
    loss = quantile_huber_loss(theta, z, levels, kappa=kappa, level_weights=weights)
    loss.backward()
    assert loss.dtype == dtype
    # The absolute part is for what is 0 or cancels to it, as when τ = 1 is the only level: rounding at the inputs'
    # scale, and in a narrow zone that of the sums, 1e-15·range/κ (see the module's head).
    span = (torch.cat([theta, z]).max() - torch.cat([theta, z]).min()).item()
    narrow = 1e-15 * span / kappa if kappa else 0.0
    assert abs(loss.item() - expected) <= tolerance * expected + 1e-4 * tolerance * scale + narrow * span
    error = (theta.grad.double() - torch.tensor(slope, dtype=torch.float64)).norm()
    assert error <= tolerance * math.sqrt(sum(s * s for s in slope)) + 1e-4 * tolerance + narrow


@settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_float64_equals_the_double_loop(case):
    assert_equals_loop(case, torch.float64, 1e-6)


@settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_float32_equals_the_double_loop(case):
    assert_equals_loop(case, torch.float32, 1e-4)


def test_hand_worked_pinball():
    # θ = 1, τ = 1/4, z = 0, 1, 3. u = -1, 0, 2: (1 − 1/4)·1 + 0 + 1/4·2 = 1.25; /3 = 0.416667
    # slope in θ: +(3/4) for z = 0, 0 for the tie, −(1/4) for z = 3: 0.5/3 = 0.166667
    theta = torch.tensor([1.0], requires_grad=True)
    loss = quantile_huber_loss(theta, torch.tensor([3.0, 0.0, 1.0]), torch.tensor([0.25]), kappa=0.0)
    loss.backward()
    assert loss.item() == pytest.approx(1.25 / 3)
    assert theta.grad.item() == pytest.approx(0.5 / 3)


def test_hand_worked_huber_in_all_four_pieces():
    # θ = 0, τ = 0.25, κ = 1, z = -3, -0.5, 0.5, 3 (one in each piece).
    # H/κ: 2.5, 0.125, 0.125, 2.5; weights 0.75, 0.75, 0.25, 0.25:
    # 1.875 + 0.09375 + 0.03125 + 0.625 = 2.625; /4 = 0.65625
    # slope: 0.75·1 + 0.75·0.5 − 0.25·0.5 − 0.25·1 = 0.75; /4 = 0.1875
    theta = torch.tensor([0.0], requires_grad=True)
    loss = quantile_huber_loss(theta, torch.tensor([3.0, -0.5, 0.5, -3.0]), torch.tensor([0.25]), kappa=1.0)
    loss.backward()
    assert loss.item() == pytest.approx(0.65625)
    assert theta.grad.item() == pytest.approx(0.1875)


def test_hand_worked_level_weights():
    # θ = 0, 0; τ = 0.25, 0.75; z = 2: pinballs 0.5 and 1.5; weights 3, 1: (1.5 + 1.5)/2 = 1.5
    loss = quantile_huber_loss(
        torch.zeros(2), torch.tensor([2.0]), torch.tensor([0.25, 0.75]), kappa=0.0, level_weights=torch.tensor([3.0, 1])
    )
    assert loss.item() == pytest.approx(1.5)


@pytest.mark.parametrize("kappa", [0.0, 1e-3, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (2, 1, 2)])
def test_gradcheck_away_from_ties(kappa, leading):
    torch.manual_seed(1)
    theta = torch.randn(*leading, 7, dtype=torch.float64, requires_grad=True)
    z = torch.randn(*leading, 5, dtype=torch.float64)
    levels = quantile_levels(7, dtype=torch.float64)
    gaps = (z[..., None, :] - theta.detach()[..., :, None]).abs()
    assert torch.minimum(gaps, (gaps - kappa).abs()).min() > 1e-5
    assert torch.autograd.gradcheck(
        lambda t: quantile_huber_loss(t, z, levels, kappa=kappa), theta, eps=1e-7, atol=1e-6
    )


@pytest.mark.parametrize("kappa", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("m", "k"), [(200, 200), (37, 150), (64, 63), (255, 256), (1, 500), (500, 1)])
def test_equals_pairwise_at_real_sizes(kappa, m, k):
    """The loss is right for more rows than a block holds, and for sizes around powers of two."""
    torch.manual_seed(m + k)
    theta = torch.randn(200, m, dtype=torch.float64, requires_grad=True)
    z = torch.randn(200, k, dtype=torch.float64).round(decimals=1)
    levels = quantile_levels(m, "right", dtype=torch.float64)
    weight = torch.rand(200, dtype=torch.float64)
    (expected,) = torch.autograd.grad((weight * naive.pairwise_loss(theta, z, levels, kappa)).sum(), theta)
    loss = quantile_huber_loss(theta, z, levels, kappa=kappa)
    (gradient,) = torch.autograd.grad((weight * loss).sum(), theta)
    torch.testing.assert_close(loss, naive.pairwise_loss(theta, z, levels, kappa), rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("edge", [0.0, 1e-3])
def test_rows_inside_and_outside_the_zone_share_a_call(dtype, edge):
    """Rows with all samples within κ of θ skip a search, rows with a sample at κ or beyond do not; both are exact."""
    torch.manual_seed(4)
    width = torch.logspace(-3, 1, 600)[:, None]
    theta, z = width * torch.rand(600, 30), width * torch.rand(600, 41)
    theta[::3, 0], z[::3, 0] = 0.25, 1.25 + edge
    theta[1::3, 0], z[1::3, 0] = 0.75, -0.25 - edge
    levels = quantile_levels(30, "right", dtype=torch.float64)
    exact = theta.double().requires_grad_()
    expected = naive.pairwise_loss(exact, z.double(), levels, 1.0)
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    theta = theta.to(dtype).requires_grad_()
    loss = quantile_huber_loss(theta, z.to(dtype), levels)
    (gradient,) = torch.autograd.grad(loss.sum(), theta)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=0)
    torch.testing.assert_close(gradient.double(), slope, rtol=tolerance, atol=tolerance * 1e-3)


def test_small_differences_survive_large_values():
    """Sums lose nothing for values near 5000 that differ by 0.01, which float32 holds to 5e-4.

    Prefix sums of z² in float32 would be near 200·5000² = 5e9, rounded to 512: the quadratic pieces would be noise.
    """
    torch.manual_seed(2)
    theta = (5000 + 0.01 * torch.randn(50, 200)).requires_grad_()
    z = 5000 + 0.01 * torch.randn(50, 200)
    levels = quantile_levels(200)
    for kappa in (0.0, 0.005, 1.0):
        exact = theta.detach().double().requires_grad_()
        expected = naive.pairwise_loss(exact, z.double(), levels.double(), kappa)
        (slope,) = torch.autograd.grad(expected.sum(), exact)
        loss = quantile_huber_loss(theta, z, levels, kappa=kappa)
        (gradient,) = torch.autograd.grad(loss.sum(), theta)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient.double(), slope, rtol=0, atol=1e-6 * slope.abs().max().item())


def test_one_outlier_does_not_blur_the_rest():
    """One target of 1e6 among values of order 1 leaves the other gradients exact, in a narrow zone too."""
    torch.manual_seed(3)
    theta, z = torch.randn(20, 50), torch.randn(20, 80)
    z[:, 7] = 1e6
    levels = quantile_levels(50)
    for kappa in (0.0, 0.01):
        exact, single = theta.double().requires_grad_(), theta.clone().requires_grad_()
        naive.pairwise_loss(exact, z.double(), levels.double(), kappa).sum().backward()
        quantile_huber_loss(single, z, levels, kappa=kappa).sum().backward()
        torch.testing.assert_close(single.grad.double(), exact.grad, rtol=1e-5, atol=1e-8)


def test_zone_narrower_than_float32_can_tell():
    """At ±20000 float32 moves in steps of 0.002: with κ = 0.001 a tie is inside the zone and a neighbour outside."""
    step = 2.0**-9
    theta = torch.tensor([-20000.0, -20000.0 + step, 20000.0], requires_grad=True)
    # The median is at the other end: around it float32 moves in steps of 0.004, and could not tell the neighbours.
    z = torch.tensor([20000.0, -20000.0, 20000.0, -20000.0 + step, 20000.0])
    levels = quantile_levels(3)
    quantile_huber_loss(theta, z, levels, kappa=0.001).backward()
    _, slope = naive.loop_loss(theta.tolist(), z.tolist(), levels.double().tolist(), 0.001)
    assert theta.grad.tolist() == pytest.approx(slope, rel=1e-6)


def test_huber_tends_to_pinball():
    torch.manual_seed(4)
    theta, z, levels = torch.randn(9, 11), torch.randn(9, 13), quantile_levels(11)
    pinball = quantile_huber_loss(theta, z, levels, kappa=0.0)
    gaps = [(quantile_huber_loss(theta, z, levels, kappa=k) - pinball).abs().max().item() for k in (0.1, 0.01, 0.001)]
    # |u| − H/κ is at most κ/2
    assert all(gap <= kappa / 2 for gap, kappa in zip(gaps, (0.1, 0.01, 0.001), strict=True))
    assert gaps == sorted(gaps, reverse=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    torch.manual_seed(5)
    theta = torch.randn(6, 20).to(dtype).requires_grad_()
    z = torch.randn(6, 30).to(dtype)
    loss = quantile_huber_loss(theta, z, quantile_levels(20), kappa=0.3)
    loss.sum().backward()
    same = theta.detach().float().requires_grad_()
    expected = quantile_huber_loss(same, z.float(), quantile_levels(20), kappa=0.3)
    expected.sum().backward()
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    assert torch.equal(theta.grad, same.grad.to(dtype))


@pytest.mark.parametrize("leading", [(0,), (3, 0), (0, 4)])
def test_no_tokens(leading):
    theta = torch.zeros(*leading, 5, requires_grad=True)
    loss = quantile_huber_loss(theta, torch.zeros(*leading, 4), quantile_levels(5))
    loss.sum().backward()
    assert loss.shape == leading
    assert theta.grad.shape == theta.shape


@pytest.mark.parametrize("kappa", [0.0, 0.5])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["quantiles", "targets"])
def test_what_is_not_finite_shows_in_its_token_only(kappa, bad, where):
    torch.manual_seed(6)
    theta, z = torch.randn(3, 5), torch.randn(3, 6)
    clean = quantile_huber_loss(theta, z, quantile_levels(5), kappa=kappa)
    (theta if where == "quantiles" else z)[1, 2] = bad
    theta.requires_grad_()
    loss = quantile_huber_loss(theta, z, quantile_levels(5), kappa=kappa)
    loss.sum().backward()
    assert not loss[1].isfinite()
    assert not theta.grad[1].isfinite().any()
    assert torch.equal(loss[[0, 2]], clean[[0, 2]])
    assert theta.grad[[0, 2]].isfinite().all()


def test_all_targets_nan_still_shows():
    assert quantile_huber_loss(torch.zeros(2, 3), torch.full((2, 4), math.nan), quantile_levels(3)).isnan().all()


def test_compiles_into_one_graph():
    theta = torch.randn(4, 9, requires_grad=True)
    z, levels = torch.randn(4, 6), quantile_levels(9)
    compiled = torch.compile(
        lambda t: quantile_huber_loss(t, z, levels, kappa=0.2), fullgraph=True, backend="aot_eager"
    )
    loss = compiled(theta)
    (gradient,) = torch.autograd.grad(loss.sum(), theta)
    eager = quantile_huber_loss(theta, z, levels, kappa=0.2)
    assert torch.equal(loss, eager)
    assert torch.equal(gradient, torch.autograd.grad(eager.sum(), theta)[0])


def test_second_derivative_is_refused():
    theta = torch.randn(4, requires_grad=True)
    loss = quantile_huber_loss(theta, torch.randn(3), quantile_levels(4))
    (slope,) = torch.autograd.grad(loss.square(), theta, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        slope.sum().backward()


@pytest.mark.parametrize("kappa", [0.0, 0.1])
def test_extra_memory_is_a_few_inputs(kappa):
    """Forward and backward hold at most 8 tensors of the input's size beyond inputs and result."""
    torch.manual_seed(7)
    theta = torch.randn(80_000, 200, requires_grad=True)
    z, levels = torch.randn(80_000, 200), quantile_levels(200)
    status, reset = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")

    def resident(field: str) -> int:
        return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", status.read_text())[1])

    reset.write_text("5")  # the peak starts again from now
    before = resident("VmRSS")
    quantile_huber_loss(theta, z, levels, kappa=kappa).sum().backward()
    assert (resident("VmHWM") - before) / (theta.numel() * 4) <= 8


@pytest.mark.parametrize("or_equal", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 9, 63, 64, 200])
def test_count_below_equals_numpy(size, or_equal):
    rng = np.random.default_rng(size)
    rows = np.sort(rng.integers(-5, 6, size=(6, size)).astype(np.float32), axis=-1)
    thresholds = np.concatenate([rng.integers(-7, 8, size=(6, 30)), np.full((6, 2), [-np.inf, np.inf])], axis=-1)
    thresholds = thresholds.astype(np.float32)
    count = count_below(torch.from_numpy(rows), torch.from_numpy(thresholds), or_equal=or_equal)
    side = "right" if or_equal else "left"
    expected = np.stack([np.searchsorted(r, t, side=side) for r, t in zip(rows, thresholds, strict=True)])
    assert np.array_equal(count.place.numpy(), expected)
    assert np.array_equal(count.number.numpy(), expected)


def test_sorts_equal_torch():
    torch.manual_seed(8)
    x = torch.randn(5, 40)
    x[2, 3] = math.nan
    assert torch.equal(sort_samples(x).nan_to_num(9), x.sort(-1).values.nan_to_num(9))
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    weight = torch.randn(5, 40)
    (sort_with_gradient(a)[[0, 1, 3, 4]] * weight[[0, 1, 3, 4]]).sum().backward()
    (b.sort(-1).values[[0, 1, 3, 4]] * weight[[0, 1, 3, 4]]).sum().backward()
    assert torch.equal(a.grad, b.grad)


LEVELS = quantile_levels(4)


@pytest.mark.parametrize(
    ("quantiles", "targets", "levels", "options", "message"),
    [
        (torch.zeros(2, 4), torch.zeros(3, 4), LEVELS, {}, r"\(2, 4\).*\(3, 4\)"),
        (torch.zeros(2, 0), torch.zeros(2, 4), torch.zeros(0), {}, r"quantiles has shape \(2, 0\)"),
        (torch.zeros(2, 4), torch.zeros(2, 0), LEVELS, {}, r"targets has shape \(2, 0\)"),
        (torch.zeros(2, 4), torch.zeros(2, 4), torch.tensor([0.1, 0.3, 0.3, 0.9]), {}, "0.3, 0.3"),
        (
            torch.zeros(2, 4),
            torch.zeros(2, 4),
            torch.tensor([0.0, 0.3, 0.5, 0.9]),
            {},
            r"levels is \[0, 0.3, .*\(0, 1\]",
        ),
        (torch.zeros(2, 4), torch.zeros(2, 4), torch.tensor([0.1, 0.3, 0.5, 1.1]), {}, "1.1"),
        (torch.zeros(2, 4), torch.zeros(2, 4), torch.tensor([0.1, math.nan, 0.5, 1.0]), {}, "nan"),
        (torch.zeros(2, 4), torch.zeros(2, 4), quantile_levels(5), {}, r"levels has shape \(5,\)"),
        (torch.zeros(2, 4), torch.zeros(2, 4), LEVELS, {"kappa": -0.1}, "kappa is -0.1"),
        (torch.zeros(2, 4), torch.zeros(2, 4), LEVELS, {"kappa": math.nan}, "kappa is nan"),
        (torch.zeros(2, 4), torch.zeros(2, 4), LEVELS, {"level_weights": torch.ones(3)}, r"level_weights.*\(3,\)"),
        (torch.zeros(2, 4).long(), torch.zeros(2, 4), LEVELS, {}, "quantiles has dtype torch.int64"),
    ],
)
def test_bad_input_is_named(quantiles, targets, levels, options, message):
    with pytest.raises(ValueError, match=message):
        quantile_huber_loss(quantiles, targets, levels, **options)
