# SPDX-License-Identifier: Apache-2.0
"""The value flow term by term, against loops in float64 and numbers worked by hand."""

import math
import re

import naive_flow
import pytest
import torch
from scipy.stats import norm

from verl_dvpo.critic.config import family_config
from verl_dvpo.families.flow_field import base_noises, cosine_series, euler_samples, noise_basis
from verl_dvpo.families.value_flow import (
    FLOW_TERMS,
    ValueFlowConfig,
    ValueFlowFamily,
    has_collapsed,
    next_valid,
    quantile_pull,
)

B, T, K, FREQUENCIES, POWERS = 3, 6, 5, 4, 3
SCALE, GAMMA, LAM = 0.7, 0.9, 0.8
MASK = torch.tensor([[1, 1, 0, 0, 1, 1], [1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]])


def family(coef: dict[str, float] | None = None, **settings) -> ValueFlowFamily:
    sizes = {"num_noises": K, "num_frequencies": FREQUENCIES, "num_powers": POWERS, "value_scale": SCALE}
    chosen = {"coef": dict.fromkeys(FLOW_TERMS, 0.0) | coef} if coef is not None else {}
    return ValueFlowFamily(ValueFlowConfig(**(sizes | chosen | settings)))


def update(flow: ValueFlowFamily, seed: int = 0):
    """outputs (B·T, D) with gradient, and the targets of an update of other outputs, flattened, and multipliers."""
    g = torch.Generator().manual_seed(seed)
    old = 0.3 * torch.randn(B, T, flow.num_outputs, generator=g)
    rewards = torch.randn(B, T, generator=g)
    built = flow.build_targets(flow.keep(old), rewards, MASK, gamma=GAMMA, lam=LAM, generator=g)
    targets = {name: tensor.flatten(0, 1) for name, tensor in built.items()}
    outputs = 0.3 * torch.randn(B * T, flow.num_outputs, generator=g)
    return outputs.requires_grad_(), targets, flow.multipliers(targets, MASK.flatten())


# ---------------------------------------------------------------------- the field


def test_noises_are_normal_quantiles_at_midpoints():
    levels = [(2 * k - 1) / (2 * K) for k in range(1, K + 1)]
    torch.testing.assert_close(base_noises(K, SCALE), torch.tensor(SCALE * norm.ppf(levels), dtype=torch.float32))
    expected = [[math.cos(math.pi * i * level) for i in range(FREQUENCIES)] for level in levels]
    torch.testing.assert_close(noise_basis(K, FREQUENCIES), torch.tensor(expected))


@pytest.mark.parametrize("frequencies", [1, 2, 32])
def test_a_cosine_series_and_its_gradient(frequencies):
    g = torch.Generator().manual_seed(1)
    c = torch.randn(3, frequencies, generator=g).requires_grad_()
    zeta = torch.randn(3, 7, generator=g)
    zeta[0, 0], zeta[0, 1] = 50.0, -50.0  # far outside the base distribution: Φ is 1 and 0 there
    weights = torch.randn(3, 7, generator=g)
    value = cosine_series(c, zeta, SCALE)
    basis = torch.tensor(
        [
            [[math.cos(math.pi * i * norm.cdf(z / SCALE)) for i in range(frequencies)] for z in row]
            for row in zeta.tolist()
        ]
    ).double()
    torch.testing.assert_close(value.double(), torch.einsum("rji,ri->rj", basis, c.double()), rtol=0, atol=2e-4)
    (gradient,) = torch.autograd.grad((value * weights).sum(), c)
    torch.testing.assert_close(
        gradient.double(), torch.einsum("rji,rj->ri", basis, weights.double()), rtol=0, atol=2e-4
    )


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_eulers_method(steps):
    a = 0.5 * torch.randn(2, FREQUENCIES, POWERS, generator=torch.Generator().manual_seed(2))
    found = euler_samples(a, base_noises(K, SCALE), noise_basis(K, FREQUENCIES), SCALE, steps)
    for row in range(2):
        expected = [naive_flow.euler(a[row].double(), naive_flow.noise(k, K, SCALE), SCALE, steps) for k in range(K)]
        assert found[row].tolist() == pytest.approx(expected, abs=1e-5)


def test_samples_ascend_and_their_mean_is_the_first_output():
    # Σ_k cos(πi(2k−1)/(2K)) = 0 for 0 < i < 2K, and the noises add up to 0.
    flow = ValueFlowFamily(ValueFlowConfig())
    outputs = torch.randn(9, 192, generator=torch.Generator().manual_seed(3))
    samples = flow.samples(outputs)
    assert samples.shape == (9, 64)
    assert (samples.diff() >= 0).all()
    torch.testing.assert_close(flow.values_from_kept(flow.keep(outputs)), outputs[:, 0], rtol=0, atol=1e-5)


