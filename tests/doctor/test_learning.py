# SPDX-License-Identifier: Apache-2.0
"""Every family learns in the doctor's training; one that does not is found."""

import pytest
import torch

from verl_dvpo.doctor.learning import CLOSE, judge_family
from verl_dvpo.doctor.training import LEAST, learn, learn_all
from verl_dvpo.families.base import FamilyLoss
from verl_dvpo.families.registry import build_family, family_names, family_settings
from verl_dvpo.families.scalar import ScalarFamily


@pytest.mark.parametrize("name", family_names())
def test_every_family_learns(name):
    outcome = learn(build_family(family_settings(name)), updates=LEAST, seconds=0.0)
    assert outcome["updates"] == LEAST
    assert outcome["first"] > 1.5 * CLOSE
    assert judge_family(name, outcome).state == "ok"


def no_gradient(self, outputs, targets, multipliers=None):
    return FamilyLoss(total=0.0 * outputs.sum(-1), terms={})


def upside_down(self, outputs, targets, multipliers=None):
    return FamilyLoss(total=-(outputs[..., 0] - targets["returns"].squeeze(-1)).square(), terms={})


def not_numbers(self, outputs, targets, multipliers=None):
    return FamilyLoss(total=torch.nan * outputs.sum(-1), terms={})


def raises(self, outputs, targets, multipliers=None):
    raise KeyError("returns")


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (no_gradient, "it has not learned: error of the value 0.5"),
        (upside_down, "it has not learned"),
        (not_numbers, "its outputs are not numbers"),
        (raises, "KeyError: 'returns'"),
    ],
)
def test_a_family_that_does_not_learn_is_found_and_well_when_mended(loss, text, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(ScalarFamily, "loss", loss)
        ((name, outcome),) = learn_all(["scalar"])
    found = judge_family(name, outcome)
    assert (found.name, found.state) == ("family scalar", "problem")
    assert found.text.startswith(text)
    assert "check_family" in found.fix
    ((name, outcome),) = learn_all(["scalar"])
    assert judge_family(name, outcome).state == "ok"
