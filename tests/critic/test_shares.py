# SPDX-License-Identifier: Apache-2.0
"""``critic/share/<term>`` against autograd of separate losses, and against the update without it."""

import pytest
import torch

from critic import harness
from verl_dvpo.critic.shares import TermShares, is_due
from verl_dvpo.critic.store import KeptSamples, build_targets
from verl_dvpo.distributional import TERMS
from verl_dvpo.families.base import FamilyLoss
from verl_dvpo.families.registry import build_family, family_settings

COEF = {name: 0.1 * (i + 1) for i, name in enumerate(TERMS)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return harness.save_model(tmp_path_factory.mktemp("model"))


def separate(family, outputs, targets, mask, coef) -> dict[str, float]:
    """Each term of the whole update on its own: norms of the gradient of coef times its masked mean; then shares."""
    multipliers = family.multipliers(targets, mask)
    norms = {}
    for name, coefficient in coef.items():
        leaf = outputs.detach().clone().requires_grad_()
        term = family.loss(leaf, targets, multipliers).terms[name]
        norms[name] = 0.0
        if term.requires_grad:  # a tail of fewer than three points has no curvature
            (coefficient * (term * mask).sum() / mask.sum()).backward()
            norms[name] = float(leaf.grad.double().pow(2).sum() ** 0.5)
    return {name: norm / sum(norms.values()) for name, norm in norms.items()}


@pytest.mark.parametrize(
    ("name", "settings", "coef"),
    [
        ("quantile_ensemble", {"num_quantiles": 40, "coef": COEF, "constraint": "token"}, {"quantile": 1.0, **COEF}),
        ("quantile_ensemble", {"num_quantiles": 40, "coef": COEF}, {"quantile": 1.0, **COEF}),
        ("scalar_ensemble", {"coef": {"shift": 0.7}}, {"squared_error": 0.5, "consistency": 0.1, "shift": 0.7}),
    ],
)
def test_shares_over_micro_batches_and_ranks_are_those_of_separate_losses(name, settings, coef):
    family = build_family(family_settings(name, **settings))
    g = torch.Generator().manual_seed(0)
    old, outputs = torch.randn(3, 4, family.num_outputs, generator=g), torch.randn(12, family.num_outputs, generator=g)
    mask = torch.tensor([[1.0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    built = family.build_targets(family.keep(old), torch.randn(3, 4, generator=g) + 1, mask, gamma=0.9, lam=0.8)
    targets, flat = {field: tensor.flatten(0, 1) for field, tensor in built.items()}, mask.flatten()
    multipliers = family.multipliers(targets, flat)
    ranks = []
    for pieces in ([slice(0, 2), slice(2, 5)], [slice(5, 12)]):
        shares = TermShares()
        for piece in pieces:
            cut = {field: tensor[piece] for field, tensor in targets.items()}
            shares.add(
                outputs[piece],
                lambda leaf, cut=cut: family.loss(leaf, cut, multipliers),
                lambda term, piece=piece: (term * flat[piece]).sum() / flat.sum(),
            )
        ranks.append(shares)
    sent: list[torch.Tensor] = []
    ranks[0].shares(lambda squares: sent.append(squares.clone()) or squares)
    found = ranks[1].shares(lambda squares: squares + sent[0])
    expected = separate(family, outputs, targets, flat, coef)
    assert found == pytest.approx(expected, rel=1e-5)
    assert sum(found.values()) == pytest.approx(1.0)
    assert min(found.values()) >= 0
    assert sum(share > 0.01 for share in found.values()) >= 3


def test_terms_without_gradient_or_coefficient():
    def loss_of(leaf):
        one, two = leaf[:, 0].square(), torch.ones(leaf.shape[0])
        return FamilyLoss(total=one + two, terms={"one": one, "two": two, "three": one}, coef={"one": 1.0, "two": 1.0})

    shares = TermShares()
    shares.add(torch.ones(4, 2), loss_of, torch.Tensor.sum)
    assert shares.shares() == {"one": 1.0, "two": 0.0}
    none = TermShares()
    assert none.shares() == {}
    none.add(torch.zeros(4, 2), loss_of, torch.Tensor.sum)  # a gradient of 0 everywhere
    assert none.shares() == {"one": 0.0, "two": 0.0}


def test_when_shares_are_due():
    assert [is_due(0, step) for step in range(4)] == [False] * 4
    assert [is_due(2, step) for step in range(4)] == [True, False, True, False]


def states_of(worker, batch) -> torch.Tensor:
    """(L, D) outputs of the states of all response tokens, by plain forward passes."""
    module, rows = worker.engine.module.eval(), []
    for prompt, ids in zip(batch["prompts"].unbind(), batch["input_ids"].unbind(), strict=True):
        with torch.no_grad():
            rows.append(module(input_ids=ids[None]).logits[0][len(prompt) - 1 : -1].float())
    return torch.cat(rows)


@pytest.mark.parametrize("micro", [1, 8])
def test_the_worker_logs_them_when_due_whatever_the_cut(model, micro):
    value = {"share_every": 2, "coef": COEF}
    worker = harness.make_worker(model, value=value, engine={"micro_batch_size_per_gpu": micro})
    batch = harness.make_batch()
    harness.infer(worker, batch)
    assert not any("critic/share" in name for name in harness.train(worker, batch, step=1))
    harness.infer(worker, batch)
    states = states_of(worker, batch)
    jagged = torch.nested.nested_tensor_from_jagged(worker.family.keep(states), batch["responses"].offsets())
    kept = KeptSamples(jagged, batch, {})
    settings = {"gamma": 0.9, "lam": 0.8, "rows_per_chunk": 32}
    targets = build_targets(worker.family, kept, batch["rm_scores"], batch["response_mask"], **settings).tensors
    mask = batch["response_mask"].values().float()
    expected = separate(worker.family, states, targets, mask, {"quantile": 1.0, **COEF})
    metrics = harness.train(worker, batch, step=2)
    found = {name.removeprefix("critic/share/"): v for name, v in metrics.items() if name.startswith("critic/share/")}
    assert {name: share[0] for name, share in found.items()} == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_measuring_changes_no_gradient(model):
    found = []
    for every in (0, 1):
        worker = harness.make_worker(model, value={"share_every": every})
        gradients, batch = harness.capture_gradients(worker), harness.make_batch()
        harness.infer(worker, batch)
        harness.train(worker, batch)
        found.append(gradients)
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
