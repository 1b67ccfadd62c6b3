# SPDX-License-Identifier: Apache-2.0
"""Every family of the package keeps the interface's promises: on ragged batches, against loops over its samples."""

import pickle
import subprocess
import sys
import time

import pytest
import torch

from verl_dvpo.critic.head import ACTIVATIONS
from verl_dvpo.families.base import ACTIVATION_NAMES, SampledFamily
from verl_dvpo.families.check import check_family
from verl_dvpo.families.registry import build_family, family_names, family_settings

#: Registered by other tests.
BUILT_IN = [name for name in family_names() if not name.startswith("test_")]
LEVELS = torch.tensor([0.02, 0.25, 0.5, 0.9])


def outputs_of(family, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, family.num_outputs, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_family_of_the_package_passes_the_check_in_milliseconds(name):
    family = build_family(family_settings(name))
    check_family(family)
    start = time.perf_counter()
    check_family(family)
    assert time.perf_counter() - start < 0.5


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_value_of_the_update_is_that_of_the_inference_to_rounding(name):
    family = build_family(family_settings(name))
    outputs = outputs_of(family, 3, 5)
    value = family.value(outputs)
    assert value.shape == (3, 5)
    torch.testing.assert_close(value, family.values_from_kept(family.keep(outputs)), rtol=0, atol=1e-6)
    if isinstance(family, SampledFamily):
        torch.testing.assert_close(value.double(), family.samples(outputs).double().mean(-1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", BUILT_IN)
def test_quantiles_of_sampled_families_interpolate_between_their_samples(name):
    family = build_family(family_settings(name))
    if not isinstance(family, SampledFamily):
        pytest.skip("has no samples; its own test file compares its quantiles with scipy")
    outputs = outputs_of(family, 4)
    found = family.quantiles(outputs, LEVELS)
    for row, points in zip(found.tolist(), family.samples(outputs).double().tolist(), strict=True):
        for level, quantile in zip(LEVELS.tolist(), row, strict=True):
            # Point k of K stands at the level (k + 1/2)/K.
            place = min(max(level * len(points) - 0.5, 0.0), len(points) - 1.0)
            low = int(place)
            high = min(low + 1, len(points) - 1)
            expected = points[low] + (place - low) * (points[high] - points[low])
            assert quantile == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", BUILT_IN)
def test_gradients_do_not_depend_on_how_the_tokens_are_cut(name):
    family = build_family(family_settings(name))
    g = torch.Generator().manual_seed(2)
    mask = torch.tensor([[1, 0, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    old = 0.3 * torch.randn(3, 4, family.num_outputs, generator=g)
    rewards = torch.rand(3, 4, generator=g) * mask
    built = family.build_targets(family.keep(old), rewards, mask, gamma=0.9, lam=0.8, generator=g)
    targets = {field: tensor.flatten(0, 1) for field, tensor in built.items()}
    multipliers = family.multipliers(targets, mask.flatten())
    outputs = 0.3 * torch.randn(12, family.num_outputs, generator=g)
    whole = outputs.clone().requires_grad_()
    (family.loss(whole, targets, multipliers).total * mask.flatten()).sum().backward()
    pieces = outputs.clone().requires_grad_()
    for piece in torch.arange(12).split(5):
        cut = {field: tensor[piece] for field, tensor in targets.items()}
        (family.loss(pieces[piece], cut, multipliers).total * mask.flatten()[piece]).sum().backward()
    assert whole.grad.abs().sum() > 0
    torch.testing.assert_close(pieces.grad, whole.grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_nan_among_the_outputs_shows_in_the_value_and_in_the_loss(name):
    family = build_family(family_settings(name))
    good = 0.3 * outputs_of(family, 1, 2)
    built = family.build_targets(
        family.keep(good), torch.tensor([[0.0, 1.0]]), torch.ones(1, 2), gamma=1.0, lam=0.9,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    targets = {field: tensor.flatten(0, 1) for field, tensor in built.items()}
    bad = good[0].clone()
    bad[0] = torch.nan
    total = family.loss(bad, targets, family.multipliers(targets, torch.ones(2))).total
    assert torch.isnan(family.value(bad)).tolist() == [True, False]
    assert torch.isnan(family.values_from_kept(family.keep(bad))).tolist() == [True, False]
    assert torch.isfinite(total).tolist() == [False, True]


@pytest.mark.parametrize("name", BUILT_IN)
def test_settings_find_their_family_in_a_fresh_process(name):
    settings = family_settings(name, head_seed=7)
    code = (
        "import pickle, sys\n"
        "from verl_dvpo.families.registry import build_family\n"
        "settings = pickle.load(sys.stdin.buffer)\n"
        "print(type(build_family(settings)).__name__, settings.head_seed)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(settings), capture_output=True, check=True)
    assert done.stdout.decode().split() == [type(build_family(settings)).__name__, "7"]


def test_every_activation_has_a_name_and_a_function():
    assert tuple(ACTIVATIONS) == ACTIVATION_NAMES
