# SPDX-License-Identifier: Apache-2.0
"""The example of a family outside the package, against scipy."""

import re
from pathlib import Path

import pytest
import torch
from scipy.stats import laplace

from verl_dvpo.critic.config import checked_family, family_config

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_family"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))


def test_quantiles_and_likelihood_are_scipys():
    family = checked_family(family_config("own_family.laplace.LaplaceFamily", min_scale=0.1))
    outputs = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    location, scale = outputs[:, 0].double().numpy(), 0.1 + outputs[:, 1].double().exp().numpy()
    levels = torch.tensor([0.05, 0.3, 0.5, 0.8])
    expected = laplace.ppf(levels.double().numpy()[None], location[:, None], scale[:, None])
    torch.testing.assert_close(family.quantiles(outputs, levels).double(), torch.tensor(expected), rtol=0, atol=1e-5)
    returns = torch.linspace(-1.0, 2.0, 5)
    found = family.loss(outputs, {"returns": returns}).total
    expected = -laplace.logpdf(returns.double().numpy(), location, scale)
    torch.testing.assert_close(found.double(), torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_its_own_bounds_are_checked_like_ours():
    with pytest.raises(ValueError, match=re.escape("critic.value.min_scale is -1.0; it must be a number > 0")):
        family_config("own_family.laplace.LaplaceFamily", min_scale=-1.0)
