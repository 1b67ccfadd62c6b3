# SPDX-License-Identifier: Apache-2.0
"""Compares measures of variance with hand-worked numbers, rollouts with the model's probabilities, fits with facts."""

import math

import numpy as np
import pytest
import torch

from verl_dvpo.bench.gate.fit import Critic, FitConfig, fit_critic
from verl_dvpo.bench.gate.rollouts import Rollouts, sample
from verl_dvpo.bench.gate.variance import (
    ALL,
    AT,
    BETWEEN,
    FIRST,
    MEAN,
    Policy,
    Sizes,
    between_share,
    explained,
    explained_by,
    measure,
)
from verl_dvpo.bench.tasks.exam import TASK, split
from verl_dvpo.bench.tasks.model import build_model
from verl_dvpo.bench.tasks.registry import TASKS, ModelSize
from verl_dvpo.bench.tasks.tokenizer import build_tokenizer, encode_prompt
from verl_dvpo.families.registry import family_names, family_settings

TOKENIZER = build_tokenizer(max_length=64)
SIZE = ModelSize(hidden_size=32, intermediate_size=32, num_layers=1, num_heads=1, num_key_value_heads=1)
SPLIT = split(0, num_train=40, num_val=30)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model():
    return build_model(TOKENIZER, SIZE, seed=0).eval()


@pytest.fixture(scope="module")
def rollouts(model):
    return sample(model, TOKENIZER, TASK, SPLIT.train[:24], answers=2, longest=9, seed=3)


def rewarded(rollouts: Rollouts, rewards: torch.Tensor) -> Rollouts:
    return Rollouts(rollouts.ids, rollouts.starts, rollouts.lengths, rewards, rollouts.prompts)


def test_explained_variance_by_hand():
    returns = torch.tensor([0.0, 1.0, 2.0, 5.0])  # mean 2, squares 4 + 1 + 0 + 9 = 14
    assert explained(torch.tensor([0.0, 1.0, 2.0, 5.0]), returns) == 1.0
    assert explained(torch.full((4,), 2.0), returns) == 0.0
    assert explained(torch.tensor([1.0, 1.0, 4.0, 2.0]), returns) == pytest.approx(1 - (1 + 0 + 4 + 9) / 14)
    assert explained(torch.tensor([5.0, 5.0, 5.0, 5.0]), returns) < 0
    assert math.isnan(explained(torch.zeros(3), torch.ones(3)))


def test_share_between_prompts_by_hand_and_by_simulation():
    # Prompt means 1 and 3, both with variance 2: between 2 - 2/2 = 1, so 1/(1 + 2).
    assert between_share(torch.tensor([[0.0, 2.0], [2.0, 4.0]])) == pytest.approx(1 / 3)
    assert between_share(torch.tensor([[1.0, 1.0], [2.0, 2.0]])) == 1.0
    assert math.isnan(between_share(torch.ones(3, 2)))
    rng = np.random.default_rng(0)
    found = [
        between_share(torch.tensor(rng.normal(0.0, 1.0, (50, 1)) + rng.normal(0.0, 2.0, (50, 3)))) for _ in range(400)
    ]
    # Truth 1/(1 + 4); two responses are enough for it to be right on average (0.015: five standard errors).
    assert np.mean(found) == pytest.approx(0.2, abs=0.03)


def test_rollouts_are_laid_out_as_prompt_and_response(rollouts):
    assert rollouts.prompts.tolist() == [number for number in range(24) for _ in range(2)]
    for row in range(len(rollouts)):
        example = SPLIT.train[int(rollouts.prompts[row])]
        start, length = int(rollouts.starts[row]), int(rollouts.lengths[row])
        assert rollouts.ids[row, :start].tolist() == encode_prompt(TOKENIZER, example.prompt)
        response = rollouts.ids[row, start : start + length]
        assert (rollouts.ids[row, start + length :] == TOKENIZER.pad_token_id).all()
        assert 1 <= length <= 9
        assert TOKENIZER.eos_token_id not in response[:-1].tolist()
        assert length == 9 or int(response[-1]) == TOKENIZER.eos_token_id
        text = TOKENIZER.decode(response, skip_special_tokens=True)
        assert float(rollouts.rewards[row]) == pytest.approx(TASK.score([text], example.truth)["score"])
        assert rollouts.mask[row].tolist() == [1.0] * length + [0.0] * (rollouts.mask.shape[1] - length)
        assert rollouts.states[row, :length].tolist() == list(range(start - 1, start + length - 1))
        rewards = rollouts.token_rewards[row]
        assert float(rewards[length - 1]) == float(rollouts.rewards[row]) == float(rewards.sum())


