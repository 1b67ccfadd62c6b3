# SPDX-License-Identifier: Apache-2.0
"""FlowRL as verl calls it: rewards, advantages and loss put together, against a loop over the paper's formula."""

import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from test_configs import compose_config
from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn

from verl_dvpo.flowrl import check_flowrl, flowrl_rewards

ALGORITHM = OmegaConf.create({"flowrl": {"beta": 3.0}})


def actor(**changes):
    bounds = {"clip_ratio": 0.2, "clip_ratio_low": None, "clip_ratio_high": 0.3}
    world = {"dp_size": 2, "batch_num_tokens": 40, "global_batch_size": 8}
    return SimpleNamespace(**{**bounds, "global_batch_info": world, **changes})


def batch():
    rng = torch.Generator().manual_seed(4)
    rewards, old, ref, values, new = torch.randn(5, 4, 6, generator=rng, dtype=torch.float64)
    mask = torch.ones(4, 6, dtype=torch.int64)
    mask[0, 4:], mask[1, 2] = 0, 0
    data = {"token_level_rewards": rewards, "old_log_probs": old - 3, "ref_log_prob": ref - 3, "response_mask": mask}
    return data, values, old - 3 + 0.05 * new, np.array(["a", "a", "b", "b"], dtype=object)


@pytest.mark.parametrize("weights", [None, 0.5])
def test_the_loss_that_verl_gets_is_the_mean_over_all_answers_of_the_papers_formula(weights):
    data, values, new, uids = batch()
    mask = data["response_mask"]
    rewards = flowrl_rewards(data, uids, ALGORITHM)
    advantages, _ = get_adv_estimator_fn("flowrl")(
        token_level_rewards=rewards, response_mask=mask, values=values, gamma=1.0, lam=1.0, index=uids, fields={}
    )
    loss, metrics = get_policy_loss_fn("flowrl")(
        old_log_prob=data["old_log_probs"],
        log_prob=new,
        advantages=advantages,
        response_mask=mask.bool(),
        loss_agg_mode="token-mean",
        config=actor(),
        rollout_is_weights=None if weights is None else torch.full_like(new, weights),
    )
    rows = [mask[i].bool() for i in range(4)]
    totals = [data["token_level_rewards"][i][rows[i]].sum().item() for i in range(4)]
    squares, ratios = [], []
    for i in range(4):
        pair = totals[:2] if i < 2 else totals[2:]
        normalised = (totals[i] - statistics.mean(pair)) / (statistics.stdev(pair) + 1e-6)
        now, ref, old = (each[i][rows[i]] for each in (new, data["ref_log_prob"], data["old_log_probs"]))
        delta = values[i, 0] + now.mean() - 3.0 * normalised - ref.mean()
        ratios.append(float((now.sum() - old.sum()).exp().clamp(0.8, 1.3)))
        squares.append(ratios[-1] * float(delta) ** 2)
    # 8 answers in the whole mini-batch over 2 ranks, which are averaged.
    assert loss.item() == pytest.approx((weights or 1.0) * sum(squares) / 8 * 2)
    assert metrics["actor/flowrl_weight"] == pytest.approx(statistics.mean(ratios))
    apart = torch.cat([(data["old_log_probs"] - new)[i][rows[i]] for i in range(4)])
    assert metrics["actor/ppo_kl"] == pytest.approx(apart.mean().item())


def test_trainers_without_values_are_refused():
    with pytest.raises(ValueError, match=r"adv_estimator is 'flowrl'; it is allowed under trainers that pass"):
        get_adv_estimator_fn("flowrl")(token_level_rewards=torch.zeros(1, 1), response_mask=torch.ones(1, 1))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm.flowrl.beta=0", "algorithm.flowrl.beta is 0; it must be a finite number greater than 0"),
        ("algorithm.gamma=0.9", "algorithm.gamma is 0.9; algorithm.adv_estimator=flowrl allows 1.0"),
        ("algorithm.lam=0.95", "algorithm.lam is 0.95; .* allows 1.0"),
        ("algorithm.use_kl_in_reward=true", "algorithm.use_kl_in_reward is True; .* allows False"),
        ("actor_rollout_ref.actor.use_kl_loss=false", "use_kl_loss is False; .* allows True: it brings the reference"),
        ("actor_rollout_ref.actor.policy_loss.loss_mode=vanilla", "loss_mode is 'vanilla' and .* both or neither"),
        ("algorithm.adv_estimator=dvpo", "loss_mode is 'flowrl' and algorithm.adv_estimator is 'dvpo'"),
        ("+preset=sao", "algorithm.adv_estimator is 'dvpo'; algorithm=flowrl allows 'flowrl'; take out the preset"),
        ("critic.enable=false", "critic.enable is False; .* allows True"),
        ("critic.value.lam=0.9", "critic.value.lam is 0.9; .* null or 1"),
    ],
)
def test_settings_that_take_from_it_what_it_is(override, message):
    with pytest.raises(ValueError, match=message):
        check_flowrl(compose_config("dvpo_trainer", "algorithm=flowrl", override))


def test_it_passes_as_it_ships_and_others_are_left_alone():
    for algorithm in ("flowrl", "ppo", "grpo"):
        check_flowrl(compose_config("dvpo_trainer", f"algorithm={algorithm}"))
