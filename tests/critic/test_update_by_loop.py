# SPDX-License-Identifier: Apache-2.0
"""The multipliers that an update logs against plain loops: trace, reward, mask, sides and the draws' seed."""

import numpy as np
import pytest
import torch

from critic import harness

GAMMA, LAM, QUANTILES, TAIL = 0.9, 0.8, 20, 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return harness.save_model(tmp_path_factory.mktemp("model"))


def quantiles_of(worker, batch) -> list[np.ndarray]:
    """Each sequence's (T, M): the sorted mean over heads, by a plain forward pass."""
    module, found = worker.engine.module.eval(), []
    for prompt, ids in zip(batch["prompts"].unbind(), batch["input_ids"].unbind(), strict=True):
        with torch.no_grad():
            states = module(input_ids=ids[None]).logits[0][len(prompt) - 1 : -1].double()
        found.append(np.sort(states.reshape(len(states), 2, QUANTILES).mean(1).numpy(), -1))
    return found


def raw_multipliers(quantiles, rewards, masks, lam: float) -> dict[str, float]:
    """Means over valid tokens of the seven differences but curvature's, before any side is cut."""
    sums, tokens = dict.fromkeys(("cvar", "gain", "shift", "shape_low", "shape_up"), 0.0), 0
    for theta, reward, mask in zip(quantiles, rewards, masks, strict=True):
        following, advantage = np.zeros(QUANTILES), np.zeros(QUANTILES)
        for t in reversed(range(len(theta))):
            if not mask[t]:
                continue
            advantage = reward[t] + GAMMA * following - theta[t] + GAMMA * lam * advantage
            following, q, z = theta[t], theta[t], np.sort(theta[t] + advantage)
            sums["cvar"] += q[:TAIL].mean() - z[:TAIL].mean()
            sums["gain"] += z[-TAIL:].mean() - q[-TAIL:].mean()
            sums["shift"] += z.mean() - q.mean()
            sums["shape_low"] += q[:TAIL].var() - z[:TAIL].var()
            sums["shape_up"] += z[-TAIL:].var() - q[-TAIL:].var()
            tokens += 1
    return {name: value / tokens for name, value in sums.items()}


@pytest.mark.parametrize("penalised", [False, True], ids=["rm_scores", "with_a_kl_penalty"])
@pytest.mark.parametrize(("own_lam", "lift"), [(None, 1.0), (0.3, -2.0)], ids=["violated", "ahead"])
def test_multipliers_are_those_of_a_loop(model, own_lam, lift, penalised):
    coef = dict.fromkeys(("cvar", "gain", "shift", "shape"), 0.01)
    value = {"num_quantiles": QUANTILES, "alpha": 0.2, "beta": 0.2, "lam": own_lam, "coef": coef}
    worker = harness.make_worker(model, value=value)
    with torch.no_grad():
        bias = worker.engine.module.score.bias
        (bias.to_local() if hasattr(bias, "to_local") else bias).mul_(50)  # from ±0.01 to ±0.5
    batch = harness.make_batch()
    scores = [score + lift * (score != 0) for score in batch["rm_scores"].unbind()]
    batch["rm_scores"] = harness.jagged(scores)
    rewards = scores
    if penalised:  # as the trainer makes them with algorithm.use_kl_in_reward
        rewards = [score - 0.1 * torch.arange(1.0, len(score) + 1) for score in scores]
        batch["token_level_rewards"] = harness.jagged(rewards)
    masks = [mask.numpy() for mask in batch["response_mask"].unbind()]
    assert any(0 < mask.sum() < len(mask) for mask in masks)
    lam = LAM if own_lam is None else own_lam
    raw = raw_multipliers(quantiles_of(worker, batch), [r.double().numpy() for r in rewards], masks, lam)
    if lift < 0:  # a two-sided multiplier would show
        assert raw["gain"] < -0.1
        assert raw["shift"] < -0.1
    assert raw["shape_up"] < -1e-4

    harness.infer(worker, batch)
    metrics = harness.train(worker, batch)
    for name, expected in raw.items():
        expected = expected if name == "cvar" else max(0.0, expected)
        assert metrics[f"critic/multiplier/{name}"][0] == pytest.approx(expected, rel=1e-4, abs=1e-6), name


def test_draws_depend_on_seed_step_and_rank_and_on_nothing_else(model, monkeypatch):
    worker = harness.make_worker(model, value={"target_seed": 3})

    def draw(rank: int, step: int) -> list[int]:
        monkeypatch.setattr(worker.engine, "get_data_parallel_rank", lambda: rank)
        generator = worker._generator(step, torch.device("cpu"))
        return torch.randint(1 << 30, (8,), generator=generator).tolist()

    found = {(rank, step): draw(rank, step) for rank in range(3) for step in range(3)}
    assert len({tuple(numbers) for numbers in found.values()}) == 9
    torch.manual_seed(99)
    assert draw(2, 1) == found[2, 1]


def test_the_prompts_reach_a_family_that_sees_them(model, monkeypatch):
    """Two rows with one prompt share an owner in ``shards``, with rows taken a chunk at a time."""
    value = {"family": "robust_bellman", "heads_see": "shards", "num_heads": 3, "num_quantiles": None}
    worker = harness.make_worker(model, value=value | {"rows_per_chunk": 2})
    batch = harness.make_batch()
    harness.infer(worker, batch)
    weights = {}
    build = worker._build_targets

    def spy(*arguments):
        targets = build(*arguments)
        rows = batch["responses"].offsets()[:-1]
        for prompt, row in zip(batch["prompts"].unbind(), targets.tensors["weights"][rows].tolist(), strict=True):
            weights.setdefault(tuple(prompt.tolist()), []).append(row)
        return targets

    monkeypatch.setattr(worker, "_build_targets", spy)
    harness.train(worker, batch)
    assert sum(map(len, weights.values())) == 8
    assert all(sorted(row) == [0.0, 0.0, 3.0] for rows in weights.values() for row in rows)
    first, again = dict(weights), harness.make_batch(rows=slice(1, 7))
    weights.clear()
    batch = again  # the same prompts in other rows keep their owners
    harness.infer(worker, batch)
    harness.train(worker, batch, global_batch_size=6)
    assert all(row == first[prompt][0] for prompt, rows in weights.items() for row in rows)