def test_sampling_repeats_and_leaves_the_callers_random_state(model, rollouts):
    state = torch.get_rng_state()
    again = sample(model, TOKENIZER, TASK, SPLIT.train[:24], answers=2, longest=9, seed=3)
    other = sample(model, TOKENIZER, TASK, SPLIT.train[:24], answers=2, longest=9, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(again.ids, rollouts.ids)
    assert other.ids.shape != rollouts.ids.shape or not torch.equal(other.ids, rollouts.ids)


def test_sampling_has_the_policys_own_probabilities(model):
    """The share of each first token is its probability under the model, at temperature 1 and without truncation."""
    example = SPLIT.train[0]
    drawn = sample(model, TOKENIZER, TASK, [example], answers=2000, longest=1, seed=0)
    first = drawn.ids[torch.arange(2000), drawn.starts]
    with torch.no_grad():
        logits = model(torch.tensor([encode_prompt(TOKENIZER, example.prompt)])).logits[0, -1]
    probabilities = logits.double().softmax(0)
    counts = torch.bincount(first, minlength=len(probabilities)).double()
    chi2 = ((counts - 2000 * probabilities).square() / (2000 * probabilities)).sum()
    # 103 degrees of freedom: mean 103, standard deviation 14.4
    assert 103 - 5 * 14.4 < float(chi2) < 103 + 5 * 14.4


def test_a_task_with_a_user_is_refused(model):
    with pytest.raises(ValueError, match="task is 'dialogue'"):
        sample(model, TOKENIZER, TASKS["dialogue"], SPLIT.val, answers=1, longest=3, seed=0)


def test_outputs_are_those_at_the_state_before_each_token_without_padding(model, rollouts):
    critic = Critic(model, family_settings("quantile_ensemble", num_heads=2, num_quantiles=3))
    with torch.no_grad():
        together = critic(rollouts)
        for row in (0, 5, 11):
            start, length = int(rollouts.starts[row]), int(rollouts.lengths[row])
            hidden = model.model(rollouts.ids[row : row + 1, : start + length]).last_hidden_state[0]
            alone = critic.head(hidden[start - 1 : start + length - 1])
            assert torch.allclose(together[row, :length], alone, atol=1e-5)


@pytest.mark.parametrize("family", [name for name in family_names() if name != "value_flow"])
def test_a_critic_learns_what_its_tokens_tell(model, rollouts, family):
    """The return is 1 where the prompt is longer than the median, else 0."""
    returns = (rollouts.starts > rollouts.starts.float().median()).float()
    seen = rewarded(rollouts, returns)
    before = [parameter.clone() for parameter in model.parameters()]
    config = FitConfig(epochs=25, update=48, mini_batch=12, learning_rate=3e-3)
    critic = fit_critic(model, family_settings(family), seen, config)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    found = {name: value for name, place, value in explained_by(critic.values(seen), seen) if math.isnan(place)}
    assert found[FIRST] > 0.5
    assert found[ALL] > 0.5


def test_fits_repeat_and_differ_by_seed(model, rollouts):
    settings = family_settings("scalar")
    one, same, other = (
        fit_critic(model, settings, rollouts, FitConfig(epochs=1, seed=seed)).values(rollouts) for seed in (0, 0, 1)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_positions_use_the_responses_that_reach_them():
    rollouts = Rollouts(
        ids=torch.zeros(3, 5, dtype=torch.long),
        starts=torch.tensor([2, 2, 2]),
        lengths=torch.tensor([1, 3, 3]),
        rewards=torch.tensor([0.0, 1.0, 3.0]),
        prompts=torch.arange(3),
    )
    values = torch.tensor([[0.0, 9.0, 9.0], [1.0, 1.0, 2.0], [3.0, 2.0, 2.0]])
    found = explained_by(values, rollouts)
    assert found[0][::2] == (FIRST, 1.0)
    # over all tokens: returns 0, 1 1 1, 3 3 3, mean 12/7; errors 0, 0 0 1, 0 1 1
    total = sum((r - 12 / 7) ** 2 for r in (0, 1, 1, 1, 3, 3, 3))
    assert found[1][::2] == (ALL, pytest.approx(1 - 3 / total))
    assert found[2:] == [(AT, 0.0, 1.0), (AT, 1.0, pytest.approx(1 - 1 / 2)), (AT, 2.0, pytest.approx(1 - 2 / 2))]


def test_measuring_gives_every_quantity_of_every_seed(model):
    policy = Policy(TASK, model, TOKENIZER, 9, SPLIT.train, SPLIT.val)
    sizes, fit = Sizes(fitted=30, prompts=20, answers=2), FitConfig(epochs=1)
    seen: list[str] = []
    with pytest.raises(ValueError, match="reward of exam is 0 on every"):  # an untrained model earns nothing
        measure(policy, {}, sizes=sizes, fit=fit, seeds=[0])
    generous = Policy(_length_task(), model, TOKENIZER, 9, SPLIT.train, SPLIT.val)
    critics = {"ppo": family_settings("scalar")}
    table = measure(generous, critics, sizes=sizes, fit=fit, seeds=[0, 1], note=seen.append)
    assert len(seen) == 2
    for seed in (0, 1):
        mine = table[table["seed"] == seed]
        assert set(mine[mine["critic"] == ""]["quantity"]) >= {BETWEEN, MEAN}
        assert set(mine[mine["critic"] == "ppo"]["quantity"]) == {FIRST, ALL, AT}
    assert table[(table["seed"] == 0) & (table["quantity"] == ALL)]["value"].item() != (
        table[(table["seed"] == 1) & (table["quantity"] == ALL)]["value"].item()
    )


def _length_task():
    import dataclasses

    return dataclasses.replace(TASK, score=lambda turns, truth: {"score": len(turns[0]) / 10, "acc": 0.0})


@pytest.mark.parametrize("fields", [{"fitted": 0}, {"prompts": 1}, {"answers": 1}])
def test_impossible_sizes_are_named(fields):
    (name,) = fields
    with pytest.raises(ValueError, match=f"{name} is {fields[name]}; it must be at least"):
        Sizes(**fields)


def test_more_prompts_than_there_are_is_refused(model):
    policy = Policy(TASK, model, TOKENIZER, 9, SPLIT.train, SPLIT.val)
    with pytest.raises(ValueError, match=r"prompts is 31; exam has 30 such prompts"):
        measure(policy, {}, sizes=Sizes(fitted=1, prompts=31, answers=2), fit=FitConfig(), seeds=[0])


@pytest.mark.parametrize("fields", [{"epochs": 0}, {"mini_batch": 0}, {"learning_rate": 0.0}, {"lam": 1.1}])
def test_impossible_fits_are_named(fields):
    (name,) = fields
    with pytest.raises(ValueError, match=f"{name} is {fields[name]}; it must be"):
        FitConfig(**fields)