def test_what_is_kept_is_a_third_of_the_outputs_and_of_what_200_quantiles_keep():
    flow = ValueFlowFamily(ValueFlowConfig())
    assert flow.num_kept == flow.num_outputs / 3 == 64
    assert flow.num_kept <= 200 / 3


# ---------------------------------------------------------------------- targets


def test_the_next_state_is_verls_next_valid_one():
    index, exists = next_valid(MASK.bool())
    for b in range(B):
        for t in range(T):
            later = [s for s in range(t + 1, T) if MASK[b, s]]
            assert exists[b, t].item() == bool(later)
            if later:
                assert index[b, t].item() == later[0]


def test_targets_of_flow_matching():
    flow = family({"flow_matching": 1.0}, uncertainty=2.0)
    g = torch.Generator().manual_seed(4)
    kept = torch.randn(B, T, K, generator=g).sort(-1).values
    rewards = torch.randn(B, T, generator=g)
    built = flow.build_targets(kept, rewards, MASK, gamma=GAMMA, lam=LAM, generator=g)
    for b in range(B):
        for t in range(T):
            later = [s for s in range(t + 1, T) if MASK[b, s]]
            if not later:
                assert built["next_weight"][b, t].item() == 0.0
                continue
            z = kept[b, later[0]].double()
            spread = (z - z.mean()).square().mean().sqrt().item()
            assert built["next_weight"][b, t].item() == pytest.approx(1 / (1 + math.exp(2 * spread)) + 0.5, rel=1e-5)
            expected = [GAMMA * (z[k].item() - naive_flow.noise(k, K, SCALE)) for k in range(K)]
            assert built["next_velocity"][b, t].tolist() == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(built["next_reward"], rewards)
    assert (built["next_discount"] == torch.tensor(GAMMA)).all()


def test_the_pull_on_a_sample_by_hand():
    # τ = 1/4, 3/4; targets 0, 1, 1, 2. q₁ = 1: one below, one above, two equal, which do not pull.
    # (¼·¼ − ¾·¼)·½/√(3/16) = −⅛·½/0.4330 = −0.14434. q₂ = 1.5: three below, one above: (¾·¼ − ¼·¾) = 0.
    pull = quantile_pull(torch.tensor([[1.0, 1.5]]), torch.tensor([[0.0, 1.0, 1.0, 2.0]]), torch.tensor([0.25, 0.75]))
    assert pull[0].tolist() == pytest.approx([-0.144338, 0.0], abs=1e-6)


def test_calibrated_anchors_are_kept_samples_moved_by_the_pull():
    flow = family({"anchor": 1.0}, step=0.4, target="quantile_gae")
    g = torch.Generator().manual_seed(5)
    kept = torch.randn(B, T, K, generator=g).sort(-1).values
    built = flow.build_targets(kept, torch.randn(B, T, generator=g), MASK, gamma=GAMMA, lam=LAM, generator=g)
    z = built["targets"]
    assert (z.diff() >= 0).all()
    for k in range(K):
        tau, q = (2 * k + 1) / (2 * K), kept[..., k]
        above, below = (z > q[..., None]).double().mean(-1), (z < q[..., None]).double().mean(-1)
        pull = (tau * above - (1 - tau) * below) * 0.5 / math.sqrt(tau * (1 - tau))
        torch.testing.assert_close(built["anchor"][..., k].double(), q + 0.4 * SCALE * pull, rtol=0, atol=1e-6)


def test_time_is_drawn_once_from_the_generator():
    flow = family()
    kept, rewards = torch.randn(B, T, K), torch.randn(B, T)

    def time(seed: int) -> torch.Tensor:
        g = torch.Generator().manual_seed(seed)
        return flow.build_targets(kept, rewards, MASK, gamma=GAMMA, lam=LAM, generator=g)["time"]

    assert torch.equal(time(1), time(1))
    assert not torch.equal(time(1), time(2))
    assert ((time(1) >= 0) & (time(1) < 1)).all()
    assert time(1).unique().numel() == B * T


# ---------------------------------------------------------------------- loss


