# SPDX-License-Identifier: Apache-2.0
"""Critics that are trained with a wrong setting are ill, and well when trained with the setting that the doctor names.

Nothing is made up here: a value family trains on rewards, and what it logs is judged.
"""

import re

import numpy as np
import pytest
import torch
from planted import line_of, write

from verl_dvpo.families.registry import build_family, family_settings

STATES, TOKENS, STEPS, UPDATES = (0.2, 0.5, 0.9), 64, 24, 6


def curves(name, *, rate=0.02, optimiser="Adam", scale=1.0, cloned=False, **settings) -> dict[str, np.ndarray]:
    """Trains a family on three states with rewards of 0 and ``scale``, and logs what a run logs.

    Args:
        name: of the family.
        rate: step of the optimiser.
        optimiser: its name in torch; SGD diverges with too large a step, Adam hardly.
        scale: the higher reward.
        cloned: whether every head begins as the first one.
        settings: of the family.
    """
    family = build_family(family_settings(name, **settings))
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.zeros(family.num_outputs, 1), torch.zeros(family.num_outputs)
    family.init_head(weight, bias, generator)
    if cloned:
        weight, bias = weight[:1].expand_as(weight), bias[:1].expand_as(bias)
    hidden = torch.randn(len(STATES), 1, generator=generator)
    table = (hidden @ weight.T + bias).clone().requires_grad_()
    steps, mask, logged = getattr(torch.optim, optimiser)([table], lr=rate), torch.ones(len(STATES) * TOKENS, 1), []
    for update in range(STEPS * UPDATES):
        rewards = (torch.rand(len(STATES), TOKENS, generator=generator) < torch.tensor(STATES)[:, None]).float() * scale
        outputs = table.repeat_interleave(TOKENS, 0)
        values = family.value(outputs.detach())
        kept = family.keep(outputs.detach())[:, None]
        built = family.build_targets(kept, rewards.reshape(-1, 1), mask, gamma=1.0, lam=1.0, generator=generator)
        targets = {key: tensor.squeeze(1) for key, tensor in built.items()}
        loss = family.loss(outputs, targets, family.multipliers(targets, mask.squeeze(1))).total.mean()
        steps.zero_grad()
        loss.backward()
        if update % UPDATES == 0:
            measured = family.statistics(outputs.detach()) | family.target_statistics(targets)
            logged.append(row(values, rewards.flatten(), loss.item(), table.grad.norm(), measured))
        steps.step()
    return {key: np.array([each[key] for each in logged]) for key in logged[0]}


def row(values, rewards, loss, norm, measured) -> dict[str, float]:
    """The figures of one step, by verl's formulas."""
    found = {f"critic/{key}": float(value.mean()) for key, value in measured.items()}
    explained = 1.0 - (rewards - values).var() / (rewards.var() + 1e-5)
    found |= {"critic/vf_explained_var": float(explained), "critic/vf_loss": loss, "critic/grad_norm": float(norm)}
    for key, numbers in (("values", values), ("rewards", rewards), ("returns", rewards)):
        found |= {f"critic/{key}/{end}": float(getattr(numbers, end)()) for end in ("min", "mean", "max")}
    return found


#: Each state is a third of the batch, so the loss's curvature is 1/3: a step above 6 diverges.
DIVERGES = {"name": "scalar", "optimiser": "SGD", "rate": 6.5}
LEARNS = DIVERGES | {"rate": 1.0}

#: name -> the symptom, its state, the wrong setting, the one that the fix names, and the word of the fix.
CASES = {
    "worse than a constant": ("explained variance", "problem", DIVERGES, LEARNS, "critic.optim.lr"),
    "outside of the rewards": ("values and rewards", "problem", DIVERGES, LEARNS, "critic.optim.lr"),
    "a loss that grows": ("value loss", "problem", DIVERGES, LEARNS, "critic.optim.lr"),
    "one head, copied": (
        "heads", "problem", {"name": "scalar_ensemble", "cloned": True}, {"name": "scalar_ensemble"},
        "critic.value.head_from=seed",
    ),
    "a flow that starts too wide": (
        "spread", "problem", {"name": "value_flow", "value_scale": 60.0}, {"name": "value_flow"},
        "critic.value.value_scale",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_wrong_setting_is_found_and_the_named_one_works(case, tmp_path):
    symptom, state, wrong, right, word = CASES[case]
    small = {"num_noises": 8, "num_frequencies": 8} if wrong["name"] == "value_flow" else {}
    found = line_of(write(tmp_path / "wrong", curves(**wrong, **small)), symptom)
    assert found.state == state, found
    assert word in found.fix
    assert line_of(write(tmp_path / "right", curves(**right, **small)), symptom).state == "ok"


def test_a_support_that_is_too_narrow_is_found_and_the_proposed_one_fits(tmp_path):
    """The fix is two numbers; a critic that is trained with them has no target outside, and explains more."""
    narrow = curves("hl_gauss", scale=5.0)
    found = line_of(write(tmp_path / "narrow", narrow), "support")
    assert found.state == "problem"
    proposed = {key: float(value) for key, value in re.findall(r"critic\.value\.(\w+)=(-?[\d.]+)", found.fix)}
    assert proposed == {"value_min": -1.0, "value_max": 6.0}
    wide = curves("hl_gauss", scale=5.0, **proposed)
    assert line_of(write(tmp_path / "wide", wide), "support").state == "ok"
    assert wide["critic/vf_explained_var"][-1] > narrow["critic/vf_explained_var"][-1] + 0.1