@pytest.mark.parametrize("coupling", ["calibrated", "sorted"])
@pytest.mark.parametrize("term", ["anchor", "straightness", "flow_matching"])
def test_each_term_on_the_field_and_its_gradient(term, coupling):
    flow = family({term: 2.0}, coupling=coupling)
    # The naive form reads every target, so they come from a family with all terms on.
    outputs, targets, _ = update(family(coupling=coupling, coef=dict.fromkeys(FLOW_TERMS, 1.0)))
    loss = flow.loss(outputs, targets)
    assert set(loss.terms) == {term}
    a = outputs.detach().double().requires_grad_()
    expected = torch.stack(
        [
            naive_flow.field_terms(
                a[row].reshape(FREQUENCIES, POWERS),
                {name: tensor[row].double() for name, tensor in targets.items()},
                scale=SCALE,
                calibrated=coupling == "calibrated",
            )[term]
            for row in range(B * T)
        ]
    )
    torch.testing.assert_close(loss.terms[term].double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss.total, 2.0 * loss.terms[term])
    weights = torch.linspace(1.0, 2.0, B * T)
    (gradient,) = torch.autograd.grad((loss.total * weights).sum(), outputs)
    (naive,) = torch.autograd.grad((2.0 * expected * weights).sum(), a)
    torch.testing.assert_close(gradient.double(), naive, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("constraint", ["token", "batch"])
def test_constraints_act_on_the_one_step_samples(constraint):
    on = {"cvar": 1.0, "gain": 2.0, "shift": 3.0, "shape": 4.0}
    flow = family(on, constraint=constraint, alpha=0.4, beta=0.4)  # tails of 2 of 5 samples
    outputs, targets, multipliers = update(flow)
    loss = flow.loss(outputs, targets, multipliers)

    def differences(q: torch.Tensor, z: torch.Tensor) -> dict[str, torch.Tensor]:
        q, z = q.double().sort(-1).values, z.double().sort(-1).values
        low_q, low_z, up_q, up_z = q[:, :2], z[:, :2], q[:, -2:], z[:, -2:]
        halves = {
            name: tail.diff()[:, 0].square() / 4
            for name, tail in {"lq": low_q, "lz": low_z, "uq": up_q, "uz": up_z}.items()
        }  # the variance of two points
        return {
            "cvar": low_q.mean(-1) - low_z.mean(-1),
            "gain": up_z.mean(-1) - up_q.mean(-1),
            "shift": z.mean(-1) - q.mean(-1),
            "shape_low": halves["lq"] - halves["lz"],
            "shape_up": halves["uz"] - halves["uq"],
        }

    a = outputs.detach().double().reshape(-1, FREQUENCIES, POWERS)
    points = torch.tensor(
        [[naive_flow.euler(row, naive_flow.noise(k, K, SCALE), SCALE, 1) for k in range(K)] for row in a]
    )
    d = differences(points, targets["targets"])
    if constraint == "token":
        expected = {"cvar": d["cvar"] ** 2, "gain": d["gain"].relu() ** 2, "shift": d["shift"].relu()}
        expected["shape"] = d["shape_low"].relu() + d["shape_up"].relu()
    else:
        old = differences(targets["old"], targets["targets"])
        mean = {name: value[MASK.flatten() != 0].mean() for name, value in old.items()}
        mu = {name: value if name == "cvar" else value.relu() for name, value in mean.items()}
        assert {name: value.item() for name, value in multipliers.items()} == pytest.approx(
            {name: value.item() for name, value in mu.items()}, abs=1e-6
        )
        expected = {name: 2 * mu[name] * d[name] for name in ("cvar", "gain", "shift")}
        expected["shape"] = 2 * (mu["shape_low"] * d["shape_low"] + mu["shape_up"] * d["shape_up"])
    for name, value in expected.items():
        torch.testing.assert_close(loss.terms[name].double(), value, rtol=1e-4, atol=1e-5)
    total = sum(on[name] * value for name, value in expected.items())
    torch.testing.assert_close(loss.total.double(), total, rtol=1e-4, atol=1e-5)


def test_a_coefficient_of_zero_skips_the_term_and_its_targets():
    outputs, targets, multipliers = update(family({"shift": 1.0}))
    assert "time" not in targets
    assert "next_velocity" not in targets
    assert set(multipliers) == {"shift"}
    assert set(family({"shift": 1.0}).loss(outputs, targets, multipliers).terms) == {"shift"}
    outputs, targets, multipliers = update(family({"anchor": 1.0}))
    assert "next_velocity" not in targets
    assert multipliers == {}


@pytest.mark.parametrize("coupling", ["calibrated", "sorted"])
def test_gradients_do_not_depend_on_how_the_tokens_are_cut(coupling):
    flow = family(coupling=coupling)
    outputs, targets, multipliers = update(flow)
    mask = MASK.flatten()
    (whole,) = torch.autograd.grad((flow.loss(outputs, targets, multipliers).total * mask).sum(), outputs)
    assert whole[mask == 1].abs().sum(-1).min() > 0
    for piece in torch.randperm(B * T, generator=torch.Generator().manual_seed(6)).split(4):
        loss = flow.loss(outputs[piece], {name: tensor[piece] for name, tensor in targets.items()}, multipliers)
        (loss.total * mask[piece]).sum().backward()
    torch.testing.assert_close(outputs.grad, whole, rtol=0, atol=1e-6)


def test_more_euler_steps_keep_the_end_of_the_path_and_log_what_one_step_loses():
    flow = family(euler_steps=8)
    outputs = 0.3 * torch.randn(4, flow.num_outputs, generator=torch.Generator().manual_seed(7))
    found = flow.keep(outputs)
    gaps = flow.statistics(outputs)["flow/one_step_gap"]
    for row in range(4):
        a = outputs[row].double().reshape(FREQUENCIES, POWERS)
        one, many = (
            [naive_flow.euler(a, naive_flow.noise(k, K, SCALE), SCALE, steps) for k in range(K)] for steps in (1, 8)
        )
        assert found[row].tolist() == pytest.approx(sorted(many), abs=1e-5)
        assert gaps[row].item() == pytest.approx(sum(abs(x - y) for x, y in zip(one, many, strict=True)) / K, abs=1e-5)


# ---------------------------------------------------------------------- users


def test_a_collapse_is_told_where_rewards_vary():
    assert has_collapsed(spread=0.009, reward_std=0.5, threshold=0.02)
    assert not has_collapsed(spread=0.011, reward_std=0.5, threshold=0.02)
    assert not has_collapsed(spread=0.0, reward_std=0.0, threshold=0.02)
    assert not has_collapsed(spread=0.0, reward_std=0.5, threshold=0.0)
    flow = family(collapse_threshold=0.1)
    # a_i1 and a_i2 do not matter at u = 0; undoing the noises with a_i0 leaves no spread.
    undo = torch.linalg.lstsq(noise_basis(K, K), -base_noises(K, SCALE)[:, None]).solution[:, 0]
    full = family(num_frequencies=K, collapse_threshold=0.1)
    outputs = torch.zeros(1, K, POWERS)
    outputs[0, :, 0] = undo
    for chosen, points, warned in (
        (full, outputs.flatten(1), True),
        (flow, torch.zeros(1, FREQUENCIES * POWERS), False),
    ):
        means = {name: value.mean().item() for name, value in chosen.statistics(points).items()}
        assert (set(chosen.warnings(means, reward_std=0.5)) == {"flow/collapsed"}) is warned
        assert chosen.warnings(means, reward_std=0.0) == {}


def test_an_unlearned_state_is_the_base_distribution_around_a_drawn_mean():
    flow = ValueFlowFamily(ValueFlowConfig())
    weight, bias = torch.empty(192, 64), torch.empty(192)
    flow.init_head(weight, bias, torch.Generator().manual_seed(0))
    hidden = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    outputs = hidden @ weight.T + bias
    mean = outputs[:, :1]
    assert (mean.abs() > 1e-3).all()
    torch.testing.assert_close(flow.samples(outputs), base_noises(64, 0.7) + mean)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_frequencies": 0}, "critic.value.num_frequencies is 0; it must be an integer >= 1"),
        ({"num_powers": 0}, "critic.value.num_powers is 0; it must be an integer >= 1"),
        ({"num_noises": 1}, "critic.value.num_noises is 1; it must be an integer >= 2"),
        ({"euler_steps": 0}, "critic.value.euler_steps is 0; it must be an integer >= 1"),
        ({"value_scale": 0.0}, "critic.value.value_scale is 0.0; it must be a finite number > 0"),
        ({"value_scale": float("nan")}, "critic.value.value_scale is nan; it must be a finite number > 0"),
        ({"step": -1.0}, "critic.value.step is -1.0; it must be a finite number > 0"),
        ({"uncertainty": -1.0}, "critic.value.uncertainty is -1.0; it must be a finite number >= 0"),
        (
            {"collapse_threshold": float("inf")},
            "critic.value.collapse_threshold is inf; it must be a finite",
        ),
        ({"target": "mc"}, "critic.value.target is 'mc'; it must be one of 'quantile_gae', 'sample_replacement'"),
        ({"coupling": "none"}, "critic.value.coupling is 'none'; it must be one of 'calibrated', 'sorted'"),
        ({"alpha": 0.9}, "critic.value.alpha is 0.9"),
        ({"constraint": "none"}, "critic.value.constraint is 'none'"),
        ({"coef": {"curvature": 1.0}}, "critic.value.coef has unknown terms curvature; allowed are anchor"),
        ({"coef": {"anchor": -1.0}}, "critic.value.coef.anchor is -1.0; it must be a finite number >= 0"),
        ({"coef": dict.fromkeys(FLOW_TERMS, 0.0)}, "critic.value.coef has no term above 0; it must keep one of anchor"),
        ({"lam": 2.0}, "critic.value.lam is 2.0; it must be a number in [0, 1]"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        family_config("value_flow", **settings)


def test_missing_multipliers_are_named():
    outputs, targets, _ = update(family())
    with pytest.raises(ValueError, match="multipliers is None"):
        family().loss(outputs, targets)
